"""What each method does to two real models, and whether the whole menu beats its first half.

``python -m benchmarks.fronts [--write] [--max-examples N] [--model NAME]`` searches MiniLM on STS-B and ResNet-20 on
CIFAR-10 twice: with the first family of methods (FIRST) and with every registered one.  Both fronts are printed; a
front improves on another if it has a point at least as good as each of its points, and a better one.  ``--write`` puts
all measured points into ``benchmarks/fronts.json``, from which the page on choosing a method is drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quernel import models
from quernel._timing import loaded
from quernel.compress import Budget, SearchResult, search
from quernel.compress._menu import Point, default_methods, front

RESULTS = Path(__file__).resolve().with_suffix(".json")
DATA = {"minilm": "stsb", "resnet20-cifar10": "cifar10-lossless"}
# What the library offered before four bits, shifts, sparsity, one-way filters and kernelised layers.
FIRST = {"Cast", "CrossQuant", "FeatureMerging", "SmoothQuant", "UniformLowRank", "WeLore", "WeightInt8"}
BUDGET = Budget(bytes=0.5, drop=0.02)


def run(name: str, max_examples: int | None, folder: str) -> dict[str, Any]:
    """Search one model with both menus and return every point."""
    model = models.resolve(name)
    task = models.task(model, DATA[name], max_examples=max_examples)
    options: dict[str, Any] = {"data": task.calibration, "example_inputs": task.example_inputs, "resume": folder}
    menu = default_methods(frozenset({"data", "graph"}))
    found: dict[str, Any] = {"model": name, "data": task.data, "metric": task.metric, "date": time.strftime("%Y-%m-%d")}
    for key, methods in (("first", [m for m in menu if type(m).__name__ in FIRST]), ("all", menu)):
        start = time.perf_counter()
        result = search(model, BUDGET, methods, evaluate=(task.select, task.judge), progress=_tell, **options)
        found[key] = {
            "points": _points(result),
            "chosen": result.report.methods,
            "seconds": time.perf_counter() - start,
        }
        found["full"] = {"bytes": result.report.bytes_before, "metric": task.select(model)}
    found["improves"] = improves(found["all"]["points"], found["first"]["points"])
    return found


def _tell(message: str, fraction: float) -> None:
    sys.stderr.write(f"\r{fraction:4.0%} {message[:100]:100}")


def _points(result: SearchResult) -> list[dict[str, Any]]:
    return [
        {"methods": t.label, "bytes": t.file_bytes, "metric": t.metric, "latency_ms": t.latency_ms}
        for t in result.trials
        if t.ok and t.metric is not None
    ]


def on_front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points that no other beats in both bytes and metric, smallest first."""
    by_place = {(p["bytes"], p["metric"]): p for p in reversed(points)}
    kept = front([Point((), p["bytes"], p["metric"]) for p in points])
    return [by_place[p.bytes, p.metric] for p in kept]


def improves(new: list[dict[str, Any]], old: list[dict[str, Any]]) -> bool:
    """Whether each point of the old front is matched in bytes and metric, and one of them beaten."""
    matched, better = True, False
    for p in on_front(old):
        rivals = [q for q in new if q["bytes"] <= p["bytes"] and q["metric"] >= p["metric"]]
        matched &= bool(rivals)
        better |= any(q["bytes"] < p["bytes"] or q["metric"] > p["metric"] for q in rivals)
    # A new front may also reach further down than the old one.
    return matched and (better or min(p["bytes"] for p in new) < min(p["bytes"] for p in old))


def show(found: dict[str, Any]) -> str:
    """Return both fronts as text."""
    full = found["full"]["bytes"]
    lines = [
        f"{found['model']} on {found['data']}: {found['metric']} {found['full']['metric']:.4f}, {full / 1e6:.1f} MB"
    ]
    for key in ("first", "all"):
        lines.append(f"  front, {key} methods ({found[key]['seconds']:.0f} s):")
        for p in on_front(found[key]["points"]):
            speed = "" if p["latency_ms"] is None else f"{p['latency_ms']:9.1f} ms"
            lines.append(f"    {p['bytes'] / full:7.3f} {p['metric']:8.4f} {speed}  {p['methods']}")
    return "\n".join([*lines, f"  strictly improves: {'yes' if found['improves'] else 'NO'}"])


def main() -> int:
    """Run, print, and write if asked; 1 if a front does not improve, 4 on a loaded machine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--max-examples", type=int)
    parser.add_argument("--model", choices=sorted(DATA), action="append")
    parser.add_argument("--resume", help="folder of finished trials")
    options = parser.parse_args()
    if loaded():
        sys.stderr.write("the machine is busy: latencies will be missing\n")
        if options.write:
            return 4
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["models"] if RESULTS.exists() else {}
    results = dict(before)
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.model or sorted(DATA):
            results[name] = run(name, options.max_examples, str(Path(options.resume or scratch) / name))
            sys.stdout.write("\n" + show(results[name]) + "\n")
    if options.write:
        RESULTS.write_text(json.dumps({"models": results}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0 if all(found["improves"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
