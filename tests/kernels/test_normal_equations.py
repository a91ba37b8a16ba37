"""Sums of ridge regression: equal to the definition and to scikit-learn, mergeable without a trace of the split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from quernel._errors import QuernelError
from quernel.kernels import JitterWarning, NormalEquations
from tests.reference import snnk as oracle

SAME = 1e-9  # float64 sums in another order, through a solve with a condition number below 1e4
SINGLE = 1e-3  # float32 products, the same solve


def problem(n=200, p=12, q=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator, dtype=dtype) + 0.5
    return x, x @ torch.randn(p, q, generator=generator, dtype=dtype) + 2 + 0.1 * torch.randn(
        n, q, generator=generator, dtype=dtype
    )


def summed(x, y, parts=1):
    sums = NormalEquations(x.shape[-1], y.shape[-1])
    for a, b in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        sums.update(a, b)
    return sums


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0])
def test_solution_is_the_definition_and_scikit_learn_s(alpha):
    x, y = problem()
    found = summed(x, y).solve(alpha)
    weight, intercept = oracle.ridge(x.numpy(), y.numpy(), alpha)
    np.testing.assert_allclose(found.weight, weight, rtol=SAME, atol=SAME)
    np.testing.assert_allclose(found.intercept, intercept, rtol=SAME, atol=SAME)
    absolute = alpha * float((x - x.mean(0)).square().sum(0).mean())
    theirs = Ridge(alpha=absolute).fit(x, y)
    np.testing.assert_allclose(found.weight, theirs.coef_, rtol=SAME, atol=SAME)


def test_relative_error_is_that_of_the_predictions():
    x, y = problem()
    found = summed(x, y).solve(1e-3)
    lost = (x @ found.weight.mT + found.intercept - y).norm() / y.norm()
    assert found.relative_error == pytest.approx(float(lost), rel=1e-6)


def test_without_an_intercept():
    x, y = problem()
    found = summed(x, y).solve(0.0, intercept=False)
    assert not found.intercept.any()
    np.testing.assert_allclose(found.weight.mT, np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0], rtol=1e-8)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_shards_and_their_order_leave_no_trace(sizes, seed):
    x, y = problem(sum(sizes) + 20, seed=seed)
    whole = summed(x, y).solve(1e-3)
    shards = [summed(a, b) for a, b in zip(x.split([*sizes, 20]), y.split([*sizes, 20]), strict=True)]
    total = NormalEquations(12, 3)
    for shard in reversed(shards):
        total.merge(shard)
    assert total.count == len(x)
    found = total.solve(1e-3)
    torch.testing.assert_close(found.weight, whole.weight, rtol=SAME, atol=SAME)
    torch.testing.assert_close(found.intercept, whole.intercept, rtol=SAME, atol=SAME)


def test_float32_rows_are_added_in_float64():
    x, y = problem(5000, dtype=torch.float32)
    found, exact = summed(x, y).solve(1e-3), summed(x.double(), y.double()).solve(1e-3)
    assert found.weight.dtype is torch.float64
    torch.testing.assert_close(found.weight, exact.weight, rtol=SINGLE, atol=SINGLE)


def test_batches_of_any_rank():
    x, y = problem(24)
    sums = NormalEquations(12, 3)
    sums.update(x.reshape(2, 3, 4, 12), y.reshape(2, 3, 4, 3))
    torch.testing.assert_close(sums.solve().weight, summed(x, y).solve().weight)


def test_features_that_never_vary_give_the_mean():
    y = torch.tensor([[1.0], [3.0]])
    found = summed(torch.full((2, 4), 7.0), y).solve()
    assert not found.weight.any()
    assert found.intercept.item() == pytest.approx(2.0)
    one = summed(torch.ones(1, 4), torch.ones(1, 2)).solve()
    assert not one.weight.any() and one.relative_error == 0.0


def test_dependent_features_without_regularisation_are_said():
    x, y = problem()
    with pytest.warns(JitterWarning):
        found = summed(torch.cat([x, x], dim=1), y).solve(0.0)
    assert found.weight.isfinite().all()


def test_state_round_trip():
    x, y = problem()
    sums = summed(x, y)
    twin = NormalEquations.from_state(sums.state())
    assert torch.equal(twin.solve().weight, sums.solve().weight)
    twin.update(x, y)
    assert (twin.count, sums.count) == (400, 200)
    state = sums.state()
    for broken in ({k: v for k, v in state.items() if k != "xy"}, {**state, "xx": state["xx"].float()}):
        with pytest.raises(QuernelError, match="state"):
            NormalEquations.from_state(broken)


def test_bad_input_is_named_and_changes_nothing():
    x, y = problem()
    sums = summed(x, y)
    before = sums.solve().weight
    for a, b, message in (
        (x[:, :5], y, r"x must be floating point of shape \(\.\.\., 12\)"),
        (x, y[:7], "as many rows"),
        (x * float("nan"), y, "x holds NaN"),
        (x, y.long(), "y must be floating point"),
    ):
        with pytest.raises(QuernelError, match=message):
            sums.update(a, b)
    with pytest.raises(QuernelError, match="merge needs the same sizes"):
        sums.merge(NormalEquations(12, 4))
    with pytest.raises(QuernelError, match="alpha must be"):
        sums.solve(-1.0)
    with pytest.raises(QuernelError, match="no rows"):
        NormalEquations(2, 1).solve()
    assert torch.equal(sums.solve().weight, before)
