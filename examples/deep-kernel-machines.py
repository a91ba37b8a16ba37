"""What a deep kernel machine learns: kernels of digits, layer by layer, and intervals around a curve.

Above, the Gram matrices of images sorted by digit: of the pixels, and of the last layer with the fixed kernel and with
a learned one. Blocks on the diagonal are what a classifier needs. Below, how well each layer's kernel is aligned with
the digits, and a regression on diabetes patients with its intervals of 90 %.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_diabetes, load_digits

from quernel.kernels import DeepKernelClassifier, DeepKernelRegressor, StructGram

mpl.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 12  # images a digit


def top_gram(model: DeepKernelClassifier, x: np.ndarray) -> np.ndarray:
    """Return the last layer's kernel between rows, as far as the inducing points carry it, with unit diagonal."""
    struct: StructGram = model._network()(model._scaled(x)).grams[-1]
    ti, ii = struct.ti.numpy(), struct.ii.numpy()
    return unit(ti @ np.linalg.solve(ii, ti.T))


def unit(gram: np.ndarray) -> np.ndarray:
    """Return cosines."""
    lengths = np.sqrt(gram.diagonal())
    return gram / np.outer(lengths, lengths)


def main() -> None:
    """Train on digits and on diabetes, and draw."""
    parser = argparse.ArgumentParser(description="Kernels of digits before and after learning")
    parser.add_argument("--output", default="deep-kernel-machines.png")
    options = parser.parse_args()

    x, y = load_digits(return_X_y=True)
    train, test = slice(0, 700), slice(700, None)
    shared = {"n_inducing": 40, "max_epochs": 12, "n_samples": 20, "batch_size": 100, "lr": 0.04, "random_state": 0}
    fixed = DeepKernelClassifier(2, nu=float("inf"), **shared).fit(x[train], y[train])
    learned = DeepKernelClassifier(2, nu=0.01, **shared).fit(x[train], y[train])

    figure, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained")
    rows = np.concatenate([np.flatnonzero(y[test] == digit)[:SHOWN] for digit in range(10)]) + test.start
    pixels = x[rows] - x[train].mean(0)
    grams = {
        "pixels": unit(pixels @ pixels.T),
        f"fixed kernel, {fixed.score(x[test], y[test]):.1%} right": top_gram(fixed, x[rows]),
        f"learned kernel, {learned.score(x[test], y[test]):.1%} right": top_gram(learned, x[rows]),
    }
    for ax, (title, gram) in zip(axes[0], grams.items(), strict=True):
        ax.imshow(gram, cmap="viridis", vmin=-0.2, vmax=1)
        ax.set_title(title)
        ax.set_xticks(SHOWN * (np.arange(10) + 0.5), range(10))
        ax.set_yticks(SHOWN * (np.arange(10) + 0.5), range(10))

    for name, model in (("fixed", fixed), ("learned", learned)):
        axes[1, 0].plot(model.alignment_, "o-", label=name)
    axes[1, 0].set(xticks=range(3), xticklabels=["input", "layer 1", "layer 2"], title="alignment with the digits")
    axes[1, 0].legend()

    table, target = load_diabetes(return_X_y=True, scaled=True)
    model = DeepKernelRegressor(1, n_inducing=20, max_epochs=30, batch_size=100, lr=0.02, random_state=0)
    mean, std = model.fit(table[:300], target[:300]).predict(table[300:], return_std=True)
    order, width = np.argsort(mean), 1.6449 * std
    inside = np.abs(target[300:] - mean) <= width
    axes[1, 1].fill_between(range(len(order)), (mean - width)[order], (mean + width)[order], alpha=0.3, label="90 %")
    axes[1, 1].plot(mean[order], label="prediction")
    axes[1, 1].scatter(range(len(order)), target[300:][order], s=8, c=np.where(inside[order], "black", "red"))
    axes[1, 1].set(title=f"diabetes, held back: {inside.mean():.0%} inside", xlabel="patient, by prediction")
    axes[1, 1].legend()

    column, line = table[:300, [2]], np.linspace(-0.4, 0.5, 200)[:, None]
    mean, std = (
        DeepKernelRegressor(1, n_inducing=10, kernel="rbf", max_epochs=30, batch_size=100, lr=0.02, random_state=0)
        .fit(column, target[:300])
        .predict(line, return_std=True)
    )
    axes[1, 2].scatter(column, target[:300], s=5, c="gray")
    axes[1, 2].plot(line, mean)
    axes[1, 2].fill_between(line[:, 0], mean - 1.6449 * std, mean + 1.6449 * std, alpha=0.3)
    axes[1, 2].set(title="wider where no data is", xlabel="body mass index")
    figure.savefig(options.output, dpi=110)
    sys.stdout.write(f"wrote {options.output}\n")


if __name__ == "__main__":
    main()
