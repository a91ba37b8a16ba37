"""Rotary positions: tables and rotations against loops, relative positions, refusals."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional import rope1d, rope2d, rotate
from tests.reference import nalaformer as reference


@pytest.mark.parametrize(("height", "width", "dim"), [(3, 5, 8), (1, 1, 4), (2, 7, 16)])
def test_grids_turn_by_row_and_column(height: int, width: int, dim: int) -> None:
    rope, angles = rope2d(height, width, dim, dtype=torch.float64), reference.grid_angles(height, width, dim)
    torch.testing.assert_close(rope, torch.stack([angles.cos(), angles.sin()], -1))
    phi = torch.randn(height * width, 2 * dim, dtype=torch.float64)
    torch.testing.assert_close(rotate(phi, rope), reference.turned(phi, angles))


def test_sequences_turn_by_place() -> None:
    rope, angles = rope1d(6, 6, start=3, dtype=torch.float64), reference.line_angles(6, 6, start=3)
    torch.testing.assert_close(rope, torch.stack([angles.cos(), angles.sin()], -1))
    torch.testing.assert_close(rope1d(6, 6, start=torch.tensor(3)), rope.float())
    far = rope1d(1, 2, start=1_000_000)
    torch.testing.assert_close(far[0, 0, 0].double(), torch.tensor(1e6, dtype=torch.float64).cos(), rtol=0, atol=1e-7)


def test_products_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)

    def product(i: int, j: int) -> torch.Tensor:
        return (
            rotate(q, rope1d(1, 8, start=i, dtype=torch.float64))
            * rotate(k, rope1d(1, 8, start=j, dtype=torch.float64))
        ).sum()

    torch.testing.assert_close(product(7, 4), product(103, 100))
    assert abs(float(product(7, 4) - product(7, 2))) > 1e-3


def test_gradients_and_layouts() -> None:
    x, rope = torch.randn(2, 3, 5, 8, dtype=torch.float64), rope1d(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: rotate(t, rope), (x.clone().requires_grad_(),))
    spread = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(rotate(spread, rope), rotate(x, rope))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope1d(3, 5), "dim must be even"),
        (lambda: rope2d(3, 3, 6), "multiple of 4"),
        (lambda: rope1d(3, 0), "dim"),
        (lambda: rope1d(3, 4, base=1.0), "base"),
        (lambda: rotate(torch.zeros(4, 8), rope1d(3, 4)), "rope must have shape"),
        (lambda: rotate(torch.zeros(3, 6), rope1d(3, 4)), "rope must have shape"),
    ],
)
def test_what_cannot_be_right_is_refused(call, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
