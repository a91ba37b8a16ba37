"""Samplers: the law of the process against enumeration, unbiasedness, marginals, conditioning, boosting, numerics."""

import warnings

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel.kernels import (
    EmpiricalSpace,
    IllConditionedDesignWarning,
    LegendreSpace,
    ProjectionDPP,
    TrigonometricSpace,
    VolumeSampler,
    WeightedLeastSquares,
)
from quernel.kernels._dpp_kernels import _warmup, extend
from quernel.kernels.volume_sampling import boosted
from quernel.testing import require_distribution, require_frequencies, require_mean, require_same_distribution
from tests.reference import volume_sampling as slow

METHODS = ("volume", "dpp_repeat", "iid")


def heavy_rows(n=200, m=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_t(2.5, (n, m)), rng


def small_population():
    return EmpiricalSpace(heavy_rows(8, 3, seed=1)[0])


def orthonormal(space):
    return space.phi(np.arange(space.n_rows)) / np.sqrt(space.n_rows)


def require_determinantal(space, draws, alpha):
    """Subsets have probability det K_S; leverage and pairs follow; no row comes twice."""
    q = orthonormal(space)
    process, rng = ProjectionDPP(space), np.random.default_rng(5)
    drawn = np.sort([process.sample(rng) for _ in range(draws)], axis=1)
    assert (np.diff(drawn, axis=1) > 0).all()
    subsets, probabilities = slow.subset_probabilities(q)
    codes = {s: i for i, s in enumerate(subsets)}
    counts = np.bincount([codes[tuple(s)] for s in drawn.tolist()], minlength=len(subsets))
    require_frequencies(counts, probabilities / probabilities.sum(), alpha=alpha)
    assert abs(probabilities.sum() - 1) < 1e-9
    held = np.zeros((draws, len(q)))
    np.put_along_axis(held, drawn, 1, axis=1)
    require_mean(held, space.leverage, alpha=alpha)
    kernel = q @ q.T
    i, j = np.triu_indices(len(q), 1)
    pairs = space.leverage[i] * space.leverage[j] - kernel[i, j] ** 2
    require_mean(held[:, i] * held[:, j], pairs, alpha=alpha)


def test_the_process_has_its_law():
    require_determinantal(small_population(), 8000, alpha=1e-6)


@pytest.mark.slow
def test_the_process_has_its_law_over_many_draws():
    require_determinantal(small_population(), 200_000, alpha=1e-3)


def test_the_process_is_the_textbook_s_on_a_larger_population():
    space = EmpiricalSpace(heavy_rows(60, 6)[0])
    q, rng = orthonormal(space), np.random.default_rng(2)
    ours = np.sort([ProjectionDPP(space).sample(rng) for _ in range(400)], axis=1)
    textbook = np.sort([slow.sequential_dpp(q, rng) for _ in range(400)], axis=1)
    require_same_distribution(q[ours].reshape(400, -1), q[textbook].reshape(400, -1), permutations=1999)


def test_points_of_a_continuous_process_have_the_determinant_as_their_density():
    # Two functions 1 and 3^0.5 x: density 3 (x - y)^2/8 on the square, so |x - y| = d has 3 d^2 (2 - d)/4.
    space, rng = LegendreSpace(1), np.random.default_rng(0)
    gaps = [float(abs(np.diff(ProjectionDPP(space).sample(rng), axis=0)[0, 0])) for _ in range(3000)]
    require_distribution(gaps, lambda d: d**3 / 2 - 3 * d**4 / 16)


def test_the_chain_rule_takes_m_harmonic_proposals():
    space, m = EmpiricalSpace(heavy_rows(300, 8)[0]), 8
    rng = np.random.default_rng(1)
    used = []
    for _ in range(1500):
        chosen = np.zeros(m, np.int64)
        rows = space.phi(space.sample_nu(400, rng))
        assert extend(rows, rng.random(400), np.zeros((m, m)), 0, chosen) == m
        used.append(chosen[-1] + 1)
    require_mean(used, m * sum(1 / k for k in range(1, m + 1)))


@pytest.mark.parametrize("method", METHODS)
def test_every_point_has_marginal_nu(method):
    space, rng = LegendreSpace(4), np.random.default_rng(3)
    sampler = VolumeSampler(space, method, n=13)
    # One point a design: those of one design depend on each other. The third, so that order matters.
    points = [sampler.sample(rng).points[3, 0] for _ in range(1500)]
    require_distribution(points, slow.legendre_marginal(space))


def coefficients(space, sampler, y, draws, rng):
    fit = WeightedLeastSquares(space)
    return np.array([fit.fit(d, y[d.indices]).coef_ for d in (sampler.sample(rng) for _ in range(draws))])


def z_scores(samples, wanted):
    return np.abs(samples.mean(0) - wanted) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


def hard_problem():
    a, rng = heavy_rows(seed=3)
    y = np.abs(a[:, 0]) ** 1.5 + a[:, 1] * a[:, 2] + rng.standard_t(3, len(a))
    space = EmpiricalSpace(a)
    return space, y, orthonormal(space).T @ y / np.sqrt(len(y))


def test_volume_sampling_is_unbiased():
    space, y, wanted = hard_problem()
    sampler = VolumeSampler(space, "volume", n=10)
    assert sampler.unbiased_ and sampler.sample(0).unbiased
    require_mean(coefficients(space, sampler, y, 2500, np.random.default_rng(0)), wanted)


@pytest.mark.slow
def test_volume_sampling_is_unbiased_and_repetition_is_not():
    space, y, wanted = hard_problem()
    samples = {
        method: coefficients(space, VolumeSampler(space, method, n=10), y, 20_000, np.random.default_rng(1))
        for method in ("volume", "dpp_repeat")
    }
    assert z_scores(samples["volume"], wanted).max() < 4
    assert z_scores(samples["dpp_repeat"], wanted).max() > 6


def test_what_is_biased_says_so():
    space = EmpiricalSpace(heavy_rows()[0])
    assert not VolumeSampler(space, "dpp_repeat", n=10).unbiased_
    assert not VolumeSampler(space, "iid", n=10).unbiased_
    assert not VolumeSampler(space, "volume", n=40, delta=0.9).unbiased_
    assert VolumeSampler(space, "dpp_repeat", n=5).unbiased_  # one process is volume sampling of m points
    design = VolumeSampler(space, "dpp_repeat", n=20).sample(0)
    assert not WeightedLeastSquares(space).fit(design, np.ones(20)).unbiased_


def test_another_reference_measure_is_unbiased_with_its_own_weights():
    space, y, wanted = hard_problem()
    p = np.linspace(1, 3, 200) / 400

    class Ramp:
        def sample(self, n, random_state=None):
            return random_state.choice(200, n, p=p)

        def weight(self, points):
            return 1 / (200 * p[points])

    for reference in ("mu", Ramp()):
        sampler = VolumeSampler(space, "volume", n=15, reference=reference)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IllConditionedDesignWarning)
            require_mean(coefficients(space, sampler, y, 1500, np.random.default_rng(7)), wanted)


def test_a_penalty_is_unbiased_too():
    a, rng = heavy_rows(60, 4)
    y = rng.standard_normal(60)
    space = EmpiricalSpace(a, ridge=20.0)
    sampler, fit = VolumeSampler(space, n=8), WeightedLeastSquares(space)
    found = []
    for _ in range(2500):
        design = sampler.sample(rng)
        found.append(space.feature_coefficients(fit.fit(design, design.spread(y[design.rows])).coef_))
    require_mean(found, np.linalg.solve(a.T @ a + 20 * np.eye(4), a.T @ y))


def inverse_grams(space, sampler, draws, rng):
    out = []
    for _ in range(draws):
        design = sampler.sample(rng)
        rows = space.phi(design.points) * np.sqrt(design.weights / len(design))[:, None]
        out.append(np.linalg.inv(rows.T @ rows))
    return np.array(out)


def test_the_inverse_gram_matrix_has_its_exact_mean():
    space = LegendreSpace(4)
    found = inverse_grams(space, VolumeSampler(space, n=10), 2500, np.random.default_rng(0))
    require_mean(found, 10 / 6 * np.eye(5))


def test_a_small_population_falls_short_of_that_mean_as_enumeration_says():
    rng = np.random.default_rng(4)
    # Two rows in one direction: tuples of it alone have no rank.
    a = rng.standard_normal((7, 2))
    a[1] = -2 * a[0]
    space = EmpiricalSpace(a)
    tuples, probabilities, grams = slow.volume_tuples(orthonormal(space), 3)
    possible = probabilities > 1e-12
    wanted = np.einsum("t,tij->ij", probabilities[possible], np.linalg.inv(grams[possible]))
    assert np.trace(wanted) < 3 - 0.05 and len(tuples) == 7**3
    sampler = VolumeSampler(space, n=3)
    require_mean(inverse_grams(space, sampler, 3000, rng), wanted)


def test_tuples_of_a_small_population_have_the_rescaled_law():
    space, rng = EmpiricalSpace(heavy_rows(5, 2)[0]), np.random.default_rng(6)
    tuples, probabilities, _ = slow.volume_tuples(orthonormal(space), 3)
    sampler = VolumeSampler(space, n=3)
    codes = [int(sampler.sample(rng).indices @ [25, 5, 1]) for _ in range(4000)]
    assert (tuples @ [25, 5, 1] == np.arange(125)).all()
    require_frequencies(np.bincount(codes, minlength=125), probabilities)


@pytest.mark.parametrize(
    "space", [LegendreSpace(7), LegendreSpace(3, 2), TrigonometricSpace(4), EmpiricalSpace(heavy_rows()[0])], ids=repr
)
@pytest.mark.parametrize("method", METHODS)
def test_functions_of_the_space_come_back(space, method):
    rng = np.random.default_rng(0)
    c = rng.standard_normal(space.n_features)
    for n in (space.n_features, 3 * space.n_features):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IllConditionedDesignWarning)
            design = VolumeSampler(space, method, n=n).sample(rng)
            fit = WeightedLeastSquares(space).fit(design, space.phi(design.points) @ c)
        if design.gram_min > 1e-8:
            np.testing.assert_allclose(fit.coef_, c, atol=1e-10 * np.abs(c).max())


def test_conditioning_holds_surely_and_says_when_it_cannot():
    space, rng = LegendreSpace(9), np.random.default_rng(0)
    for method, n, delta in (("dpp_repeat", 40, 0.5), ("volume", 60, 0.6), ("iid", 90, 0.7)):
        designs = [VolumeSampler(space, method, n=n, delta=delta).sample(rng) for _ in range(5)]
        assert min(d.gram_min for d in designs) >= 1 - delta
        assert all(d.tries >= 1 for d in designs)
    with pytest.raises(QuernelError, match="none of 20 designs of n=10 points"):
        VolumeSampler(space, n=10, delta=0.5, max_tries=20).sample(rng)


def test_boosting_removes_what_matters_least_and_stays_stable():
    space, rng = LegendreSpace(5), np.random.default_rng(1)
    whole = VolumeSampler(space, "volume", n=60, delta=0.7).sample(rng)
    small = VolumeSampler(space, "volume", n=60, delta=0.7, boost=True).sample(rng)
    assert small.gram_min >= 0.3 and 6 <= len(small) < 30 and not small.unbiased
    phi = space.phi(whole.points)
    kept = boosted(phi, whole.weights, 0.3)
    # One step of the greedy removal, by brute force.
    least = [slow.least_without(phi, whole.weights, i) for i in range(60)]
    first = boosted(phi, whole.weights, max(least) * (1 - 1e-9))
    assert int(np.argmax(least)) not in first
    rest = np.array([slow.least_without(phi[kept], whole.weights[kept], i) for i in range(len(kept))])
    assert len(kept) == 6 or rest.max() < 0.3 * (1 + 1e-9)


def test_remaining_norms_sum_to_what_is_left_even_of_bad_features():
    t = np.linspace(0.8, 1.2, 400)
    space = EmpiricalSpace(np.column_stack((np.vander(t, 12), np.vander(t, 3))))
    m, q = space.n_features, orthonormal(space)
    points, basis = ProjectionDPP(space)._chain(np.random.default_rng(0))
    np.testing.assert_allclose(basis @ basis.T, np.eye(m), atol=1e-12)
    for j in range(m + 1):
        left = (q**2).sum(1) - ((q @ basis[:j].T) ** 2).sum(1)
        assert abs(left.sum() - (m - j)) < 1e-9
        assert left.min() > -1e-12
        np.testing.assert_allclose(left[points[:j]], 0, atol=1e-10)


def test_dependent_functions_do_not_go_on_for_ever():
    class Twice(LegendreSpace):
        def phi(self, x):
            values = super().phi(x)
            values[:, -1] = values[:, 0]
            return values

    with pytest.raises(QuernelError, match="linearly dependent"):
        ProjectionDPP(Twice(3)).sample(0)


def test_a_seed_decides_the_design():
    sampler = VolumeSampler(LegendreSpace(6, 2), "dpp_repeat")
    one, same, other = (sampler.sample(seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.points, same.points)
    assert not np.array_equal(one.points, other.points)
    _warmup()


def test_independent_points_that_are_too_few_are_warned_about_before_any_label():
    space = LegendreSpace(9)
    with pytest.warns(IllConditionedDesignWarning, match="7 points for 10 functions"):
        design = VolumeSampler(space, "iid", n=7).sample(0)
    assert design.gram_min == 0
    with pytest.warns(IllConditionedDesignWarning):
        WeightedLeastSquares(space).fit(design, np.ones(7))
    unlucky = EmpiricalSpace(np.concatenate((np.eye(6), np.eye(6))))
    sampler = VolumeSampler(unlucky, "iid", n=7)
    with pytest.warns(IllConditionedDesignWarning, match="unseen"):
        assert [sampler.sample(seed).gram_min for seed in range(20)].count(0) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VolumeSampler(unlucky, "volume", n=7).sample(0)


def test_bad_arguments_are_named():
    space = LegendreSpace(4)
    for make, message in (
        (lambda: VolumeSampler(space, n=4), "n must be at least the number of functions, 5"),
        (lambda: VolumeSampler(space, "dpp_repeat", n=3), "n must be at least"),
        (lambda: VolumeSampler(space, "greedy"), "method must be one of"),
        (lambda: VolumeSampler(space, delta=1.0), "delta must be"),
        (lambda: VolumeSampler(space, boost=True), "boost=True needs delta="),
        (lambda: VolumeSampler(space, max_tries=0), "max_tries must be"),
        (lambda: VolumeSampler(space, reference="rho"), "reference must be one of"),
        (lambda: VolumeSampler(space, reference=3), "have sample and weight"),
        (lambda: VolumeSampler(space, "dpp_repeat", reference="mu"), "reference must be 'nu'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
