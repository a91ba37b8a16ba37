"""Training dynamics: the start, the end, single steps, time by a differential equation, covariances by simulation."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from quernel._errors import QuernelError
from quernel.kernels import NTKernel, ntk_dynamics
from quernel.kernels.ntk.dynamics import ensemble_variance, training_gain
from quernel.testing import require_mean
from tests.reference import ntk_permutations as reference

KERNEL = NTKernel(2, sigma_w=1.4, sigma_b=0.3)
EXACT = 1e-10


def task(n=6, m=4, q=2, seed=0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, 3)), draw.standard_normal((n, q)), draw.standard_normal((m, 3))


def test_before_training_there_is_the_prior():
    x, y, z = task()
    for options in ({"t": 0.0}, {"steps": 0}):
        start = ntk_dynamics(KERNEL, x, y, z, **options)
        np.testing.assert_allclose(start.mean, 0, atol=EXACT)
        np.testing.assert_allclose(start.cov, KERNEL.nngp(z), rtol=EXACT)


def test_after_training_the_training_rows_are_known():
    x, y, _ = task()
    for options in ({}, {"t": 1e6}, {"steps": 200_000, "lr": 0.1}):
        end = ntk_dynamics(KERNEL, x, y, x.copy(), **options)
        np.testing.assert_allclose(end.mean, y, atol=EXACT)
        np.testing.assert_allclose(end.cov, 0, atol=EXACT)


def test_the_end_is_kernel_regression():
    x, y, z = task()
    theta, cross = KERNEL.ntk(x), KERNEL.ntk(z, x)
    a = cross @ np.linalg.inv(theta)
    both = KERNEL.nngp(np.concatenate((z, x)))
    joint = np.concatenate((np.eye(len(z)), -a), axis=1)  # what is left of a member: f(z) - A f(x)
    end = ntk_dynamics(KERNEL, x, y, z)
    np.testing.assert_allclose(end.mean, a @ y, rtol=1e-9)
    np.testing.assert_allclose(end.cov, joint @ both @ joint.T, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(end.mean[:, 0], ntk_dynamics(KERNEL, x, y[:, 0], z).mean, rtol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("t", [0.1, 3.0])
def test_time_is_gradient_flow(t, ridge):
    x, y, z = task()
    theta, cross = KERNEL.ntk(x), KERNEL.ntk(z, x)
    decay = theta + ridge * np.eye(len(x))
    a = cross @ np.linalg.solve(decay, np.eye(len(x)) - expm(-0.7 * t * decay))
    np.testing.assert_allclose(ntk_dynamics(KERNEL, x, y, z, t=t, lr=0.7, ridge=ridge).mean, a @ y, rtol=1e-8)
    end = ntk_dynamics(KERNEL, x, y, z, t=1e7, ridge=ridge)
    np.testing.assert_allclose(ntk_dynamics(KERNEL, x, y, z, ridge=ridge).mean, end.mean, rtol=1e-8)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("share", [0.05, 0.9])
def test_steps_are_gradient_descent(share, ridge):
    # share of the largest stable rate: at 0.9 the errors change their sign with every step.
    x, y, z = task()
    theta = KERNEL.ntk(x)
    lr = share * 2 / (np.linalg.eigvalsh(theta)[-1] + ridge)
    for steps in (1, 2, 17):
        wanted = reference.descent(theta, KERNEL.ntk(z, x), y, lr, steps, ridge)
        got = ntk_dynamics(KERNEL, x, y, z, lr=lr, steps=steps, ridge=ridge).mean
        np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-12)


def test_small_steps_are_time():
    x, y, z = task()
    flow = ntk_dynamics(KERNEL, x, y, z, t=2.0)
    descent = ntk_dynamics(KERNEL, x, y, z, lr=2e-5, steps=100_000)
    np.testing.assert_allclose(descent.mean, flow.mean, rtol=1e-4)
    np.testing.assert_allclose(descent.cov, flow.cov, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("t", [0.5, math.inf])
def test_covariances_are_those_of_members(t):
    # A member of the linearised ensemble: f(z) + A (y - f(x)), with outputs f before training from the prior.
    x, y, z = task(q=1)
    joint = KERNEL.nngp(np.concatenate((z, x)))
    a = KERNEL.ntk(z, x) @ training_gain(torch.from_numpy(KERNEL.ntk(x)), t=t).numpy()
    start = np.random.default_rng(1).multivariate_normal(np.zeros(len(joint)), joint, 20_000)
    members = start[:, : len(z)] + (y[:, 0] - start[:, len(z) :]) @ a.T
    made = ntk_dynamics(KERNEL, x, y[:, 0], z, t=t)
    require_mean(members, made.mean)
    centred = members - made.mean
    require_mean(centred[:, :, None] * centred[:, None, :], made.cov)


def test_variances_are_the_diagonal():
    x, y, z = task()
    cross = KERNEL.both(z, x)
    a = torch.from_numpy(cross.ntk) @ training_gain(torch.from_numpy(KERNEL.ntk(x)))
    parts = (KERNEL.nngp(x), cross.nngp, KERNEL.nngp_diag(z))
    got = ensemble_variance(a, *map(torch.from_numpy, parts))
    np.testing.assert_allclose(got, ntk_dynamics(KERNEL, x, y, z).cov.diagonal(), rtol=1e-9)


def test_a_direction_that_rows_do_not_reach_does_not_grow():
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # two equal rows: a singular kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gain = training_gain(torch.from_numpy(NTKernel().ntk(x)), t=1e9)
    y = torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.float64)
    fitted = torch.from_numpy(NTKernel().ntk(x)) @ gain @ y
    np.testing.assert_allclose(fitted[:, 0], [2, 2, 5], atol=1e-5)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_kind_and_precision_are_those_of_the_rows_to_predict(make):
    x, y, z = (make(part.astype(np.float32)) for part in task())
    made = ntk_dynamics(KERNEL, x, y, z)
    assert type(made.mean) is type(z) and made.mean.dtype == z.dtype and made.cov.dtype == z.dtype


def test_bad_input_is_refused():
    x, y, z = task()
    largest = np.linalg.eigvalsh(KERNEL.ntk(x))[-1]
    with pytest.raises(QuernelError, match=r"lr=.* diverges: it must be below 2 /"):
        ntk_dynamics(KERNEL, x, y, z, lr=2.01 / largest, steps=5)
    ntk_dynamics(KERNEL, x, y, z, lr=1.99 / largest, steps=5)
    for options, message in (
        ({"t": -1.0}, "t must be a number >= 0, or infinity"),
        ({"t": math.nan}, "t must be"),
        ({"t": -math.inf}, "t must be"),
        ({"lr": 0.0}, "lr must be"),
        ({"steps": -1}, "steps must be an integer"),
        ({"steps": 5, "t": 1.0}, "not both"),
        ({"ridge": -1.0}, "ridge must be"),
    ):
        with pytest.raises(QuernelError, match=message):
            ntk_dynamics(KERNEL, x, y, z, **options)
    for bad in ((x, y[:3], z), (x, y[:, :, None], z), (x[0], y, z), (x, y, z[0])):
        with pytest.raises(QuernelError, match="X, Y and Z must have shapes"):
            ntk_dynamics(KERNEL, *bad)
    with pytest.raises(QuernelError, match="X and Y must have shapes"):
        ntk_dynamics(KERNEL, x, y, z[:, :2])
    with pytest.raises(QuernelError, match="kernel must be NTKernel"):
        ntk_dynamics("relu", x, y, z)
    with pytest.raises(QuernelError, match="Y holds NaN"):
        ntk_dynamics(KERNEL, x, np.full_like(y, np.nan), z)
