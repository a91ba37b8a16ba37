"""The compiled transforms: exact on integers, equal to matrix products, the same on every path and thread count."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import linalg

from quernel._timing import threads
from quernel.kernels.features import hadamard, hadamard_directions
from quernel.kernels.features._hadamard_kernels import project_rows, transform_complex_rows, transform_rows

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
SINGLE = 3e-6  # float32 sums of up to 2,048 terms, relative to their square root


def arguments(n=5, dim=100, m=300, dtype=torch.float32):
    rows = hadamard_directions(m, dim, seed=1)
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x, torch.from_numpy(rows.signs).to(dtype), torch.from_numpy(rows.lengths).to(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_integers_are_transformed_exactly(size):
    x = np.random.default_rng(size).integers(-50, 50, (3, size))
    out = np.full((3, size), np.nan, np.float32)
    transform_rows(x.astype(np.float32), out, 0, 3)
    np.testing.assert_array_equal(out, x @ linalg.hadamard(size))


def test_only_the_range_is_written():
    x = np.ones((4, 16), np.float32)
    out = np.full((4, 16), np.nan, np.float32)
    transform_rows(x, out, 1, 3)
    assert np.isnan(out[[0, 3]]).all() and np.isfinite(out[1:3]).all()
    _, signs, scale = arguments(dim=16, m=20)
    out = np.full((4, 20), np.nan, np.float32)
    project_rows(x, signs.numpy(), scale.numpy(), out, 1, 3)
    assert np.isnan(out[[0, 3]]).all() and np.isfinite(out[1:3]).all()


@pytest.mark.parametrize(("dim", "m"), [(1, 1), (1, 5), (3, 4), (13, 40), (16, 16), (100, 300), (1000, 700)])
def test_projection_equals_the_plain_path(dim, m):
    x, signs, scale = arguments(dim=dim, m=m)
    wanted = hadamard._project_plain(x.double(), signs.double(), scale.double())
    got = hadamard._project_cpu(x, signs, scale)
    bound = SINGLE * float(wanted.abs().max())
    torch.testing.assert_close(got.double(), wanted, rtol=SINGLE, atol=bound)


def test_nan_and_infinity_pass_through():
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    y = hadamard.walsh_hadamard(x)
    assert y[0].isnan().all() and y[1].isinf().all()


def test_strided_rows_and_threads_give_the_same_bits():
    x, signs, scale = arguments(n=200)
    wanted = hadamard._project_cpu(x, signs, scale)
    for count in (1, 2):
        with threads(count):
            assert torch.equal(hadamard._project_cpu(x, signs, scale), wanted)
    wide = torch.stack([x, x], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(hadamard._project_cpu(wide, signs, scale), wanted)
    assert torch.equal(hadamard.walsh_hadamard(x[:, :64]), hadamard.walsh_hadamard(x[:, :64].contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ops_are_well_formed(dtype):
    x, signs, scale = arguments(dim=6, m=11, dtype=dtype)
    x.requires_grad_()
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(hadamard._project_op, (x, signs, scale), test_utils=utils)
    torch.library.opcheck(hadamard._transform_op, (x[:, :4].detach().requires_grad_(),), test_utils=utils)


def test_gradients_of_both_paths_agree():
    grads = []
    for dtype in (torch.float32, torch.float64):
        x, signs, scale = arguments(dtype=torch.float32)
        x = x.to(dtype).requires_grad_()
        hadamard.hadamard_projection(x, signs, scale).square().sum().backward()
        grads.append(x.grad.double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4 * float(grads[1].abs().max()))


SCRIPT = """
from tests.kernels.features.test_hadamard_kernels import digest
print(digest())
"""


def digest():
    """Return what all kernels gave, as one number."""
    x, signs, scale = arguments()
    both = torch.complex(x[:, :64], x[:, 32:96])
    made = hadamard._project_cpu(x, signs, scale), hadamard.walsh_hadamard(x[:, :64]), hadamard.walsh_hadamard(both)
    return hashlib.sha256(b"".join(one.numpy().tobytes() for one in made)).hexdigest()


@pytest.mark.slow
def test_the_portable_path_gives_the_same_bits(repository):
    wanted = digest()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "QUERNEL_PORTABLE": "1"},
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [wanted]


@pytest.mark.parametrize("size", SIZES)
def test_complex_rows_have_the_bits_of_two_real_ones(size):
    draw = torch.Generator().manual_seed(size)
    x = torch.randn(40, size, dtype=torch.complex64, generator=draw)
    got = hadamard.walsh_hadamard(x)
    assert torch.equal(got.real, hadamard.walsh_hadamard(x.real.contiguous()))
    assert torch.equal(got.imag, hadamard.walsh_hadamard(x.imag.contiguous()))
    for count in (1, 2):
        with threads(count):
            assert torch.equal(hadamard.walsh_hadamard(x), got)


def test_only_the_range_of_complex_rows_is_written():
    out = np.full((4, 32), np.nan, np.float32)
    transform_complex_rows(np.ones((4, 32), np.float32), out, 1, 3)
    assert np.isnan(out[[0, 3]]).all() and np.isfinite(out[1:3]).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_the_op_is_well_formed_on_complex_rows(dtype):
    x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(hadamard._transform_op, (x,), test_utils=utils)
    if dtype is torch.complex128:
        assert torch.autograd.gradcheck(hadamard.walsh_hadamard, (x,))
        matrix = torch.from_numpy(linalg.hadamard(8)).to(dtype)
        torch.testing.assert_close(hadamard.walsh_hadamard(x), x @ matrix, rtol=1e-13, atol=1e-13)
