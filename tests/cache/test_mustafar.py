"""MustafarCache: attention over packed and dense tokens, when tokens are packed, budgets, bytes and errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig

from quernel._errors import QuernelError
from quernel.cache import BitmapRows, MustafarCache, attention, prune_per_token
from quernel.cache._bitmap_attention import attend
from quernel.cache._bitmap_intrinsics import vector_path
from quernel.cache._layer import CacheLayer, dense_step
from quernel.cache.bitmap_rows import KINDS
from quernel.cache.mustafar import MustafarRow, Schedule
from tests.cache.tiny_llama import tiny_llama
from tests.reference import mustafar as reference

PLAIN = Schedule(0.7, 0.7, 32, 256, None, 0, 0, None)
# Check 3 of the method: relative errors against attention over the pruned tensors.
FLOAT32, BFLOAT16 = 1e-5, 2e-2
# Logits of a small random model, the same sums in another order.
SAME = {"rtol": 1e-5, "atol": 1e-5}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def schedule(**more: Any) -> Schedule:
    return Schedule(**(vars(PLAIN) | more))


def pruned(x: Tensor, sparsity: float, dense: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return x (..., T, d) as the cache holds it: all but the last ``dense`` tokens pruned, in float64."""
    old = x.shape[-2] - dense
    return torch.cat((prune_per_token(x[..., :old, :], sparsity).to(dtype).double(), x[..., old:, :].double()), dim=-2)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "group", "plain"),
    [
        (torch.float32, 4, False),
        (torch.bfloat16, 4, False),
        (torch.float16, 4, False),
        (torch.float32, 4, True),
        # Every line is a kernel of its own, compiled in seconds.
        pytest.param(torch.float32, 1, False, marks=pytest.mark.slow),
        pytest.param(torch.float32, 8, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 1, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 8, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 4, True, marks=pytest.mark.slow),
    ],
)
def test_attention_is_that_over_the_pruned_tensors(dim: int, dtype: torch.dtype, group: int, plain: bool) -> None:
    if not plain and not vector_path(KINDS[dtype]):
        pytest.skip("no AVX-512 with VBMI2 here")
    keys, values, query = drawn(2, 330, dim), drawn(2, 330, dim, seed=1), drawn(2, group, dim, seed=2)
    n = dim - int(0.7 * dim + 1e-9)
    packed = [BitmapRows.pack(x[:, :290], n, dtype) for x in (keys, values)]
    held = [part[:, 290:] for part in (keys, values)]
    got = attend(query, *packed, [(held[0], held[1])], dim**-0.5, plain=plain)
    # Measured against the values as stored: their rounding is no error of the attention.
    k, v = (pruned(x, 0.7, 40, dtype) for x in (keys, values))
    wanted = F.scaled_dot_product_attention(query.double()[None], k[None], v[None], scale=dim**-0.5)[0]
    assert error(got, wanted) <= FLOAT32
    exact_k, exact_v = (pruned(x, 0.7, 40) for x in (keys, values))
    exact = F.scaled_dot_product_attention(query.double()[None], exact_k[None], exact_v[None], scale=dim**-0.5)[0]
    assert error(got, exact) <= (FLOAT32 if dtype == torch.float32 else BFLOAT16)


def test_attention_number_by_number() -> None:
    keys, values, query = drawn(1, 40, 8), drawn(1, 40, 5, seed=1), drawn(1, 3, 8, seed=2)
    row = MustafarRow(keys, values, schedule(window=7, block=4))
    row.extend(keys[:, :39], values[:, :39])
    got = row.step(query, keys[:, 39:], values[:, 39:], 0.4)
    old = reference.packed(39, 7, 4)
    k = [reference.pruned(x, 3) if t < old else x for t, x in enumerate(keys[0].tolist())]
    v = [reference.pruned(x, 2) if t < old else x for t, x in enumerate(values[0].tolist())]
    wanted = [reference.attention(q, k, v, 0.4) for q in query[0].tolist()]
    torch.testing.assert_close(got[0], torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [48, 64, 80, 128])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_batches_with_left_padding(batch: int, dim: int) -> None:
    heads, group, n = 2, 2, 60
    layer = CacheLayer(lambda k, v: MustafarRow(k, v, schedule(window=8, block=16)))
    keys, values = drawn(batch, heads, n + 1, dim), drawn(batch, heads, n + 1, dim, seed=1)
    query = drawn(batch, heads * group, n + 1, dim, seed=2)
    padding = [0, 5, 31, 59][:batch]
    real = torch.arange(n) >= torch.tensor(padding)[:, None]  # (B, n)
    module = SimpleNamespace(num_key_value_groups=group)
    mask = (torch.ones(n, n, dtype=torch.bool).tril() & real[:, None])[:, None]
    layer.update(keys[:, :, :n], values[:, :, :n])
    layer.attend(module, query[:, :, :n], keys[:, :, :n], values[:, :, :n], mask, 0.2)
    layer.update(keys[:, :, n:], values[:, :, n:])
    step_mask = torch.cat((real, torch.ones(batch, 1, dtype=torch.bool)), dim=1)[:, None, None]
    got = layer.attend(module, query[:, :, n:], keys[:, :, n:], values[:, :, n:], step_mask, 0.2)
    for b, left in enumerate(padding):
        dense = n - left - reference.packed(n - left, 8, 16) + 1
        k, v = (pruned(x[b, :, left:], 0.7, dense) for x in (keys, values))
        asked = query[b, :, n:].unflatten(0, (heads, group)).flatten(1, 2).double()
        wanted = F.scaled_dot_product_attention(asked[None], k[None], v[None], scale=0.2)[0]
        assert error(got[b].unflatten(0, (heads, group)).flatten(1, 2), wanted) <= FLOAT32


@pytest.mark.parametrize(
    ("window", "block", "prompt"), [(32, 256, 1), (32, 256, 600), (5, 7, 3), (1, 1, 4), (9, 1, 40)]
)
def test_what_is_packed_depends_on_the_length_alone(window: int, block: int, prompt: int) -> None:
    keys, values = drawn(1, prompt + 300, 8), drawn(1, prompt + 300, 8, seed=1)
    row = MustafarRow(keys, values, schedule(window=window, block=block))
    row.extend(keys[:, :prompt], values[:, :prompt])
    for t in range(prompt, prompt + 300):
        assert len(row.keys) == len(row.values) == reference.packed(t, window, block)
        dense = row.visible()[0].shape[1] - len(row.keys)
        assert min(t, window) <= dense <= window + block - 1
        # Copies: what is dense lies in room that is used again.
        before = [x.clone() for x in row.visible()]
        got = row.step(drawn(1, 2, 8, seed=t), keys[:, t : t + 1], values[:, t : t + 1], 0.3)
        # A step sees what is held before it and its own token, also when it completes a block.
        k, v = (torch.cat((x, new[:, t : t + 1]), dim=1) for x, new in zip(before, (keys, values), strict=True))
        wanted = F.scaled_dot_product_attention(drawn(1, 2, 8, seed=t), k, v, scale=0.3)
        torch.testing.assert_close(got, wanted, **SAME)
    assert torch.equal(row.visible()[0], pruned(keys, 0.7, t + 1 - len(row.keys)).float())


def test_chunks_end_with_the_same_rows() -> None:
    keys, values = drawn(2, 500, 16), drawn(2, 500, 16, seed=1)
    whole, parts = (MustafarRow(keys, values, schedule(window=10, block=32)) for _ in range(2))
    whole.extend(keys, values)
    for k, v in zip(keys.split([3, 100, 1, 300, 96], dim=1), values.split([3, 100, 1, 300, 96], dim=1), strict=True):
        parts.extend(k, v)
    for a, b in zip(whole.visible(), parts.visible(), strict=True):
        assert torch.equal(a, b)
    assert len(parts.keys) == len(whole.keys) == reference.packed(500, 10, 32)


@torch.no_grad()
def decoded(net: Any, cache: Any, ids: Tensor, chunks: list[int]) -> Tensor:
    parts = ids.split([*chunks, *[1] * (ids.shape[1] - sum(chunks))], dim=1)
    with attention(net):
        return torch.cat([net(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("chunks", [[60], [10, 1, 30, 19]])
def test_sparsity_of_zero_is_the_plain_cache(chunks: list[int]) -> None:
    net = tiny_llama()
    ids = torch.randint(1, 64, (2, 100), generator=torch.Generator().manual_seed(0))
    cache = MustafarCache(net.config, k_sparsity=0.0, v_sparsity=0.0, window=4, block=8)
    wanted = decoded(net, DynamicCache(config=net.config), ids, [60])
    torch.testing.assert_close(decoded(net, cache, ids, chunks), wanted, **SAME)
    assert cache.report().details["tokens_packed"] == 96


def test_while_nothing_is_packed_a_step_is_the_dense_one_bit_for_bit() -> None:
    keys, values, query = drawn(2, 33, 16), drawn(2, 33, 16, seed=1), drawn(2, 3, 33, 16, seed=2)
    row = MustafarRow(keys, values, schedule(block=1))
    row.extend(keys[:, :20], values[:, :20])
    for t in range(20, 33):
        got = row.step(query[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], 0.3)
        assert torch.equal(got, dense_step(query[:, :, t], keys[:, : t + 1], values[:, : t + 1], 0.3))
    assert len(row.keys) == 1


def test_short_contexts_are_the_plain_cache() -> None:
    net = tiny_llama()
    ids = torch.randint(1, 64, (1, 60), generator=torch.Generator().manual_seed(0))
    wanted = decoded(net, DynamicCache(config=net.config), ids[:, :32], [20])
    got = decoded(net, MustafarCache(net.config, window=32, block=1), ids[:, :32], [20])
    # The plain cache leaves the query heads of a key head to SDPA one by one; ours are rows of one product.
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_threads_change_nothing() -> None:
    keys, values, query = drawn(4, 9000, 64), drawn(4, 9000, 64, seed=1), drawn(4, 2, 64, seed=2)
    packed = [BitmapRows.pack(x[:, :8960], 20) for x in (keys, values)]
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append(attend(query, *packed, [(keys[:, 8960:], values[:, 8960:])], 0.1))
    assert torch.equal(*answers)


def test_large_logits_do_not_overflow() -> None:
    keys, values = 100 * drawn(1, 300, 32), drawn(1, 300, 32, seed=1)
    query = 100 * drawn(1, 1, 32, seed=2)
    packed = [BitmapRows.pack(x[:, :280], 10) for x in (keys, values)]
    got = attend(query, *packed, [(keys[:, 280:], values[:, 280:])], 1.0)
    k, v = (torch.cat((p.unpack(), x[:, 280:]), dim=1) for p, x in zip(packed, (keys, values), strict=True))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, k, v, scale=1.0), rtol=1e-4, atol=1e-4)


def test_the_first_tokens_can_be_protected() -> None:
    keys, values = drawn(1, 50, 16), drawn(1, 50, 16, seed=1)
    row = MustafarRow(keys, values, schedule(window=5, block=10, protect_first=3))
    row.extend(keys[:, :41], values[:, :41])
    for t in range(41, 50):
        row.step(drawn(1, 1, 16), keys[:, t : t + 1], values[:, t : t + 1], 0.3)
    assert len(row.keys) == 40
    held = row.visible()[0]
    assert torch.equal(held[:, :40], prune_per_token(keys[:, 3:43], 0.7))
    assert torch.equal(held[:, 40:], torch.cat((keys[:, :3], keys[:, 43:]), dim=1))


@pytest.mark.parametrize(("budget", "prompt"), [(20, 1), (20, 90), (70, 1), (70, 90), (70, 10)])
def test_the_oldest_are_dropped_beyond_a_budget(budget: int, prompt: int) -> None:
    keys, values = drawn(1, 120, 16), drawn(1, 120, 16, seed=1)
    row = MustafarRow(keys, values, schedule(window=5, block=10, protect_first=2, budget=budget))
    row.extend(keys[:, :prompt], values[:, :prompt])
    for t in range(prompt, 120):
        row.step(drawn(1, 1, 16), keys[:, t : t + 1], values[:, t : t + 1], 0.3)
    held = row.visible()[0]
    packed = len(row.keys)
    assert held.shape[1] == budget
    # 110 tokens had to be packed by now; those that are still there are the newest of them.
    assert torch.equal(held[:, packed:], torch.cat((keys[:, :2], keys[:, 112:]), dim=1))
    assert torch.equal(held[:, :packed], prune_per_token(keys[:, 112 - packed : 112], 0.7))


@pytest.mark.parametrize("size", [30_000, 200_000, 1_000_000])
def test_a_budget_in_bytes_is_kept(size: int) -> None:
    net = tiny_llama()
    cache = MustafarCache(net.config, window=8, block=16, budget_bytes=size)
    keys = drawn(1, 2, 1500, 16)
    row = cache._make_row(keys[0], keys[0])
    row.extend(keys[0], keys[0])
    for _ in range(70):
        row.step(drawn(2, 2, 16), keys[0, :, :1], keys[0, :, :1], 0.3)
        assert net.config.num_hidden_layers * row.nbytes <= size
    assert net.config.num_hidden_layers * row.nbytes >= min(size, 600_000) * 0.5


@pytest.mark.parametrize(("sparsity", "most"), [(0.7, 0.40), (0.5, 0.60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_long_context(sparsity: float, most: float, dtype: torch.dtype) -> None:
    x = drawn(1, 16384, 128).to(dtype)
    row = MustafarRow(x, x, schedule(k_sparsity=sparsity, v_sparsity=sparsity))
    row.extend(x[:, :16200], x[:, :16200])
    for t in range(16200, 16384):
        row.step(x[:, :1], x[:, t : t + 1], x[:, t : t + 1], 0.1)
    assert row.nbytes <= most * 2 * x.nbytes


def test_report() -> None:
    net = tiny_llama(head_dim=64)
    cache = MustafarCache(net.config, k_sparsity=0.5, window=8, block=16, value_dtype=torch.bfloat16)
    ids = torch.randint(1, 64, (2, 100), generator=torch.Generator().manual_seed(0))
    decoded(net, cache, ids, [90])
    report = cache.report()
    assert report.details["kept_k"] == 32
    assert report.details["kept_v"] == 64 - 44
    assert report.details["tokens_packed"] == 80
    # Room for 128 rows of each of 2 heads, in 2 layers and 2 sequences: bitmaps, and values of keys and of values.
    assert report.details["bytes_packed"] == 128 * 2 * 2 * 2 * (2 * 8 + 2 * (32 + 20))
    # 2 * 2 * 64 * 4 bytes a token and layer.
    assert report.details["crossover"] == 2**25 // (2 * 2 * 2 * 64 * 4)
    assert report.bytes_dense == 2 * 2 * 100 * 2 * 2 * 64 * 4


def test_speed_packs_late_and_memory_at_once() -> None:
    config = tiny_llama().config
    assert MustafarCache(config).schedule.packed(288) == 256
    fast = MustafarCache(config, objective="speed")
    crossover = int(fast.report().details["crossover"])
    assert fast.schedule.packed(crossover - 1) == 0
    assert fast.schedule.packed(crossover) == reference.packed(crossover, 32, 256)
    assert MustafarCache(config, objective="speed", min_packed=0).schedule.packed(288) == 256
    row = MustafarRow(drawn(1, 40, 8), drawn(1, 40, 8), schedule(window=4, block=4, min_packed=30))
    for t in range(1, 36):
        row.step(drawn(1, 1, 8), drawn(1, 1, 8), drawn(1, 1, 8), 0.3)
        assert len(row.keys) == (0 if t < 30 else reference.packed(t, 4, 4))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k_sparsity": 1.0}, "k_sparsity"),
        ({"v_sparsity": -0.1}, "v_sparsity"),
        ({"k_sparsity": 1 - 1e-12}, "leaves none"),
        ({"window": 0}, "window"),
        ({"block": 0}, "block"),
        ({"protect_first": -1}, "protect_first"),
        ({"objective": "both"}, "objective"),
        ({"min_packed": -1}, "min_packed"),
        ({"value_dtype": torch.float64}, "value_dtype"),
        ({"budget": 3, "protect_first": 3}, "budget"),
        ({"budget": 300, "budget_bytes": 10**6}, "not both"),
        ({"budget_bytes": 10}, "budget_bytes"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        MustafarCache(tiny_llama().config, **options)


def test_other_dtypes_and_heads_too_wide_are_refused() -> None:
    net = tiny_llama().double()
    with attention(net), pytest.raises(QuernelError, match="float64"):
        net(torch.ones(1, 3, dtype=torch.int64), past_key_values=MustafarCache(net.config))
    with pytest.raises(QuernelError, match="head_dim"):
        MustafarCache(LlamaConfig(num_hidden_layers=1, head_dim=65536))
    with pytest.raises(QuernelError, match="CPU"):
        MustafarRow(torch.empty(1, 1, 8, device="meta"), torch.empty(1, 1, 8, device="meta"), PLAIN)
