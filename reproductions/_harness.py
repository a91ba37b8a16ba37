"""What every ``reproductions/<slug>.py`` is made of: declared claims, a table, verdicts by rule, the ledger.

A script declares its claims, each with the rule that judges it, before anything runs::

    from _harness import Outcome, Reproduction, at_most

    crossquant = Reproduction("crossquant", paper="2410.07505")

    @crossquant.claim(
        name="kernel",                                  # for --only, and in the command of the ledger
        claim="Fewer activations round to zero than with per-token scales",       # the paper's words
        scale="all-MiniLM-L6-v2, 36 Linears, 96 sentences",                       # our scale
        data="STS-B test",                              # what was used, stand-ins named
        metric="share of zero codes at A8 (%)",
        baseline="per-token",
        rule=at_most(0.7, of="ours / baseline", partly=0.9),
        checks=("smaller than SmoothQuant-0.5",),       # optional: more conditions, all of them on every seed
        seeds=(0, 1, 2),
    )
    def kernel(seed):                                   # called once a seed; share work with functools.cache
        ...
        return Outcome(ours=3.2, baseline=5.4, checks={"smaller than SmoothQuant-0.5": True},
                       rows=[{"layer": "0.q", "ours": 2.9, "per-token": 5.1}], notes=["A4: 40 / 57"])

    if __name__ == "__main__":
        raise SystemExit(crossquant.main())

``rule`` compares one of ``QUANTITIES`` with a bound, at the median over the seeds or at their mean
(``over="mean"``). The verdict is computed:

- *reproduced*: the rule holds, and every check on every seed;
- *partly*: the rule holds but a check fails, or only the weaker ``partly=`` bound is met;
- *not reproduced*: otherwise; the row stays in the ledger, with the reason in the script's docstring.

The ledger keeps the medians (or means) and, a seed, both values: a verdict is to be read beside their spread.

A claim function may raise ``quernel``'s ``DataError`` or ``MissingExtraError`` (nothing to do: the loaders
raise them): the others still run, what is missing is said, and the script exits with 3. A timing on a busy
machine raises ``Void(reason)``: nothing is recorded and the script exits with 4. Anything else is a bug and
shows its traceback. A verdict of any kind exits with 0.

Options: ``--json`` prints the rows of the ledger as JSON on the last line (an object if there is one row, else
an array; nothing else is on that line), ``--write`` upserts each into ``claims.toml`` as soon as it is measured and,
after a complete run, drops rows that the script no longer declares, ``--only NAME`` (repeatable) runs some claims,
``--list`` prints what is declared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quernel import _claims
from quernel._errors import DataError, MissingExtraError

EXIT_MISSING, EXIT_VOID = 3, 4
CPU_SECONDS_LIMIT = 300.0

QUANTITIES: dict[str, Callable[[float, float], float]] = {
    "ours": lambda ours, baseline: ours,
    "ours / baseline": lambda ours, baseline: _divide(ours, baseline),
    "baseline / ours": lambda ours, baseline: _divide(baseline, ours),
    "ours - baseline": lambda ours, baseline: ours - baseline,
    "baseline - ours": lambda ours, baseline: baseline - ours,
}
MIDDLES: dict[str, Callable[[Sequence[float]], float]] = {"median": statistics.median, "mean": statistics.fmean}


class Void(Exception):
    """The measurement cannot be used now, e.g. on a busy machine; nothing is recorded."""


@dataclass(frozen=True)
class Rule:
    """A bound on one quantity, declared before the run; made by ``at_least`` or ``at_most``."""

    of: str
    sense: str
    bound: float
    partly: float | None = None
    over: str = "median"

    def __post_init__(self) -> None:
        if self.of not in QUANTITIES:
            raise ValueError(f"of= must be one of {', '.join(map(repr, QUANTITIES))}; got {self.of!r}")
        if self.over not in MIDDLES:
            raise ValueError(f"over= must be one of {', '.join(map(repr, MIDDLES))}; got {self.over!r}")
        if self.partly is not None and not self._compare(self.bound, self.partly):
            raise ValueError(f"partly= must be weaker than the bound {self.sense} {self.bound:g}; got {self.partly:g}")

    def __str__(self) -> str:
        weaker = "" if self.partly is None else f" (partly: {self.sense} {self.partly:g})"
        where = "" if self.over == "median" else f", {self.over} of the seeds"
        return f"{self.of} {self.sense} {self.bound:g}{weaker}{where}"

    def value(self, ours: float, baseline: float) -> float:
        """Return the quantity that the rule judges."""
        return QUANTITIES[self.of](ours, baseline)

    def holds(self, value: float) -> bool:
        """Whether the bound is met; never by NaN."""
        return self._compare(value, self.bound)

    def partly_holds(self, value: float) -> bool:
        """Whether the weaker bound is met, if there is one."""
        return self.partly is not None and self._compare(value, self.partly)

    def _compare(self, value: float, bound: float) -> bool:
        return value >= bound if self.sense == ">=" else value <= bound


def at_least(bound: float, *, of: str = "ours", partly: float | None = None, over: str = "median") -> Rule:
    """Require that the quantity is at least ``bound``."""
    return Rule(of, ">=", bound, partly, over)


def at_most(bound: float, *, of: str = "ours", partly: float | None = None, over: str = "median") -> Rule:
    """Require that the quantity is at most ``bound``."""
    return Rule(of, "<=", bound, partly, over)


@dataclass(frozen=True)
class Outcome:
    """What one run of a claim measured; ``rows`` and ``notes`` are printed and not kept."""

    ours: float
    baseline: float
    checks: Mapping[str, bool] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Declared:
    """A claim as declared, before any run."""

    name: str
    claim: str
    scale: str
    data: str
    metric: str
    baseline: str
    rule: Rule
    checks: tuple[str, ...]
    seeds: tuple[int, ...]
    run: Callable[[int], Outcome]

    @property
    def threshold(self) -> str:
        """The whole rule in words."""
        return "; and ".join([str(self.rule), *self.checks])

    def value(self, outcomes: Sequence[Outcome]) -> float:
        """Return the judged quantity over the seeds; a run without a number counts as the worst."""
        worst = -math.inf if self.rule.sense == ">=" else math.inf
        values = [self.rule.value(o.ours, o.baseline) for o in outcomes]
        return MIDDLES[self.rule.over]([worst if math.isnan(value) else value for value in values])

    def judge(self, outcomes: Sequence[Outcome]) -> str:
        """Apply the declared rule."""
        value = self.value(outcomes)
        if self.rule.holds(value):
            checked = all(o.checks[name] for o in outcomes for name in self.checks)
            return _claims.REPRODUCED if checked else _claims.PARTLY
        return _claims.PARTLY if self.rule.partly_holds(value) else _claims.NOT_REPRODUCED


class Reproduction:
    """The claims of one system.

    Parameters
    ----------
    slug : str
        The system's slug; the script is ``reproductions/<slug>.py``.
    paper : str
        arXiv number.
    """

    def __init__(self, slug: str, *, paper: str) -> None:
        self.slug = slug
        self.paper = paper
        self.declared: dict[str, Declared] = {}

    def claim(
        self,
        *,
        name: str,
        claim: str,
        scale: str,
        data: str,
        metric: str,
        baseline: str,
        rule: Rule,
        checks: Sequence[str] = (),
        seeds: Sequence[int] = (0,),
    ) -> Callable[[Callable[[int], Outcome]], Callable[[int], Outcome]]:
        """Declare a claim; decorates the function ``(seed) -> Outcome`` that measures it."""
        if name in self.declared or claim in {d.claim for d in self.declared.values()}:
            raise ValueError(f"{self.slug}: claim {name!r} is declared twice")
        if not seeds:
            raise ValueError(f"{self.slug}: claim {name!r} needs at least one seed")

        def enter(run: Callable[[int], Outcome]) -> Callable[[int], Outcome]:
            self.declared[name] = Declared(
                name, claim, scale, data, metric, baseline, rule, tuple(checks), tuple(seeds), run
            )
            return run

        return enter

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the claims, print the table; return the exit code."""
        options = self._parser().parse_args(argv)
        if options.list:
            for declared in self.declared.values():
                print(f"{declared.name}: {declared.claim} [{declared.threshold}]")
            return 0
        chosen = [d for d in self.declared.values() if options.only is None or d.name in options.only]
        print(f"{self.slug} (arXiv {self.paper})\n{_machine()}")
        measured: list[_claims.Claim] = []
        missing: list[str] = []
        void: list[str] = []
        for declared in chosen:
            try:
                measured.append(self._measure(declared))
                if options.write:  # at once: the next claim may take as long as this one did
                    _claims.upsert_claim(measured[-1], options.claims)
            except (DataError, MissingExtraError) as error:
                missing.append(f"[{declared.name}] missing: {error}")
            except Void as error:
                void.append(f"[{declared.name}] void: {error}")
        _print_summary(measured)
        for line in missing + void:
            print(line, file=sys.stderr)
        if options.write and len(measured) == len(self.declared):
            _claims.keep_claims(self.slug, frozenset(d.claim for d in self.declared.values()), options.claims)
        if options.json:
            rows = [claim.to_json() for claim in measured]
            print(json.dumps(rows[0] if len(rows) == 1 else rows, allow_nan=False), flush=True)
        return EXIT_MISSING if missing else EXIT_VOID if void else 0

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=f"reproductions/{self.slug}.py", description=f"Claims of {self.slug}.")
        parser.add_argument("--json", action="store_true", help="print the ledger's rows as JSON on the last line")
        parser.add_argument("--write", action="store_true", help="upsert the rows into claims.toml")
        parser.add_argument("--only", action="append", choices=list(self.declared), help="run this claim (repeatable)")
        parser.add_argument("--list", action="store_true", help="print what is declared and stop")
        parser.add_argument("--claims", type=Path, default=None, help="another ledger than the project's own")
        return parser

    def _measure(self, declared: Declared) -> _claims.Claim:
        print(f"\n[{declared.name}] {declared.claim}", flush=True)
        wall, cpu = time.perf_counter(), time.process_time()
        outcomes = []
        for seed in declared.seeds:
            outcome = declared.run(seed)
            if set(outcome.checks) != set(declared.checks):
                raise ValueError(
                    f"{declared.name}: declared checks {declared.checks}, measured {tuple(outcome.checks)}"
                )
            outcomes.append(outcome)
            print(f"  seed {seed}: ours {outcome.ours:.6g}, {declared.baseline} {outcome.baseline:.6g}", flush=True)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        measured = _claims.Claim(
            slug=self.slug,
            paper=self.paper,
            claim=declared.claim,
            scale=declared.scale,
            data=declared.data,
            metric=declared.metric,
            ours=_rounded(_middle([o.ours for o in outcomes], declared.rule.over)),
            baseline=_rounded(_middle([o.baseline for o in outcomes], declared.rule.over)),
            baseline_name=declared.baseline,
            threshold=declared.threshold,
            verdict=declared.judge(outcomes),
            seeds=declared.seeds,
            ours_by_seed=tuple(_rounded(o.ours) for o in outcomes),
            baseline_by_seed=tuple(_rounded(o.baseline) for o in outcomes),
            seconds=round(wall, 1),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            command=f"python reproductions/{self.slug}.py --only {declared.name}",
        )
        _print_claim(declared, measured, outcomes, cpu)
        return measured


def _print_claim(declared: Declared, measured: _claims.Claim, outcomes: Sequence[Outcome], cpu: float) -> None:
    for index, outcome in enumerate(outcomes):
        for note in outcome.notes:
            print(f"  note (seed {declared.seeds[index]}): {note}")
    # One table is enough to look at; the other seeds' are alike.
    for line in _table(outcomes[0].rows):
        print(f"    {line}")
    facts = {
        "scale": measured.scale,
        "data": measured.data,
        "metric": measured.metric,
        "ours": _spread([o.ours for o in outcomes], declared.rule.over),
        "baseline": f"{_spread([o.baseline for o in outcomes], declared.rule.over)}  {declared.baseline}",
        "rule": f"{declared.rule}; measured {declared.value(outcomes):.4g}",
    }
    for name in declared.checks:
        passed = sum(o.checks[name] for o in outcomes)
        facts[f"check: {name}"] = f"{passed} of {len(outcomes)} seeds"
    facts["time"] = f"{measured.seconds:.1f} s, {cpu:.1f} processor seconds"
    if cpu > CPU_SECONDS_LIMIT:
        facts["time"] += f" (more than the {CPU_SECONDS_LIMIT:.0f} that a claim may take)"
    facts["verdict"] = measured.verdict.upper()
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"  {name.ljust(width)}  {fact}")


def _print_summary(measured: Sequence[_claims.Claim]) -> None:
    rows = [
        {
            "claim of the paper": claim.claim,
            "our scale": claim.scale,
            "metric": claim.metric,
            "ours": f"{claim.ours:.4g}",
            "baseline": f"{claim.baseline:.4g} ({claim.baseline_name})",
            "verdict": claim.verdict,
        }
        for claim in measured
    ]
    print()
    for line in _table(rows, widest=44):
        print(line)


def _table(rows: Sequence[Mapping[str, Any]], widest: int = 60) -> list[str]:
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, ""), widest) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _cell(value: Any, widest: int) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= widest else text[: widest - 3] + "..."


def _spread(values: Sequence[float], over: str) -> str:
    middle = _middle(values, over)
    if len(values) == 1:
        return f"{middle:.6g}"
    return f"{middle:.6g}  ({min(values):.4g} to {max(values):.4g} over {len(values)} seeds)"


def _divide(top: float, bottom: float) -> float:
    if bottom == 0:
        return math.nan if top == 0 else math.copysign(math.inf, top)
    return top / bottom


def _middle(values: Sequence[float], over: str) -> float:
    """Return the mean, or the median with NaN sorted last, so that a few diverged runs do not hide the rest."""
    if over == "mean":
        return statistics.fmean(values)
    ordered = sorted(values, key=lambda value: (math.isnan(value), value))
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _machine() -> str:
    import platform

    import torch

    return f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
