"""SNNK by its definitions, slow and readable: complex features term by term, Hadamard matrices written out."""

import cmath
import math

import numpy as np


def lam(g, u, damping, dim):
    """Return Lambda_M(g, u) for one direction g and one complex vector u; u.u without a conjugate."""
    dot = sum(complex(a) * complex(b) for a, b in zip(g, u, strict=True))
    square = sum(complex(b) * complex(b) for b in u)
    norm = sum(float(a) ** 2 for a in g)
    return (1 + 4 * damping) ** (dim / 4) * cmath.exp(-damping * norm + math.sqrt(1 + 4 * damping) * dot - square / 2)


def rho(xi):
    """Return the principal square root of 2 pi i xi."""
    return cmath.sqrt(2j * math.pi * xi)


def phi(x, directions, frequencies, damping):
    """Return the complex features of one x, shape (n,)."""
    n = len(frequencies)
    terms = [
        lam(g, [rho(xi) * v for v in x], m, len(g))
        for g, xi, m in zip(directions, frequencies, np.broadcast_to(damping, n), strict=True)
    ]
    return np.array(terms) / math.sqrt(n)


def psi(w, b, directions, frequencies, damping, ratio):
    """Return the complex features of one weight w and bias b, shape (n,)."""
    shift = np.array([cmath.exp(2j * math.pi * xi * b) for xi in frequencies])
    return np.array(ratio) * shift * phi(w, directions, frequencies, damping)


ACTIVATIONS = {"cos": math.cos, "sin": math.sin, "gauss": lambda z: math.exp(-z * z / 2)}


def relu_features(x, directions, threshold=0.0):
    """Return m^-1/2 max(G x, c) of one x, shape (m,)."""
    return np.array([max(float(np.dot(g, x)), threshold) for g in directions]) / math.sqrt(len(directions))


def arc_cosine(x, y, order):
    """Return Cho and Saul's kernel of two vectors."""
    a, b = (math.sqrt(sum(float(v) ** 2 for v in z)) for z in (x, y))
    t = math.acos(max(-1.0, min(1.0, float(np.dot(x, y)) / (a * b))))
    s, c, rest = math.sin(t), math.cos(t), math.pi - t
    shape = (rest, s + rest * c, 3 * s * c + rest * (1 + 2 * c * c))[order]
    return (a * b) ** order * shape / math.pi


def hadamard(size):
    """Return the Hadamard matrix in Sylvester's order."""
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)], float)


def structured_rows(signs, lengths):
    """Return the rows that three signed Hadamard products stand for, shape (n, padded)."""
    size = signs.shape[2]
    h = hadamard(size) / math.sqrt(size)
    blocks = [math.sqrt(size) * h @ np.diag(d[2]) @ h @ np.diag(d[1]) @ h @ np.diag(d[0]) for d in signs.astype(float)]
    return np.concatenate(blocks)[: len(lengths)] * (np.array(lengths) / math.sqrt(size))[:, None]


def ridge(features, targets, alpha):
    """Return weight (q, p) and intercept (q,): alpha relative to the mean variance, the intercept free."""
    mean, offset = features.mean(0), targets.mean(0)
    x, y = features - mean, targets - offset
    gram = x.T @ x
    weight = np.linalg.solve(gram + alpha * np.diagonal(gram).mean() * np.eye(len(gram)), x.T @ y).T
    return weight, offset - weight @ mean
