"""CrossQuant: an int8 layer against every int8 layer a CPU user has, and a whole sentence encoder.

The layer is timed with everything it does: scaling, row maxima, rounding, the integer product, scales and bias.
Peers run prepacked and in their own best dtype; bfloat16 peers get bfloat16 inputs. The encoder is
all-MiniLM-L6-v2 on 32 rows of 64 real tokens, against the three things a user of this processor would do instead.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._machine import INT8_OPS, L3_BYTES
from benchmarks._runner import Case, Unavailable
from quernel import models
from quernel._errors import DataError, MissingExtraError
from quernel.compress import CrossQuant, compress
from quernel.nn import CrossQuantLinear

# One core: int8 products, and what a row of activations costs to read and write once in cache.
# 8-bit steps on both factors of a sum of random signs.
RELATIVE_ERROR = 0.02
ENCODER_COSINE = 0.995


def layers(rows: int, out_features: int, in_features: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features).requires_grad_(False)
    linear.weight.copy_(torch.randn(out_features, in_features, generator=generator) / in_features**0.5)
    x = torch.randn(rows, in_features, generator=generator)
    absmax = x.abs().amax(0)
    return SimpleNamespace(
        x=x,
        half_x=x.bfloat16(),
        linear=linear,
        half=copy.deepcopy(linear).bfloat16(),
        ours=CrossQuantLinear.from_linear(linear, absmax),
        dynamic=dynamic_int8(nn.Sequential(linear)),
        torchao=torchao_int8(linear),
        size=(rows, out_features, in_features),
    )


def dynamic_int8(model: nn.Module) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def torchao_int8(linear: nn.Linear) -> nn.Module | None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    model = nn.Sequential(copy.deepcopy(linear)).bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_eager(state: SimpleNamespace) -> Tensor:
    if state.torchao is None:
        raise Unavailable("torchao is not installed")
    return state.torchao(state.half_x)


def torchao_compiled(state: SimpleNamespace) -> Tensor:
    if state.torchao is None:
        raise Unavailable("torchao is not installed")
    if not hasattr(state, "compiled"):
        state.compiled = torch.compile(state.torchao, dynamic=False)
    return state.compiled(state.half_x)


def near_the_dense_layer(state: SimpleNamespace) -> None:
    for x in (state.x, state.half_x):
        wanted = state.linear(state.x)
        error = float((state.ours(x).float() - wanted).norm() / wanted.norm())
        if error > RELATIVE_ERROR:
            raise ValueError(f"relative error {error:.3g} with {x.dtype} inputs")


def layer_bound(state: SimpleNamespace, threads: int) -> float:
    rows, m, n = state.size
    seconds = 2 * rows * m * n / INT8_OPS + (2 * rows * n + 2 * rows * m + m * n) / L3_BYTES
    return seconds / threads * 1e3


def encoder() -> SimpleNamespace:
    try:
        model = models.load("minilm")
        task = models.task(model, "stsb", max_examples=64)
    except (DataError, MissingExtraError) as error:
        raise Unavailable(str(error)) from error
    batch = task.example_inputs
    # The default is what `--method crossquant` runs.
    ours = compress(model, CrossQuant(), data=task.calibration).model
    return SimpleNamespace(
        batch=batch, fp32=model, ours=ours, half=copy.deepcopy(model).bfloat16(), dynamic=dynamic_int8(model)
    )


def forward(name: str, state: SimpleNamespace) -> Tensor:
    with torch.inference_mode():
        return getattr(state, name)(**state.batch)


def near_the_encoder(state: SimpleNamespace) -> None:
    cosine = torch.cosine_similarity(forward("ours", state).float(), forward("fp32", state), dim=-1).mean()
    if cosine < ENCODER_COSINE:
        raise ValueError(f"mean cosine to the float32 embeddings is {float(cosine):.4f}")


LAYER_PEERS = {
    "fp32": lambda s: s.linear(s.x),
    "bf16": lambda s: s.half(s.half_x),
    "dynamic int8": lambda s: s.dynamic(s.x),
    "torchao eager": torchao_eager,
    "torchao compiled": torchao_compiled,
}
TARGETS = {
    (512, 1024, 1024): {"fp32": 4.0, "bf16": 1.2, "torchao compiled": 1.1},
    (1, 1024, 1024): {"fp32": 1.0},
}

CASES = [
    *(
        Case(
            name=f"linear {m}x{n}, M={rows}",
            setup=partial(layers, rows, m, n),
            # bfloat16 activations, as between the layers of a compressed model.
            ours=lambda s: s.ours(s.half_x),
            peers=LAYER_PEERS,
            gate=near_the_dense_layer,
            target=TARGETS.get((rows, m, n), {}),
            bound_ms=layer_bound,
            bound="products at 860 Gop/s and bytes at 97 GB/s a core",
        )
        for rows, m, n in ((512, 1024, 1024), (1, 1024, 1024), (128, 1536, 384), (512, 1536, 384), (512, 384, 1536))
    ),
    Case(
        name="all-MiniLM-L6-v2, 32 x 64 tokens",
        setup=encoder,
        ours=partial(forward, "ours"),
        peers={
            "fp32": partial(forward, "fp32"),
            "bf16": partial(forward, "half"),
            "dynamic int8": partial(forward, "dynamic"),
        },
        gate=near_the_encoder,
        target={"fp32": 3.5, "bf16": 1.15, "dynamic int8": 1.0},
    ),
]
