"""Infinite ensembles in two pictures: bands around a regression, and how many networks permute bits exactly.

Left: disease progression of diabetes patients by ``NTKRegressor``, with the spread of the networks that it averages
over. Right: eight bits permuted by averages of trained networks; the share of all 255 inputs that come out right in
every bit.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_diabetes

from quernel.apps.permutations import draw_networks, network_outputs, train_networks
from quernel.kernels import EnsemblePlan, NTKernel, NTKRegressor
from quernel.kernels.ntk import permutation_moments
from quernel.kernels.ntk.plan import thresholds

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BITS, WIDTH, MODELS = 8, 512, 64


def regression(axes: plt.Axes) -> None:
    """Draw predictions, their bands and the truth."""
    x, y = load_diabetes(return_X_y=True)
    x, scaled = x / x.std(0), (y - y.mean()) / y.std()
    train, test = slice(0, 342), slice(342, None)
    model = NTKRegressor(NTKernel(depth=2, sigma_b=0.5), ridge=5.0).fit(x[train], scaled[train])
    mean, std = model.predict(x[test], return_std=True)
    order = np.argsort(mean)
    mean, low, high = (y.mean() + y.std() * part[order] for part in (mean, mean - 2 * std, mean + 2 * std))
    place = np.arange(len(mean))
    axes.fill_between(place, low, high, alpha=0.3, label="two standard deviations of a network")
    axes.plot(place, mean, label="mean of the infinite ensemble")
    axes.plot(place, y[test][order], ".", color="black", label="patients it has not seen")
    axes.set(title=f"Diabetes: R² = {model.score(x[test], scaled[test]):.2f}", xlabel="patient, by prediction")
    axes.set_ylabel("progression after a year")
    axes.legend(fontsize="small")


def permutation(axes: plt.Axes) -> None:
    """Draw how the share of right inputs grows with the ensemble, by both roundings."""
    eye = torch.eye(BITS, dtype=torch.float64)
    networks, _ = train_networks(
        draw_networks(MODELS, WIDTH, BITS, BITS, seed=0), eye, eye.flip(0), n_steps=300, tol=1e-8
    )
    bits = (np.arange(1, 2**BITS)[:, None] >> np.arange(BITS)) & 1
    ones = bits.sum(1)
    x = torch.from_numpy(bits / np.sqrt(ones)[:, None])
    outputs = torch.stack([network_outputs(*w, x) for w in zip(networks.hidden, networks.output, strict=True)])
    averages = outputs.cumsum(0).numpy() / np.arange(1, MODELS + 1)[:, None, None]
    moments = permutation_moments(BITS, ones)
    for rounding, colour in (("midpoint", "tab:blue"), ("sign", "tab:red")):
        cuts = thresholds(moments.mean_on, moments.mean_off, rounding)[:, None]
        # Training vectors are exact; where all bits are set the midpoint has nothing to tell apart.
        known = (ones == 1) | ((ones == BITS) & (rounding == "midpoint"))
        right = ((averages > cuts) == bits[:, ::-1]).all(2) | known
        axes.semilogx(np.arange(1, MODELS + 1), right.mean(1), color=colour, label=f"rounded by {rounding}")
        plan = EnsemblePlan(BITS, rounding=rounding).n_models
        axes.axvline(plan, color=colour, linestyle=":", label=f"planned for 99 %: {plan:,} networks")
    axes.set(
        title="A permutation of 8 bits from 8 examples", xlabel="networks averaged", ylabel="share of inputs right"
    )
    axes.legend(fontsize="small", loc="center right")


def main() -> None:
    """Draw both and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="ntk-permutations.png", help="picture to write")
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    regression(left)
    permutation(right)
    figure.tight_layout()
    output = parser.parse_args().output
    figure.savefig(output, dpi=110)
    sys.stdout.write(f"wrote {output}\n")


if __name__ == "__main__":
    main()
