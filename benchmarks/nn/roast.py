"""ROAST layers: hashed tiles against the dense layer, and against HashedNet with a stored index.

The dense layer is the floor of a forward product, which ROAST computes too after copying the tiles; the training step
adds what Adam does, on N K numbers for the dense layer and on m for ours. At large batches the product, which all
have in common, hides the hashing: "the weight and its gradient" shows it alone. HashedNet is written as published code
is: an int64 index and a float32 sign for each number of W, ``array[index] * sign``, autograd's own gradient.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._runner import Case
from quernel.nn import HashedLinear, RoastLinear, SharedArray

# A core: float32 multiply-adds twice a second, second-level cache bandwidth.
FLOPS, L2_BYTES = 94e9, 210e9
# Products of at most 4096 terms in two orders of summation.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


class IndexedLinear(nn.Module):
    """HashedNet with its index and signs stored: 12 bytes a number of W."""

    def __init__(self, layer: RoastLinear) -> None:
        super().__init__()
        mapped = layer.weight.mapped
        self.values = nn.Parameter(layer.memory.values.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("index", torch.from_numpy(mapped.index()))
        self.register_buffer("signs", torch.from_numpy(mapped.signs_of()).float() * layer.weight.scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.values[self.index] * self.signs, self.bias)


def layers(outputs: int, inputs: int, compression: int, rows: int) -> SimpleNamespace:
    torch.manual_seed(0)
    size = outputs * inputs // compression
    ours = RoastLinear(inputs, outputs, memory=SharedArray(size, seed=1))
    hashed = HashedLinear(inputs, outputs, memory=SharedArray(size, seed=1))
    dense = nn.Linear(inputs, outputs)
    with torch.no_grad():
        dense.weight.copy_(ours.materialize())
        dense.bias.copy_(ours.bias)
    s = SimpleNamespace(
        x=torch.randn(rows, inputs), ours=ours, hashed=hashed, indexed=IndexedLinear(hashed), dense=dense
    )
    s.optimizers = {
        name: torch.optim.Adam(getattr(s, name).parameters(), fused=True) for name in ("ours", "indexed", "dense")
    }
    return s


def forward(name: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(s, name)(s.x)


def step(name: str, s: SimpleNamespace) -> None:
    s.optimizers[name].zero_grad()
    # The input wants a gradient, as that of an inner layer does.
    getattr(s, name)(s.x.detach().requires_grad_()).square().mean().backward()
    s.optimizers[name].step()


def weight_and_gradient(name: str, s: SimpleNamespace) -> None:
    """Make W and bring a gradient of W back to the array: what hashing adds to a dense layer."""
    s.ours.zero_grad()
    s.indexed.zero_grad()
    w = s.ours.materialize() if name == "ours" else s.indexed.values[s.indexed.index] * s.indexed.signs
    w.backward(s.dense.weight.detach())


def equals_the_dense_layer(s: SimpleNamespace) -> None:
    with torch.no_grad():
        # The steps that were timed before trained one of the two.
        s.indexed.values.copy_(s.hashed.memory.values)
        s.indexed.bias.copy_(s.hashed.bias)
        wanted = F.linear(s.x, s.ours.materialize(), s.ours.bias)
        torch.testing.assert_close(s.ours(s.x), wanted, **TOLERANCE)
        torch.testing.assert_close(s.hashed(s.x), s.indexed(s.x), **TOLERANCE)


def gradients_equal_the_dense_layer_s(s: SimpleNamespace) -> None:
    equals_the_dense_layer(s)
    twin = s.ours.materialize().detach().requires_grad_()
    x, other = (s.x.clone().requires_grad_() for _ in range(2))
    s.ours.zero_grad()
    s.ours(x).square().mean().backward()
    F.linear(other, twin, s.ours.bias.detach()).square().mean().backward()
    torch.testing.assert_close(x.grad, other.grad, **TOLERANCE)
    wanted = s.ours.weight.fold(twin.grad) * s.ours.weight.scale
    torch.testing.assert_close(s.ours.memory.values.grad, wanted, **TOLERANCE)


def product_bound(products: int, outputs: int, inputs: int, rows: int, state: SimpleNamespace, threads: int) -> float:
    return products * 2 * rows * outputs * inputs / FLOPS / threads * 1e3


def read_bound(outputs: int, inputs: int, state: SimpleNamespace, threads: int) -> float:
    return 4 * outputs * inputs / L2_BYTES / threads * 1e3


INDEXED = "HashedNet with an index"
SIZES = ((1024, 1024), (4096, 1024))
CASES = [
    *(
        Case(
            name=f"forward {outputs}x{inputs}, {compression}x smaller, batch 256",
            setup=partial(layers, outputs, inputs, compression, 256),
            ours=partial(forward, "ours"),
            peers={"dense": partial(forward, "dense"), INDEXED: partial(forward, "indexed")},
            gate=equals_the_dense_layer,
            target={"dense": 0.8},
            bound_ms=partial(product_bound, 1, outputs, inputs, 256),
            bound="multiply-adds at 94 GFLOP/s a core",
        )
        for outputs, inputs in SIZES
        for compression in (10, 100)
    ),
    *(
        Case(
            name=f"training step {outputs}x{inputs}, {compression}x smaller, batch {rows}",
            setup=partial(layers, outputs, inputs, compression, rows),
            ours=partial(step, "ours"),
            peers={"dense": partial(step, "dense"), INDEXED: partial(step, "indexed")},
            gate=gradients_equal_the_dense_layer_s,
            target={"dense": 1 / 1.5} if rows == 256 else {"dense": 1.0},
            bound_ms=partial(product_bound, 3, outputs, inputs, rows),
            bound="multiply-adds at 94 GFLOP/s a core",
        )
        for outputs, inputs, rows in ((1024, 1024, 256), (4096, 1024, 256), (4096, 4096, 128))
        for compression in (10, 100)
    ),
    *(
        Case(
            name=f"the weight {outputs}x{inputs} and its gradient, {compression}x smaller",
            setup=partial(layers, outputs, inputs, compression, 1),
            ours=partial(weight_and_gradient, "ours"),
            peers={INDEXED: partial(weight_and_gradient, "indexed")},
            gate=gradients_equal_the_dense_layer_s,
            target={INDEXED: 4.0},
            bound_ms=partial(read_bound, 2 * outputs, inputs),
            bound="bytes of W, twice, at 210 GB/s a core",
        )
        for outputs, inputs in SIZES
        for compression in (10, 100)
    ),
    *(
        Case(
            name=f"batch 1, 4096x4096, {compression}x smaller",
            setup=partial(layers, 4096, 4096, compression, 1),
            ours=partial(forward, "ours"),
            peers={"dense": partial(forward, "dense"), INDEXED: partial(forward, "indexed")},
            gate=equals_the_dense_layer,
            target={"dense": 1.0, INDEXED: 4.0},
            bound_ms=partial(read_bound, 4096, 4096),
            bound="bytes of W at 210 GB/s a core: read from the second-level cache",
        )
        for compression in (10, 100)
    ),
]
