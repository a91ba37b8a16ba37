"""``LowRankLinear``: from a trained layer and back, its own initial values, round trips."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.nn import LowRankLinear

CLOSE = 1e-5
# 256 * 256 products of 16 terms: the sample variance is within a few percent of the true one at this fixed seed.
SPREAD = 0.1


def test_full_rank_computes_what_the_layer_did() -> None:
    linear, x = nn.Linear(9, 12), torch.randn(3, 9)
    thin = LowRankLinear.from_linear(linear, rank=9)
    torch.testing.assert_close(thin(x), linear(x), rtol=CLOSE, atol=CLOSE)
    assert thin.bias is linear.bias


def test_to_linear_computes_the_same() -> None:
    thin, x = LowRankLinear(9, 12, 4), torch.randn(3, 9)
    plain = thin.to_linear()
    assert type(plain) is nn.Linear
    assert (plain.in_features, plain.out_features, plain.bias is thin.bias) == (9, 12, True)
    torch.testing.assert_close(plain(x), thin(x), rtol=CLOSE, atol=CLOSE)


def test_frozen_layers_stay_frozen() -> None:
    thin = LowRankLinear.from_linear(nn.Linear(9, 12, bias=False).requires_grad_(False), rank=3)
    assert not any(p.requires_grad for p in thin.parameters())
    assert thin.bias is None


def test_initial_values_have_the_variance_of_a_plain_layer() -> None:
    thin = LowRankLinear(256, 256, 16, generator=torch.Generator().manual_seed(0))
    assert float(thin.weight.dense().detach().var()) == pytest.approx(1 / (3 * 256), rel=SPREAD)
    wide = LowRankLinear(64, 512, 16, generator=torch.Generator().manual_seed(0))
    assert wide.weight.a.norm().item() == pytest.approx(wide.weight.b.norm().item(), rel=SPREAD)


def test_generator_decides_alone() -> None:
    before = torch.get_rng_state()
    one, two = (LowRankLinear(8, 6, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_factoring_draws_nothing() -> None:
    linear = nn.Linear(8, 6)
    before = torch.get_rng_state()
    LowRankLinear.from_linear(linear, 3).to_linear()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_through_config_and_state(dtype: torch.dtype, bias: bool) -> None:
    thin = LowRankLinear(7, 5, 3, bias, dtype=dtype)
    empty = LowRankLinear.from_config(thin.config())
    empty.load_state_dict(thin.state_dict())
    x = torch.randn(2, 7, dtype=dtype)
    assert torch.equal(empty(x), thin(x))


def test_bad_input_is_named() -> None:
    with pytest.raises(QuernelError, match="rank must be an integer in"):
        LowRankLinear(4, 8, 5)
    with pytest.raises(QuernelError, match="in_features must be"):
        LowRankLinear(0, 8, 1)
    with pytest.raises(QuernelError, match="linear must be Linear"):
        LowRankLinear.from_linear(nn.Conv2d(3, 3, 1), 1)  # type: ignore[arg-type]
