"""Triton kernels of causal linear attention, interpreted on the CPU, against torch; and that they compile for a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from quernel.nn.functional import LinearAttentionState, linear_attention, rope1d
from quernel.nn.functional import feature_attention as module
from tests.triton_process import check_compiles, interpreted, needs_triton, outside, passed_interpreted

pytestmark = needs_triton
# Sums of some hundred products in float32, in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

CONSTANTS = {"PRECISION": "ieee", "C": 64, "F": 64, "D": 64, "BLOCKS": 2}
KINDS = dict.fromkeys(("chunks", "heads", "features", "size"), "i32")
COMPILED = dict.fromkeys(("forward", "features", "values"), (CONSTANTS, KINDS, "*fp32"))


@pytest.fixture(scope="module")
def kernels() -> Any:
    return importlib.import_module("quernel.nn._linear_attention_triton")


@pytest.mark.slow
@outside
def test_kernels_interpreted() -> None:
    assert passed_interpreted(__file__) >= 12


def drawn(batch: int, heads: int, chunks: int, size: int, features: int, width: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(features)
    shapes = [(size, features), (size, features), (size, width), (features, width), (features, 1)]
    return [torch.rand(batch, heads, chunks, *shape, generator=g) for shape in shapes]


@interpreted
@pytest.mark.parametrize(("features", "width"), [(16, 16), (8, 5), (70, 33), (128, 70), (1, 1)])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_are_the_products(kernels: Any, features: int, width: int, decay: bool) -> None:
    given = drawn(2, 3, 2, 16, features, width)
    gamma = torch.tensor([0.5, 0.9, 1.0])[:, None, None] if decay else None
    place = torch.arange(16.0)
    left: Any = 1.0 if gamma is None else (gamma ** (place[:, None] + 1))[:, None]
    ours, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    got = kernels.chunk_products(*ours, gamma)
    wanted = module._products(module._falls(gamma, place), left, *theirs)
    grads = [torch.rand(w.shape) for w in wanted]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(wanted, grads)
    for a, b in zip((*got, *(t.grad for t in ours)), (*wanted, *(t.grad for t in theirs)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@interpreted
@pytest.mark.parametrize(
    "options", [{}, {"rope": rope1d(70, 4)}, {"decay": torch.tensor([0.7, 1.0])}, {"normalize": False}]
)
def test_attention_through_the_kernels(kernels: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    given = [torch.rand(1, 2, 70, n, generator=g) for n in (8, 8, 5)]
    mask = torch.arange(70)[None] != 6
    state = LinearAttentionState.empty(1, 2, 8, 5)
    ours, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    wanted, _ = linear_attention(*theirs, causal=True, mask=mask, state=state, **options)
    monkeypatch.setattr(module, "_kernels", lambda *tensors: kernels)
    monkeypatch.setattr(module, "_products", None)  # nothing else is reached
    got, _ = linear_attention(*ours, causal=True, mask=mask, state=state, **options)
    torch.testing.assert_close(got, wanted, **CLOSE)
    got.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


@interpreted
def test_an_empty_batch(kernels: Any) -> None:
    given = [t[:0].requires_grad_() for t in drawn(1, 1, 1, 16, 8, 4)]
    num, den = kernels.chunk_products(*given, None)
    (num.sum() + den.sum()).backward()
    assert num.shape == (0, 1, 1, 16, 4) and den.shape == (0, 1, 1, 16, 1)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    check_compiles("quernel.nn._linear_attention_triton", COMPILED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_does() -> None:
    given = [torch.rand(2, 3, 300, n) for n in (64, 64, 32)]
    ours, theirs = ([t.to(device).requires_grad_() for t in given] for device in ("cuda", "cpu"))
    gamma = torch.tensor([0.9, 0.99, 1.0])
    got = linear_attention(*ours, causal=True, decay=gamma.cuda())
    wanted = linear_attention(*theirs, causal=True, decay=gamma)
    got.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(got.cpu(), wanted, **CLOSE)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-3, atol=1e-4)
