"""Time and memory of every token mixer against the number of tokens, one image or sequence, one thread, float32.

``python -m benchmarks.mixers [--write] [--side N ...]`` measures each mixer in a process of its own, in eval mode;
``--write`` puts the curves into ``benchmarks/mixers.json``, from which the page on token mixers draws its picture.
Grids are square; mixers of sequences get as many tokens in a row.  Memory is what a forward pass needs for a while on
top of the module, its input and the loaded code, by the kernel's own count of resident pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._process import ProcessFailed, in_fresh_process, resident_bytes
from quernel._threads import workspace_bytes
from quernel._timing import loaded

RESULTS = Path(__file__).resolve().with_suffix(".json")
DIM, HEADS = 64, 4
SIDES = (8, 16, 32, 64, 128)
# Class -> options; ``size`` and ``length`` are filled in with the side of the grid and the number of tokens.
MIXERS: dict[str, dict[str, Any]] = {
    "SoftmaxAttention": {"num_heads": HEADS},
    "SoftmaxFreeAttention": {"num_heads": HEADS, "ratio": 8},
    "NormAwareLinearAttention": {"heads": HEADS},
    "BinaryLinearAttention": {"num_heads": HEADS},
    "NeighborhoodAttention2d": {"num_heads": HEADS, "kernel_size": 7},
    "HyperZZWGlobal": {"size": "side"},
    "InceptionDWConv2d": {},
    "LSConv": {},
    "SGConv": {"l_max": "tokens"},
    "LongConv": {"l_max": "tokens"},
}
# Of a sequence, not of a grid.
SEQUENCES = {"SGConv", "LongConv"}
# A forward pass is repeated for about so long.
SECONDS = 1.0
# Temporaries go back to the system at once, so that those of the first pass do not hide those of the second.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def measure_time(name: str, side: int) -> float:
    """Return the milliseconds of a forward pass; runs in a process of its own."""
    mixer, x = _prepared(name, side)
    times: list[float] = []
    mixer(x)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        mixer(x)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_memory(name: str, side: int) -> float:
    """Return the mebibytes that a forward pass needs for a while; runs in a process of its own, under ``ALLOCATOR``."""
    mixer, x = _prepared(name, side)
    mixer(x)
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    mixer(x)
    # What a mixer keeps between calls has been there before; it needs that too.
    return (max(resident_bytes("VmHWM") - before, 0) + workspace_bytes()) / 2**20


def _prepared(name: str, side: int) -> tuple[Any, Any]:
    import torch

    from quernel import nn

    torch.set_grad_enabled(False)
    places = {"side": side, "tokens": side * side}
    options = {
        key: places.get(value, value) if isinstance(value, str) else value for key, value in MIXERS[name].items()
    }
    torch.manual_seed(0)
    mixer = getattr(nn, name)(DIM, **options).eval()
    return mixer, torch.randn(1, side * side, DIM) if name in SEQUENCES else torch.randn(1, side, side, DIM)


def main() -> int:
    """Measure all curves, print them, and write them on demand."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixers", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--side", type=int, action="append", help="a side of the grid (repeatable)")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args()
    if (busy := loaded()) and not options.force:
        sys.stderr.write(f"not measured: {busy}\n")
        return 2
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in MIXERS:
        for side in options.side or SIDES:
            try:
                milliseconds = in_fresh_process(__file__, "measure_time", name, side, threads=1)
                mebibytes = in_fresh_process(__file__, "measure_memory", name, side, threads=1, env=ALLOCATOR)
            except ProcessFailed as error:
                sys.stderr.write(f"{name}, {side * side} tokens: {error}\n")
                continue
            curves.setdefault(name, []).append({"tokens": side * side, "ms": milliseconds, "MiB": mebibytes})
            sys.stdout.write(f"{name:28} {side * side:6} tokens {milliseconds:10.3f} ms {mebibytes:8.1f} MiB\n")
    if options.write:
        content = {"dim": DIM, "heads": HEADS, "date": time.strftime("%Y-%m-%d"), "curves": curves}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
