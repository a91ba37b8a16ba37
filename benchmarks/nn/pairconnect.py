"""Decoding by pair look-ups, a token at a time, against attention with its keys and values kept.

Tables have a million rows, more than any cache holds, and ids are random: a step's pairs were not looked up before, and
their rows come from memory. The peer projects one token, appends its key and value to buffers that were allocated once,
and attends to the last W; the model against the model runs perceptrons and the output layer as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._runner import Case
from quernel.models import PairConnectLM
from quernel.nn import PairConnect, PairTable
from quernel.nn._pair_ops import pair_rows

VOCAB, ROWS, HEADS = 8192, 1_000_000, 8
# So many that the rows of one pass, 2^16 W of them for the ids, are read from memory and not from a cache.
STATES, IDS = 4096, 2**16
# Reads that miss every cache: a line in about 100 ns, of which a core has about 16 under way at a time.
LINE_NS, LINES_AT_ONCE, LINE = 100.0, 16, 64


class CachedAttention(nn.Module):
    """One decoding step of attention: projections of one token, keys and values of the last W in a ring."""

    def __init__(self, dim: int, window: int, batch: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.window, self.head_dim = window, dim // HEADS
        self.keys, self.values = torch.randn(2, batch, HEADS, window, self.head_dim).unbind(0)
        self.place = 0

    def forward(self, x: Tensor) -> Tensor:  # (B, dim) -> (B, dim)
        q, k, v = self.qkv(x).view(len(x), 3, HEADS, 1, self.head_dim).unbind(1)
        self.keys[:, :, self.place : self.place + 1] = k
        self.values[:, :, self.place : self.place + 1] = v
        self.place = (self.place + 1) % self.window
        y = F.scaled_dot_product_attention(q, self.keys, self.values)
        return self.out(y.view(len(x), -1))


class CachedTransformer(nn.Module):
    """A decoding step of a Transformer with norms before its sublayers."""

    def __init__(self, dim: int, window: int, batch: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.mixers = nn.ModuleList(CachedAttention(dim, window, batch) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers + 1))
        perceptrons = (
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers)
        )
        self.perceptrons = nn.ModuleList(perceptrons)

    def forward(self, ids: Tensor) -> Tensor:  # (B,) -> (B, VOCAB)
        x = self.embed(ids)
        for i, (mixer, perceptron) in enumerate(zip(self.mixers, self.perceptrons, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + perceptron(self.norms[2 * i + 1](x))
        return self.norms[-1](x) @ self.embed.weight.T


def drawn(batch: int, window: int) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """Return endless states, each (batch, window), and ids, each (batch,)."""
    states = torch.randint(0, VOCAB, (STATES, batch, window), dtype=torch.int32)
    return itertools.cycle(states.unbind()), itertools.cycle(torch.randint(0, VOCAB, (IDS, batch)).unbind())


def layers(dim: int, window: int, batch: int, storage: str = "dense") -> SimpleNamespace:
    torch.manual_seed(0)
    table = PairTable(ROWS, dim, vocab=VOCAB, storage=storage)  # type: ignore[arg-type]
    made = SimpleNamespace(ours=PairConnect(table, window, 8).eval(), dim=dim, window=window, batch=batch)
    made.width = 2 if storage == "bf16" else 4
    made.states, made.next = drawn(batch, window)
    made.stream = made.ours.stream(batch)
    made.attention = CachedAttention(dim, window, batch).eval()
    made.half = CachedAttention(dim, window, batch).eval().bfloat16()
    made.half.keys, made.half.values = made.half.keys.bfloat16(), made.half.values.bfloat16()
    made.x = torch.randn(batch, dim)
    made.x_half = made.x.bfloat16()
    return made


def ours(s: SimpleNamespace) -> Tensor:
    return s.stream.step(next(s.next))


def steps(s: SimpleNamespace) -> Tensor:
    """The same as a custom op with a state handed on, in torch only."""
    with torch.inference_mode():
        return s.ours.step(next(s.states), next(s.next))[0]


def attention(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return s.attention(s.x)


def half_attention(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return s.half(s.x_half)


@torch.inference_mode()
def is_the_definition(s: SimpleNamespace) -> None:
    """Compare a step with the rows, gathered and added by torch, and with the parallel forward."""
    state, ids = next(s.states), next(s.next)
    got, state = s.ours.step(state, ids)
    layer, table = s.ours, s.ours.table
    whole = layer(state.long())[:, -1]
    torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)
    rows = pair_rows(state, layer.layout, len(table.weight), queries=1)[:, 0]  # (B, hashes, W)
    wanted = table.weight[rows].float().sum(2).flatten(1) / s.window**0.5
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    s.stream.state.copy_(next(s.states))
    one, _ = layer.step(s.stream.state.clone(), ids)
    if not torch.equal(s.stream.step(ids), one):
        raise ValueError("a stream differs from a step")
    if state.nbytes > 4 * s.window * s.batch:
        raise ValueError(f"the state takes {state.nbytes} bytes")


def memory_bound(s: Any, threads: int, layers: int = 1) -> float:
    lines = s.batch * s.window * -(-s.dim * s.width // LINE) * layers
    return lines * LINE_NS / (LINES_AT_ONCE * min(threads, s.batch)) * 1e-6


def models(dim: int, window: int, batch: int) -> SimpleNamespace:
    torch.manual_seed(0)
    made = SimpleNamespace(dim=dim, window=window, batch=batch, width=4)
    made.ours = PairConnectLM(VOCAB, dim, 2, window, ROWS).eval()
    made.stream = made.ours.stream(batch)
    made.transformer = CachedTransformer(dim, window, batch, 2).eval()
    made.states, made.next = drawn(batch, window)
    return made


def transformer(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return s.transformer(next(s.next))


@torch.inference_mode()
def steps_equal_forward(s: SimpleNamespace) -> None:
    logits, state = s.ours.step(next(s.states), next(s.next))
    wanted = s.ours(state.long()).logits[:, -1]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    s.stream.start_from(torch.roll(state, 1, 1))
    torch.testing.assert_close(s.stream.step(state[:, -1].long()), wanted, rtol=1e-4, atol=1e-5)


BOUND = f"cache lines of the rows at {LINE_NS:.0f} ns, {LINES_AT_ONCE} at a time a core"
FULL, HALF = "torch attention step, fp32", "the same in bf16"
PEERS = {FULL: attention, HALF: half_attention, "ours through torch's dispatcher": steps}
WHAT = "1 M rows"

CASES = [
    *(
        Case(
            name=f"mixing layer, d={dim}, W={window}, batch 1, {WHAT}",
            setup=partial(layers, dim, window, 1),
            ours=ours,
            peers=PEERS,
            gate=is_the_definition,
            target={FULL: 3.0},
            bound_ms=memory_bound,
            bound=BOUND,
            threads=(1,),
            fresh=True,
        )
        for dim, window in ((128, 16), (128, 64), (256, 64), (512, 16), (512, 64))
    ),
    *(
        Case(
            name=f"mixing layer, d=128, W=32, batch {batch}, {WHAT}",
            setup=partial(layers, 128, 32, batch),
            ours=ours,
            peers=PEERS,
            gate=is_the_definition,
            bound_ms=memory_bound,
            bound=BOUND,
            fresh=True,
        )
        for batch in (1, 8, 64)
    ),
    Case(
        name=f"mixing layer, d=256, W=64, batch 1, {WHAT} in bf16",
        setup=partial(layers, 256, 64, 1, "bf16"),
        ours=ours,
        peers=PEERS,
        gate=is_the_definition,
        bound_ms=memory_bound,
        bound=BOUND,
        threads=(1,),
        fresh=True,
    ),
    Case(
        name=f"2-layer model, d=128, W=32, batch 1, {WHAT} a layer",
        setup=partial(models, 128, 32, 1),
        ours=ours,
        peers={"2-layer Transformer with cache": transformer, "ours through torch's dispatcher": steps},
        gate=steps_equal_forward,
        target={"2-layer Transformer with cache": 1.5},
        threads=(1,),
        fresh=True,
    ),
]
