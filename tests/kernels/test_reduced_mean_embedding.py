"""ReducedMeanEmbedding: gradient, descent, weights, metric facts, herding, privacy, refusals."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from quernel import load
from quernel._errors import FormatError, QuernelError
from quernel.kernels import RandomFourierFeatures, ReducedMeanEmbedding, WeightedRKME, encoder_fingerprint
from quernel.kernels import _mean_targets as targets
from quernel.kernels._mean_targets import CosineTarget, GaussianTarget, alternate, best_weights, mean_target
from quernel.sketch import dp
from tests.reference import rkme_model_search as oracle

GAMMA = 0.3


def rows(n=120, d=3, seed=0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)) + 3 * draw.integers(0, 2, (n, 1))


def made(z, beta, gamma=GAMMA, cls=ReducedMeanEmbedding, **options):
    """Return a specification of these points and weights, as if it had been fitted."""
    spec = cls(len(z), gamma=gamma, **options)
    spec.z_, spec.beta_, spec.gamma_ = np.asarray(z, np.float64), np.asarray(beta, np.float64), gamma
    spec.error_, spec.history_, spec.n_rows_, spec.n_features_in_ = 0.0, np.zeros(1), len(z), z.shape[1]
    spec.epsilon_ = spec.delta_ = None
    return spec


def some_spec(m, d, draw, gamma=GAMMA):
    return made(draw.standard_normal((m, d)), draw.dirichlet(np.ones(m)), gamma)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_gradient_is_that_of_the_error(dtype):
    draw = np.random.default_rng(1)
    x, z, beta = rows().astype(dtype), draw.standard_normal((7, 3)) + 1, draw.dirichlet(np.ones(7))
    target = GaussianTarget(x, GAMMA)
    value, slope = target.gradient(target.inside(z), torch.from_numpy(beta))
    # dE/dz from that by the point in the target's units, sqrt(2 gamma) z.
    slope = slope.numpy() * np.sqrt(2 * GAMMA)
    tolerance = 1e-10 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(slope, oracle.gradient(beta, z, x.astype(float), GAMMA), atol=tolerance)
    np.testing.assert_allclose(oracle.written_gradient(beta, z, x.astype(float), GAMMA), slope, atol=tolerance)
    assert value + target.constant() == pytest.approx(oracle.error(beta, z, x, GAMMA), abs=tolerance)


def test_the_gradient_of_the_cosine():
    draw = np.random.default_rng(2)
    x, z, beta = rows() + 1, draw.standard_normal((5, 3)), draw.dirichlet(np.ones(5))
    target = CosineTarget(x)
    value, slope = target.gradient(target.inside(z), torch.from_numpy(beta))
    # At unit length: the gradient falls with the length.
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(slope.numpy(), oracle.cosine_gradient(beta, unit, x), atol=1e-10)
    others = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert value + target.constant() == pytest.approx(((beta @ unit - others.mean(0)) ** 2).sum(), abs=1e-12)


def test_half_the_repulsion_is_another_gradient():
    draw = np.random.default_rng(3)
    x, z, beta = rows(), draw.standard_normal((5, 3)), draw.dirichlet(np.ones(5))
    wrong = oracle.half_repelled_gradient(beta, z, x, GAMMA)
    assert np.abs(wrong - oracle.gradient(beta, z, x, GAMMA)).max() > 1e-2 * np.abs(wrong).max()


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
@pytest.mark.parametrize("simplex", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_error_never_rises(kernel, simplex, dtype):
    x = (rows(300) + 1).astype(dtype)
    spec = ReducedMeanEmbedding(12, kernel=kernel, gamma=GAMMA, simplex=simplex, rounds=8, random_state=0).fit(x)
    assert (np.diff(spec.history_) <= 0).all() and spec.z_.dtype == dtype
    assert spec.error_ == max(0.0, spec.history_[-1])
    if kernel == "gaussian":
        assert spec.error_ == pytest.approx(oracle.error(spec.beta, spec.z, x.astype(float), GAMMA), abs=2e-7)
        assert spec.error_ < 0.5 * spec.history_[0] and len(spec.history_) > 3
    if simplex:
        assert (spec.beta >= 0).all() and abs(spec.beta.sum() - 1) < 1e-9


def test_all_rows_as_points_reach_zero():
    x = rows(40)
    spec = ReducedMeanEmbedding(40, gamma=GAMMA, rounds=2, random_state=0).fit(x)
    assert spec.error_ < 1e-12
    # Each row is a point.
    assert np.abs(spec.z[:, None] - x[None]).sum(-1).min(0).max() < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_weights_solve_the_problem_on_the_simplex(seed):
    x, z = rows(200, seed=seed), rows(15, seed=seed + 10)
    k, c = oracle.gram(z, z, GAMMA), oracle.gram(z, x, GAMMA).mean(1)
    b = best_weights(torch.from_numpy(k), torch.from_numpy(c), None, simplex=True).numpy()
    assert (b >= 0).all() and abs(b.sum() - 1) < 1e-9
    # KKT: the slope is the same where b > 0, and not smaller elsewhere.
    slope = 2 * (k @ b - c)
    level = b @ slope
    assert np.abs(slope[b > 0] - level).max() < 1e-7 and (slope >= level - 1e-7).all()
    solved = minimize(
        lambda b: b @ k @ b - 2 * b @ c, np.full(15, 1 / 15), jac=lambda b: 2 * (k @ b - c), method="SLSQP",
        bounds=[(0, 1)] * 15, constraints={"type": "eq", "fun": lambda b: b.sum() - 1}, options={"ftol": 1e-14},
    )  # fmt: skip
    assert b @ k @ b - 2 * b @ c <= solved.fun + 1e-9
    assert b @ k @ b - 2 * b @ c == pytest.approx(solved.fun, abs=1e-6)


def test_a_step_of_the_weights_that_gains_nothing_is_not_taken():
    # The ridge of free weights moves them a little off the optimum that the descent begins with.
    x = rows(30)
    target = mean_target(x, "gaussian", GAMMA)
    _, beta, history = alternate(
        target, target.rows.clone(), torch.full((30,), 1 / 30, dtype=torch.float64), rounds=1, simplex=False,
        constant=target.constant(),
    )  # fmt: skip
    assert history == sorted(history, reverse=True) and abs(history[-1]) < 1e-12
    np.testing.assert_allclose(beta, 1 / 30)


def test_metric_facts():
    draw = np.random.default_rng(0)
    for _ in range(1000):
        a, b, c = (some_spec(draw.integers(1, 5), 2, draw) for _ in range(3))
        ab, bc, ac = (np.sqrt(one.mmd2(other)) for one, other in ((a, b), (b, c), (a, c)))
        assert min(ab, bc, ac) >= 0 and ac <= ab + bc + 1e-7
        assert ab == pytest.approx(np.sqrt(b.mmd2(a)), abs=1e-7)
    assert a.mmd2(a) == 0 or a.mmd2(a) < 1e-15


def test_order_and_splitting_change_nothing():
    draw = np.random.default_rng(1)
    a, b = some_spec(6, 3, draw), some_spec(4, 3, draw)
    order = draw.permutation(6)
    turned = made(a.z[order], a.beta[order])
    half = a.beta.copy()
    half[0] /= 2
    split = made(np.concatenate((a.z, a.z[:1])), np.append(half, half[0]))
    for same in (turned, split):
        assert same.mmd2(b) == pytest.approx(a.mmd2(b), abs=1e-12) and same.mmd2(a) < 1e-12
        np.testing.assert_allclose(same.score_samples(b.z), a.score_samples(b.z), atol=1e-12)


def test_distance_between_specifications_is_that_of_the_samples():
    x, y = rows(60), rows(50, seed=5) + 0.5
    full = [made(part, np.full(len(part), 1 / len(part))) for part in (x, y)]
    truth = oracle.mmd2(x, y, GAMMA, unbiased=False)
    assert full[0].mmd2(full[1]) == pytest.approx(truth, abs=1e-12)
    reduced = [ReducedMeanEmbedding(15, gamma=GAMMA, random_state=0).fit(part) for part in (x, y)]
    assert np.sqrt(reduced[0].mmd2(reduced[1])) == pytest.approx(
        np.sqrt(truth), abs=sum(np.sqrt(spec.error_) for spec in reduced)
    )


def test_score_samples_is_the_mean_embedding():
    x = rows(200)
    spec = ReducedMeanEmbedding(30, gamma=GAMMA, random_state=0).fit(x)
    np.testing.assert_allclose(spec.score_samples(x[:9]), oracle.gram(x[:9], spec.z, GAMMA) @ spec.beta, atol=1e-12)
    # No value is further off than the distance in the space of the kernel.
    off = np.abs(spec.score_samples(x) - oracle.gram(x, x, GAMMA).mean(1))
    assert off.max() <= np.sqrt(spec.error_)


def test_herding_is_greedy_and_converges_fast():
    draw = np.random.default_rng(0)
    centers = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    x = centers[draw.integers(0, 3, 2000)] + 0.7 * draw.standard_normal((2000, 2))
    spec = ReducedMeanEmbedding(60, gamma=0.5, rounds=5, random_state=0).fit(x)
    np.testing.assert_allclose(spec.herd(8, x[:50]), oracle.herd(spec.beta, spec.z, x[:50], 8, 0.5), atol=1e-12)
    chosen = spec.herd(200, x)
    sizes = np.unique(np.geomspace(5, 200, 12).astype(int))
    errors = [np.sqrt(made(chosen[:t], np.full(t, 1 / t), 0.5).mmd2(spec)) for t in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert slope < -0.7
    assert np.isin(spec.herd(5)[:, 0], spec.z[:, 0]).all()


def released(x, features, noise, seed=0):
    draw = np.random.default_rng(seed)
    return features.transform(x).mean(0) + noise * draw.standard_normal(features.n_features)


PURE = {"epsilon": 2.0, "delta": 0.0, "neighbours": "replace", "status": "private"}


def test_a_real_release_goes_through_with_its_terms():
    x, public = rows(2000), rows(200, seed=9)
    features = RandomFourierFeatures(64, gamma=GAMMA, random_state=0).fit(x[:1])
    ledger = dp.PrivacyLedger(4.0, 1e-6)
    release = dp.release_vector_sum(features.transform(x), epsilon=4.0, delta=1e-6, count_weight=0.1, ledger=ledger)
    spec = ReducedMeanEmbedding.from_mean_features(release.mean, features, public, privacy=release.privacy, n_points=20)
    assert spec.privacy == {"epsilon": 4.0, "delta": 1e-6, "neighbours": "add_remove"}
    # The noise of the mean has a length of about 8 x 1.2 / 2000.
    assert np.sqrt(spec.mmd2(made(x[:400], np.full(400, 1 / 400)))) < 0.15
    options = {"epsilon": 4.0, "delta": 1e-6, "count_weight": 0.1, "insecure_noise_seed": 0}
    insecure = dp.release_vector_sum(features.transform(x), **options)
    with pytest.raises(QuernelError, match="its status is 'INSECURE"):
        ReducedMeanEmbedding.from_mean_features(insecure.mean, features, public, privacy=insecure.privacy)


def test_a_released_mean_makes_a_specification():
    x, public = rows(2000), rows(500, seed=9)
    features = RandomFourierFeatures(400, gamma=GAMMA, random_state=0).fit(x[:1])
    terms = {"epsilon": 1.0, "delta": 1e-6, "neighbours": "add_remove"}
    privacy = terms | {"mechanism": "gaussian", "status": "private"}
    spec, noisy = (
        ReducedMeanEmbedding.from_mean_features(
            released(x, features, noise), features, public, privacy=privacy, n_points=30, encoder="e"
        )
        for noise in (0.0, 0.2)
    )
    truth = made(x[:400], np.full(400, 1 / 400), encoder="e")
    assert np.sqrt(spec.mmd2(truth)) < 0.08
    # What noise does to it is seen: the points answer to the released mean, not to the rows.
    assert spec.mmd2(truth) < noisy.mmd2(truth)
    assert spec.privacy == terms and spec.error_ is None and spec.n_rows_ == 0
    assert (spec.z[:, None] == public[None]).all(-1).any(1).all()
    assert ReducedMeanEmbedding(5, random_state=0).fit(x[:50]).privacy is None


def test_a_private_specification_is_saved(tmp_path):
    features = RandomFourierFeatures(64, gamma=GAMMA, random_state=0).fit(rows()[:1])
    spec = WeightedRKME.from_mean_features(
        released(rows(), features, 0.0), features, rows(80, seed=3), privacy=PURE, n_points=6
    )
    twin = load(spec.save(tmp_path))
    assert (
        twin.privacy == {"epsilon": 2.0, "delta": 0.0, "neighbours": "replace"}
        and twin.mmd2(spec) == 0
        and twin.u is None
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"privacy": {}}, "privacy must say epsilon, delta, neighbours and status"),
        ({"privacy": PURE | {"epsilon": 0.0}}, "epsilon"),
        ({"privacy": PURE | {"delta": 1.0}}, "delta"),
        ({"privacy": PURE | {"neighbours": "all"}}, "neighbours"),
        ({"privacy": PURE | {"status": "INSECURE: seeded"}}, "its status is 'INSECURE: seeded'"),
        ({"feature_map": RandomFourierFeatures(64).fit(np.eye(2))}, "feature_map must have a number as gamma"),
        ({"mean": np.zeros(3)}, "mean must have shape"),
        ({"mean": np.full(64, np.nan)}, "mean holds NaN"),
        ({"feature_map": "rff"}, "feature_map must be RandomFourierFeatures"),
    ],
)
def test_errors_of_releases(change, message):
    features = RandomFourierFeatures(64, gamma=GAMMA, random_state=0).fit(rows()[:1])
    options = {"mean": np.zeros(64), "feature_map": features, "candidates": rows(20), "privacy": PURE}
    with pytest.raises(QuernelError, match=message):
        ReducedMeanEmbedding.from_mean_features(**(options | change))


def test_nothing_square_in_the_rows_is_held(monkeypatch):
    sizes = []
    whole = targets.gaussian_kernel

    def watched(x, y):
        sizes.append(len(x) * len(y))
        return whole(x, y)

    monkeypatch.setattr(targets, "gaussian_kernel", watched)
    ReducedMeanEmbedding(5, gamma=GAMMA, rounds=1, random_state=0).fit(rows(3000))
    assert max(sizes) <= max(targets._BLOCK, targets._PAIRS**2)


def test_without_the_constant_the_points_are_the_same():
    x = rows()
    spec, bare = (
        ReducedMeanEmbedding(8, gamma=GAMMA, rounds=2, measure_error=measured, random_state=0).fit(x)
        for measured in (True, False)
    )
    np.testing.assert_allclose(bare.z, spec.z, atol=1e-9)
    assert bare.error_ is None
    np.testing.assert_allclose(spec.history_ - bare.history_, oracle.gram(x, x, GAMMA).mean(), atol=1e-12)


def test_repeated_rows_and_far_rows():
    # Fewer different rows than points; and rows far from the origin, whose squares would swallow the distances.
    spec = ReducedMeanEmbedding(6, gamma=GAMMA, random_state=0).fit(np.repeat(rows(3), 10, 0))
    assert spec.error_ < 1e-12 and np.isfinite(spec.z).all()
    near, far = (ReducedMeanEmbedding(6, gamma=GAMMA, rounds=3, random_state=0).fit(rows() + c) for c in (0.0, 1e4))
    np.testing.assert_allclose(far.z - 1e4, near.z, atol=1e-5)


def test_the_rows_are_not_changed_and_progress_is_told():
    x, told = rows(), []
    before = x.copy()
    ReducedMeanEmbedding(5, rounds=3, random_state=0).fit(x, progress=lambda text, share: told.append((text, share)))
    np.testing.assert_array_equal(x, before)
    assert told[0] == ("round 1 of 3", 1 / 3) and len(told) <= 3


def test_errors():
    x = rows(20)
    for arguments, message in (
        ({"n_points": 0}, "n_points must be"),
        ({"n_points": 21}, "n_points=21 needs at least as many rows; got n_samples=20"),
        ({"kernel": "linear"}, "kernel must be one of"),
        ({"gamma": "scale"}, "gamma must be"),
        ({"gamma": 0.0}, "gamma must be"),
        ({"rounds": -1}, "rounds must be"),
        ({"simplex": 1}, "simplex must be"),
        ({"encoder": None}, "encoder must be"),
        ({"random_state": -1}, "random_state must be"),
    ):
        with pytest.raises(QuernelError, match=message):
            ReducedMeanEmbedding(**({"n_points": 3} | arguments)).fit(x)
    with pytest.raises(ValueError, match="NaN"):
        ReducedMeanEmbedding(3).fit(np.where(x > 2, np.nan, x))
    with pytest.raises(QuernelError, match="row of zeros"):
        ReducedMeanEmbedding(3, kernel="cosine").fit(np.concatenate((x, np.zeros((1, 3)))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.4}, "other has gamma 0.4, where 0.3 is needed"),
        ({"encoder": "b"}, "other has encoder 'b', where 'a' is needed"),
        ({"kernel": "cosine"}, "other has kernel"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    draw = np.random.default_rng(0)
    z, beta = draw.standard_normal((3, 2)), np.full(3, 1 / 3)
    with pytest.raises(QuernelError, match=message):
        made(z, beta, encoder="a").mmd2(made(z, beta, **({"encoder": "a"} | change)))
    with pytest.raises(QuernelError, match="number of columns 3"):
        made(z, beta).mmd2(made(draw.standard_normal((3, 3)), beta))
    with pytest.raises(QuernelError, match="other must be a ReducedMeanEmbedding"):
        made(z, beta).mmd2("x")
    with pytest.raises(QuernelError, match="not fitted"):
        made(z, beta).mmd2(ReducedMeanEmbedding())


def test_fingerprints():
    weights = {"w": np.eye(3, dtype=np.float32), "b": np.zeros(3)}
    assert encoder_fingerprint(weights) == encoder_fingerprint({k: torch.from_numpy(v) for k, v in weights.items()})
    assert encoder_fingerprint(weights) != encoder_fingerprint({**weights, "b": np.ones(3)})
    assert encoder_fingerprint(weights) != encoder_fingerprint({**weights, "w": np.eye(3)})
    assert encoder_fingerprint({"w": torch.ones(2, dtype=torch.bfloat16)}) and len(encoder_fingerprint(weights)) == 16


def test_a_forged_state_is_refused(tmp_path):
    spec = ReducedMeanEmbedding(5, gamma=GAMMA, rounds=1, random_state=0).fit(rows())
    spec.beta_ = np.zeros(5)
    with pytest.raises(FormatError, match="not all 0"):
        load(spec.save(tmp_path))
