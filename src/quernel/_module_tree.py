"""A model as data: its architecture, and the class and config of every module that a method put in.

Saving compares the model with the architecture it came from (``signature``) and writes down only what
differs. Loading builds the architecture with parameters on ``meta``, swaps those modules, and assigns
the tensors: no method runs again, and no factory named in a file is imported. How torch's plain layers
are written down is in ``_plain_layers``.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from quernel._errors import FormatError, MissingExtraError, QuernelError
from quernel._plain_layers import build_layer, describe_layer, is_plain_layer
from quernel._registry import resolve_class

Signature = dict[str, tuple[str, str]]
_registration_lock = threading.Lock()
# Contracts of modules that a method puts in: a file describes them whole. A model is an architecture of its own.
_INSERTED = ("module", "mixer", "weight")


def signature(model: nn.Module) -> Signature:
    """Return ``{module name: (class, repr of its own arguments)}``: what the constructor decided."""
    return {
        name: (f"{type(module).__module__}.{type(module).__qualname__}", module.extra_repr())
        for name, module in model.named_modules(remove_duplicate=False)
    }


def changed_modules(model: nn.Module, original: Signature | None) -> dict[str, dict[str, Any]]:
    """Return ``{name: {"class", "config"}}`` of the modules that a file must describe.

    Those are the outermost registered modules, and torch's plain layers where they differ from the
    architecture (all of them when ``original`` is None, the architecture being unknown).

    Raises
    ------
    FormatError
        If a module in the place of another is neither, so that a file could not say how to build it.
    """
    described: dict[str, dict[str, Any]] = {}
    first_name: dict[nn.Module, str] = {}
    inside = None
    for name, module in model.named_modules(remove_duplicate=False):
        if name == "" or (inside is not None and name.startswith(f"{inside}.")):
            continue
        kind, arguments = f"{type(module).__module__}.{type(module).__qualname__}", module.extra_repr()
        before = None if original is None else original.get(name)
        if is_registered(module):
            inside = name
        elif is_plain_layer(module):
            if before == (kind, arguments):
                continue
        elif original is None or (before is not None and before[0] == kind):
            continue
        else:
            raise FormatError(f"module {name!r} is a {kind}, which is neither registered nor a plain layer of torch")
        alias = first_name.setdefault(module, name)
        described[name] = {"alias": alias} if alias != name else _description(module)
    return described


def shared_modules(model: nn.Module, described: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{name: name of the same}`` of modules that are one object under several names, within described ones.

    A description tells what a shared array or a pair of tied rows is, not that it is the same one. Modules within
    shared ones are not listed, and what the architecture alone shares is its own affair.
    """
    aliases = {name for name, description in described.items() if "alias" in description}
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not _is_within(name, aliases):
            names.setdefault(module, []).append(name)
    shared: dict[str, str] = {}
    for held in names.values():
        inside = [name for name in held if _is_within(name, described)]
        shared |= {name: inside[0] for name in held if inside and name != inside[0]}
    return {name: same for name, same in shared.items() if not _is_within(name, shared)}


def _is_within(name: str, outer: Collection[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:k]) in outer for k in range(1, len(parts)))


def describes_itself(module: nn.Module) -> bool:
    """Say whether the class itself (not a base of it) is in the catalogue and has a ``config``."""
    return "_quernel_slug" in type(module).__dict__ and hasattr(module, "config")


def is_registered(module: nn.Module) -> bool:
    """Say whether this is a module that a method puts into a model and that describes itself, not a model."""
    return describes_itself(module) and type(module).__dict__["_quernel_contract"] in _INSERTED


@contextlib.contextmanager
def fitting(file: str, field: str) -> Iterator[None]:
    """Within, an error over a file's values becomes a ``FormatError`` that names the file and the field."""
    try:
        yield
    except MissingExtraError:
        raise
    except Exception as error:
        # Constructors of other libraries raise classes of their own over a value that they cannot use.
        raise FormatError(f"{file}: field {field!r} does not fit: {type(error).__name__}: {error}") from error


def swap_modules(model: nn.Module, modules: Mapping[str, Any], *, file: str) -> None:
    """Put the described modules into ``model``; every class comes from the allow-list.

    A plain layer that is already what its description says stays, with whatever no description mentions.
    """
    left_alone: set[nn.Module] = set()
    aliases: dict[str, str] = {}
    for name, description in modules.items():
        field = f"quernel.content.modules.{name}"
        _check_description(name, description, modules, f"{file}: field {field!r}")
        if "alias" in description:
            aliases[name] = description["alias"]
            continue
        with fitting(file, field):
            holder, child, old = _place(model, name)
        new = _build(description, file, field)
        if is_plain_layer(old) and _same(old, new) and old not in left_alone:
            left_alone.add(old)
        else:
            setattr(holder, child, new)
    # Last, because JSON sorts "10" before "2" and an alias must see the new module.
    for name, target in aliases.items():
        with fitting(file, f"quernel.content.modules.{name}"):
            holder, child, _ = _place(model, name)
            setattr(holder, child, model.get_submodule(target))


def share_modules(model: nn.Module, shared: Any, described: Mapping[str, Any], *, file: str) -> None:
    """Make modules one object again that were one (``shared_modules``).

    They must be of one class, and described ones of one configuration.
    """
    field = "quernel.content.shared"
    if not isinstance(shared, dict):
        raise FormatError(f"{file}: field {field!r} must be an object; got {shared!r}")
    for name, same in shared.items():
        with fitting(file, f"{field}.{name}"):
            holder, child, old = _place(model, name)
            kept = model.get_submodule(same)
            told = [_told(module) if _is_within(name, described) else type(module).__name__ for module in (old, kept)]
            if type(old) is not type(kept) or told[0] != told[1]:
                raise QuernelError(f"it is {told[0]}, and {same!r} is {told[1]}")
            setattr(holder, child, kept)


def _told(module: nn.Module) -> str:
    config = getattr(module, "config", None)
    return f"{type(module).__name__}({config() if callable(config) else module.extra_repr()})"


def _check_description(name: str, description: Any, modules: Mapping[str, Any], where: str) -> None:
    if not isinstance(description, dict):
        raise FormatError(f"{where} must be an object; got {description!r}")
    parts = name.split(".")
    outer = [".".join(parts[:k]) for k in range(1, len(parts))]
    if not all(parts) or any(place in modules for place in outer):
        raise FormatError(f"{where} must name a module that is not within another described one")
    if "alias" in description:
        target = description["alias"]
        if not isinstance(target, str) or not isinstance(modules.get(target), dict) or "alias" in modules[target]:
            raise FormatError(f"{where} is an alias of {target!r}, which is not described")
    elif not isinstance(description.get("config"), dict):
        raise FormatError(f"{where} must have an object 'config'; got {description.get('config')!r}")


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    return holder, child, holder.get_submodule(child)


def _same(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b) and a.extra_repr() == b.extra_repr()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within, new parameters live on ``meta`` while buffers stay real (non-persistent ones are in no file)."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != owner:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    owner = threading.get_ident()
    with _registration_lock:
        # Annotated by torch as returning None, but a returned Parameter replaces the registered one (its docstring).
        handle = nn.modules.module.register_module_parameter_registration_hook(cast(Any, to_meta))
        try:
            yield
        finally:
            handle.remove()


def assign_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, file: str) -> None:
    """Give ``model`` the saved tensors themselves, shared ones staying shared.

    Raises
    ------
    FormatError
        Naming the first tensors that are missing, unexpected or of another shape or kind of numbers.
    """
    expected = model.state_dict(keep_vars=True)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model expects {tuple(own.shape)}"
        for name, own in expected.items()
        if name in tensors and tuple(own.shape) != tuple(tensors[name].shape)
    ]
    problems += [
        f"{name} has dtype {tensors[name].dtype}, the model expects {own.dtype}"
        for name, own in expected.items()
        if name in tensors and not _exchangeable(own.dtype, tensors[name].dtype)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FormatError(f"{file}: the tensors do not fit the architecture: {'; '.join(problems[:5])}{more}")
    # One Parameter a stored tensor, so that tied weights are tied again.
    parameters: dict[int, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    for name, own in expected.items():
        tensor = tensors[name]
        if isinstance(own, nn.Parameter):
            if id(tensor) not in parameters:
                parameters[id(tensor)] = nn.Parameter(
                    tensor, requires_grad=own.requires_grad and tensor.is_floating_point()
                )
            tensor = parameters[id(tensor)]
        state[name] = tensor
    model.load_state_dict(state, assign=True)


def _exchangeable(a: torch.dtype, b: torch.dtype) -> bool:
    # A model may be saved in half precision; codes, indices and masks have one meaning in one dtype only.
    return a == b or (a.is_floating_point and b.is_floating_point)


def _description(module: nn.Module) -> dict[str, Any]:
    if is_registered(module):
        return {"class": type(module).__name__, "config": module.config()}  # type: ignore[operator]
    return describe_layer(module)


def _build(description: dict[str, Any], file: str, field: str) -> nn.Module:
    name, config = description.get("class"), description["config"]
    if isinstance(name, str) and name.startswith("torch."):
        with fitting(file, field):
            return build_layer(name, config)
    cls: Any = resolve_class(name, file=file, field=f"{field}.class")
    with fitting(file, f"{field}.config"):
        module = cls.from_config(config)
        kept = json.loads(json.dumps(module.config()))
    if not isinstance(module, nn.Module):
        raise FormatError(f"{file}: field {field!r} names {name!r}, which is not a module")
    if not _agrees(config, kept):
        raise FormatError(f"{file}: field '{field}.config' is {config}, of which {name} understands {kept}")
    return module


def _agrees(asked: Any, got: Any) -> bool:
    # ``got`` may have fields that a newer version added; what the file says must all be there.
    if isinstance(asked, dict) and isinstance(got, dict):
        return all(key in got and _agrees(value, got[key]) for key, value in asked.items())
    if isinstance(asked, list) and isinstance(got, list):
        return len(asked) == len(got) and all(map(_agrees, asked, got))
    return bool(asked == got)


def unsaved_buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """Return dtypes of floating buffers that are in no file (RoPE tables): the architecture makes them anew."""
    saved = model.state_dict()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if name not in saved and buffer.is_floating_point()
    }


def cast_unsaved_buffers(model: nn.Module, dtypes: Any, *, file: str) -> None:
    """Give the buffers of ``unsaved_buffer_dtypes`` the dtype they had when the model was saved."""
    field = "quernel.content.buffer_dtypes"
    if not isinstance(dtypes, dict) or not all(map(_is_float_name, dtypes.values())):
        raise FormatError(f"{file}: field {field!r} must map buffer names to floating dtypes; got {dtypes!r}")
    buffers = dict(model.named_buffers())
    for name, dtype in dtypes.items():
        if name not in buffers:
            raise FormatError(f"{file}: field {field!r} names {name!r}, which this architecture does not have")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, buffers[name].to(getattr(torch, dtype)))


def _is_float_name(name: Any) -> bool:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def meta_leftovers(model: nn.Module) -> list[str]:
    """Return names of tensors that are still on ``meta``: nothing loaded them."""
    pairs = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in pairs if isinstance(tensor, torch.Tensor) and tensor.is_meta]
