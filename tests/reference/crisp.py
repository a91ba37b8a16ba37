"""CRISP in plain loops, float64: the Chamfer score, the three poolings for a given partition, the loss."""

import numpy as np


def chamfer(query, text):
    """Return sum over q of max over x of <q, x>; minus infinity for an empty text."""
    return sum(max((float(q @ x) for x in text), default=-np.inf) for q in query)


def chamfer_matrix(queries, texts):
    return np.array([[chamfer(query, text) for text in texts] for query in queries])


def best(queries, texts, k):
    """Return scores and numbers of the k best texts of each query."""
    scores = chamfer_matrix(queries, texts)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def cluster_means(tokens, assignment, normalize):
    """Return the mean of the tokens of every cluster that has some."""
    means = [
        np.mean([t for t, a in zip(tokens, assignment, strict=True) if a == c], 0) for c in sorted(set(assignment))
    ]
    return np.array([m / np.linalg.norm(m) for m in means] if normalize else means)


def inertia(tokens, assignment):
    """Return the sum of squared distances to the mean of the own cluster."""
    means = {c: np.mean([t for t, a in zip(tokens, assignment, strict=True) if a == c], 0) for c in set(assignment)}
    return sum(float(((t - means[a]) ** 2).sum()) for t, a in zip(tokens, assignment, strict=True))


def loss(queries, columns, temperature, length_normalize):
    """Return the mean of -log softmax at the positive; queries and columns of texts are lists of matrices."""
    texts = [text for column in columns for text in column]
    terms = []
    for i, query in enumerate(queries):
        scale = temperature * (len(query) if length_normalize else 1)
        logits = np.array([chamfer(query, text) for text in texts]) / scale
        terms.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[i])
    return float(np.mean(terms))
