"""ShiftAddViT: the attention core against fused softmax attention, layers of shift codes against dense and 4-bit ones.

A processor multiplies 64 bytes in the instruction in which it could shift and add 16 words, so shifts win nothing by
themselves: codes win where reading the weight is what costs, attention wins by being linear in the tokens.  The core
is timed without projections, one image, 4 heads of 32; layers with everything they do.  Peers run in their own best
layout and dtype.
"""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._machine import DRAM_BYTES, FLOAT32_OPS, INT8_OPS, L3_BYTES
from benchmarks._runner import Case
from benchmarks._torch_int4 import int4_packed
from quernel.nn import CrossQuantLinear, MultShiftMoE, PackedShiftLinear, W4A8Linear
from quernel.nn.functional import binary_linear_attention, int8_linear
from quernel.nn.functional.binary_attention import composed
from quernel.nn.weights import Int4TableWeight

HEADS, HEAD, KERNEL = 4, 32, 9
GROUP = 128
# Weights stream from L3 up to 16 MB, from memory beyond.
CACHE_SIZE = 2**24
# float32 sums in another order; sums of products with 16 bits an activation.
ATTENTION = {"rtol": 1e-4, "atol": 1e-4}
CODES = {"rtol": 1e-3, "atol": 1e-3}
# Bytes of the weight over float32.
SHARES = {4: 0.13, 5: 0.16}


def attention(tokens: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    # As a fused projection leaves them: heads beside each other in the row of a token.
    qkv = torch.randn(1, tokens, 3, HEADS, HEAD, generator=generator).permute(2, 0, 3, 1, 4)
    dense = tuple(x.contiguous() for x in qkv.unbind(0))
    return SimpleNamespace(
        qkv=tuple(qkv.unbind(0)),
        dense=dense,
        half=tuple(x.bfloat16() for x in dense),
        conv=torch.randn(HEADS, KERNEL, generator=generator),
        limits=torch.full((HEADS,), 0.01),
        tokens=tokens,
    )


def fused(s: SimpleNamespace) -> Tensor:
    return binary_linear_attention(*s.qkv, s.conv, q_threshold=s.limits, k_threshold=s.limits)


def eager(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return composed(*s.dense, s.conv, s.limits, s.limits, False)


def linear_attention(s: SimpleNamespace) -> Tensor:
    """Return plain linear attention with elu + 1 features, in float."""
    with torch.inference_mode():
        q, k = (F.elu(x) + 1 for x in s.dense[:2])
        return q @ (k.transpose(-2, -1) @ s.dense[2]) / (q @ k.sum(-2).unsqueeze(-1))


def same_attention(s: SimpleNamespace) -> None:
    torch.testing.assert_close(fused(s), composed(*s.qkv, s.conv, s.limits, s.limits, False), **ATTENTION)


def attention_bound(s: SimpleNamespace, threads: int) -> float:
    values = s.tokens * HEADS * HEAD
    return max(2 * values * (2 * HEAD + KERNEL) / FLOAT32_OPS, 4 * 4 * values / L3_BYTES) / threads * 1e3


def layers(rows: int, size: int, bits: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(size, size).requires_grad_(False)
    linear.weight.copy_(torch.randn(size, size, generator=generator) / size**0.5)
    x = torch.randn(rows, size, generator=generator)
    return SimpleNamespace(
        x=x,
        half_x=x.bfloat16(),
        linear=linear,
        half=copy.deepcopy(linear).bfloat16(),
        ours=PackedShiftLinear.from_linear(linear, bits),
        packed=int4_packed(linear.weight, GROUP),
        int8=CrossQuantLinear.from_linear(linear, torch.ones(size)),
        # The search costs minutes at this size and changes no timing.
        w4a8=W4A8Linear.from_linear(linear, group_size=GROUP, grid=(2, 20)),
        size=(rows, size, bits),
    )


def same_layer(s: SimpleNamespace) -> None:
    weight, bits = s.ours.weight, s.size[2]
    if isinstance(weight, Int4TableWeight):
        if not torch.equal(s.ours(s.x), int8_linear(s.x, weight.unpack_int8(), weight.scale, s.ours.bias)):
            raise ValueError("the product over codes differs from the int8 product")
    else:
        torch.testing.assert_close(s.ours(s.x), F.linear(s.x, weight.dense(), s.ours.bias), **CODES)
    share = weight.nbytes / s.linear.weight.nbytes
    if share > SHARES[bits]:
        raise ValueError(f"the weight takes {share:.3f} of float32's bytes")


def layer_bound(s: SimpleNamespace, threads: int) -> float:
    rows, size, bits = s.size
    weight = s.ours.weight.nbytes
    speed = L3_BYTES if weight <= CACHE_SIZE else DRAM_BYTES
    return (weight / speed + 2 * rows * size * size / (INT8_OPS if bits == 4 else FLOAT32_OPS)) / threads * 1e3


def mixture(tokens: int, size: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(size, size).requires_grad_(False)
    made = MultShiftMoE.from_linear(linear, bits=4, latencies=(6, 4), generator=generator).eval()
    return SimpleNamespace(x=torch.randn(tokens, size, generator=generator), linear=linear, ours=made.pack())


def both_experts(s: SimpleNamespace) -> Tensor:
    """Evaluate both experts on all tokens and mask, as implementations without a dispatcher do."""
    with torch.inference_mode():
        weight, chosen = (s.x @ s.ours.router.T).softmax(1).max(1)
        return torch.where(chosen[:, None] == 0, s.ours.mult(s.x), s.ours.shift(s.x)) * weight[:, None]


def dispatched(s: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return s.ours(s.x)


def same_mixture(s: SimpleNamespace) -> None:
    torch.testing.assert_close(dispatched(s), both_experts(s), **CODES)


ATTENTION_PEERS = {
    "softmax attention, fused": lambda s: F.scaled_dot_product_attention(*s.dense),
    "softmax attention, fused, bf16": lambda s: F.scaled_dot_product_attention(*s.half),
    "torch operations": eager,
    "linear attention, elu + 1": linear_attention,
}
SOFTMAX = "softmax attention, fused"
LAYER_PEERS = {
    "fp32": lambda s: s.linear(s.x),
    "bf16": lambda s: s.half(s.half_x),
    "torch int4 (bf16 activations)": lambda s: torch._weight_int4pack_mm_for_cpu(
        s.half_x, s.packed[0], GROUP, s.packed[1]
    ),
    "int8 _int_mm": lambda s: s.int8(s.x),
    "W4A8 (DGQ)": lambda s: s.w4a8(s.x),
}
FUSED_TARGETS, EAGER_TARGETS = {1024: 3.0, 4096: 10.0}, {1024: 1.5, 4096: 5.0}
LAYER_TARGETS = {
    (1, 4096, 4): {"fp32": 8.0, "torch int4 (bf16 activations)": 3.0},
    (1, 4096, 5): {"fp32": 2.5},
    (512, 4096, 5): {"fp32": 0.9},
}
LAYERS = ((1, 1024, 4), (1, 2048, 4), (1, 4096, 4), (512, 4096, 4), (1, 1024, 5), (1, 4096, 5), (512, 4096, 5))

CASES = [
    *(
        Case(
            name=f"attention core, {tokens} tokens",
            setup=partial(attention, tokens),
            ours=fused,
            peers=ATTENTION_PEERS,
            gate=same_attention,
            target={SOFTMAX: FUSED_TARGETS[tokens]} if tokens in FUSED_TARGETS else {},
            bound_ms=attention_bound,
            bound="products at 94 Gflop/s and bytes at 97 GB/s a core",
            fresh=True,
        )
        for tokens in (196, 1024, 4096)
    ),
    *(
        Case(
            name=f"attention core by torch operations, {tokens} tokens",
            setup=partial(attention, tokens),
            ours=eager,
            peers={SOFTMAX: ATTENTION_PEERS[SOFTMAX]},
            gate=same_attention,
            target={SOFTMAX: EAGER_TARGETS[tokens]},
            fresh=True,
        )
        for tokens in EAGER_TARGETS
    ),
    *(
        Case(
            name=f"{bits}-bit shifts, {'decode' if rows == 1 else 'prefill'} {size}x{size}, M={rows}",
            setup=partial(layers, rows, size, bits),
            ours=lambda s: s.ours(s.x),
            peers=LAYER_PEERS,
            gate=same_layer,
            target=LAYER_TARGETS.get((rows, size, bits), {}),
            bound_ms=layer_bound,
            bound="weight bytes at 97 (L3) or 34 (memory) GB/s; products at 860 (4 bits) or 94 Gop/s a core",
            # A loop over one layer keeps its weight where it is; one call at a time would time its way back there.
            min_ms=20.0 if rows == 1 else 1.0,
        )
        for rows, size, bits in LAYERS
    ),
    Case(
        name="mixture of both experts, 1024 tokens, 512x512",
        setup=partial(mixture, 1024, 512),
        ours=dispatched,
        peers={"both experts on all tokens": both_experts, "fp32": lambda s: s.linear(s.x)},
        gate=same_mixture,
    ),
]
