"""Schur complement entropy as the paper writes it: sums over pairs, inverses, square roots of matrices; NumPy only."""

import numpy as np


def cosine_features(x):
    return np.array([row / np.sqrt(sum(value * value for value in row)) for row in np.asarray(x, float)])


def gaussian_matrix(x, s):
    x = np.asarray(x, float)
    return np.array([[np.exp(-sum((a - b) ** 2) / (2 * s * s)) for b in x] for a in x])


def covariance(a, b):
    return sum(np.outer(u, v) for u, v in zip(a, b, strict=True)) / len(a)


def gamma(phi_t, phi_x, eta):
    """Return the regression of image features on text features, (D_X, D_T)."""
    c_tt = covariance(phi_t, phi_t) + eta * np.eye(phi_t.shape[1])
    return covariance(phi_x, phi_t) @ (np.linalg.inv(c_tt) if eta else np.linalg.pinv(c_tt, rcond=1e-10))


def by_features(phi_t, phi_x, eta):
    """Return Lam_I and Lam_T, (D_X, D_X) each."""
    explained = gamma(phi_t, phi_x, eta) @ covariance(phi_t, phi_x)
    return covariance(phi_x, phi_x) - explained, explained


def root(a):
    values, vectors = np.linalg.eigh(a)
    return vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T


def by_pairs(k_t, k_x, eta):
    """Return n x n matrices with the nonzero spectra of Lam_I and Lam_T."""
    n = len(k_t)
    h = k_t @ (np.linalg.inv(k_t + n * eta * np.eye(n)) if eta else np.linalg.pinv(k_t, rcond=1e-10))
    h = (h + h.T) / 2
    m = np.eye(n) - h
    return root(m) @ k_x @ root(m) / n, root(h) @ k_x @ root(h) / n


def spectrum(a, size):
    """Return the largest eigenvalues, descending, padded with zeros or cut to a size."""
    values = np.maximum(np.linalg.eigvalsh((a + a.T) / 2), 0)[::-1]
    return np.concatenate((values, np.zeros(max(0, size - len(values)))))[:size]


def entropy(a, order=1.0):
    values = [value for value in spectrum(a, len(a)) if value > 1e-15]
    tau = sum(values)
    if order == 1.0:
        return sum(value * np.log(tau / value) for value in values)
    return tau * np.log(sum((value / tau) ** order for value in values)) / (1 - order) if values else 0.0


def leave_one_out(phi_t, phi_x, eta):
    """Return the mean squared error of features predicted from all other pairs, at the ridge n eta of all."""
    n, errors = len(phi_t), []
    for i in range(n):
        t, x = np.delete(phi_t, i, 0), np.delete(phi_x, i, 0)
        weights = np.linalg.inv(t.T @ t + n * eta * np.eye(t.shape[1])) @ t.T @ x
        errors.append(((phi_x[i] - phi_t[i] @ weights) ** 2).sum())
    return float(np.mean(errors))


def repeated_prompts(groups=10, each=6, d_t=5, d_x=8, noise=1.0, seed=0):
    """Return prompts, each several times, and images that follow them with noise."""
    draw = np.random.default_rng(seed)
    t = draw.standard_normal((groups, d_t)).repeat(each, axis=0)
    return t, t @ draw.standard_normal((d_t, d_x)) + noise * draw.standard_normal((len(t), d_x))
