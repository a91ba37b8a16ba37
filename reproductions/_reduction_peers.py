"""Peers of the reduction: learnware's descent as its source describes it, and goodpoints' kernel thinning.

``thinned`` runs in a process with goodpoints' own packages, so this file imports nothing of ours at its head.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

# 50 points are what 6,400 rows come down to in seven halvings.
HALVINGS = 7


def thinned(file: str, gamma: float, seed: int) -> list[int]:
    """Return the rows that kernel thinning keeps."""
    from goodpoints import kt

    k = gram(np.load(file), np.load(file), gamma)
    return [int(i) for i in kt.thin_K(k, k, HALVINGS, seed=seed)]


def gram(y: np.ndarray, z: np.ndarray, gamma: float) -> np.ndarray:
    """Return exp(-gamma |y - z|^2)."""
    squares = (y**2).sum(1)[:, None] + (z**2).sum(1) - 2 * y @ z.T
    return np.asarray(np.exp(-gamma * np.maximum(squares, 0)))


def kernel_thinning(x: np.ndarray, gamma: float, seed: int) -> list[int]:
    """Run ``thinned`` with the peer's own packages."""
    from quernel._errors import MissingExtraError

    # The benchmarks' processes belong to the checkout, not to the package.
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from benchmarks._peers import PeerUnavailable, peer_python
    from benchmarks._process import in_fresh_process

    try:
        python = peer_python("goodpoints==0.6.3")
    except PeerUnavailable as error:
        raise MissingExtraError("the peer goodpoints", "peers") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, x)
        kept: list[int] = in_fresh_process(__file__, "thinned", str(file), gamma, seed, python=python)
    return kept


def learnware_descent(
    z: np.ndarray, x: np.ndarray, gamma: float, weights: Callable[[np.ndarray], np.ndarray], rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return points and weights after ``rounds`` of one gradient step of 0.1 and the best weights.

    The step is -2 g beta_n [sum_m beta_m k (z_n - z_m) - 2 mean_j k (z_n - x_j)]: half of the true repulsion.
    """
    beta = weights(z)
    for _ in range(rounds):
        kz, kx = gram(z, z, gamma), gram(z, x, gamma) / len(x)
        own = (kz @ beta)[:, None] * z - (kz * beta) @ z
        pull = kx.sum(1)[:, None] * z - kx @ x
        z = z + 0.2 * gamma * beta[:, None] * (own - 2 * pull)
        beta = weights(z)
    return z, beta
