"""``convert``: other modules in the place of some, such as token mixers, and what that did, in the usual report.

``quernel.nn.replace_modules`` on a copy, then the same measurements as ``compress``: bytes, operations, latency,
metric, and how far each new module's output is from the old one's, which is round-off where the function is preserved.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from quernel import __version__
from quernel._errors import QuernelError
from quernel.compress._compress import Finetune, Result, layer_reports, metric_name
from quernel.compress._context import Context, Forward
from quernel.compress._measure import (
    Evaluate,
    check_runs,
    checked_metric,
    counted_flops,
    environment,
    layer_errors,
    paired_latency,
    quiet,
)
from quernel.compress._method import LayerPlan
from quernel.nn import Mixer, replace_modules
from quernel.nn.weights import unique_bytes
from quernel.report import Report


def convert(
    model: nn.Module,
    match: type[nn.Module] | Callable[[str, nn.Module], bool],
    factory: Callable[[nn.Module], nn.Module],
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    evaluate: Evaluate | None = None,
    finetune: Finetune | None = None,
    forward: Forward | None = None,
) -> Result:
    """Replace modules of a copy of the model, and report bytes, operations, latency and error, before and after.

    Parameters
    ----------
    model : nn.Module
        Left untouched.
    match, factory
        As in ``quernel.nn.replace_modules``; ``factory`` gets modules of the copy and may reuse what is in them.
    data, example_inputs, evaluate, finetune, forward
        As in ``compress``.  Operations, latency and errors are measured on the example inputs, or the first batch.

    Returns
    -------
    result : Result
        ``.report.summary`` holds the operations of the model, the details of each layer its own: those of token mixers
        by ``Mixer.flops``, all others as ``torch.utils.flop_counter`` counts them.  The recipe names no methods: a
        factory cannot be written down.

    Raises
    ------
    QuernelError
        If nothing matches, or the new model does not run on the batch.

    Notes
    -----
    Where ``finetune`` is given, errors are those after it.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import ChannelsFirst, InceptionDWConv2d
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 7, padding=3, groups=16))
    >>> x = torch.randn(1, 16, 8, 8)
    >>> new = lambda old: ChannelsFirst(InceptionDWConv2d(old.in_channels))
    >>> report = convert(net, torch.nn.Conv2d, new, example_inputs=x).report
    >>> report.summary["FLOPs after"] < report.summary["FLOPs before"]
    True
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise QuernelError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    context = Context(data, example_inputs, forward)
    metric_before = None if evaluate is None else checked_metric(evaluate, model, "the model before")
    sizes = {name: unique_bytes(m) for name, m in model.named_modules() if name}
    work = copy.deepcopy(model)
    names = replace_modules(work, match, factory)
    title = _title(model, work, names)
    check_runs(work, context, f"{title} (the original is unharmed)")
    if finetune is not None:
        finetune(work)
    before, after = (counted_flops(m, names, context) for m in (model, work))
    plans = {}
    for name in names:
        counts = {} if before is None or after is None else {"FLOPs before": before[name], "FLOPs after": after[name]}
        plans[name] = LayerPlan(name, _kind(work.get_submodule(name)), details=counts)
    # A bare mixer has its channels last, and the module around it knows: the old layer's input is not its own.
    alike = [n for n in names if isinstance(work.get_submodule(n), Mixer) == isinstance(model.get_submodule(n), Mixer)]
    errors = layer_errors(model, work, alike, context)
    times = paired_latency(model, work, context)
    shown = times if times is not None and quiet(times) else None
    report = Report(
        title=title,
        methods=(f"replace_modules: {title}",),
        bytes_before=unique_bytes(model),
        bytes_after=unique_bytes(work),
        latency_ms_before=None if shown is None else shown.peer_ms,
        latency_ms_after=None if shown is None else shown.ours_ms,
        latency_speedup=None if shown is None else shown.ratio,
        metric=None if evaluate is None else metric_name(evaluate),
        metric_before=metric_before,
        metric_after=None if evaluate is None else checked_metric(evaluate, work, "the converted model"),
        layers=layer_reports(model, work, plans, sizes, errors),
        warnings=() if times is None or times.valid else (f"latency{'' if shown else ' not measured'}: {times.void}",),
        summary={} if before is None or after is None else {"FLOPs before": before[""], "FLOPs after": after[""]},
        environment=environment(),
        seconds=time.perf_counter() - start,
    )
    kinds = {name: _kind(work.get_submodule(name)) for name in names}
    return Result(work, report, {"quernel": __version__, "methods": [], "converted": kinds})


def _kind(module: nn.Module) -> str:
    """Return the class of a module, or of the token mixer that it gives a place to."""
    return type(next((m for m in module.modules() if isinstance(m, Mixer)), module)).__name__


def _title(before: nn.Module, after: nn.Module, names: list[str]) -> str:
    old, new = (
        " and ".join(dict.fromkeys(kind(m.get_submodule(name)) for name in names))
        for m, kind in ((before, lambda module: type(module).__name__), (after, _kind))
    )
    return f"{type(before).__name__}: {len(names)} {old} to {new}"
