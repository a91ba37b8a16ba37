"""The contract of a compression method: a frozen dataclass that plans, then applies its plan.

``plan`` looks at the whole model and the data and decides everything (thresholds, groups, ranks);
``apply`` only carries it out. ``PerModuleMethod`` derives both from ``observe`` and ``convert``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from quernel._errors import FormatError, QuernelError
from quernel._registry import resolve_class
from quernel.nn import replace_module

# The natural order of a list of methods: each stage changes what the next one must look at.
STAGES = ("fold", "prune", "lowrank", "smooth", "quantise", "cast")
NEEDS = frozenset({"data", "graph", "finetune"})
LABELS = ("label", "labels")

Scalar = str | int | float | bool | None
Batch = Any
Forward = Callable[[nn.Module, Batch], Any]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class LayerPlan:
    """What a method will do to one module, or why it will not."""

    name: str
    action: str
    reason: str = ""
    details: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        """Whether the module is left as it is."""
        return self.action in ("keep", "skip")


@dataclass(frozen=True)
class Plan:
    """The whole decision of one method about one model.

    ``payload`` is what ``apply`` needs (tensors, ranks, groups), ``summary`` the totals for the report.
    """

    layers: tuple[LayerPlan, ...]
    payload: Any = None
    summary: Mapping[str, Scalar] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Method:
    """Base of all compression methods; subclasses are frozen dataclasses and validate in ``__post_init__``."""

    stage: ClassVar[str]
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    format_version: ClassVar[int] = 1
    # False where layers change width, so that old and new outputs cannot be compared one to one.
    keeps_shapes: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Which of data, graph and finetune the method cannot work without."""
        return frozenset()

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Return the configurations that a budget search should try on their own."""
        return ()

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Decide what to do to ``model``, changing nothing."""
        raise TypeError(f"{type(self).__name__} must define plan()")

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Carry out ``plan`` on ``model``, in place."""
        raise TypeError(f"{type(self).__name__} must define apply()")

    def config(self) -> dict[str, Any]:
        """Return the JSON-able fields."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the method from ``config()``."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})

    def describe(self) -> dict[str, Any]:
        """Return ``{"class", "version", "config"}`` as recipes and trial keys hold it."""
        return {"class": type(self).__name__, "version": self.format_version, "config": self.config()}

    @property
    def label(self) -> str:
        """Short name with the fields that differ from their defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})" if changed else type(self).__name__


def method_from_description(description: Mapping[str, Any], *, file: str = "recipe") -> Method:
    """Build a method from ``Method.describe()``; only registered classes are built."""
    cls = resolve_class(description.get("class"), file=file, field="class")
    if not issubclass(cls, Method):
        raise FormatError(f"{file}: field 'class' names {cls.__name__}, which is not a compression method")
    return cls.from_config(description.get("config", {}))


class Observer(Protocol):
    """Mergeable statistics of a module's inputs (``quernel.kernels.moments`` has the usual ones)."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take one batch of inputs, (..., C), and optionally which of its rows count."""
        ...


class PerModuleMethod(Method):
    """A method that decides module by module: observe its inputs, decide, then convert it.

    ``plan`` keeps statistics and decisions only; each module is converted when ``apply`` reaches it, so
    memory grows by one layer, not by one model.
    """

    action: ClassVar[str] = "convert"

    def observe(self, name: str, module: nn.Module) -> Observer | None:
        """Return a fresh observer for the module's first input, or None if its weight is enough."""
        return None

    def decide(self, name: str, module: nn.Module, stats: Any) -> LayerPlan:
        """Return the decision about one module; action "skip" or "keep" leaves it as it is."""
        return LayerPlan(name, self.action)

    def convert(self, module: nn.Module, stats: Any, layer: LayerPlan) -> nn.Module:
        """Return the replacement of a module that ``decide`` did not skip."""
        raise TypeError(f"{type(self).__name__} must define convert()")

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Observe the selected modules on the data, if any asks for it, and decide about each."""
        selected = context.selected(model, self.targets)
        observers = {name: o for name, m in selected if (o := self.observe(name, m)) is not None}
        if observers:
            observe_inputs(model, context, observers)
        layers = []
        for i, (name, module) in enumerate(selected):
            context.tell(f"{type(self).__name__}: {name}", i / len(selected))
            layers.append(self.decide(name, module, observers.get(name)))
        return Plan(tuple(layers), observers)

    def apply(self, model: nn.Module, plan: Plan) -> None:
        """Convert and put in one module after the other."""
        for layer in plan.layers:
            if not layer.skipped:
                module = model.get_submodule(layer.name)
                replace_module(model, layer.name, self.convert(module, plan.payload.get(layer.name), layer))


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
