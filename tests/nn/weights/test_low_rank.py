"""``LowRankWeight``: products, rows, bytes and round trips against the multiplied-out matrix."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.weights import LowRankWeight

# Two float32 products in another order.
CLOSE = 1e-5


@pytest.fixture
def weight() -> LowRankWeight:
    return LowRankWeight.from_dense(torch.randn(12, 9), 4)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (3, 5)])
def test_matmul_is_that_of_the_dense_weight(weight: LowRankWeight, batch: tuple[int, ...]) -> None:
    x = torch.randn(*batch, 9)
    torch.testing.assert_close(weight.matmul(x), x @ weight.dense().T, rtol=CLOSE, atol=CLOSE)


def test_rows_are_those_of_the_dense_weight(weight: LowRankWeight) -> None:
    ids = torch.tensor([[0, 11], [5, 5]])
    torch.testing.assert_close(weight.rows(ids), weight.dense()[ids], rtol=CLOSE, atol=CLOSE)


def test_product_keeps_the_input_dtype(weight: LowRankWeight) -> None:
    assert weight.matmul(torch.randn(2, 9, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bytes_are_those_of_the_factors(weight: LowRankWeight) -> None:
    assert weight.nbytes == 4 * 4 * (12 + 9)
    assert weight.shape == (12, 9)
    assert weight.rank == 4


def test_both_factors_get_gradients(weight: LowRankWeight) -> None:
    weight.matmul(torch.randn(3, 9)).square().sum().backward()
    assert weight.a.grad is not None
    assert weight.b.grad is not None
    assert float(weight.a.grad.norm()) > 0
    assert float(weight.b.grad.norm()) > 0


def test_config_rebuilds_shapes_before_loading(weight: LowRankWeight) -> None:
    empty = LowRankWeight.from_config(weight.config())
    empty.load_state_dict(weight.state_dict())
    assert torch.equal(empty.dense(), weight.dense())


def test_whitening_is_used_when_a_gram_is_given() -> None:
    dense, x = torch.randn(12, 9), torch.randn(200, 9) * torch.logspace(1, -1, 9)
    plain, whitened = LowRankWeight.from_dense(dense, 3), LowRankWeight.from_dense(dense, 3, x.T @ x)
    errors = [(x @ (dense - w.dense()).T).norm().item() for w in (whitened, plain)]
    assert errors[0] < errors[1]


def test_bad_input_is_named() -> None:
    with pytest.raises(QuernelError, match=r"shape must be \(out, in\)"):
        LowRankWeight((4, 3, 1, 1), 2)  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="rank must be"):
        LowRankWeight((4, 3), 4)
    with pytest.raises(QuernelError, match="dtype must be one of"):
        LowRankWeight((4, 3), 2, "int8")
    with pytest.raises(QuernelError, match="a and b must be"):
        LowRankWeight.from_factors(torch.ones(4, 2), torch.ones(3, 4))
