"""``quernel demo``: the main job in a minute, offline: train a small CNN, search for a smaller one, show the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quernel.cli._output import Json, note, progress_bar
from quernel.cli._run import completed, show

MODEL = "digits-cnn"
BUDGET = "bytes=0.5,drop=0.01"


def demo(
    folder: Annotated[Path, typer.Option(help="Where report.html and report.json go.")] = Path(),
    json: Json = False,
) -> int:
    """Train a small CNN on scikit-learn's digits and search for a smaller one."""
    from quernel import compress, models

    with progress_bar() as progress:
        note(f"model: {MODEL} (trained on scikit-learn's digits, seconds, kept for the next time)")
        model = models.load(MODEL, progress=progress)
    task = models.task(model)
    note(f"search: {BUDGET}")
    with progress_bar(steps=True) as progress:
        result = compress.search(
            model,
            compress.Budget.parse(BUDGET),
            data=task.calibration,
            example_inputs=task.example_inputs,
            evaluate=(task.select, task.judge),
            progress=progress,
        )
    report = completed(result.report, task, MODEL, model, result.model)
    code = show(report, as_json=json)
    for path in (report.save_html(folder / "report.html"), report.save_json(folder / "report.json")):
        note(f"wrote {path}")
    return code
