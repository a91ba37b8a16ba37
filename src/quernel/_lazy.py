"""Lazy name tables (PEP 562): a package lists its public names, a name loads its module on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from quernel._errors import MissingExtraError

Where = str | tuple[str, str]


def attach(package: str, table: Mapping[str, Where]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Build ``__getattr__``, ``__dir__`` and ``__all__`` of a package from its name table.

    Parameters
    ----------
    package : str
        The package's ``__name__``.
    table : mapping of str to str or (str, str)
        Public name -> relative module, or (relative module, extra) where the module subclasses an
        optional package. A module that ends in the public name itself is returned as a module.

    Returns
    -------
    (getattr, dir, all) : tuple
        To be assigned to ``__getattr__``, ``__dir__`` and ``__all__``.
    """

    def load(name: str) -> Any:
        try:
            where = table[name]
        except KeyError:
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        module_name, extra = (where, None) if isinstance(where, str) else where
        try:
            module = importlib.import_module(module_name, package)
        except ModuleNotFoundError as error:
            if extra is None or (error.name or "").partition(".")[0] == "quernel":
                raise
            raise MissingExtraError(f"{package}.{name}", extra) from error
        return module if module_name.rpartition(".")[2] == name else getattr(module, name)

    return load, lambda: sorted(table), sorted(table)
