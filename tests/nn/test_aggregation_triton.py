"""Triton kernels of ``ska``, interpreted on the CPU, against unfolding; and that they compile for a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn.functional import ska
from quernel.nn.functional import small_kernel_aggregation as module
from tests.reference import lsnet as reference
from tests.triton_process import check_compiles, interpreted, needs_triton, outside, passed_interpreted

pytestmark = needs_triton
# Sums of up to 25 products in float32; rounding of half precision.
CLOSE, COARSE = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-2, "atol": 1e-2}
# (B, C, G, H, W): one run, more than sixteen runs, a shared set, more than one block of pixels, one row.
SHAPES = [(2, 4, 4, 3, 5), (1, 36, 2, 4, 3), (1, 5, 1, 12, 13), (2, 6, 3, 1, 7)]

CONSTANTS = {"SIZE": 3, "RUNS": 8, "CHUNKS": 2, "BLOCK": 128}
KINDS = dict.fromkeys("xwy", "*bf16")
COMPILED = {
    "filter": (CONSTANTS | {"FLIPPED": True}, KINDS, "i32"),
    "weight": (CONSTANTS, KINDS, "i32"),
}


@pytest.fixture(scope="module")
def kernels() -> Any:
    return importlib.import_module("quernel.nn._aggregation_triton")


@pytest.mark.slow
@outside
def test_kernels_interpreted() -> None:
    assert passed_interpreted(__file__) >= 12


def operands(shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, sets, height, width = shape
    draw = torch.Generator().manual_seed(0)
    shapes = (
        (batch, channels, height, width),
        (batch, sets, size * size, height, width),
        (batch, channels, height, width),
    )
    x, w, g = (torch.randn(s, generator=draw) for s in shapes)
    return x, w, g


@interpreted
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_unfolding(kernels: Any, shape: Any, size: int, fmt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, g = operands(shape, size)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    wanted = reference.unfolded(*leaves)
    by_x, by_w = torch.autograd.grad(wanted, leaves, g)
    image = x.contiguous(memory_format=fmt)
    monkeypatch.setattr(module, "_filter_plain", None)  # nothing else is reached
    torch.testing.assert_close(module._filter_on_gpu(image, w, "auto"), wanted.detach(), **CLOSE)
    torch.testing.assert_close(module._input_gradient_on_gpu(g, w, "triton"), by_x, **CLOSE)
    got = module._weight_gradient_on_gpu(g, image, w.shape[1], size * size, "auto")
    torch.testing.assert_close(got, by_w, **CLOSE)


@interpreted
def test_half_precision_and_empty_batches(kernels: Any) -> None:
    x, w, _ = (t.half() for t in operands((1, 4, 2, 3, 4), 3))
    y = module._filter_on_gpu(x, w, "triton")
    assert y.dtype is torch.float16
    torch.testing.assert_close(y.float(), reference.unfolded(x.float(), w.float()), **COARSE)
    assert module._filter_on_gpu(x[:0], w[:0], "triton").shape == (0, 4, 3, 4)


@interpreted
def test_what_is_left_to_torch(kernels: Any) -> None:
    x, w, _ = operands((1, 4, 2, 3, 4), 3)
    assert module._by_triton("torch", x, w) is None
    assert module._by_triton("auto", x.double(), w.double()) is None
    with pytest.raises(QuernelError, match="backend='triton' needs Triton"):
        module._filter_on_gpu(x.double(), w.double(), "triton")
    with pytest.raises(QuernelError, match="backend='compiled' is for the CPU"):
        module._filter_on_gpu(x, w, "compiled")


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    check_compiles("quernel.nn._aggregation_triton", COMPILED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_the_cpu_does() -> None:
    x, w, g = operands((2, 64, 8, 14, 15), 3)
    found = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device).requires_grad_() for t in (x, w)]
        y = ska(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, g.to(device))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4)
