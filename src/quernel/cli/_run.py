"""What ``compress`` and ``demo`` share: joining model and data, and bringing a result to disk and screen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quernel._errors import QuernelError
from quernel.cli._output import console, emit, note

if TYPE_CHECKING:
    from torch import nn

    from quernel.compress import Result
    from quernel.models import Task
    from quernel.report import Report

BUDGET_MISSED = 1


def completed(report: Report, task: Task | None, title: str, before: nn.Module, after: nn.Module) -> Report:
    """Return the report with the model's name, and what the task knows: metric, further figures, notes."""
    if task is None:
        return replace(report, title=f"{title}: {' + '.join(report.methods)}")
    extras = {
        f"{name}, {when}": value for name, judge in task.extras.items() for when, value in _both(judge, before, after)
    }
    return replace(
        report,
        title=f"{title} on {task.data}: {' + '.join(report.methods)}",
        metric=task.metric if report.metric is not None else None,
        summary={**report.summary, **extras},
        environment={**report.environment, "data": task.data, **{f"note {i}": n for i, n in enumerate(task.notes, 1)}},
    )


def _both(judge: Any, before: nn.Module, after: nn.Module) -> list[tuple[str, float]]:
    return [("before", judge(before))] + ([("after", judge(after))] if after is not before else [])


def save(result: Result, out: Path | None, pages: Path | None) -> None:
    """Save the model and the report where the user asked for them."""
    if pages is not None:
        # Before the model: a mistyped name should not cost a finished search its report.
        kinds = {".html": result.report.save_html, ".json": result.report.save_json}
        kinds[pages.suffix](pages)
        note(f"report: {pages}")
    if out is not None:
        result.save(out)
        note(f"model: {out}")


def check_report_name(path: Path | None) -> None:
    """Refuse a name that cannot be written, before any work."""
    if path is None:
        return
    if path.suffix not in (".html", ".json"):
        raise QuernelError(f"--report must end in .html or .json; got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise QuernelError(f"--report {str(path)!r}: the folder {path.absolute().parent} does not exist")


def show(report: Report, *, as_json: bool) -> int:
    """Print the report; return the exit code, which says whether a budget was kept."""
    if as_json:
        emit(report.to_dict())
        for warning in report.warnings:
            note(f"warning: {warning}")
    else:
        console().print(report)
    return BUDGET_MISSED if report.satisfied is False else 0
