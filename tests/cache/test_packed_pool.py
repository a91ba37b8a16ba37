"""The packed pool against pruning token by token, and the caches over it: what they promise, weigh and refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from quernel._errors import QuernelError
from quernel.cache import (
    LouisKVCache,
    LouisKVConfig,
    MustafarCache,
    PackedKVPool,
    QuestCache,
    WindowCache,
    attention,
    prune_per_token,
)
from quernel.cache._cache import bytes_a_token
from quernel.cache._retrieval import RetrievalRow
from quernel.testing import check_cache, checks_for
from tests.cache.tiny_llama import tiny_llama

HEADS = 3
both = pytest.mark.parametrize("storage", ["ram", "memmap"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pruned(rows: Tensor, dims: tuple[int, int], sparsities: tuple[float, float]) -> Tensor:
    return torch.cat([prune_per_token(x, s) for x, s in zip(rows.split(dims, -1), sparsities, strict=True)], dim=-1)


@both
@dtypes
@pytest.mark.parametrize("dims", [(128, 64), (70, 5), (1, 1), (33, 31), (256, 48)])
def test_reads_are_what_pruning_leaves(storage: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    sparsities = (0.7, 0.4)
    pool = PackedKVPool(HEADS, dims, sparsities, dtype, storage)
    # Blocks in slabs of their own and in shared ones.
    blocks = [drawn(HEADS, n, sum(dims), seed=n) for n in (300, 7, 64, 1, 90)]
    blocks[0][0, 0], blocks[0][0, 1, ::2] = 0.0, -1.0
    starts, counts = np.zeros((2, HEADS, 10), np.int64)
    wanted: list[list[Tensor]] = [[] for _ in range(HEADS)]
    draw = np.random.default_rng(0)
    for i, rows in enumerate(blocks):
        if i == 0:
            pool.reserve(300)
        first, n = pool.append(rows), rows.shape[1]
        for h in range(HEADS):
            for r in (2 * i, 2 * i + 1):
                counts[h, r] = draw.integers(1, n + 1)
                skipped = int(draw.integers(0, n - counts[h, r] + 1))
                starts[h, r] = first + h * n + skipped
                wanted[h].append(pruned(rows[h, skipped : skipped + counts[h, r]], dims, sparsities).to(dtype))
    longest = int(counts.sum(1).max())
    out = torch.full((HEADS, longest + 5, sum(dims)), torch.nan, dtype=dtype)
    pool.gather(starts, counts, out[:, 2 : longest + 2])
    converted = torch.empty(HEADS, longest, sum(dims), dtype=torch.float64)
    pool.gather(starts, counts, converted)
    for h in range(HEADS):
        taken = torch.cat(wanted[h])
        assert torch.equal(out[h, 2 : 2 + len(taken)], taken)
        assert torch.equal(converted[h, : len(taken)], taken.double())
    assert out[:, :2].isnan().all() and out[:, longest + 2 :].isnan().all()
    for block, rows in zip(pool.blocks(), blocks, strict=True):
        assert torch.equal(block, pruned(rows, dims, sparsities).to(dtype))
        assert torch.equal(block, pool.pruned(rows))


@both
@dtypes
def test_a_record_takes_its_bitmaps_and_what_it_keeps(storage: str, dtype: torch.dtype) -> None:
    pool = PackedKVPool(HEADS, (128, 70), (0.7, 0.5), dtype, storage)
    record = 8 * (2 + 2) + (39 + 35) * dtype.itemsize
    pool.reserve(1000)
    for part in torch.zeros(HEADS, 1000, 198).split(300, dim=1):
        pool.append(part)
    assert pool.nbytes == 1000 * HEADS * record and pool.tokens == 1000
    for _ in range(300):
        pool.append(torch.zeros(HEADS, 1, 198))
    if storage == "ram":
        assert 1300 * HEADS * record <= pool.nbytes == pool.resident_nbytes <= 1.25 * 1300 * HEADS * record
        assert sum(t.untyped_storage().nbytes() for t in pool.tensors()) == pool.nbytes
    else:
        assert pool.nbytes == 1300 * HEADS * record and pool.resident_nbytes == 0 and pool.tensors() == []


@both
def test_a_clone_shares_nothing(storage: str) -> None:
    rows = drawn(HEADS, 40, 16)
    pool = PackedKVPool(HEADS, (8, 8), (0.5, 0.5), storage=storage)
    pool.append(rows)
    other = pool.clone()
    pool.append(drawn(HEADS, 5, 16, seed=1))
    other.append(drawn(HEADS, 4, 16, seed=2))
    assert (pool.tokens, other.tokens) == (45, 44) and other.kept == [4, 4]
    assert [block.shape[1] for block in other.blocks()] == [40, 4]
    assert torch.equal(next(other.blocks()), pruned(rows, (8, 8), (0.5, 0.5)))
    addresses = [{t.data_ptr() for t in each.tensors()} for each in (pool, other)]
    assert not addresses[0] & addresses[1]


def decoded(net: Any, cache: Any, tokens: int = 200, prompt: int = 180) -> None:
    ids = torch.randint(1, 64, (2, tokens), generator=torch.Generator().manual_seed(0))
    with attention(net), torch.no_grad():
        for part in ids.split([prompt, *[1] * (tokens - prompt)], dim=1):
            net(part, past_key_values=cache)


class PackedLouis(LouisKVCache):
    """LouisKV over a packed pool, so small that the contexts of the suite pass every limit but the exact ones."""

    @staticmethod
    def _quernel_example() -> dict[str, Any]:
        small = LouisKVConfig(
            budget=12, cluster_size=4, tau=0.9, sink=4, buffer=18, min_segment=2, max_segment=4, dense_below=0
        )
        return {"make": lambda config: PackedLouis(config, small, k_sparsity=0.5, v_sparsity=0.7), "exact_to": 22}


class PackedLouisInAFile(LouisKVCache):
    """The same in a file, dense at first."""

    @staticmethod
    def _quernel_example() -> dict[str, Any]:
        small = LouisKVConfig(
            budget=12, cluster_size=4, tau=0.9, sink=2, buffer=8, min_segment=2, max_segment=4, dense_below=40
        )
        options = {"k_sparsity": 0.5, "storage": "memmap"}
        return {"make": lambda config: PackedLouisInAFile(config, small, **options), "exact_to": 40}


class PackedQuest(QuestCache):
    """Quest over a packed pool."""

    @staticmethod
    def _quernel_example() -> dict[str, Any]:
        options: dict[str, Any] = {"page_size": 4, "sink": 4, "buffer": 18, "k_sparsity": 0.5, "v_sparsity": 0.5}
        return {"make": lambda config: PackedQuest(config, budget=12, **options), "exact_to": 22}


@pytest.mark.parametrize("cls", [PackedLouis, PackedQuest])
def test_caches_over_a_packed_pool_keep_the_contract(cls: type) -> None:
    check_cache(cls)


@pytest.mark.parametrize("name", [name for name in checks_for("cache") if name != "report"])
def test_a_packed_pool_in_a_file_keeps_the_contract(name: str) -> None:
    # The suite's report is of caches in memory; that of files has a test below.
    checks_for("cache")[name](PackedLouisInAFile)


@both
@pytest.mark.parametrize("make", [LouisKVCache, QuestCache])
def test_a_report_counts_what_is_stored(make: Any, storage: str) -> None:
    net = tiny_llama(head_dim=128)
    options: dict[str, Any] = {"budget": 16, "sink": 0, "buffer": 8, "storage": storage, "dense_below": 0}
    options |= {"max_segment": 8} if make is LouisKVCache else {"page_size": 8}
    reports = []
    for sparsity in (0.0, 0.7):
        cache = make(net.config, k_sparsity=sparsity, v_sparsity=sparsity, **options)
        decoded(net, cache)
        report = cache.report()
        rows = [row for layer in cache.layers for row in layer.rows]
        assert all(isinstance(row, RetrievalRow) for row in rows)
        held = sum(t.untyped_storage().nbytes() for row in rows for t in row.tensors())
        assert report.bytes_resident == held
        assert report.bytes_stored == held + (report.details["bytes_pool"] if storage == "memmap" else 0)
        least = 4 * 2 * sum(2 * (8 * 2 + 39 * 4) if sparsity else 2 * 128 * 4 for _ in range(rows[0].pool.tokens))
        assert report.details["bytes_pool"] >= least
        assert report.details["bytes_pool"] == least or storage == "ram"
        reports.append(report)
    dense, small = reports
    assert small.details["bytes_pool"] == pytest.approx(dense.details["bytes_pool"] * 172 / 512, rel=1e-6)
    gone = dense.details["bytes_pool"] - small.details["bytes_pool"]
    assert dense.bytes_stored - small.bytes_stored == gone


def test_a_budget_in_bytes_buys_what_the_pool_takes() -> None:
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=1024, num_attention_heads=8, num_key_value_heads=2, head_dim=128
    )
    dense, small = 3 * 2 * 2 * 128 * 4, 3 * 2 * (2 * 16 + (39 + 64) * 4)
    assert (bytes_a_token(config), bytes_a_token(config, None, (0.7, 0.5))) == (dense, small)
    assert bytes_a_token(config, torch.bfloat16, (0.7, 0.5)) == 3 * 2 * (2 * 16 + (39 + 64) * 2)
    size = 100 * small + small - 1
    options = {"k_sparsity": 0.7, "v_sparsity": 0.5}
    assert LouisKVCache(config, budget_bytes=size, **options).settings.budget == 100
    assert QuestCache(config, budget_bytes=size, **options).layout.budget == 100
    assert LouisKVCache(config, budget_bytes=size).settings.budget == size // dense
    assert WindowCache(config, budget_bytes=size).budget == size // dense


@pytest.mark.parametrize(
    "make",
    [
        lambda config, **options: WindowCache(config, **options),
        lambda config, **options: LouisKVCache(config, **options),
        lambda config, **options: QuestCache(config, **options),
        lambda config, **options: MustafarCache(config, **options),
    ],
    ids=["window", "louiskv", "quest", "mustafar"],
)
def test_every_cache_takes_one_budget_in_tokens_or_bytes(make: Any) -> None:
    config = LlamaConfig(num_hidden_layers=2)
    with pytest.raises(QuernelError, match=r"give budget \(tokens\) or budget_bytes, not both; got 64 and 100000000"):
        make(config, budget=64, budget_bytes=100_000_000)
    with pytest.raises(QuernelError, match="budget_bytes must be an integer"):
        make(config, budget_bytes=5)
    assert make(config, budget_bytes=100_000_000).report().bytes_stored == 0


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("computes", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_in_the_dtype_of_the_keys_whatever_the_config_names(
    named: torch.dtype, computes: torch.dtype, sparsity: float
) -> None:
    net = tiny_llama().to(computes)
    net.config.dtype = named
    size = 20_000
    dropped = {"k_sparsity": sparsity, "v_sparsity": sparsity}
    small = {"sink": 0, "buffer": 8, "dense_below": 0, **dropped}
    louis = LouisKVCache(net.config, budget_bytes=size, cluster_size=8, max_segment=8, tau=2.0, **small)
    quest = QuestCache(net.config, budget_bytes=size, page_size=8, **small)
    kept = (sparsity, sparsity) if sparsity else None
    one = bytes_a_token(net.config, computes, kept)
    for cache in (louis, quest):
        decoded(net, cache)
        chosen = [row.chosen()[0].shape[1] for layer in cache.layers for row in layer.rows]  # type: ignore[attr-defined]
        assert chosen == [size // one] * 4
    window = WindowCache(net.config, budget_bytes=size)
    mustafar = MustafarCache(net.config, budget_bytes=5 * size, window=8, block=16, **dropped)
    # Room that a sequence may need besides its tokens is paid for as well.
    for cache, least, most in ((window, 0.9 * size, size), (mustafar, 2 * size, 5 * size)):
        decoded(net, cache, 700, 680)
        assert least < cache.nbytes / 2 <= most  # of two sequences
    assert window.budget == size // bytes_a_token(net.config, computes)


def test_the_crossover_follows_the_dtype_of_the_keys() -> None:
    net = tiny_llama().bfloat16()
    net.config.dtype = torch.float32
    cache = MustafarCache(net.config, objective="speed")
    before = cache.report().details["crossover"]
    decoded(net, cache, 3, 2)
    assert cache.report().details["crossover"] == cache.schedule.min_packed == 2 * before


def test_a_model_in_double_precision_needs_another_dtype_of_the_pool() -> None:
    net = tiny_llama().double()
    with pytest.raises(QuernelError, match=r"float64. Give another pool_dtype"):
        decoded(net, LouisKVCache(net.config, budget=16, k_sparsity=0.5, dense_below=0), 3, 2)
    cache = LouisKVCache(
        net.config, budget=16, k_sparsity=0.5, buffer=8, max_segment=8, dense_below=0, pool_dtype="float32"
    )
    decoded(net, cache, 60, 50)
    # 16 sinks; two sequences, layers and key heads; of 16 channels 8 of a key stay.
    assert cache.report().details["bytes_pool"] >= 8 * (50 - 16 - 8) * (8 + 8 * 4 + 8 + 16 * 4)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k_sparsity": 1.0}, "k_sparsity must be"),
        ({"v_sparsity": -0.1}, "v_sparsity must be"),
        ({"k_sparsity": "0.5"}, "k_sparsity must be"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], word: str) -> None:
    for make in (LouisKVCache, QuestCache):
        with pytest.raises(QuernelError, match=word):
            make(LlamaConfig(), budget=64, **options)


def test_what_cannot_be_packed_is_refused_at_once() -> None:
    with pytest.raises(QuernelError, match="float64"):
        LouisKVConfig(v_sparsity=0.5, pool_dtype="float64")
    with pytest.raises(QuernelError, match="float64"):
        QuestCache(LlamaConfig(), budget=64, v_sparsity=0.5, pool_dtype="float64")
    with pytest.raises(QuernelError, match=r"v_sparsity of .* leaves none"):
        PackedKVPool(1, (8, 8), (0.5, 1 - 1e-12))
    with pytest.raises(QuernelError, match="dims"):
        PackedKVPool(1, (8, 0), (0.5, 0.5))
    with pytest.raises(QuernelError, match="storage"):
        PackedKVPool(1, (8, 8), (0.5, 0.5), storage="tape")
    with pytest.raises(QuernelError, match="float64"):
        PackedKVPool(1, (8, 8), (0.0, 0.0), torch.float64)
    with pytest.raises(QuernelError, match="65504"):
        PackedKVPool(1, (2, 2), (0.5, 0.5), torch.float16).append(torch.full((1, 1, 4), 1e6))
