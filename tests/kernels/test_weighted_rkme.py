"""WeightedRKME: prompts of the points, weights of a query, distances, files, refusals."""

import numpy as np
import pytest

from quernel import load
from quernel._errors import QuernelError
from quernel.kernels import WeightedRKME
from tests.reference import rkme_model_search as oracle

GAMMA = 0.2


def topics(n=200, seed=0, topics=4, dim=3, prompt_dim=5):
    """Return outputs around the centre of their topic, prompts near the direction of their topic, and topics."""
    draw = np.random.default_rng(seed)
    own = draw.integers(0, topics, n)
    centers, directions = 4 * draw.standard_normal((topics, dim)), draw.standard_normal((topics, prompt_dim))
    x = centers[own] + 0.5 * draw.standard_normal((n, dim))
    return x, directions[own] + 0.1 * draw.standard_normal((n, prompt_dim)), own, directions


def fitted(**options):
    x, prompts, *_ = topics()
    return WeightedRKME(12, gamma=GAMMA, rounds=3, random_state=0, **options).fit(x, prompts=prompts)


def test_prompts_are_mean_directions_of_the_nearest_rows():
    x, prompts, *_ = topics()
    spec = fitted()
    unit = prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
    own = ((x[:, None] - spec.z[None]) ** 2).sum(-1).argmin(1)
    for n in range(12):
        mean = unit[own == n].mean(0)
        np.testing.assert_allclose(spec.u[n], mean / np.linalg.norm(mean), atol=1e-9)


def test_prompts_that_cancel_and_points_without_rows():
    x = np.array([[0.0], [0.1], [5.0], [5.1]])
    prompts = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    spec = WeightedRKME(2, gamma=1.0, rounds=0, random_state=0).fit(x, prompts=prompts)
    np.testing.assert_allclose(np.linalg.norm(spec.u, axis=1), 1)
    np.testing.assert_allclose(spec.u[spec.z[:, 0].argmax()], [0, 1])
    # Three points for two different rows: one is nearest to none.
    spec = WeightedRKME(3, gamma=1.0, rounds=0, random_state=0).fit(np.repeat(x[[0, 2]], 2, 0), prompts=prompts + 1e-3)
    np.testing.assert_allclose(np.linalg.norm(spec.u, axis=1), 1)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 100.0])
def test_weights_are_the_formula(temperature):
    spec, prompt = fitted(), np.random.default_rng(3).standard_normal(5)
    a = spec.weights(prompt, temperature)
    np.testing.assert_allclose(a, oracle.weights(spec.beta, spec.u, prompt, temperature), atol=1e-12)
    assert a.sum() == pytest.approx(1.0, abs=1e-12) and (a >= 0).all()
    np.testing.assert_allclose(spec.weights(7 * prompt, temperature), a)


def test_a_high_temperature_is_plain_rkme_and_a_low_one_looks_at_one_prompt():
    spec, prompt = fitted(), topics()[3][0]
    np.testing.assert_allclose(spec.weights(prompt, 1e9), spec.beta, atol=1e-7)
    np.testing.assert_array_equal(spec.weights(), spec.beta)
    assert spec.weights(prompt, 1e-5).max() > 0.99
    # Nothing under- or overflows where the point of the best prompt has no weight.
    spec.beta_[np.argmax(spec.u @ prompt)] = 0.0
    assert np.isfinite(spec.weights(prompt, 1e-6)).all()


@pytest.mark.parametrize("images", [1, 4])
def test_distance_is_the_formula(images):
    spec, draw = fitted(), np.random.default_rng(4)
    x, prompt = draw.standard_normal((images, 3)), draw.standard_normal(5)
    assert spec.distance(x) == pytest.approx(oracle.distance(spec.beta, spec.z, x, GAMMA), abs=1e-12)
    a = oracle.weights(spec.beta, spec.u, prompt, 0.3)
    wanted = oracle.distance(a, spec.z, x, GAMMA)
    assert spec.distance(x, prompt, temperature=0.3) == pytest.approx(wanted, abs=1e-12)


def test_distance_is_zero_for_a_point_mass_at_the_query_only():
    point = np.array([[1.0, 2.0]])
    spec = WeightedRKME(1, gamma=GAMMA).fit(np.repeat(point, 3, 0))
    assert spec.distance(point) == pytest.approx(0, abs=1e-15)
    draw = np.random.default_rng(0)
    for _ in range(50):
        other = WeightedRKME(2, gamma=GAMMA, rounds=0, random_state=0).fit(point + 0.3 * draw.standard_normal((4, 2)))
        assert other.distance(point) > 1e-6


def test_only_the_part_that_answers_the_prompt_is_compared():
    # A broad model holds all topics, a narrow one some other: the broad one loses plainly and wins with the prompt.
    x, prompts, own, directions = topics(400)
    broad = WeightedRKME(20, gamma=GAMMA, random_state=0).fit(x, prompts=prompts)
    narrow = WeightedRKME(20, gamma=GAMMA, random_state=0).fit(x[own == 0] + 0.7, prompts=prompts[own == 0])
    query = x[own == 0][:1]
    assert broad.distance(query) > narrow.distance(query)
    assert broad.distance(query, directions[0]) < narrow.distance(query, directions[0])


def test_without_prompts_and_with_free_weights():
    x, prompts, *_ = topics()
    spec = WeightedRKME(5, gamma=GAMMA, rounds=1, random_state=0).fit(x)
    assert spec.u is None
    with pytest.raises(QuernelError, match="prompt needs a specification with prompts"):
        spec.weights(prompts[0])
    free = WeightedRKME(5, gamma=GAMMA, rounds=1, simplex=False, random_state=0).fit(x, prompts=prompts)
    free.beta_[0] = -0.1
    with pytest.raises(QuernelError, match="prompt needs weights >= 0"):
        free.weights(prompts[0])
    assert free.distance(x[:1]) >= 0


def test_files(tmp_path):
    spec = fitted(encoder="abc")
    twin = load(spec.save(tmp_path))
    for name in ("z", "u", "beta"):
        np.testing.assert_array_equal(getattr(twin, name), getattr(spec, name))
    assert twin.encoder == "abc" and twin.error_ == spec.error_
    x, prompts, *_ = topics()
    assert twin.distance(x[:1], prompts[0]) == spec.distance(x[:1], prompts[0])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (np.ones((3, 5)), "prompts must be numbers of shape"),
        (np.zeros((200, 5)), "prompts holds a row of zeros"),
        (np.full((200, 5), np.nan), "prompts holds NaN"),
        (np.full((200, 5), "a"), "prompts must be numbers"),
        (np.ones(200), "prompts must be numbers of shape"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(QuernelError, match=message):
        WeightedRKME(5).fit(topics()[0], prompts=prompts)


def test_bad_queries():
    spec = fitted()
    with pytest.raises(QuernelError, match="prompt must have shape"):
        spec.weights(np.ones(4))
    with pytest.raises(QuernelError, match="temperature must be"):
        spec.weights(np.ones(5), 0.0)
    with pytest.raises(ValueError, match="features"):
        spec.distance(np.ones((1, 4)))


def test_prompts_in_the_place_of_y_are_refused():
    x = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.raises(QuernelError, match="give these as prompts="):
        WeightedRKME(3, gamma=0.5).fit(x, x)
