"""The balance loss: its definition, its gradient, its minimum, its edges."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional import expert_balance_loss
from quernel.nn.functional.expert_balance import squared_variation
from tests.reference import shiftaddvit as reference

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


@pytest.mark.parametrize("latencies", [(6.0, 4.0), (1.0, 3.0), (1.0, 2.0, 5.0)])
def test_loss_is_that_of_the_definition(latencies: tuple[float, ...]) -> None:
    clean = torch.randn(20, len(latencies))
    noisy = clean + 0.5 * torch.randn_like(clean)
    got = expert_balance_loss(clean, noisy, torch.tensor(latencies), 0.5)
    torch.testing.assert_close(got, reference.balance_loss(clean, noisy, latencies, 0.5), **CLOSE)
    scaled = expert_balance_loss(clean, noisy, 1000 * torch.tensor(latencies), 0.5)
    torch.testing.assert_close(scaled, got, **CLOSE)


def test_gradient() -> None:
    clean = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    z = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_variation, z)
    # As the layer calls it: the noisy logits, and with them the thresholds, follow the clean ones.
    drawn = 0.5 * torch.randn(6, 2, dtype=torch.float64)
    latencies = torch.tensor([6.0, 4.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: expert_balance_loss(c, c + drawn, latencies, 0.5), clean)


def test_equal_times_cost_nothing() -> None:
    clean = torch.log(torch.tensor([[0.4, 0.6]])).expand(10, 2)
    assert float(expert_balance_loss(clean, clean, torch.tensor([6.0, 4.0]), 0.0)) == pytest.approx(0, abs=1e-9)
    assert float(expert_balance_loss(clean, clean, torch.tensor([1.0, 1.0]), 0.0)) > 1e-3


def test_no_tokens_are_no_loss_and_no_nan() -> None:
    empty = torch.zeros(0, 2, requires_grad=True)
    loss = expert_balance_loss(empty, empty, torch.ones(2), 0.5)
    loss.backward()
    assert float(loss) == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(QuernelError, match="clean and noisy must have one shape"):
        expert_balance_loss(torch.zeros(3, 1), torch.zeros(3, 1), torch.ones(1), 0.5)
    with pytest.raises(QuernelError, match="latencies one entry an expert"):
        expert_balance_loss(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3), 0.5)
