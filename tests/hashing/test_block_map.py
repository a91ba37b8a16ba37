"""BlockMap: its written definition number by number, even starts, fair signs, and the variance of its sketches."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing import BlockMap, block_map
from quernel.hashing.mixers import mix64_seed
from tests.reference import hashing as oracle

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed
ROBE = {"a": 1_234_567, "b": 7_654_321, "c": 42, "prime": 2038074743}  # the prime of the published code

# dim below, at and above the block; divisors and others.
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60))


def slots_by_definition(table, rows, start_of):
    return [
        [oracle.block_slot(row, column, table.size, table.dim, table.block, start_of)[0] for column in range(table.dim)]
        for row in rows
    ]


def positions_by_definition(table, row):
    return [oracle.block_slot(row, c, table.size, table.dim, table.block, lambda _: 0)[1] for c in range(table.dim)]


@given(sizes=SIZES, seed=st.integers(0, 2**64 - 1), circular=st.booleans(), row=st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(sizes, seed, circular, row):
    dim, block, more = sizes
    table = BlockMap(block + more, dim, block, seed, circular=circular)
    n_starts = table.size if circular else table.size - block + 1
    rows = [row, row + 1, 0]
    wanted = slots_by_definition(table, rows, lambda b: oracle.fastrange(oracle.mix64(seed, b), n_starts))
    assert table.index(np.array(rows)).tolist() == wanted
    signs = [[oracle.sign_at(seed, p) for p in positions_by_definition(table, r)] for r in rows]
    assert table.signs_of(np.array(rows)).tolist() == signs


@pytest.mark.parametrize("circular", [True, False])
@pytest.mark.parametrize(("dim", "block"), [(8, 4), (10, 4), (3, 16), (16, 16), (1, 1)])
def test_the_published_formula(dim, block, circular):
    table = BlockMap.mod_prime(**ROBE, size=1000, dim=dim, block=block, circular=circular)
    n = 1000 if circular else 1000 - block + 1
    per_row = -(-dim // block)

    def start(b):
        # ((A id + B chunk + C) mod P) mod n, reduced once at the end as published.
        return (ROBE["a"] * (b // per_row) + ROBE["b"] * (b % per_row) + ROBE["c"]) % ROBE["prime"] % n

    rows = [0, 1, 99, 10**7]
    assert table.index(np.array(rows)).tolist() == slots_by_definition(table, rows, start)
    assert (table.signs_of(np.array(rows)) == 1).all()


def test_given_starts_and_signs():
    signs = np.where(np.arange(24) % 3, 1, -1)
    table = BlockMap.explicit(np.array([5, 9, 0, 2, 9, 7]), size=10, dim=7, block=4, signs=signs)
    assert table.index(np.array([1])).tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert table.index(np.array([0]))[0, 4:].tolist() == [9, 0, 1]  # wraps
    assert table.signs_of(np.array([1])).tolist() == [signs[8:15].tolist()]


@njit
def jitted(kind, constants, starts, state, positions, block, per_row, slots, signs):
    for i in range(positions.size):
        p = positions[i]
        slots[i] = block_map.start_of_block(kind, constants, starts, p // block, per_row)
        bit = (block_map.sign_word(state, p) >> (p & np.uint64(63))) & np.uint64(1)
        signs[i] = 1 - 2 * np.int64(bit)


@pytest.mark.parametrize("kind", ["mixed", "large", "prime", "given"])
def test_the_jitted_form_is_bit_equal(kind):
    table = {
        "mixed": BlockMap(1000, 10, 4, seed=3),
        "large": BlockMap(2**33, 10, 4, seed=3),  # starts beyond 32 bits take the long product
        "prime": BlockMap.mod_prime(**ROBE, size=1000, dim=10, block=4),
        "given": BlockMap.explicit(np.arange(300) * 3, size=1000, dim=10, block=4),
    }[kind]
    rows = np.arange(100)
    positions = table.positions(rows, 0 * rows)
    slots, signs = np.empty(100, np.uint64), np.empty(100, np.int64)
    state, block, per_row = (np.uint64(v) for v in (mix64_seed(np.uint64(3)), table.block, table.per_row))
    jitted(*table.operands(), state, positions, block, per_row, slots, signs)
    assert slots.tolist() == table.index(rows)[:, 0].tolist()
    if table.signs:
        assert signs.tolist() == table.signs_of(rows)[:, 0].tolist()


@pytest.mark.parametrize("stride", [1, 7, 64, 4096])
def test_starts_are_even(stride):
    # 100 000 rows in the arithmetic progressions that ids come in, over 1000 slots.
    for circular in (True, False):
        table = BlockMap(1000, 8, 8, seed=1, circular=circular)
        starts = table.index(np.arange(100_000) * stride)[:, 0]
        counts = np.bincount(starts, minlength=table.n_starts)
        assert len(counts) == table.n_starts
        assert stats.chisquare(counts).pvalue > FALSE_ALARM / 2


def test_blocks_of_a_row_begin_independently():
    slots = BlockMap(16, 8, 4, seed=2).index(np.arange(64_000))
    counts = np.bincount(slots[:, 0] * 16 + slots[:, 4], minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_signs_are_fair_and_independent():
    # Pairs of positions: neighbours, across words, a word apart; and a sign against its block's start.
    table = BlockMap(8, 130, 2, seed=4)
    rows = np.arange(40_000)
    signs = {c: table.signs_of(rows, np.array(c)) > 0 for c in (0, 1, 2, 62, 64, 65, 129)}
    assert min(stats.binomtest(int(s.sum()), len(rows)).pvalue for s in signs.values()) > FALSE_ALARM / 7
    for a, b in ((0, 1), (0, 2), (62, 65), (0, 64), (1, 129)):
        assert stats.binomtest(int((signs[a] == signs[b]).sum()), len(rows)).pvalue > FALSE_ALARM / 5
    for column in (0, 64):
        cells = np.bincount(table.index(rows, np.array(column)) * 2 + signs[column], minlength=16)
        assert stats.chisquare(cells).pvalue > FALSE_ALARM / 2


def sketched_products(slots, signs, x, y, size):
    """Return <S x, S y> of every row of slots."""
    n = len(slots)
    place = np.arange(n)[:, None] * size + slots
    a, b = (np.bincount(place.ravel(), (signs * v).ravel(), n * size).reshape(n, size) for v in (x, y))
    return (a * b).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 4, 8, 16, 40])
def test_variance_of_the_sketched_product(block):
    # Each of 90 000 rows is a draw of its own. The variance of that many estimates is known to 0.9 % (kurtosis about
    # 8), so 5 % is more than five standard errors (false alarm 4e-8), the mean 5 of its own (6e-7).
    n, m, draws = 96, 48, 90_000
    draw = np.random.default_rng(0)
    x, y = draw.standard_normal((2, n))
    table = BlockMap(m, n, block, seed=5)
    parts = [np.arange(start, start + 10_000) for start in range(0, draws, 10_000)]
    estimates = np.concatenate([sketched_products(table.index(r), table.signs_of(r), x, y, m) for r in parts])
    of_pair = np.outer(x**2, y**2) + np.outer(x * y, x * y)
    apart = np.arange(n)[:, None] // block != np.arange(n) // block
    variance = of_pair[apart].sum() / m
    assert abs(estimates.mean() - x @ y) < 5 * np.sqrt(variance / draws)
    assert abs(estimates.var() / variance - 1) < 0.05


@pytest.mark.slow
def test_bias_without_signs():
    # (1/m) sum over pairs in different blocks of x_i y_j; 50 000 draws, 5 standard errors.
    n, m, block, draws = 24, 16, 4, 50_000
    x, y = np.abs(np.random.default_rng(1).standard_normal((2, n)))
    slots = BlockMap(m, n, block, seed=6, signs=False).index(np.arange(draws))
    estimates = sketched_products(slots, np.ones_like(slots), x, y, m)
    apart = np.arange(n)[:, None] // block != np.arange(n) // block
    bias = np.outer(x, y)[apart].sum() / m
    assert abs(estimates.mean() - x @ y - bias) < 5 * estimates.std() / np.sqrt(draws)


def test_config_round_trip():
    for table in (
        BlockMap(100, 6, 4, 2**64 - 1, signs=False, circular=False),
        BlockMap.mod_prime(**ROBE, size=99, dim=8, block=4),
    ):
        twin = BlockMap.from_config(table.config())
        rows = np.arange(50)
        np.testing.assert_array_equal(twin.index(rows), table.index(rows))
        np.testing.assert_array_equal(twin.signs_of(rows), table.signs_of(rows))
        for field in table.config().keys() - {"hash"}:
            with pytest.raises(QuernelError, match=f"must have the fields.*; it lacks {field}"):
                BlockMap.from_config({k: v for k, v in table.config().items() if k != field})
        # Descriptions of earlier versions name no hash: they mean the first.
        old = {k: v for k, v in table.config().items() if k != "hash"}
        assert BlockMap.from_config(old).config() == table.config()
        with pytest.raises(QuernelError, match="hash must be at most 1, the newest known here; got 2"):
            BlockMap.from_config(old | {"hash": 2})
    with pytest.raises(QuernelError, match="cannot be written as JSON"):
        BlockMap.explicit(np.zeros(2, int), 4, 4, 2).config()


def test_sizes_from_numpy_are_written_as_json():
    table = BlockMap(np.int64(100), np.int32(6), np.int64(4), np.uint64(2**64 - 1))
    assert json.loads(json.dumps(table.config())) == BlockMap(100, 6, 4, 2**64 - 1).config()
    prime = BlockMap.mod_prime(*np.array([11, 7, 3, 101]), 99, 8, 4)
    assert json.loads(json.dumps(prime.config())) == BlockMap.mod_prime(11, 7, 3, 101, 99, 8, 4).config()


def test_pairs_broadcast_and_no_rows_are_fine():
    table = BlockMap(100, 6, 4, seed=1)
    whole = table.index(np.arange(5))
    assert table.index(np.arange(5)[:, None], np.arange(6)).tolist() == whole.tolist()
    assert table.index(3, 2).tolist() == whole[3, 2]
    assert table.index(np.zeros(0, int)).shape == table.signs_of(np.zeros(0, int)).shape == (0, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMap(0, 4, 1), "size must be an integer"),
        (lambda: BlockMap(10, 0, 1), "dim must be an integer"),
        (lambda: BlockMap(10, 4, 0), "block must be an integer"),
        (lambda: BlockMap(3, 4, 4), "size must be at least block=4; got 3"),
        (lambda: BlockMap(10, 4, 4, 2**64), "seed must fit 64 bits"),
        (lambda: BlockMap(10, 4, 4, 1.5), "seed must be an integer"),
        (lambda: BlockMap(10, 4, 4, signs=1), "signs must be bool"),
        (lambda: BlockMap(10, 4, 4, circular=None), "circular must be bool"),
        (lambda: BlockMap.mod_prime(1, 1, 0, 2**40 + 15, 10, 4, 4), "prime must be an integer in"),
        (lambda: BlockMap.mod_prime(1, 1, 0, 101, 3, 4, 4), "size must be an integer in"),
        (lambda: BlockMap.explicit(np.array([0, 10]), 10, 4, 4), r"starts must be one integer a block in \[0, 10\)"),
        (lambda: BlockMap.explicit(np.array([0.5]), 10, 4, 4), "starts must be integers; got float64"),
        (lambda: BlockMap.explicit(np.array([0]), 10, 4, 4, signs=np.array([0, 1])), r"signs must be \+1 or -1"),
        (lambda: BlockMap(10, 4, 4).index(np.zeros(2)), "rows must be an integer"),
    ],
)
def test_errors(make, message):
    with pytest.raises(QuernelError, match=message):
        make()
