"""TileMap: its written definition weight by weight, even starts, fair signs, and the variance of its sketches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing import TileMap, tile_map
from quernel.hashing.mixers import mix64_seed
from tests.reference import hashing as oracle

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed
SMALL = st.integers(1, 12)


@given(
    shape=st.tuples(SMALL, SMALL),
    tile=st.tuples(SMALL, SMALL),
    more=st.integers(0, 50),
    seed=st.integers(0, 2**64 - 1),
    order=st.sampled_from(["n-major", "k-major"]),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(shape, tile, more, seed, order):
    tiles = TileMap(tile[0] * tile[1] + more, shape, tile, seed, order=order)

    def start(a, b):
        return oracle.fastrange(oracle.mix64(seed, a, b), more + 1)

    slots, signs = tiles.index().tolist(), tiles.signs_of().tolist()
    for n in range(shape[0]):
        for k in range(shape[1]):
            slot, position = oracle.tile_slot(n, k, shape, tile, order, start)
            assert slots[n][k] == slot < tiles.size
            assert signs[n][k] == oracle.sign_at(seed, position)


@pytest.mark.parametrize("order", ["n-major", "k-major"])
def test_given_starts_and_signs(order):
    starts = np.array([[0, 3], [7, 1]])
    signs = np.where(np.arange(15).reshape(3, 5) % 2, 1, -1)
    tiles = TileMap.explicit(starts, 15, (3, 5), (2, 4), order=order, signs=signs)
    for n in range(3):
        for k in range(5):
            wanted = oracle.tile_slot(n, k, (3, 5), (2, 4), order, lambda a, b: int(starts[a, b]))[0]
            assert tiles.index()[n, k] == wanted
    np.testing.assert_array_equal(tiles.signs_of(), signs)


@njit
def jitted(state, n_starts, out):
    for a in range(out.shape[0]):
        for b in range(out.shape[1]):
            out[a, b] = tile_map.start_of_tile(state, n_starts, np.uint64(a), np.uint64(b))


@pytest.mark.parametrize("size", [100, 2**34])
def test_the_jitted_form_is_bit_equal(size):
    tiles = TileMap(size, (50, 30), (4, 4), seed=9)
    out = np.empty(tiles.grid, np.uint64)
    jitted(np.uint64(mix64_seed(np.uint64(9))), np.uint64(tiles.n_starts), out)
    assert out.tolist() == tiles.tile_starts().tolist()


def test_starts_are_even_along_both_axes():
    # 1200 starts over 90 000 tiles; then pairs of neighbours in 16 x 16 cells, along rows and along columns.
    starts = TileMap(1203, (300, 300 * 4), (1, 4), seed=1).tile_starts()
    assert stats.chisquare(np.bincount(starts.ravel(), minlength=1200)).pvalue > FALSE_ALARM / 3
    coarse = starts * 16 // 1200
    for one, other in ((coarse[:, :-1:2], coarse[:, 1::2]), (coarse[:-1:2], coarse[1::2])):
        counts = np.bincount((one * 16 + other).ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > FALSE_ALARM / 3


def test_layers_with_other_seeds_are_independent():
    one, other = (TileMap(31, (200, 200), (4, 4), seed=s).tile_starts() for s in (0, 1))
    counts = np.bincount((one * 16 + other).ravel(), minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_signs_are_fair_and_independent_of_starts():
    tiles = TileMap(11, (400, 400), (2, 2), seed=3)
    signs = tiles.signs_of() > 0
    assert stats.binomtest(int(signs.sum()), signs.size).pvalue > FALSE_ALARM / 4
    for a, b in ((signs[:, ::2], signs[:, 1::2]), (signs[::2], signs[1::2])):
        assert stats.binomtest(int((a == b).sum()), a.size).pvalue > FALSE_ALARM / 4
    counts = np.bincount((tiles.tile_starts() * 2 + signs[::2, ::2]).ravel(), minlength=16)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM / 4


@pytest.mark.slow
@pytest.mark.parametrize("order", ["n-major", "k-major"])
def test_variance_of_the_sketched_product(order):
    # A tall matrix of 60 000 x 8 tiles: each eight are a draw. The variance is known to about 1 %, so 5 % is five
    # standard errors (false alarm 6e-7). Pairs of one tile never collide; a pair at places p, q of different tiles has
    # weight max(0, w - |p - q|) / w^2, w = m - T + 1.
    area, m, per_draw, draws = 16, 40, 8, 60_000
    n, w = area * per_draw, m - area + 1
    x, y = np.random.default_rng(2).standard_normal((2, n))
    tiles = TileMap(m, (4 * per_draw * draws, 4), (4, 4), seed=4, order=order)
    slots, signs = (v.reshape(draws, n) for v in (tiles.index(), tiles.signs_of()))
    place = np.arange(draws)[:, None] * m + slots
    a, b = (np.bincount(place.ravel(), (signs * v).ravel(), draws * m).reshape(draws, m) for v in (x, y))
    estimates = (a * b).sum(1)
    i, j = np.divmod(np.arange(n) % area, 4)
    p = i * 4 + j if order == "n-major" else j * 4 + i
    weight = np.maximum(0, w - np.abs(p[:, None] - p)) / w**2
    apart = np.arange(n)[:, None] // area != np.arange(n) // area
    variance = ((np.outer(x**2, y**2) + np.outer(x * y, x * y)) * weight)[apart].sum()
    assert abs(estimates.mean() - x @ y) < 5 * np.sqrt(variance / draws)
    assert abs(estimates.var() / variance - 1) < 0.05


def test_config_round_trip():
    tiles = TileMap(99, (7, 9), (3, 4), 2**63, signs=False, order="k-major")
    twin = TileMap.from_config(tiles.config())
    np.testing.assert_array_equal(twin.index(), tiles.index())
    assert twin.config() == tiles.config() and (twin.signs_of() == 1).all()
    for field in tiles.config().keys() - {"hash"}:
        with pytest.raises(QuernelError, match=f"must have the fields.*; it lacks {field}"):
            TileMap.from_config({k: v for k, v in tiles.config().items() if k != field})
    old = {k: v for k, v in tiles.config().items() if k != "hash"}
    assert TileMap.from_config(old).config() == tiles.config()
    with pytest.raises(QuernelError, match="hash must be at most 1, the newest known here; got 2"):
        TileMap.from_config(old | {"hash": 2})
    small = TileMap(np.int64(99), (np.int64(7), 9), (3, np.int32(4)), np.uint64(2**63), signs=False, order="k-major")
    assert json.loads(json.dumps(small.config())) == tiles.config()
    with pytest.raises(QuernelError, match="cannot be written as JSON"):
        TileMap.explicit(np.zeros((1, 1), int), 9, (2, 2), (2, 2)).config()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TileMap(0, (2, 2)), "size must be an integer"),
        (lambda: TileMap(9, (2, 0)), r"shape\[1\] must be an integer"),
        (lambda: TileMap(9, 4), "shape must be two integers; got 4"),
        (lambda: TileMap(9, (2, 2), (1, 2, 3)), "tile must be two integers"),
        (lambda: TileMap(9, (2, 2)), r"size must be at least 1024, the numbers of a tile \(32, 32\); got 9. Take"),
        (lambda: TileMap(9, (2, 2), (2, 2), order="rows"), "order must be one of"),
        (lambda: TileMap(9, (2, 2), (2, 2), signs=0), "signs must be bool"),
        (lambda: TileMap(9, (2, 2), (2, 2), -(2**63) - 1), "seed must fit 64 bits"),
        (lambda: TileMap.explicit(np.zeros((2, 1), int), 9, (2, 2), (2, 2)), r"starts must have shape \(1, 1\)"),
        (lambda: TileMap.explicit(np.array([[6]]), 9, (2, 2), (2, 2)), r"values in \[0, 5\]"),
        (lambda: TileMap.explicit(np.array([[0.2]]), 9, (2, 2), (2, 2)), "starts must be integers"),
        (
            lambda: TileMap.explicit(np.array([[0]]), 9, (2, 2), (2, 2), signs=np.zeros((2, 2))),
            r"signs must be \+1 or -1 of shape \(2, 2\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(QuernelError, match=message):
        make()
