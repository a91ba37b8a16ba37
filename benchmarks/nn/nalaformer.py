"""Norm-aware linear attention against softmax attention and other linear attention, one sample, 8 heads of 64.

The sums over keys and the products with queries take 2 N H 64 128 multiply-adds in all, twice those of ELU + 1.
Decoding reads a state of fixed size, or all keys and values so far.  A long sequence must fit in 1.5 GB.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._process import in_fresh_process
from benchmarks._runner import Case, Unavailable
from quernel.nn.functional import LinearAttentionState, linear_attention, nala_attention, nala_feature_map, rope1d
from quernel.nn.functional.nala import composed

HEADS, SIZE = 8, 64
FLOPS, BYTES = 94e9, 34e9
# A power in float32, about as long as sixteen multiply-adds of a vector.
POWER_SECONDS = 0.7e-9
LIMIT_BYTES = 1.5e9


def setup(tokens: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, SIZE, generator=generator) for _ in range(3))
    return SimpleNamespace(q=q, k=k, v=v, tokens=tokens, rope=rope1d(tokens, SIZE))


@torch.inference_mode()
def ours(s: SimpleNamespace, **options: Any) -> Tensor:
    return nala_attention(s.q, s.k, s.v, **options)


@torch.inference_mode()
def softmax(s: SimpleNamespace, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(s.q, s.k, s.v, is_causal=causal)


@torch.inference_mode()
def elu(s: SimpleNamespace, causal: bool = False) -> Tensor:
    return linear_attention(F.elu(s.q).add_(1), F.elu(s.k).add_(1), s.v, causal=causal)


@torch.inference_mode()
def whole_features(s: SimpleNamespace) -> Tensor:
    return linear_attention(*nala_feature_map(s.q, s.k), s.v)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(*composed(q, k, 3.0, q.new_ones(HEADS), "split"), v)


@torch.inference_mode()
def eager(s: SimpleNamespace) -> Tensor:
    return by_torch(s.q, s.k, s.v)


def inductor(s: SimpleNamespace) -> Tensor:
    if not hasattr(s, "compiled"):
        s.compiled = torch.compile(by_torch, fullgraph=True)
        try:
            with torch.inference_mode():
                s.compiled(s.q, s.k, s.v)
        except Exception as error:  # whatever a missing C++ compiler raises
            s.compiled = None
            raise Unavailable(f"torch.compile: {type(error).__name__}") from error
    if s.compiled is None:
        raise Unavailable("torch.compile failed")
    with torch.inference_mode():
        result: Tensor = s.compiled(s.q, s.k, s.v)
    return result


def trained(s: SimpleNamespace, attend: Any) -> None:
    given = [t.detach().requires_grad_() for t in (s.q, s.k, s.v)]
    attend(*given).sum().backward()


def softmax_trained(s: SimpleNamespace) -> None:
    trained(s, F.scaled_dot_product_attention)


def ours_trained(s: SimpleNamespace) -> None:
    trained(s, nala_attention)


def eager_trained(s: SimpleNamespace) -> None:
    trained(s, by_torch)


def turned(phi: Tensor, rope: Tensor) -> Tensor:
    """Turn adjacent pairs by their token's angles, (N, SIZE / 2, 2)."""
    (a, b), (c, s) = phi.unflatten(-1, (-1, 2)).unbind(-1), rope.double().unbind(-1)
    return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)


def is_the_definition(s: SimpleNamespace, causal: bool = False, rotary: bool = False) -> None:
    """Compare some rows with the whole weights in float64."""
    rows = torch.arange(0, s.tokens, s.tokens // 16)
    q, k, v = s.q[0, 0, rows].double(), s.k[0, 0].double(), s.v[0, 0].double()
    norm = q.norm(dim=-1, keepdim=True)
    unit, p = q / norm, 3 * (0.5 + torch.tanh(norm))
    halves = [(sign * unit).relu() ** p for sign in (1, -1)], [(sign * k).relu() ** 3 for sign in (1, -1)]
    weights = sum(a @ b.T for a, b in zip(*halves, strict=True))
    above = weights
    if rotary:
        above = sum(turned(a, s.rope[rows]) @ turned(b, s.rope).T for a, b in zip(*halves, strict=True))
    if causal:
        weights = above = weights * (torch.arange(s.tokens) <= rows[:, None])
    n = rows[:, None] + 1 if causal else s.tokens
    wanted = (above @ v / n) / (weights.sum(-1, keepdim=True) / n + 1e-6)
    got = ours(s, causal=causal, rope=s.rope if rotary else None)[0, 0, rows]
    torch.testing.assert_close(got, wanted.float(), rtol=1e-3, atol=1e-4)


def has_its_gradients(s: SimpleNamespace) -> None:
    """Compare the gradients with those of torch's operations in float64."""
    is_the_definition(s)
    near, wide = (
        [t.detach().to(dtype).requires_grad_() for t in (s.q, s.k, s.v)] for dtype in (torch.float32, torch.float64)
    )
    for leaves, attend in ((near, nala_attention), (wide, by_torch)):
        attend(*leaves).square().sum().backward()
    for got, want in zip(near, wide, strict=True):
        close = 1e-4 * float(want.grad.abs().max())
        torch.testing.assert_close(got.grad, want.grad.float(), rtol=1e-3, atol=close)


def bound(s: SimpleNamespace, threads: int) -> float:
    products = 4 * s.tokens * HEADS * SIZE * 2 * SIZE / FLOPS
    powers = s.tokens * HEADS * SIZE * POWER_SECONDS
    return (products + powers) / threads * 1e3


def decoding(tokens: int) -> SimpleNamespace:
    s = setup(1)
    generator = torch.Generator().manual_seed(1)
    # The last place is for the token to come.
    s.keys, s.values = (torch.randn(1, HEADS, tokens + 1, SIZE, generator=generator) for _ in range(2))
    phi = nala_feature_map(s.q, s.keys[:, :, :-1])[1]
    s.state = LinearAttentionState(phi.mT @ s.values[:, :, :-1], phi.sum(2), torch.full((1, HEADS), float(tokens)))
    return s


@torch.inference_mode()
def one_step(s: SimpleNamespace) -> Tensor:
    return nala_attention(s.q, s.k, s.v, causal=True, state=s.state)[0]


@torch.inference_mode()
def cached(s: SimpleNamespace) -> Tensor:
    """Attention of one query to keys and values that lie ready; the new ones are written behind them."""
    s.keys[:, :, -1:], s.values[:, :, -1:] = s.k, s.v
    return F.scaled_dot_product_attention(s.q, s.keys, s.values)


@torch.inference_mode()
def step_is_the_last_row(s: SimpleNamespace) -> None:
    cached(s)
    torch.testing.assert_close(one_step(s), nala_attention(s.q, s.keys, s.values), rtol=1e-3, atol=1e-4)


def state_bytes(s: SimpleNamespace, threads: int) -> float:
    return 2 * sum(t.nbytes for t in s.state) / BYTES * 1e3


def peak_bytes(tokens: int) -> float:
    """Return the peak memory of a process that attends once; runs in a process of its own."""
    s = setup(tokens)
    ours(s)
    # Not getrusage: its peak is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def fits(tokens: int, s: SimpleNamespace) -> None:
    """Check the memory, torch and everything else included, and the numbers."""
    is_the_definition(s)
    if (held := in_fresh_process(__file__, "peak_bytes", tokens)) > LIMIT_BYTES:
        raise ValueError(f"{tokens} tokens take {held / 1e9:.2f} GB")


BOUND = "multiply-adds at 94 GFLOP/s a core, powers at 1.4 a nanosecond"
SDPA, ELU = "softmax attention, fused", "ELU + 1 linear attention"
CASES = [
    *(
        Case(
            name=f"{tokens} tokens",
            setup=partial(setup, tokens),
            ours=ours,
            peers={
                SDPA: softmax,
                ELU: elu,
                "the same by torch operations": eager,
                "the same, torch.compile": inductor,
                "the same, features held": whole_features,
            },
            gate=is_the_definition,
            target={SDPA: least, ELU: 0.5},
            bound_ms=bound,
            bound=BOUND,
        )
        for tokens, least in ((1024, 4.0), (4096, 12.0))
    ),
    Case(
        name="4096 tokens, rotary positions",
        setup=partial(setup, 4096),
        ours=lambda s: ours(s, rope=s.rope),
        peers={SDPA: softmax, ELU: elu},
        gate=partial(is_the_definition, rotary=True),
        bound_ms=bound,
        bound=BOUND,
    ),
    Case(
        name="4096 tokens, causal",
        setup=partial(setup, 4096),
        ours=partial(ours, causal=True),
        peers={SDPA: partial(softmax, causal=True), ELU: partial(elu, causal=True)},
        gate=partial(is_the_definition, causal=True),
        bound_ms=lambda s, threads: 2 * bound(s, threads),
        bound=BOUND + ", twice for the products inside chunks",
    ),
    Case(
        name="4096 tokens, forward and backward",
        setup=partial(setup, 4096),
        ours=ours_trained,
        peers={SDPA: softmax_trained, "the same by torch operations": eager_trained},
        gate=has_its_gradients,
        bound_ms=lambda s, threads: 3 * bound(s, threads),
        bound=BOUND + ", three times",
    ),
    Case(
        name="65536 tokens in 1.5 GB",
        setup=partial(setup, 65536),
        ours=ours,
        peers={ELU: elu},
        gate=partial(fits, 65536),
        target={ELU: 0.5},
        bound_ms=bound,
        bound=BOUND,
    ),
    *(
        Case(
            name=f"decoding after {tokens} tokens",
            setup=partial(decoding, tokens),
            ours=one_step,
            peers={"softmax attention over cached keys": cached},
            gate=step_is_the_last_row,
            target={"softmax attention over cached keys": 10.0} if tokens > 30_000 else {},
            bound_ms=state_bytes,
            bound="state read and written at 34 GB/s",
        )
        for tokens in (1024, 32768)
    ),
]
