"""Frank-Wolfe and herding as in a textbook, float64, and an index that is as bad as it may be."""

import numpy as np


def frank_wolfe(atoms, target, start, iterations, step):
    """Return the points of Frank-Wolfe for |w - target|^2 / 2; step: (t, w, direction, grad) -> eta."""
    w = atoms[start].astype(float)
    points = [w]
    for t in range(iterations):
        grad = w - target
        direction = atoms[np.argmin(atoms @ grad)] - w
        w = w + step(t, w, direction, grad) * direction
        points.append(w)
    return np.array(points)


def line_search(t, w, direction, grad):
    return float(np.clip(-(grad @ direction) / (direction @ direction), 0, 1))


def herding(features, n, init):
    """Return the chosen rows and every w, from w_0 on."""
    mu = features.mean(0)
    w = mu.copy() if init == "mu" else 0 * mu
    chosen, points = [], [w]
    for t in range(n):
        i = int(np.argmax(features @ (w if t or init == "mu" else mu)))
        w = w + mu - features[i]
        chosen.append(i)
        points.append(w)
    return np.array(chosen), np.array(points)


def project_to_simplex(y):
    """Return the nearest point with non-negative numbers of sum 1 (Held et al., 1974)."""
    falling = np.sort(y)[::-1]
    cuts = (np.cumsum(falling) - 1) / np.arange(1, len(y) + 1)
    return np.maximum(y - cuts[falling > cuts][-1], 0)


class Lookup:
    """An exact index in float64 with the verbs of ``quernel.search``; ``choose`` may spoil the answer."""

    def __init__(self, choose=None):
        self.rows = None
        self.choose = choose or (lambda products: int(np.argmax(products)))
        self.asked = 0

    def __len__(self):
        return 0 if self.rows is None else len(self.rows)

    def add(self, rows):
        self.rows = np.asarray(rows, float)
        return self

    def search(self, q, k):
        self.asked += 1
        products = self.rows @ np.asarray(q[0], float)
        i = self.choose(products)
        return np.array([[products[i] if i >= 0 else np.nan]]), np.array([[i]])
