"""Closed forms of permutation learning against the kernel code, at every number of ones."""

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel.kernels import NTKernel, ntk_dynamics
from quernel.kernels.ntk import permutation_moments

SAME = 1e-12


def inputs(k):
    """Return one normalised input for each number of ones, its bits in other places every time."""
    rows = np.tril(np.ones((k, k)))
    draw = np.random.default_rng(k)
    return np.stack([draw.permutation(row) for row in rows])


@pytest.mark.parametrize("parametrization", ["ntk", "standard"])
@pytest.mark.parametrize("k", [2, 5, 12, 50])
def test_closed_forms_are_the_kernel_code(k, parametrization):
    bits, places = inputs(k), np.random.default_rng(1).permutation(k)
    targets = np.eye(k)[places]
    unit = bits / np.linalg.norm(bits, axis=1, keepdims=True)
    made = ntk_dynamics(NTKernel(parametrization=parametrization), np.eye(k), targets, unit)
    moments = permutation_moments(k, parametrization=parametrization)
    wanted = np.where(bits @ targets == 1, moments.mean_on[:, None], moments.mean_off[:, None])
    np.testing.assert_allclose(made.mean, wanted, atol=SAME)
    np.testing.assert_allclose(made.cov.diagonal(), moments.variance, atol=SAME)


@pytest.mark.parametrize("sigma_w", [0.5, 2.0])
def test_the_scale_of_weights_changes_the_variance_only(sigma_w):
    bits = inputs(6)
    unit = bits / np.linalg.norm(bits, axis=1, keepdims=True)
    made = ntk_dynamics(NTKernel(sigma_w=sigma_w), np.eye(6), np.eye(6), unit)
    moments = permutation_moments(6)
    np.testing.assert_allclose(
        made.mean, np.where(bits, moments.mean_on[:, None], moments.mean_off[:, None]), atol=SAME
    )
    np.testing.assert_allclose(made.cov.diagonal(), sigma_w**4 * moments.variance, atol=SAME)


@pytest.mark.parametrize(
    ("parametrization", "k", "on", "off", "variance"),
    [
        ("ntk", 5, 0.5606, -0.01464, 0.01323),
        ("ntk", 10, 0.5654, -0.00985, 0.00652),
        ("ntk", 20, 0.5693, -0.00595, 0.00322),
        ("ntk", 30, 0.5710, -0.00427, 0.00214),
        ("standard", 5, None, -0.0395, 0.0129),
        ("standard", 10, None, -0.0233, 0.0063),
        ("standard", 20, None, -0.0127, 0.0031),
        ("standard", 30, None, -0.0088, 0.0020),
    ],
)
def test_two_ones(parametrization, k, on, off, variance):
    moments = permutation_moments(k, 2, parametrization=parametrization)
    assert on is None or float(moments.mean_on) == pytest.approx(on, abs=6e-5)
    assert float(moments.mean_off) == pytest.approx(off, abs=6e-5)
    assert float(moments.variance) == pytest.approx(variance, abs=6e-5)


@pytest.mark.parametrize("k", [2, 3, 10, 1000])
def test_signs_tell_the_bits_apart_and_training_vectors_are_exact(k):
    moments = permutation_moments(k)
    assert (moments.mean_on > 0).all() and (moments.mean_off[1:] < 0).all()
    assert (moments.mean_on[0], moments.mean_off[0], moments.variance[0]) == (1, 0, 0)
    assert (moments.variance[1:] > 0).all()


def test_the_midpoint_keeps_its_distance_where_the_sign_loses_it():
    for k in (5, 30, 100, 300):
        moments = permutation_moments(k, np.arange(2, k))
        assert ((moments.mean_on - moments.mean_off) / 2 / np.sqrt(moments.variance)).min() >= 0.547
        two = permutation_moments(k, 2)
        assert -two.mean_off / np.sqrt(two.variance) < 0.65 / np.sqrt(k)


def test_bad_numbers_are_refused():
    with pytest.raises(QuernelError, match="k must be an integer"):
        permutation_moments(1)
    for ones in (0, 6, 2.0, [], [1, 7]):
        with pytest.raises(QuernelError, match=r"ones must be integers in \[1, 5\]"):
            permutation_moments(5, ones)
    with pytest.raises(QuernelError, match="parametrization must be one of"):
        permutation_moments(5, parametrization="mup")
