"""What a compression method may look at: the data, how a batch is run, which modules the user allows.

Labels never reach the model, padding never reaches the statistics, and every module gets its mode back.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._progress import Progress, check_progress
from quernel.nn._running import device_of, to_device
from quernel.nn._running import evaluating as evaluating  # methods take it from here

LABELS = ("label", "labels")

# Their eval forward hands the children's raw weights to one fused call, so a replaced child breaks it.
FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
OPAQUE = "torch's fused attention path reads its raw weight"

Batch = Any
Forward = Callable[[nn.Module, Batch], Any]


@dataclass
class Context:
    """What a method may look at: the data, how to run a batch, and which modules the user allows.

    Parameters
    ----------
    data : re-iterable of batches, optional
        A mapping is passed as keywords without "label" and "labels", a tuple or list as positions as far as
        the model requires them (see ``run_batch``), a tensor alone. Anything else goes through ``forward``. One tensor
        in the place of all is one batch.
    example_inputs : tensor, tuple or mapping, optional
        Inputs for tracing and for latency, a tuple in whole; default is the first batch.
    forward : callable, optional
        ``forward(model, batch)``.
    include, exclude : sequences of str
        Glob patterns over module names, e.g. ``"encoder.layer.*"``.
    progress : callable, optional
        ``progress(message, fraction)``.
    finetune : callable, optional
        ``finetune(model)`` trains in place; for methods that train between steps of their own.
    """

    data: Iterable[Batch] | None = None
    example_inputs: Any = None
    forward: Forward | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    progress: Progress | None = None
    finetune: Callable[[nn.Module], Any] | None = None

    def __post_init__(self) -> None:
        check_progress(self.progress)
        if isinstance(self.data, Tensor):  # one batch, which would otherwise be read row by row
            object.__setattr__(self, "data", [self.data])

    def selected(self, model: nn.Module, targets: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
        """Return the modules of exactly these types that the patterns allow, shared ones once.

        What torch's fused attention reads past ``forward`` is left out: see ``opaque_parents``.
        """
        opaque = opaque_parents(model)
        return [
            (name, m)
            for name, m in model.named_modules()
            if name and type(m) in targets and not is_below(name, opaque) and self.allows(name)
        ]

    def allows(self, name: str) -> bool:
        """Say whether ``include`` and ``exclude`` let a method touch this module."""
        if self.include and not any(_matches(name, pattern) for pattern in self.include):
            return False
        return not any(_matches(name, pattern) for pattern in self.exclude)

    @property
    def have(self) -> frozenset[str]:
        """Which of a method's needs the context meets: data, graph."""
        traceable = self.data is not None or self.example_inputs is not None
        return frozenset(n for n, there in (("data", self.data is not None), ("graph", traceable)) if there)

    def batches(self) -> Iterator[Batch]:
        """Iterate over the data from its beginning; refuse an empty or absent set."""
        if self.data is None:
            raise QuernelError("data is needed by this method; pass data=, a list or loader of batches")
        if iter(self.data) is self.data:
            raise QuernelError(
                f"data must be readable more than once; got a {type(self.data).__name__}. Pass a list or a loader"
            )
        count = 0
        for batch in self.data:
            count += 1
            yield batch
        if count == 0:
            raise QuernelError("data is empty; pass at least one batch")

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


def run_batch(model: nn.Module, batch: Batch, forward: Forward | None = None) -> Any:
    """Run one batch: mapping -> ``model(**b)``, tuple or list -> ``model(*b)``, tensor -> ``model(b)``.

    Of a mapping, the keys "label" and "labels" are dropped. Nothing marks the labels of a tuple, so it fills
    the parameters of ``model.forward`` that have no default (at least one) and the rest is dropped: ``(x, y)``
    becomes ``model(x)`` for ``forward(x)`` and for ``forward(x, mask=None)`` alike. A model that takes
    ``*args`` gets all entries. Where this is not what is meant, use mappings or ``forward=``.
    """
    batch = to_device(batch, device_of(model))
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in LABELS})
    if isinstance(batch, tuple | list):
        return model(*batch[: _required(model)])
    raise QuernelError(
        f"data must yield tensors, tuples or mappings of tensors; got {type(batch).__name__}. "
        "Pass forward=lambda model, batch: ... to say how a batch is run"
    )


def _required(model: nn.Module) -> int | None:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters))


def opaque_parents(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules whose children must stay as they are; the root's name is "".

    ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` pass their children's weights to one fused
    call in eval mode and never call the children, so whatever replaces one of these makes the model fail.
    Subclasses count where they keep torch's ``forward``. ``is_below`` tells who is a child.
    """
    return tuple(name for name, m in model.named_modules() if any(type(m).forward is kind.forward for kind in FUSED))


def is_below(name: str, parents: Iterable[str]) -> bool:
    """Say whether a module stands below one of ``parents``, at any depth."""
    return any(name.startswith(f"{parent}." if parent else "") and name != parent for parent in parents)


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
    """Run the data and feed each named module's first input to its observer, padding masked out.

    The mask of a (B, T) batch is used for inputs (B, T, C) and, flattened, for inputs (B*T, C).
    """
    mask: list[Tensor | None] = [None]

    def hook_for(name: str, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None:
                raise QuernelError(f"{name!r} is called without a tensor, so its input cannot be observed")
            try:
                observer.update(x.detach(), fitting_mask(mask[0], x))
            except QuernelError as error:
                raise QuernelError(f"the inputs of {name!r} cannot be observed: {error}") from error

        return hook

    def see(batch: Batch) -> None:
        mask[0] = context.mask_of(batch)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(hook_for(name, o), with_kwargs=True)
        for name, o in observers.items()
    ]
    try:
        context.run(model, see)
    finally:
        for handle in handles:
            handle.remove()


def fitting_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask of the batch in the shape of the rows of x, or None where these are other rows."""
    rows = tuple(x.shape[:-1])
    if mask is None or rows not in (tuple(mask.shape), (mask.numel(),)):
        return None
    return mask.reshape(rows).to(x.device)


def _matches(name: str, pattern: str) -> bool:
    # A bare word names a module or anything below it; globs match the whole dotted name.
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") or pattern in name.split(".")
