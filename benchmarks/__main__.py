"""``python -m benchmarks <slug>``: run one system's benchmark and print its table; see ``_runner``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import _runner
from benchmarks._runner import Row, Settings
from quernel._machine import processor_name

EXIT_FAILED, EXIT_VOID = 1, 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line; return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(path.stem for path in _runner.benchmark_files()))
        return 0
    if options.slug is None:
        parser.error("which system? --list shows those with a benchmark")
    if options.write and (options.case or options.threads or options.force):
        parser.error("--write keeps whole, valid results: drop --case, --threads and --force")
    try:
        file = _runner.find(options.slug)
    except LookupError as error:
        parser.error(str(error))
    settings = Settings(
        force=options.force,
        wait_s=options.wait,
        threads=(options.threads,) if options.threads else None,
        cold=options.cold,
    )
    rows: list[Row] = []
    print(_line(_HEADINGS))
    for row in _runner.run_cases(file, lambda case: options.case is None or options.case in case.name, settings):
        if row.cold_ms is not None and row.name not in {other.name for other in rows}:
            print(f"{row.name}: first call in a fresh process {row.cold_ms:.4g} ms", flush=True)
        print(_line(_cells(row)), flush=True)
        if row.facts and row.facts not in {other.facts for other in rows}:
            print(f"    {row.facts}", flush=True)
        rows.append(row)
        if row.note:
            print(f"    {'VOID: ' if row.void else ''}{row.note}", flush=True)
    void, failed = any(row.void for row in rows), not all(row.ok for row in rows)
    if options.write and not void:
        write_results(options.slug, rows, options.results)
    elif options.write:
        print("not written: some rows are void; run again on a quiet machine")
    if options.json:
        print(json.dumps({"slug": options.slug, "rows": [row.to_json() for row in rows]}, allow_nan=False), flush=True)
    return EXIT_VOID if void else EXIT_FAILED if failed else 0


def write_results(slug: str, rows: Sequence[Row], folder: Path) -> Path:
    """Write full rows and the machine they were measured on to ``folder/<slug>.json``."""
    document = {
        "slug": slug,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "rows": [{name: _short(value) for name, value in vars(row).items()} for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{slug}.json"
    draft = target.with_suffix(".json.part")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(target)
    return target


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    packages = {name: version(name) for name in ("torch", "numba", "numpy")}
    return {"processor": processor_name(), "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time a system against its peers.")
    parser.add_argument("slug", nargs="?", help="which system")
    parser.add_argument("--list", action="store_true", help="print the systems that have a benchmark")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON on the last line")
    parser.add_argument("--write", action="store_true", help="keep the result under benchmarks/results")
    parser.add_argument("--force", action="store_true", help="print ratios on a busy machine too, marked void")
    parser.add_argument("--case", help="only cases whose name holds this text")
    parser.add_argument("--threads", type=int, help="only this number of threads")
    parser.add_argument("--cold", action="store_true", help="also time the first call in a fresh process")
    parser.add_argument("--wait", type=float, default=30.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--results", type=Path, default=_runner.HERE / "results", help="folder for --write")
    return parser


_HEADINGS = ("case", "threads", "ours ms", "peer", "peer ms", "ratio", "quartiles", "lowest", "target", "bound", "ok")
_WIDTHS = (34, 7, 9, 20, 9, 7, 13, 7, 7, 6, 4)


def _cells(row: Row) -> tuple[str, ...]:
    reached = "" if not (row.bound_ms and row.ours_ms) else f"{row.bound_ms / row.ours_ms:.0%}"
    return (
        row.name,
        str(row.threads),
        _number(row.ours_ms),
        row.peer,
        _number(row.peer_ms),
        _number(row.ratio),
        "" if row.q1 is None or row.q3 is None else f"{row.q1:.2f}..{row.q3:.2f}",
        _number(row.lowest),
        _number(row.target),
        reached,
        "void" if row.void else "yes" if row.ok else "NO",
    )


def _line(cells: Sequence[str]) -> str:
    return " ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    raise SystemExit(main())
