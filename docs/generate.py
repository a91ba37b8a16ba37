"""Write the generated parts of README.md and docs/ from the registry, claims.toml and the benchmark results.

A page marks its generated parts with `<!-- generated: NAME -->` and `<!-- end -->`; NAME is one of SECTIONS.
`python docs/generate.py` rewrites what is stale, `--check` only lists it and fails.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quernel._catalogue import list_methods
from quernel._claims import Claim, read_claims
from quernel._registry import catalogue
from quernel.report._curves import chart

ROOT = Path(__file__).resolve().parents[1]
PART = re.compile(r"(<!-- generated: ([a-z-]+(?: [a-z0-9-]+)?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def systems(link: str = "{slug}.md") -> str:
    """One row a system, in alphabetical order."""
    rows = [
        [
            f"[{m['slug']}]({link.format(slug=m['slug'])})",
            m["pillar"],
            _one_line(m["summary"]),
            _paper(m["paper"]),
            m["verdict"],
        ]
        for m in list_methods()
    ]
    return _table(["system", "pillar", "what it does", "paper", "claims"], rows)


def claims(slug: str) -> str:
    """Every measured claim of one system."""
    found = [claim for claim in read_claims() if claim.slug == slug]
    if not found:
        return "No claim is recorded for this system.\n"
    commands = sorted({claim.command for claim in found})
    return _claims_table(found) + "\nMeasured with " + ", ".join(f"`{c}`" for c in commands) + ".\n"


def all_claims() -> str:
    """The whole ledger, by system."""
    by_slug: dict[str, list[Claim]] = {}
    for claim in read_claims():
        by_slug.setdefault(claim.slug, []).append(claim)
    if not by_slug:
        return "No claim has been measured yet.\n"
    return "\n".join(f"## {slug}\n\n{_claims_table(found)}" for slug, found in by_slug.items())


def benchmarks(slug: str) -> str:
    """The recorded timings of one system."""
    found = [result for result in _results() if result["slug"] == slug]
    if not found:
        return "No timing is recorded for this system.\n"
    return "\n".join(_benchmark_table(result) for result in found)


def all_benchmarks() -> str:
    """Every recorded timing."""
    results = _results()
    if not results:
        return "No timing is recorded yet.\n"
    return "\n".join(f"## {result['slug']}\n\n{_benchmark_table(result)}" for result in results)


def fronts(model: str) -> str:
    """Every single method tried on one model, and the combinations on the front, smallest first."""
    file = ROOT / "benchmarks" / "fronts.json"
    found = json.loads(file.read_text(encoding="utf-8"))["models"].get(model) if file.is_file() else None
    if found is None:
        return "Not measured yet.\n"
    full, points = found["full"], found["all"]["points"]
    best = [p for p in points if not any(_beats(q, p) for q in points)]
    shown = sorted((p for p in points if p in best or " + " not in p["methods"]), key=lambda p: p["bytes"])
    rows = [
        [
            f"**{p['methods']}**" if p in best else p["methods"],
            f"{p['bytes'] / full['bytes']:.3f}",
            f"{p['metric']:.4f}",
            f"{p['metric'] - full['metric']:+.4f}",
            "" if p["latency_ms"] is None else f"{p['latency_ms']:.1f}",
        ]
        for p in shown
    ]
    head = f"Uncompressed: {full['bytes'] / 1e6:.1f} MB, {found['metric']} {full['metric']:.4f} on {found['data']}.\n\n"
    return head + _table(["methods (bold: on the front)", "share of the bytes", found["metric"], "change", "ms"], rows)


def mixer_names() -> str:
    """Every token mixer by the two names that ``make_mixer`` takes."""
    rows = [
        [f"[{e.slug}](methods/{e.slug}.md)", f"`{e.name}`", _one_line(e.summary)]
        for e in catalogue()
        if e.contract == "mixer"
    ]
    return _table(["system", "class", "what it does"], rows)


def mixers() -> str:
    """Time and memory of every token mixer against the number of tokens: two pictures and a table."""
    file = ROOT / "benchmarks" / "mixers.json"
    if not file.is_file():
        return "Not measured yet.\n"
    found = json.loads(file.read_text(encoding="utf-8"))
    curves = found["curves"]
    tokens = sorted({point["tokens"] for curve in curves.values() for point in curve})
    parts = [f"{found['dim']} channels, {found['heads']} heads, one sample, one thread, float32.\n"]
    for key, title in (("ms", "milliseconds"), ("MiB", "MiB on top of module and input")):
        drawn = {name: [(p["tokens"], p[key]) for p in curve] for name, curve in curves.items()}
        parts.append(chart(drawn, "tokens", title) + "\n")
    rows = []
    for name, curve in curves.items():
        at = {point["tokens"]: point for point in curve}
        rows.append([name, *(f"{at[n]['ms']:.3g}" if n in at else "" for n in tokens)])
    return "\n".join([*parts, _table(["ms at", *(f"{n:,} tokens" for n in tokens)], rows)])


def caches() -> str:
    """Time and bytes of a decoding step against the context, every cache: two pictures and a table."""
    file = ROOT / "benchmarks" / "caches.json"
    if not file.is_file():
        return "Not measured yet.\n"
    found = json.loads(file.read_text(encoding="utf-8"))
    curves = found["curves"]
    layer = "One layer and sequence, 32 query heads on 8 key heads of 128 numbers, float32"
    parts = [f"{layer}, {found['threads']} threads; caches with a budget of {found['budget']:,} tokens.\n"]
    for key, title, scale in (("ms", "milliseconds a token", 1.0), ("bytes", "MiB stored", 2.0**20)):
        drawn = {name: [(p["tokens"], p[key] / scale) for p in curve] for name, curve in curves.items()}
        parts.append(chart(drawn, "tokens", title) + "\n")
    tokens = sorted({point["tokens"] for curve in curves.values() for point in curve})
    rows = []
    for name, curve in curves.items():
        at = {point["tokens"]: point for point in curve}
        rows.append([name, *(f"{at[n]['ms']:.3g} / {at[n]['bytes'] / 2**20:.3g}" if n in at else "" for n in tokens)])
    return "\n".join([*parts, _table(["ms / MiB at", *(f"{n:,} tokens" for n in tokens)], rows)])


def conversions() -> str:
    """Existing networks with other mixers: score before, right after and after training further, time and size."""
    file = ROOT / "benchmarks" / "conversions.json"
    if not file.is_file():
        return "Not measured yet.\n"
    rows = []
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"].values():
        scores = [_number(row[key]) for key in ("before", "between", "after")]
        cost = [
            f"{_number(row[f'{key}_before'])} to {_number(row[f'{key}_after'])}" if row[f"{key}_before"] else ""
            for key in ("ms", "flops", "bytes")
        ]
        rows.append([row["network"], f"{row['layers']} times {row['change']}", row["measured_on"], *scores, *cost])
    head = ["network", "change", "measured on", "before", "converted", "trained further", "ms", "operations", "bytes"]
    return _table(head, rows)


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether ``one`` is no worse in bytes and metric, and better in one of them."""
    pairs = [(-one["bytes"], -other["bytes"]), (one["metric"], other["metric"])]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


SECTIONS: dict[str, Callable[..., str]] = {
    "systems": systems,
    "readme-systems": lambda: systems("docs/methods/{slug}.md"),
    "claims": claims,
    "all-claims": all_claims,
    "benchmarks": benchmarks,
    "all-benchmarks": all_benchmarks,
    "caches": caches,
    "conversions": conversions,
    "fronts": fronts,
    "mixer-names": mixer_names,
    "mixers": mixers,
}


def rendered(page: Path) -> str:
    """Return the text of a page with its generated parts up to date."""

    def fresh(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        return match[1] + "\n" + SECTIONS[name](*arguments) + "\n" + match[4]

    return PART.sub(fresh, page.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    """Return every page that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale() -> list[Path]:
    """Return the pages whose generated parts differ from what would be written now."""
    return [page for page in pages() if rendered(page) != page.read_text(encoding="utf-8")]


def _results() -> list[dict[str, Any]]:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return sorted((json.loads(f.read_text(encoding="utf-8")) for f in files), key=lambda r: str(r["slug"]))


def _claims_table(found: list[Claim]) -> str:
    rows = [
        [
            c.verdict,
            c.claim,
            c.metric,
            _with_notes(c.ours, _spread(c.ours_by_seed)),
            _with_notes(c.baseline, c.baseline_name, _spread(c.baseline_by_seed)),
            c.threshold,
            c.scale,
            c.data,
        ]
        for c in found
    ]
    return _table(["verdict", "claim of the paper", "metric", "ours", "baseline", "rule", "scale", "data"], rows)


def _with_notes(value: float, *notes: str) -> str:
    held = "; ".join(note for note in notes if note)
    return f"{_number(value)} ({held})" if held else _number(value)


def _spread(by_seed: tuple[float, ...]) -> str:
    """Return the lowest and the highest value over the seeds; nothing for one seed, or where none were kept."""
    if len(by_seed) < 2:
        return ""
    finite = [value for value in by_seed if math.isfinite(value)]
    lost = f"{len(by_seed) - len(finite)} of {len(by_seed)} seeds without a number"
    shown = [f"{_number(min(finite))} to {_number(max(finite))}"] * bool(finite)
    return ", ".join([*shown, *[lost] * (len(finite) < len(by_seed))])


def _benchmark_table(result: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            row["peer"],
            str(row["threads"]),
            _number(row["ours_ms"]),
            _number(row["peer_ms"]),
            _times_faster(row),
            f"{_number(row['target'])}x" if row.get("target") is not None else "",
            _met(row),
        ]
        for row in result["rows"]
    ]
    return _table(["case", "peer", "threads", "ours, ms", "peer, ms", "times faster", "target", "met"], rows)


def _absent(row: dict[str, Any]) -> bool:
    """Whether there was nothing to time on the other side."""
    return row["ratio"] is None and str(row.get("note", "")).startswith("unavailable")


def _times_faster(row: dict[str, Any]) -> str:
    if row["ratio"] is not None:
        return f"{_number(row['ratio'])}x"
    if not _absent(row):
        return "not timed"
    return "not installed" if re.search("not installed|cannot be imported", row["note"]) else "not available"


def _met(row: dict[str, Any]) -> str:
    """Return whether the target was met: nothing where there is no target, or nothing to compare with."""
    if row.get("target") is None or _absent(row):
        return ""
    return "yes" if row["ok"] else "no"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else _one_line(str(value)).replace("|", "\\|")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _paper(number: str | None) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4g}"


def main(arguments: list[str]) -> int:
    """Rewrite or check; return the exit code."""
    old = stale()
    for page in old:
        if "--check" in arguments:
            sys.stderr.write(f"stale: {page.relative_to(ROOT)}; run `make generate`\n")
        else:
            page.write_text(rendered(page), encoding="utf-8")
            sys.stdout.write(f"wrote {page.relative_to(ROOT)}\n")
    return 1 if old and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
