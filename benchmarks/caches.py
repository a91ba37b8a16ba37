"""Bytes and milliseconds of a decoding step against the length of the context, every cache, one layer of a Llama.

``python -m benchmarks.caches [--write] [--tokens N ...]`` decodes with one sequence and layer, 32 query heads on 8 key
heads of 128 numbers, float32, two threads, along the queries that LouisKV's benchmark decodes with.  ``dense`` keeps
all keys and values and attends with the query heads of a key head packed, the fastest form on a CPU.  ``--write`` puts
the curves into ``benchmarks/caches.json``, from which the page on caches draws its picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._process import ProcessFailed, in_fresh_process, load_file
from quernel._timing import loaded

RESULTS = Path(__file__).resolve().with_suffix(".json")
TOKENS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
BUDGET, PART, STEPS, SECONDS, THREADS = 1024, 8192, 50, 1.0, 2
CACHES: dict[str, dict[str, Any]] = {
    "dense": {},
    "WindowCache": {"budget": BUDGET},
    "QuestCache": {"budget": BUDGET},
    "LouisKVCache": {"budget": BUDGET},
    "MustafarCache": {},
}


def measure(name: str, tokens: int) -> dict[str, float]:
    """Return milliseconds a step and bytes held; runs in a process of its own."""
    torch.set_grad_enabled(False)
    layer = load_file(Path(__file__).parent / "cache" / "louiskv.py")
    keys, values = layer.prompt(tokens)
    stream = layer.queries()
    fresh = torch.randn(2, layer.KEY_HEADS, len(stream), 1, layer.DIM, generator=torch.Generator().manual_seed(2))
    if name == "dense":
        held = [torch.cat((t, t[:, :1]), dim=1) for t in (keys, values)]

        def step(t: int) -> None:
            for mine, new in zip(held, fresh[:, :, t], strict=True):
                mine[:, -1:] = new
            layer.packed(stream[t], *held)

        nbytes = sum(t.nbytes for t in held)
    else:
        row = _row(name, keys, values, layer)

        def step(t: int) -> None:
            row.step(stream[t], fresh[0, :, t], fresh[1, :, t], layer.SCALE)

        nbytes = row.nbytes
    for t in range(20):
        step(t)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        for t in range(STEPS):
            step((20 + t) % len(stream))
        times.append(1e3 * (time.perf_counter() - start) / STEPS)
        if (len(times) + 1) * STEPS > tokens // 4:
            break  # the context would have grown by a part that counts
    return {"ms": statistics.median(times), "bytes": float(nbytes)}


def _row(name: str, keys: Any, values: Any, layer: Any) -> Any:
    from transformers import LlamaConfig

    from quernel import cache

    config = LlamaConfig(
        hidden_size=layer.HEADS * layer.DIM,
        num_attention_heads=layer.HEADS,
        num_key_value_heads=layer.KEY_HEADS,
        num_hidden_layers=1,
    )
    row = getattr(cache, name)(config, **CACHES[name])._make_row(keys, values)
    for start in range(0, keys.shape[1], PART):
        row.extend(keys[:, start : start + PART], values[:, start : start + PART])
    return row


def main() -> int:
    """Measure all curves, print them, and write them on demand."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.caches", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--tokens", type=int, action="append", help="a length of the context (repeatable)")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args()
    if (busy := loaded()) and not options.force:
        sys.stderr.write(f"not measured: {busy}\n")
        return 2
    curves: dict[str, list[dict[str, float]]] = {}
    for name in CACHES:
        for tokens in options.tokens or TOKENS:
            try:
                found = in_fresh_process(__file__, "measure", name, tokens, threads=THREADS)
            except ProcessFailed as error:
                sys.stderr.write(f"{name}, {tokens} tokens: {error}\n")
                continue
            curves.setdefault(name, []).append({"tokens": tokens, **found})
            sys.stdout.write(f"{name:16} {tokens:6} tokens {found['ms']:9.3f} ms {found['bytes'] / 2**20:8.1f} MiB\n")
    if options.write:
        content = {"date": time.strftime("%Y-%m-%d"), "budget": BUDGET, "threads": THREADS, "curves": curves}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
