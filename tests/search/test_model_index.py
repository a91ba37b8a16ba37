"""ModelIndex against the definition: prompts, several images, storage, candidates, changes, files, refusals."""

import copy

import numpy as np
import pytest

from quernel import load
from quernel._errors import FormatError, QuernelError
from quernel._timing import threads
from quernel.kernels import RandomFourierFeatures, ReducedMeanEmbedding, WeightedRKME
from quernel.search import ModelIndex, _model_queries, model_index
from tests.reference import rkme_model_search as oracle

GAMMA, DIM, PROMPT = 0.15, 5, 4
# float32 sums of products and of some points.
SAME = 3e-6


def specs(n=30, seed=0, prompts=True, encoder="e"):
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        x = 2 * draw.standard_normal(DIM) + draw.standard_normal((40, DIM))
        spec = WeightedRKME(int(draw.integers(1, 7)), gamma=GAMMA, rounds=0, encoder=encoder, random_state=0)
        made.append(spec.fit(x, prompts=draw.standard_normal((40, PROMPT)) if prompts else None))
    return made


def queries(n=6, seed=1):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, DIM)), draw.standard_normal((n, PROMPT))


def empty(**options):
    return ModelIndex(DIM, GAMMA, **({"prompt_dim": PROMPT, "encoder": "e", "n_features": 64} | options))


def by_definition(held, images, prompts=None, temperature=0.1):
    def one(spec, i):
        a = spec.beta if prompts is None else oracle.weights(spec.beta, spec.u, prompts[i], temperature)
        return -oracle.distance(a, spec.z, np.atleast_2d(images[i]), GAMMA)

    return np.array([[one(spec, i) for spec in held] for i in range(len(images))])


def require_best(answer, wanted, k, atol=SAME):
    scores, ids = answer
    order = np.argsort(-wanted, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores, np.take_along_axis(wanted, order, 1), atol=atol)


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("prompted", [False, True])
def test_equals_the_definition(blocks, prompted, monkeypatch):
    if blocks == "many":
        monkeypatch.setattr(model_index, "_VALUES", 50)  # a few points at a time
        monkeypatch.setattr(model_index, "_COLUMNS", 2)
        monkeypatch.setattr(model_index, "_SCORES", 64)
    held, (images, prompts) = specs(), queries()
    index = empty().add(held[:7]).add(held[7:])
    options = {"prompts": prompts, "temperature": 0.3} if prompted else {}
    require_best(index.search(images, 5, **options), by_definition(held, images, *options.values()), 5)
    with threads(1):
        require_best(index.search(images, 5, **options), by_definition(held, images, *options.values()), 5)


@pytest.mark.parametrize("prompted", [False, True])
def test_several_images_are_one_query(prompted):
    held, prompts = specs(), queries(3)[1]
    draw = np.random.default_rng(2)
    images = [draw.standard_normal((n, DIM)) for n in (1, 4, 2)]
    options = {"prompts": prompts, "temperature": 0.3} if prompted else {}
    index = empty().add(held)
    require_best(index.search(images, 4, **options), by_definition(held, images, *options.values()), 4)
    same = [part[:1] for part in images]
    np.testing.assert_allclose(index.search(same, 4)[0], index.search(np.concatenate(same), 4)[0], atol=SAME)
    both = index.search(np.stack([images[1][:2], images[2]]), 3)
    np.testing.assert_array_equal(both[1], index.search([images[1][:2], images[2]], 3)[1])


@pytest.mark.parametrize(("dtype", "error"), [("float16", 5e-3), ("int8", 5e-2)])
def test_stored_numbers_may_be_small(dtype, error):
    held, (images, prompts) = specs(), queries()
    index, whole = empty(dtype=dtype).add(held), empty().add(held)
    for options in ({}, {"prompts": prompts, "temperature": 0.3}):
        np.testing.assert_allclose(
            index._scores(index._items("q", images), 0.3), whole._scores(whole._items("q", images), 0.3), atol=error
        )
        assert np.isfinite(index.search(images, 5, **options)[0]).all()
    assert index.nbytes < whole.nbytes


def test_bytes_of_a_specification():
    # 50 points of 384 + 384 numbers in float16 are 77 KB.
    draw = np.random.default_rng(0)
    x, prompts = draw.standard_normal((60, 384)), draw.standard_normal((60, 384))
    spec = WeightedRKME(50, gamma=1e-3, rounds=0, random_state=0).fit(x, prompts=prompts)
    index = ModelIndex(384, 1e-3, prompt_dim=384, dtype="float16", n_features=0).add(spec)
    assert index._store.z.rows.nbytes + index._store.u.rows.nbytes == 76_800
    assert index.nbytes < 76_800 + 4 * 50 * 50 + 1000


def test_equal_distances_are_zero_and_never_positive():
    # Far from the origin float32 squares swallow the distance: it must not come out negative.
    point = np.full((3, DIM), 300.0)
    spec = ReducedMeanEmbedding(1, gamma=GAMMA).fit(point)
    index = ModelIndex(DIM, GAMMA).add([spec, *specs(5, encoder="")])
    scores, ids = index.search(point[:1], 3)
    assert ids[0, 0] == 0 and scores[0, 0] == pytest.approx(0, abs=1e-3) and (scores <= 0).all()


def test_the_cosine():
    draw = np.random.default_rng(0)
    held = [
        ReducedMeanEmbedding(4, kernel="cosine", rounds=2, random_state=0).fit(draw.standard_normal((30, DIM)) + c)
        for c in 2 * draw.standard_normal((20, DIM))
    ]
    index, images = ModelIndex(DIM, 1.0, kernel="cosine").add(held), queries()[0]
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    wanted = -np.array([[((unit(q[None]) - spec.beta @ unit(spec.z)) ** 2).sum() for spec in held] for q in images])
    require_best(index.search(images, 4), wanted, 4)
    # The mean direction is the whole embedding: candidates lose nothing.
    require_best(index.search(images, 4, candidates=4), wanted, 4)
    with pytest.raises(QuernelError, match="vector of zeros"):
        index.search(np.zeros((1, DIM)))


def test_candidates_find_most_and_score_exactly():
    held, (images, prompts) = specs(200, prompts=True), queries(20)
    index = empty(n_features=256).add(held)
    for options in ({}, {"prompts": prompts, "temperature": 1.0}):
        exact, some = index.search(images, 5, **options), index.search(images, 5, candidates=60, **options)
        recall = np.mean([np.isin(a, b).mean() for a, b in zip(some[1], exact[1], strict=True)])
        assert recall >= 0.9
        for i in range(len(images)):
            every = dict(zip(exact[1][i].tolist(), exact[0][i].tolist(), strict=True))
            for score, model in zip(some[0][i].tolist(), some[1][i].tolist(), strict=True):
                assert score == pytest.approx(every.get(model, score), abs=SAME)
    whole = index.search(images, 5, prompts=prompts, candidates=10**6)
    np.testing.assert_array_equal(whole[1], index.search(images, 5, prompts=prompts)[1])
    np.testing.assert_allclose(whole[0], index.search(images, 5, prompts=prompts)[0], atol=SAME)
    index.remove(whole[1][:, 0])
    assert not np.isin(index.search(images, 5, candidates=30)[1], whole[1][:, 0]).any()


def test_mean_features_are_those_of_the_points():
    held = specs(3)
    index = empty().add(held)
    features = RandomFourierFeatures(64, gamma=GAMMA, random_state=0).fit(np.zeros((1, DIM)))
    for row, spec in zip(index._means.rows, held, strict=True):
        np.testing.assert_allclose(row, spec.beta @ features.transform(spec.z), atol=1e-6)


def test_meta_update_and_compact():
    held, (images, prompts) = specs(12), queries()
    index = empty().add(held[:10], ids=range(100, 110), meta=[{"name": str(i)} for i in range(10)])
    for wrong in ([103, 104], 103.0, True):
        with pytest.raises(QuernelError, match="model must be an integer"):
            index.meta(wrong)
    assert index.meta(103) == {"name": "3"} and index.add(held[10]).meta(110) == {}
    index.update([held[11]], [104])
    assert index.meta(104) == {"name": "4"} and len(index) == 11
    index.update([held[0]], [105], meta=[{"name": "new"}])
    assert index.meta(105) == {"name": "new"}
    now = [*held[:4], held[11], held[0], *held[6:11]]
    wanted = by_definition(now, images, prompts)
    order = [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110]
    for one in (index, index.compact()):
        scores, ids = one.search(images, 11, prompts=prompts)
        for i in range(len(images)):
            by_id = dict(zip(ids[i], scores[i], strict=True))
            np.testing.assert_allclose([by_id[m] for m in order], wanted[i], atol=SAME)
    assert index.meta(104) == {"name": "4"} and len(index._store) == 11
    before = index.search(images, 3)[1]
    for call in (
        lambda: index.update([held[0]], [999]),
        lambda: index.update(held[:2], [101, 101]),
        lambda: index.update(held[:2], [101]),
        lambda: index.update([held[0]], [101], meta=[{"x": object()}]),
        lambda: index.meta(999),
    ):
        with pytest.raises(QuernelError):
            call()
    np.testing.assert_array_equal(index.search(images, 3)[1], before)


def test_a_model_that_cannot_be_stored_does_not_replace_another():
    held, (images, prompts) = specs(4), queries()
    index = empty(dtype="float16").add(held)
    before = index.search(images, 4, prompts=prompts)
    far = specs(1, seed=5)[0]
    far.z_ = far.z_ * 1e5
    with pytest.raises(QuernelError, match="to be stored as float16"):
        index.update([far], [2])
    for found, wanted in zip(index.search(images, 4, prompts=prompts), before, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_what_a_private_specification_promises_is_in_the_index():
    held = specs(2)
    held[0].epsilon_, held[0].delta_, held[0].neighbours_ = 1.0, 1e-6, "add_remove"
    index = empty().add(held, meta=[{"name": "a"}, {"name": "b"}])
    promise = {"epsilon": 1.0, "delta": 1e-6, "neighbours": "add_remove"}
    assert index.meta(0) == {"name": "a", "privacy": promise} and index.meta(1) == {"name": "b"}
    assert index.update([held[1]], [0]).meta(0) == {"name": "a"}
    held[0].epsilon_ = -5.0
    with pytest.raises(QuernelError, match="epsilon must be"):
        held[0].check_state()


def test_the_temperature_is_chosen_on_the_hub():
    # Broad models of several topics, which differ only within one topic each: the prompt must count, not only decide.
    draw = np.random.default_rng(0)
    centers, directions = 6 * draw.standard_normal((4, DIM)), np.eye(PROMPT)
    held = []
    for style in range(6):
        own = draw.integers(0, 4, 160)
        x = centers[own] + 1.5 * np.eye(DIM)[style % DIM] * (1 + style // DIM) + 0.3 * draw.standard_normal((160, DIM))
        spec = WeightedRKME(16, gamma=0.05, rounds=3, random_state=0)
        held.append(spec.fit(x, prompts=directions[own] + 0.02 * draw.standard_normal((160, PROMPT))))
    index = ModelIndex(DIM, 0.05, prompt_dim=PROMPT).add(held)
    assert index.choose_temperature((0.1, 100.0)) == 0.1
    # A point that is left out is no part of its model's own score.
    from quernel.search._model_tuning import _without

    spec, a = held[2], held[2].weights(held[2].u[3], 0.2)
    a[3] = 0
    wanted = -oracle.distance(a / a.sum(), spec.z, spec.z[3:4], 0.05)
    assert _without(index, 2, 3, 0.2) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(QuernelError, match="6 models, without prompts"):
        ModelIndex(DIM, 0.05).add(held).choose_temperature()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_files(dtype, tmp_path):
    held, (images, prompts) = specs(), queries()
    index = empty(dtype=dtype).add(held, meta=[{"n": i} for i in range(30)])
    index.remove([3])
    twin, mapped = load(index.save(tmp_path)), ModelIndex.load(tmp_path, mmap=True)
    for other in (twin, mapped):
        for options in ({}, {"prompts": prompts}, {"candidates": 9}):
            got, want = (one.search(images, 4, **options) for one in (other, index))
            np.testing.assert_array_equal(got[1], want[1])
            # A mapped file begins where its header ends, and a product's rounding may depend on where rows begin.
            np.testing.assert_allclose(got[0], want[0], atol=0 if other is twin else SAME)
        assert other.meta(7) == {"n": 7} and other.config() == index.config()
    for one in (index, twin):
        one.update([held[0]], [9])
    np.testing.assert_array_equal(twin.search(images, 4)[1], index.search(images, 4)[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights", lambda a: -a, "'weights' must hold finite numbers >= 0"),
        ("norms", lambda a: a + np.float32(np.nan), "'norms' must hold"),
        ("grams", lambda a: a[1:], "'grams' must have"),
        ("meta", lambda a: a[:5], "does not fit"),
        ("meta", lambda a: np.frombuffer(b"[]", np.uint8), "JSON of a list of 30"),
        ("offsets", lambda a: a + 1, "'offsets' does not divide"),
        ("means", lambda a: a[:, 1:], "'means' must be"),
        ("prompt_vectors", lambda a: a[:, 1:], "'vectors' must be"),
    ],
)
def test_forged_arrays(name, change, message, tmp_path, monkeypatch):
    index = empty().add(specs())
    arrays = index._all_arrays()
    monkeypatch.setattr(ModelIndex, "_all_arrays", lambda self: {**arrays, name: change(arrays[name])})
    index.save(tmp_path)
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


def other_spec(**changes):
    spec = copy.deepcopy(specs(1)[0])
    for name, value in changes.items():
        setattr(spec, name, value)
    return spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: other_spec(gamma_=0.2), r"x\[0\] has gamma 0.2, where 0.15 is needed"),
        (lambda: other_spec(encoder="f"), r"x\[0\] has encoder 'f', where 'e' is needed"),
        (lambda: other_spec(kernel="cosine"), r"x\[0\] has kernel"),
        (lambda: other_spec(n_features_in_=6), r"x\[0\] has number of columns 6"),
        (lambda: other_spec(u_=None), "must hold prompts of 4 numbers; got none"),
        (lambda: other_spec(u_=np.ones((3, 2))), "must hold prompts of 4 numbers; got 2"),
        (lambda: other_spec(beta_=np.zeros(1), z_=np.ones((1, DIM))), "weights that are all 0"),
        (lambda: other_spec(beta_=np.array([1.5, -0.5]), z_=np.ones((2, DIM))), "negative weights"),
        (lambda: other_spec(z_=np.full((1, DIM), np.nan), beta_=np.ones(1)), r"x\[0\].z_ holds NaN"),
        (lambda: other_spec(z_=np.ones((0, DIM)), beta_=np.ones(0)), "a weight for each"),
        (WeightedRKME, r"x\[0\] is not fitted"),
        (lambda: "model", "must be fitted WeightedRKMEs"),
        (lambda: [5], r"x\[0\] must be a ReducedMeanEmbedding"),
    ],
)
def test_incompatible_specifications(spec, message):
    index = empty().add(specs(2))
    with pytest.raises(ValueError, match=message):
        index.add(spec())
    assert len(index) == len(index._store) == len(index._meta) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": np.ones((1, PROMPT))}, "prompts must be 6 vectors"),
        ({"prompts": np.zeros((6, PROMPT))}, "prompts must not be 0; number 0 is"),
        ({"prompts": np.ones((6, 3))}, "prompts must have shape"),
        ({"temperature": 0.0}, "temperature must be"),
        ({"candidates": 3}, "candidates must be"),
    ],
)
def test_bad_searches(options, message):
    index = empty().add(specs(3))
    with pytest.raises(QuernelError, match=message):
        index.search(queries()[0], 4, **options)


def test_what_an_index_was_not_made_for():
    plain = ModelIndex(DIM, GAMMA, encoder="e", n_features=0).add(specs(3))
    with pytest.raises(QuernelError, match="prompts need an index with prompts"):
        plain.search(*queries()[:1], prompts=queries()[1])
    with pytest.raises(QuernelError, match="candidates needs random features"):
        plain.search(queries()[0], 2, candidates=2)
    for meta, message in (
        ([{}], "be 3 mappings, one a model; got 1 of dict"),
        ("abc", "be 3 mappings, one a model; got str"),
        ([{"a": np.nan}, {}, {}], "hold what JSON can"),
        ([1, 2, {}], "be 3 mappings, one a model; got 3 of dict, int"),
    ):
        with pytest.raises(QuernelError, match=f"meta must {message}"):
            plain.add(specs(3), meta=meta)
    for arguments, message in (
        ({"dim": 0}, "dim"),
        ({"gamma": 0.0}, "gamma"),
        ({"kernel": "linear"}, "kernel"),
        ({"encoder": 3}, "encoder"),
        ({"n_features": 3}, "n_features must be even"),
        ({"dtype": "int4"}, "dtype"),
        ({"prompt_dim": 0}, "prompt_dim"),
    ):
        with pytest.raises(QuernelError, match=message):
            ModelIndex(**({"dim": 2, "gamma": 1.0} | arguments))


def test_kernels_never_read_what_was_not_written():
    # Workspaces keep the numbers of larger blocks before them.
    held, (images, prompts) = specs(), queries()
    index = empty().add(held)
    wanted = index.search(images, 5, prompts=prompts)
    for name in ("model kernels", "model points", "model cosines", "model means"):
        _model_queries.workspace(name, 10_000, _model_queries.torch.float32).fill_(float("nan"))
    for got, want in zip(index.search(images, 5, prompts=prompts), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
