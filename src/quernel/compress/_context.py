"""What a compression method may look at: the data, how a batch is run, which modules the user allows.

Labels never reach the model, padding never reaches the statistics, and every module gets its mode back.
"""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError

LABELS = ("label", "labels")

Batch = Any
Forward = Callable[[nn.Module, Batch], Any]
Progress = Callable[[str, float], None]


@dataclass
class Context:
    """What a method may look at: the data, how to run a batch, and which modules the user allows.

    Parameters
    ----------
    data : re-iterable of batches, optional
        A mapping is passed as keywords, a tuple or list as positions, a tensor alone; labels never reach
        the model. Anything else goes through ``forward``.
    example_inputs : tuple, optional
        Positional inputs for tracing; default is the first batch.
    forward : callable, optional
        ``forward(model, batch)``.
    include, exclude : sequences of str
        Glob patterns over module names, e.g. ``"encoder.layer.*"``.
    progress : callable, optional
        ``progress(message, fraction)``.
    """

    data: Iterable[Batch] | None = None
    example_inputs: Any = None
    forward: Forward | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    progress: Progress | None = None

    def selected(self, model: nn.Module, targets: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
        """Return the modules of exactly these types that the patterns allow, shared ones once."""
        return [(name, m) for name, m in model.named_modules() if name and type(m) in targets and self.allows(name)]

    def allows(self, name: str) -> bool:
        """Say whether ``include`` and ``exclude`` let a method touch this module."""
        if self.include and not any(_matches(name, pattern) for pattern in self.include):
            return False
        return not any(_matches(name, pattern) for pattern in self.exclude)

    def batches(self) -> Iterator[Batch]:
        """Iterate over the data from its beginning; refuse an empty or absent set."""
        if self.data is None:
            raise QuernelError("data is needed by this method; pass data=, a list or loader of batches")
        count = 0
        for batch in self.data:
            count += 1
            yield batch
        if count == 0:
            raise QuernelError("data is empty; pass at least one batch (a generator can be read only once: use a list)")

    def run_batch(self, model: nn.Module, batch: Batch) -> Any:
        """Run one batch through the model, on the model's device."""
        return run_batch(model, batch, self.forward)

    def run(self, model: nn.Module, observe: Callable[[Batch], None] | None = None) -> None:
        """Run all data through the model in eval mode without gradients; ``observe`` sees each batch first."""
        with evaluating(model), torch.no_grad():
            for batch in self.batches():
                if observe is not None:
                    observe(batch)
                self.run_batch(model, batch)

    def inputs(self) -> tuple[Any, ...]:
        """Return positional example inputs for tracing: ``example_inputs`` or the first batch."""
        example = self.example_inputs
        if example is None:
            if self.data is None:
                raise QuernelError("example_inputs is needed by this method; pass example_inputs= or data=")
            example = next(self.batches())
        if isinstance(example, Tensor):
            return (example,)
        if isinstance(example, Mapping):
            return (dict(example),)
        return tuple(example)

    @staticmethod
    def mask_of(batch: Batch) -> Tensor | None:
        """Return the (B, T) boolean attention mask of a mapping batch, or None."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def tell(self, message: str, fraction: float) -> None:
        """Report progress if the user asked for it."""
        if self.progress is not None:
            self.progress(message, fraction)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode for a while; each module gets its own mode back."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_batch(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Any:
    """Run one batch: mapping -> ``model(**b)``, tuple or list -> ``model(*b)``, tensor -> ``model(b)``.

    Labels never reach the model: the keys "label" and "labels" are dropped, and so are positions beyond
    those that ``model.forward`` takes (a loader's ``(x, y)`` becomes ``model(x)``).
    """
    batch = to_device(batch, device_of(model))
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in LABELS})
    if isinstance(batch, tuple | list):
        return model(*batch[: _positions(model)])
    raise QuernelError(
        f"data must yield tensors, tuples or mappings of tensors; got {type(batch).__name__}. "
        "Pass forward=lambda model, batch: ... to say how a batch is run"
    )


def _positions(model: nn.Module) -> int | None:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first tensor, or the CPU."""
    tensor = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch) if type(batch) in (tuple, list) else batch
    return batch


class Observer(Protocol):
    """Mergeable statistics of a module's inputs (``quernel.kernels.moments`` has the usual ones)."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take one batch of inputs, (..., C), and optionally which of its rows count."""
        ...


def tied_elsewhere(model: nn.Module, weight: Tensor, holders: Iterable[nn.Module]) -> str | None:
    """Return the name under which a module other than ``holders`` holds this very tensor, or None."""
    known = list(holders)
    for name, module in model.named_modules():
        if not any(module is holder for holder in known):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter is weight:
                    return f"{name}.{own}"
    return None


def observe_inputs(model: nn.Module, context: Context, observers: Mapping[str, Observer]) -> None:
    """Run the data and feed each named module's first input to its observer, padding masked out."""
    mask: list[Tensor | None] = [None]

    def hook_for(name: str, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            usable = mask[0] is not None and tuple(mask[0].shape) == tuple(x.shape[:-1])
            try:
                observer.update(x, mask[0].to(x.device) if usable and mask[0] is not None else None)
            except QuernelError as error:
                raise QuernelError(f"the inputs of {name!r} cannot be observed: {error}") from error

        return hook

    def see(batch: Batch) -> None:
        mask[0] = context.mask_of(batch)

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name, o)) for name, o in observers.items()]
    try:
        context.run(model, see)
    finally:
        for handle in handles:
            handle.remove()


def _matches(name: str, pattern: str) -> bool:
    # A bare word names a module or anything below it; globs match the whole dotted name.
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") or pattern in name.split(".")
