"""What the report measures: metric, paired latency, operations, relative output error of each layer, the machine."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from quernel import __version__
from quernel._errors import QuernelError
from quernel._machine import processor_name
from quernel._module_tree import is_registered
from quernel._timing import LOAD_LIMIT, PairedRatio, paired_ratio
from quernel.compress._context import Context, fitting_mask, run_batch
from quernel.nn import Mixer
from quernel.nn._running import device_of, evaluating, to_device
from quernel.nn.functional.activations import FUSIBLE

Evaluate = Callable[[nn.Module], float]

LATENCY_SECONDS = 3.0


def checked_metric(evaluate: Evaluate, model: nn.Module, what: str) -> float:
    """Return ``evaluate(model)`` as a finite float, or say what went wrong and on which model."""
    with evaluating(model):
        try:
            value = evaluate(model)
        except QuernelError:
            raise
        except Exception as error:
            raise QuernelError(f"evaluate raised {type(error).__name__} on {what}: {error}") from error
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise QuernelError(f"evaluate must return a finite number, larger is better; got {value!r} on {what}")
    return float(value)


def paired_latency(before: nn.Module, after: nn.Module, context: Context) -> PairedRatio | None:
    """Time one batch through both models, interleaved; None where there is no batch to time.

    On a busy machine it tries once more; the caller sees from ``load`` whether the times may be shown.
    """
    batch = timing_batch(context)
    if batch is None:
        return None

    def runner(model: nn.Module) -> Callable[[], Any]:
        def run() -> Any:
            with torch.inference_mode():
                return run_timing(model, batch, context)

        return run

    with evaluating(before, after):
        for _ in range(2):
            times = paired_ratio(runner(after), runner(before), rounds=9, max_seconds=LATENCY_SECONDS)
            if quiet(times):
                break
    return times


def quiet(times: PairedRatio) -> bool:
    """Say whether other processes left the machine to the measurement."""
    return not times.load > LOAD_LIMIT


def timing_batch(context: Context) -> Any:
    """Return the batch that latency is measured on: the example inputs, else the first batch of data."""
    if context.example_inputs is not None:
        return context.example_inputs
    return None if context.data is None else next(context.batches())


def run_timing(model: nn.Module, batch: Any, context: Context) -> Any:
    """Run the batch that latency is measured on; example inputs hold no labels, so a tuple of them goes in whole."""
    if batch is context.example_inputs and context.forward is None and isinstance(batch, tuple | list):
        return model(*to_device(batch, device_of(model)))
    return run_batch(model, batch, context.forward)


def check_runs(model: nn.Module, context: Context, made_by: str) -> None:
    """Run the batch that latency is measured on once; raise if the model that ``made_by`` left cannot."""
    batch = timing_batch(context)
    if batch is None:
        return
    try:
        with evaluating(model), torch.no_grad():
            run_timing(model, batch, context)
    except (OSError, MemoryError, torch.OutOfMemoryError):  # the machine's doing, not the method's
        raise
    except Exception as error:
        raise QuernelError(
            f"the model no longer runs after {made_by}: {type(error).__name__}: {error}. "
            "Leave the module concerned out with exclude="
        ) from error


def check_dtypes(model: nn.Module, context: Context) -> None:
    """Raise if the model, as it was given, cannot run on its data for the dtype of the numbers alone.

    Runs the model only where a dtype of the batch is none of the model's, since it may convert its inputs itself.
    """
    own = [p.dtype for p in model.parameters() if p.is_floating_point()]
    batch = timing_batch(context)
    held = {t.dtype for t in _tensors(batch) if t.is_floating_point()}
    if not own or held <= set(own):
        return
    try:
        with evaluating(model), torch.no_grad():
            run_timing(model, batch, context)
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        fitted = _with_floats(batch, own[0])
        again = context if context.example_inputs is None else replace(context, example_inputs=fitted)
        try:
            with evaluating(model), torch.no_grad():
                run_timing(model, fitted, again)
        except Exception:
            return  # something else is wrong, and whoever meets it next can say what
        name = "data" if context.example_inputs is None else "example_inputs"
        odd = ", ".join(sorted(str(dtype) for dtype in held - set(own)))
        raise QuernelError(
            f"{name} holds tensors of {odd}, which this model of {own[0]} does not take; got {type(error).__name__}: "
            f"{error}. Convert them, e.g. x.to({own[0]})"
        ) from error


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return [tensor for value in values for tensor in _tensors(value)]


def _with_floats(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _with_floats(value, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_with_floats(value, dtype) for value in batch)
    return batch


def layer_errors(before: nn.Module, after: nn.Module, names: Sequence[str], context: Context) -> dict[str, float]:
    """Feed each layer's original input to both layers: ``||y - y'|| / ||y||`` on the first batch.

    Runs inside one pass of the original model, so that only one layer's tensors live at a time; padding is left out.
    """
    batch = timing_batch(context)
    errors: dict[str, float] = {}
    if batch is None or not names:
        return errors
    mask = context.mask_of(batch)
    replaced = dict(after.named_modules())

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            output = _first(output)
            if isinstance(output, Tensor) and output.is_floating_point() and name not in errors:
                keywords = dict(zip(kwargs, _in_own_dtype(replaced[name], tuple(kwargs.values())), strict=True))
                new = _first(replaced[name](*_in_own_dtype(replaced[name], args), **keywords))
                if not isinstance(new, Tensor) or new.shape != output.shape:
                    return  # another width or answer, which has no difference to this one
                # A layer that took over the activation behind it is compared with both.
                fused = getattr(replaced[name], "activation", None)
                output = FUSIBLE[fused](output) if isinstance(fused, str) else output
                kept = fitting_mask(mask, output)  # what stands at padding has no meaning
                if kept is not None:
                    new, output = new[kept], output[kept]
                difference, norm = (new.float() - output.float()).norm(), output.float().norm()
                errors[name] = float(difference / norm) if float(norm) else float(difference)

        return hook

    known = dict(before.named_modules())
    handles = [
        known[name].register_forward_hook(hook_for(name), with_kwargs=True)
        for name in names
        if name in known and name in replaced
    ]
    try:
        with evaluating(before, after), torch.no_grad():
            run_timing(before, batch, context)
    finally:
        for handle in handles:
            handle.remove()
    return errors


def _first(output: Any) -> Any:
    """Return what a layer computes where it answers with a tuple, as attention with its weights does."""
    return output[0] if isinstance(output, tuple) and output else output


def _in_own_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast inputs for torch's own layers, which refuse a dtype that is not their parameters'."""
    own = next((p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()), None)
    if own is None or is_registered(module):
        return args
    return tuple(a.to(own) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def counted_flops(model: nn.Module, names: Sequence[str], context: Context) -> dict[str, int] | None:
    """Return the operations on one batch of the model ("") and of some modules; None where there is no batch.

    torch's counter counts products of matrices and convolutions, twice their multiply-adds; it does not know every
    operation of token mixers, so these say theirs themselves (``Mixer.flops``).
    """
    batch = timing_batch(context)
    if batch is None:
        return None
    counter = FlopCounterMode(display=False)
    told, entered, inside = [0], dict.fromkeys(names, 0), [0]  # what mixers said beyond the counter; who is running
    found = dict.fromkeys(names, 0)

    def total() -> int:
        return int(counter.get_total_flops()) + told[0]

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> None:
        if name is not None:
            entered[name] = total()
            return
        if inside[0] == 0:
            mixers[module] = total()
        inside[0] += 1

    def end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str | None) -> None:
        if name is not None:
            found[name] += total() - entered[name]
            return
        inside[0] -= 1
        if inside[0] == 0:
            x = args[0] if args else kwargs["x"]
            told[0] += module.flops(tuple(x.shape)) - (total() - mixers[module])

    mixers: dict[nn.Module, int] = {m: 0 for m in model.modules() if isinstance(m, Mixer)}
    # Mixers first: what they say is in the total when the end of a module that is one is seen.
    watched = [(m, None) for m in mixers] + [(model.get_submodule(name), name) for name in names]
    handles = []
    for module, name in watched:
        handles.append(module.register_forward_pre_hook(partial(begin, name=name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(end, name=name), with_kwargs=True))
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # Fused attention and fused encoder layers are not counted; their parts are.
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            run_timing(model, batch, context)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return {"": total(), **found}


def environment() -> dict[str, str | int]:
    """Return what a reader needs to place the numbers: versions, processor, threads."""
    return {
        "quernel": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
