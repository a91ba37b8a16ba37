"""FlatIndex against plain loops, in every metric."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from quernel._errors import FormatError, MissingExtraError, QuernelError
from quernel.hashing import Sets, jaccard_similarity
from quernel.search import FlatIndex, FlinngIndex, Index, MaxIPIndex, flat

# Sums of a few float32 products in another order.
SAME = 1e-5


def by_loop(items, queries, metric):
    score = {
        "cosine": lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "l2": lambda a, b: -np.linalg.norm(a - b),
        "ip": lambda a, b: a @ b,
        "jaccard": jaccard_similarity,
    }[metric]
    return np.array([[score(q, x) for x in items] for q in queries])


def vectors(n, seed, dim=5):
    return np.random.default_rng(seed).standard_normal((n, dim)) * 3


def sets(n, seed):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 30, draw.integers(1, 12)) for _ in range(n)]


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip", "jaccard"])
def test_equals_a_loop(metric, monkeypatch):
    monkeypatch.setattr(flat, "_BLOCK", 100)  # several blocks of queries
    make = sets if metric == "jaccard" else vectors
    items, queries = make(40, 0), make(9, 1)
    index = FlatIndex(None if metric == "jaccard" else 5, metric).add(items)
    scores, ids = index.search(queries, 40)
    wanted = by_loop(items, queries, metric)
    np.testing.assert_allclose(scores, -np.sort(-wanted, axis=1), atol=SAME)
    np.testing.assert_allclose(np.take_along_axis(wanted, ids, axis=1), scores, atol=SAME)
    assert (np.sort(ids, axis=1) == np.arange(40)).all()


def test_equal_scores_come_in_the_order_of_adding():
    index = FlatIndex(2, "l2").add([[1, 0], [0, 1], [1, 0]], ids=[9, 4, 2])
    assert index.search([[1, 0]], 3)[1].tolist() == [[9, 2, 4]]


def test_close_points_keep_their_distances():
    # |x|^2 - 2 x.y + |y|^2 would lose these digits.
    index = FlatIndex(2, "l2").add([[1000.0, 1000.0], [1000.0, 1000.25]])
    assert index.search([[1000.0, 1000.25]], 2)[0].tolist() == [[0.0, -0.25]]


def test_unsorted_sets_with_repeats():
    index = FlatIndex(metric="jaccard").add([[3, 1, 3], [7]])
    scores, ids = index.search([[1, 1, 2, 3]], 2)
    assert ids.tolist() == [[0, 1]] and scores.tolist() == [[np.float32(2 / 3), 0.0]]


def test_sets_of_a_file_are_checked(tmp_path):
    index = FlatIndex(metric="jaccard").add([[1, 2], [3]])
    index._sets.offsets[1] = 0
    index.save(tmp_path)
    with pytest.raises(FormatError, match=r"X\[0\] is empty"):
        Index.load(tmp_path)


def test_an_extra_that_is_missing_is_not_called_damage(tmp_path, monkeypatch):
    FlatIndex(3).add(np.ones((2, 3))).save(tmp_path)

    def without(config):
        raise MissingExtraError("it", "ray")

    monkeypatch.setattr(FlatIndex, "from_config", without)
    with pytest.raises(MissingExtraError, match=r"quernel\[ray\]"):
        Index.load(tmp_path)


def test_sets_and_vectors_are_told_apart():
    index = FlatIndex(metric="jaccard").add(Sets.of([[1, 2]]))
    assert index.dim is None and len(index) == 1 and index.nbytes == 8 + 1 + 2 * 8 + 2 * 8
    assert FlatIndex(3, "ip").add(np.ones((2, 3))).nbytes == 2 * (8 + 1 + 12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlatIndex(3, "dot"), "metric must be one of 'cosine', 'l2', 'ip', 'jaccard'"),
        (lambda: FlatIndex(), "dim must be given for vectors and not for sets; got dim=None and metric='cosine'"),
        (lambda: FlatIndex(3, "jaccard"), "dim must be given for vectors and not for sets"),
        (lambda: FlatIndex(0), "dim must be an integer"),
        (lambda: FlatIndex(2).add([[0.0, 0.0]]), "x holds a vector of zeros, which has no direction"),
        (lambda: FlatIndex(2).add([[1.0, 0.0]]).search([[0.0, 0.0]]), "q holds a vector of zeros"),
        (lambda: FlatIndex(2).search([[1.0, 0.0]], 0), "k must be an integer"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()


def test_load_refuses_another_class(tmp_path):
    class Other(FlatIndex):
        pass

    FlatIndex(2).add([[1.0, 0.0]]).save(tmp_path)
    with pytest.raises(FormatError, match="names FlatIndex, not a Other"):
        Other.load(tmp_path)


def test_sets_are_refused_by_an_index_of_vectors():
    with pytest.raises(QuernelError, match="q holds sets; this index holds vectors of 4 numbers"):
        FlatIndex(4).add(np.eye(4)).search(Sets.of([[1, 2]]), 1)


def test_an_index_is_not_saved_over_a_model(tmp_path):
    from quernel._load import save_model

    save_model(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(QuernelError, match="holds a saved model; choose another folder for the index"):
        FlatIndex(4).add(np.eye(4)).save(tmp_path)


@pytest.fixture
def always_warning():
    """Torch warns once a process otherwise, and perhaps did so before this test."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(before)


@pytest.mark.parametrize("metric", ["cosine", "l2", "ip"])
def test_arrays_that_may_not_be_written_are_no_reason_to_warn(metric, tmp_path, always_warning):
    items, queries = vectors(40, 0).astype(np.float32), vectors(9, 1).astype(np.float32)
    index = FlatIndex(5, metric).add(items)
    wanted = index.search(queries, 4)
    np.save(tmp_path / "q.npy", queries)
    mapped = np.load(tmp_path / "q.npy", mmap_mode="r")
    items.flags.writeable = False
    for made in (FlatIndex(5, metric).add(items), Index.load(index.save(tmp_path / "ix"), mmap=True)):
        for got, right in zip(made.search(mapped, 4), wanted, strict=True):
            np.testing.assert_array_equal(got, right)
        again = Index.load(made.save(tmp_path / "again"))
        np.testing.assert_array_equal(again.search(mapped, 4)[1], wanted[1])


@pytest.mark.parametrize("make", [lambda: FlatIndex(5), lambda: FlinngIndex(5, bits=4), lambda: MaxIPIndex(5)])
@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.clone().requires_grad_(),
        lambda x: x.bfloat16(),
        lambda x: x.half(),
        lambda x: x.double().requires_grad_(),
        lambda x: x.bfloat16().requires_grad_() * 1,
    ],
)
def test_tensors_of_every_float_with_and_without_gradients_are_vectors(make, form):
    # Halves in float32, so that each form holds the same numbers.
    x = torch.from_numpy(np.random.default_rng(2).integers(-8, 9, (60, 5)) / 2 + 0.25).float()
    wanted = make().add(x.numpy()).search(x[:7].numpy(), 3)
    for got, right in zip(make().add(form(x)).search(form(x)[:7], 3), wanted, strict=True):
        np.testing.assert_array_equal(got, right)


def test_one_query_of_a_loop_may_be_a_tensor_that_wants_a_gradient():
    index = MaxIPIndex(5).add(vectors(30, 0))
    q = torch.ones(5)
    assert index.best(q.clone().requires_grad_()) == index.best(q.bfloat16()) == index.best(q.numpy())


@pytest.mark.parametrize("make", [lambda: FlatIndex(metric="jaccard"), lambda: FlinngIndex(metric="jaccard", bits=6)])
def test_python_sets_are_sets(make):
    held = [{3, 1, 7}, frozenset({2, 9}), {1, 3, 8}]
    wanted = make().add([[1, 3, 7], [2, 9], [1, 3, 8]]).search([[1, 3, 7]], 2)
    for got, right in zip(make().add(held).search([{7, 3, 1}], 2), wanted, strict=True):
        np.testing.assert_array_equal(got, right)
    for wrong, message in (
        ([{1}, set()], r"X\[1\] is empty"),
        ([{"a"}], "integer item ids"),
        ({1, 2}, "a list of sets"),
    ):
        with pytest.raises(QuernelError, match=message):
            make().add(wrong)
