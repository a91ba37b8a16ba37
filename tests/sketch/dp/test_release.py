"""Noise, releases of vector sums, domains, and audits that find what is broken and pass what is not."""

import copy
import math
import sys

import numpy as np
import pytest
from scipy import stats

import quernel
from quernel._errors import BudgetExceeded, FormatError, MissingExtraError, PrivacyError, QuernelError
from quernel.sketch import PrivateKDE, dp
from quernel.sketch.dp import noise
from quernel.sketch.dp.domain import ROUNDING, domain_from_json
from quernel.sketch.dp.noise import NoiseSource
from quernel.testing import require_distribution, require_frequencies, require_mean

SEEDED = {"insecure_noise_seed": 0}


def rows(n=200, d=6, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("source", [NoiseSource(), NoiseSource(3)], ids=["system", "seeded"])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_discrete_noise_is_what_it_says(kind, source):
    pytest.importorskip("opendp")
    scale, n = 4.0, 3000
    added = getattr(source, f"discrete_{kind}")(np.full(n, 7, np.int64), scale) - 7
    k = np.arange(-200, 201)
    weights = np.exp(-(k**2) / (2 * scale**2)) if kind == "gaussian" else np.exp(-np.abs(k) / scale)
    require_frequencies(np.bincount(added + 200, minlength=401), weights / weights.sum())


def test_floating_point_noise_is_what_it_says():
    source, n = NoiseSource(1), 4000
    require_distribution(source.gaussian((n,), 3.0), stats.norm(scale=3.0).cdf)
    require_distribution(source.laplace((n,), 3.0), stats.laplace(scale=3.0).cdf)
    z = source.l2gamma((n, 5), 3.0)
    require_distribution(np.linalg.norm(z, axis=1), stats.gamma(5, scale=3.0).cdf)
    u = z / np.linalg.norm(z, axis=1, keepdims=True)
    require_mean(u, np.zeros(5))
    require_mean(u[:, :, None] * u[:, None], np.eye(5) / 5)
    assert abs(float(NoiseSource().gaussian((400,), 1.0).std()) - 1) < 0.25


def test_the_systems_noise_never_repeats_and_a_seed_does():
    secret = [NoiseSource().gaussian((8,), 1.0) for _ in range(2)]
    assert not np.isin(secret[0], secret[1]).any()
    seeded = [NoiseSource(5).discrete_laplace(np.zeros(8, np.int64), 9.0) for _ in range(2)]
    np.testing.assert_array_equal(*seeded)


def test_a_release_says_what_it_is_and_survives_saving(tmp_path):
    x = rows()
    release = dp.release_vector_sum(
        x, epsilon=1.0, delta=1e-6, mechanism="gaussian", count_weight=0.1, bound=2.0, **SEEDED
    )
    assert release.privacy["status"].startswith("INSECURE") and "INSECURE" in repr(release)
    assert release.privacy["neighbours"] == "add_remove" and release.privacy["n_coords"] == 7
    assert release.privacy["scale"] == pytest.approx(release.noise_std)
    expected = dp.gaussian_sigma(2 * math.hypot(1, 0.1), 1.0, 1e-6)
    assert release.noise_std == pytest.approx(expected, rel=1e-5)
    assert np.abs(release.values - x.sum(0)).max() < 6 * release.noise_std
    assert abs(release.n_rows - 200) < 6 * release.noise_std / 0.2
    np.testing.assert_allclose(release.query(x[:3]), x[:3] @ release.values)
    twin = quernel.load(release.save(tmp_path))
    assert type(twin) is dp.PublicVectorSum and twin.config() == release.config()
    np.testing.assert_array_equal(twin.values, release.values)
    np.testing.assert_array_equal(twin.mean, release.mean)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": -1.0},
        {"scale": 0.0},
        {"neighbours": "none"},
        {"mechanism": "none"},
        {"extra": 1},
        {"epsilon": 0.9},
        {"scale": 1e-9},
        {"status": "fine"},
        {"discrete": False, "status": "private"},
    ],
)
def test_a_file_that_promises_what_cannot_be_is_refused(change, tmp_path):
    release = dp.release_vector_sum(rows(), epsilon=1.0, **SEEDED)
    release.privacy.update(change)
    with pytest.raises(FormatError, match=r"config\.json"):
        quernel.load(release.save(tmp_path))


def test_a_secret_release_is_private_and_never_the_same():
    pytest.importorskip("opendp")
    x = rows()
    releases = [dp.release_vector_sum(x, epsilon=1.0, neighbours="replace") for _ in range(2)]
    assert releases[0].privacy["status"] == "private" and releases[0].n_rows == 200
    assert not np.isin(releases[0].values, releases[1].values).any()
    with pytest.raises(QuernelError, match="count_weight > 0"):
        _ = dp.release_vector_sum(x, epsilon=1.0, **SEEDED).mean


@pytest.mark.parametrize("neighbours", ["add_remove", "replace"])
def test_sensitivity_of_integer_sums(neighbours):
    draw = np.random.default_rng(0)
    for d in (1, 2, 50):
        total = dp.PrivateVectorSum(d, bound=3.0, neighbours=neighbours, **SEEDED)
        held = total.sensitivity()
        corners = np.concatenate((np.eye(d), -np.eye(d), np.ones((2, d)) / math.sqrt(d), rows(300, d))) * 3
        made = []
        for x in corners:
            one = dp.PrivateVectorSum(d, bound=3.0, neighbours=neighbours, **SEEDED).partial_fit(x[None])
            made.append(one._sums())
        q = np.array(made)
        changes = q if neighbours == "add_remove" else q - q[draw.permutation(len(q))]
        if neighbours == "replace":
            changes = np.concatenate((changes, q[:d] - q[d : 2 * d]))
        assert np.linalg.norm(changes, axis=1).max() <= held.l2 and np.abs(changes).sum(1).max() <= held.l1
        assert np.linalg.norm(changes, axis=1).max() >= 0.98 * held.l2
        if neighbours == "add_remove":
            assert np.abs(changes).sum(1).max() >= 0.98 * held.l1


def test_shards_are_the_whole_bit_for_bit():
    x = rows(1000).astype(np.float32)
    whole = dp.PrivateVectorSum(6, clip=True, **SEEDED).partial_fit(x)
    parts = [dp.PrivateVectorSum(6, clip=True, **SEEDED).update(p) for p in np.split(x, (3, 401, 900))]
    for other in parts[1:]:
        parts[0].merge(other)
    np.testing.assert_array_equal(parts[0]._sums(), whole._sums())
    np.testing.assert_array_equal(parts[0].release().values, whole.release().values)


def test_budget_is_spent_once():
    total = dp.PrivateVectorSum(6, epsilon=0.5, **SEEDED).partial_fit(rows())
    total.release()
    with pytest.raises(BudgetExceeded, match=r"PrivateVectorSum needs epsilon=0\.5"):
        total.release()
    ledger = dp.PrivacyLedger(1.2)
    total = dp.PrivateVectorSum(6, epsilon=0.5, **SEEDED).partial_fit(rows())
    total.release(ledger, label="first")
    total.release(ledger, label="second")
    with pytest.raises(BudgetExceeded, match="third"):
        total.release(ledger, label="third")
    assert [s.label for s in ledger.spendings] == ["first", "second"]


def test_private_sums_do_not_get_out():
    total = dp.PrivateVectorSum(6, **SEEDED)
    with pytest.raises(PrivacyError, match=r"release\(ledger\) gives an object that does"):
        total.query(rows())
    with pytest.raises(PrivacyError, match="copied out"):
        copy.deepcopy(total)
    assert not hasattr(total, "save")


def test_a_missing_package_costs_no_budget(monkeypatch):
    noise._opendp.cache_clear()
    monkeypatch.setitem(sys.modules, "opendp.prelude", None)
    ledger = dp.PrivacyLedger(1.0)
    with pytest.raises(MissingExtraError, match=r"quernel\[dp\]"):
        dp.PrivateVectorSum(6).partial_fit(rows()).release(ledger)
    assert ledger.spendings == ()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("domain", [dp.Ball(2.0), dp.Box(-1.0, 1.0), dp.Box([-1.0] * 3, [1.0, 2.0, 3.0])])
def test_clipped_rows_lie_within_and_others_are_kept(domain, dtype):
    x = (3 * np.random.default_rng(0).standard_normal((100, 3))).astype(dtype)
    with pytest.raises(QuernelError, match=r"X has \d+ rows outside the declared"):
        domain.applied("X", x, clip=False)
    held = domain.applied("X", x, clip=True)
    assert held.dtype == dtype and not domain.outside(held).any()
    kept = ~domain.outside(x)
    np.testing.assert_array_equal(held[kept], x[kept])
    low, high = domain.box(3)
    assert (held >= low - 1e-6).all() and (held <= high + 1e-6).all()
    assert domain_from_json(domain.to_json()) == domain


def test_nearly_unit_rows_are_shortened_not_refused():
    for long in (1e-7, 1e-6):
        x = np.array([[1.0 + long, 0.0]])
        assert np.linalg.norm(dp.Ball(1.0).applied("X", x, clip=False)) <= 1 + ROUNDING


def repeated(mechanism, contributions, broken=1.0):
    """Return a mechanism that releases one sum of contributions many times, with the library's own noise."""
    scale, source = mechanism.scale * broken, NoiseSource(11)
    made = dp.Mechanism(mechanism.kind, mechanism.sensitivity, scale, mechanism.n_coords, "add_remove")

    def run(x, n):
        return made.randomise(np.broadcast_to(contributions[x], (n, mechanism.n_coords)).copy(), source)

    return run


def canary(kind, j, delta):
    """Return zero, the largest contribution to j paired features, and the mechanism for one record more."""
    d = 2 * j
    one = np.rint(np.full(d, d**-0.5) / 2.0**-20).astype(np.int64)
    held = dp.Sensitivity.on_lattice(math.sqrt(d), 1.0, n_coords=d, grain=2.0**-20, neighbours="add_remove")
    return {0: np.zeros(d, np.int64), 1: one}, dp.calibrate(held, 1.0, delta, kind=kind)


def likelihood(sums, scale):
    return lambda out: (np.abs(out - sums[0]) - np.abs(out - sums[1])).sum(1) / scale


@pytest.mark.parametrize("trials", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_audit_of_gaussian_noise(trials):
    sums, mechanism = canary("gaussian", 2, 1e-5)
    right = dp.audit(repeated(mechanism, sums), 0, 1, trials=trials, delta=1e-5, form="mu")
    assert (0.85 if trials > 50_000 else 0.8) <= right.epsilon_lower <= 1.0
    plain = dp.audit(repeated(mechanism, sums), 0, 1, trials=trials, delta=1e-5)
    assert plain.epsilon_lower <= 1.0 and plain.mu_lower is None
    # Half the noise, and the audit sees it.
    assert dp.audit(repeated(mechanism, sums, 0.5), 0, 1, trials=trials, delta=1e-5, form="mu").epsilon_lower > 1.5


@pytest.mark.parametrize("trials", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("j", "least"), [(1, 0.8), (4, 0.6)])
def test_audit_of_laplace_noise(j, least, trials):
    sums, mechanism = canary("laplace", j, 0.0)
    statistic = likelihood(sums, mechanism.scale)
    right = dp.audit(repeated(mechanism, sums), 0, 1, trials=trials, statistic=statistic)
    assert (least if trials > 50_000 else 0.5) <= right.epsilon_lower <= 1.0
    statistic = likelihood(sums, mechanism.scale / 2)
    broken = dp.audit(repeated(mechanism, sums, 0.5), 0, 1, trials=trials, statistic=statistic)
    assert broken.epsilon_lower > 1.0


@pytest.mark.slow
def test_audit_of_a_density_with_the_systems_own_noise():
    pytest.importorskip("opendp")
    x = rows(30)
    sets = {0: x[1:], 1: x}

    def run(which, n):
        kde = PrivateKDE(n_features=2, delta=1e-5, mechanism="gaussian", count_weight=0.0).partial_fit(sets[which])
        return kde.mechanism().randomise(np.broadcast_to(kde._sums(), (n, 4)).copy(), kde._noise) * kde.grain

    outputs = {which: run(which, 100_000) for which in sets}
    at = {
        level: dp.audit(lambda which, n: outputs[which], 0, 1, delta=1e-5, form="mu", level=level).epsilon_lower
        for level in (0.95, 1 - 1e-6)
    }
    # This noise has no seed: both limits are more than five standard errors off, one false alarm in a million.
    assert at[0.95] >= 0.8 and at[1 - 1e-6] <= 1.0


@pytest.mark.parametrize("squared", [2, 5, 7, 45, 1000])
def test_exact_bounds_stay_what_they_are(squared):
    # Counts have a grain that divides them: floating point must not take a step off the square root of an integer.
    held = dp.Sensitivity.on_lattice(
        squared, math.sqrt(squared), n_coords=squared, grain=2.0**-10, neighbours="add_remove", records=0
    )
    assert held.l1 == squared * 2**10 and held.l2 == math.sqrt(squared * 2**20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dp.PrivateVectorSum(3).partial_fit(np.ones((2, 4))), r"X must hold numbers, shape \(n, 3\)"),
        (lambda: dp.PrivateVectorSum(3).partial_fit([[np.nan] * 3]), "X holds NaN"),
        (lambda: dp.PrivateVectorSum(3).partial_fit(np.ones((2, 3))), "2 rows outside the declared Ball"),
        (lambda: dp.PrivateVectorSum(3).merge(1), "other must be a PrivateVectorSum"),
        (lambda: dp.PrivateVectorSum(3).merge(dp.PrivateVectorSum(3, bound=2.0)), "bound=1.0 here and 2.0 there"),
        (lambda: dp.PrivateVectorSum(3).release(1.0), "ledger must be PrivacyLedger"),
        (lambda: dp.Ball(0.0), "radius must be"),
        (lambda: dp.Box(1.0, 1.0), "low must be below high"),
        (lambda: dp.Box([0.0, 0.0], [1.0] * 3), "equally long"),
        (lambda: dp.Box([0.0] * 2, 1.0).box(3), "has 2 coordinates, the rows have 3"),
        (lambda: dp.audit(lambda x, n: np.zeros(n), 0, 1, trials=10), "trials must be"),
        (lambda: dp.audit(lambda x, n: np.zeros(3), 0, 1, trials=1000), "1000 finite outputs"),
        (lambda: dp.audit(lambda x, n: np.zeros(n), 0, 1, trials=1000, form="mu"), "needs delta > 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()


def test_a_ledger_is_kept_as_text_and_never_twice():
    ledger = dp.PrivacyLedger(1.0)
    dp.release_vector_sum(rows(), epsilon=1.0, ledger=ledger, **SEEDED)
    for copied in (copy.copy, copy.deepcopy):
        with pytest.raises(PrivacyError, match="budget would exist twice"):
            copied(ledger)
    assert dp.PrivacyLedger.from_json(ledger.to_json()).epsilon_spent == ledger.epsilon_spent


def test_a_ledger_without_delta_says_what_gaussian_noise_needs():
    with pytest.raises(BudgetExceeded, match=r"Give the ledger a delta, e\.g\. PrivacyLedger\(5, 1e-6\)"):
        dp.release_vector_sum(
            rows(), epsilon=1.0, delta=1e-6, mechanism="gaussian", ledger=dp.PrivacyLedger(5.0), **SEEDED
        )
