"""Large sets of atoms: MiniLM sentence vectors with perturbed copies, clusters, images; and problems over them.

Sentences of STS-B are encoded once, reduced to 64 principal coordinates, and copied with noise until there are n;
images of Fashion-MNIST are shifted and get noise. Everything is drawn from a seed.
"""

from __future__ import annotations

import functools

import _material
import numpy as np
import torch
from numpy.typing import NDArray

from quernel import data

Vectors = NDArray[np.float32]
DIM = 64


@functools.cache
def sentence_vectors() -> Vectors:
    """Return the vectors of the different STS-B dev and test sentences in 64 principal coordinates, float32."""
    held = [s for split in ("dev", "test") for s in _material.sentences(split)]
    with torch.inference_mode():
        vectors = _material.minilm().encode(list(dict.fromkeys(held)))
    rows = np.asarray(vectors, dtype=np.float64)
    rows -= rows.mean(0)
    axes = np.linalg.svd(rows.T @ rows)[0][:, :DIM]
    return (rows @ axes).astype(np.float32)


def sentence_atoms(n: int, seed: int, noise: float = 0.5) -> Vectors:
    """Return n atoms: every vector, and copies with ``noise`` of the spread of each coordinate."""
    rows = sentence_vectors()
    draw = np.random.default_rng(seed)
    copies = rows[draw.integers(0, len(rows), max(0, n - len(rows)))]
    moved = copies + noise * rows.std(0) * draw.standard_normal(copies.shape, dtype=np.float32)
    return np.concatenate([rows[:n], moved.astype(np.float32)])


def clustered_atoms(n: int, seed: int, clusters: int = 1000) -> Vectors:
    """Return n points around ``clusters`` Gaussian centres in 64 dimensions."""
    draw = np.random.default_rng(seed)
    centers = draw.standard_normal((clusters, DIM), dtype=np.float32)
    return centers[draw.integers(0, clusters, n)] + 0.3 * draw.standard_normal((n, DIM), dtype=np.float32)


def inner_target(atoms: Vectors, seed: int) -> NDArray[np.float64]:
    """Return the mean of a tenth of the atoms, those on one side: inside the hull, away from its centre."""
    direction = np.random.default_rng(seed).standard_normal(atoms.shape[1])
    products = atoms @ direction.astype(np.float32)
    return atoms[np.argsort(-products)[: len(atoms) // 10]].mean(0, dtype=np.float64)


def signals(atoms: Vectors, count: int, seed: int, parts: int = 5) -> NDArray[np.float64]:
    """Return signals that are mixtures of a few atoms each, with a tenth of noise."""
    draw = np.random.default_rng(seed)
    weights = draw.dirichlet(np.ones(parts), count)
    chosen = atoms[draw.integers(0, len(atoms), (count, parts))].astype(np.float64)
    clean = np.einsum("ik,ikd->id", weights, chosen)
    return clean + 0.1 * clean.std() * draw.standard_normal(clean.shape)


def images(copies: int, seed: int) -> Vectors:
    """Return the 60,000 images in 0..1, and ``copies`` - 1 shifted and noisy versions of each, (n, 784)."""
    held = data.load("fashion-mnist", split="train")
    pixels = (held.x / 255).astype(np.float32).reshape(-1, 28, 28)
    draw = np.random.default_rng(seed)
    versions = [pixels]
    for _ in range(copies - 1):
        down, right = draw.integers(-2, 3, 2)
        moved = np.roll(pixels, (int(down), int(right)), axis=(1, 2))
        versions.append(moved + 0.05 * draw.standard_normal(moved.shape, dtype=np.float32))
    return np.concatenate(versions).reshape(-1, 784)
