"""MaxIPIndex: buckets by the definition, probes in order, recall, centring, crowded buckets, files."""

import numpy as np
import pytest

from quernel._errors import FormatError, QuernelError
from quernel._timing import threads
from quernel.hashing import SignProjection, sphere_items
from quernel.search import FlatIndex, Index, MaxIPIndex
from quernel.search._max_ip_kernels import probe_masks


def clusters(n=3000, d=16, seed=0, shift=0.0):
    draw = np.random.default_rng(seed)
    centers = draw.standard_normal((40, d))
    return (centers[draw.integers(0, 40, n)] + 0.5 * draw.standard_normal((n, d)) + shift).astype(np.float32)


def found_by_definition(index, items, query, bits, cap=10**9):
    """Return the slots that the probed buckets hold, from codes, in plain loops."""
    family = SignProjection(index.dim + 1, index.n_tables, bits, seed=index.seed)
    moved = items.astype(float) - (items.mean(0, dtype=float) if index.center else 0)
    codes = family.codes(sphere_items(moved)[:, :-1])
    margins = family.margins(np.append(query / np.linalg.norm(query), 0.0))[0]
    found = set()
    for table in range(index.n_tables):
        own = sum(1 << b for b in range(bits) if margins[table, b] >= 0)
        order = np.argsort(np.abs(margins[table]))
        for mask in probe_masks(bits, index.probes):
            flips = sum(1 << int(order[r]) for r in range(bits) if mask >> r & 1)
            bucket = np.flatnonzero(codes[:, table] == own ^ flips)
            spare = max(0, len(bucket) - cap)
            first = spare * table // max(index.n_tables - 1, 1)
            found |= set(bucket[first : first + cap].tolist())
    return found


@pytest.mark.parametrize("options", [{}, {"center": False}, {"max_bucket": 3}, {"probes": 1}, {"n_tables": 1}])
def test_what_is_found_is_what_the_buckets_hold(options):
    items = clusters(300, 6)
    index = MaxIPIndex(6, **{"n_tables": 4, "bits": 5, "probes": 4, "seed": 3, **options}).add(items)
    for query in np.random.default_rng(1).standard_normal((10, 6)).astype(np.float32):
        ids = index.search(query, 300)[1][0]
        wanted = found_by_definition(index, items, query, 5, index.max_bucket)
        assert set(ids[ids >= 0].tolist()) == wanted


def test_probes_come_in_the_order_of_their_cost():
    assert probe_masks(6, 1).tolist() == [0]
    masks = probe_masks(12, 4096)
    assert sorted(masks.tolist()) == list(range(4096))
    assert masks[:3].tolist() == [0, 1, 2]
    # A superset never comes before its subset.
    place = np.argsort(masks)
    assert all(place[m] > place[m & ~(1 << r)] for m in range(4096) for r in range(12) if m >> r & 1)
    assert probe_masks(2, 100).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_recall(shift):
    # A shift of all items changes no order; without centring it would put all of them into one bucket.
    items = clusters(5000, shift=shift)
    queries = np.random.default_rng(1).standard_normal((200, 16)).astype(np.float32)
    wanted = FlatIndex(16, "ip").add(items).search(queries, 1)
    scores, ids = MaxIPIndex(16).add(items).search(queries, 1)
    assert (ids == wanted[1]).mean() > 0.95
    spread = items @ queries.T
    regret = (wanted[0][:, 0] - scores[:, 0]) / (spread.max(0) - spread.mean(0))
    assert regret.max() < 0.3


def test_scores_are_exact():
    items = clusters()
    queries = items[:20] * 3
    scores, ids = MaxIPIndex(16).add(items).search(queries, 5)
    exact = np.einsum("qkd,qd->qk", items[ids].astype(float), queries.astype(float))
    np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-4)


def test_norms_matter():
    # The longest item wins over the best aligned one.
    items = np.concatenate([clusters(500, 8), 100 * np.ones((1, 8), np.float32)])
    query = np.ones(8) + np.arange(8) * 0.05
    assert MaxIPIndex(8).add(items).best(query)[0] == 500


def test_best_is_the_first_of_search():
    items = clusters()
    index = MaxIPIndex(16, seed=2).add(items, ids=np.arange(3000) * 2 + 1)
    for query in items[:20]:
        scores, ids = index.search(query, 1)
        assert index.best(query.astype(float)) == (int(ids[0, 0]), float(scores[0, 0]))
    empty = MaxIPIndex(4).best(np.ones(4))
    assert empty[0] == -1 and np.isnan(empty[1])
    with pytest.raises(QuernelError, match=r"q must have shape \(n, 16\)"):
        index.best(np.ones(3))


def test_any_number_of_threads_gives_the_same():
    items = clusters()
    answers = []
    for n in (1, 2):
        with threads(n):
            answers.append(MaxIPIndex(16).add(items).search(items[:101], 7))
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_crowded_buckets_are_bounded_and_do_not_hide_others():
    # 20 001 items of one direction fill the same buckets: a query near them must not score them all, and must find the
    # best of the others, whose buckets it asks next.
    crowd = np.tile(clusters(1, 8), (20_000, 1))
    items = np.concatenate([crowd[:10_000], crowd[:1] * 1.01, crowd[10_000:], clusters(500, 8, seed=1)])
    index = MaxIPIndex(8, bits=8, max_bucket=600, center=False).add(items)
    ids = index.search(crowd[0], 20_501)[1][0]
    # A window of the cap in each of 32 tables.
    assert 600 <= (ids[ids >= 0] <= 20_000).sum() <= 32 * 600 < 20_001
    others = ids[ids > 20_000]
    assert others[0] == 20_001 + int((items[20_001:] @ crowd[0]).argmax())
    # Every table takes another stretch: together they reach the best item, which stands in the middle.
    index = MaxIPIndex(8, bits=8, max_bucket=6000, center=False).add(items)
    ids = index.search(crowd[0], 20_501)[1][0]
    assert ids[0] == 10_000 and (ids[ids >= 0] <= 20_000).sum() < 20_001


def test_a_query_of_zeros_has_some_answer():
    index = MaxIPIndex(16).add(clusters())
    scores, ids = index.search(np.zeros(16), 3)
    assert scores.shape == (1, 3) and (scores[ids >= 0] == 0).all()


def test_equal_items_and_one_item():
    assert MaxIPIndex(3).add(np.ones((5, 3))).search(np.ones(3), 5)[1].tolist() == [[0, 1, 2, 3, 4]]
    assert MaxIPIndex(3).add(np.ones((1, 3))).best(-np.ones(3)) == (0, -3.0)


def test_bits_grow_with_the_items():
    sizes = {n: MaxIPIndex(4).add(clusters(n, 4))._tables().bits for n in (1, 100, 3000, 30_000)}
    assert sizes == {1: 1, 100: 2, 3000: 7, 30_000: 10}


def test_the_tables_are_saved(tmp_path):
    index = MaxIPIndex(16, n_tables=8).add(clusters())
    assert index.nbytes == 3000 * (8 + 1 + 64 + 8 * 4) + 8 * (8 * 2**7 + 1)
    loaded = Index.load(index.save(tmp_path))
    assert loaded._built is not None
    np.testing.assert_array_equal(loaded._tables().items, index._tables().items)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.items.__setitem__(3, 3000), "array 'items' names vectors that are not there"),
        (lambda t: t.items.__setitem__(3, -1), "array 'items' names vectors"),
        (lambda t: t.offsets.__setitem__(3, 10**6), "array 'offsets' does not divide array 'items'"),
        (lambda t: t.offsets.__setitem__(0, -1), "array 'offsets' does not divide"),
    ],
)
def test_lying_tables_are_refused(tmp_path, spoil, message):
    index = MaxIPIndex(16).add(clusters())
    spoil(index._tables())
    with pytest.raises(FormatError, match=message):
        Index.load(index.save(tmp_path))


@pytest.mark.parametrize("arguments", [{"n_tables": 31}, {"bits": 3}])
def test_tables_of_another_shape_are_refused(arguments):
    arrays = MaxIPIndex(16).add(clusters())._all_arrays()
    other = MaxIPIndex(16, **arguments)
    other._ids.append(np.arange(3000))
    with pytest.raises(FormatError, match=r"array 'items' must be|array 'offsets' has"):
        other._restore({k: v for k, v in arrays.items() if k not in ("ids", "alive")})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be"),
        ({"n_tables": 0}, "n_tables must be"),
        ({"bits": 25}, "bits must be"),
        ({"probes": 0}, "probes must be"),
        ({"probes": 5000}, "probes must be"),
        ({"center": 1}, "center must be bool"),
        ({"max_bucket": 0}, "max_bucket must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(QuernelError, match=message):
        MaxIPIndex(**{"dim": 4, **arguments})
