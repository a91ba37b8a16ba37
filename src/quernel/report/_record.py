"""Records: frozen dataclasses that are also strict JSON objects.

``to_dict``/``to_json`` write every field; ``from_dict``/``from_json`` want exactly those fields and rebuild
an equal object, or raise ``FormatError`` naming the field by its path (``layers[3].bytes_after``).
A measure that is not finite becomes ``None`` on construction: strict JSON has no NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from quernel._errors import FormatError, QuernelError
from quernel._validate import check_float, check_type

Scalar = str | int | float | bool | None


class Record:
    """Base of the report's dataclasses."""

    #: Fields that hold a tuple of other records.
    nested: ClassVar[Mapping[str, type[Record]]] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain dictionaries, lists and scalars."""
        return {name: _plain(getattr(self, name)) for name in self._names()}

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return strict JSON (no NaN, no infinity)."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "") -> Self:
        """Rebuild what :meth:`to_json` wrote.

        Parameters
        ----------
        text : str or bytes
            The JSON document.
        source : str, optional
            Where it came from, for error messages; default is the class name.

        Raises
        ------
        FormatError
            If it is not JSON, or a field is missing, unknown or holds the wrong thing.
        """
        source = source or cls.__name__
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{source}: not a JSON document ({error})") from error
        return cls.from_dict(content, source=source)

    @classmethod
    def from_dict(cls, content: Any, *, source: str = "", path: str = "") -> Self:
        """Rebuild what :meth:`to_dict` gave; ``path`` is the prefix of field names in errors."""
        source = source or cls.__name__
        if not isinstance(content, Mapping):
            raise FormatError(f"{source}: {path.rstrip('.') or 'the document'} must be an object; got {content!r:.60}")
        names = cls._names()
        for name in names:
            if name not in content:
                raise FormatError(f"{source}: field '{path}{name}' is missing")
        for name in content:
            if name not in names:
                raise FormatError(f"{source}: unknown field '{path}{name}'; known here: {', '.join(names)}")
        values = {name: cls._from_json_value(name, content[name], source, path) for name in names}
        try:
            return cls(**values)
        except QuernelError as error:
            raise FormatError(f"{source}: {path}{error}") from error

    @classmethod
    def _from_json_value(cls, name: str, value: Any, source: str, path: str) -> Any:
        kind = cls.nested.get(name)
        if kind is None or not isinstance(value, list):
            return value
        return tuple(kind.from_dict(item, source=source, path=f"{path}{name}[{i}].") for i, item in enumerate(value))

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def _settle(self, **values: Any) -> None:
        """Store checked values from ``__post_init__`` of a frozen dataclass."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def measure(name: str, value: Any, *, low: float | None = None) -> float | None:
    """Return a finite float, or None for "not measured" (NaN and infinity count as that)."""
    value = _unwrapped(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    try:
        return check_float(name, value, low=low)
    except OverflowError as error:
        raise QuernelError(f"{name} must fit a float; got an integer beyond it") from error


def flag(name: str, value: Any) -> bool:
    """Return a bool; NumPy's and torch's are welcome."""
    return check_type(name, _unwrapped(value), bool)


def scalars(name: str, values: Any, *, depth: int = 0) -> dict[str, Any]:
    """Return a dictionary of JSON scalars, with ``depth`` levels of such dictionaries below it."""
    if not isinstance(values, Mapping):
        raise QuernelError(f"{name} must be a mapping of names to numbers or strings; got {values!r:.60}")
    settled: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise QuernelError(f"{name} must have strings as keys; got {key!r}")
        value = _unwrapped(value)
        if isinstance(value, Mapping) and depth > 0:
            settled[key] = scalars(f"{name}[{key!r}]", value, depth=depth - 1)
        elif isinstance(value, float) and not math.isfinite(value):
            settled[key] = None
        elif value is None or isinstance(value, (str, int, float)):
            settled[key] = value
        else:
            raise QuernelError(f"{name}[{key!r}] must be a string, number, bool or None; got {value!r:.60}")
    return settled


def strings(name: str, values: Any) -> tuple[str, ...]:
    """Return a tuple of strings."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise QuernelError(f"{name} must be a sequence of strings; got {values!r:.60}")
    return tuple(values)


def _unwrapped(value: Any) -> Any:
    """Turn NumPy and torch scalars into Python's; leave the rest."""
    if isinstance(value, (str, int, float, bool)) and type(value).__module__ == "builtins":
        return value
    item = getattr(value, "item", None)
    if item is None or getattr(value, "ndim", 0) != 0:
        return value
    return item()


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
