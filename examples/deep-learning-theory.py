"""Fifty layers on the digits: torch's default, Kaiming's and the critical initialisation, before and during training.

Left, the size of signals by depth (dots: a network as drawn; line: predicted). Right, the loss of gradient descent.
"""

from __future__ import annotations

import argparse
import sys

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn

from quernel.kernels.theory import as_activation, criticality, kernel_recursion
from quernel.nn import ArchitectureAdvisor, critical_init_

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DEPTH, WIDTH, STEPS, BATCH = 50, 64, 140, 64
RATES = (0.008, 0.02)


def network() -> nn.Sequential:
    """Return 50 linear layers with GELU between them."""
    sizes = [64, *[WIDTH] * (DEPTH - 1), 10]
    layers: list[nn.Module] = []
    for i in range(DEPTH):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def kaiming(net: nn.Sequential) -> None:
    """Draw weights for ReLU, as is commonly done for GELU."""
    for layer in net[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)


# Name, initialiser, and the variances (C_W, C_b) that it stands for.
POINT = criticality("gelu")
STARTS = {
    "torch's default": (lambda net: None, (1 / 3, 1 / (3 * WIDTH))),
    "Kaiming, gain of ReLU": (kaiming, (2.0, 0.0)),
    "critical": (lambda net: critical_init_(net, output_power=1.0), POINT.variances()),
}


@torch.no_grad()
def signals(net: nn.Sequential, x: torch.Tensor) -> list[float]:
    """Return the mean square of the preactivations of every hidden layer."""
    sizes = []
    for module in net[:-1]:
        x = module(x)
        if isinstance(module, nn.Linear):
            sizes.append(float(x.square().mean()))
    return sizes


def losses(net: nn.Sequential, x: torch.Tensor, y: torch.Tensor, rate: float) -> list[float]:
    """Train with plain SGD and return the loss of each step, smoothed."""
    optimizer, draw, smooth, curve = torch.optim.SGD(net.parameters(), lr=rate), torch.Generator(), None, []
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,), generator=draw)
        loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        curve.append(smooth)
    return curve


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="deep-learning-theory.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32)
    x = (x - x.mean()) / x.std()
    y = torch.tensor(labels)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, (name, (start, (weight, bias))) in enumerate(STARTS.items()):
        curves = []
        for rate in RATES:
            torch.manual_seed(0)
            net = network()
            start(net)
            if rate == RATES[0]:
                sizes = signals(net, x)
            curves.append(losses(net, x, y, rate))
        best = min(range(len(RATES)), key=lambda k: curves[k][-1] if curves[k][-1] == curves[k][-1] else float("inf"))
        first = (POINT.K_star - bias) / weight if name == "critical" else 1.0
        line = kernel_recursion(first, DEPTH - 1, weight, bias, as_activation("gelu"))
        layers = range(1, DEPTH)
        left.semilogy(layers, line, color=f"C{i}", lw=1.5)
        left.semilogy(layers, sizes, "o", ms=3, color=f"C{i}", label=name)
        right.plot(curves[best], color=f"C{i}", label=f"{name}, lr {RATES[best]:g}")
    advice = ArchitectureAdvisor(64, 10, "gelu", width=WIDTH, depth=DEPTH).suggest()
    left.set(xlabel="layer", ylabel="K, mean square of preactivations", title="Signals at initialisation")
    right.set(xlabel="step", ylabel="training loss", title=f"Training (r = {advice.r:.2g}, r* = {advice.r_star:.2g})")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output, dpi=120)
    sys.stdout.write(f"wrote {arguments.output}\n")


if __name__ == "__main__":
    main()
