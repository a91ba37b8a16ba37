"""Triton kernels of neighborhood attention, interpreted on the CPU, against the definition; and that they compile."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn import _neighborhood_op as ops
from quernel.nn.functional import na1d, na2d, na3d
from tests.triton_process import INTERPRETS, check_compiles, interpreted, needs_triton, outside, passed_interpreted

pytestmark = needs_triton
# Sums of some hundred products in float32, in another order; rounding of half precision.
CLOSE, COARSE = {"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-2, "atol": 1e-2}
NA: dict[int, Any] = {1: na1d, 2: na2d, 3: na3d}
CASES: list[tuple[Any, ...]] = [
    ((70,), 9, 1, 1, False, 0),
    ((41,), 8, 3, 2, True, 3),
    ((20,), 20, 1, 1, False, 70),
    ((9, 13), (3, 4), (1, 2), (2, 1), (False, True), 0),
    ((4, 5, 6), (2, 3, 3), 1, (1, 1, 2), False, 5),
]
# Heads of queries and keys, D, Dv.
SIZES = [(2, 2, 16, 16), (4, 2, 5, 33)]

CONSTANTS = {
    "NEAR": 90, "M": 100, "SHARE": 2, "D": 32, "E": 64, "WIDE_D": 32, "WIDE_E": 64, "LANES": 64, "BLOCK": 64,
    "PRECISION": "ieee",
}  # fmt: skip
KINDS = {"masks": "*u8", "lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
KINDS |= dict.fromkeys(("lanes", "origins", "kinds", "offsets"), "*i64")
KINDS |= dict.fromkeys(("q", "k", "v", "out", "grad", "dq", "dk", "dv"), "*bf16")
COMPILED = dict.fromkeys(("attend", "query", "key"), (CONSTANTS, KINDS, "i32"))


@pytest.mark.slow
@outside
def test_kernels_interpreted() -> None:
    assert passed_interpreted(__file__) >= 12


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    check_compiles("quernel.nn._neighborhood_triton", COMPILED)


def leaves_of(shape: tuple[int, ...], extra: int, sizes: tuple[int, ...], batch: int = 2) -> list[Tensor]:
    heads, groups, d, e = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(*shape, heads, d), (*shape, groups, d), (*shape, groups, e), (extra, groups, d), (extra, groups, e)]
    return [torch.randn(batch, *held, generator=generator).requires_grad_() for held in shapes[: 5 if extra else 3]]


def run(leaves: list[Tensor], numbers: Any, backend: str) -> list[Tensor]:
    names = dict(zip(("additional_keys", "additional_values"), leaves[3:], strict=False))
    outputs = NA[leaves[0].ndim - 3](*leaves[:3], *numbers, backend=backend, return_lse=True, **names)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, outputs, strict=True)), leaves)]


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_are_the_definition_with_gradients(case: tuple[Any, ...], sizes: tuple[int, ...]) -> None:
    shape, *numbers, extra = case
    leaves = leaves_of(shape, extra, sizes)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    for got, want in zip(run(leaves, numbers, "triton"), run(wide, numbers, "dense"), strict=True):
        assert got.dtype is torch.float32
        torch.testing.assert_close(got.double(), want, **CLOSE)


@interpreted
def test_half_precision_is_added_up_in_float32() -> None:
    # Products of bfloat16 are for a GPU: the interpreter multiplies its bits as integers.
    leaves = [x.detach().half().requires_grad_() for x in leaves_of((30,), 0, (4, 2, 16, 16))]
    got, wide = run(leaves, (7,), "triton"), [x.detach().double().requires_grad_() for x in leaves]
    assert [x.dtype for x in got] == [torch.float16, torch.float32, *[torch.float16] * 3]
    for a, b in zip(got, run(wide, (7,), "dense"), strict=True):
        torch.testing.assert_close(a.double(), b, **COARSE)


@interpreted
def test_repeated_bits_and_an_empty_batch() -> None:
    leaves = leaves_of((40,), 2, SIZES[1])
    first, second = (run(leaves, (5,), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    none = leaves_of((40,), 2, SIZES[1], batch=0)
    assert run(none, (5,), "triton")[0].shape == (0, 40, 4, 33)


@interpreted
def test_what_is_left_to_others() -> None:
    x = torch.ones(1, 8, 1, 4)
    assert ops.triton_kernels("triton", x) is not None
    assert ops.triton_kernels("auto", x) is None  # no GPU
    with pytest.raises(QuernelError, match="heads of at most 256"):
        na1d(x.double(), x.double(), x.double(), 3, backend="triton")
    assert ops.triton_kernels("triton", torch.ones(1, 8, 1, 257)) is None


@pytest.mark.skipif(INTERPRETS, reason="the interpreter takes tensors of a CPU")
def test_a_cpu_is_refused_with_the_remedy() -> None:
    x = torch.ones(1, 8, 1, 4)
    with pytest.raises(QuernelError, match="float32 on cpu"):
        na1d(x, x, x, 3, backend="triton")


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 8, 1, 4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QuernelError, match=r"quernel\[gpu\]"):
        na1d(x, x, x, 3, backend="triton")
    assert ops.triton_kernels("auto", x) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_equals_the_cpu(case: tuple[Any, ...]) -> None:
    shape, *numbers, extra = case
    leaves = leaves_of(shape, extra, SIZES[0])
    moved = [x.detach().cuda().requires_grad_() for x in leaves]
    for backend in ("triton", "tiled", "dense"):
        for got, want in zip(run(moved, numbers, backend), run(leaves, numbers, "auto"), strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)
