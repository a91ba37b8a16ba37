"""Publish a density of handwritten digits privately: the exact density of a plane beside releases at several epsilons.

The plane is spanned by two public directions (low cosines over the 8 x 8 pixels), not by principal components of the
digits, which would be private too; so is the box, from pixel values that are known to be 0..16.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from quernel.kernels.features import shift_invariant_kernel
from quernel.sketch import PrivateKDE
from quernel.sketch.dp import Box

BANDWIDTH = 0.25
EPSILONS = (0.1, 0.5, 2.0)


def public_plane() -> np.ndarray:
    """Return two orthonormal patterns of 64 pixels: top against bottom, middle rows against the outer ones."""
    t = np.pi * (np.arange(8) + 0.5) / 8
    patterns = [np.outer(np.cos(k * t), np.ones(8)) for k in (1, 2)]
    return np.stack([p.ravel() / np.linalg.norm(p) for p in patterns])


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="private-kde.png")
    options = parser.parse_args()
    x = load_digits().data / 16 @ public_plane().T
    side = np.linspace(-1.5, 1.5, 60)
    grid = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    exact = shift_invariant_kernel("gaussian", grid, x, bandwidth=BANDWIDTH).mean(1)

    figure, axes = plt.subplots(1, 1 + len(EPSILONS), figsize=(15, 4.2), layout="constrained")
    pictures = {"exact, not private": exact}
    for epsilon in EPSILONS:
        # Each release stands for itself here; together they would need a ledger of at least the sum.
        kde = PrivateKDE(bandwidth=BANDWIDTH, epsilon=epsilon, delta=1e-5, domain=Box(-8.0, 8.0))
        release = kde.partial_fit(x).release()
        density = release.query(grid, mean=True)
        error = np.sqrt(np.mean((density - exact) ** 2)) / exact.max()
        title = f"epsilon {epsilon:g}: error {100 * error:.1f} % of the peak\n{release.nbytes / 1024:.0f} KB published"
        pictures[title] = density
    levels = np.linspace(-0.02, exact.max() * 1.1, 24)
    for axis, (title, values) in zip(axes, pictures.items(), strict=True):
        drawn = axis.contourf(side, side, values.reshape(60, 60), levels=levels, extend="both")
        axis.set_title(title, fontsize=10)
        axis.set_aspect("equal")
    axes[0].plot(*x.T, "w.", markersize=1, alpha=0.35)
    axes[0].set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    figure.suptitle("A density of 1,797 digits that may be published: neighbours add or remove one digit, delta 1e-5")
    figure.savefig(options.output, dpi=110)
    sys.stdout.write(f"wrote {options.output}\n")


if __name__ == "__main__":
    main()
