"""PairTable: ordered pairs, uniform loads, partial collisions, storages, and messages that carry the numbers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.nn import PairConnect, PairTable, RobeArray
from quernel.nn._pair_ops import pair_rows
from tests.reference import pairconnect as oracle

# Each statistical test may fail by chance once in a million runs; seeds are fixed.
FALSE_ALARM = 1e-6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(table: PairTable, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the table row of each hash function for pairs, (n, hashes)."""
    both = torch.stack([u, v], dim=1)
    found = pair_rows(both, table.layout(window=2, causal=False), table.n_rows * table.n_hashes)[:, 0, :, 0]
    return found // table.n_hashes


def test_rows_are_the_definition() -> None:
    table = PairTable(50, 8, seed=-5, vocab=12, generator=seeded())
    options = {"relative": "gain", "buckets": 1, "direct": False, "seed": -5, "n_rows": 50, "n_hashes": 2}
    weight = table.weight.detach().reshape(50, 2, 4)
    for u, v in [(0, 0), (3, 7), (7, 3), (11, 11)]:
        first, second = oracle.rows_of(u, v, 0, options)
        wanted = torch.cat([weight[first, 0], weight[second, 1]])
        assert torch.equal(table(torch.tensor([u]), torch.tensor([v]))[0], wanted)
    direct = PairTable(12**2, 8, direct=True, vocab=12, generator=seeded())
    assert torch.equal(direct(torch.tensor([[3]]), torch.tensor([[7]]))[0, 0], direct.weight[3 * 12 + 7])


def test_order_matters_and_equal_ids_are_spread() -> None:
    table, n = PairTable(10**6, 4, vocab=2000), torch.arange(2000)
    one, other = rows_of(table, n[:-1], n[1:]), rows_of(table, n[1:], n[:-1])
    # Rows of 1,999 pairs agree with those of the turned pairs by chance with a probability of 1e-12 each.
    assert not bool((one == other).all(1).any())
    same = rows_of(table, n, n)  # under an exclusive or, all would share a row
    assert len(same[:, 0].unique()) > 1990


@pytest.mark.parametrize("seed", [0, 1])
def test_row_loads_are_uniform(seed: int) -> None:
    # 250,000 pairs in 1,000 rows, for both hash functions and every pair of ids below 500: chi-squared.
    table = PairTable(1000, 4, vocab=500, seed=seed)
    u, v = torch.meshgrid(torch.arange(500), torch.arange(500), indexing="ij")
    rows = rows_of(table, u.reshape(-1), v.reshape(-1))
    for c in range(2):
        loads = np.bincount(rows[:, c], minlength=1000)
        assert stats.chisquare(loads).pvalue > FALSE_ALARM


def test_both_chunks_collide_m_times_less_often() -> None:
    # 4,000 pairs make 8 million couples; one hash collides with 1 / 200, both with 1 / 40,000.
    table, draw = PairTable(200, 4, vocab=10**6), np.random.default_rng(0)
    ids = torch.from_numpy(draw.choice(10**6, (2, 4000), replace=False))
    rows = rows_of(table, *ids)
    couples = 4000 * 3999 / 2
    for single in (rows[:, 0], rows[:, 1]):
        loads = torch.bincount(single, minlength=200).double()
        assert float((loads * (loads - 1)).sum() / 2 / couples) == pytest.approx(1 / 200, rel=0.05)
    loads = torch.bincount(rows[:, 0] * 200 + rows[:, 1], minlength=40_000)
    both = int((loads * (loads - 1)).sum() / 2)
    low, high = stats.poisson.interval(1 - FALSE_ALARM, couples / 200**2)
    assert low <= both <= high


def test_storages() -> None:
    table = PairTable(100, 8, vocab=9, generator=seeded())
    half = table.to_storage("bf16")
    u, v = torch.randint(0, 9, (2, 20))
    assert half.nbytes * 2 == table.nbytes == 4 * 800
    torch.testing.assert_close(half(u, v).float(), table(u, v), rtol=2**-8, atol=0.0)
    assert torch.equal(half.to_storage("dense").weight, half.weight.float())
    memory = RobeArray(90, bound=0.03)
    first, second = (PairTable(100, 8, storage="robe", memory=memory, seed=s, block=4, vocab=9) for s in (0, 1))
    assert first.nbytes == 4 * 90
    assert not bool((first(u, v) == second(u, v)).all())
    with pytest.raises(QuernelError, match="no rows of its own"):
        first.to_storage("bf16")
    zero = PairTable(10, 4, std=0.0)
    assert not bool(zero.weight.any())
    drawn = PairTable(10_000, 8).weight
    assert float(drawn.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_shares_over_a_half_array_are_weighed_in_float32() -> None:
    table = PairTable(50, 8, storage="robe", size=64, vocab=9, generator=seeded())
    layer = PairConnect(table, normalise="softmax")
    with torch.no_grad():
        layer.scores.normal_(generator=seeded()).add_(100)  # a bfloat16 near 100 knows it to a quarter
    half = copy.deepcopy(layer)
    half.table.bfloat16()
    with torch.no_grad():
        table.views.memory.values.copy_(half.table.views.memory.values)
    ids = torch.randint(0, 9, (5, 3), generator=seeded())
    got = half(ids)
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, layer(ids).bfloat16())  # rounded once, at the end


def test_sums_of_rows_with_trained_weights() -> None:
    table = PairTable(50, 6, combine="sum", n_hashes=3, vocab=9, sparse=False, generator=seeded())
    one = torch.tensor([4]), torch.tensor([2])
    rows = rows_of(table, *one)[0]
    weight = table.weight.reshape(50, 3, 6)
    wanted = sum(table.mix[c] * weight[rows[c], c] for c in range(3))
    torch.testing.assert_close(table(*one)[0], wanted)
    table(*one).sum().backward()
    assert table.mix.grad is not None


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_rows(sparse: bool) -> None:
    table = PairTable(50, 6, vocab=9, sparse=sparse)
    table(torch.tensor([4, 4]), torch.tensor([2, 2])).sum().backward()
    assert table.weight.grad.is_sparse == sparse
    assert float(table.weight.grad.to_dense().sum()) == 12


@pytest.mark.parametrize(
    "options",
    [
        {"storage": "bf16"},
        {"storage": "robe", "size": 60, "block": 4},
        {"combine": "sum", "n_hashes": 3},
        {"direct": True, "n_rows": 81},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_every_kind_is_saved(options: dict[str, Any], tmp_path: Any) -> None:
    table = PairTable(**{"n_rows": 50, "dim": 8, "vocab": 9} | options)
    u, v = torch.randint(0, 9, (2, 3, 5))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

    twin = quernel.load(save_model(Two(), tmp_path), model=Two).table
    assert torch.equal(twin(u, v), table(u, v))
    assert twin.config() == table.config()
    old = {name: value for name, value in table.config().items() if name != "hash"}  # of earlier versions
    assert PairTable.from_config(old).config() == table.config()
    with pytest.raises(QuernelError, match="hash must be at most 1, the newest known here; got 2"):
        PairTable.from_config(old | {"hash": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_rows": 0}, "n_rows must be an integer in"),
        ({"n_rows": 2**32}, "n_rows must be an integer in"),
        ({"dim": 7}, "n_hashes must divide dim=7; got 2"),
        ({"direct": True}, "vocab must be given for direct=True"),
        ({"direct": True, "vocab": 9, "n_hashes": 2}, "n_hashes must be 1 for direct=True"),
        ({"direct": True, "vocab": 11}, r"at least vocab\^2 \* buckets = 11\^2 \* 1 = 121 for direct=True; got 100"),
        ({"budget_bytes": 3199}, "n_rows=100 rows of 8 numbers take 3200 bytes, more than budget_bytes=3199"),
        ({"budget_bytes": 1599, "storage": "bf16"}, "take 1600 bytes"),
        ({"storage": "int8"}, "storage must be one of"),
        ({"storage": "robe"}, "size or memory must be given for storage='robe'"),
        ({"size": 10}, "size, memory and block are for storage='robe'"),
        ({"combine": "max"}, "combine must be one of"),
        ({"vocab": 0}, "vocab must be an integer in"),
        ({"dtype": torch.float16}, "dtype must be one of"),
        ({"std": -1.0}, "std must be a finite number"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        PairTable(**{"n_rows": 100, "dim": 8} | options)


def test_bad_inputs_are_named() -> None:
    table = PairTable(100, 8, vocab=9)
    with pytest.raises(QuernelError, match=r"ids must be in \[0, 9\); got 9"):
        table(torch.tensor([1]), torch.tensor([9]))
    with pytest.raises(QuernelError, match="v must have the shape of u"):
        table(torch.tensor([1]), torch.tensor([[1]]))
    assert PairTable(100, 8)(torch.tensor([2**40]), torch.tensor([5])).shape == (1, 8)
