"""Compatibility between versions: the matrix against plain loops, averages by hand, parts of the classes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.search import (
    FlatIndex,
    average_accuracy,
    average_compatibility,
    compatibility_by_seen,
    compatibility_matrix,
    features_of,
    self_accuracy,
)
from tests.reference import stationary_representations as oracle

NAN = np.nan
# Row 1 beats C00 (0.55 > 0.5); row 2 ties C00 and loses to C11; row 3 beats C00 and C11 and loses to C22.
BY_HAND = [
    [0.50, NAN, NAN, NAN],
    [0.55, 0.60, NAN, NAN],
    [0.50, 0.40, 0.70, NAN],
    [0.90, 0.61, 0.20, 0.80],
]  # fmt: skip


def test_averages_of_a_matrix_by_hand():
    assert average_compatibility(BY_HAND) == 3 / 6
    assert average_accuracy(BY_HAND) == pytest.approx(5.76 / 10, abs=1e-15)
    assert self_accuracy(BY_HAND) == pytest.approx(2.6 / 4, abs=1e-15)
    assert (average_compatibility(BY_HAND), average_accuracy(BY_HAND)) == pytest.approx(oracle.ac_aa(BY_HAND))


def test_identical_models_are_not_compatible_and_improving_ones_are():
    c = np.full((5, 5), 0.7)
    assert average_compatibility(c) == 0
    i, j = np.indices((5, 5))
    improving = 0.1 + 0.05 * i + 0.01 * j  # every upgrade beats what was there, with any gallery
    assert average_compatibility(improving) == 1


def test_the_upper_triangle_is_not_read_and_zeros_count():
    assert average_accuracy([[1.0, 9.0], [0.0, 0.5]]) == 0.5
    assert average_compatibility([[0.1, 9.0], [0.0, 0.5]]) == 0


@pytest.mark.parametrize("average", [average_accuracy, average_compatibility, self_accuracy])
def test_matrices_that_are_none_are_refused(average):
    for bad, message in (([[1.0, 2.0]], "square"), ([[0.5, 0.1], [NAN, 0.5]], "NaN"), ([], "square")):
        with pytest.raises(QuernelError, match=message):
            average(bad)


def test_one_model_has_an_accuracy_but_no_compatibility():
    assert average_accuracy([[0.3]]) == 0.3
    with pytest.raises(QuernelError, match="at least two models"):
        average_compatibility([[0.3]])


def made(n=40, classes=4, d=6, seed=0):
    draw = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return (draw.standard_normal((n, d)) + 2 * np.eye(d)[y]).astype(np.float32), y


def versions(d=6, count=3):
    draw = np.random.default_rng(1)
    maps = [np.eye(d) + 0.5 * k * draw.standard_normal((d, d)) for k in range(count)]
    return [lambda x, m=m: x @ m for m in maps]


@pytest.mark.parametrize("gallery_mode", ["class_mean", "items"])
@pytest.mark.parametrize("metric", ["top1", "map"])
def test_the_matrix_is_what_loops_give(metric, gallery_mode):
    queries, gallery, models = made(seed=2), made(64, seed=3), versions()
    c = compatibility_matrix(models, queries, gallery, metric=metric, gallery_mode=gallery_mode, batch_size=7)
    for i, j in np.ndindex(c.shape):
        if j > i:
            assert np.isnan(c[i, j])
            continue
        held, labels = models[j](gallery[0]), list(gallery[1])
        if gallery_mode == "class_mean":
            held, labels = oracle.class_means(held, labels)
        wanted = oracle.retrieval(models[i](queries[0]), list(queries[1]), held, labels, metric)
        assert c[i, j] == pytest.approx(wanted, abs=1e-9)
    assert 0 < c[2, 0] < 1


class Shortsighted(FlatIndex):
    """Finds the nearest three of every answer only, as an approximate index may."""

    def search(self, q, k=10):
        scores, ids = super().search(q, k)
        ids[:, 3:] = -1
        return scores, ids


class Blind(FlatIndex):
    def search(self, q, k=10):
        scores, ids = super().search(q, k)
        return scores, np.full_like(ids, -1)


def test_any_index_will_do_and_what_it_misses_is_no_hit():
    queries, gallery, models = made(seed=2), made(32, seed=3), versions()[:2]
    options = {"gallery_mode": "items", "metric": "map"}
    c = compatibility_matrix(models, queries, gallery, index=Shortsighted, **options)
    total = 0.0
    asked, held = models[1](queries[0]), models[0](gallery[0])
    for q, label in zip(asked, queries[1], strict=True):
        cosines = held @ q / np.linalg.norm(held, axis=1)
        right = gallery[1][np.argsort(-cosines)[:3]] == label
        total += sum(right[: p + 1].mean() for p in range(3) if right[p]) / 8  # eight entries of every class
    assert c[1, 0] == pytest.approx(total / len(asked), abs=1e-12) and 0 < c[1, 0] <= 3 / 8
    for metric in ("top1", "map"):
        c = compatibility_matrix(models, queries, gallery, metric=metric, gallery_mode="items", index=Blind)
        assert (c[np.tril_indices(2)] == 0).all()


def test_classes_are_told_apart_by_who_has_seen_them():
    queries, gallery, models = made(seed=2), made(64, seed=3), versions()
    seen = [{0, 1}, {0, 1, 2}, {0, 1, 2}]
    parts = compatibility_by_seen(models, queries, gallery, seen)
    means, classes = zip(*(oracle.class_means(m(gallery[0]), list(gallery[1])) for m in models), strict=True)
    groups = {"seen": lambda a, b, c: c in a and c in b, "partly": lambda a, b, c: (c in a) != (c in b),
              "unseen": lambda a, b, c: c not in a and c not in b}  # fmt: skip
    for name, member in groups.items():
        c = getattr(parts, name)
        for i in range(3):
            for j in range(i + 1):
                rows = [r for r, label in enumerate(queries[1]) if member(seen[i], seen[j], label)]
                if not rows:
                    assert np.isnan(c[i, j])
                    continue
                asked = [queries[1][r] for r in rows]
                wanted = oracle.retrieval(models[i](queries[0][rows]), asked, means[j], classes[j], "top1")
                assert c[i, j] == pytest.approx(wanted, abs=1e-12), (name, i, j)
    assert np.isnan(parts.partly[0, 0]) and not np.isnan(parts.partly[1, 0])
    with pytest.raises(QuernelError, match="one collection of labels a model; got 2 for 3"):
        compatibility_by_seen(models, queries, gallery, seen[:2])


def test_the_gallery_is_embedded_by_its_own_model_once():
    calls = []

    def model(name):
        def embed(x):
            calls.append((name, len(x)))
            return x

        return embed

    compatibility_matrix([model("old"), model("new")], made(8), made(12))
    assert sorted(calls) == [("new", 8), ("new", 12), ("old", 8), ("old", 12)]


def test_modules_are_asked_in_eval_mode_and_keep_their_own():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)).train()
    before = model[0].running_mean.clone()
    x = torch.from_numpy(made()[0])
    rows = features_of(model, x, batch_size=9)
    assert model.training and torch.equal(model[0].running_mean, before)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    model.eval()
    np.testing.assert_allclose(rows, torch.nn.functional.normalize(model(x), dim=1).detach(), atol=1e-6)


def test_what_does_not_fit_is_refused():
    x, y = made()
    for models, queries, gallery, options, message in (
        ([], (x, y), (x, y), {}, "at least one model"),
        ([np.asarray], (x, y + 1), (x, y), {}, r"labels \[4\] that no entry of the gallery has"),
        ([np.asarray], (x, y[:-1]), (x, y), {}, "one integer label a sample"),
        ([np.asarray], (x, y.astype(float)), (x, y), {}, "one integer label a sample"),
        ([np.asarray], x, (x, y), {}, "pair"),
        ([np.asarray, lambda v: v[:, :-1]], (x, y), (x, y), {}, "features of one size; model 1 gives 5, model 0 6"),
        ([lambda v: 0 * v], (x, y), (x, y), {}, "not all zero"),
        ([lambda v: v / 0.0 * 0.0], (x, y), (x, y), {}, "finite"),
        ([lambda v: v[:1]], (x, y), (x, y), {}, r"shape \(n, d\) for 40 samples"),
        ([np.asarray], (x, y), (x, y), {"metric": "recall"}, "metric must be one of"),
        ([np.asarray], (x, y), (x, y), {"gallery_mode": "all"}, "gallery_mode must be one of"),
        ([np.asarray], (x, y), (x, y), {"batch_size": 0}, "batch_size"),
    ):
        with np.errstate(all="ignore"), pytest.raises(QuernelError, match=message):
            compatibility_matrix(models, queries, gallery, **options)
