"""Mergeable sums against direct NumPy: any split into batches, masks, dtypes, merges; bad input is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel._errors import QuernelError
from quernel.kernels import AbsMax, Gram, Moments

# float64 sums of a few thousand terms.
EXACT = 1e-12
# float32 products summed in blocks of 256 rows, relative to the diagonal: 256 roundings of 6e-8, mostly cancelling.
GRAM_FLOAT32 = 2e-6
# A bin of the histogram is at most 1/16 of its lower edge wide.
BIN = 1 / 16

KINDS = [lambda: AbsMax(5), lambda: AbsMax(5, percentile=99.0), lambda: Moments(5), lambda: Gram(5)]
kinds = pytest.mark.parametrize("make", KINDS, ids=["absmax", "percentile", "moments", "gram"])


def values(n=1000, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([1.0, 10.0, 0.1, 1e-3, 100.0])
    return (torch.randn(n, 5, generator=generator) * scales + scales).to(dtype)


def state(summary):
    if isinstance(summary, AbsMax):
        return [summary.value]
    if isinstance(summary, Moments):
        return [summary.mean, summary.variance()]
    return [summary.sum]


def assert_same(a, b, rtol=EXACT):
    assert a.count == b.count
    for x, y in zip(state(a), state(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


def test_absmax_is_the_largest_magnitude():
    x = values()
    summary = AbsMax(5)
    for batch in x.split(77):
        summary.update(batch)
    torch.testing.assert_close(summary.value, x.abs().amax(0), rtol=0, atol=0)
    assert summary.count == 1000


def test_moments_equal_numpy():
    x = values()
    summary = Moments(5)
    for batch in x.split(77):
        summary.update(batch)
    reference = x.double().numpy()
    np.testing.assert_allclose(summary.mean, reference.mean(0), rtol=EXACT)
    np.testing.assert_allclose(summary.variance(), reference.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(summary.variance(0), reference.var(0), rtol=1e-6)


def test_moments_of_a_large_offset_keep_their_variance():
    # The textbook sum of squares would lose every digit here.
    x = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e8
    summary = Moments(1)
    for batch in x.split(1000):
        summary.update(batch)
    np.testing.assert_allclose(summary.variance(), x.numpy().var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "compute", "rtol"),
    [
        (torch.float32, torch.float32, GRAM_FLOAT32),
        (torch.float32, torch.float64, EXACT),
        (torch.float64, torch.float32, EXACT),
        (torch.bfloat16, torch.float32, GRAM_FLOAT32),
    ],
)
def test_gram(dtype, compute, rtol):
    x = values(5000, dtype=dtype)
    summary = Gram(5, compute_dtype=compute)
    for batch in x.split(2100):
        summary.update(batch)
    reference = x.double().T @ x.double()
    error = (summary.sum - reference).abs() / (reference.diagonal()[:, None] * reference.diagonal()).sqrt()
    assert error.max() < rtol
    assert torch.equal(summary.sum, summary.sum.T)
    torch.testing.assert_close(summary.mean(), summary.sum / 5000)


@kinds
def test_batches_do_not_matter(make):
    x = values(200, dtype=torch.float64)
    whole, pieces = make(), make()
    whole.update(x)
    for batch in x.view(4, 10, 5, 5):
        pieces.update(batch)
    assert_same(whole, pieces)


@kinds
def test_merge_equals_one_pass_in_any_order(make):
    x = values(300, dtype=torch.float64)
    parts = []
    for batch in x.split([1, 0, 120, 179]):
        parts.append(make())
        parts[-1].update(batch)
    whole, merged = make(), make()
    whole.update(x)
    for part in reversed(parts):
        merged.merge(part)
    assert_same(whole, merged)
    # An untouched summary changes nothing, whichever side it is on.
    merged.merge(make())
    assert_same(whole, merged)


@kinds
def test_masked_rows_do_not_count_whatever_they_hold(make):
    x = values(60, dtype=torch.float64).view(4, 15, 5).clone()
    mask = torch.rand(4, 15, generator=torch.Generator().manual_seed(2)) < 0.6
    expected, masked = make(), make()
    expected.update(x[mask])
    x[~mask] = math.nan
    masked.update(x, mask)
    assert_same(expected, masked, rtol=0)
    before = masked.count
    masked.update(x, torch.zeros_like(mask))
    assert masked.count == before


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_more(make, dtype):
    x = values(500).clamp(-200, 200).to(dtype)
    half, full = make(), make()
    half.update(x)
    full.update(x.float())
    assert_same(half, full, rtol=0)


@kinds
def test_awkward_layouts(make):
    x = values(64, dtype=torch.float64)
    plain, strided, single = make(), make(), make()
    plain.update(x)
    strided.update(torch.cat([x, x], 1).view(64, 2, 5)[:, 0].reshape(8, 8, 5).transpose(0, 1))
    for row in x:
        single.update(row)
    assert_same(plain, strided)
    assert_same(plain, single)


@kinds
def test_gradients_are_not_recorded(make):
    summary = make()
    summary.update(values(20).requires_grad_())
    assert not any(tensor.requires_grad for tensor in state(summary))


@given(
    data=st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=200),
    percentile=st.sampled_from([50.0, 90.0, 99.0, 99.9, 99.99]),
)
@settings(max_examples=150, deadline=None)
def test_percentile_bounds(data, percentile):
    x = torch.tensor(data, dtype=torch.float32)[:, None]
    summary = AbsMax(1, percentile=percentile)
    summary.update(x)
    magnitudes = np.sort(np.abs(x.numpy().ravel()))
    # 99.9 percent of 1000 rows is rank 999, although 0.999 * 1000 rounds above it in binary.
    rank = -(-round(percentile * 100) * len(data) // 10_000)
    exact = float(magnitudes[rank - 1])
    value = float(summary.value)
    assert exact <= value <= min(max(exact * (1 + BIN), 1.1e-6), magnitudes[-1])


def test_percentile_leaves_outliers_out_and_merges_exactly():
    x = values(10_000)
    x[::2000] *= 1000  # 5 of 10 000 rows
    summary, merged = AbsMax(5, percentile=99.9), AbsMax(5, percentile=99.9)
    summary.update(x)
    for batch in x.split(999):
        part = AbsMax(5, percentile=99.9)
        part.update(batch)
        merged.merge(part)
    assert torch.equal(summary.value, merged.value)
    exact = x.abs().sort(0).values[9990 - 1]
    assert (summary.value >= exact).all()
    assert (summary.value <= exact * (1 + BIN)).all()
    assert (summary.value < x.abs().amax(0) / 10).all()


def test_magnitudes_beyond_the_histogram():
    summary = AbsMax(3, percentile=50.0)
    summary.update(torch.tensor([[0.0, 1e-30, 1e30], [0.0, 1e-30, 1e30]]))
    assert summary.value[0] == 0
    assert summary.value[1] <= 1.1e-6
    assert summary.value[2] == 1e30


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(make, bad):
    x = values(10)
    x[3, 2] = bad
    with pytest.raises(QuernelError, match="x holds NaN or infinity"):
        make().update(x)


@kinds
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4),), r"x must have shape \(\.\.\., 5\); got \(3, 4\)"),
        ((torch.tensor(1.0),), "x must have shape"),
        ((torch.zeros(3, 5, dtype=torch.int64),), "x must be floating point; got torch.int64"),
        ((np.zeros((3, 5)),), "x must be Tensor; got ndarray"),
        ((torch.zeros(3, 5), torch.ones(3)), r"mask must be boolean with shape \(3,\); got torch.float32"),
        ((torch.zeros(3, 5), torch.ones(2, dtype=torch.bool)), r"got torch.bool with shape \(2,\)"),
    ],
)
def test_bad_rows(make, arguments, message):
    with pytest.raises(QuernelError, match=message):
        make().update(*arguments)


@kinds
def test_merge_refuses_what_does_not_fit(make):
    with pytest.raises(QuernelError, match="other must be"):
        make().merge(object())
    other = {AbsMax: AbsMax, Moments: Moments, Gram: Gram}[type(make())](6)
    with pytest.raises(QuernelError, match="merge needs the same channels: 5 here, 6 in other"):
        make().merge(other)


def test_merge_refuses_another_percentile():
    with pytest.raises(QuernelError, match=r"the same percentile: 99\.0 here, 100\.0 in other"):
        AbsMax(5, percentile=99.0).merge(AbsMax(5))


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, math.nan, True])
def test_bad_percentile(percentile):
    with pytest.raises(QuernelError, match="percentile must be"):
        AbsMax(5, percentile=percentile)


@kinds
def test_nothing_seen(make):
    summary = make()
    with pytest.raises(QuernelError, match="seen no rows"):
        summary.mean() if isinstance(summary, Gram) else state(summary)


def test_variance_of_one_row():
    summary = Moments(5)
    summary.update(values(1))
    with pytest.raises(QuernelError, match="needs more than 1 rows"):
        summary.variance()
    assert torch.equal(summary.variance(0), torch.zeros(5, dtype=torch.float64))


def test_too_many_rows_are_refused_before_counters_overflow():
    big, one = Moments(5), Moments(5)
    big.count = 2**31 - 1
    one.update(values(1))
    with pytest.raises(QuernelError, match="at most"):
        big.merge(one)


def test_a_gram_comes_back_from_its_state():
    summary = Gram(3, compute_dtype=torch.float64)
    summary.update(torch.randn(10, 3, dtype=torch.float64))
    again = Gram.from_state(summary.state(), compute_dtype=torch.float64)
    again.update(torch.ones(1, 3))
    assert again.count == 11 and summary.count == 10
    torch.testing.assert_close(again.sum, summary.sum + 1)
    with pytest.raises(QuernelError, match=r"the sum of a Gram must be float64 of shape \(C, C\)"):
        Gram.from_state({"sum": torch.zeros(2, 3, dtype=torch.float64), "count": torch.tensor(1)})
    with pytest.raises(QuernelError, match="sum holds NaN"):
        Gram.from_state({"sum": torch.full((2, 2), torch.nan, dtype=torch.float64), "count": torch.tensor(1)})
    with pytest.raises(QuernelError, match="count must be an integer"):
        Gram.from_state({"sum": torch.zeros(2, 2, dtype=torch.float64), "count": torch.tensor(-1)})


def test_a_wide_gram_in_float64_is_whole():
    rows = torch.randn(70, 600, dtype=torch.float64)
    summary = Gram(600, compute_dtype=torch.float64)
    summary.update(rows[:30])
    summary.update(rows[30:])
    torch.testing.assert_close(summary.sum, rows.T @ rows, atol=1e-12, rtol=0)
    assert torch.equal(summary.sum, summary.sum.T)
