"""``quernel compress SOURCE``: one method, several, or a search under a budget; saved, reported, judged."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quernel._errors import QuernelError
from quernel.cli._methods import chosen_methods, search_menu, split_list
from quernel.cli._output import Json, note, progress_bar
from quernel.cli._run import check_report_name, completed, save, show

if TYPE_CHECKING:
    from quernel.compress import Result

Texts = list[str] | None


def compress(
    source: Annotated[
        str,
        typer.Argument(
            help="A bundled model, a folder (Quernel, transformers, sentence-transformers), or package.module:factory."
        ),
    ],
    method: Annotated[Texts, typer.Option("--method", "-m", help="Methods, comma-separated: `quernel list`.")] = None,
    option: Annotated[Texts, typer.Option("--option", "-o", help="METHOD.NAME=VALUE, repeatable.")] = None,
    budget: Annotated[str | None, typer.Option(help="Search: bytes=0.3,drop=0.01,latency_ms=20.")] = None,
    data: Annotated[str | None, typer.Option(help="A data set (`quernel data`) or a file of yours.")] = None,
    weights: Annotated[Path | None, typer.Option(help="For the model: a .safetensors file or a saved folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the compressed model.")] = None,
    report: Annotated[Path | None, typer.Option(help="Where to write the report: FILE.html or FILE.json.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of finished trials; continue a search there.")] = None,
    include: Annotated[Texts, typer.Option(help="Only these modules (globs).")] = None,
    exclude: Annotated[Texts, typer.Option(help="Not these modules (globs).")] = None,
    max_examples: Annotated[int | None, typer.Option(help="Judge on no more than this many examples.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan: what each layer would get.")] = False,
    json: Json = False,
) -> int:
    """Compress a model and report what came of it."""
    slugs, options = split_list(method), list(option or ())
    if not slugs and budget is None:
        raise QuernelError("say how: --method crossquant (see `quernel list`), or --budget bytes=0.5,drop=0.01")
    if budget is not None and dry_run:
        raise QuernelError("--dry-run plans methods; a search has to run them. Leave one of them out")
    if budget is None and resume is not None:
        raise QuernelError("--resume continues a search; it needs --budget")
    if dry_run and out is not None:
        raise QuernelError("--dry-run makes no model to save; leave --out out")
    check_report_name(report)
    selection = {"include": split_list(include), "exclude": split_list(exclude)}
    with progress_bar(steps=budget is not None) as progress:
        shared = {**selection, "progress": progress}
        plan = (
            _search_plan(budget, slugs, options) if budget is not None else {"method": chosen_methods(slugs, options)}
        )
        result = _run(source, weights, data, max_examples, plan, resume, dry_run, shared)
    save(result, out, report)
    return show(result.report, as_json=json)


def _search_plan(budget: str, slugs: list[str], options: list[str]) -> dict[str, Any]:
    from quernel.compress import Budget

    return {"budget": Budget.parse(budget), "methods": search_menu(slugs, options)}


def _run(
    source: str,
    weights: Path | None,
    data: str | None,
    max_examples: int | None,
    plan: dict[str, Any],
    resume: Path | None,
    dry_run: bool,
    shared: dict[str, Any],
) -> Result:
    from quernel import compress, models

    if ":" in source and os.getcwd() not in sys.path:
        # A console script does not see the folder it is started in; a factory usually lies there.
        sys.path.insert(0, os.getcwd())
    model = models.resolve(source, weights=weights, progress=shared["progress"])
    searching = "budget" in plan
    task = None
    if data is not None or searching or source in models.names():
        task = models.task(model, data, max_examples=max_examples)
        shared |= {"data": task.calibration, "example_inputs": task.example_inputs}
    if searching and task is not None:
        try:
            result: Result = compress.search(model, evaluate=(task.select, task.judge), resume=resume, **plan, **shared)
        except KeyboardInterrupt:
            if resume is not None:
                note(f"finished trials are kept in {resume}; the same command continues there")
            raise
    else:
        evaluate = None if task is None else task.judge
        result = compress.compress(model, evaluate=evaluate, dry_run=dry_run, **plan, **shared)
    report = completed(result.report, task, source, model, result.model)
    if dry_run:
        report = replace(report, title=f"{report.title} (dry run)")
    return replace(result, report=report)
