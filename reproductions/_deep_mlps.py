"""Deep networks for ``deep-learning-theory.py``: many of one shape trained side by side, and random ones counted.

A stack holds the weights of networks of one shape along its first axis; they differ in initialisation, learning rate
and seed, and learn from rows in an order of their own. What a stack came to is kept in the user cache under a digest of
its recipe and of the weights that it began with, so that another initialisation is another entry.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _fashion_mnist import MEAN, STD, fashion
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._io import digest_of, write_atomically
from quernel.data import cache_folder
from quernel.nn import critical_init_

ROWS, HELD, BATCH, CLASSES = 5000, 2000, 32, 10
MODULES: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


@functools.cache
def rows(part: str, side: int = 28) -> tuple[Tensor, Tensor]:
    """Return 5,000 training rows of Fashion-MNIST, or 2,000 others, of mean square 1 a pixel; pooled to ``side``."""
    x, y = fashion("train")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    chosen = order[:ROWS] if part == "train" else order[ROWS : ROWS + HELD]
    images = (x[chosen] - MEAN) / STD
    if side != 28:
        images = F.adaptive_avg_pool2d(images, side)
        images = images / rows_scale(side)
    return images.flatten(1), y[chosen]


@functools.cache
def rows_scale(side: int) -> float:
    """Return the root mean square of pooled pixels."""
    x, _ = fashion("train")
    return float(F.adaptive_avg_pool2d((x[:ROWS] - MEAN) / STD, side).square().mean().sqrt())


def mlp(activation: str, inputs: int, width: int, depth: int) -> nn.Sequential:
    """Return a network whose weights are still to be drawn."""
    sizes = [inputs, *[width] * (depth - 1), CLASSES]
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.utils.skip_init(nn.Linear, sizes[i], sizes[i + 1]), MODULES[activation]()]
    return nn.Sequential(*layers[:-1])


def drawn(net: nn.Sequential, method: str, seed: int) -> nn.Sequential:
    """Draw the weights by a method: "critical", "default", "xavier" (gain 1) or "kaiming" (gain of ReLU)."""
    generator = torch.Generator().manual_seed(seed)
    if method == "critical":
        critical_init_(net, generator=generator)
        return net
    with torch.no_grad():
        for layer in net:
            if not isinstance(layer, nn.Linear):
                continue
            bound = layer.in_features**-0.5
            if method == "default":
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)
            elif method == "xavier":
                nn.init.xavier_normal_(layer.weight, generator=generator)
                layer.bias.zero_()
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                layer.bias.zero_()
    return net


@torch.no_grad()
def scale_readout(net: nn.Sequential, x: Tensor) -> None:
    """Bring logits to a mean square of 1, whatever the initialisation."""
    last = net[-1]
    last.bias.zero_()
    size = float(net(x[:500]).square().mean().sqrt())
    if math.isfinite(size) and size > 0:
        last.weight.div_(size)


@dataclass
class Stack:
    """Networks of one shape: weights (A, in, out) and biases (A, 1, out) by layer."""

    activation: str
    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def of(cls, activation: str, nets: Sequence[nn.Sequential]) -> Stack:
        """Copy the parameters of networks."""
        linear = [[layer for layer in net if isinstance(layer, nn.Linear)] for net in nets]
        pairs = list(zip(*linear, strict=True))
        weights = [torch.stack([layer.weight.detach().T for layer in layers]).contiguous() for layers in pairs]
        return cls(
            activation, weights, [torch.stack([layer.bias.detach()[None] for layer in layers]) for layers in pairs]
        )

    def __call__(self, x: Tensor) -> Tensor:  # (A, B, in) -> (A, B, out)
        """Return the logits of every network."""
        s = FUNCTIONS[self.activation]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, s(x) if i else x, weight)
        return x

    def digest(self) -> str:
        """Name the weights."""
        held = hashlib.sha256()
        for tensor in (*self.weights, *self.biases):
            held.update(tensor.numpy().tobytes())
        return held.hexdigest()


def trained(
    stack: Stack, rates: Sequence[float], seeds: Sequence[int], epochs: int, *, side: int = 28, tangent: bool = False
) -> list[dict[str, float]]:
    """Train every network by plain SGD at its rate; return its loss and accuracies in percent, NaN where it diverged.

    With ``tangent`` rates are those of the theory: weights learn at rate / fan-in.
    """
    recipe = {
        "version": 1,
        "start": stack.digest(),
        "rates": [float(f"{rate:.9g}") for rate in rates],
        "seeds": list(seeds),
        "epochs": epochs,
        "side": side,
        "tangent": tangent,
        "activation": stack.activation,
    }
    file = cache_folder() / "reproductions" / f"deep-mlps-{digest_of(recipe)[:16]}.json"
    if not file.is_file():
        figures = _trained(stack, rates, seeds, epochs, side, tangent)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(figures).encode())
    found: list[dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _trained(
    stack: Stack, rates: Sequence[float], seeds: Sequence[int], epochs: int, side: int, tangent: bool
) -> list[dict[str, float]]:
    x, y = rows("train", side)
    rate = torch.tensor(rates)[:, None, None]
    parameters = [*stack.weights, *stack.biases]
    steps = [rate / (w.shape[1] if tangent else 1) for w in stack.weights] + [rate] * len(stack.biases)
    for parameter in parameters:
        parameter.requires_grad_()
    draws = {seed: np.random.default_rng([seed, 1]) for seed in seeds}
    for _ in range(epochs):
        orders = {seed: torch.from_numpy(draw.permutation(ROWS)) for seed, draw in draws.items()}
        order = torch.stack([orders[seed] for seed in seeds])  # (A, ROWS)
        for chosen in order.split(BATCH, dim=1):
            logits = stack(x[chosen])
            losses = F.cross_entropy(logits.flatten(0, 1), y[chosen].flatten(), reduction="sum") / chosen.shape[1]
            grads = torch.autograd.grad(losses, parameters)
            with torch.no_grad():
                for parameter, step, grad in zip(parameters, steps, grads, strict=True):
                    parameter.addcmul_(step, grad, value=-1)
    with torch.no_grad():
        held = {part: [_judged(stack, *(t[i : i + 250] for t in rows(part, side))) for i in range(0, n, 250)]
                for part, n in (("train", ROWS), ("held", HELD))}  # fmt: skip
    mean = {part: torch.stack(found).mean(0) for part, found in held.items()}
    return [
        {"loss": float(loss), "train": 100 * float(train), "held": 100 * float(other)}
        for (loss, train), (_, other) in zip(mean["train"].tolist(), mean["held"].tolist(), strict=True)
    ]


def _judged(stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    """Return loss and share of right answers of every network, (A, 2)."""
    logits = stack(x.expand(len(stack.weights[0]), *x.shape))
    losses = F.cross_entropy(logits.transpose(1, 2), y.expand(len(logits), -1), reduction="none").mean(1)
    return torch.stack((losses, (logits.argmax(-1) == y).float().mean(1)), 1)


def random_networks(
    name: str, count: int, width: int, depth: int, weight: float, bias: float, start: float, seed: int
) -> Iterator[Tensor]:
    """Yield preactivations (count, width) of layers 1, 2, ... of random networks for an input with K^1 = ``start``.

    Given the layer before, neurons are independent and normal with variance C_b + C_W mean s^2: drawing them so is
    exact, and no matrix is needed.
    """
    generator = torch.Generator().manual_seed(seed)
    z = math.sqrt(start) * torch.randn(count, width, generator=generator)
    yield z
    for _ in range(depth - 1):
        spread = bias + weight * FUNCTIONS[name](z).square().mean(1, keepdim=True)
        z = spread.sqrt() * torch.randn(count, width, generator=generator)
        yield z


def last_moments(z: Tensor) -> tuple[float, float]:
    """Return the means over networks of z_i^2, and of z_i^2 z_j^2 over pairs i != j."""
    square = z.double().square()
    n = z.shape[1]
    pairs = (square.sum(1).square() - square.square().sum(1)) / (n * (n - 1))
    return float(square.mean()), float(pairs.mean())


def log_norms(name: str, seeds: Sequence[int], width: int, depth: int) -> Tensor:
    """Return the logarithm of |logits|^2 of critical networks with these seeds, for one input of mean square 1."""
    x, found = torch.ones(1, width), []
    net = mlp(name, width, width, depth)
    for seed in seeds:
        drawn(net, "critical", seed)
        with torch.inference_mode():
            found.append(net(x).double().square().sum().log())
    return torch.stack(found)


def best(found: Sequence[dict[str, Any]], key: str = "loss") -> int:
    """Return the place of the least value; one that diverged is never best."""
    values = [float(one[key]) for one in found]
    return min(range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
