"""``ArrayFolder``: objects that are a small config and some NumPy arrays, saved to a folder and loaded again.

A subclass names its ``kind``, describes its constructor in ``config`` and its arrays in ``_arrays``, and takes them
back in ``_restore``, checking each with ``take``: a file that lies about sizes is refused before anything is read.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from quernel._errors import FormatError, MissingExtraError
from quernel._io import CONFIG, read_folder, write_folder
from quernel._registry import resolve_class

if TYPE_CHECKING:
    from torch import Tensor

Arrays = dict[str, np.ndarray]


class ArrayFolder(ABC):
    """Base of objects that are saved as a config and arrays: ``save``, ``load``, ``nbytes``."""

    format_version: ClassVar[int] = 1
    kind: ClassVar[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays: what a saved folder's tensor file has, without its header."""
        return sum(array.nbytes for array in self._all_arrays().values())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder that ``load`` and ``quernel.load`` read; replaces an earlier save in one step."""
        return self._write(path, {})

    def _write(self, path: str | os.PathLike[str], more: Mapping[str, Any]) -> Path:
        """Save, with ``more`` beside what every folder says."""
        content = {
            "kind": self.kind,
            "class": type(self).__name__,
            "version": self.format_version,
            "config": self.config(),
            **more,
        }
        tensors = {k: readable(np.ascontiguousarray(v)) for k, v in self._all_arrays().items()}
        return write_folder(path, content, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mmap: bool = False) -> Self:
        """Load what ``save`` wrote; the base class loads any subclass.

        Parameters
        ----------
        path : path
        mmap : bool, default=False
            Leave the arrays in the file and let the system read the pages that are used. Their bytes are then not
            checked: only for files that nobody else can write.

        Raises
        ------
        FormatError
            If anything is missing, damaged, or an object of another class.
        """
        folder = read_folder(path, check_tensors=not mmap)
        file = str(folder.path / CONFIG)
        found = resolve_class(folder.content.get("class"), file=file, field="quernel.content.class")
        if not issubclass(found, cls):
            raise FormatError(f"{file}: field 'quernel.content.class' names {found.__name__}, not a {cls.__name__}")
        try:
            return found.from_folder(folder.content, folder.tensors, path=folder.path, check=not mmap)
        except MissingExtraError:
            raise  # nothing is wrong with the file
        except Exception as error:
            raise FormatError(f"{file}: field 'quernel.content' does not fit: {error}") from error

    @classmethod
    def from_folder(
        cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor], *, path: Path | None = None, check: bool = True
    ) -> Self:
        """Rebuild what ``save`` wrote; ``quernel.load`` calls this. ``check=False`` reads no more than it must."""
        if content["version"] != cls.format_version or type(content["version"]) is not int:
            raise FormatError(
                f"version of {cls.__name__} is {content['version']!r}; this Quernel reads {cls.format_version}"
            )
        if content["kind"] != cls.kind:
            raise FormatError(f"kind must be {cls.kind!r}; got {content['kind']!r}")
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        built = cls.from_config(content["config"])
        if set(content["config"]) != set(built.config()):
            # What is left out would silently take its default.
            raise FormatError(f"config must have {sorted(built.config())}; got {sorted(content['config'])}")
        built._restore_all(arrays)
        if arrays:
            raise FormatError(f"{', '.join(sorted(arrays))}: unexpected arrays")
        if check:
            built._check_contents()
        return built

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build an empty object from ``config()``."""
        return cls(**config)

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values."""

    @abstractmethod
    def _arrays(self) -> Arrays:
        """Return the arrays that a file holds, by name."""

    @abstractmethod
    def _restore(self, arrays: Arrays) -> None:
        """Take the arrays of ``_arrays`` out of ``arrays`` and check them against each other."""

    def _check_contents(self) -> None:  # noqa: B027  (most have nothing to check)
        """Check the numbers in restored arrays, where reading them all is meant; shapes are checked by ``_restore``."""

    def _all_arrays(self) -> Arrays:
        """Return the arrays of the subclass and of the family that it belongs to."""
        return self._arrays()

    def _restore_all(self, arrays: Arrays) -> None:
        """Take the arrays of ``_all_arrays``."""
        self._restore(arrays)


class _Writable:
    """An array that says it may be written, whatever it is; holds it alive."""

    def __init__(self, array: np.ndarray) -> None:
        self.held = array
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def readable(array: np.ndarray) -> Tensor:
    """Return a tensor over an array that is only read; torch would warn of one that may not be written."""
    import torch

    return torch.from_numpy(array if array.flags.writeable else np.asarray(_Writable(array)))


def take(arrays: Arrays, name: str, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """Take one array of a file out of ``arrays``; None in ``shape`` is any size.

    Raises
    ------
    FormatError
        If it is missing, or of another dtype or shape.
    """
    if name not in arrays:
        raise FormatError(f"array {name!r} is missing")
    array = arrays.pop(name)
    fits = len(array.shape) == len(shape) and all(w in (None, s) for w, s in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits:
        raise FormatError(f"array {name!r} must be {np.dtype(dtype)} of shape {shape}; got {array.dtype} {array.shape}")
    return array
