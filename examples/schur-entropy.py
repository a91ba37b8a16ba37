"""How much variety did the writers add? Handwritten digits, "generated" from prompts that name the digit.

The prompt is one of the names "zero" to "nine", a writer's image of the digit the answer. If every prompt always gets
the same image, prompts explain everything; the more different images there are a digit, the more diversity is added
that no prompt explains, and the less is left to explain. A plain diversity score sees about the sum of both. The
picture shows both parts against the number of different images, and the directions in which images of a prompt differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from quernel.kernels import ConditionalResidual, SchurEntropy

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KEPT = (1, 2, 4, 8, 16, 32, 64)
PAIRS = 128


def letters(name: str) -> np.ndarray:
    """Return how often each letter and each pair of neighbouring letters (hashed to 64) stands in a name."""
    held = np.zeros(26 + 64)
    codes = [ord(letter) - ord("a") for letter in name]
    for code in codes:
        held[code] += 1
    for first, second in itertools.pairwise(codes):
        held[26 + (31 * first + second) % 64] += 1
    return held


def main() -> None:
    """Score digits with more and more different images a prompt, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("schur-entropy.png"))
    output = parser.parse_args().output

    pixels, digits = load_digits(return_X_y=True)
    draw = np.random.default_rng(0)
    chosen = np.stack([draw.permutation(np.flatnonzero(digits == digit))[: max(KEPT)] for digit in range(10)])
    prompts = np.stack([letters(name) for name in NAMES])

    reports = []
    for kept in KEPT:
        metric = SchurEntropy(keep_pairs=True)
        for digit in range(10):  # a batch a prompt, as a generator would give them
            images = pixels[chosen[digit, np.arange(PAIRS) % kept]]
            metric.update(np.tile(prompts[digit], (PAIRS, 1)), images)
        reports.append(metric.compute(resamples=20))

    figure = plt.figure(figsize=(12, 5))
    left = figure.add_subplot(1, 2, 1)
    for name, values in (
        ("added: not explained by prompts", [report.sce_image for report in reports]),
        ("explained by prompts", [report.sce_text for report in reports]),
        ("plain diversity (log Vendi)", [report.entropy_total for report in reports]),
    ):
        left.plot(KEPT, values, marker="o", label=name)
    added = [report.ci for report in reports if report.ci is not None]
    left.fill_between(KEPT, [ci.low for ci in added], [ci.high for ci in added], alpha=0.2)
    left.set(xlabel="different images a digit", ylabel="entropy (nats)", xscale="log", xticks=KEPT, xticklabels=KEPT)
    left.set_title("ten digit names as prompts, 128 answers each")
    left.legend()

    rows = chosen.ravel()
    model = ConditionalResidual().fit(prompts[digits[rows]], pixels[rows])
    modes = model.modes(prompts[digits[rows]], pixels[rows], k=4, n_pairs=5)
    grid = figure.add_gridspec(4, 6, left=0.55, right=0.98, top=0.88, bottom=0.04, wspace=0.1, hspace=0.15)
    for row, mode in enumerate(modes):
        shown = [mode.direction, *pixels[rows[mode.pairs]]]
        for column, image in enumerate(shown):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(image.reshape(8, 8), cmap="coolwarm" if column == 0 else "gray_r")
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(f"{100 * mode.weight:.1f} %")
    figure.text(0.55, 0.92, "what prompts leave: direction, its share, and the images furthest along it")
    figure.savefig(output, dpi=110)
    sys.stdout.write(f"wrote {output}\n")
    plt.close(figure)


if __name__ == "__main__":
    main()
