"""Plans of neighborhood attention: their tiles hold exactly the pairs of the mask, each row once, few masks for all."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quernel.nn import _neighborhood_plan as plans
from quernel.nn._neighborhood_plan import Axis, NeighborhoodPlan, Tiles, axes_of, box_of
from tests.reference import neighborhood_attention as reference

# shape, window, stride, dilation, causal
CASES: list[tuple[Any, ...]] = [
    ((11,), (4,), (1,), (1,), (False,)),
    ((13,), (3,), (2,), (3,), (False,)),
    ((13,), (5,), (3,), (2,), (True,)),
    ((7, 9), (3, 4), (1, 2), (2, 1), (False, False)),
    ((5, 6), (2, 3), (2, 1), (1, 2), (True, False)),
    ((4, 5, 3), (2, 3, 3), (1, 2, 1), (2, 1, 1), (False, True, False)),
]


def pairs(tiles: Tiles, rows: int, columns: int) -> np.ndarray:
    """Return how often each row of the lanes meets each row of the halos, (rows, columns)."""
    met = np.zeros((rows, columns), int)
    halos = tiles.halos(slice(None), torch.device("cpu")).numpy()
    assert halos.min() >= 0 and halos.max() < columns
    for lanes, halo, kind in zip(tiles.lanes, halos, tiles.kinds, strict=True):
        where = np.argwhere(tiles.masks[kind])
        np.add.at(met, (lanes[where[:, 0]], halo[where[:, 1]]), 1)
    return met


def packed_pairs(tiles: Tiles, rows: int, columns: int) -> np.ndarray:
    """Return the same as compiled kernels read it."""
    lanes, origins, kinds, offsets, bits, counts, real = tiles.packed
    met = np.zeros((rows, columns), int)
    for tile, kind in enumerate(kinds):
        count, moved = counts[kind]
        assert count % plans.ROWS == 0
        halo = offsets[kind, :count] + np.where(np.arange(count) < moved, origins[tile], 0)
        for place, lane in itertools.product(range(count), range(lanes.shape[1])):
            if bits[kind, place] >> lane & 1:
                assert real[kind] >> lane & 1
                met[lanes[tile, lane], halo[place]] += 1
    return met


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("extra", [0, 3, 20])
def test_tiles_hold_each_pair_once(case: tuple[Any, ...], extra: int) -> None:
    plan = NeighborhoodPlan.of(*case, extra=extra)
    seen = reference.mask(*case).numpy().astype(int)
    n = len(seen)
    seen = np.concatenate([seen, np.ones((n, extra), int)], 1)
    for count in (pairs, packed_pairs):
        np.testing.assert_array_equal(count(plan.queries, n, n + extra), seen)
        by_key = sum(count(tiles, n + extra, n) for tiles in plan.keys)
        np.testing.assert_array_equal(by_key, seen.T)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_home_is_where_each_row_stands_once(case: tuple[Any, ...]) -> None:
    plan = NeighborhoodPlan.of(*case, extra=5)
    np.testing.assert_array_equal(plan.queries.lanes.flat[plan.queries.home], np.arange(plan.tokens))
    rows = np.concatenate([tiles.lanes.flat[tiles.home] for tiles in plan.keys])
    np.testing.assert_array_equal(rows, np.arange(plan.tokens + 5))


@given(st.data())
def test_who_sees_a_place_is_a_range(data: st.DataObject) -> None:
    window, dilation, causal = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)), data.draw(st.booleans())
    axis = Axis(
        window * dilation + data.draw(st.integers(0, 20)), window, data.draw(st.integers(1, window)), dilation, causal
    )
    for residue in range(dilation):
        first, last = axis.seen(residue)
        t = np.arange(len(first))
        mask = (t >= first[:, None]) & (t <= last[:, None])
        assert mask.diagonal().all(), "every token sees itself"
        first, last = axis.seen_by(residue)
        np.testing.assert_array_equal(mask.T, (t >= first[:, None]) & (t <= last[:, None]))


def test_interior_tiles_share_one_mask() -> None:
    plan = NeighborhoodPlan.of((64, 64), (7, 7), tile=(4, 4))
    # Those at both ends of an axis see all of their halo, those between are alike.
    assert len(plan.queries.masks) == 4 and plan.queries.halo == 100
    assert np.bincount(plan.queries.kinds).max() == 14 * 14


def test_residues_of_two_lengths_have_windows_of_their_own() -> None:
    first, last = zip(*(Axis(8, 2, dilation=3).seen(residue) for residue in range(3)), strict=True)
    assert [len(x) for x in first] == [3, 3, 2]
    assert [x.tolist() for x in last] == [[1, 1, 2], [1, 1, 2], [1, 1]]


@pytest.mark.parametrize(
    ("shape", "window", "box"),
    [((64,), (5,), (16,)), ((64, 64), (7, 7), (4, 4)), ((8, 64), (8, 7), (8, 2)), ((8, 28, 28), (3, 7, 7), (1, 4, 4))],
)
def test_the_box_reads_the_fewest_rows(shape: Any, window: Any, box: Any) -> None:
    ones = (1,) * len(shape)
    axes = axes_of(shape, window, ones, ones, (False,) * len(shape))

    def rows(tile: tuple[int, ...]) -> int:
        plan = NeighborhoodPlan(shape, window, ones, ones, (False,) * len(shape), tile)
        tiles = (plan.queries, *plan.keys)
        return sum(int(t.masks.any(1).sum(1)[t.kinds].sum()) for t in tiles)

    assert rows(box_of(axes, 16)) <= rows(box)


def test_tables_grow_with_tokens_and_not_with_windows() -> None:
    tables = NeighborhoodPlan.of((2**14,), (1024,)).queries.packed
    # Three numbers a token; a row of the halo is told once a kind of tile.
    assert sum(table.nbytes for table in tables) < 16 * 2**14


def test_plans_and_tables_are_kept() -> None:
    plan = NeighborhoodPlan.of([9, 9], [3, 3])
    assert NeighborhoodPlan.of((9, 9), (3, 3), (1, 1), (1, 1), (False, False)) is plan
    assert NeighborhoodPlan.of((9, 9), (3, 3), tile=64) is not plan
    held = plan.queries.on(torch.device("cpu"))
    assert plan.queries.on(torch.device("cpu")) is held and held["offsets"].dtype is torch.int64
    with torch.inference_mode():
        other = NeighborhoodPlan.of((9, 8), (3, 3)).queries.on(torch.device("cpu"))
    assert not any(tensor.is_inference() for tensor in other.values())
