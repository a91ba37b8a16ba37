"""Neighborhood attention against what computes it or stands in for it: one sample, 4 heads of 32, float32.

Full attention (dense) does more work and another thing; the same under a mask, compiled flex attention and gathered
windows compute ours.  Flex attention has no backward on CPUs, and its first call compiles for most of a minute.
"""

from __future__ import annotations

import functools
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._machine import FLOAT32_OPS
from benchmarks._runner import Case, Unavailable
from quernel.nn.functional import NeighborhoodPlan, na1d, na2d, neighborhood_mask

HEADS, HEAD = 4, 32
LENGTH, SPAN = 8192, 256
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def grid(side: int, window: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, side, side, HEADS, HEAD, generator=generator) for _ in range(3))
    # Dense attention reads its heads one after the other fastest.
    flat = [x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v)]
    mask = neighborhood_mask((side, side), window)
    plan = NeighborhoodPlan.of((side, side), (window, window), tile=(4, 4) if window <= 7 else (8, 8))
    tiles = plan.queries.on(q.device) | {"halo": plan.queries.halos(slice(None), q.device)}
    tiles["bias"] = torch.zeros(tiles["masks"].shape).masked_fill_(~tiles["masks"], -1e30)[tiles["kinds"]][:, None]
    start = (torch.arange(side) - window // 2).clamp(0, side - window)
    return SimpleNamespace(
        q=q,
        k=k,
        v=v,
        flat=flat,
        half=[x.bfloat16() for x in flat],
        mask=mask,
        start=start,
        tiles=tiles,
        side=side,
        window=window,
    )


def sequence() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, HEADS, HEAD, generator=generator) for _ in range(3))
    return SimpleNamespace(q=q, k=k, v=v, flat=[x.transpose(1, 2).contiguous() for x in (q, k, v)])


@torch.inference_mode()
def ours(s: SimpleNamespace) -> Any:
    return na2d(s.q, s.k, s.v, s.window)


@torch.inference_mode()
def tiles_of_torch(s: SimpleNamespace) -> Tensor:
    """Our tiles by torch's fused attention under a mask a tile, gathered before and scattered behind."""
    held = s.tiles
    q, k, v = (
        x[0].flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
        for x, index in ((s.q, held["lanes"]), (s.k, held["halo"]), (s.v, held["halo"]))
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=held["bias"])
    return out.transpose(1, 2).flatten(0, 1).index_select(0, held["home"])[None]


@torch.inference_mode()
def dense(s: SimpleNamespace) -> Tensor:
    return F.scaled_dot_product_attention(*s.flat)


@torch.inference_mode()
def dense_half(s: SimpleNamespace) -> Tensor:
    return F.scaled_dot_product_attention(*s.half)


@torch.inference_mode()
def masked(s: SimpleNamespace) -> Tensor:
    return F.scaled_dot_product_attention(*s.flat, attn_mask=s.mask)


@torch.inference_mode()
def unfolded(s: SimpleNamespace) -> Tensor:
    """Windows of keys and values as copies, one a token."""
    first, second = s.start[:, None], s.start
    keys, values = (x[0].unfold(0, s.window, 1).unfold(1, s.window, 1)[first, second] for x in (s.k, s.v))
    scores = torch.einsum("xyhd,xyhdij->xyhij", s.q[0], keys).flatten(3) * HEAD**-0.5
    weights = scores.softmax(-1).unflatten(3, (s.window, s.window))
    return torch.einsum("xyhij,xyhdij->xyhd", weights, values)[None]


@functools.cache
def compiled_flex(side: int, window: int) -> Any:
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Unavailable("this torch has no flex attention") from error
    start = (torch.arange(side) - window // 2).clamp(0, side - window)

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x, y = j // side - start[i // side], j % side - start[i % side]
        return (x >= 0) & (x < window) & (y >= 0) & (y < window)

    blocks = create_block_mask(near, None, None, side * side, side * side, device="cpu")
    return partial(torch.compile(flex_attention, fullgraph=True), block_mask=blocks)


@torch.inference_mode()
def flex(s: SimpleNamespace) -> Tensor:
    out: Tensor = compiled_flex(s.side, s.window)(*s.flat)
    return out


def leaves(tensors: Any) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def ours_trained(s: SimpleNamespace) -> None:
    na2d(*leaves((s.q, s.k, s.v)), s.window).sum().backward()  # type: ignore[union-attr]


def dense_trained(s: SimpleNamespace) -> None:
    F.scaled_dot_product_attention(*leaves(s.flat)).sum().backward()


def masked_trained(s: SimpleNamespace) -> None:
    F.scaled_dot_product_attention(*leaves(s.flat), attn_mask=s.mask).sum().backward()


@torch.inference_mode()
def causal(s: SimpleNamespace) -> Any:
    return na1d(s.q, s.k, s.v, SPAN, is_causal=True)


@torch.inference_mode()
def dense_causal(s: SimpleNamespace) -> Tensor:
    return F.scaled_dot_product_attention(*s.flat, is_causal=True)


@torch.inference_mode()
def local_blocks(s: SimpleNamespace) -> Any:
    return local_attention()(*s.flat)


@functools.cache
def local_attention() -> Any:
    try:
        from local_attention.local_attention import LocalAttention
    except ImportError as error:
        raise Unavailable("local-attention is not installed") from error
    # It counts the keys before the query only.
    options = {"exact_windowsize": True, "use_rotary_pos_emb": False, "autopad": True}
    return LocalAttention(SPAN - 1, causal=True, look_backward=1, **options)


def is_the_definition(s: SimpleNamespace) -> None:
    wanted = masked(s).transpose(1, 2).unflatten(1, (s.side, s.side))
    for run in (ours, unfolded):
        torch.testing.assert_close(run(s), wanted, **CLOSE)
    torch.testing.assert_close(tiles_of_torch(s), wanted.flatten(1, 2), **CLOSE)


def has_its_gradients(s: SimpleNamespace) -> None:
    near, wide = leaves((s.q, s.k, s.v)), leaves(s.flat)
    na2d(*near, s.window).square().sum().backward()  # type: ignore[union-attr]
    F.scaled_dot_product_attention(*wide, attn_mask=s.mask).square().sum().backward()
    for got, want in zip(near, wide, strict=True):
        torch.testing.assert_close(got.grad.flatten(1, 2).transpose(1, 2), want.grad, rtol=1e-3, atol=1e-4)


def is_the_causal_definition(s: SimpleNamespace) -> None:
    got = causal(s).transpose(1, 2)
    for first in range(0, LENGTH, 1024):
        i = torch.arange(first, first + 1024)[:, None]
        mask = (torch.arange(LENGTH) <= i) & (torch.arange(LENGTH) > i - SPAN)
        q, k, v = s.flat
        wanted = F.scaled_dot_product_attention(q[:, :, i[:, 0]], k, v, attn_mask=mask)
        torch.testing.assert_close(got[:, :, i[:, 0]], wanted, **CLOSE)


def bound(pairs: int, passes: float, s: SimpleNamespace, threads: int) -> float:
    return passes * 4 * pairs * HEADS * HEAD / (FLOAT32_OPS * threads) * 1e3


BOUND = "multiply-adds of the tokens in the windows at 94 GFLOP/s a core"
PEERS: dict[str, Any] = {
    "dense SDPA": dense,
    "dense SDPA, bfloat16": dense_half,
    "masked SDPA": masked,
    "unfold": unfolded,
    "tiles by torch's operations": tiles_of_torch,
}
TARGETS = {"dense SDPA": 8.0, "compiled flex": 4.0, "unfold": 15.0, "tiles by torch's operations": 1.3}
CASES = [
    *(
        Case(
            name=f"{side}x{side}, window {window}",
            setup=partial(grid, side, window),
            ours=ours,
            peers=PEERS | ({"compiled flex": flex} if (side, window) == (56, 7) else {}),
            gate=is_the_definition,
            target=TARGETS if (side, window) == (56, 7) else {},
            bound_ms=partial(bound, side**2 * window**2, 1),
            bound=BOUND,
        )
        for side, window in ((32, 7), (56, 7), (56, 13), (64, 7))
    ),
    Case(
        name="forward and backward, 56x56, window 7",
        setup=partial(grid, 56, 7),
        ours=ours_trained,
        peers={"dense SDPA": dense_trained, "masked SDPA": masked_trained},
        gate=has_its_gradients,
        target={"dense SDPA": 8.0},
        bound_ms=partial(bound, 56**2 * 49, 3.5),
        bound=BOUND + ", and of five more products of their size",
    ),
    Case(
        name=f"causal, {LENGTH} tokens, window {SPAN}",
        setup=sequence,
        ours=causal,
        peers={"dense SDPA, causal": dense_causal, "local-attention": local_blocks},
        gate=is_the_causal_definition,
        target={"dense SDPA, causal": 8.0},
        bound_ms=partial(bound, LENGTH * SPAN, 1),
        bound=BOUND,
    ),
]
