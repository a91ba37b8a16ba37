"""Truncated and whitened decompositions against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn.functional import singular_values, truncated_svd, whitened_svd, whitening_factor

# float32 singular values carry ~1e-6 relative error; squared tail sums ten times that.
TAIL = 1e-5
EXACT = 1e-5
# The whitened solve runs in float64; what is left is the rounding of the result to float32.
ROUNDING = 1e-6


def _weight(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _inputs(rows: int, n: int, seed: int = 1) -> Tensor:
    """Correlated inputs with a few directions a thousand times stronger than others, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) * torch.logspace(1, -2, n)
    return torch.randn(rows, n, generator=generator) @ mix


def _output_error(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> float:
    return float((x.double() @ (weight.double() - a.double() @ b.double()).T).norm())


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 7), (64, 48), (37, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_the_tail_of_the_spectrum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = _weight(*shape, dtype=dtype)
    s = torch.linalg.svdvals(weight.double())
    for rank in {1, (min(shape) + 1) // 2, min(shape)}:
        a, b = truncated_svd(weight, rank)
        assert a.shape == (shape[0], rank)
        assert b.shape == (rank, shape[1])
        assert a.dtype == b.dtype == dtype
        error = float((weight.double() - a.double() @ b.double()).square().sum())
        assert error == pytest.approx(float(s[rank:].square().sum()), rel=TAIL, abs=TAIL * float(s[0]) ** 2)


def test_factors_are_balanced() -> None:
    weight = _weight(40, 24)
    s = singular_values(weight)
    a, b = truncated_svd(weight, 10)
    torch.testing.assert_close(a.norm(dim=0), s[:10].sqrt(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(b.norm(dim=1), s[:10].sqrt(), rtol=EXACT, atol=EXACT)
    gram = _inputs(200, 24).T @ _inputs(200, 24)
    a, b = whitened_svd(weight, gram, 10)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("whiten", [False, True])
def test_exact_low_rank_is_recovered(whiten: bool) -> None:
    weight = _weight(30, 6) @ _weight(6, 20, seed=2)
    a, b = whitened_svd(weight, torch.eye(20), 6) if whiten else truncated_svd(weight, 6)
    assert float((weight - a @ b).norm() / weight.norm()) < EXACT


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [8, 400])  # fewer rows than inputs: the Gram matrix is singular
def test_whitening_never_loses_on_its_own_data(seed: int, rows: int) -> None:
    weight, x = _weight(24, 32, seed), _inputs(rows, 32, seed + 10)
    for rank in (1, 5, 12, 23):
        plain = _output_error(x, weight, *truncated_svd(weight, rank))
        whitened = _output_error(x, weight, *whitened_svd(weight, x.T @ x, rank))
        assert whitened <= plain * (1 + ROUNDING) + ROUNDING


def test_whitened_is_optimal_for_its_metric() -> None:
    # Among rank-k matrices nothing beats the tail of the singular values of W L.
    weight, x = _weight(24, 16, dtype=torch.float64), _inputs(300, 16).double()
    gram = x.T @ x
    lower = whitening_factor(gram)
    a, b = whitened_svd(weight, gram, 5)
    tail = torch.linalg.svdvals(weight @ lower)[5:].norm()
    torch.testing.assert_close(((weight - a @ b) @ lower).norm(), tail, rtol=1e-9, atol=0.0)


def test_identity_gram_equals_plain() -> None:
    weight = _weight(24, 16)
    plain, whitened = truncated_svd(weight, 7), whitened_svd(weight, 3.0 * torch.eye(16), 7)
    torch.testing.assert_close(whitened[0] @ whitened[1], plain[0] @ plain[1], rtol=EXACT, atol=EXACT)


def test_scale_of_the_gram_does_not_matter() -> None:
    weight, x = _weight(12, 16), _inputs(50, 16)
    one, two = whitened_svd(weight, x.T @ x, 4), whitened_svd(weight, 1e6 * (x.T @ x), 4)
    torch.testing.assert_close(one[0] @ one[1], two[0] @ two[1], rtol=EXACT, atol=EXACT)


def test_silent_inputs_fall_back_to_plain() -> None:
    weight = _weight(12, 16)
    plain, whitened = truncated_svd(weight, 4), whitened_svd(weight, torch.zeros(16, 16), 4)
    torch.testing.assert_close(whitened[0] @ whitened[1], plain[0] @ plain[1], rtol=EXACT, atol=EXACT)


def test_zero_weight_gives_zero_factors() -> None:
    for a, b in (truncated_svd(torch.zeros(4, 3), 2), whitened_svd(torch.zeros(4, 3), torch.eye(3), 2)):
        assert float((a @ b).abs().max()) == 0.0


def test_half_precision_is_decomposed_in_float32() -> None:
    weight = _weight(32, 32).bfloat16()
    a, b = truncated_svd(weight, 16)
    assert a.dtype == torch.bfloat16
    assert singular_values(weight).dtype == torch.float32
    full = truncated_svd(weight.float(), 16)
    # Only the rounding of the factors to 8 bits separates the two.
    assert float((a.float() @ b.float() - full[0] @ full[1]).norm() / weight.float().norm()) < 2**-7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: truncated_svd(torch.ones(3, 4), 0), "rank must be an integer in"),
        (lambda: truncated_svd(torch.ones(3, 4), 4), "rank must be an integer in"),
        (lambda: truncated_svd(torch.full((3, 4), torch.nan), 2), "weight holds NaN"),
        (lambda: truncated_svd(torch.ones(2, 3, 1, 1), 1), "Flatten a convolution's weight"),
        (lambda: truncated_svd(torch.ones(3, 4, dtype=torch.int64), 1), "floating matrix"),
        (lambda: whitened_svd(torch.ones(3, 4), torch.eye(3), 2), "Observe the inputs of this very layer"),
        (lambda: whitened_svd(torch.ones(3, 4), torch.eye(4), 2, eps=1e-6), "eps must be"),
        (lambda: whitened_svd(torch.ones(3, 4), torch.full((4, 4), torch.inf), 2), "gram holds NaN"),
        (lambda: whitening_factor(torch.ones(3, 4)), "square matrix"),
    ],
)
def test_bad_input_is_named(call: object, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()  # type: ignore[operator]
