"""The window cache against its definition: full attention under a mask of sinks and newest tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from quernel._errors import QuernelError
from quernel.cache import WindowCache
from quernel.cache._cache import bytes_a_token
from quernel.cache.window import WindowRow

HEADS, GROUP, DIM = 2, 3, 8


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, HEADS, n, DIM, generator=draw)
    return torch.randn(HEADS, GROUP, n, DIM, generator=draw), keys, values


def masked(query: Tensor, keys: Tensor, values: Tensor, last: int, budget: int, sink: int) -> Tensor:
    """Attend with the query of token ``last`` to the sinks and the newest tokens."""
    place = torch.arange(last + 1)
    seen = (place < sink) | (place > last - (budget - sink))
    return F.scaled_dot_product_attention(
        query[:, :, last], keys[:, : last + 1][:, seen], values[:, : last + 1][:, seen], scale=0.3
    )


@pytest.mark.parametrize(("budget", "sink", "prompt"), [(6, 2, 1), (6, 2, 5), (6, 2, 6), (7, 0, 20), (6, 5, 30)])
def test_steps_see_the_sinks_and_the_newest(budget: int, sink: int, prompt: int) -> None:
    query, keys, values = tokens(40)
    row = WindowRow(keys, values, budget, sink)
    row.extend(keys[:, :prompt], values[:, :prompt])
    for t in range(prompt, 40):
        got = row.step(query[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], 0.3)
        torch.testing.assert_close(got, masked(query, keys, values, t, budget, sink))
    assert row.nbytes == 2 * HEADS * budget * DIM * 4


def test_a_later_chunk_sees_what_is_kept_and_itself() -> None:
    query, keys, values = tokens(700)
    row = WindowRow(keys, values, 8, 2)
    row.extend(keys[:, :100], values[:, :100])
    got = row.chunk(query[:, :, 100:], keys[:, 100:], values[:, 100:], 0.3)
    kept = torch.cat((torch.arange(2), torch.arange(94, 100)))
    for t in (100, 101, 355, 356, 699):
        seen = torch.cat((kept, torch.arange(100, t + 1)))
        wanted = F.scaled_dot_product_attention(query[:, :, t], keys[:, seen], values[:, seen], scale=0.3)
        torch.testing.assert_close(got[:, :, t - 100], wanted)


def test_keys_and_values_of_other_widths() -> None:
    query, keys, values = tokens(12)
    row = WindowRow(keys, values[..., :5], 20, 2)
    row.extend(keys[:, :11], values[:, :11, :5])
    got = row.step(query[:, :, 11], keys[:, 11:], values[:, 11:, :5], 0.3)
    torch.testing.assert_close(got, masked(query, keys, values[..., :5], 11, 20, 2))


def test_a_budget_in_bytes_is_the_same_budget() -> None:
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    one = bytes_a_token(config, torch.float32)
    assert one == 2 * 2 * 8 * 3 * 4
    assert WindowCache(config, budget_bytes=100 * one + 5).budget == 100


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "budget"),
        ({"budget": 0}, "budget"),
        ({"budget": 8, "budget_bytes": 80000}, "not both"),
        ({"budget_bytes": 3}, "budget_bytes"),
        ({"budget": 4, "sink": 4}, "sink"),
        ({"budget": 8, "sink": -1}, "sink"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        WindowCache(LlamaConfig(), **options)


def test_what_is_no_config_is_refused() -> None:
    with pytest.raises(QuernelError, match="config must be"):
        WindowCache(object(), budget=8)
