"""MurmurHash3 against published vectors, scikit-learn's C code and plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils import murmurhash3_32

from quernel._errors import QuernelError
from quernel.hashing import murmur3_32, murmur3_x64_128
from tests.reference import hashing as oracle

# Published test vectors (data, seed, hash); the last is the pangram with the seed of the C++ tests.
VECTORS_32 = [
    (b"", 0, 0),
    (b"", 1, 0x514E28B7),
    (b"", 0xFFFFFFFF, 0x81F16F39),
    (b"\xff\xff\xff\xff", 0, 0x76293B50),
    (b"!Ce\x87", 0, 0xF55B516B),
    (b"!Ce\x87", 0x5082EDEE, 0x2362F9DE),
    (b"!Ce", 0, 0x7E4A8634),
    (b"!C", 0, 0xA0F7B07A),
    (b"!", 0, 0x72661CF4),
    (b"\0\0\0\0", 0, 0x2362F9DE),
    (b"The quick brown fox jumps over the lazy dog", 0x9747B28C, 0x2FA826CD),
]


@pytest.mark.parametrize(("data", "seed", "expected"), VECTORS_32)
def test_published_vectors(data, seed, expected):
    assert int(murmur3_32(data, seed)) == expected


def smhasher_verification(function, width):
    """The check that the author's test suite runs on every hash function: one number for all lengths 0..255."""
    hashes = b"".join(function(bytes(range(n)), 256 - n) for n in range(256))
    assert len(hashes) == 256 * width
    return int.from_bytes(function(hashes, 0)[:4], "little")


def test_verification_values():
    assert smhasher_verification(lambda data, seed: murmur3_32(data, seed).tobytes(), 4) == 0xB0F57EE3
    assert smhasher_verification(lambda data, seed: murmur3_x64_128(data, seed).tobytes(), 16) == 0x6384BA69


@given(data=st.binary(max_size=70), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_equals_scikit_learn_and_plain_python(data, seed):
    ours = int(murmur3_32(data, seed))
    assert ours == murmurhash3_32(data, seed=seed, positive=True) == oracle.murmur3_32(data, seed)


def test_integers_hash_as_their_bytes():
    keys = np.array([[0, -1, 5], [2**31 - 1, -(2**31), 7]], dtype=np.int32)
    np.testing.assert_array_equal(
        murmur3_32(keys, 3), murmurhash3_32(keys.ravel(), seed=3, positive=True).reshape(2, 3)
    )
    assert int(murmur3_32(-5)) == murmurhash3_32(-5, positive=True)
    wide = np.array([2**40], dtype=np.int64)
    assert int(murmur3_32(wide)[0]) == int(murmur3_32(wide.tobytes()))
    # Big-endian arrays hold the same numbers.
    np.testing.assert_array_equal(murmur3_32(keys.astype(">i4"), 3), murmur3_32(keys, 3))


def test_shapes():
    assert murmur3_x64_128(np.zeros((2, 3), np.int64)).shape == (2, 3, 2)
    assert murmur3_32(np.empty(0, np.int32)).shape == (0,)
    assert murmur3_32("é") == murmur3_32("é".encode())


@pytest.mark.parametrize("keys", [1.0, np.zeros(2), None, True, [1, 2]])
def test_bad_keys(keys):
    with pytest.raises(QuernelError, match="keys must be bytes"):
        murmur3_32(keys)


def test_bad_seed_and_wide_int():
    with pytest.raises(QuernelError, match="seed must be"):
        murmur3_32(b"", -1)
    with pytest.raises(QuernelError, match="keys must be an integer"):
        murmur3_32(2**31)
