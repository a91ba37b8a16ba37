"""ModPrime: equality with plain integers, given constants, collision bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from quernel._errors import QuernelError
from quernel.hashing import ModPrime, universal
from tests.reference import hashing as oracle

P61 = 2**61 - 1
ROBE_PRIME = 2038074743  # of the published embedding code


@given(a=st.integers(0, P61 - 1), b=st.integers(0, P61 - 1))
@settings(max_examples=300, deadline=None)
def test_mersenne_product(a, b):
    assert int(universal.multiply_mod_mersenne(np.uint64(a), np.uint64(b))) == a * b % P61


@given(x=st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_mersenne_remainder(x):
    assert int(universal.mod_mersenne(np.uint64(x))) == x % P61


def test_mersenne_extremes():
    for x in (0, 1, P61 - 1, P61, P61 + 1, 2**62, 2**64 - 1):
        assert int(universal.mod_mersenne(np.uint64(x))) == x % P61
    top = np.uint64(P61 - 1)
    assert int(universal.multiply_mod_mersenne(top, top)) == (P61 - 1) ** 2 % P61


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 10**9),
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
)
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("prime", [P61, ROBE_PRIME])
def test_equals_plain_integers(prime, seed, n, keys):
    h = ModPrime.draw(seed, n, n_keys=len(keys), prime=prime)
    assert int(h(*keys)) == oracle.mod_prime(h.a, h.b, prime, n, keys)


def test_arrays_equal_scalars_and_the_jitted_form():
    h = ModPrime.draw(3, 1000)
    keys = np.arange(-50, 50)

    @njit
    def jitted(x, a, b, n):
        out = np.empty(x.size, np.uint64)
        for i in range(x.size):
            reduced = universal.mod_mersenne(np.uint64(x[i]))
            out[i] = universal.mod_mersenne(universal.multiply_mod_mersenne(a, reduced) + b) % n
        return out

    slots = h(keys)
    assert slots.tolist() == [int(h(int(key))) for key in keys]
    np.testing.assert_array_equal(slots, jitted(keys, np.uint64(h.a[0]), np.uint64(h.b), np.uint64(h.n)))


def test_collisions_stay_below_the_bound():
    # Universality is over the draw: 4000 functions, one pair. The mean is <= 4000 / 20 = 200; 280 has a
    # probability below 1e-7 (binomial).
    collisions = 0
    for seed in range(4000):
        slots = ModPrime.draw(seed, 20)(np.array([17, 10**12]))
        collisions += int(slots[0] == slots[1])
    assert collisions < 280


def test_config_round_trip():
    h = ModPrime.draw(1, 7, n_keys=2)
    assert ModPrime.from_config(h.config()) == h
    assert ModPrime.draw(1, 7, n_keys=2) == h != ModPrime.draw(2, 7, n_keys=2)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"a": (0,), "b": 0, "n": 5}, "a must be"),
        ({"a": (), "b": 0, "n": 5}, "one factor a key"),
        ({"a": (1,), "b": P61, "n": 5}, "b must be"),
        ({"a": (1,), "b": 0, "n": 0}, "n must be"),
        ({"a": (1,), "b": 0, "n": 102, "prime": 101}, "n must be"),
        ({"a": (1,), "b": 0, "n": 5, "prime": 2**40 + 15}, "prime must be"),
    ],
)
def test_bad_constants(settings_, message):
    with pytest.raises(QuernelError, match=message):
        ModPrime(**settings_)


def test_wrong_number_of_keys():
    with pytest.raises(QuernelError, match="hashes 2 keys; got 1"):
        ModPrime.draw(0, 5, n_keys=2)(1)
