"""Which model drew this? One image as the query, twelve small generators of digits, and no model is run.

Each generator is a sampler on principal components, fitted on some digits in one style (as they are, inverted, or
slanted). It uploads 30 weighted points of its embedded outputs, with the digits they show as prompts; a held-out image
and its digit ask. The bars say how often the right generator comes first, over 600 held-out images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from quernel.kernels import WeightedRKME, encoder_fingerprint
from quernel.kernels.statistics import median_gamma
from quernel.search import ModelIndex

mpl.use("Agg")
import matplotlib.pyplot as plt

# From narrow to broad: broad ones are what prompts are for.
GROUPS = ((0,), (1, 4), (2, 3, 5), (6, 7, 8, 9))
STYLES = {
    "plain": lambda x: x,
    "blurred": lambda x: (2 * x + np.roll(x, 1, 1) + np.roll(x, -1, 1)) / 4,
    "slanted": lambda x: np.stack([np.roll(x[:, row], (4 - row) // 3, axis=1) for row in range(8)], 1),
}


def sampled(images: np.ndarray, n: int, draw: np.random.Generator) -> np.ndarray:
    """Return n images from a Gaussian on the first principal components: a small generator."""
    pca = PCA(12, random_state=0).fit(images.reshape(len(images), -1))
    codes = draw.standard_normal((n, 12)) * np.sqrt(pca.explained_variance_)
    return np.clip(pca.inverse_transform(codes), 0, 16)


def main() -> None:
    """Build the hub, ask with one image a generator, draw the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("rkme-model-search.png"))
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    half = len(images) // 2

    # What hub, developers and users share: an encoder and a gamma, from public images.
    public = np.concatenate([style(images[:half]).reshape(half, -1) for style in STYLES.values()])
    encoder = PCA(20, random_state=0).fit(public)
    fingerprint = encoder_fingerprint({"components": encoder.components_, "mean": encoder.mean_})
    gamma = median_gamma(encoder.transform(public))

    names, specs, prototypes = [], [], []
    for style, change in STYLES.items():
        for group in GROUPS:
            outputs, prompts = [], []
            for digit in group:
                own = change(images[:half][labels[:half] == digit])
                outputs.append(sampled(own, 200, draw))
                prompts.append(np.tile(np.eye(10)[digit], (200, 1)))
            e = encoder.transform(np.concatenate(outputs))
            spec = WeightedRKME(30, gamma=gamma, rounds=8, encoder=fingerprint, random_state=0)
            specs.append(spec.fit(e, prompts=np.concatenate(prompts)))
            names.append(f"{style} {''.join(map(str, group))}")
            prototypes.append(encoder.inverse_transform(spec.herd(1))[0])
    index = ModelIndex(20, gamma, prompt_dim=10, encoder=fingerprint)
    index.add(specs, meta=[{"name": name} for name in names])

    queries, own, prompts = [], [], []
    for i, name in enumerate(names):
        style, group = STYLES[name.split()[0]], name.split()[1]
        for digit in draw.choice([int(d) for d in group], 50):
            held = images[half:][labels[half:] == digit]
            queries.append(style(held[draw.integers(len(held))][None])[0])
            own.append(i)
            prompts.append(np.eye(10)[digit])
    q = encoder.transform(np.array(queries).reshape(len(queries), -1))
    scores, ids = index.search(q, 4, prompts=np.array(prompts))
    plain = index.search(q, 4)[1]

    figure, axes = plt.subplots(4, 6, figsize=(9.5, 7.2), width_ratios=(1, 1, 1, 1, 1, 1.4))
    for row, i in zip(axes, (0, 250, 350, 550), strict=True):
        row[0].imshow(queries[i], cmap="gray", vmin=0, vmax=16)
        row[0].set_title("query", fontsize=9)
        for panel, score, model in zip(row[1:5], scores[i], ids[i], strict=True):
            panel.imshow(prototypes[model].reshape(8, 8), cmap="gray", vmin=0, vmax=16)
            panel.set_title(f"{index.meta(model)['name']}\nD = {-score:.2f}", fontsize=8)
            if model == own[i]:
                for side in panel.spines.values():
                    side.set(color="tab:green", linewidth=3)
        for panel in row[:5]:
            panel.set(xticks=[], yticks=[])
    for panel in axes[:, 5]:
        panel.remove()
    bars = figure.add_subplot(axes[0, 5].get_gridspec()[1:3, 5])
    right = [100 * np.mean(found[:, 0] == own) for found in (ids, plain)]
    bars.bar(["with\nprompt", "without"], right, color=["tab:green", "tab:gray"])
    bars.set_title("first answer right, %", fontsize=9)
    bars.set_ylim(0, 100)
    figure.suptitle(
        "One image finds its generator (green) among twelve; each shows its first herded output", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(options.output, dpi=110)
    sys.stdout.write(f"wrote {options.output}\n")


if __name__ == "__main__":
    main()
