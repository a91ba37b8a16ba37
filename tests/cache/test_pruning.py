"""The rules of pruning against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quernel._errors import QuernelError
from quernel.cache import prune_by_output, prune_channels, prune_per_channel, prune_per_token
from quernel.cache.pruning import kept_channels
from tests.reference import mustafar as reference


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dim", "sparsity", "kept"), [(128, 0.7, 39), (128, 0.5, 64), (100, 0.29, 71), (8, 0.7, 3), (5, 0.0, 5)]
)
def test_how_many_channels_stay(dim: int, sparsity: float, kept: int) -> None:
    assert kept_channels(dim, sparsity) == kept


@given(st.lists(st.floats(-4, 4, width=16), min_size=6, max_size=6), st.integers(1, 6))
def test_no_row_of_as_many_entries_is_nearer(row: list[float], n: int) -> None:
    x = torch.tensor([row], dtype=torch.float64)
    got = prune_per_token(x, (6 - n) / 6)
    error = float(((x - got) ** 2).sum())
    best = min(sum(row[c] ** 2 for c in range(6) if c not in chosen) for chosen in itertools.combinations(range(6), n))
    assert error <= best * (1 + 1e-12)


def test_per_token_is_the_reference() -> None:
    x = drawn(2, 5, 12).round(decimals=1)
    wanted = [[reference.pruned(row, 4) for row in head] for head in x.tolist()]
    assert torch.equal(prune_per_token(x, 0.7), torch.tensor(wanted))


def test_per_channel_is_per_token_of_turned_groups() -> None:
    x = drawn(2, 70, 5)
    got = prune_per_channel(x, 0.5)
    for first, last, n in ((0, 32, 16), (32, 64, 16), (64, 70, 3)):
        part = x[:, first:last]
        wanted = [[reference.pruned(column, n) for column in head] for head in part.mT.tolist()]
        assert torch.equal(got[:, first:last], torch.tensor(wanted).mT)


def test_by_output_weighs_channels_by_the_queries() -> None:
    keys, queries = drawn(3, 7, 8), drawn(3, 4, 8)
    keys[0, 0] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    queries[0] = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 1])
    assert prune_by_output(keys, queries, 0.75)[0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 8]
    flat = torch.ones_like(queries)
    assert torch.equal(prune_by_output(keys, flat, 0.5), prune_per_token(keys, 0.5))


def test_whole_channels_go_by_what_they_add_to_the_logits() -> None:
    keys, queries = drawn(2, 9, 6), drawn(2, 4, 6)
    got = prune_channels(keys, queries, 0.5)
    weights = queries.norm(dim=1) * keys.norm(dim=1)
    for head in range(2):
        stay = weights[head].topk(3).indices.tolist()
        for c in range(6):
            assert torch.equal(got[head, :, c], keys[head, :, c] if c in stay else torch.zeros(9))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_outside_is_refused(sparsity: float) -> None:
    with pytest.raises(QuernelError, match="sparsity"):
        prune_per_token(drawn(2, 4), sparsity)


def test_nothing_left_and_integers_are_refused() -> None:
    with pytest.raises(QuernelError, match="leaves none"):
        kept_channels(4, 1 - 1e-12)
    with pytest.raises(QuernelError, match="int64"):
        prune_per_token(torch.ones(2, 2, dtype=torch.int64), 0.5)
