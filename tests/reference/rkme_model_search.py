"""Reduced mean embeddings as their formulas say, in plain NumPy and torch.autograd, float64."""

import itertools

import numpy as np
import torch


def gram(y, z, gamma):
    """exp(-gamma |y - z|^2) from differences."""
    return np.exp(-gamma * ((y[:, None] - z[None]) ** 2).sum(-1))


def error(beta, z, x, gamma):
    """E = beta^T K beta - 2 beta^T c + const."""
    return float(beta @ gram(z, z, gamma) @ beta - 2 * beta @ gram(z, x, gamma).mean(1) + gram(x, x, gamma).mean())


def gradient(beta, z, x, gamma):
    """DE/dz by automatic differentiation of the definition."""
    points = torch.tensor(z, requires_grad=True)
    rows, weights = torch.tensor(x), torch.tensor(beta)

    def kernel(a, b):
        return torch.exp(-gamma * (a[:, None] - b[None]).square().sum(-1))

    value = weights @ kernel(points, points) @ weights - 2 * weights @ kernel(points, rows).mean(1)
    return torch.autograd.grad(value, points)[0].numpy()


def cosine_gradient(beta, z, x):
    points = torch.tensor(z, requires_grad=True)
    rows, weights = torch.tensor(x), torch.tensor(beta)
    unit, others = (a / a.norm(dim=1, keepdim=True) for a in (points, rows))
    value = weights @ unit @ unit.T @ weights - 2 * weights @ (unit @ others.T).mean(1)
    return torch.autograd.grad(value, points)[0].numpy()


def written_gradient(beta, z, x, gamma):
    """The formula of the method, in loops: -4 g beta_n [sum_m beta_m k (z_n - z_m) - mean_j k (z_n - x_j)]."""
    k, c = gram(z, z, gamma), gram(z, x, gamma)
    out = np.zeros_like(z)
    for n in range(len(z)):
        own = sum(beta[m] * k[n, m] * (z[n] - z[m]) for m in range(len(z)))
        pull = sum(c[n, j] * (z[n] - x[j]) for j in range(len(x))) / len(x)
        out[n] = -4 * gamma * beta[n] * (own - pull)
    return out


def half_repelled_gradient(beta, z, x, gamma):
    """The gradient of the learnware package's reduction, with half the repulsion between points."""
    k, c = gram(z, z, gamma), gram(z, x, gamma)
    own = np.stack([(beta * k[n]) @ (z[n] - z) for n in range(len(z))])
    pull = np.stack([c[n] @ (z[n] - x) for n in range(len(z))]) / len(x)
    return -2 * gamma * beta[:, None] * (own - 2 * pull)


def mmd2(x, y, gamma, *, unbiased):
    """Means of the kernel over pairs, in loops."""
    k = lambda a, b: float(np.exp(-gamma * ((a - b) ** 2).sum()))  # noqa: E731
    if unbiased:
        own = [np.mean([k(a, b) for a, b in itertools.permutations(rows, 2)]) for rows in (x, y)]
    else:
        own = [np.mean([k(a, b) for a, b in itertools.product(rows, rows)]) for rows in (x, y)]
    return own[0] + own[1] - 2 * np.mean([k(a, b) for a, b in itertools.product(x, y)])


def weights(beta, u, prompt, temperature):
    """A_n = beta_n softmax_n(cos(u_n, prompt) / T), normalised."""
    cosines = u @ prompt / np.linalg.norm(u, axis=1) / np.linalg.norm(prompt)
    a = beta * np.exp(cosines / temperature) / np.exp(cosines / temperature).sum()
    return a / a.sum()


def distance(a, z, images, gamma):
    """D = a^T K a - 2 sum_n a_n mean_i k(z_n, x_i) + mean_ij k(x_i, x_j)."""
    return float(
        a @ gram(z, z, gamma) @ a - 2 * a @ gram(z, images, gamma).mean(1) + gram(images, images, gamma).mean()
    )


def herd(beta, z, candidates, n, gamma):
    chosen = []
    for t in range(n):
        mu = gram(candidates, z, gamma) @ beta
        chosen.append(
            int(np.argmax(mu - sum(gram(candidates, candidates[[s]], gamma)[:, 0] for s in chosen) / (t + 1)))
        )
    return candidates[chosen]
