"""``compress``: apply methods to a model in their natural order, and measure what came of it.

The model is copied (unless ``inplace=True``), each method observes the result of the one before, and the
report compares the two models in the same run: bytes stored, latency, metric, output error of each layer.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from quernel import __version__
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel._progress import Progress
from quernel.compress._context import OPAQUE, Context, Forward, is_below, opaque_parents
from quernel.compress._measure import (
    Evaluate,
    check_dtypes,
    check_runs,
    checked_metric,
    environment,
    layer_errors,
    paired_latency,
    quiet,
)
from quernel.compress._method import NEEDS, STAGES, LayerPlan, Method, Plan
from quernel.nn.weights import unique_bytes
from quernel.report import LayerReport, Report

DRY_RUN = (
    "dry run: nothing was applied; the layers say what each would get, and all sizes are those of the model as it is"
)
Finetune = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Result:
    """What ``compress`` returns: the new model, the report, and the recipe that made it.

    ``recipe`` is JSON-able; ``methods_from_recipe(recipe)`` gives its methods back, for another model.
    ``applied`` is False for a dry run, whose model is the original.
    """

    model: nn.Module
    report: Report
    recipe: dict[str, Any]
    applied: bool = field(default=True, kw_only=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the model, its recipe and its report to a folder that ``quernel.load`` reads.

        Parameters
        ----------
        path : path
            Created, or replaced in one step: an interrupted save leaves the old model loadable.

        Returns
        -------
        path : Path

        Raises
        ------
        QuernelError
            If this is a dry run.
        """
        if not self.applied:
            raise QuernelError("this is a dry run: nothing was applied, so there is nothing to save; drop dry_run=True")
        folder = save_model(self.model, path, extra={"recipe": self.recipe})
        self.report.save_json(folder / "report.json")
        self.report.save_html(folder / "report.html")
        return folder


def compress(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    evaluate: Evaluate | None = None,
    finetune: Finetune | None = None,
    forward: Forward | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dry_run: bool = False,
    progress: Progress | None = None,
    inplace: bool = False,
) -> Result:
    """Compress a model with one method or several.

    Parameters
    ----------
    model : nn.Module
        Left untouched unless ``inplace=True``. Device and training mode are kept.
    method : Method or sequence of Method
        A list is applied in natural order: fold, prune, low-rank, smooth, quantise, cast.
    data : re-iterable of batches, optional
        A mapping is passed as keywords without "label" and "labels", a tensor alone. A tuple fills the
        parameters of ``model.forward`` that have no default; what is beyond them is dropped as labels.
        A mapping's ``attention_mask`` keeps padding out of the statistics. No generators: data is read often.
    example_inputs : tensor, tuple or mapping, optional
        For methods that trace the model, and for latency; default is the first batch.
    evaluate : callable, optional
        ``evaluate(model) -> float``, larger is better.
    finetune : callable, optional
        ``finetune(model)`` trains the compressed model in place, after all methods.
    forward : callable, optional
        ``forward(model, batch)`` for batches of another kind.
    include, exclude : sequences of str
        Glob patterns over module names; a bare word names a module and all below it.
    dry_run : bool, default=False
        Only plan: the returned model is the original, the report says what each layer would get.
        Of several methods, all but the last are applied to a copy, since the last must see their result.
    progress : callable, optional
        ``progress(message, fraction)``.
    inplace : bool, default=False
        Edit ``model`` itself and save the memory of a copy. After an error it may be half converted.

    Returns
    -------
    result : Result
        ``.model``, ``.report``, ``.recipe``, ``.save(dir)``.

    Raises
    ------
    QuernelError
        If a method lacks what it needs, the data has another dtype than the model, nothing can be compressed, the
        result does not run on the first batch, or ``evaluate`` fails. The original model is unharmed, unless
        ``inplace=True``.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    >>> result = quernel.compress.compress(model, quernel.compress.WeightInt8())
    >>> result.report.bytes_after < 0.3 * result.report.bytes_before
    True
    """
    start = time.perf_counter()
    methods = ordered(method)
    context = Context(data, example_inputs, forward, include, exclude, progress, None if dry_run else finetune)
    check_needs(model, methods, context, finetune)
    inplace = inplace and not dry_run
    bytes_before = unique_bytes(model)
    metric_before = None if evaluate is None else checked_metric(evaluate, model, "the uncompressed model")
    sizes = {name: unique_bytes(m) for name, m in model.named_modules() if name}
    work = model if inplace else copy.deepcopy(model)
    made = run_methods(work, methods, context, dry_run=dry_run)
    harm = "it was edited in place" if inplace else "the original is unharmed"
    if not dry_run:
        check_runs(work, context, f"{' + '.join(m.label for m in methods)} ({harm})")
    if not dry_run:
        train_and_finish(work, made, finetune)
    reference = None if inplace else model
    errors = {} if reference is None or dry_run else layer_errors(reference, work, made.comparable, context)
    times = None if reference is None or dry_run else paired_latency(reference, work, context)
    shown = times if times is not None and quiet(times) else None
    report = Report(
        title=f"{type(model).__name__}: {' + '.join(m.label for m in methods)}",
        methods=tuple(m.label for m in methods),
        bytes_before=bytes_before,
        bytes_after=bytes_before if dry_run else unique_bytes(work),
        latency_ms_before=None if shown is None else shown.peer_ms,
        latency_ms_after=None if shown is None else shown.ours_ms,
        latency_speedup=None if shown is None else shown.ratio,
        metric=None if evaluate is None else metric_name(evaluate),
        metric_before=metric_before,
        metric_after=None
        if evaluate is None or dry_run
        else checked_metric(evaluate, work, f"the compressed model; {harm}"),
        layers=layer_reports(model if reference is not None else work, work, made.layers, sizes, errors),
        warnings=(
            *((DRY_RUN,) if dry_run else ()),
            *made.warnings,
            *(() if times is None or times.valid else (f"latency{'' if shown else ' not measured'}: {times.void}",)),
        ),
        summary=made.summary,
        environment=environment(),
        seconds=time.perf_counter() - start,
    )
    recipe = {
        "quernel": __version__,
        "methods": [m.describe() for m in methods],
        "include": list(include),
        "exclude": list(exclude),
    }
    return Result(model if dry_run else work, report, recipe, applied=not dry_run)


@dataclass(frozen=True)
class Made:
    """What a run of several methods did, layer by layer; ``idle`` methods found nothing left to do."""

    layers: dict[str, LayerPlan]
    comparable: tuple[str, ...]
    idle: tuple[str, ...]
    warnings: tuple[str, ...]
    summary: dict[str, Any]
    # Methods that have something to do after fine-tuning, and their plans.
    unfinished: tuple[tuple[Method, Plan], ...] = ()


def train_and_finish(model: nn.Module, made: Made, finetune: Finetune | None) -> None:
    """Fine-tune if asked, then let the methods finish."""
    if finetune is not None:
        finetune(model)
    for method, plan in made.unfinished:
        method.finish(model, plan)


def ordered(method: Method | Sequence[Method]) -> list[Method]:
    """Return the methods in natural order; equal stages keep the user's order."""
    methods: list[Any] = list(method) if isinstance(method, list | tuple) else [method]
    if not methods:
        raise QuernelError("method must be a compression method or a non-empty list of them; got an empty list")
    for m in methods:
        if not isinstance(m, Method):
            hint = f"; did you mean {m.__name__}()?" if isinstance(m, type) and issubclass(m, Method) else ""
            raise QuernelError(f"method must hold compression methods; got {m!r}{hint}")
    return sorted(methods, key=lambda m: STAGES.index(m.stage))


def check_needs(model: nn.Module, methods: Sequence[Method], context: Context, finetune: Finetune | None) -> None:
    """Raise before any work if the model is no module or a method lacks what it needs."""
    if not isinstance(model, nn.Module):
        raise QuernelError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    have = available(context, finetune)
    remedy = {
        "data": "data= (on the command line --data)",
        "graph": "example_inputs= (or data=; on the command line --data)",
        "finetune": "finetune=; the command line trains nothing: choose options that need no training there",
    }
    for m in methods:
        for need in sorted(m.needs & NEEDS):
            if need not in have:
                raise QuernelError(f"{type(m).__name__} needs {need}; pass {remedy[need]}")
    if context.data is not None:
        next(context.batches())
    check_dtypes(model, context)


def available(context: Context, finetune: Finetune | None) -> frozenset[str]:
    """Return which of the methods' needs are met."""
    return context.have | (frozenset() if finetune is None else {"finetune"})


def run_methods(model: nn.Module, methods: Sequence[Method], context: Context, *, dry_run: bool = False) -> Made:
    """Plan and apply each method in turn; ``dry_run`` leaves out the last ``apply``."""
    layers: dict[str, LayerPlan] = {}
    warnings: list[str] = []
    summary: dict[str, Any] = {}
    touched: dict[str, bool] = {}
    idle = []
    unfinished = []
    opaque = _opaque_layers(model, methods, context)
    for i, m in enumerate(methods):
        if m.simulated:
            warnings.append(f"{m.label} is simulated: the values are right, but no time is won")
        plan = m.plan(model, context)
        if not (dry_run and i == len(methods) - 1):
            m.apply(model, plan)
        if type(m).finish is not Method.finish:
            unfinished.append((m, plan))
        warnings += plan.warnings
        if all(layer.skipped for layer in plan.layers):
            idle.append(m.label)
        summary |= {f"{m.label}: {k}" if len(methods) > 1 else k: v for k, v in plan.summary.items()}
        for layer in plan.layers:
            layers[layer.name] = _merged(layers.get(layer.name), layer)
            if not layer.skipped:
                touched[layer.name] = touched.get(layer.name, True) and m.keeps_shapes
    layers = {layer.name: layer for layer in opaque} | layers
    if not layers:
        names = " or ".join(sorted({t.__name__ for m in methods for t in m.targets})) or "module"
        raise QuernelError(
            f"there is nothing to compress: {' + '.join(m.label for m in methods)} found no {names} that "
            "include= and exclude= allow in this model"
        )
    if not touched:
        reasons = "; ".join(sorted({layer.reason for layer in layers.values() if layer.reason})[:3])
        warnings.append(f"nothing was changed{f': {reasons}' if reasons else ''}")
    else:
        warnings += [f"{label} changed nothing: no layer was left for it" for label in idle]
    comparable = tuple(name for name, same in touched.items() if same)
    return Made(layers, comparable, tuple(idle), tuple(warnings), summary, tuple(unfinished))


def _opaque_layers(model: nn.Module, methods: Sequence[Method], context: Context) -> list[LayerPlan]:
    """List what the methods would take, were it not read past its forward."""
    targets = tuple({t for m in methods for t in m.targets})
    parents = opaque_parents(model)
    return [
        LayerPlan(name, "skip", OPAQUE)
        for name, module in model.named_modules()
        if isinstance(module, targets) and is_below(name, parents) and context.allows(name)
    ]


def metric_name(evaluate: Evaluate) -> str:
    """Return what the report calls the metric: ``evaluate.metric``, or the function's name."""
    name = getattr(evaluate, "metric", None) or getattr(evaluate, "__name__", None)
    return str(name or type(evaluate).__name__)


def _merged(before: LayerPlan | None, now: LayerPlan) -> LayerPlan:
    """Join what two methods did to one layer; being skipped by one hides nothing of the other."""
    if before is None or (before.skipped and not now.skipped):
        return now
    if now.skipped:
        return before
    details = {**before.details, **now.details}
    return replace(now, action=f"{before.action} + {now.action}", details=details)


def layer_reports(
    before: nn.Module,
    after: nn.Module,
    plans: dict[str, LayerPlan],
    sizes: dict[str, int],
    errors: dict[str, float],
) -> tuple[LayerReport, ...]:
    """Return a row for each layer that a plan names or that holds parameters of its own; no byte stands in two rows."""
    kinds = {name: type(m).__name__ for name, m in before.named_modules() if name}
    left = {name: unique_bytes(m) for name, m in after.named_modules() if name in kinds}
    listed = []
    for name in kinds:
        own = any(True for _ in before.get_submodule(name).parameters(recurse=False))
        if name in plans or (own and not any(name.startswith(f"{other}.") for other in plans if other)):
            listed.append(name)
    rows = []
    for name in listed:
        plan = plans.get(name)
        rows.append(
            LayerReport(
                name=name,
                kind=kinds[name],
                action="keep" if plan is None else plan.action,
                reason="no method took it" if plan is None else plan.reason,
                bytes_before=_without(name, listed, sizes),
                bytes_after=_without(name, listed, left),
                relative_error=errors.get(name),
                details={} if plan is None else dict(plan.details),
            )
        )
    return tuple(rows)


def _without(name: str, listed: Sequence[str], sizes: dict[str, int]) -> int:
    """Return the bytes of a layer less those of the rows below it: a block that scales its output holds others."""
    below = [other for other in listed if other.startswith(f"{name}.")]
    outermost = [o for o in below if not any(o.startswith(f"{other}.") for other in below)]
    return max(sizes.get(name, 0) - sum(sizes.get(o, 0) for o in outermost), 0)
