"""Prefix panels and vector rows against sorting: ties, deleted items, pieces, guesses that fail, stored dtypes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel._errors import QuernelError
from quernel.search import _prefixes as prefixes
from quernel.search._panel_kernels import PANEL, scan_panels
from quernel.search._prefixes import PrefixPanels, VectorRows, encoded

DTYPES = ("float32", "float16", "int8")
# float32 sums in another order.
SAME = 1e-5


def grid(n, width, seed):
    """Vectors of few distinct directions, so that ties are common."""
    return np.random.default_rng(seed).integers(-1, 2, (n, width)).astype(np.float32)


def decoded(panels):
    """What the panels hold, (N, width), the way a reader of the format would take it out."""
    held = panels.arrays()
    rows = held["prefixes"].transpose(0, 2, 1).reshape(-1, panels.width)[: panels._n].astype(np.float32)
    return rows * held["prefix_scales"][:, None] if "prefix_scales" in held else rows


def by_sorting(items, query, k, alive):
    """The k best as sums over the coordinates in order, one after the other, in float32 with one rounding each."""
    scores = np.zeros(len(items), np.float64)
    for c in range(items.shape[1]):
        scores = (scores + items[:, c].astype(np.float64) * float(query[c])).astype(np.float32).astype(np.float64)
    order = np.lexsort((np.arange(len(items)), -scores))
    return [int(i) for i in order if alive[i]][:k], scores


@given(
    n=st.integers(0, 200),
    width=st.integers(1, 9),
    k=st.integers(1, 12),
    queries=st.integers(0, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_scan_equals_a_stable_sort(n, width, k, queries, seed):
    items, asked = grid(n, width, seed), grid(queries, width + 2, seed + 1)
    alive = np.random.default_rng(seed).random(n) < 0.8
    panels = PrefixPanels(width, "float32")
    for part in np.array_split(items, 3):
        panels.append(part)
    scores, slots = panels.top_k(asked, k, alive)
    unsorted = panels.shortlist(asked, k, alive)
    for i, query in enumerate(asked):
        wanted, exact = by_sorting(decoded(panels), query, k, alive)
        assert slots[i].tolist() == wanted + [-1] * (k - len(wanted))
        np.testing.assert_allclose(scores[i, : len(wanted)], exact[wanted], rtol=SAME, atol=SAME)
        assert np.isnan(scores[i, len(wanted) :]).all()
        assert sorted(unsorted[i].tolist()) == sorted(slots[i].tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["as drawn", "ascending", "descending", "clustered"])
def test_guesses_change_nothing(dtype, order, monkeypatch):
    draw = np.random.default_rng(0)
    items, asked = (draw.standard_normal((n, 6)).astype(np.float32) for n in (6000, 5))
    along = items @ asked[0] / np.linalg.norm(items, axis=1)
    if order == "clustered":
        # The best of one query all in panels that are sampled: the guess is too high, and too few pass it.
        best = np.argsort(-along)
        sampled = np.concatenate([np.arange(p, p + PANEL) for p in range(0, 6000, 16 * PANEL)])
        sampled = sampled[sampled < 6000]
        places = np.concatenate([sampled, np.setdiff1d(np.arange(6000), sampled)])
        moved = np.empty_like(items)
        moved[places] = items[best]
        items = moved
    elif order != "as drawn":
        items = items[np.argsort(along if order == "ascending" else -along)]
    alive = draw.random(6000) < 0.9
    panels = PrefixPanels(6, dtype)
    panels.append(items)
    guessed = panels.top_k(asked, 20, alive)
    monkeypatch.setattr(prefixes, "_SPARE", 10**9)
    plain = panels.top_k(asked, 20, alive)
    for got, wanted in zip(guessed, plain, strict=True):
        np.testing.assert_array_equal(got, wanted)
    exact = decoded(panels) @ asked.T
    for i in range(5):
        assert set(plain[1][i]) <= set(np.flatnonzero(alive))
        np.testing.assert_allclose(plain[0][i], np.sort(exact[alive, i])[::-1][:20], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_are_the_same_panels(dtype):
    items = np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32)
    whole, pieces = PrefixPanels(4, dtype), PrefixPanels(4, dtype)
    whole.append(items)
    for start, stop in ((0, 1), (1, 64), (64, 64), (64, 130), (130, 300)):
        pieces.append(items[start:stop])
    for name, array in whole.arrays().items():
        np.testing.assert_array_equal(array, pieces.arrays()[name])
    error = {"float32": 1e-6, "float16": 2.0**-11, "int8": 0.51 / 127}[dtype]
    unit = items[:, :4] / np.linalg.norm(items[:, :4], axis=1, keepdims=True)
    np.testing.assert_allclose(decoded(whole), unit, atol=error)


def test_every_finite_half_is_read_as_it_is():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    panels = halves.view(np.uint16).reshape(-1, 1, PANEL)
    n = len(halves)
    keys, held = np.zeros((1, n + PANEL), np.int64), np.zeros(1, np.int64)
    one, bars = np.ones((1, 1), np.float32), np.full(1, -np.inf, np.float32)
    scan_panels(one, panels, 1, np.zeros(0, np.float32), 0, np.ones(n, bool), n, keys, held, bars)
    from quernel.search._best_keys import sorted_best

    scores, slots = np.empty((1, n), np.float32), np.empty((1, n), np.int64)
    sorted_best(keys, held, scores, slots)
    np.testing.assert_array_equal(scores[0], halves[slots[0]].astype(np.float32))
    assert sorted(slots[0].tolist()) == list(range(n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_scored_as_they_are_stored(dtype, monkeypatch):
    monkeypatch.setattr(prefixes, "_DECODED", 100)
    draw = np.random.default_rng(0)
    items, asked = (draw.standard_normal((n, 7)).astype(np.float32) for n in (50, 6))
    rows = VectorRows(7, dtype)
    rows.append(items[:20])
    rows.append(items[20:])
    slots = np.stack([draw.permutation(50)[:9] for _ in range(6)])
    slots[:, 4] = -1
    scores, best = rows.rerank(asked, slots, 3, 5, unit=True)
    stored = rows.vectors().astype(np.float64)[:, :5]
    for i in range(6):
        mine = slots[i][slots[i] >= 0]
        exact = stored[mine] @ asked[i, :5] / np.linalg.norm(stored[mine], axis=1)
        order = np.argsort(-exact)[:3]
        assert best[i].tolist() == mine[order].tolist()
        np.testing.assert_allclose(scores[i], exact[order], rtol=SAME)


def test_numbers_beyond_float16_are_refused_before_anything_is_stored():
    rows = VectorRows(2, "float16")
    with pytest.raises(QuernelError, match="x must be within 65504 to be stored as float16; got 70000"):
        rows.append(np.array([[1.0, 7e4]], np.float32))
    assert len(rows.vectors()) == 0
    assert encoded(np.zeros((1, 2), np.float32), "int8")[1].tolist() == [1.0]
