"""Binary linear attention: the linear form is the N x N form, fused and composed agree, gradients, degenerate rows."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.nn.functional import binary_linear_attention, heaviside_through
from quernel.nn.functional.binary_attention import binary_codes, composed
from tests.reference import shiftaddvit as reference

# float32 sums of some hundred values of order one, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
THRESHOLDS = (0.0, 0.05, -0.05, None)


def _inputs(b: int, h: int, n: int, d: int, kernel: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, b, h, n, d, generator=generator)
    return q, k, v, torch.randn(h, kernel, generator=generator)


def _limits(heads: int, threshold: float | None) -> dict[str, Tensor | None]:
    if threshold is None:
        return {"q_threshold": None, "k_threshold": None}
    return {
        "q_threshold": threshold * torch.arange(1.0, heads + 1),
        "k_threshold": threshold * torch.arange(2.0, heads + 2),
    }


def _by_heads(q: Tensor, k: Tensor, v: Tensor, conv: Tensor, limits: dict[str, Any], **options: Any) -> Tensor:
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            pair = [None if t is None else float(t[h]) for t in limits.values()]
            out[b, h] = reference.binary_attention(q[b, h], k[b, h], v[b, h], conv[h], *pair, **options)
    return out


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("constant", ["self", "sum"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 53, 32), (2, 1, 261, 16), (1, 1, 520, 48)])
def test_linear_form_is_the_explicit_one(shape: tuple[int, ...], constant: str, threshold: float | None) -> None:
    q, k, v, conv = _inputs(*shape)
    limits = _limits(shape[1], threshold)
    wanted = _by_heads(q, k, v, conv, limits, constant=constant)
    torch.testing.assert_close(binary_linear_attention(q, k, v, conv, constant=constant, **limits), wanted, **CLOSE)
    torch.testing.assert_close(composed(q, k, v, conv, *limits.values(), constant == "sum"), wanted, **CLOSE)


@pytest.mark.parametrize("kernel", [1, 3, 31])
def test_filters_of_any_odd_width(kernel: int) -> None:
    q, k, v, conv = _inputs(1, 2, 11, 16, kernel)
    limits = _limits(2, 0.05)
    torch.testing.assert_close(
        binary_linear_attention(q, k, v, conv, **limits), _by_heads(q, k, v, conv, limits), **CLOSE
    )


def test_strided_inputs_and_poisoned_memory(poisoned_memory: None) -> None:
    qkv = torch.randn(2, 37, 3, 4, 32).permute(2, 0, 3, 1, 4)
    conv = torch.randn(4, 5)
    got = binary_linear_attention(*qkv.unbind(0), conv, **_limits(4, 0.05))
    dense = [x.contiguous() for x in qkv.unbind(0)]
    assert torch.equal(got, binary_linear_attention(*dense, conv, **_limits(4, 0.05)))
    assert got.transpose(1, 2).is_contiguous(), "heads merge without a copy"
    last = torch.randn(2, 4, 32, 37).transpose(2, 3)  # channels far apart
    assert torch.equal(
        binary_linear_attention(last, last, last, conv), binary_linear_attention(*[last.contiguous()] * 3, conv)
    )


def test_results_do_not_depend_on_threads() -> None:
    q, k, v, conv = _inputs(1, 3, 1000, 32)
    wanted = binary_linear_attention(q, k, v, conv)
    for n in (1, 2, 3):
        with threads(n):
            assert torch.equal(binary_linear_attention(q, k, v, conv), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v, conv = (x.to(dtype) for x in _inputs(1, 2, 20, 32))
    got = binary_linear_attention(q, k, v, conv)
    assert got.dtype == dtype
    # Computed in float32 and rounded once.
    wanted = binary_linear_attention(q.float(), k.float(), v.float(), conv.float())
    torch.testing.assert_close(got.float(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(composed(q, k, v, conv, None, None, False), got, rtol=1e-2, atol=1e-2)


def test_zero_rows_stay_finite() -> None:
    q, k, v, conv = _inputs(1, 2, 6, 8)
    q[:, :, 2], k[:, :, 3], v[:, :, 2:5] = 0, 0, 0
    for function in (binary_linear_attention, lambda *x: composed(*x, None, None, False)):
        assert bool(function(q, k, v, conv).isfinite().all())
        assert torch.equal(function(*[torch.zeros(1, 2, 3, 8)] * 3, conv), torch.zeros(1, 2, 3, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    binary_linear_attention(*leaves, conv).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in leaves if x.grad is not None)


def test_nan_of_a_value_is_not_hidden() -> None:
    q, k, v, conv = _inputs(1, 1, 5, 16)
    v[0, 0, 3, 2] = float("nan")
    assert bool(binary_linear_attention(q, k, v, conv)[0, 0, 3].isnan().all())


@pytest.mark.parametrize("sizes", [(0, 2, 5, 16), (2, 2, 0, 16)])
def test_nothing_gives_nothing(sizes: tuple[int, ...]) -> None:
    x = torch.zeros(sizes)
    assert binary_linear_attention(x, x, x, torch.zeros(2, 3)).shape == x.shape


def test_gradient_of_the_codes_is_that_of_clamp() -> None:
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    unit = torch.nn.functional.normalize(x, dim=-1)
    weights = torch.randn(1, 2, 9, 8)
    (got,) = torch.autograd.grad((binary_codes(x, torch.tensor([0.1, -0.1])) * weights).sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((unit.clamp(0, 1) * weights).sum(), x)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("options", [{}, {"constant": "sum"}, {"sparse": 0.02}])
def test_gradient_of_everything_else(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Smooth codes in the place of steps: finite differences see the rest.
    monkeypatch.setattr(
        "quernel.nn.functional.binary_attention.heaviside_through", lambda x, limit: torch.sigmoid(3 * (x - limit))
    )
    leaves = [x.double().requires_grad_() for x in _inputs(1, 2, 5, 4, 3)]
    limits = {name: None if t is None else t.double() for name, t in _limits(2, 0.05).items()}
    assert torch.autograd.gradcheck(lambda *x: binary_linear_attention(*x, **limits, **options), leaves)


def test_sparse_branch_is_added_before_the_norm() -> None:
    q, k, v, conv = _inputs(1, 2, 12, 8)
    limits = _limits(2, 0.05)
    got = binary_linear_attention(q, k, v, conv, sparse=0.1, **limits)
    torch.testing.assert_close(got, _by_heads(q, k, v, conv, limits, sparse=0.1), **CLOSE)


def test_operator_is_well_formed_and_compiles() -> None:
    q, k, v, conv = _inputs(2, 2, 9, 8)
    limits = torch.full((2,), 0.05)
    torch.library.opcheck(torch.ops.quernel.binary_attention.default, (q, k, v, conv, limits, None, True))

    def function(*x: Tensor) -> Tensor:
        return binary_linear_attention(*x, q_threshold=limits, constant="sum")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, conv), function(q, k, v, conv))


@pytest.mark.slow
def test_portable_path_agrees() -> None:
    code = (
        "import torch; from quernel.nn.functional import binary_linear_attention as f;"
        "g = torch.Generator().manual_seed(0); x = torch.randn(3, 1, 2, 300, 32, generator=g);"
        "print(float(f(*x, torch.ones(2, 3)).double().square().sum()), float(f(*x, torch.ones(2, 3))[0, 1, 299, 7]))"
    )

    def run(portable: str) -> list[float]:
        environment = os.environ | {"QUERNEL_PORTABLE": portable}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return [float(word) for word in done.stdout.split()]

    assert run("1") == pytest.approx(run("0"), rel=1e-5)


def test_bad_input_is_named() -> None:
    q, k, v, conv = _inputs(1, 2, 5, 8)
    with pytest.raises(QuernelError, match="one shape"):
        binary_linear_attention(q, k[:, :1], v, conv)
    with pytest.raises(QuernelError, match="one floating dtype"):
        binary_linear_attention(q, k.half(), v, conv)
    with pytest.raises(QuernelError, match="odd kernel"):
        binary_linear_attention(q, k, v, conv[:, :4])
    with pytest.raises(QuernelError, match="k_threshold must have shape"):
        binary_linear_attention(q, k, v, conv, k_threshold=torch.zeros(3))
    with pytest.raises(QuernelError, match="constant must be one of"):
        binary_linear_attention(q, k, v, conv, constant="half")
    with pytest.raises(QuernelError, match="sparse must be"):
        binary_linear_attention(q, k, v, conv, sparse=2.0)


def test_codes_use_the_heaviside_of_the_library() -> None:
    x = torch.randn(1, 1, 4, 8)
    unit = torch.nn.functional.normalize(x, dim=-1)
    assert torch.equal(binary_codes(x, torch.tensor([0.2])), heaviside_through(unit, 0.2))
