"""Reproduce the effective theory of deep networks (arXiv 2106.10165) on a laptop: its predictions, and what they buy.

Predictions: kernels and fluctuations of 100,000 random networks, the tangent kernel, the growth of the spread of
logits.  Use: fifty layers trained by plain SGD, the ratio of depth to width at a fixed budget, learning rates that
carry over from four layers to thirty-two.
"""

from __future__ import annotations

import functools
import math
import statistics

import torch
from _deep_mlps import (
    MODULES,
    ROWS,
    Stack,
    best,
    drawn,
    last_moments,
    log_norms,
    mlp,
    random_networks,
    rows,
    scale_readout,
    trained,
)
from _harness import Outcome, Reproduction, at_least, at_most
from scipy.special import polygamma
from torch import nn

from quernel.kernels.theory import best_aspect_ratio, criticality, four_vertex, ntk_recursion
from quernel.nn import ArchitectureAdvisor, critical_init_

theory = Reproduction("deep-learning-theory", paper="2106.10165")

TUNING_SEED = 99
WIDTH, DEPTH, NETWORKS, CHUNK = 128, 10, 100_000, 10_000
# tanh moves away from K = 1, where it begins; the others stay at their fixed points.
STARTS = {"relu": 1.0, "tanh": 1.0, "gelu": criticality("gelu").first_kernel()}


@theory.claim(
    name="fluctuations",
    claim="Recursions in depth give size and spread of signals of finite networks",
    scale="100,000 random networks a seed, width 128, 10 layers, ReLU, tanh and GELU at criticality",
    data="one input; networks drawn by their exact law",
    metric="largest relative error of V / (n K^2) in layer 10 (%)",
    baseline="the leading order nu (l - 1) / n",
    rule=at_most(10.0),
    checks=("K within 1 %",),
    seeds=(0, 1, 2),
)
def fluctuations(seed: int) -> Outcome:
    table = []
    for name, start in STARTS.items():
        point = criticality(name)
        found = four_vertex(start, DEPTH, *point.variances(), name)
        moments = []
        for part in range(NETWORKS // CHUNK):
            *_, z = random_networks(name, CHUNK, WIDTH, DEPTH, *point.variances(), start, 1000 * seed + part)
            moments.append(last_moments(z))
        kernel, pairs = (statistics.fmean(column) for column in zip(*moments, strict=True))
        spread, leading = pairs / kernel**2 - 1, (point.nu or 0.0) * (DEPTH - 1) / WIDTH
        predicted = float(found.relative[-1]) / WIDTH if name == "tanh" else point.fluctuation(DEPTH, WIDTH)
        mean = float(found.kernel[-1] + found.mean_correction[-1] / WIDTH)
        table.append(
            {
                "activation": name,
                "K": kernel,
                "K predicted": mean,
                "V/(n K^2)": spread,
                "predicted": predicted,
                "error (%)": 100 * abs(predicted / spread - 1),
                "leading order (%)": 100 * abs(leading / spread - 1),
                "K error (%)": 100 * abs(mean / kernel - 1),
            }
        )
    worst = {key: max(float(row[key]) for row in table) for key in ("error (%)", "leading order (%)", "K error (%)")}
    checks = {"K within 1 %": worst["K error (%)"] <= 1.0}
    return Outcome(worst["error (%)"], worst["leading order (%)"], checks, table)


NTK_WIDTH, NTK_DEPTH, NTK_NETS, NTK_INPUTS = 1024, 4, 200, 64


@theory.claim(
    name="tangent-kernel",
    claim="The tangent kernel of wide networks follows its recursion",
    scale="200 networks of width 1,024 and 4 layers a seed, torch.func; ReLU, tanh and GELU at criticality",
    data="two Gaussian inputs",
    metric="largest relative error of the tangent kernel, over pairs of inputs and activations (%)",
    baseline="the diagonal of the kernel of signals, times depth",
    rule=at_most(3.0),
    seeds=(0, 1, 2),
)
def tangent_kernel(seed: int) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, NTK_INPUTS, generator=generator)
    x[1] = 0.6 * x[0] + 0.8 * x[1]
    x = x / x.square().mean(1, keepdim=True).sqrt()
    table = []
    for name in STARTS:
        point = criticality(name)
        weight, bias = point.variances()
        # The first layer of ``critical_init_`` brings K to its fixed point: inputs enlarged by so much do the same.
        power = (point.first_kernel() - bias) / weight
        wanted = ntk_recursion(x @ x.T / NTK_INPUTS * power, NTK_DEPTH, weight, bias, name)
        net = nn.Sequential(*_layers(name))
        found = torch.zeros(2, 2, dtype=torch.float64)
        for _ in range(NTK_NETS):
            critical_init_(net, name, input_power=1.0, generator=generator)
            with torch.no_grad():
                net[0].weight.div_(math.sqrt(power))
            found += _empirical(net, x * math.sqrt(power)) / NTK_NETS
        error = 100 * (found / wanted.ntk[-1] - 1).abs().max()
        naive = 100 * (NTK_DEPTH * wanted.kernel[-1] / found - 1).abs().max()
        table.append({"activation": name, "error (%)": float(error), "naive (%)": float(naive)})
    return Outcome(max(r["error (%)"] for r in table), max(r["naive (%)"] for r in table), rows=table)


def _layers(name: str) -> list[nn.Module]:
    sizes = [NTK_INPUTS, *[NTK_WIDTH] * (NTK_DEPTH - 1), 1]
    layers: list[nn.Module] = []
    for i in range(NTK_DEPTH):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), MODULES[name]()]
    return layers[:-1]


def _empirical(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Return the tangent kernel with weights learning at 1 / fan-in and biases at 1."""
    parameters = {name: value.detach() for name, value in net.named_parameters()}

    def output(values: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, values, (one,))[0]

    grads = torch.func.vmap(torch.func.grad(output), (None, 0))(parameters, x)
    total = torch.zeros(len(x), len(x), dtype=torch.float64)
    for grad in grads.values():
        flat = grad.flatten(1)
        total += (flat @ flat.T).double() / (grad.shape[-1] if grad.ndim == 3 else 1)
    return total


SPREAD_SEEDS, WIDTHS, DEPTHS = 200, (64, 128, 256), (5, 10, 20, 40)


@theory.claim(
    name="spread",
    claim="The spread of logits over seeds grows like nu depth / width",
    scale="200 seeds of each of 12 shapes, widths 64 to 256, 5 to 40 layers, ReLU; real networks by critical_init_",
    data="one input",
    metric="error of the slope of Var log |logits|^2 against (L - 1) / n (%), nu = 5",
    baseline="infinite width: no spread, 100 % by definition",
    rule=at_most(20.0),
    seeds=(0, 1, 2),
)
def spread(seed: int) -> Outcome:
    """The variance of the logarithm: of a log-normal with a variance near 3, 200 seeds say nothing on its own."""
    nu = criticality("relu").nu or 0.0
    table, top, bottom = [], 0.0, 0.0
    # |logits|^2 given the last hidden layer is chi-square with ten degrees of freedom.
    readout = float(polygamma(1, 5))
    for width in WIDTHS:
        for depth in DEPTHS:
            seeds = range(SPREAD_SEEDS * (1000 * seed + depth), SPREAD_SEEDS * (1000 * seed + depth + 1))
            variance = float(log_norms("relu", seeds, width, depth).var()) - readout
            x = (depth - 1) / width
            weight = (nu * x + readout) ** -2
            top, bottom = top + weight * x * variance, bottom + weight * x * x
            table.append({"width": width, "depth": depth, "Var": variance, "nu (L - 1) / n": nu * x})
    slope = top / bottom
    return Outcome(100 * abs(slope / nu - 1), 100.0, rows=table, notes=[f"slope {slope:.3f}, nu {nu:g}"])


FIFTY, EPOCHS, RATES = 50, 10, (0.001, 0.002, 0.004, 0.008)
METHODS = ("critical", "default", "xavier", "kaiming")
TRAINABLE = ("tanh", "relu", "gelu", "silu")
DEAD = 30.0
SEEDS = (0, 1, 2, 3, 4)


def fifty(activation: str, method: str, seed: int, scaled: bool) -> nn.Sequential:
    """Return a network of fifty layers, as drawn or with logits brought to a mean square of 1."""
    net = drawn(mlp(activation, 784, WIDTH, FIFTY), method, seed)
    if scaled:
        scale_readout(net, rows("train")[0])
    return net


@functools.cache
def tuned(activation: str) -> dict[str, tuple[float, bool]]:
    """Return of every method the rate, and whether the readout is scaled, with the least loss on a seed of its own.

    Where signals have died a scaled readout is huge and diverges; peers may do without. Ours is always scaled.
    """
    arms = [
        (method, rate, scaled)
        for method in METHODS
        for scaled in ((True,) if method == "critical" else (True, False))
        for rate in RATES
    ]
    nets = [fifty(activation, method, TUNING_SEED, scaled) for method, _, scaled in arms]
    found = trained(Stack.of(activation, nets), [rate for _, rate, _ in arms], [TUNING_SEED] * len(arms), EPOCHS)
    chosen = {}
    for method in METHODS:
        places = [i for i, arm in enumerate(arms) if arm[0] == method]
        _, rate, scaled = arms[places[best([found[i] for i in places])]]
        chosen[method] = (rate, scaled)
    return chosen


@functools.cache
def fifty_trained(activation: str) -> dict[tuple[str, int], dict[str, float]]:
    """Return what every method and seed came to."""
    arms = [(method, seed) for method in METHODS for seed in SEEDS]
    setting = tuned(activation)
    nets = [fifty(activation, method, seed, setting[method][1]) for method, seed in arms]
    rates = [setting[method][0] for method, _ in arms]
    found = trained(Stack.of(activation, nets), rates, [seed for _, seed in arms], EPOCHS)
    return dict(zip(arms, found, strict=True))


@theory.claim(
    name="trainability",
    claim="Critical initialisation makes networks of fifty layers without norms trainable, for every activation",
    scale="50 layers of width 128, plain SGD, batch 32, 10 epochs, rates of {.001, .002, .004, .008} tuned a method",
    data="Fashion-MNIST, 5,000 training rows",
    metric="training accuracy (%), the worst of tanh, ReLU, GELU and SiLU",
    baseline="torch's default, the best of the four",
    rule=at_least(70.0),
    checks=(
        "torch's default stays at 30 % or less for at least three of them",
        "Xavier with gain 1 stays at 30 % or less for at least three of them",
        "a smaller loss than Kaiming's (gain of ReLU) for GELU and SiLU",
    ),
    seeds=SEEDS,
)
def trainability(seed: int) -> Outcome:
    held = {(a, m): fifty_trained(a)[m, seed] for a in TRAINABLE for m in METHODS}
    dead = {m: sum(held[a, m]["train"] <= DEAD for a in TRAINABLE) for m in ("default", "xavier")}
    lower = [held[a, "critical"]["loss"] < _or_inf(held[a, "kaiming"]["loss"]) for a in ("gelu", "silu")]
    checks = {
        "torch's default stays at 30 % or less for at least three of them": dead["default"] >= 3,
        "Xavier with gain 1 stays at 30 % or less for at least three of them": dead["xavier"] >= 3,
        "a smaller loss than Kaiming's (gain of ReLU) for GELU and SiLU": all(lower),
    }
    table = []
    for a in TRAINABLE:
        for m in METHODS:
            rate, scaled = tuned(a)[m]
            figures = {key: held[a, m][key] for key in ("train", "loss")}
            table.append({"activation": a, "method": m, "lr": rate, "readout scaled": scaled, **figures})
    ours = min(held[a, "critical"]["train"] for a in TRAINABLE)
    return Outcome(ours, max(held[a, "default"]["train"] for a in TRAINABLE), checks, table)


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


BUDGET, SIDE, SHAPE_EPOCHS = 200_000, 14, 6
SHAPES = (2, 3, 4, 5, 7, 10, 16, 25, 40, 58)
SHAPE_RATES = (0.002, 0.006, 0.02, 0.06)


@functools.cache
def shaped(depth: int) -> tuple[int, dict[tuple[float, int], dict[str, float]]]:
    """Return the width within the budget, and what every rate and seed came to."""
    advisor = ArchitectureAdvisor(SIDE**2, 10, "relu", params=BUDGET)
    width = advisor.widest(BUDGET, depth)
    arms = [(rate, seed) for rate in SHAPE_RATES for seed in SEEDS]
    nets = []
    for _, seed in arms:
        nets.append(drawn(mlp("relu", SIDE**2, width, depth), "critical", seed))
        scale_readout(nets[-1], rows("train", SIDE)[0])
    rates, seeds = zip(*arms, strict=True)
    return width, dict(zip(arms, trained(Stack.of("relu", nets), rates, seeds, SHAPE_EPOCHS, side=SIDE), strict=True))


def at_best_rate(depth: int, seed: int) -> dict[str, float]:
    """Return what one shape and seed came to at the rate with the least training loss."""
    arms = [shaped(depth)[1][rate, seed] for rate in SHAPE_RATES]
    return arms[best(arms)]


@theory.claim(
    name="aspect-ratio",
    claim="At a fixed budget the best ratio of depth to width is near r*",
    scale="200,000 weights, ReLU, 2 to 58 layers, critical initialisation, SGD, 6 epochs, four rates a shape",
    data="Fashion-MNIST pooled to 14 x 14, 5,000 training rows, 2,000 to judge",
    metric="factor between the best ratio and r* = 0.016",
    baseline="the widest shape, two layers",
    rule=at_most(4.0),
    checks=("seeds differ more at r > 0.3 than at r < 0.1",),
    seeds=SEEDS,
)
def aspect_ratio(seed: int) -> Outcome:
    target = best_aspect_ratio(criticality("relu").nu or 0.0, 10)
    table, deep, wide = [], [], []
    for depth in SHAPES:
        width = shaped(depth)[0]
        every = [at_best_rate(depth, s)["held"] for s in SEEDS]
        r, deviation = depth / width, statistics.stdev(every)
        (deep if r > 0.3 else wide if r < 0.1 else []).append(deviation)
        table.append(
            {"depth": depth, "width": width, "r": r, "accuracy": at_best_rate(depth, seed)["held"],
             "mean": statistics.fmean(every), "sd over seeds": deviation}
        )  # fmt: skip
    first = max(table, key=lambda row: float(row["accuracy"]))
    factor = max(first["r"] / target, target / first["r"])
    near = [float(row["mean"]) for row in table if target / 4 <= row["r"] <= 4 * target]
    checks = {"seeds differ more at r > 0.3 than at r < 0.1": statistics.fmean(deep) > statistics.fmean(wide)}
    notes = [f"mean accuracies within a factor 4 of r* span {max(near) - min(near):.2f} points"]
    return Outcome(factor, target / table[0]["r"], checks, table, notes)


# Powers of two, at weights' rate / fan-in and biases' rate; diverging ones are part of the search.
SWEEP = tuple(2.0**k for k in range(-9, 4))
SHALLOW, DEEP, SWEEP_EPOCHS = 4, 32, 3


@functools.cache
def best_sweep(depth: int, seed: int) -> tuple[float, list[float]]:
    """Return the rate with the least training loss, and the losses by rate."""
    nets = []
    for _ in SWEEP:
        nets.append(drawn(mlp("relu", 784, WIDTH, depth), "critical", seed))
        scale_readout(nets[-1], rows("train")[0])
    found = trained(Stack.of("relu", nets), SWEEP, [seed] * len(SWEEP), SWEEP_EPOCHS, tangent=True)
    return SWEEP[best(found)], [one["loss"] for one in found]


@theory.claim(
    name="depth-transfer",
    claim="Learning rates divided by depth carry over from shallow to deep networks",
    scale=f"ReLU, width 128, 4 and 32 layers, critical initialisation, SGD, {ROWS} rows, 3 epochs, rates by twos",
    data="Fashion-MNIST, 5,000 training rows",
    metric="factor between the best eta of 4 and of 32 layers, eta / depth being the rate",
    baseline="the same factor without division by depth",
    rule=at_most(2.0),
    checks=("without it they differ by 4 or more",),
    seeds=(0, 1, 2),
)
def depth_transfer(seed: int) -> Outcome:
    shallow, deep = (best_sweep(depth, seed) for depth in (SHALLOW, DEEP))
    plain = shallow[0] / deep[0]
    scaled = plain * SHALLOW / DEEP
    table = [
        {"rate": rate, f"loss of {SHALLOW} layers": a, f"loss of {DEEP} layers": b}
        for rate, a, b in zip(SWEEP, shallow[1], deep[1], strict=True)
    ]
    factors = [max(factor, 1 / factor) for factor in (scaled, plain)]
    return Outcome(factors[0], factors[1], {"without it they differ by 4 or more": plain >= 4}, table)


if __name__ == "__main__":
    raise SystemExit(theory.main())
