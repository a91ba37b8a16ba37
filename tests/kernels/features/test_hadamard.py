"""Walsh-Hadamard transforms and structured projections against matrices written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel._errors import QuernelError
from quernel.kernels.features import hadamard_directions, hadamard_projection, walsh_hadamard
from tests.reference.snnk import hadamard, structured_rows

EXACT = 1e-12  # float64 sums of at most a few hundred terms of size one
SINGLE = 1e-5  # the same in float32, relative to the square root of the size


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 128, 256])
def test_equals_the_matrix(size):
    x = np.random.default_rng(size).standard_normal((3, 2, size))
    np.testing.assert_allclose(walsh_hadamard(x), x @ hadamard(size), atol=EXACT * size)


@pytest.mark.parametrize("size", [4096, 8192])
def test_three_factors_equal_the_definition_on_unit_vectors(size):
    places = np.array([0, 1, 77, size - 1])
    x = np.zeros((len(places), size))
    x[np.arange(len(places)), places] = 1
    shared = places[:, None] & np.arange(size)
    parity = np.array([[bin(v).count("1") for v in row] for row in shared.tolist()])
    np.testing.assert_array_equal(walsh_hadamard(x), (-1.0) ** parity)


@given(st.integers(0, 7), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_normalized_transform_is_orthogonal_and_its_own_inverse(bits, seed):
    x = np.random.default_rng(seed).standard_normal((2, 1 << bits))
    y = walsh_hadamard(x, normalized=True)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-12)
    np.testing.assert_allclose(walsh_hadamard(y, normalized=True), x, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_input_is_two_real_ones(dtype):
    x = torch.randn(3, 32, dtype=dtype)
    y = walsh_hadamard(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y, torch.complex(walsh_hadamard(x.real.clone()), walsh_hadamard(x.imag.clone())))
    torch.testing.assert_close(walsh_hadamard(x.conj()), y.conj())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kind_and_dtype_are_kept(dtype):
    x = torch.randn(2, 64).to(dtype)
    y = walsh_hadamard(x)
    assert y.dtype is dtype
    wanted = torch.from_numpy(x.double().numpy() @ hadamard(64)).to(dtype)
    torch.testing.assert_close(y, wanted, rtol=2 * torch.finfo(dtype).eps, atol=SINGLE * 8)


def test_rows_may_be_strided_and_absent():
    x = torch.randn(64, 5, dtype=torch.float64).T
    torch.testing.assert_close(walsh_hadamard(x), walsh_hadamard(x.contiguous()))
    assert walsh_hadamard(torch.zeros(0, 8)).shape == (0, 8)
    assert hadamard_projection(np.zeros((0, 3)), *_arrays(hadamard_directions(5, 3, 0))).shape == (0, 5)


def _arrays(rows):
    return rows.signs, rows.lengths


@pytest.mark.parametrize(("n", "dim"), [(1, 1), (3, 1), (5, 2), (4, 3), (40, 13), (16, 16)])
def test_projection_equals_the_rows_it_stands_for(n, dim):
    rows = hadamard_directions(n, dim, seed=n)
    x = np.random.default_rng(dim).standard_normal((4, dim))
    wanted = x @ structured_rows(rows.signs, rows.lengths)[:, :dim].T
    np.testing.assert_allclose(hadamard_projection(x, rows.signs, rows.lengths), wanted, atol=1e-12)


def test_rows_are_orthogonal_in_blocks_and_as_long_as_drawn():
    rows = hadamard_directions(40, 16, seed=1)
    g = structured_rows(rows.signs, rows.lengths)
    products = g @ g.T
    np.testing.assert_allclose(np.diagonal(products), rows.lengths**2)
    inside = np.arange(40)[:, None] // 16 == np.arange(40) // 16
    np.testing.assert_allclose(products[inside & ~np.eye(40, dtype=bool)], 0, atol=1e-11)


def test_projection_has_gradients():
    rows = hadamard_directions(6, 3, seed=0)
    arrays = [torch.from_numpy(a) for a in _arrays(rows)]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: hadamard_projection(x, *arrays), (x,))


def test_the_seed_decides_alone():
    one, two, other = (hadamard_directions(9, 5, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.signs, two.signs)
    np.testing.assert_array_equal(one.lengths, two.lengths)
    assert not np.array_equal(one.lengths, other.lengths)


def test_bad_input_is_named():
    with pytest.raises(QuernelError, match=r"power of two; got shape \(3, 6\)"):
        walsh_hadamard(torch.zeros(3, 6))
    with pytest.raises(QuernelError, match=r"floating point; got torch\.int64"):
        walsh_hadamard(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(QuernelError, match="power of two"):
        walsh_hadamard(torch.tensor(1.0))
    rows = hadamard_directions(6, 3, seed=0)
    with pytest.raises(QuernelError, match="pads to 4"):
        hadamard_projection(np.zeros((2, 5)), rows.signs, rows.lengths)
    with pytest.raises(QuernelError, match="dim must be an integer in"):
        hadamard_directions(6, 0, seed=0)
