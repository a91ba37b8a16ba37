"""Schur complement entropy: streams of cosine pairs, the Gaussian kernel at the paper's size, and the authors' loop.

Peers: a time that the score may take, the Vendi score of the images alone (``vendi-score``, no conditioning), the same
split by hand in NumPy, and the loop over pairs of coordinates that stands for a covariance in the authors' code. The
paper's size, 5,000 pairs and 2,500 frequencies a side, takes too long to be timed in pairs: it is the gate of a smaller
case, which runs it once in a process of its own and holds it to 25 s and 1.2 GB.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks._machine import FLOAT32_OPS
from benchmarks._peers import PeerUnavailable, peer_python
from benchmarks._process import in_fresh_process, resident_bytes
from benchmarks._runner import Case, Isolated, allowed
from quernel.kernels import Gram, SchurEntropy, vendi_score

VENDI = ("vendi-score==0.0.3",)
FLOAT64_OPS = FLOAT32_OPS / 2
COSINE = (50_000, 384)
GAUSSIAN = (1000, 512, 1000)  # pairs, columns, random features
PAPER = (5000, 512, 5000)
PAPER_SECONDS, PAPER_BYTES = 25.0, 1.2e9
LOOP = (400, 512)


def pairs(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts, ten pairs each, and images that follow them in part."""
    draw = np.random.default_rng(0)
    t = draw.standard_normal((n // 10, d), dtype=np.float32).repeat(10, axis=0)
    return t, t + draw.standard_normal((n, d), dtype=np.float32)


def cosine_pairs() -> SimpleNamespace:
    t, x = pairs(*COSINE)
    return SimpleNamespace(t=t, x=x)


def cosine_score(s: SimpleNamespace) -> Any:
    return SchurEntropy().update(s.t, s.x).compute()


def by_hand(s: SimpleNamespace) -> tuple[float, float]:
    """Return what a user writes in NumPy: normalise, covariances, a solve, two spectra."""
    t, x = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (s.t.astype(np.float64), s.x.astype(np.float64)))
    n = len(t)
    c_tt, c_tx, c_xx = t.T @ t / n, t.T @ x / n, x.T @ x / n
    explained = c_tx.T @ np.linalg.solve(c_tt + 1e-3 * np.eye(len(c_tt)), c_tx)
    found = []
    for part in (c_xx - explained, explained):
        values = np.linalg.eigvalsh(part)
        values = values[values > 0]
        found.append(float((values * np.log(values.sum() / values)).sum()))
    return found[0], found[1]


def cosine_bound(s: SimpleNamespace, threads: int) -> float:
    # Products of symmetric matrices, whose other half is a copy.
    n, d = COSINE
    return n * 2 * d * (2 * d + 1) / (FLOAT64_OPS * threads) * 1e3


def is_the_formula(s: SimpleNamespace) -> None:
    found = cosine_score(s)
    np.testing.assert_allclose((found.sce_image, found.sce_text), by_hand(s), atol=1e-9)
    _, x = pairs(2000, 64)
    try:
        python = peer_python(*VENDI)
    except PeerUnavailable:
        return  # the row of that peer says so
    theirs = in_fresh_process(__file__, "vendi_of_kernel", 2000, 64, python=python)
    rows = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(vendi_score(rows @ rows.T, kernel="precomputed"), theirs, rtol=1e-10)


def vendi_of_kernel(n: int, d: int) -> float:
    from vendi_score import vendi

    _, x = pairs(n, d)
    rows = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return float(vendi.score_K(rows @ rows.T))


def vendi_of_images(n: int, d: int) -> Any:
    """Prepare the Vendi score of the images alone, from their covariance."""
    from vendi_score import vendi

    _, x = pairs(n, d)
    return lambda: vendi.score_dual(x.astype(np.float64), normalize=True)


def gaussian_pairs() -> SimpleNamespace:
    n, d, features = GAUSSIAN
    t, x = pairs(n, d)
    return SimpleNamespace(t=t, x=x, features=features, width=float(np.sqrt(2 * d)))


def gaussian_score(s: SimpleNamespace) -> Any:
    return SchurEntropy("gaussian", bandwidth=s.width, n_features=s.features).update(s.t, s.x).compute()


def features_by_hand(s: SimpleNamespace) -> list[float]:
    """Return the report's three entropies in NumPy, of covariances of all features: residual, explained and whole."""
    draw = np.random.default_rng(0)
    phi = []
    for rows in (s.t, s.x):
        angles = rows.astype(np.float64) @ draw.standard_normal((s.features // 2, rows.shape[1])).T / s.width
        phi.append(np.hstack((np.cos(angles), np.sin(angles))) / np.sqrt(s.features // 2))
    n = len(s.t)
    c_tt, c_tx, c_xx = phi[0].T @ phi[0] / n, phi[0].T @ phi[1] / n, phi[1].T @ phi[1] / n
    explained = c_tx.T @ np.linalg.solve(c_tt + 1e-3 * np.eye(len(c_tt)), c_tx)
    found = []
    for part in (c_xx - explained, explained, c_xx):
        values = np.linalg.eigvalsh(part)
        values = values[values > 0]
        found.append(float((values * np.log(values.sum() / values)).sum()))
    return found


def paper_size(folder: str = "") -> list[float]:
    """Return seconds and bytes of the paper's size in this process: 5,000 pairs, 2,500 frequencies a side."""
    n, d, features = PAPER
    t, x = pairs(n, d)
    gaussian_score(SimpleNamespace(t=t[:50], x=x[:50], features=20, width=30.0))  # libraries are loaded before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes()
    start = time.perf_counter()
    gaussian_score(SimpleNamespace(t=t, x=x, features=features, width=float(np.sqrt(2 * d))))
    return [time.perf_counter() - start, float(resident_bytes("VmHWM") - before)]


def fits_at_the_paper_s_size(s: SimpleNamespace) -> None:
    seconds, used = in_fresh_process(__file__, "paper_size", threads=2)
    s.paper = f"{PAPER[0]:,} pairs with {PAPER[2] // 2:,} frequencies a side: {seconds:.1f} s, {used / 1e9:.2f} GB more"
    if seconds > PAPER_SECONDS or used > PAPER_BYTES:
        raise ValueError(f"{s.paper}; {PAPER_SECONDS:.0f} s on two threads and {PAPER_BYTES / 1e9} GB are allowed")
    found = gaussian_score(s)
    # Two draws of the frequencies differ by their noise.
    by_hand = features_by_hand(s)
    if abs(found.sce_image - by_hand[0]) > 0.1 or abs(found.sce_text - by_hand[1]) > 0.1:
        raise ValueError(f"{found.sce_image} and {found.sce_text} are not the scores by hand, {by_hand}")


def coordinates() -> SimpleNamespace:
    n, d = LOOP
    return SimpleNamespace(x=torch.from_numpy(pairs(n, d)[1]))


def covariance(s: SimpleNamespace) -> torch.Tensor:
    rows = s.x.double()
    sums = Gram(rows.shape[1], compute_dtype=torch.float64)
    sums.update(rows / rows.norm(dim=1, keepdim=True))
    return sums.mean()


def loop_over_coordinates(s: SimpleNamespace) -> torch.Tensor:
    """Compare all pairs of columns one at a time, each by its cosine over the batch, divided by their number."""
    d = s.x.shape[1]
    found = torch.zeros(d, d)
    for i in range(d):
        for j in range(d):
            a, b = s.x[:, i], s.x[:, j]
            found[i, j] = torch.dot(a, b) / (a.norm() * b.norm())
    return found / d


def is_the_covariance(s: SimpleNamespace) -> None:
    rows = s.x.double().numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(covariance(s), rows.T @ rows / len(rows), atol=1e-12)


CASES = [
    Case(
        name="50,000 pairs of 384 numbers, cosine kernel, update and score",
        setup=cosine_pairs,
        ours=cosine_score,
        peers={
            "one second": allowed(1.0),
            "NumPy by hand": by_hand,
            "vendi-score, images alone": Isolated("vendi_of_images", *COSINE, requires=VENDI),
        },
        gate=is_the_formula,
        target={"one second": 1.0, "NumPy by hand": 1.0},
        bound_ms=cosine_bound,
        bound="products of both sides' features at 47 GFLOP/s a core (float64)",
    ),
    Case(
        name="1,000 pairs of 512 numbers, Gaussian kernel with 500 frequencies a side; the paper's size in the gate",
        setup=gaussian_pairs,
        ours=gaussian_score,
        peers={"NumPy by hand": features_by_hand},
        gate=fits_at_the_paper_s_size,
        target={"NumPy by hand": 1.0},
        facts=lambda s: s.paper,
    ),
    Case(
        name="covariance of 400 vectors of 512 numbers",
        setup=coordinates,
        ours=covariance,
        peers={"a loop over pairs of coordinates": loop_over_coordinates},
        gate=is_the_covariance,
        target={"a loop over pairs of coordinates": 1000.0},
        threads=(1,),
    ),
]
