"""Rows of LouisKV and Quest against the definition, token by token: working sets, answers, counts, covered shares."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quernel.cache import PackedKVPool, prune_per_token
from quernel.cache._packed_pool import make_pool
from quernel.cache._pool import KVPool
from quernel.cache._retrieval import Layout, RetrievalRow
from quernel.cache.louiskv import LouisKVConfig, LouisKVRow
from quernel.cache.quest import QuestRow
from tests.reference.louiskv import Row

HEADS, GROUP, DIM, SCALE = 2, 3, 8, 0.5
SMALL: dict[str, Any] = {
    "budget": 12,
    "cluster_size": 4,
    "sink": 3,
    "buffer": 8,
    "min_segment": 2,
    "max_segment": 6,
    "dense_below": 0,
}
# Of 8 channels 4 of a key and 6 of a value stay; the places in the values are large enough to be among them.
PRUNED: dict[str, Any] = {"k_sparsity": 0.5, "v_sparsity": 0.25}


def stream(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries that drift and jump now and then, keys, and values whose first number is the token's place."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, HEADS, n, DIM, generator=draw)
    values[..., 0] = torch.arange(n)
    queries = torch.randn(HEADS, GROUP, n, DIM, generator=draw)
    for t in range(1, n):
        if torch.rand((), generator=draw) < 0.7:
            queries[:, :, t] = queries[:, :, t - 1] + 0.3 * queries[:, :, t]
    return queries.to(dtype), keys.to(dtype), values.to(dtype)


def louis(keys: Tensor, values: Tensor, storage: str = "ram", **options: Any) -> LouisKVRow:
    settings = LouisKVConfig(**{**SMALL, **options})
    return LouisKVRow(keys, values, settings, make_pool(keys, values, None, storage, settings.dropped))


def quest(
    keys: Tensor,
    values: Tensor,
    budget: int = 12,
    page: int = 4,
    sink: int = 3,
    buffer: int = 8,
    dropped: tuple[float, float] | None = None,
) -> QuestRow:
    layout = Layout(budget, sink, buffer, page, page, page, part=8 * page, dense_below=0)
    return QuestRow(keys, values, layout, make_pool(keys, values, None, "ram", dropped))


def reference(row: RetrievalRow, tau: float | None) -> Row:
    s = row.layout
    size = s.piece if tau is None else row._settings.cluster_size  # type: ignore[attr-defined]
    kept = (row.pool.kept[0], row.pool.kept[1]) if isinstance(row.pool, PackedKVPool) else None
    return Row(s.budget, s.sink, s.buffer, size, s.shortest, s.longest, tau, part=s.part, kept=kept)


def held(row: RetrievalRow, head: int) -> list[int]:
    """Return the tokens of a head's working set, by the place that their values name."""
    return row._room[head, : row._end, DIM].long().tolist()


def compare(row: RetrievalRow, slow: Row, chunks: list[int], steps: int, seed: int = 0) -> None:
    """Feed chunks, each followed by so many steps, to both rows."""
    queries, keys, values = stream(sum(chunks) + steps * len(chunks), seed)
    t = 0
    for chunk in chunks:
        for each in (row, slow):
            each.extend(keys[:, t : t + chunk], values[:, t : t + chunk])
        t += chunk
        for _ in range(steps):
            step = queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE
            got, wanted = row.step(*step), slow.step(*step)
            for head in range(HEADS):
                assert sorted(held(row, head)) == sorted(slow.working(head)), f"token {t}, head {head}"
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            t += 1
            assert row.tokens == t
            check_partition(row, t)
    assert row.counts.selections == slow.selections


def check_partition(row: RetrievalRow, n: int) -> None:
    """Every token is a sink, in one unit of the pool, or local; the newest ones are local; no head overshoots."""
    spec = row.layout
    pooled = [block[..., DIM].long() for block in row.pool.blocks()]
    for head in range(HEADS):
        working = held(row, head)
        sinks, local = working[: row._sinks], working[row._sinks + row._chosen :]
        units = [token for block in pooled for token in block[head].tolist()]
        assert sorted(sinks + units + local) == list(range(n))
        assert sinks == list(range(min(n, spec.sink)))
        newest = range(max(spec.sink, n - spec.buffer), n)
        assert set(newest) <= set(local)
        assert len(set(working)) == len(working)
        assert row._dense or len(working) <= spec.sink + spec.budget + spec.buffer + spec.longest - 1
        assert row._chosen <= spec.budget
        if row._summary is not None:
            sizes = row._sizes[head, : row._n_units]
            assert sizes.sum() == row.pool.tokens
            starts = row._starts[head, : row._n_units][sizes > 0]
            ranges = sorted(zip(starts.tolist(), sizes[sizes > 0].tolist(), strict=True))
            assert all(a + size <= b for (a, size), (b, _) in pairwise(ranges))


@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        ([60], {}),
        ([3], {"tau": 0.9}),
        ([1], {"sink": 5}),
        ([40], {"tau": 2.0, "budget": 4}),
        ([40], {"tau": -1.0}),
        ([40, 30, 5, 1], {"tau": 0.8}),
        ([2, 3, 9], {"sink": 7, "buffer": 6}),
        ([70], {"budget": 10_000}),
        ([50], {"cluster_size": 1, "budget": 7}),
        ([50], {"cluster_size": 9, "max_segment": 3}),
        ([50], {"sink": 0, "buffer": 1, "max_segment": 1, "min_segment": 1, "cluster_size": 1}),
        ([60], PRUNED),
        ([1], PRUNED),
        ([40, 30, 5, 1], {"tau": 0.8, **PRUNED}),
        ([40], {"tau": -1.0, "budget": 20, **PRUNED}),
        ([70], {"budget": 10_000, **PRUNED}),
        ([50], {"k_sparsity": 0.7}),
        ([50], {"v_sparsity": 0.7, "cluster_size": 1, "budget": 7}),
    ],
)
def test_louis_is_the_definition(chunks: list[int], options: dict[str, Any]) -> None:
    _, keys, values = stream(2)
    row = louis(keys, values, **options)
    compare(row, reference(row, row._settings.tau), chunks, steps=40)
    rate = row.counts.selections / row.counts.steps
    assert rate > 0 and row.counts.steps == 40 * len(chunks)


@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        ([60], {}),
        ([1], {}),
        ([33, 7, 50], {}),
        ([60], {"sink": 0, "buffer": 1}),
        ([60], {"page": 1, "budget": 5}),
        ([60], {"dropped": (0.5, 0.3)}),
        ([33, 7, 50], {"dropped": (0.7, 0.0), "budget": 40}),
    ],
)
def test_quest_is_the_definition(chunks: list[int], options: dict[str, Any]) -> None:
    _, keys, values = stream(2)
    row = quest(keys, values, **options)
    compare(row, reference(row, None), chunks, steps=25)
    assert row.counts.selections == row.counts.steps


def test_equal_keys_leave_clusters_empty_and_ties_go_to_the_older_unit() -> None:
    queries, keys, values = stream(60)
    keys[0], keys[1, 20:] = 1.0, 2.0
    row = louis(keys, values, tau=2.0)
    slow = reference(row, 2.0)
    for each in (row, slow):
        each.extend(keys[:, :50], values[:, :50])
    assert row._ragged and (row._sizes[0, : row._n_units] > 0).sum() < (row._sizes[1, : row._n_units] > 0).sum()
    for t in range(50, 60):
        step = queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE
        torch.testing.assert_close(row.step(*step), slow.step(*step), rtol=1e-4, atol=1e-5)
        check_partition(row, t + 1)


def test_query_heads_of_a_key_head_share_the_choice_by_the_mean_of_their_softmax() -> None:
    keys = torch.zeros(1, 24, 2)
    keys[0, :8, 0], keys[0, 8:16, 1] = 1.0, 1.0
    row = LouisKVRow(
        keys,
        keys,
        LouisKVConfig(**{**SMALL, "sink": 0, "budget": 4, "tau": 2.0, "buffer": 8, "max_segment": 4}),
        KVPool(1, 4),
    )
    row.extend(keys, keys)
    # The first head prefers the first key by far, the second the other one a little: raw products would side with
    # the first if its scale decided, the mean of weights does so because it is surer.
    row.step(torch.tensor([[[9.0, 0.0], [0.0, 1.0]]]), keys[:, :1], keys[:, :1], 1.0)
    assert row._room[0, :4, 0].tolist() == [1.0] * 4


def test_a_pruned_pool_is_chosen_from_as_a_dense_one_and_joined_as_it_is_kept() -> None:
    queries, keys, values = stream(260)
    dense, pruned = louis(keys, values, tau=0.8), louis(keys, values, tau=0.8, **PRUNED)
    for row in (dense, pruned):
        row.extend(keys[:, :100], values[:, :100])
    changed = 0
    for t in range(100, 260):
        step = queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE
        changed += not torch.allclose(dense.step(*step), pruned.step(*step))
        for head in range(HEADS):
            # Units are formed and scored while their keys are whole.
            assert held(dense, head) == held(pruned, head)
            places, local = held(pruned, head), slice(pruned._sinks + pruned._chosen, pruned._end)
            chosen = slice(pruned._sinks, pruned._sinks + pruned._chosen)
            record = torch.cat((keys, values), dim=-1)[head, places]
            small = torch.cat((prune_per_token(keys, 0.5), prune_per_token(values, 0.25)), dim=-1)[head, places]
            assert torch.equal(pruned._room[head, local], record[local])
            assert torch.equal(pruned._room[head, chosen], small[chosen])
    assert changed > 150 and dense.counts.selections == pruned.counts.selections > 20


def test_counts_of_choices_grow_with_tau() -> None:
    queries, keys, values = stream(300)
    found = []
    for tau in (-1.0, 0.3, 0.6, 0.9, 0.96, 1.0, 1.01):
        row = louis(keys, values, tau=tau)
        row.extend(keys[:, :100], values[:, :100])
        for t in range(100, 300):
            row.step(queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE)
        found.append(row.counts.selections)
    assert found[0] == 1 and found[-1] == 200
    assert found == sorted(found) and 1 < found[2] < 200


def test_a_permuted_store_answers_as_one_in_order() -> None:
    queries, keys, values = stream(400)
    row = louis(keys, values)
    row.extend(keys, values)
    assert not torch.equal(row.visible()[1][..., 0], values[..., 0])
    seen = torch.nn.functional.scaled_dot_product_attention(queries[:, :, -1], *row.visible(), scale=SCALE)
    wanted = torch.nn.functional.scaled_dot_product_attention(queries[:, :, -1], keys, values, scale=SCALE)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-6 * float(values.abs().max()))


@pytest.mark.parametrize(("threshold", "options"), [(40, {}), (75, {}), (90, {}), (75, PRUNED), (90, PRUNED)])
def test_a_dense_row_attends_to_all_and_then_becomes_what_it_would_have_been(
    threshold: int, options: dict[str, Any]
) -> None:
    queries, keys, values = stream(160)
    row = louis(keys, values, dense_below=threshold, tau=0.9, **options)
    slow = reference(row, 0.9)
    for each in (row, slow):
        each.extend(keys[:, :70], values[:, :70])
    together = 0
    for t in range(70, 160):
        before = row.counts.selections, slow.selections
        step = queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE
        got, wanted = row.step(*step), slow.step(*step)
        if t < threshold:
            assert row.counts.sparse_steps == 0 and row.pool.tokens == 0
            full = torch.nn.functional.scaled_dot_product_attention(
                queries[:, :, t], keys[:, : t + 1], values[:, : t + 1], scale=SCALE
            )
            torch.testing.assert_close(got, full, rtol=1e-4, atol=1e-5)
            continue
        check_partition(row, t + 1)
        if row.counts.selections > before[0] and slow.selections > before[1]:
            # The one that was never dense may choose earlier; where both choose they agree.
            together += 1
            assert all(sorted(held(row, head)) == sorted(slow.working(head)) for head in range(HEADS))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert row.counts.sparse_steps == 160 - max(threshold, 70) and together > 10


def test_a_dense_row_takes_chunks_before_and_beyond_its_limit() -> None:
    queries, keys, values = stream(120)
    row, t = louis(keys, values, dense_below=55), 0
    for chunk in (20, 5, 40, 30):
        row.extend(keys[:, t : t + chunk], values[:, t : t + chunk])
        t += chunk
        for _ in range(5):
            row.step(queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE)
            t += 1
            check_partition(row, t)
            assert (row.pool.tokens > 0) == (t > 55)
            assert row._room.shape[1] <= (62 if t <= 55 else row._usual)


def test_what_is_covered_is_the_share_of_the_full_softmax() -> None:
    queries, keys, values = stream(120)
    row = louis(keys, values, audit=True, tau=0.9)
    slow = reference(row, 0.9)
    for each in (row, slow):
        each.extend(keys[:, :80], values[:, :80])
    total = 0.0
    for t in range(80, 120):
        step = queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE
        row.step(*step)
        slow.step(*step)
        total += slow.covered(queries[:, :, t], SCALE)
    assert 0.1 < total / 40 < 0.999
    assert row.counts.covered == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("options", [{}, PRUNED], ids=["dense", "pruned"])
def test_a_clone_goes_its_own_way(options: dict[str, Any]) -> None:
    queries, keys, values = stream(100)
    for storage in ("ram", "memmap"):
        row = louis(keys, values, storage, **options)
        row.extend(keys[:, :60], values[:, :60])
        row.step(queries[:, :, 60], keys[:, 60:61], values[:, 60:61], SCALE)
        other = row.clone()
        before = {t.data_ptr() for t in row.tensors() if t.numel()}
        assert not before & {t.data_ptr() for t in other.tensors() if t.numel()}
        for t in range(61, 100):
            step = queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE
            first = row.step(*step)
        for t in range(61, 100):
            again = other.step(queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE)
        assert torch.equal(first, again)


@pytest.mark.parametrize(("options", "record"), [({}, 2 * DIM * 4), (PRUNED, 8 + 4 * 4 + 8 + 6 * 4)])
def test_a_file_answers_as_memory_does(options: dict[str, Any], record: int) -> None:
    queries, keys, values = stream(200)
    rows = [louis(keys, values, storage, **options) for storage in ("ram", "memmap")]
    for row in rows:
        row.extend(keys[:, :120], values[:, :120])
    for t in range(120, 200):
        step = queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE
        assert torch.equal(*(row.step(*step) for row in rows))
    inside, outside = rows
    assert outside.nbytes - outside.resident_nbytes == outside.pool.nbytes == outside.pool.tokens * HEADS * record
    assert outside.pool.tokens > 100
    assert outside.resident_nbytes < inside.resident_nbytes == inside.nbytes


def test_half_precision_is_compared_and_chosen_in_float32() -> None:
    queries, keys, values = stream(120, dtype=torch.bfloat16)
    row = louis(keys, values)
    row.extend(keys[:, :100], values[:, :100])
    out = row.step(queries[:, :, 100], keys[:, 100:101], values[:, 100:101], SCALE)
    assert out.dtype == row.pool.dtype == torch.bfloat16
    assert row._summary is not None and row._summary.dtype == torch.float32
    np.testing.assert_array_equal(row._sizes[:, : row._n_units].sum(1), row.pool.tokens)
