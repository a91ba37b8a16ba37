"""``search``: try methods and their combinations, keep the front, choose under a budget.

Every candidate is compressed, written to disk to count its bytes, and judged on one split; the chosen one
is judged once more on another. Finished trials are files, so an interrupted search resumes where it was.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from quernel._errors import QuernelError
from quernel._progress import Progress, check_progress
from quernel._validate import check_float, check_int, check_type
from quernel.compress._compress import Finetune, Result, available, check_needs, compress, metric_name
from quernel.compress._context import Context, Forward
from quernel.compress._measure import Evaluate, checked_metric
from quernel.compress._menu import Candidate, Point, combinations, default_methods, front, singles
from quernel.compress._method import Method
from quernel.compress._trial import (
    Trial,
    TrialStore,
    alone_ms,
    data_digest,
    failed,
    name_of,
    run_trial,
    stored_bytes,
    weights_digest,
)
from quernel.report import TrialReport

Judges = Evaluate | tuple[Evaluate, Evaluate]


class Executor(Protocol):
    """What runs trials elsewhere: any ``concurrent.futures`` executor, or a thin wrapper over Ray."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Start ``fn(*args)``; return an object whose ``result()`` waits for it."""
        ...


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost.

    Parameters
    ----------
    bytes : float or int, optional
        Bytes of the saved files: a float in (0, 1] is a fraction of the uncompressed model's, an int absolute.
    drop : float, optional
        How much of the metric may be lost, in the metric's own unit.
    latency_ms : float, optional
        Milliseconds of one batch on this machine.

    Examples
    --------
    >>> from quernel.compress import Budget
    >>> Budget.parse("bytes=0.5,drop=0.01")
    Budget(bytes=0.5, drop=0.01, latency_ms=None)
    """

    bytes: float | int | None = None
    drop: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        if self.bytes is not None:
            check_float("bytes", self.bytes, low=0, open_low=True)
            if isinstance(self.bytes, float) and self.bytes > 1:
                raise QuernelError(
                    f"bytes must be a fraction in (0, 1] of the uncompressed file, or a whole number of bytes such as "
                    f"2000000; got {self.bytes}"
                )
        if self.drop is not None:
            check_float("drop", self.drop, low=0)
        if self.latency_ms is not None:
            check_float("latency_ms", self.latency_ms, low=0, open_low=True)
        if self.bytes is None and self.drop is None and self.latency_ms is None:
            raise QuernelError("budget must limit bytes, drop or latency_ms; got none of them")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``"bytes=0.5,drop=0.01,latency_ms=20"``; numbers with a point are fractions."""
        fields: dict[str, float | int] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in ("bytes", "drop", "latency_ms"):
                raise QuernelError(f"budget must hold bytes=, drop= or latency_ms=; got {part.strip()!r}")
            try:
                fields[name] = int(value) if value.isdigit() and name == "bytes" else float(value)
            except ValueError as error:
                raise QuernelError(f"budget: {name} must be a number; got {value!r}") from error
        return cls(**fields)

    def bytes_limit(self, full: int) -> float:
        """Return the largest allowed number of file bytes."""
        if self.bytes is None:
            return float("inf")
        return self.bytes * full if isinstance(self.bytes, float) else float(self.bytes)

    def excess(self, trial: Trial, full: Trial) -> float:
        """Return 0 where the trial is within the budget, else by how much it fails, relatively and summed."""
        over = max(0.0, trial.file_bytes / self.bytes_limit(full.file_bytes) - 1)
        if self.drop is not None and trial.metric is not None and full.metric is not None:
            lost = full.metric - trial.metric
            over += max(0.0, lost - self.drop) / max(self.drop, 1e-3 * abs(full.metric), 1e-12)
        if self.latency_ms is not None:
            # What could not be timed is not known to be within the budget.
            over += float("inf") if trial.latency_ms is None else max(0.0, trial.latency_ms / self.latency_ms - 1)
        return over


@dataclass(frozen=True)
class SearchResult(Result):
    """A ``Result`` for the chosen candidate, with every trial beside it.

    ``satisfied`` says whether the chosen point keeps the budget on the split that did not choose it.
    """

    trials: tuple[Trial, ...]
    chosen: Candidate
    satisfied: bool


def search(
    model: nn.Module,
    budget: Budget,
    methods: Iterable[Method | Sequence[Method]] | None = None,
    *,
    data: Iterable[Any] | None = None,
    evaluate: Judges,
    example_inputs: Any = None,
    forward: Forward | None = None,
    finetune: Finetune | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resume: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    max_combinations: int = 12,
) -> SearchResult:
    """Find the smallest model within a budget.

    Parameters
    ----------
    model : nn.Module
        Left untouched.
    budget : Budget
        Limits on file bytes, metric drop and latency. Of the candidates within it: where bytes are limited,
        the one that loses least, counted in tenths of the allowed drop, then the fastest if all could be
        timed, then the smallest; where bytes are not limited, the smallest. If none is within the budget,
        the one that exceeds it least, and the report says so.
    methods : iterable of Method or of lists of Method, optional
        Candidates; default is every registered method's menu. The best of them are combined as well.
    data, example_inputs, forward, finetune, include, exclude, progress
        As in ``compress``.
    evaluate : callable or pair of callables
        ``evaluate(model) -> float``, larger is better. A pair ``(select, judge)`` chooses on the first
        and reports the chosen point on the second; with one callable the report warns that the choice
        and its judgement share their data.
    resume : path, optional
        Folder of finished trials, made if absent; the same model, data and methods find theirs again.
        Trials that failed in ``evaluate`` or ``finetune``, or for want of memory or disk, are run again.
        Of functions only the name is compared.
    executor : concurrent.futures.Executor, optional
        Runs the trials; anything with ``submit(fn, *args)`` whose return value has ``result()``.
        Latency is always timed here, one model at a time.
    max_combinations : int, default=12
        How many pairs and triples of methods are tried after the single ones: those whose predicted drop is within
        the budget and that others are not predicted to beat in both bytes and metric.

    Returns
    -------
    result : SearchResult

    Raises
    ------
    QuernelError
        If ``evaluate`` fails on the uncompressed model, no candidate could be run, or latency is limited
        and there is nothing to time. A candidate that fails is a failed trial, not an error.

    Examples
    --------
    >>> import torch, quernel
    >>> from quernel.compress import Budget, search
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 10)).eval(), torch.ones(1, 64)
    >>> near = lambda m: -float((m(x).float() - model(x)).norm())
    >>> result = search(model, Budget(bytes=0.6), data=[x], evaluate=near)
    >>> result.satisfied
    True
    """
    check_type("budget", budget, Budget)
    check_int("max_combinations", max_combinations, low=0)
    check_progress(progress)
    if budget.latency_ms is not None and data is None and example_inputs is None:
        raise QuernelError("budget limits latency_ms, but there is nothing to time; pass example_inputs= or data=")
    start = time.perf_counter()
    select, judge, shared = _judges(evaluate)
    context = Context(data, example_inputs, forward, include, exclude)
    check_needs(model, [], context, finetune)
    metric = checked_metric(select, model, "the uncompressed model")
    full = Trial((), stored_bytes(model), metric, alone_ms(model, context))
    identity = {
        "weights": weights_digest(model),
        "data": data_digest(data),
        "example_inputs": data_digest([example_inputs]),
        # A function has no digest; what it says of the original model tells two data sets apart.
        "metric": [metric_name(select), full.metric],
        "finetune": name_of(finetune),
        "forward": name_of(forward),
        "include": list(include),
        "exclude": list(exclude),
    }
    store = TrialStore(None if resume is None else Path(resume), identity)
    options = {"data": data, "example_inputs": example_inputs, "forward": forward, "finetune": finetune}
    options |= {"include": include, "exclude": exclude}
    runner = _Runner(model, select, options, store, executor, progress, budget, full)
    runner.run(singles(default_methods(available(context, finetune)) if methods is None else methods))
    runner.combine(max_combinations)
    done = [t for t in runner.trials if t.ok]
    if not done:
        reasons = "; ".join(sorted({t.reason for t in runner.trials})[:3])
        raise QuernelError(f"no candidate could be run on this model: {reasons or 'no method applies'}")
    chosen = runner.choose(done)
    judged = _compress_judged(model, chosen, judge, options)
    final = replace(chosen, metric=judged.report.metric_after, latency_ms=judged.report.latency_ms_after)
    full_judged = replace(full, metric=judged.report.metric_before)
    satisfied = budget.excess(final, full_judged) == 0
    report = replace(
        judged.report,
        title=f"{type(model).__name__} under {_spell(budget)}",
        trials=_trial_reports([full, *runner.trials], chosen, full),
        budget={k: v for k, v in vars(budget).items() if v is not None},
        satisfied=satisfied,
        warnings=(*judged.report.warnings, *_warnings(satisfied, shared, budget, final, full_judged)),
        seconds=time.perf_counter() - start,
    )
    return SearchResult(judged.model, report, judged.recipe, tuple(runner.trials), chosen.candidate, satisfied)


# Combinations tried for each that is wanted.
ATTEMPTS_A_COMBINATION = 4


class _Runner:
    """Runs candidates once each, through the store and the executor, and times what may be chosen."""

    def __init__(
        self,
        model: nn.Module,
        select: Evaluate,
        options: dict[str, Any],
        store: TrialStore,
        executor: Executor | None,
        progress: Progress | None,
        budget: Budget,
        full: Trial,
    ) -> None:
        self.model, self.select, self.options, self.store = model, select, options, store
        self.executor, self.progress, self.budget, self.full = executor, progress, budget, full
        self.trials: list[Trial] = []

    def run(self, candidates: Sequence[Candidate]) -> None:
        """Run those that the store does not know; each finished trial is stored at once."""
        waiting: list[tuple[Candidate, Callable[[], Trial]]] = []
        for candidate in candidates:
            known = self.store.get(candidate)
            if known is not None:
                waiting.append((candidate, lambda known=known: known))  # type: ignore[misc]
            elif self.executor is None:
                waiting.append((candidate, lambda c=candidate: self._one(c)))  # type: ignore[misc]
            else:
                future = self.executor.submit(run_trial, self.model, candidate, self.select, self.options)
                waiting.append((candidate, future.result))
        for i, (candidate, get) in enumerate(waiting):
            if self.progress is not None:
                self.progress(" + ".join(m.label for m in candidate), i / len(waiting))
            try:
                trial = get()
            except Exception as error:  # of the executor: a trial itself raises nothing
                trial = failed(candidate, error)
            if not trial.key:  # a fresh one; known trials are on disk already
                trial = replace(trial, key=self.store.key(candidate))
                self.store.put(trial)
            self.trials.append(trial)

    def combine(self, most: int) -> None:
        """Run the most promising combinations until ``most`` of them came to something.

        One whose first methods leave nothing to the last costs little and does not count, within bounds.
        """
        first = len(self.trials)
        while (left := most - sum(t.ok for t in self.trials[first:])) > 0:
            room = ATTEMPTS_A_COMBINATION * most - (len(self.trials) - first)
            batch = self.promising(min(left, room)) if room > 0 else []
            if not batch:
                return
            self.run(batch)

    def promising(self, most: int) -> list[Candidate]:
        """Return combinations that are predicted to keep the metric within the budget, smallest first."""
        points = [Point(t.candidate, t.file_bytes, t.metric) for t in self.trials if t.ok and self._keeps_metric(t)]
        whole = Point((), self.full.file_bytes, self.full.metric)
        return combinations(points, [t.candidate for t in self.trials], whole, drop=self.budget.drop, most=most)

    def choose(self, done: Sequence[Trial]) -> Trial:
        """Return the best trial within the budget as ``search`` documents it, else the one least beyond it."""
        if self.budget.latency_ms is not None:
            done = [t if t.latency_ms is not None else self._timed(t) for t in done]
        within = [t for t in done if self.budget.excess(t, self.full) == 0]
        if self.budget.bytes is None or not within:
            return min(done, key=lambda t: (self.budget.excess(t, self.full), t.file_bytes, len(t.candidate)))
        timed = all(t.latency_ms is not None for t in within)
        return min(within, key=lambda t: (self._loss_steps(t), t.latency_ms if timed else 0, t.file_bytes))

    def _loss_steps(self, trial: Trial) -> int:
        """Return the loss in tenths of the allowed drop (of 1 % of the metric without one): finer is noise."""
        if trial.metric is None or self.full.metric is None:
            return 0
        step = self.budget.drop / 10 if self.budget.drop else 1e-3 * abs(self.full.metric) or 1e-12
        return math.ceil(max(0.0, self.full.metric - trial.metric) / step)

    def _keeps_metric(self, trial: Trial) -> bool:
        if self.budget.drop is None or trial.metric is None or self.full.metric is None:
            return True
        return self.full.metric - trial.metric <= self.budget.drop

    def _one(self, candidate: Candidate) -> Trial:
        return run_trial(self.model, candidate, self.select, self.options, timed=True)

    def _timed(self, trial: Trial) -> Trial:
        timed = replace(trial, latency_ms=self._one(trial.candidate).latency_ms)
        self.trials[self.trials.index(trial)] = timed
        self.store.put(timed)
        return timed


def _judges(evaluate: Judges) -> tuple[Evaluate, Evaluate, bool]:
    if isinstance(evaluate, tuple):
        if len(evaluate) != 2 or not all(map(callable, evaluate)):
            raise QuernelError("evaluate must be a function or a pair (select, judge) of functions")
        return evaluate[0], evaluate[1], False
    if not callable(evaluate):
        raise QuernelError(f"evaluate must be a function or a pair of functions; got {type(evaluate).__name__}")
    return evaluate, evaluate, True


def _compress_judged(model: nn.Module, chosen: Trial, judge: Evaluate, options: dict[str, Any]) -> Result:
    return compress(model, list(chosen.candidate), evaluate=judge, **options)


def _trial_reports(trials: Sequence[Trial], chosen: Trial, full: Trial) -> tuple[TrialReport, ...]:
    points = [Point(t.candidate, t.file_bytes, t.metric) for t in trials if t.ok]
    best = {id(p.candidate) for p in front(points)}
    return tuple(
        TrialReport(
            key=t.key or "uncompressed",
            label=t.label,
            methods=tuple(m.label for m in t.candidate),
            bytes_before=full.file_bytes,
            bytes_after=t.file_bytes if t.ok else None,
            latency_ms=t.latency_ms,
            metric=t.metric,
            chosen=t.candidate == chosen.candidate,
            on_front=t.ok and id(t.candidate) in best,
            status="ok" if t.ok else "failed",
            reason=t.reason,
        )
        for t in trials
    )


def _warnings(satisfied: bool, shared: bool, budget: Budget, final: Trial, full: Trial) -> list[str]:
    found = []
    if not satisfied:
        lost = "" if final.metric is None or full.metric is None else f", metric {final.metric - full.metric:+.4g}"
        ratio = final.file_bytes / full.file_bytes
        found.append(f"the budget {_spell(budget)} was not met; best found: {ratio:.3f} of the bytes{lost}")
    if shared:
        found.append("the chosen point was judged on the data that chose it; pass evaluate=(select, judge)")
    return found


def _spell(budget: Budget) -> str:
    return ",".join(f"{k}={v}" for k, v in vars(budget).items() if v is not None)
