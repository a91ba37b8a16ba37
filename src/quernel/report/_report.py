"""Report, LayerReport, TrialReport: what a compression did, as frozen data.

All sizes are bytes really stored, all times milliseconds measured in one run with the baseline, every metric is
larger-is-better. ``None`` means "not measured"; a measure that came out as NaN or infinity is stored as ``None``
and leaves a warning (whole report) or a reason (layer, trial), so that JSON stays strict and round trips are exact.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from quernel._errors import FormatError, QuernelError
from quernel._io import write_atomically
from quernel._validate import check_choice, check_int, check_type
from quernel.report._record import Record, Scalar, flag, measure, scalars, strings

if TYPE_CHECKING:
    from rich.console import RenderableType

Kind = TypeVar("Kind", bound=Record)

FORMAT_VERSION = 1
#: Actions that leave a layer as it was.
UNTOUCHED = ("keep", "skip")
STATUSES = ("ok", "failed", "pruned")
MAX_BYTES = 2**63 - 1


@dataclass(frozen=True)
class LayerReport(Record):
    """What happened to one layer.

    Parameters
    ----------
    name : str
        Dotted path of the module in the model.
    kind : str
        Class of the module before, e.g. ``"Linear"``.
    action : str
        What was done, e.g. ``"int8"``, ``"low-rank"``; ``"skip"`` and ``"keep"`` leave the layer as it was.
    reason : str, default=""
        Why; expected where the layer was skipped.
    bytes_before, bytes_after : int
        Bytes stored.
    relative_error : float or None
        ``||y - y'|| / ||y||`` of the layer's output on the data given.
    details : mapping of str to scalar
        Method-specific numbers (rank, scale, ...). ``latency_ms``, where given, is the layer's time after
        compression and is drawn in the heat map.
    """

    name: str
    kind: str
    action: str
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    relative_error: float | None = None
    details: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("name", "kind", "action", "reason"):
            check_type(name, getattr(self, name), str)
        error = measure("relative_error", self.relative_error, low=0.0)
        self._settle(
            bytes_before=check_int("bytes_before", self.bytes_before, low=0, high=MAX_BYTES),
            bytes_after=check_int("bytes_after", self.bytes_after, low=0, high=MAX_BYTES),
            relative_error=error,
            details=scalars("details", self.details),
            reason="; ".join(filter(None, (self.reason, _not_finite("relative_error", self.relative_error, error)))),
        )

    @property
    def ratio(self) -> float:
        """How many times smaller the layer is (infinite if nothing is left of it)."""
        return _ratio(self.bytes_before, self.bytes_after)

    @property
    def untouched(self) -> bool:
        """Whether the layer was left as it was."""
        return self.action in UNTOUCHED


@dataclass(frozen=True)
class TrialReport(Record):
    """One configuration that a search tried: a point of the Pareto plot, a row of its table.

    Parameters
    ----------
    key : str
        Digest under which the search stores the trial.
    label : str
        Short name for plots.
    methods : tuple of str
        Methods in the order applied; empty for the untouched model, which is drawn as the reference point.
    bytes_before, bytes_after : int or None
        Bytes stored; ``bytes_after`` is None where the trial did not get that far.
    latency_ms, metric : float or None
        Measured on the split that candidates are judged on.
    chosen, on_front : bool
        Whether the search took this one; whether no other trial is better in every measure.
    status : {"ok", "failed", "pruned"}
        Pruned trials were given up early or never run.
    reason : str
        Why it failed or was pruned.
    """

    key: str
    label: str
    methods: tuple[str, ...] = ()
    bytes_before: int | None = None
    bytes_after: int | None = None
    latency_ms: float | None = None
    metric: float | None = None
    chosen: bool = False
    on_front: bool = False
    status: Literal["ok", "failed", "pruned"] = "ok"
    reason: str = ""

    def __post_init__(self) -> None:
        for name in ("key", "label", "reason"):
            check_type(name, getattr(self, name), str)
        check_choice("status", self.status, STATUSES)
        metric = measure("metric", self.metric)
        self._settle(
            methods=strings("methods", self.methods),
            bytes_before=_optional_bytes("bytes_before", self.bytes_before),
            bytes_after=_optional_bytes("bytes_after", self.bytes_after),
            latency_ms=measure("latency_ms", self.latency_ms, low=0.0),
            metric=metric,
            chosen=flag("chosen", self.chosen),
            on_front=flag("on_front", self.on_front),
            reason=self.reason or _not_finite("metric", self.metric, metric),
        )

    @property
    def ratio(self) -> float | None:
        """How many times smaller the model became, or None if a size is unknown."""
        if self.bytes_before is None or self.bytes_after is None:
            return None
        return _ratio(self.bytes_before, self.bytes_after)


@dataclass(frozen=True)
class Report(Record):
    """What a compression did to a model, ready to print, save and show.

    Parameters
    ----------
    title : str
        What was compressed.
    methods : tuple of str
        Methods with their configurations, in the order applied.
    bytes_before, bytes_after : int
        Bytes stored by the whole model.
    latency_ms_before, latency_ms_after : float or None
        Median time of one call, measured interleaved.
    latency_speedup : float or None
        Median of paired ratios before / after; may differ a little from the ratio of the medians.
    metric : str or None
        Name of what ``evaluate`` returns; larger is better.
    metric_before, metric_after : float or None
        Its value on the original and on the compressed model.
    metric_interval : (float, float) or None
        Paired 95 % confidence interval of ``metric_after - metric_before``.
    layers : tuple of LayerReport
        In the order of the model.
    trials : tuple of TrialReport
        What a search tried; at most one is ``chosen``.
    budget : mapping or None
        What was asked for: ``bytes`` (fraction if float, bytes if int), ``drop``, ``latency_ms``.
    satisfied : bool or None
        Whether the budget was met.
    warnings : tuple of str
        What the user should know before relying on the result.
    summary : mapping
        Totals of the methods, e.g. attempted and achieved rank reduction.
    environment : mapping
        Processor, threads, versions (one level of nesting).
    seconds : float or None
        Time of the whole run.
    format_version : int
        Version of the JSON form.

    Examples
    --------
    >>> from quernel.report import Report
    >>> report = Report("toy", methods=("Cast(dtype='bfloat16')",), bytes_before=4000, bytes_after=2000)
    >>> report.ratio, report.speedup
    (2.0, None)
    >>> Report.from_json(report.to_json()) == report
    True
    """

    title: str
    methods: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    latency_ms_before: float | None = None
    latency_ms_after: float | None = None
    latency_speedup: float | None = None
    metric: str | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    metric_interval: tuple[float, float] | None = None
    layers: tuple[LayerReport, ...] = ()
    trials: tuple[TrialReport, ...] = ()
    budget: Mapping[str, Scalar] | None = None
    satisfied: bool | None = None
    warnings: tuple[str, ...] = ()
    summary: Mapping[str, Scalar] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    format_version: int = FORMAT_VERSION

    nested: ClassVar[Mapping[str, type[Record]]] = {"layers": LayerReport, "trials": TrialReport}

    def __post_init__(self) -> None:
        check_type("title", self.title, str)
        check_type("metric", self.metric, (str, type(None)))
        if self.format_version != FORMAT_VERSION:
            raise QuernelError(f"format_version must be {FORMAT_VERSION}; got {self.format_version!r}. Update quernel")
        floors = {"latency_ms_before": 0.0, "latency_ms_after": 0.0, "latency_speedup": 0.0, "seconds": 0.0}
        given = {name: getattr(self, name) for name in (*floors, "metric_before", "metric_after")}
        measures = {name: measure(name, value, low=floors.get(name)) for name, value in given.items()}
        lost = (_not_finite(name, value, measures[name]) for name, value in given.items())
        self._settle(
            methods=strings("methods", self.methods),
            bytes_before=check_int("bytes_before", self.bytes_before, low=0, high=MAX_BYTES),
            bytes_after=check_int("bytes_after", self.bytes_after, low=0, high=MAX_BYTES),
            metric_interval=_interval("metric_interval", self.metric_interval),
            layers=_records("layers", self.layers, LayerReport),
            trials=_records("trials", self.trials, TrialReport),
            satisfied=None if self.satisfied is None else flag("satisfied", self.satisfied),
            budget=None if self.budget is None else scalars("budget", self.budget),
            warnings=strings("warnings", self.warnings) + tuple(filter(None, lost)),
            summary=scalars("summary", self.summary),
            environment=scalars("environment", self.environment, depth=1),
            **measures,
        )
        if sum(trial.chosen for trial in self.trials) > 1:
            raise QuernelError("trials must hold at most one with chosen=True")

    @property
    def ratio(self) -> float:
        """How many times smaller the model is (infinite if nothing is left of it)."""
        return _ratio(self.bytes_before, self.bytes_after)

    @property
    def speedup(self) -> float | None:
        """How many times faster: the median of paired ratios, else the ratio of the medians, else None."""
        if self.latency_speedup is not None:
            return self.latency_speedup
        if self.latency_ms_before is None or not self.latency_ms_after:
            return None
        return self.latency_ms_before / self.latency_ms_after

    @property
    def metric_change(self) -> float | None:
        """``metric_after - metric_before``, or None if either was not measured."""
        if self.metric_before is None or self.metric_after is None:
            return None
        return self.metric_after - self.metric_before

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers left as they were (``action`` is "skip" or "keep")."""
        return tuple(layer for layer in self.layers if layer.untouched)

    def table(self, *, max_layers: int | None = 40) -> str:
        """Return the report as aligned plain text; ``max_layers=None`` lists every layer and every failed trial."""
        from quernel.report._tables import to_text

        return to_text(self, max_layers)

    def to_markdown(self, *, max_layers: int | None = None) -> str:
        """Return the report as Markdown with pipe tables."""
        from quernel.report._tables import to_markdown

        return to_markdown(self, max_layers)

    def to_html(self) -> str:
        """Return one HTML page that needs no network: plots, heat map, sortable tables, light and dark."""
        from quernel.report._html import to_html

        return to_html(self)

    def save_json(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`to_json` to a file, whole or not at all."""
        return _save(path, self.to_json() + "\n")

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`to_html` to a file, whole or not at all."""
        return _save(path, self.to_html())

    @classmethod
    def load_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save_json` wrote.

        Raises
        ------
        FormatError
            If the file is absent or damaged; names file and field.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
        return cls.from_json(data, source=str(path))

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> RenderableType:
        from quernel.report._tables import to_rich

        return to_rich(self, max_layers=40)

    def _repr_markdown_(self) -> str:
        return self.to_markdown(max_layers=40)


def _ratio(before: int, after: int) -> float:
    if after == 0:
        return 1.0 if before == 0 else math.inf
    return before / after


def _optional_bytes(name: str, value: Any) -> int | None:
    return None if value is None else check_int(name, value, low=0, high=MAX_BYTES)


def _not_finite(name: str, given: Any, kept: float | None) -> str:
    """Say that a measure was given but is NaN or infinite."""
    lost = given is not None and kept is None
    return f"{name} came out as {float(given)} and counts as not measured" if lost else ""


def _interval(name: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise QuernelError(f"{name} must be a pair (low, high); got {value!r:.60}")
    low, high = measure(name, value[0]), measure(name, value[1])
    if low is None or high is None:
        return None
    if low > high:
        raise QuernelError(f"{name} must have low <= high; got {value!r}")
    return low, high


def _records(name: str, values: Any, kind: type[Kind]) -> tuple[Kind, ...]:
    if not isinstance(values, (tuple, list)) or not all(isinstance(value, kind) for value in values):
        raise QuernelError(f"{name} must be a sequence of {kind.__name__}; got {values!r:.60}")
    return tuple(values)


def _save(path: str | os.PathLike[str], text: str) -> Path:
    target = Path(path)
    try:
        write_atomically(target, text.encode("utf-8"))
    except OSError as error:
        raise QuernelError(f"cannot write {target} ({error.strerror or error}); does its folder exist?") from error
    return target
