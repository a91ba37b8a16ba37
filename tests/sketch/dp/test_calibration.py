"""Gaussian noise for an (epsilon, delta): the root, rounded to its safe side, and what a ledger makes of several."""

import math
import sys

import numpy as np
import pytest
from scipy.optimize import brentq

from quernel._errors import BudgetExceeded, MissingExtraError, PrivacyError, QuernelError
from quernel.sketch import dp
from quernel.sketch.dp.ledger import total_delta, total_epsilon
from tests.reference import private_kde as oracle

CASES = [(e, d) for e in (0.01, 0.1, 0.5, 1.0, 3.0, 10.0) for d in (1e-3, 1e-6, 1e-9)]


def mechanism(kind, sensitivity=1.0, scale=1.0, **other):
    return dp.Mechanism(kind, sensitivity, scale, 4, "add_remove", discrete=False, **other)


@pytest.mark.parametrize(("epsilon", "delta"), CASES)
def test_sigma_is_the_root_and_safe(epsilon, delta):
    sigma = dp.gaussian_sigma(2.0, epsilon, delta)
    root = brentq(lambda s: oracle.delta_of(s, 2.0, epsilon) / delta - 1, sigma / 2, sigma * 2, xtol=1e-14)
    assert sigma == pytest.approx(root, rel=1e-9)
    assert dp.gaussian_delta(2.0 / sigma, epsilon) <= delta
    assert dp.gaussian_delta(2.0 / (sigma * (1 - 1e-9)), epsilon) > delta


@pytest.mark.parametrize(("epsilon", "delta"), CASES)
def test_it_agrees_with_dp_accounting(epsilon, delta):
    peer = pytest.importorskip("dp_accounting.gaussian_mechanism")
    assert dp.gaussian_sigma(1.0, epsilon, delta) == pytest.approx(peer.get_sigma_gaussian(epsilon, delta), rel=1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), CASES)
def test_epsilon_and_mu_are_inverses(epsilon, delta):
    mu = dp.gaussian_mu(epsilon, delta)
    assert dp.gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-9)
    assert dp.gaussian_delta(mu, epsilon) <= delta
    back = dp.gaussian_epsilon(mu, delta)
    assert dp.gaussian_delta(mu, back) <= delta


def test_ends():
    assert dp.gaussian_delta(0.0, 1.0) == 0 and dp.gaussian_epsilon(0.0, 0.0) == 0
    assert dp.gaussian_epsilon(1.0, 0.0) == math.inf and dp.gaussian_epsilon(1e-4, 0.1) == 0
    assert 0 < dp.gaussian_delta(1e-2, 1.0) < 1e-300 or dp.gaussian_delta(1e-2, 1.0) == 0


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_a_calibrated_mechanism_keeps_its_terms(kind, discrete):
    held = dp.Sensitivity(950.0, 33.0, 30, "replace")
    made = dp.calibrate(held, 0.7, 1e-5, kind=kind, unsafe_float=not discrete)
    assert made.kind == kind and made.discrete is discrete and made.neighbours == "replace"
    assert made.epsilon(1e-5) <= 0.7 * (1 + 1e-12)
    assert dp.calibrate(held, 0.7, 0.0).kind == "laplace"
    if kind == "gaussian" and discrete:
        # The lattice costs a variance of 9 steps, which the guarantee does not count.
        assert made.scale**2 == pytest.approx(dp.gaussian_sigma(33.0, 0.7, 1e-5) ** 2 + 9, rel=1e-12)


def test_auto_takes_the_least_noise():
    few, many = dp.Sensitivity(1e3, 1e3, 1, "add_remove"), dp.Sensitivity(1e5, 1e3, 10_000, "add_remove")
    assert dp.calibrate(few, 1.0, 1e-6).kind == "laplace"
    assert dp.calibrate(many, 1.0, 1e-6).kind == "gaussian"
    assert dp.calibrate(many, 1.0, unsafe_float=True).kind == "l2gamma"


@pytest.mark.parametrize("scale", [3.5, 5.0, 40.0])
def test_the_discrete_gaussian_is_as_private_as_said(scale):
    # In one dimension all of it can be summed: P and P shifted by D2, at many epsilons.
    shift = 7
    k = np.arange(-60 * int(scale), 60 * int(scale) + 1)
    p = np.exp(-(k**2) / (2 * scale**2))
    q = np.exp(-((k - shift) ** 2) / (2 * scale**2))
    p, q = p / p.sum(), q / q.sum()
    mu = dp.Mechanism("gaussian", float(shift), scale, 1, "add_remove").mu
    for epsilon in (0.0, 0.3, 1.0, 2.0):
        exact = np.maximum(p - math.exp(epsilon) * q, 0).sum()
        assert exact <= dp.gaussian_delta(mu, epsilon) * (1 + 1e-9)


def test_ledger_composes_gaussians_exactly():
    parts = [mechanism("gaussian", 1.0, s) for s in (4.0, 7.0, 9.5)]
    mu = math.sqrt(sum(m.mu**2 for m in parts))
    ledger = dp.PrivacyLedger(5.0, 1e-6)
    for part in parts:
        ledger.spend(part)
    assert ledger.epsilon_spent == pytest.approx(dp.gaussian_epsilon(mu, 1e-6), rel=1e-12)
    assert ledger.rho_spent == pytest.approx(mu**2 / 2)
    losses = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    for pessimistic, sign in ((True, 1), (False, -1)):
        pld = losses.from_gaussian_mechanism(1 / parts[0].mu, pessimistic_estimate=pessimistic, use_connect_dots=False)
        for part in parts[1:]:
            other = losses.from_gaussian_mechanism(
                1 / part.mu, pessimistic_estimate=pessimistic, use_connect_dots=False
            )
            pld = pld.compose(other)
        # Rounded up and rounded down by dp-accounting, the total lies between.
        assert sign * (pld.get_epsilon_for_delta(1e-6) - ledger.epsilon_spent) >= 0
        assert pld.get_epsilon_for_delta(1e-6) == pytest.approx(ledger.epsilon_spent, rel=0.01)


def test_ledger_composes_different_kinds():
    losses = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    common = pytest.importorskip("dp_accounting.pld.common")
    pure = [mechanism("laplace", 0.3), mechanism("laplace", 0.2), mechanism("l2gamma", 0.25)]
    parts = [mechanism("gaussian", 1.0, 5.0), *pure]
    pld = losses.from_gaussian_mechanism(5.0)
    for epsilon in (0.3, 0.2, 0.25):
        pld = pld.compose(losses.from_privacy_parameters(common.DifferentialPrivacyParameters(epsilon, 0.0)))
    peer = pld.get_epsilon_for_delta(1e-5)
    assert 0.99 * peer <= total_epsilon(parts, 1e-5) <= 1.0001 * peer
    assert total_delta(parts, total_epsilon(parts, 1e-5)) <= 1e-5 * (1 + 1e-6)
    # Better than adding up, which is all that there is at delta = 0.
    assert total_epsilon(parts, 1e-5) < 0.75 + dp.gaussian_epsilon(0.2, 1e-5)
    assert total_epsilon(pure, 0.0) == pytest.approx(0.75, rel=1e-12)


def test_thirds_of_a_budget_fit_and_a_fourth_does_not():
    ledger = dp.PrivacyLedger(0.3)
    for _ in range(3):
        ledger.spend(mechanism("laplace", 0.1), "a third")
    assert len(ledger.spendings) == 3 and ledger.spendings[0].label == "a third"
    with pytest.raises(BudgetExceeded, match=r"a fourth needs epsilon=0.1 .*0.3 is spent on 3 releases"):
        ledger.spend(mechanism("laplace", 0.1), "a fourth")
    assert len(ledger.spendings) == 3 and "3 releases" in repr(ledger)
    with pytest.raises(BudgetExceeded):
        dp.PrivacyLedger(5.0).spend(mechanism("gaussian", 1.0, 100.0))


def test_a_ledger_survives_json():
    ledger = dp.PrivacyLedger(2.0, 1e-6, neighbours="add_remove").spend(mechanism("gaussian", 1.0, 3.0), "one")
    twin = dp.PrivacyLedger.from_json(ledger.to_json())
    assert twin.to_json() == ledger.to_json() and twin.epsilon_spent == ledger.epsilon_spent > 0


def test_relations_do_not_mix():
    with pytest.raises(PrivacyError, match="for neighbours='add_remove', the ledger for 'replace'"):
        dp.PrivacyLedger(1.0, neighbours="replace").spend(mechanism("laplace", 0.1))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld.privacy_loss_distribution", None)
    with pytest.raises(MissingExtraError, match="dp-accounting"):
        total_epsilon([mechanism("gaussian", 1.0, 5.0), mechanism("laplace", 0.3)], 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dp.PrivacyLedger(0.0), "epsilon must be"),
        (lambda: dp.PrivacyLedger(1.0, 1.0), "delta must be"),
        (lambda: dp.PrivacyLedger(1.0, neighbours="swap"), "neighbours must be one of"),
        (lambda: dp.PrivacyLedger(1.0).spend(1.0), "mechanism must be Mechanism"),
        (lambda: dp.gaussian_sigma(1.0, -1.0, 1e-6), "epsilon must be"),
        (lambda: dp.gaussian_sigma(1.0, 1.0, 0.0), "delta must be"),
        (lambda: dp.gaussian_sigma(0.0, 1.0, 1e-6), "sensitivity must be"),
        (lambda: dp.calibrate(dp.Sensitivity(1.0, 1.0, 1, "replace"), 1.0, kind="gaussian"), "needs delta > 0"),
        (lambda: dp.calibrate(dp.Sensitivity(1.0, 1.0, 1, "replace"), 1.0, kind="l2gamma"), "unsafe_float=True"),
        (lambda: dp.Mechanism("l2gamma", 1.0, 1.0, 1, "replace"), "no lattice form"),
        (lambda: dp.Mechanism("gaussian", 1.0, 2.0, 1, "replace"), "wider than 3 steps"),
        (lambda: dp.PrivacyTerms(delta=0.0, mechanism="gaussian"), "needs delta > 0"),
        (lambda: dp.PrivacyTerms(mechanism="l2gamma"), "unsafe_float=True"),
        (lambda: dp.PrivacyTerms(insecure_noise_seed=-1), "insecure_noise_seed must be"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
