"""Softmax-free attention against torch's fused softmax attention, one sample, 8 heads of 32.

The kernel of n tokens with m landmarks is formed once and read twice; what else there is does not depend on n.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._runner import Case
from quernel.nn.functional import nystrom_apply

HEADS, HEAD = 8, 32
FLOPS = 94e9
# An exponential in float32, about as long as eight multiply-adds of a vector.
EXP_SECONDS = 0.25e-9


def setup(tokens: int, marks: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, HEADS, tokens, HEAD, generator=generator) for _ in range(2))
    q = 0.5 * q
    places = torch.arange(marks) * tokens // marks
    return SimpleNamespace(q=q, v=v, marks=q[:, :, places].contiguous(), tokens=tokens, m=marks)


def ours(inverse: str, s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return nystrom_apply(s.q, s.marks, s.v, inverse=inverse)


def softmax(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return F.scaled_dot_product_attention(s.q, s.q, s.v)


def leaves(s: SimpleNamespace) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in (s.q, s.marks, s.v)]


def ours_trained(s: SimpleNamespace) -> None:
    nystrom_apply(*leaves(s)).sum().backward()


def softmax_trained(s: SimpleNamespace) -> None:
    q, _, v = leaves(s)
    F.scaled_dot_product_attention(q, q, v).sum().backward()


def is_the_definition(s: SimpleNamespace) -> None:
    q, marks, v = (t[0, 0].double() for t in (s.q, s.marks, s.v))
    p, a = (torch.exp(-0.5 * torch.cdist(x, marks).square()) for x in (q, marks))
    d = a.sum(1).rsqrt()
    inverse = d[:, None] * torch.linalg.inv(a + 1e-2 * torch.eye(len(a), dtype=a.dtype)) * d
    wanted = (p @ (inverse @ (p.T @ v))).float()
    for kind in ("cholesky", "newton"):
        torch.testing.assert_close(ours(kind, s)[0, 0], wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))


def bound(s: SimpleNamespace, threads: int) -> float:
    products = 6 * s.tokens * s.m * HEAD * HEADS
    return (products / FLOPS + EXP_SECONDS * s.tokens * s.m * HEADS) / threads * 1e3


def shape(tokens: int, marks: int) -> str:
    return f"{tokens} tokens, {marks} landmarks"


BOUND = "multiply-adds at 94 GFLOP/s a core, exponentials at 4 a nanosecond"
# Up to a landmark for about every sixteen tokens; beyond, the cube of their number costs more than it saves.
CASES = [
    *(
        Case(
            name=f"Cholesky, {shape(tokens, marks)}",
            setup=partial(setup, tokens, marks),
            ours=partial(ours, "cholesky"),
            peers={"softmax attention, fused": softmax, "Newton": partial(ours, "newton")},
            gate=is_the_definition,
            target={} if least is None else {"softmax attention, fused": least},
            bound_ms=bound,
            bound=BOUND,
        )
        for tokens, marks, least in (
            (1024, 64, 1 / 1.2), (3136, 49, 10.0), (4096, 64, 10.0), (4096, 256, 1 / 1.2), (1024, 256, None),
            (256, 16, 1 / 1.2),
        )
    ),
    *(
        Case(
            name=f"forward and backward, {shape(tokens, marks)}",
            setup=partial(setup, tokens, marks),
            ours=ours_trained,
            peers={"softmax attention, fused": softmax_trained},
            gate=is_the_definition,
            target={"softmax attention, fused": 5.0},
            bound_ms=lambda s, threads: 3 * bound(s, threads),
            bound=BOUND + ", three times",
        )
        for tokens, marks in ((3136, 49), (4096, 64))
    ),
]  # fmt: skip
