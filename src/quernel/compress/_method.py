"""The contract of a compression method: a frozen dataclass that plans, then applies its plan.

``plan`` looks at the whole model and the data and decides everything (thresholds, groups, ranks);
``apply`` only carries it out. ``PerModuleMethod`` derives both from ``observe``, ``decide`` and ``convert``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from quernel._errors import FormatError
from quernel._registry import resolve_class
from quernel.compress._context import Context, Observer, observe_inputs
from quernel.nn import replace_module

STAGES = ("fold", "prune", "lowrank", "smooth", "quantise", "cast")
NEEDS = frozenset({"data", "graph", "finetune"})
Scalar = str | int | float | bool | None


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


@dataclass(frozen=True)
class Method:
    """Base of all compression methods; subclasses are frozen dataclasses and validate in ``__post_init__``."""

    stage: ClassVar[str]
    targets: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    format_version: ClassVar[int] = 1
    # False where layers change width, so that old and new outputs cannot be compared one to one.
    keeps_shapes: ClassVar[bool] = True
    # False where nothing is left for other methods, so that a search need not try the method beside them.
    combines: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        """Which of data, graph and finetune the method cannot work without."""
        return frozenset()

    @property
    def simulated(self) -> bool:
        """Whether the result only imitates the arithmetic it stands for: right values, no time won."""
        return False

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

    def finish(self, model: nn.Module, plan: Plan) -> None:
        """Bring what was trained into its stored form, in place; called once, after fine-tuning if there is any."""
        return

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
    version = description.get("version")
    if type(version) is not int or not 1 <= version <= cls.format_version:
        raise FormatError(
            f"{file}: field 'version' of {cls.__name__} must be in [1, {cls.format_version}]; got {version!r}. "
            "A newer Quernel may have written it"
        )
    config = description.get("config")
    if not isinstance(config, Mapping):
        raise FormatError(f"{file}: field 'config' of {cls.__name__} must be an object; got {type(config).__name__}")
    try:
        return cls.from_config(config)
    except TypeError as error:
        raise FormatError(f"{file}: field 'config' does not fit {cls.__name__}: {error}") from error


def methods_from_recipe(recipe: Mapping[str, Any]) -> list[Method]:
    """Return the methods of a recipe, ready to be applied to another model.

    Parameters
    ----------
    recipe : mapping
        ``Result.recipe``, or the same read back from JSON.

    Returns
    -------
    methods : list of Method
        In the order in which they were applied.

    Raises
    ------
    FormatError
        If the recipe is damaged, or names a class or a version that this Quernel does not know.

    Examples
    --------
    >>> import torch, quernel
    >>> result = quernel.compress.compress(torch.nn.Sequential(torch.nn.Linear(8, 4)), quernel.compress.Cast())
    >>> quernel.compress.methods_from_recipe(result.recipe)
    [Cast(dtype='bfloat16')]
    """
    descriptions = recipe.get("methods") if isinstance(recipe, Mapping) else None
    if not isinstance(descriptions, list) or not all(isinstance(d, Mapping) for d in descriptions):
        raise FormatError("recipe: field 'methods' must be a list of objects, as Result.recipe holds it")
    return [method_from_description(description) for description in descriptions]


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
        """Convert and put in one module after the other; tied weights stay tied where their storage is alike."""
        names = [layer.name for layer in plan.layers if not layer.skipped]
        uses = Counter(id(getattr(model.get_submodule(name), "weight", None)) for name in names)
        # Of tied weights only: what is kept here lives until the last layer is converted.
        stored: dict[nn.Parameter, nn.Module] = {}
        for layer in plan.layers:
            if layer.skipped:
                continue
            module = model.get_submodule(layer.name)
            new = self.convert(module, plan.payload.get(layer.name), layer)
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and uses[id(weight)] > 1 and isinstance(new.weight, nn.Module):
                first = stored.setdefault(weight, new.weight)
                if type(first) is type(new.weight):
                    new.weight = first
            replace_module(model, layer.name, new)
