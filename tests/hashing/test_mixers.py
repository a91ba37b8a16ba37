"""mix64, fastrange and signs: bit equality with plain integers, uniformity, avalanche, independence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing import fastrange, mix64, mixers, sign_bit
from tests.reference import hashing as oracle

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed
U64 = st.integers(0, 2**64 - 1)


@given(seed=U64, keys=st.lists(U64, max_size=4))
@settings(max_examples=200, deadline=None)
def test_mix64_equals_plain_integers(seed, keys):
    assert int(mix64(seed, *keys)) == oracle.mix64(seed, *keys)


def test_the_first_finaliser_matches_splitmix64():
    # The published generator with state 0 starts with this number; a state of 0 is mix64's seed 0.
    assert int(mix64(0)) == 0xE220A8397B1DCDAF


@njit
def jitted_mix(seed, a, b, out):
    for i in range(a.size):
        out[i] = mixers.mix64_step(mixers.mix64_step(mixers.mix64_seed(seed), a[i]), b[i])


@njit
def jitted_ranges(h, n, out):
    for i in range(h.size):
        out[i, 0] = mixers.fastrange_u64(h[i], n)
        out[i, 1] = mixers.fastrange_small(h[i], n)


@njit
def jitted_signs(h, out):
    for i in range(h.size):
        out[i] = mixers.sign_f32(h[i])


def test_jitted_forms_are_bit_equal():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**64, (2, 257), dtype=np.uint64)
    out = np.empty_like(a)
    jitted_mix(np.uint64(9), a, b, out)
    np.testing.assert_array_equal(out, mix64(9, a, b))
    assert out.tolist() == [oracle.mix64(9, x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    signs = np.empty(257, np.float32)
    jitted_signs(a, signs)
    np.testing.assert_array_equal(signs, sign_bit(a))


@given(
    h=U64, n=st.one_of(st.integers(1, 100), st.integers(1, 2**64 - 1), st.sampled_from([2**32 - 1, 2**32, 2**32 + 1]))
)
@settings(max_examples=300, deadline=None)
def test_fastrange_is_the_exact_product(h, n):
    assert int(fastrange(np.uint64(h), n)) == oracle.fastrange(h, n) < n


@pytest.mark.parametrize("n", [1, 2, 1000, 2**31 + 11, 2**32])
def test_both_ranges_agree(n):
    h = np.random.default_rng(1).integers(0, 2**64, 100, dtype=np.uint64)
    h[:2] = 0, 2**64 - 1
    out = np.empty((100, 2), np.uint64)
    jitted_ranges(h, np.uint64(n), out)
    expected = [oracle.fastrange(x, n) for x in h.tolist()]
    assert out[:, 0].tolist() == out[:, 1].tolist() == expected


def test_arrays_broadcast_and_negative_numbers_wrap():
    grid = mix64(3, np.arange(-2, 3)[:, None], np.arange(4, dtype=np.int32))
    assert grid.shape == (5, 4)
    assert int(grid[0, 1]) == oracle.mix64(3, 2**64 - 2, 1) == int(mix64(3, -2, 1))


def test_empty_arrays_stay_empty():
    assert mix64(0, np.empty(0, np.int64)).shape == (0,)


def test_order_of_keys_matters():
    a = np.arange(1000)
    assert not (mix64(0, a, a + 1) == mix64(0, a + 1, a)).any()


def chi_square_p(counts):
    return stats.chisquare(counts).pvalue


@pytest.mark.parametrize("stride", [1, 2, 64, 4096, 2**32])
def test_strided_keys_fill_slots_evenly(stride):
    # 100 000 keys over 1000 slots, the arithmetic progressions that ids come in.
    slots = fastrange(mix64(1, np.arange(100_000) * stride), 1000)
    assert chi_square_p(np.bincount(slots.astype(np.int64), minlength=1000)) > FALSE_ALARM


def test_each_bit_is_fair():
    h = mix64(5, np.arange(40_000))
    ones = [int(((h >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
    p = [stats.binomtest(count, 40_000).pvalue for count in ones]
    assert min(p) > FALSE_ALARM / 64


def test_neighbouring_seeds_are_independent():
    keys = np.arange(64_000)
    pairs = fastrange(mix64(0, keys), 8) * np.uint64(8) + fastrange(mix64(1, keys), 8)
    assert chi_square_p(np.bincount(pairs.astype(np.int64), minlength=64)) > FALSE_ALARM


def test_slots_and_signs_are_independent():
    h = mix64(2, np.arange(64_000))
    cells = fastrange(h, 32).astype(np.int64) * 2 + (sign_bit(h) > 0)
    assert chi_square_p(np.bincount(cells, minlength=64)) > FALSE_ALARM


@pytest.mark.parametrize("which", ["seed", "first key", "last key"])
def test_avalanche(which):
    # Flipping any input bit flips each output bit half of the time: 64 x 64 binomials of 2000 trials.
    rng = np.random.default_rng(3)
    trials = 2000
    position = ["seed", "first key", "last key"].index(which)
    arguments = rng.integers(0, 2**64, (3, trials), dtype=np.uint64)
    before = hash_all(arguments)
    shifts = np.arange(64, dtype=np.uint64)
    extreme = stats.binom.isf(FALSE_ALARM / 64 / 64 / 2, trials, 0.5)
    for bit in range(64):
        changed = arguments.copy()
        changed[position] ^= np.uint64(1 << bit)
        flips = (((before ^ hash_all(changed))[:, None] >> shifts) & np.uint64(1)).sum(0)
        assert abs(flips.astype(int) - trials // 2).max() <= extreme - trials // 2


def hash_all(arguments):
    # The seed is the first key absorbed, so an array of seeds is hashed as keys.
    return mixers.mix64_step.py_func(
        mixers.mix64_step.py_func(mixers.mix64_seed.py_func(arguments[0]), arguments[1]), arguments[2]
    )


@pytest.mark.parametrize("value", [1.5, np.zeros(2), True, np.array([True]), "a", 2**64, None])
def test_bad_keys(value):
    with pytest.raises(QuernelError, match=r"keys\[0\] must"):
        mix64(0, value)


@pytest.mark.parametrize("n", [0, -1, 2**64, 2.0])
def test_bad_range(n):
    with pytest.raises(QuernelError, match="n must be an integer"):
        fastrange(np.uint64(1), n)
