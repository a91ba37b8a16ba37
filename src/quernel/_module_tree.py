"""A model as data: its architecture, and the class and config of every module that a method put in.

Saving compares the model with the architecture it came from (``signature``) and writes down only what
differs. Loading builds the architecture with parameters on ``meta``, swaps those modules, and assigns
the tensors: no method runs again, and no factory named in a file is imported.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from quernel._errors import FormatError
from quernel._registry import resolve_class

# Layers of torch that surgery narrows: class name -> the attributes its constructor takes.
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
TORCH_LAYERS: dict[str, tuple[str, ...]] = {
    "BatchNorm1d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "BatchNorm2d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "BatchNorm3d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "Conv1d": _CONV,
    "Conv2d": _CONV,
    "Conv3d": _CONV,
    "Embedding": ("num_embeddings", "embedding_dim", "padding_idx"),
    "Identity": (),
    "Linear": ("in_features", "out_features"),
}
_BIASED = ("Conv1d", "Conv2d", "Conv3d", "Linear")

Signature = dict[str, tuple[str, str]]
_registration_lock = threading.Lock()


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
        elif type(module) is getattr(nn, type(module).__name__, None) and type(module).__name__ in TORCH_LAYERS:
            if before == (kind, arguments):
                continue
        elif original is None or (before is not None and before[0] == kind):
            continue
        else:
            raise FormatError(f"module {name!r} is a {kind}, which is neither registered nor a plain layer of torch")
        alias = first_name.setdefault(module, name)
        described[name] = {"alias": alias} if alias != name else _description(module)
    return described


def is_registered(module: nn.Module) -> bool:
    """Say whether the class itself (not a base of it) is in the catalogue and can describe itself."""
    return "_quernel_slug" in type(module).__dict__ and hasattr(module, "config")


def swap_modules(model: nn.Module, modules: Mapping[str, Any], *, file: str) -> None:
    """Put the described modules into ``model``; every class comes from the allow-list."""
    for name, description in modules.items():
        field = f"quernel.content.modules.{name}"
        if not isinstance(description, dict):
            raise FormatError(f"{file}: field {field!r} must be an object; got {description!r}")
        parent, _, child = name.rpartition(".")
        try:
            holder = model.get_submodule(parent)
            holder.get_submodule(child)
            new = (
                model.get_submodule(description["alias"])
                if "alias" in description
                else _build(description, file, field)
            )
        except (AttributeError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise FormatError(f"{file}: field {field!r} does not fit this architecture ({error})") from error
        setattr(holder, child, new)


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
        Naming the first tensors that are missing, unexpected or of another shape.
    """
    expected = model.state_dict(keep_vars=True)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model expects {tuple(own.shape)}"
        for name, own in expected.items()
        if name in tensors and tuple(own.shape) != tuple(tensors[name].shape)
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


def _description(module: nn.Module) -> dict[str, Any]:
    if is_registered(module):
        return {"class": type(module).__name__, "config": module.config()}  # type: ignore[operator]
    name = type(module).__name__
    config = {field: getattr(module, field) for field in TORCH_LAYERS[name]}
    if name in _BIASED:
        config["bias"] = module.bias is not None
    return {"class": f"torch.{name}", "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}}


def _build(description: dict[str, Any], file: str, field: str) -> nn.Module:
    name, config = description["class"], description["config"]
    if isinstance(name, str) and name.startswith("torch."):
        layer = name.removeprefix("torch.")
        allowed = (*TORCH_LAYERS.get(layer, ()), *(("bias",) if layer in _BIASED else ()))
        if layer not in TORCH_LAYERS or set(config) - set(allowed):
            raise FormatError(f"{file}: field {field!r} names {name!r} with {sorted(config)}, which is not allowed")
        return getattr(nn, layer)(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    module = resolve_class(name, file=file, field=f"{field}.class").from_config(config)  # type: ignore[attr-defined]
    if not isinstance(module, nn.Module):
        raise FormatError(f"{file}: field {field!r} names {name!r}, which is not a module")
    return module


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
    if not isinstance(dtypes, dict) or not all(
        isinstance(getattr(torch, str(d), None), torch.dtype) for d in dtypes.values()
    ):
        raise FormatError(f"{file}: field {field!r} must map buffer names to dtypes; got {dtypes!r}")
    buffers = dict(model.named_buffers())
    for name, dtype in dtypes.items():
        if name not in buffers:
            raise FormatError(f"{file}: field {field!r} names {name!r}, which this architecture does not have")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, buffers[name].to(getattr(torch, dtype)))


def meta_leftovers(model: nn.Module) -> list[str]:
    """Return names of tensors that are still on ``meta``: nothing loaded them."""
    pairs = (*model.named_parameters(), *model.named_buffers())
    return [name for name, tensor in pairs if isinstance(tensor, torch.Tensor) and tensor.is_meta]
