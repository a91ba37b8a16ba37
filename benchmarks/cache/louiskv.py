"""LouisKV's decoding steps, prefill and memory, at the sizes of a Llama layer: 32 query heads, 8 key heads of 128.

A step takes the new key and value, compares the query with the last one, chooses units where it turned, and attends.
The queries are one stream, the same for all subjects, drawn so that it turns at about three steps of ten; how often it
does, and how often units were chosen, is measured and stands beside the times. The dense peers write
the new token into buffers that have the place for it already and attend to all tokens so far. All begin anew after 200
steps, short rows of ours from a copy, which ours pays for.
"""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._process import in_fresh_process, settled_bytes
from benchmarks._runner import Case

HEADS, KEY_HEADS, DIM, BUDGET = 32, 8, 128, 1024
GROUP, SCALE = HEADS // KEY_HEADS, DIM**-0.5
TURNS, STREAM = 0.3, 200
# Prompt tokens are near others: clusters have something to find.
TOPICS = 256
BYTES, FLOPS = 34e9, 94e9
RESIDENT_SHARE, PREFILL_SHARE = 0.15, 1.15
LONG = 65_536
# Rows of fewer tokens are kept at their length.
SHORT = 4096


def prompt(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return keys and values (Hk, tokens, d); keys scatter around topics that change along the text."""
    draw = torch.Generator().manual_seed(0)
    topics = torch.randn(KEY_HEADS, TOPICS, DIM, generator=draw)
    keys = torch.randn(KEY_HEADS, tokens, DIM, generator=draw)
    which = torch.randint(TOPICS, (tokens // 8 + 1,), generator=draw).repeat_interleave(8)[:tokens]
    keys += topics[:, which]
    values = torch.randn(KEY_HEADS, tokens, DIM, generator=draw)
    return keys.to(dtype), values.to(dtype)


def queries() -> Tensor:
    """Return (STREAM, Hk, g, d): at TURNS of the steps another direction, elsewhere near the last one."""
    draw = torch.Generator().manual_seed(1)
    stream = torch.randn(STREAM, KEY_HEADS, GROUP, DIM, generator=draw)
    stays = torch.rand(STREAM, generator=draw) >= TURNS
    for t in range(1, STREAM):
        if stays[t]:
            stream[t] = stream[t - 1] + 0.3 * stream[t]
    return stream


def make_row(keys: Tensor, values: Tensor, **options: Any) -> Any:
    from quernel.cache import KVPool, LouisKVConfig
    from quernel.cache.louiskv import LouisKVRow

    settings = LouisKVConfig(budget=BUDGET, **options)
    dtype = torch.float32 if settings.pool_dtype is None else getattr(torch, settings.pool_dtype)
    return LouisKVRow(keys, values, settings, KVPool(KEY_HEADS, 2 * DIM, dtype, settings.storage))


@torch.inference_mode()
def setup(tokens: int) -> SimpleNamespace:
    keys, values = prompt(tokens + STREAM)
    row = make_row(keys, values)
    row.extend(keys[:, :tokens], values[:, :tokens])
    stream = queries()
    new = torch.Generator().manual_seed(2)
    fresh = torch.randn(2, KEY_HEADS, STREAM, 1, DIM, generator=new)
    return SimpleNamespace(
        tokens=tokens,
        row=row,
        first=row.clone() if tokens < SHORT else None,
        keys=keys,
        values=values,
        stream=stream,
        fresh=fresh,
        ours=itertools.cycle(range(STREAM)),
        dense=itertools.cycle(range(STREAM)),
    )


def step_at(s: SimpleNamespace, t: int) -> tuple[Tensor, Tensor, Tensor]:
    return s.stream[t], s.fresh[0, :, t], s.fresh[1, :, t]


@torch.inference_mode()
def ours(s: SimpleNamespace) -> Tensor:
    """Ten steps, so that every call turns about as often."""
    if s.first is not None and s.row.tokens >= s.tokens + STREAM:
        s.row = s.first.clone()
    for _ in range(10):
        query, key, value = step_at(s, next(s.ours))
        out: Tensor = s.row.step(query, key, value, SCALE)
    return out


def dense(attend: Any, s: SimpleNamespace) -> Tensor:
    """Ten steps of full attention."""
    with torch.inference_mode():
        for _ in range(10):
            t = next(s.dense)
            query, key, value = step_at(s, t)
            end = s.tokens + t
            s.keys[:, end : end + 1], s.values[:, end : end + 1] = key, value
            out: Tensor = attend(query, s.keys[:, : end + 1], s.values[:, : end + 1])
    return out


def packed(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query[None], keys[None], values[None], scale=SCALE)[0]


def grouped(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    heads = query.reshape(1, HEADS, 1, DIM)
    return F.scaled_dot_product_attention(heads, keys[None], values[None], scale=SCALE, enable_gqa=True)


def eager(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(query * SCALE, keys.mT).softmax(-1), values)


@torch.inference_mode()
def attends_to_what_it_holds(s: SimpleNamespace) -> None:
    """Compare with the same attention in float64 over the working set, which must hold what the budget says."""
    query, key, value = step_at(s, next(s.ours))
    got = s.row.step(query, key, value, SCALE).double()
    seen = s.row._room[:, : s.row._end].double()
    spec = s.row.layout
    if s.row.tokens > spec.dense_below and not BUDGET < s.row._end <= spec.sink + BUDGET + spec.buffer + spec.longest:
        raise ValueError(f"the working set holds {s.row._end} tokens")
    wanted = eager(query.double(), seen[..., :DIM], seen[..., DIM:])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for attend in (packed, grouped, eager):
        answer = attend(query, s.keys, s.values).view(KEY_HEADS, GROUP, DIM)
        torch.testing.assert_close(answer, packed(query, s.keys, s.values), rtol=1e-3, atol=1e-4)
    ours(s)
    for _ in range(STREAM // 10):
        ours(s)
    rate = s.row.counts.selections / max(1, s.row.counts.sparse_steps)
    if s.row.counts.sparse_steps and not 0.2 <= rate <= 0.4:
        raise ValueError(f"units were chosen at {rate:.2f} of the steps, not at about {TURNS}")


def turning(s: SimpleNamespace) -> str:
    """Return how often the queries turn by the cache's own measure, and how often the row chose, in words."""
    counts, share = s.row.counts, turns_of(s.stream)
    chosen = f"units were chosen at {counts.selections / counts.sparse_steps:.3f}" if counts.sparse_steps else "dense"
    return f"the queries turn at {share:.3f} of the steps; {chosen}"


def turns_of(stream: Tensor) -> float:
    """Return the share of the steps whose queries are less alike than tau; the stream begins again at its end."""
    from quernel.cache import LouisKVConfig

    alike = F.cosine_similarity(stream, stream.roll(1, 0), dim=-1).flatten(1).mean(1)
    return float((alike < LouisKVConfig().tau).float().mean())


def bytes_bound(s: SimpleNamespace, threads: int) -> float:
    """Return the milliseconds that reading what ten steps need takes: the working set, summaries and chosen units."""
    record = KEY_HEADS * 2 * DIM * 4
    held = s.row._end * record
    turn = (s.tokens / 16 * record / 2 + 2 * BUDGET * record) * TURNS if s.row.counts.sparse_steps else 0
    return 10 * (held + turn) / (BYTES * threads) * 1e3


@torch.inference_mode()
def grown_mb(kind: str) -> float:
    """Return by how many MB the process grew through a row of LONG tokens and fifty steps; runs in a fresh process."""
    stream, part = queries(), 4096
    # Everything that is compiled or allocated once, before counting.
    keys, values = prompt(part + 300)
    first = make_row(keys, values, storage="memmap", pool_dtype="bfloat16")
    first.extend(keys, values)
    for t in range(20):
        packed(stream[t], keys, values)
        first.step(stream[t], keys[:, t : t + 1], values[:, t : t + 1], SCALE)
    del first
    before = settled_bytes() / 2**20
    if kind == "dense":
        held = torch.empty(2, KEY_HEADS, LONG, DIM)
        for at in range(0, LONG, part):
            held[0, :, at : at + part], held[1, :, at : at + part] = keys[:, :part], values[:, :part]
        for t in range(50):
            packed(stream[t], held[0], held[1])
        return settled_bytes() / 2**20 - before
    row = make_row(keys, values, storage="memmap", pool_dtype="bfloat16", dense_below=0)
    draw = torch.Generator().manual_seed(3)
    for _ in range(0, LONG, part):
        # A prompt that comes in parts: the row stores each as its own chunk.
        row.extend(keys[:, :part] + 0.1 * torch.randn(KEY_HEADS, part, DIM, generator=draw), values[:, :part])
    for t in range(50):
        row.step(stream[t], keys[:, t : t + 1], values[:, t : t + 1], SCALE)
    if row.tokens != LONG + 50:
        raise ValueError(f"the row holds {row.tokens} tokens")
    return settled_bytes() / 2**20 - before


@torch.inference_mode()
def fits(s: SimpleNamespace) -> None:
    """Check that a pool in a file leaves little in memory, and answers as one in memory does."""
    mine, other = (in_fresh_process(__file__, "grown_mb", kind) for kind in ("ours", "dense"))
    if mine > RESIDENT_SHARE * other:
        raise ValueError(f"the process grew by {mine:.0f} MB, with the dense cache by {other:.0f} MB")
    keys, values = prompt(6000)
    rows = [make_row(keys, values, storage=storage, pool_dtype="bfloat16") for storage in ("ram", "memmap")]
    for row in rows:
        row.extend(keys, values)
    for t in range(30):
        answers = [row.step(s.stream[t], keys[:, t : t + 1], values[:, t : t + 1], SCALE) for row in rows]
        if not torch.equal(*answers):
            raise ValueError("a file answers differently from memory")


@torch.inference_mode()
def in_a_file(tokens: int) -> SimpleNamespace:
    s = setup(tokens)
    s.row = make_row(s.keys, s.values, storage="memmap", pool_dtype="bfloat16")
    s.row.extend(s.keys[:, :tokens], s.values[:, :tokens])
    return s


def language_model() -> SimpleNamespace:
    from quernel.models import TinyLM

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = TinyLM(context=8192).eval().to_transformers()
    ids = torch.randint(0, 256, (1, 8192), generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(model=model, ids=ids)


def read_prompt(s: SimpleNamespace, cached: str) -> Any:
    from transformers import DynamicCache

    from quernel.cache import LouisKVCache, attention

    make = LouisKVCache if cached == "louis" else lambda config: DynamicCache(config=config)
    cache = make(s.model.config)
    with attention(s.model), torch.inference_mode():
        return s.model(s.ids, past_key_values=cache, logits_to_keep=1).logits, cache


def reads_the_same(s: SimpleNamespace) -> None:
    (got, cache), (wanted, _) = read_prompt(s, "louis"), read_prompt(s, "plain")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    if any(row.pool.tokens < 7000 for layer in cache.layers for row in layer.rows):
        raise ValueError("the prompt was not clustered")


DENSE = {
    "SDPA, heads of a key head packed": partial(dense, packed),
    "SDPA, enable_gqa": partial(dense, grouped),
    "eager": partial(dense, eager),
}
BOUND = "bytes of working set, summaries and chosen units at 34 GB/s a core"
CASES = [
    *(
        Case(
            name=f"ten decoding steps after {tokens:,} tokens, {BUDGET} chosen",
            setup=partial(setup, tokens),
            ours=ours,
            # Seconds a call after 65,536 tokens, and never the best.
            peers={name: peer for name, peer in DENSE.items() if tokens < LONG or "gqa" not in name},
            gate=attends_to_what_it_holds,
            facts=turning,
            target={name: least for name in DENSE if tokens < LONG or "gqa" not in name},
            bound_ms=bytes_bound,
            bound=BOUND,
        )
        for tokens, least in ((2048, 0.9), (16_384, 3.0), (LONG, 8.0))
    ),
    Case(
        name=f"ten decoding steps after {LONG:,} tokens, pool in a file of bfloat16",
        setup=partial(in_a_file, LONG),
        ours=ours,
        peers={"SDPA, heads of a key head packed": partial(dense, packed)},
        gate=fits,
        facts=turning,
        bound_ms=bytes_bound,
        bound=BOUND,
    ),
    Case(
        name="prompt of 8192 tokens, clusters included",
        setup=language_model,
        ours=lambda s: read_prompt(s, "louis"),
        peers={"DynamicCache": lambda s: read_prompt(s, "plain")},
        gate=reads_the_same,
        target={"DynamicCache": 1 / PREFILL_SHARE},
    ),
]
