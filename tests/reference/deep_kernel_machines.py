"""Deep kernel machines by their definitions: NumPy, float64, explicit inverses, one formula a line."""

import numpy as np
from scipy.linalg import fractional_matrix_power, solve_continuous_are


def arc_cosine(cross, left, right):
    """First-order arc-cosine kernel of inner products (n, m) and squared lengths."""
    lengths = np.sqrt(np.outer(left, right))
    t = np.arccos(np.clip(cross / lengths, -1, 1))
    return lengths * (np.sin(t) + (np.pi - t) * np.cos(t)) / np.pi


def squared_exponential(cross, left, right):
    return np.exp(-(left[:, None] + right[None] - 2 * cross) / 2)


KERNELS = {"arccos": arc_cosine, "rbf": squared_exponential}


def kernel(ii, ti, t, name, jitter):
    own = np.diag(ii)
    k_ii, k_ti = KERNELS[name](ii, own, own), KERNELS[name](ti, t, own)
    k_t = np.ones_like(t) if name == "rbf" else t
    inflated = np.diag(k_ii) * jitter + jitter
    return k_ii + np.diag(inflated), k_ti, k_t + k_t * jitter + jitter


def layer(k_ii, k_ti, k_t, g_ii):
    a = k_ti @ np.linalg.inv(k_ii)
    return g_ii, a @ g_ii, k_t - np.diag(a @ k_ti.T) + np.diag(a @ g_ii @ a.T)


def kl(g, k):
    m = np.linalg.inv(k) @ g
    return 0.5 * (np.trace(m) - np.linalg.slogdet(m)[1] - len(g))


def outputs(k_ii, k_ti, k_t, mu, cov):
    """Mean (n, q) and variance (n,) for q(u_c) = N(mu_c, cov)."""
    a = k_ti @ np.linalg.inv(k_ii)
    return a @ mu, k_t - np.diag(a @ k_ti.T) + np.diag(a @ cov @ a.T)


def gaussian_bound(y, mean, variance, noise, mu, cov, k_ii, penalty=0.0):
    """The whole objective for Gaussian noise; y: (n, q)."""
    q = y.shape[1]
    fit = -0.5 * np.log(2 * np.pi * noise) - ((y - mean) ** 2 + variance[:, None]) / (2 * noise)
    quadratic = np.trace(mu.T @ np.linalg.inv(k_ii) @ mu) / 2
    return fit.sum() - penalty - (q * kl(cov, k_ii) + quadratic)


def titsias(k_ii, k_ti, k_t, y, noise):
    """The collapsed bound of a sparse Gaussian process (Titsias, 2009); y: (n, q)."""
    n, q = y.shape
    low = k_ti @ np.linalg.inv(k_ii) @ k_ti.T
    cov = low + noise * np.eye(n)
    density = -0.5 * (np.trace(y.T @ np.linalg.inv(cov) @ y) + q * (np.linalg.slogdet(cov)[1] + n * np.log(2 * np.pi)))
    return density - q * (k_t.sum() - np.trace(low)) / (2 * noise)


def posterior(k_ii, k_ti, k_t, y, noise):
    """Mean and variance of f at new points, of a Gaussian process on all data."""
    inverse = np.linalg.inv(k_ii + noise * np.eye(len(k_ii)))
    return k_ti @ inverse @ y, k_t - np.diag(k_ti @ inverse @ k_ti.T)


def geodesic(first, last, share):
    """Return first (first^-1 last)^share."""
    return first @ np.real(fractional_matrix_power(np.linalg.inv(first) @ last, share))


def riccati(below, above, nu, nu_above):
    """The G of nu G below^-1 G + (nu_above - nu) G = nu_above above, from SciPy's solver."""
    root = np.linalg.cholesky(nu * np.linalg.inv(below))
    return solve_continuous_are(0.5 * (nu - nu_above) * np.eye(len(below)), root, nu_above * above, np.eye(len(below)))


def alignment(k, y):
    """Centred kernel alignment of a kernel matrix with targets (n, q)."""
    center = np.eye(len(k)) - 1 / len(k)
    a, b = center @ k @ center, center @ y @ y.T @ center
    return np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
