"""EnsemblePlan: the sum of tails by loops, simulated ensembles, how plans grow, the logged counts, refusals."""

import functools
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from quernel._errors import QuernelError
from quernel.kernels import EnsemblePlan, NTKernel, ntk_dynamics
from quernel.kernels.ntk import permutation_moments
from quernel.kernels.ntk.plan import thresholds
from tests.reference import ntk_permutations as reference

# Ensembles that the authors needed for 90 % of 1,000 random inputs with two ones.
LOGGED = {10: 69, 20: 117, 30: 175}


def moment_functions(k, rounding):
    """Return means and variance as functions of the number of ones, and the threshold."""
    moments = permutation_moments(k)
    cuts = thresholds(moments.mean_on, moments.mean_off, rounding)
    parts = [moments.mean_on, moments.mean_off, moments.variance, cuts]
    on, off, variance, cut = ((lambda m, part=part: float(part[m - 1])) for part in parts)
    return (on, off, variance), cut


@pytest.mark.parametrize("rounding", ["sign", "midpoint"])
@pytest.mark.parametrize("k", [3, 8, 20])
def test_the_plan_is_the_least_number_that_keeps_the_sum_below_delta(k, rounding):
    delta, last = 0.02, k if rounding == "sign" else k - 1
    moments, cut = moment_functions(k, rounding)

    def every(n):
        return reference.errors_of_all(k, n, last, moments, cut)

    def worst(n):
        return max(reference.errors_of_one(k, n, m, moments, cut) for m in range(2, last + 1))

    for scope, errors in (("all", every), ("input", worst)):
        plan = EnsemblePlan(k, delta, scope, rounding)
        assert errors(plan.n_models) <= delta < errors(plan.n_models - 1)
        assert math.exp(plan.log_failure(plan.n_models)) == pytest.approx(errors(plan.n_models), rel=1e-9)


@pytest.mark.parametrize("scope", ["input", "all"])
def test_the_union_bound_is_the_papers_formula(scope):
    k, delta = 10, 0.01
    moments = permutation_moments(k, 2)
    g, v = -float(moments.mean_off), float(moments.variance)
    events = math.log(k / delta) + (k * math.log(2) if scope == "all" else 0)
    plan = EnsemblePlan(k, delta, scope, "sign", bound="union")
    assert plan.n_models == math.ceil(2 * v / g**2 * events)
    assert plan.n_models > EnsemblePlan(k, delta, scope, "sign").n_models


def failures(k, n_models, rounding, trials, seed):
    """Return in how many simulated ensembles some input of 2^k - 1 comes out wrong.

    Members are draws from the joint distribution over all inputs; outputs of one network are independent.
    """
    bits = reference.all_inputs(k)
    unit = bits / np.linalg.norm(bits, axis=1, keepdims=True)
    made = ntk_dynamics(NTKernel(), np.eye(k), np.eye(k), unit)
    values, vectors = np.linalg.eigh(made.cov / n_models)
    root = vectors * np.sqrt(np.maximum(values, 0))
    ones = bits.sum(1)
    moments = permutation_moments(k, ones)
    cuts = thresholds(moments.mean_on, moments.mean_off, rounding)
    judged = ones > 1 if rounding == "sign" else (ones > 1) & (ones < k)
    draw = np.random.default_rng(seed)
    wrong = np.zeros(trials, bool)
    for j in range(k):
        outputs = made.mean[:, j, None] + root @ draw.standard_normal((len(bits), trials))
        wrong |= (((outputs > cuts[:, None]) != bits[:, j, None]) & judged[:, None]).any(0)
    return int(wrong.sum())


@pytest.mark.parametrize(
    ("k", "trials"),
    [(5, 2000), pytest.param(8, 2000, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("rounding", ["sign", "midpoint"])
def test_planned_ensembles_hold_and_a_quarter_of_them_fails(k, trials, rounding):
    delta = 0.01
    n = EnsemblePlan(k, delta, rounding=rounding).n_models
    held = failures(k, n, rounding, trials, seed=k)
    assert binomtest(held, trials, delta, alternative="greater").pvalue > 1e-6
    quarter = failures(k, max(1, n // 4), rounding, trials, seed=k)
    assert binomtest(quarter, trials, delta, alternative="greater").pvalue < 1e-6


@functools.cache
def exponent(scope, rounding, bound="exact", ks=(8, 16, 32, 64, 128, 256)):
    counts = [EnsemblePlan(k, 0.01, scope, rounding, bound).n_models for k in ks]
    return float(np.polyfit(np.log(ks), np.log(counts), 1)[0])


@pytest.mark.parametrize(
    ("scope", "rounding", "bound", "measured"),
    [
        ("all", "sign", "exact", 0.97),
        ("input", "sign", "exact", 0.89),
        ("all", "midpoint", "exact", 1.06),
        ("input", "midpoint", "exact", 0.43),
        ("all", "sign", "union", 1.52),
    ],
)
def test_how_plans_grow(scope, rounding, bound, measured):
    assert exponent(scope, rounding, bound) == pytest.approx(measured, abs=0.05)


def test_how_plans_grow_further_out():
    far = (256, 512, 1024)
    assert 1.04 <= exponent("all", "sign", ks=far) <= 1.18
    assert 1.04 <= exponent("input", "sign", ks=far) <= 1.18
    # A logarithm has no power: its exponent falls. The union bound's tends to 2.
    assert exponent("input", "midpoint", ks=far) < 0.3
    assert exponent("all", "sign", "union", ks=far) > 1.8


@pytest.mark.parametrize(
    ("k", "one", "every"), [(5, 76, 90), (10, 47, 52), (20, 44, 42), (100, 105, 39), (300, 261, 42)]
)
def test_the_midpoint_needs_fewer_models(k, one, every):
    for scope, measured in (("input", one), ("all", every)):
        ratio = EnsemblePlan(k, 0.01, scope, "sign").n_models / EnsemblePlan(k, 0.01, scope).n_models
        assert ratio == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("k", "planned"), [(10, 59), (20, 123), (30, 192)])
def test_the_standard_parametrisation_gives_the_logged_counts(k, planned):
    plan = EnsemblePlan(k, 0.1, "input", "sign", parametrization="standard", ones=2)
    assert plan.n_models == pytest.approx(planned, abs=1)
    assert 1 / 1.6 <= plan.n_models / LOGGED[k] <= 1.6
    tangent = EnsemblePlan(k, 0.1, "input", "sign", ones=2).n_models
    assert tangent > 1.6 * LOGGED[k]


def test_ten_thousand_bits_can_be_planned_for():
    assert EnsemblePlan(10_000).n_models > EnsemblePlan(1_000).n_models
    assert EnsemblePlan(10_000, scope="input").n_models < 2 * EnsemblePlan(1_000, scope="input").n_models


def test_where_nothing_is_left_to_plan_one_model_does():
    assert EnsemblePlan(2).n_models == 1 and EnsemblePlan(2).log_failure(1) == -math.inf
    assert EnsemblePlan(5, ones=5).n_models == 1
    assert EnsemblePlan(2, rounding="sign").n_models >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "k must be an integer in"),
        ({"delta": 0.0}, "delta must be a finite number in"),
        ({"delta": 1.0}, "delta must be"),
        ({"delta": math.nan}, "delta must be"),
        ({"scope": "some"}, "scope must be one of"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"bound": "loose"}, "bound must be one of"),
        ({"parametrization": "mup"}, "parametrization must be one of"),
        ({"ones": 1}, "ones must be an integer in"),
        ({"ones": 6}, "ones must be an integer in"),
    ],
)
def test_bad_plans_are_refused(options, message):
    with pytest.raises(QuernelError, match=message):
        EnsemblePlan(**{"k": 5, **options})
    with pytest.raises(QuernelError, match="n_models must be"):
        EnsemblePlan(5).log_failure(0)
