"""Module surgery: replace a submodule under every name it is known by, so that shared layers stay shared."""

from __future__ import annotations

from torch import nn

from quernel._errors import QuernelError


def names_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Return every dotted name under which ``module`` is reachable in ``model``."""
    return [name for name, found in model.named_modules(remove_duplicate=False) if found is module]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule ``name``, at all its aliases.

    Parameters
    ----------
    model : nn.Module
        Edited in place.
    name : str
        Dotted name as in ``model.named_modules()``.
    new : nn.Module
        Takes over training mode from the module it replaces.

    Raises
    ------
    QuernelError
        If there is no such submodule, or ``name`` is the model itself.
    """
    if not name:
        raise QuernelError("name must be that of a submodule; the root has no parent. Wrap the model first")
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise QuernelError(f"name must be a submodule of {type(model).__name__}; got {name!r}") from error
    new.train(old.training)
    for alias in names_of(model, old):
        parent, _, child = alias.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
