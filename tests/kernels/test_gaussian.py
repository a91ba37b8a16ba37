"""The Gaussian kernel matrix: its definition, its gradient, limits and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from quernel._errors import QuernelError
from quernel.kernels import gaussian_kernel
from tests.reference import soft_attention as reference


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (7, 3, 5), (3, 11, 1), (0, 4, 2), (4, 0, 2)])
def test_it_is_the_definition(n: int, m: int, d: int) -> None:
    x, y = draw(n, d), draw(m, d, seed=1)
    torch.testing.assert_close(gaussian_kernel(x, y), reference.kernel(x, y).float(), rtol=1e-5, atol=1e-7)


def test_a_known_value_by_the_scale_of_attention() -> None:
    # D = 32, queries a distance of 1 apart, each divided by the fourth root of D.
    q = torch.zeros(2, 32, dtype=torch.float64)
    q[1, 0] = 1.0
    k = gaussian_kernel(q * 32**-0.25, q * 32**-0.25)
    assert math.isclose(float(k[0, 1]), math.exp(-1 / (2 * math.sqrt(32))), rel_tol=1e-14)


def test_it_is_symmetric_positive_and_blind_to_translation() -> None:
    x = draw(2, 20, 4).double()
    k = gaussian_kernel(x, x)
    torch.testing.assert_close(k, k.mT)
    assert float(torch.linalg.eigvalsh(k).min()) > -1e-12
    torch.testing.assert_close(gaussian_kernel(x + 3.0, x + 3.0), k)
    assert (k.diagonal(dim1=-2, dim2=-1) == 1).all()


def test_rounding_never_makes_it_larger_than_one() -> None:
    # Far from the origin the distance of equal rows is a difference of large numbers.
    x = 300 + draw(64, 8)
    k = gaussian_kernel(x, x)
    assert float(k.max()) <= 1.0


def test_gradients() -> None:
    x, y = draw(2, 5, 3).double().requires_grad_(), draw(2, 4, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(gaussian_kernel, (x, y))
    z = draw(5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: gaussian_kernel(a, a), (z,))


def test_half_precision_is_taken_to_float32() -> None:
    x = draw(6, 4).bfloat16()
    assert gaussian_kernel(x, x).dtype == torch.float32
    torch.testing.assert_close(gaussian_kernel(x, x), gaussian_kernel(x.float(), x.float()))


@pytest.mark.parametrize("shapes", [((3, 2), (3, 3)), ((2, 3, 2), (3, 2)), ((2,), (2,)), ((2, 3, 2), (1, 3, 2))])
def test_other_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(QuernelError, match="x and y must be"):
        gaussian_kernel(*(torch.zeros(shape) for shape in shapes))
