"""Saving of estimators: a scikit-learn estimator with ``SavedEstimator`` goes to a folder that ``load`` reads.

An estimator is its constructor's parameters and what ``fit`` left. Numbers, strings and names stand in the JSON,
arrays in the tensor file, an estimator within another is described in its place. The table ``_state`` says what a
fitted object holds and which sizes must agree, so that a file which lies about them is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from quernel._errors import FormatError, QuernelError
from quernel._io import write_folder
from quernel._registry import resolve_class
from quernel._validate import check_type

if TYPE_CHECKING:
    from torch import Tensor

Arrays = dict[str, np.ndarray]

_COMMON = {"n_features_in_": "= d", "feature_names_in_": "labels d ?"}
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "flag": (bool,), "text": (str,)}


class SavedEstimator:
    """Mixin for scikit-learn estimators: ``save``, and loading by ``quernel.load``.

    A subclass lists in ``_state`` the attributes that ``fit`` sets, each with one of these descriptions:

    - ``"m d"``: an array of numbers with these axes; one letter is one size throughout the object, and ``d`` is
      the number of input columns (of one row for one-dimensional arrays);
    - ``"= m"``: an integer equal to such a size;
    - ``"labels k"``: k numbers or strings;
    - ``"int"``, ``"float"``, ``"flag"``, ``"text"``, or ``"estimator"`` for another saved estimator;
    - with ``?`` at the end it may be absent or None.

    ``check_params`` raises ``QuernelError`` for parameters that are no good; ``fit`` should call it too.
    """

    format_version: ClassVar[int] = 1
    _state: ClassVar[Mapping[str, str]] = {}

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder that ``quernel.load`` reads.

        Parameters
        ----------
        path : path
            Created, or replaced in one step.

        Returns
        -------
        path : Path

        Raises
        ------
        QuernelError
            If a parameter cannot be written down, such as a generator as ``random_state``.
        """
        import torch

        content = {
            "kind": "estimator",
            "class": type(self).__name__,
            "version": self.format_version,
            "config": self.config(),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.arrays().items()}
        return write_folder(path, content, tensors)

    @classmethod
    def from_folder(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild what ``save`` wrote; ``quernel.load`` calls this."""
        if content["version"] != cls.format_version or type(content["version"]) is not int:
            raise FormatError(
                f"version of {cls.__name__} is {content['version']!r}; this Quernel reads {cls.format_version}"
            )
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        built = cls.from_config(content["config"], arrays)
        if arrays:
            raise FormatError(f"{', '.join(sorted(arrays))}: unexpected arrays")
        return built

    def config(self) -> dict[str, Any]:
        """Return parameters and fitted attributes as JSON; arrays by the names that ``arrays`` has them under."""
        return self._described("", {})

    def arrays(self) -> Arrays:
        """Return the arrays that ``config`` refers to."""
        held: Arrays = {}
        self._described("", held)
        return held

    @classmethod
    def from_config(cls, config: Mapping[str, Any], arrays: Arrays) -> Self:
        """Build from ``config()``, taking what it refers to out of ``arrays``.

        Raises
        ------
        QuernelError
            If anything is missing, unexpected, of another kind or size, or no valid parameter.
        """
        given = {part: {k: _decoded(v, arrays) for k, v in config[part].items()} for part in ("params", "fitted")}
        estimator: Any = cls()
        known = set(estimator.get_params(deep=False))
        if set(given["params"]) != known:
            raise FormatError(f"params of {cls.__name__} must be {sorted(known)}; got {sorted(given['params'])}")
        unknown = sorted(set(given["fitted"]) - {*_COMMON, *cls._state})
        if unknown:
            raise FormatError(f"{cls.__name__} has no fitted {', '.join(unknown)}")
        estimator.set_params(**given["params"])
        estimator.check_params()
        if given["fitted"]:
            estimator._take_state(given["fitted"])
            estimator.check_state()
        return estimator

    def check_state(self) -> None:
        """Raise unless every fitted attribute is there, of its kind, and sizes agree."""
        sizes: dict[str, int] = {}
        state = self._give_state()
        table = _COMMON | dict(self._state)
        # Arrays first: they decide the sizes that integers are compared with.
        for name, description in sorted(table.items(), key=lambda item: item[1].startswith("=")):
            _check(f"{type(self).__name__}.{name}", state.get(name), description, sizes)

    def _give_state(self) -> dict[str, Any]:
        """Return the fitted attributes that a file holds."""
        return {name: vars(self)[name] for name in (*_COMMON, *self._state) if name in vars(self)}

    def _take_state(self, state: Mapping[str, Any]) -> None:
        """Set what ``_give_state`` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def _described(self, prefix: str, arrays: Arrays) -> dict[str, Any]:
        estimator: Any = self
        parts = {"params": estimator.get_params(deep=False), "fitted": self._give_state()}
        return {
            part: {name: _encoded(value, f"{prefix}{part}.{name}", arrays) for name, value in values.items()}
            for part, values in parts.items()
        }


def _encoded(value: Any, key: str, arrays: Arrays) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        arrays[key] = value
        return {"array": key}
    if isinstance(value, np.ndarray) and value.dtype.kind in "UO" and all(isinstance(v, str) for v in value.tolist()):
        return {"strings": value.tolist(), "object": value.dtype.kind == "O"}
    if isinstance(value, SavedEstimator):
        return {"class": type(value).__name__, "config": value._described(f"{key}.", arrays)}
    raise QuernelError(
        f"{key} is a {type(value).__name__}, which a file cannot hold; use numbers, strings, arrays or None "
        "(an integer as random_state)"
    )


def _decoded(value: Any, arrays: Arrays) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise FormatError(f"a number, a string or an object was expected; got {value!r}")
        return value
    if set(value) == {"array"}:
        try:
            return arrays.pop(value["array"])
        except (KeyError, TypeError) as error:
            raise FormatError(f"there is no array {value['array']!r}, or it is used twice") from error
    if set(value) == {"strings", "object"}:
        strings = value["strings"]
        if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
            raise FormatError(f"strings must be a list of strings; got {strings!r}")
        return np.array(strings, dtype=object if check_type("object", value["object"], bool) else str)
    if set(value) == {"class", "config"}:
        cls: Any = resolve_class(value["class"], file="estimator", field="class")
        if not issubclass(cls, SavedEstimator):
            raise FormatError(f"class {cls.__name__} is not an estimator")
        return cls.from_config(value["config"], arrays)
    raise FormatError(f"an object with {sorted(value)} is not understood: {json.dumps(value)[:80]}")


def _check(name: str, value: Any, description: str, sizes: dict[str, int]) -> None:
    words = description.split()
    if words[-1] == "?":
        if value is None:
            return
        words = words[:-1]
    if words[0] == "estimator":
        check_type(name, value, SavedEstimator)
        value.check_state()
    elif words[0] == "=":
        wanted = sizes.get(words[1])
        if type(value) is not int or (wanted is not None and value != wanted):
            raise FormatError(f"{name} must be the integer {wanted}; got {value!r}")
    elif words[0] in _KINDS:
        if not isinstance(value, _KINDS[words[0]]) or (isinstance(value, bool) and words[0] != "flag"):
            raise FormatError(f"{name} must be {words[0]}; got {value!r}")
    else:
        axes = words[1:] if words[0] == "labels" else words
        if not isinstance(value, np.ndarray) or value.ndim != len(axes):
            raise FormatError(f"{name} must be an array of {len(axes)} axes; got {type(value).__name__}")
        for axis, size in zip(axes, value.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise FormatError(f"{name} has {size} for {axis!r}, where another array has {sizes[axis]}")
