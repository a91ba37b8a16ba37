"""Representer sketch: look-ups against the network that they replace, and RACE against the sum that it estimates.

The network is an MLP of 123 inputs (Adult), 512 and 256 hidden units and one output; the sketch has L = 256 rows of 16
cells of 16 bits, K = 2 hashes and a projection to p = 16. Numbers in the table are random: speed does not depend on
them. RACE holds 100,000 points of 8 coordinates; a query's peers are the exact sum and what a user would try first.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn

from benchmarks._runner import Case, allowed
from quernel.kernels import LSHKernel
from quernel.nn import SketchLayer
from quernel.sketch import RACE

INPUTS, ROWS, CELLS, HASHES, HIDDEN = 123, 256, 16, 2, 16
POINTS, DIM = 100_000, 8
FLOPS = 94e9  # a core: float32 multiply-adds twice a second
MIX_SECONDS = 1 / 2.5e9  # one 64-bit mixing step in eight lanes takes about 8 cycles
SINGLE = 200
LIMIT_US = 20.0


def networks(rows: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1)).eval()
    layer = SketchLayer(INPUTS, 1, ROWS, CELLS, HIDDEN, n_concat=HASHES, generator=generator).rounded(16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        int8 = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(rows, INPUTS, generator=generator)
    return SimpleNamespace(
        x=x,
        x_half=x.bfloat16(),
        rows=x.numpy(),
        single=[x[i : i + 1] for i in range(min(rows, SINGLE))],
        net=net,
        half=copy.deepcopy(net).bfloat16(),
        int8=int8,
        layer=layer,
        predict=layer.predictor(),
    )


def answers_are_the_table_s(s: SimpleNamespace) -> None:
    layer, few = s.layer, s.x[:20]
    hidden = (few.double() @ layer.projection.double().T + layer.shift.double()).float()
    codes = layer.cells.fused.cells(hidden.numpy())
    held = layer.table.numpy()[np.arange(ROWS), codes, 0] * layer.scale.numpy()
    wanted = held.sum(1, keepdims=True) + layer.bias.detach().numpy()
    # Float32 projections round otherwise; one cell of 256 in 20 rows may differ by that.
    differs = np.abs(s.predict(few.numpy()) - wanted).max(axis=1) > 1e-4
    if differs.sum() > 1:
        raise ValueError(f"{differs.sum()} of 20 answers are not what the cells hold")
    with torch.inference_mode():
        np.testing.assert_array_equal(s.predict(s.rows), layer(s.x).numpy())


def one_by_one(s: SimpleNamespace) -> None:
    for row in s.single:
        s.predict(row)


def network_one_by_one(name: str, s: SimpleNamespace) -> None:
    net = getattr(s, name)
    with torch.inference_mode():
        for row in s.single:
            net(row)


def network(name: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(s, name)(s.x_half if name == "half" else s.x)


def sketch_bound(rows: int, state: SimpleNamespace, threads: int) -> float:
    flops = 2 * HIDDEN * (INPUTS + ROWS * HASHES)
    return rows * (flops / FLOPS + ROWS * (HASHES + 1) * MIX_SECONDS) / threads * 1e3


def density(queries: int) -> SimpleNamespace:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((POINTS, DIM)).astype(np.float32)
    sketch = RACE(DIM, n_rows=1024, n_cells=64, width=4.0, n_concat=1).update(x)
    kernel = LSHKernel("l2", 4.0, 1)
    held = sketch.nbytes // (4 * DIM)
    return SimpleNamespace(
        x=x,
        q=x[:queries] + np.float32(0.1),
        sketch=sketch,
        kernel=kernel,
        sample=x[draw.choice(POINTS, held, replace=False)],
        tree=KernelDensity(bandwidth=1.0, rtol=0.1).fit(x[:10_000]),
    )


def estimates_are_near(s: SimpleNamespace) -> None:
    exact = s.kernel.sums(s.q, s.x)
    error = np.abs(s.sketch.query(s.q) - exact) / exact
    if error.max() > 0.1:
        raise ValueError(f"relative error up to {error.max():.3f}")


CASES = [
    Case(
        name=f"{SINGLE} rows one by one, 123 inputs, L=256, K=2, p=16",
        setup=partial(networks, SINGLE),
        ours=one_by_one,
        peers={
            "fp32 network": partial(network_one_by_one, "net"),
            "torch.ao int8": partial(network_one_by_one, "int8"),
            f"{LIMIT_US:.0f} us a row": allowed(LIMIT_US * 1e-6 * SINGLE),
        },
        gate=answers_are_the_table_s,
        target={"fp32 network": 3.0, f"{LIMIT_US:.0f} us a row": 1.0},
        bound_ms=partial(sketch_bound, SINGLE),
        bound="multiply-adds at 94 GFLOP/s and mixing steps of 8 cycles for eight",
        threads=(1,),
    ),
    *(
        Case(
            name=f"{rows:,} rows at once, 123 inputs, L=256, K=2, p=16",
            setup=partial(networks, rows),
            ours=lambda s: s.predict(s.rows),
            peers={
                "torch.ao int8": partial(network, "int8"),
                "fp32": partial(network, "net"),
                "bf16": partial(network, "half"),
            },
            gate=answers_are_the_table_s,
            target={"torch.ao int8": 1.0},
            bound_ms=partial(sketch_bound, rows),
            bound="multiply-adds at 94 GFLOP/s and mixing steps of 8 cycles for eight",
        )
        for rows in (1024, 10_000)
    ),
    *(
        Case(
            name=f"density of {queries} quer{'y' if queries == 1 else 'ies'} among 100,000 points of 8 coordinates",
            setup=partial(density, queries),
            ours=lambda s: s.sketch.query(s.q),
            peers={
                "exact sum": lambda s: s.kernel.sums(s.q, s.x),
                "sum over a sample of equal bytes": lambda s: s.kernel.sums(s.q, s.sample),
                "tree of 10,000 points, Gaussian, rtol 0.1": lambda s: s.tree.score_samples(s.q),
            },
            gate=estimates_are_near,
            target={"exact sum": 100.0},
        )
        for queries in (1, 64)
    ),
]
