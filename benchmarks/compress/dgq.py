"""DGQ: a 4-bit layer against everything a CPU user has, decoding one token and reading many; and a whole encoder.

The layer is timed with everything it does: row maximum, rounding, the integer product, scales and bias.  Peers run
prepacked and in their own best dtype: bfloat16 activations for the in-box 4-bit kernel, ``_int_mm`` through our int8
layer, which reads the row-major weight.  Before timing, the result must equal that of the int8 product.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._machine import DRAM_BYTES, INT8_OPS, L3_BYTES
from benchmarks._runner import Case, Unavailable
from benchmarks._torch_int4 import int4_packed
from quernel import models
from quernel._errors import DataError, MissingExtraError
from quernel.compress import DGQ, Cast, CrossQuant, compress
from quernel.nn import CrossQuantLinear, W4A8Linear
from quernel.nn.functional import int8_linear

GROUP = 128
# Weights stream from L3 up to 16 MB, and from memory beyond.
CACHE_SIZE = 2**24
# A sample of a decoded token lasts this long, so that the weight stays where a loop over one layer keeps it; what a
# model with more layers than the cache holds gets is a case of its own.
DECODE_MS = 20.0
STACK = 8
# 4-bit weights on random normal rows, groups of 128.
RELATIVE_ERROR = 0.12
ENCODER_COSINE = 0.96
# Bytes on disk over fp32.
LARGEST_SHARE = 0.14


def layers(rows: int, out_features: int, in_features: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features).requires_grad_(False)
    linear.weight.copy_(torch.randn(out_features, in_features, generator=generator) / in_features**0.5)
    x = torch.randn(rows, in_features, generator=generator)
    return SimpleNamespace(
        x=x,
        half_x=x.bfloat16(),
        linear=linear,
        half=copy.deepcopy(linear).bfloat16(),
        # The search costs minutes at this size and changes no timing.
        ours=W4A8Linear.from_linear(linear, group_size=GROUP, grid=(2, 20)),
        int8=CrossQuantLinear.from_linear(linear, torch.ones(in_features)),
        packed=int4_packed(linear.weight, GROUP),
        dynamic=dynamic_int8(nn.Sequential(linear)),
        size=(rows, out_features, in_features),
    )


def stack(out_features: int, in_features: int) -> SimpleNamespace:
    """Return several layers of their own memory, together far beyond every cache."""
    one = layers(1, out_features, in_features)
    peers = ("linear", "half", "ours", "int8", "dynamic")
    many = {name: [copy.deepcopy(getattr(one, name)) for _ in range(STACK)] for name in peers}
    packed = [(one.packed[0].clone(), one.packed[1].clone()) for _ in range(STACK)]
    return SimpleNamespace(**vars(one) | {"many": many | {"packed": packed}})


def through(name: str, state: SimpleNamespace) -> list[Tensor]:
    """Run the token through every layer of the stack."""
    if name == "packed":
        return [torch._weight_int4pack_mm_for_cpu(state.half_x, w, GROUP, s) for w, s in state.many["packed"]]
    x = state.half_x if name == "half" else state.x
    return [layer(x) for layer in state.many[name]]


def stack_bound(state: SimpleNamespace, threads: int) -> float:
    return STACK * state.ours.weight.nbytes / DRAM_BYTES / threads * 1e3


def dynamic_int8(model: nn.Module) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def right(state: SimpleNamespace) -> None:
    ours, wanted = state.ours, state.linear(state.x)
    for x in (state.x, state.half_x):
        exact = int8_linear(x, ours.unpack_int8(), ours.weight.scale, ours.bias)
        # Bit-equal where both run compiled; elsewhere the same integers are scaled in another order.
        torch.testing.assert_close(ours(x), exact)
        error = float((ours(x).float() - wanted).norm() / wanted.norm())
        if error > RELATIVE_ERROR:
            raise ValueError(f"relative error {error:.3g} with {x.dtype} inputs")
    share = ours.weight.nbytes / state.linear.weight.nbytes
    if share > LARGEST_SHARE:
        raise ValueError(f"the weight takes {share:.3f} of float32's bytes")


def layer_bound(state: SimpleNamespace, threads: int) -> float:
    rows, m, n = state.size
    weight = state.ours.weight.nbytes
    speed = L3_BYTES if weight <= CACHE_SIZE else DRAM_BYTES
    return (weight / speed + 2 * rows * m * n / INT8_OPS) / threads * 1e3


def encoder() -> SimpleNamespace:
    try:
        model = models.load("minilm")
        task = models.task(model, "stsb", max_examples=64)
    except (DataError, MissingExtraError) as error:
        raise Unavailable(str(error)) from error
    return SimpleNamespace(
        batch=task.example_inputs,
        fp32=model,
        ours=compress(model, [DGQ(grid=(5, 20)), Cast()], data=task.calibration).model,
        int8=compress(model, CrossQuant(), data=task.calibration).model,
        half=copy.deepcopy(model).bfloat16(),
        dynamic=dynamic_int8(model),
    )


def forward(name: str, state: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(state, name)(**state.batch)


def near_the_encoder(state: SimpleNamespace) -> None:
    cosine = torch.cosine_similarity(forward("ours", state).float(), forward("fp32", state), dim=-1).mean()
    if cosine < ENCODER_COSINE:
        raise ValueError(f"mean cosine to the float32 embeddings is {float(cosine):.4f}")


def torchao_da8w4(state: SimpleNamespace) -> Callable[..., Any]:
    """Return torchao's layer of 4-bit weights and 8-bit activations, made once; its wheels may lack the kernel."""
    if importlib.util.find_spec("torchao") is None:
        raise Unavailable("torchao is not installed")
    import torchao.dtypes
    import torchao.quantization as quantization

    op, layout = "torchao::da8w4_linear_cpu", getattr(torchao.dtypes, "Int8DynamicActInt4WeightCPULayout", None)
    names = {str(schema.name) for schema in torch._C._jit_get_all_schemas()}
    if layout is None or op not in names or not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"):
        raise Unavailable("this wheel of torchao has no da8w4 kernel for CPUs")
    if not hasattr(state, "da8w4"):
        model = nn.Sequential(copy.deepcopy(state.linear))
        config = quantization.Int8DynamicActivationInt4WeightConfig(group_size=GROUP, layout=layout())
        quantization.quantize_(model, config)
        state.da8w4 = model
    return state.da8w4


LAYER_PEERS = {
    "fp32": lambda s: s.linear(s.x),
    "bf16": lambda s: s.half(s.half_x),
    "torch int4 (bf16 activations)": lambda s: torch._weight_int4pack_mm_for_cpu(
        s.half_x, s.packed[0], GROUP, s.packed[1]
    ),
    "int8 _int_mm": lambda s: s.int8(s.x),
    "dynamic int8": lambda s: s.dynamic(s.x),
    "torchao da8w4": lambda s: torchao_da8w4(s)(s.x),
}
TARGETS = {
    (1, 4096, 4096): {"fp32": 15.0, "torch int4 (bf16 activations)": 3.0, "int8 _int_mm": 2.0},
    (1, 1024, 1024): {"int8 _int_mm": 1.0},
    (512, 4096, 4096): {"fp32": 3.0, "int8 _int_mm": 0.8},
}
DECODE = tuple((1, m, n) for m, n in ((1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096)))
PREFILL = tuple((rows, 4096, 4096) for rows in (128, 512))

CASES = [
    *(
        Case(
            name=f"{'decode' if rows == 1 else 'prefill'} {m}x{n}, M={rows}",
            setup=partial(layers, rows, m, n),
            ours=lambda s: s.ours(s.x),
            peers=LAYER_PEERS,
            gate=right,
            target=TARGETS.get((rows, m, n), {}),
            bound_ms=layer_bound,
            bound="weight bytes at 97 (L3) or 34 (memory) GB/s and products at 860 Gop/s a core",
            min_ms=DECODE_MS if rows == 1 else 1.0,
        )
        for rows, m, n in (*DECODE, *PREFILL)
    ),
    Case(
        name=f"decode 4096x4096 through {STACK} layers, M=1",
        setup=partial(stack, 4096, 4096),
        ours=partial(through, "ours"),
        peers={
            "fp32": partial(through, "linear"),
            "bf16": partial(through, "half"),
            "torch int4 (bf16 activations)": partial(through, "packed"),
            "int8 _int_mm": partial(through, "int8"),
            "dynamic int8": partial(through, "dynamic"),
        },
        gate=right,
        bound_ms=stack_bound,
        bound="weight bytes at 34 GB/s a core",
        min_ms=DECODE_MS,
    ),
    Case(
        name="all-MiniLM-L6-v2, 32 x 64 tokens",
        setup=encoder,
        ours=partial(forward, "ours"),
        peers={
            "fp32": partial(forward, "fp32"),
            "bf16": partial(forward, "half"),
            "int8 (CrossQuant)": partial(forward, "int8"),
            "dynamic int8": partial(forward, "dynamic"),
        },
        gate=near_the_encoder,
        target={"fp32": 3.0, "int8 (CrossQuant)": 0.8},
    ),
]
