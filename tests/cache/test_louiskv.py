"""LouisKV and Quest inside a model of transformers: exactness, clusters, reports and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from quernel._errors import QuernelError
from quernel.cache import LouisKVCache, LouisKVConfig, MustafarCache, QuestCache, WindowCache, attention
from quernel.cache._cache import bytes_a_token
from quernel.cache.louiskv import LouisKVRow
from quernel.kernels.clustering import cluster_means
from tests.cache.tiny_llama import tiny_llama

# Logits of order one; sums over the same tokens in another order.
SAME = 1e-5
SMALL: dict[str, Any] = {"cluster_size": 4, "sink": 2, "buffer": 8, "min_segment": 2, "max_segment": 4}


def llama(key_heads: int = 2, layers: int = 2, **more: Any) -> Any:
    model = tiny_llama(
        num_hidden_layers=layers,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
        **more,
    )
    for name, parameter in model.named_parameters():
        # Attention far from uniform.
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 20
    return model


def text(rows: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (rows, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forced(model: Any, cache: Any, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Return the logits of every token from the prompt's last on, the text being given."""
    mask = torch.ones_like(ids) if mask is None else mask
    places = (mask.cumsum(1) - 1).clamp(min=0)
    out = []
    for low, high in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        given = {"attention_mask": mask[:, :high], "position_ids": places[:, low:high], "past_key_values": cache}
        out.append(model(ids[:, low:high], **given).logits[:, -1:])
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("make", [LouisKVCache, QuestCache])
def test_a_budget_of_everything_is_exact(make: Any, rows: int, key_heads: int) -> None:
    model, ids = llama(key_heads), text(rows, 70)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 11 * row] = 0
    options = SMALL | {"tau": 0.9} if make is LouisKVCache else {"page_size": 4}
    cache = make(model.config, budget=70, dense_below=0, **options)
    with attention(model):
        got = forced(model, cache, ids, 40, mask)
    wanted = forced(model, DynamicCache(config=model.config), ids, 40, mask)
    torch.testing.assert_close(got, wanted, rtol=0, atol=SAME)
    assert cache.report().details["tokens_read"] <= 70


def test_short_of_sinks_budget_and_buffer_nothing_is_lost() -> None:
    model, ids = llama(), text(1, 40)
    for storage in ("ram", "memmap"):
        cache = LouisKVCache(model.config, budget=30, dense_below=0, storage=storage, **SMALL)
        with attention(model):
            got = forced(model, cache, ids, 25)
        torch.testing.assert_close(got, forced(model, DynamicCache(config=model.config), ids, 25), rtol=0, atol=SAME)


def test_below_the_crossover_nothing_is_lost_and_above_it_something_is() -> None:
    model, ids = llama(), text(1, 120)
    cache = LouisKVCache(model.config, budget=8, tau=2.0, **SMALL)
    limit = 2 * (2 + 8 + 8 + 3)
    with attention(model):
        got = forced(model, cache, ids, 20)
    error = (got - forced(model, DynamicCache(config=model.config), ids, 20)).abs().amax((0, 2))
    assert float(error[: limit - 20 + 1].max()) < SAME < 0.1 < float(error[limit - 20 + 1 :].max())


def test_choices_grow_with_tau_in_a_model() -> None:
    model, ids = llama(layers=1), text(1, 90)
    rates = []
    for tau in (-1.0, 0.0, 0.3, 0.6, 0.9, 1.01):
        cache = LouisKVCache(model.config, budget=12, tau=tau, dense_below=0, **SMALL)
        with attention(model):
            forced(model, cache, ids, 40)
        rates.append(cache.report().details["retrieval_rate"])
    assert rates[0] == 1 / 50 and rates[-1] == 1.0
    assert rates == sorted(rates) and len(set(rates)) > 3


def keys_like(kind: str, n: int = 2048, dim: int = 32) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(n, dim, generator=draw)
    if kind == "random":
        return noise
    if kind == "drifting":
        return noise + 0.2 * torch.randn(n, dim, generator=draw).cumsum(0)
    centres = torch.randn(300, dim, generator=draw)
    return centres[torch.randint(0, 300, (n,), generator=draw)] + 0.7 * noise


@pytest.mark.parametrize("kind", ["random", "drifting", "mixture"])
def test_clusters_are_as_tight_as_those_of_scikit_learn(kind: str) -> None:
    keys = keys_like(kind)
    row = LouisKVRow(keys[None], keys[None], LouisKVConfig(), None)  # type: ignore[arg-type]
    order, sizes = row._units(keys[None])
    assert order is not None and sizes.sum() == len(keys)
    units = torch.arange(sizes.shape[1]).repeat_interleave(torch.from_numpy(sizes[0]))[None]
    ordered = keys[None].gather(1, order[..., None].expand(-1, -1, keys.shape[1]))
    means = row._summaries(ordered, sizes)
    torch.testing.assert_close(means, cluster_means(ordered, units, sizes.shape[1]))
    mine = float((ordered - means.gather(1, units[..., None].expand_as(ordered))).square().sum())
    theirs = KMeans(len(keys) // 16, n_init=1, random_state=0).fit(keys.numpy()).inertia_
    assert mine <= 1.05 * theirs


def test_pages_are_bounded_from_above() -> None:
    draw = torch.Generator().manual_seed(0)
    keys, query = torch.randn(2, 50, 6, generator=draw), torch.randn(2, 3, 6, generator=draw)
    row = QuestCache(LlamaConfig(), budget=16, page_size=8)._make_row(keys, keys)
    order, sizes = row._units(keys)  # type: ignore[attr-defined]
    assert order is None and sizes[0].tolist() == [8] * 6 + [2]
    kept = row._summaries(keys, sizes)  # type: ignore[attr-defined]
    for p, page in enumerate(keys.split(8, dim=1)):
        bound = torch.maximum(query * kept[:, None, p, :6], query * kept[:, None, p, 6:]).sum(-1)
        assert bool((bound[..., None] >= query @ page.mT - 1e-5).all())
        assert torch.equal(kept[:, p], torch.cat((page.amax(1), page.amin(1)), dim=-1))


def test_a_report_says_what_was_read_and_covered() -> None:
    model, ids = llama(), text(2, 100)
    cache = LouisKVCache(model.config, budget=16, tau=0.4, dense_below=0, audit=True, pool_dtype="bfloat16", **SMALL)
    assert cache.report().details["retrieval_rate"] == cache.report().details["tokens_read"] == 0
    with attention(model):
        forced(model, cache, ids, 60)
    report = cache.report()
    details = report.details
    assert 0 < details["retrieval_rate"] < 1
    assert 2 + 16 + 8 <= details["tokens_read"] <= 2 + 16 + 8 + 3
    assert 0.1 < details["recall_layer_0"] < 1 and 0.1 < details["recall_layer_1"] < 1
    rows = [row for layer in cache.layers for row in layer.rows]
    assert details["bytes_pool"] == sum(row.pool.nbytes for row in rows) >= 4 * 80 * 2 * 2 * 16 * 2
    assert details["bytes_resident"] == report.bytes_resident == report.bytes_stored


def test_in_a_file_little_stays_in_memory() -> None:
    model, ids = llama(), text(1, 500)
    reports, answers = [], []
    for storage in ("ram", "memmap"):
        cache = LouisKVCache(model.config, budget=16, tau=0.9, storage=storage, dense_below=0, **SMALL)
        with attention(model):
            answers.append(forced(model, cache, ids, 480))
        reports.append(cache.report())
    assert torch.equal(*answers)
    inside, outside = reports
    assert outside.bytes_resident < 0.5 * outside.bytes_stored <= inside.bytes_stored == inside.bytes_resident
    assert outside.bytes_stored - outside.bytes_resident == outside.details["bytes_pool"]


def test_a_budget_in_bytes_is_one_of_tokens() -> None:
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    one = bytes_a_token(config, torch.float32)
    assert LouisKVCache(config, budget_bytes=100 * one).settings.budget == 100
    assert LouisKVCache(config, budget_bytes=100 * one, pool_dtype="bfloat16").settings.budget == 200
    assert QuestCache(config, budget_bytes=100 * one).layout.budget == 100
    assert QuestCache(config, budget_bytes=100 * one, pool_dtype="bfloat16").layout.budget == 200
    settings = LouisKVConfig(budget=64, tau=0.5)
    assert LouisKVCache(config, settings, tau=0.6).settings == LouisKVConfig(budget=64, tau=0.6)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 8, "cluster_size": 16}, "cluster_size must be at most the budget"),
        ({"budget": 8, "budget_bytes": 10**9}, "not both"),
        ({"budget_bytes": 3}, "budget_bytes"),
        ({"budget_bytes": 1_100_000}, "cluster_size must be at most"),
        ({"cluster_size": 0}, "cluster_size"),
        ({"tau": float("nan")}, "tau"),
        ({"sink": -1}, "sink"),
        ({"buffer": 0}, "buffer"),
        ({"max_segment": 129}, "max_segment"),
        ({"min_segment": 65}, "min_segment"),
        ({"kmeans_iters": 0}, "kmeans_iters"),
        ({"storage": "disk"}, "storage"),
        ({"pool_dtype": "int8"}, "pool_dtype"),
        ({"dense_below": -1}, "dense_below"),
        ({"audit": "yes"}, "audit must be True or False"),
        ({"audit": 1}, "audit must be True or False"),
        ({"pool_dtype": torch.bfloat16}, "pool_dtype must be one of"),
        ({"window": 3}, "window"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        LouisKVCache(LlamaConfig(), **options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "budget"),
        ({"budget": 8}, "page_size must be at most the budget"),
        ({"budget": 32, "page_size": 0}, "page_size"),
        ({"budget": 32, "sink": -1}, "sink"),
        ({"budget": 32, "buffer": 0}, "buffer"),
        ({"budget": 32, "storage": "tape"}, "storage"),
        ({"budget": 32, "audit": "yes"}, "audit must be True or False"),
        ({"budget": 32, "pool_dtype": "int8"}, "pool_dtype must be one of"),
        ({"budget": 32, "pool_dtype": torch.int8}, "pool_dtype must be one of"),
        ({"budget_bytes": 10**9, "pool_dtype": torch.bfloat16}, "pool_dtype must be one of"),
    ],
)
def test_errors_of_quest_name_the_argument(options: dict[str, Any], word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        QuestCache(LlamaConfig(), **options)


@pytest.mark.parametrize("make", [LouisKVCache, QuestCache, WindowCache, MustafarCache])
@pytest.mark.parametrize("assisted", ["prompt lookup", "assistant"])
def test_assisted_decoding_is_refused_with_our_reason(make: Any, assisted: str) -> None:
    model = llama()
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]])
    how: dict[str, Any] = (
        {"prompt_lookup_num_tokens": 3} if assisted == "prompt lookup" else {"assistant_model": llama()}
    )
    # The first versions of transformers 5 cannot do this without a token that ends a text.
    with attention(model), pytest.raises(QuernelError, match="assisted and prompt-lookup decoding do not work"):
        model.generate(ids, past_key_values=make(model.config, budget=64), max_new_tokens=8, eos_token_id=63, **how)
    assert model.config._attn_implementation == "sdpa"


def test_a_buffer_shorter_than_a_segment_is_named() -> None:
    with pytest.raises(QuernelError, match="buffer must be at least max_segment=64"):
        LouisKVConfig(budget=16, buffer=16)
