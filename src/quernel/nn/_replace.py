"""Module surgery: replace a submodule under every name it is known by, so that shared layers stay shared."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from quernel._errors import QuernelError
from quernel._validate import check_type


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
    check_type("new", new, nn.Module).train(old.training)
    for alias in names_of(model, old):
        parent, _, child = alias.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def replace_modules(
    model: nn.Module,
    match: type[nn.Module] | Callable[[str, nn.Module], bool],
    factory: Callable[[nn.Module], nn.Module],
) -> list[str]:
    """Put new modules in the place of all that match, such as token mixers in an existing network.

    Parameters
    ----------
    model : nn.Module
        Edited in place.
    match : type or callable (name, module) -> bool
        Which to replace.  Nothing is sought inside a module that matches.
    factory : callable (module) -> module
        Makes the new module from the old one, another for each; a module known by several names is replaced once.

    Returns
    -------
    names : list of str
        What was replaced, each by its first name.

    Raises
    ------
    QuernelError
        If nothing matches, or the model itself does; if the factory returns no module, or one for two places, whose
        weights would be tied.  The model is as it was then.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.ReLU())
    >>> replace_modules(net, nn.Conv2d, lambda old: nn.Conv2d(8, 8, 3, padding=1, groups=8))
    ['0']
    """
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if not inside and (isinstance(module, match) if isinstance(match, type) else match(name, module)):
            names.append(name)
    if not names:
        raise QuernelError(f"match finds nothing in {type(model).__name__}. List model.named_modules() and match those")
    made: dict[str, nn.Module] = {}
    for name in names:
        new = factory(model.get_submodule(name) if name else model)
        if not isinstance(new, nn.Module):
            raise QuernelError(f"factory must return a module for {name!r}; got {type(new).__name__}")
        twins = [earlier for earlier, module in made.items() if module is new]
        if twins:
            raise QuernelError(
                f"factory must make a module for each place; it returned the same for {twins[0]!r} and {name!r}, whose "
                "weights would be tied. Build it inside of the factory, or tie on purpose by replace_module"
            )
        made[name] = new
    for name, new in made.items():
        replace_module(model, name, new)
    return names
