"""ROBE look-ups of 26 click-model fields against tables: 5.2 million rows of 16, an array of a hundredth of that.

Every call gets the next of 16 batches of ids, so that a table's rows are not all in a cache from the call before, as
they are not in use. The array, 3.3 MB, stays in the last-level cache; the table, 333 MB, cannot. Ids are uniform, the
worst case of a table, or Zipf-distributed, where its frequent rows are cached.
"""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._runner import Case
from quernel.nn import RobeEmbeddingBag

FIELDS, ROWS, DIM, BATCH, BATCHES = 26, 200_000, 16, 2048, 16
SIZE = FIELDS * ROWS * DIM // 100
CACHE_BYTES = 97e9  # a core: L3 bandwidth
# The constants of published code; any will do.
A, B, C, PRIME = 1_234_567, 7_654_321, 42, 2038074743


def zipf(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return ranks with probability proportional to 1 / rank, scattered over the vocabulary."""
    ranks = np.exp(draw.random(shape) * np.log(ROWS)).astype(np.int64)
    return ranks * 7919 % ROWS


def state(block: int, skewed: bool = False, tables: bool = True) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    draw = np.random.default_rng(0)
    shape = (BATCHES, BATCH, FIELDS)
    ids = torch.from_numpy(zipf(draw, shape) if skewed else draw.integers(0, ROWS, shape))
    ours = RobeEmbeddingBag([ROWS] * FIELDS, DIM, size=SIZE, block=block, mode=None, generator=generator)
    made = SimpleNamespace(ours=ours, block=block, offsets=torch.arange(FIELDS) * ROWS)
    made.batches = itertools.cycle(list(ids))
    made.joined = itertools.cycle(list(ids + made.offsets))
    if tables:
        made.fused = nn.Embedding.from_pretrained(
            torch.zeros(FIELDS * ROWS, DIM).normal_(generator=generator), freeze=False
        )
        parts = made.fused.weight.detach().split(ROWS)
        made.tables = [nn.Embedding.from_pretrained(part, freeze=False) for part in parts]
        made.sparse = [nn.Embedding.from_pretrained(part, freeze=False, sparse=True) for part in parts]
    return made


def ours(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return s.ours(next(s.batches))


def apart(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        ids = next(s.batches)
        return torch.stack([table(ids[:, f]) for f, table in enumerate(s.tables)], dim=1)


def fused(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return s.fused(next(s.joined))


def by_index(s: SimpleNamespace) -> Tensor:
    """Look up as the published CPU code does: an index tensor of all numbers, then advanced indexing."""
    with torch.inference_mode():
        rows = next(s.joined)[..., None]
        columns = torch.arange(DIM)
        start = (A * rows + B * (columns // s.block) + C) % PRIME % (SIZE - s.block + 1)
        return s.ours.memory.values[start + columns % s.block]


def backward(s: SimpleNamespace, layers: Any, rows: Tensor) -> Tensor:
    rows.backward(torch.ones_like(rows))
    for layer in layers:
        layer.zero_grad(set_to_none=True)
    return rows


def ours_trained(s: SimpleNamespace) -> Tensor:
    return backward(s, [s.ours], s.ours(next(s.batches)))


def apart_trained(s: SimpleNamespace, kind: str) -> Tensor:
    ids, tables = next(s.batches), getattr(s, kind)
    return backward(s, tables, torch.stack([table(ids[:, f]) for f, table in enumerate(tables)], dim=1))


def fused_trained(s: SimpleNamespace) -> Tensor:
    return backward(s, [s.fused], s.fused(next(s.joined)))


def is_the_definition(s: SimpleNamespace) -> None:
    """Compare rows and gradient with the map's own words."""
    ids = next(s.batches)
    rows = (ids + s.offsets).numpy().reshape(-1)
    mapped, values = s.ours.map, s.ours.memory.values
    slots, signs = (torch.from_numpy(part(rows)) for part in (mapped.index, mapped.signs_of))
    got = s.ours(ids)
    if not torch.equal(got.reshape(-1, DIM), values[slots] * signs):
        raise ValueError("rows differ from their definition")
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    (by_ours,) = torch.autograd.grad(got, values, grad)
    wanted = torch.zeros(SIZE, dtype=torch.float64)
    wanted.index_add_(0, slots.reshape(-1), (grad.reshape(-1, DIM) * signs).double().reshape(-1))
    torch.testing.assert_close(by_ours.double(), wanted, rtol=1e-4, atol=1e-4)


def forward_bound(s: SimpleNamespace, threads: int) -> float:
    numbers = BATCH * FIELDS
    return numbers * (2 * 4 * DIM + 8) / (CACHE_BYTES * threads) * 1e3


def backward_bound(s: SimpleNamespace, threads: int) -> float:
    # Forward, then: read the rows' gradient, read and write the slots, and clear the array's gradient.
    numbers = BATCH * FIELDS
    return forward_bound(s, threads) + (numbers * (3 * 4 * DIM + 8) + 4 * SIZE) / (CACHE_BYTES * threads) * 1e3


WHAT = f"{BATCH} x {FIELDS} ids, {FIELDS * ROWS / 1e6:.1f} M rows of {DIM}"
PEERS = {f"{FIELDS} nn.Embedding and stack": apart, "one fused nn.Embedding": fused, "index tensor": by_index}

# Steady state: several batches a sample, so that each competitor's own traffic decides what its caches hold.
STEADY_MS = 30.0

CASES = [
    Case(
        name=f"forward, {WHAT}, Z=16",
        setup=partial(state, 16),
        ours=ours,
        peers=PEERS,
        gate=is_the_definition,
        target=dict(zip(PEERS, (2.0, 0.9, 20.0), strict=True)),
        bound_ms=forward_bound,
        bound="bytes of rows, output and ids at 97 GB/s a core",
        min_ms=STEADY_MS,
        fresh=True,
    ),
    Case(
        name=f"forward, {WHAT}, Z=16, Zipf ids",
        setup=partial(state, 16, skewed=True),
        ours=ours,
        peers=PEERS,
        gate=is_the_definition,
        bound_ms=forward_bound,
        bound="bytes of rows, output and ids at 97 GB/s a core",
        min_ms=STEADY_MS,
        fresh=True,
    ),
    *(
        Case(
            name=f"forward, {WHAT}, Z={block}",
            setup=partial(state, block),
            ours=ours,
            peers=PEERS,
            gate=is_the_definition,
            bound_ms=forward_bound,
            bound="bytes of rows, output and ids at 97 GB/s a core",
            min_ms=STEADY_MS,
            fresh=True,
        )
        for block in (8, 4, 1)
    ),
    Case(
        name=f"forward and backward, {WHAT}, Z=16",
        setup=partial(state, 16),
        ours=ours_trained,
        peers={
            f"{FIELDS} nn.Embedding and stack": partial(apart_trained, kind="tables"),
            "the same with sparse gradients": partial(apart_trained, kind="sparse"),
            "one fused nn.Embedding": fused_trained,
        },
        gate=is_the_definition,
        target={f"{FIELDS} nn.Embedding and stack": 1.5},
        bound_ms=backward_bound,
        bound="bytes of rows, output, ids and the array's gradient at 97 GB/s a core",
        fresh=True,
    ),
]
