"""What ``quernel index`` reads: a file of vectors (.npy, .npz, .safetensors, .csv) or of sets (.txt, one line a set).

A ``.npy`` file is mapped, so that more vectors than fit into memory can be added piece by piece.
"""

from __future__ import annotations

import csv
import gzip
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quernel._errors import DataError
from quernel._io import read_safetensors
from quernel.hashing import Sets

# The array that is meant where a file holds several.
NAMES = ("x", "vectors", "embeddings")
ENDINGS = (".npy", ".npz", ".safetensors", ".csv", ".txt", ".txt.gz")


def read_items(path: Path) -> Any:
    """Return the vectors (n, dim) or the ``Sets`` of a file.

    Raises
    ------
    DataError
        If the file is missing, empty, of another kind, or not what its ending says.
    """
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if ending not in ENDINGS:
        raise DataError(f"{path}: the file must end in {', '.join(ENDINGS)}")
    items = _sets(path) if ".txt" in ending else _vectors(path, ending)
    if not len(items):
        raise DataError(f"{path} holds no items")
    return items


def _vectors(path: Path, ending: str) -> Any:
    if ending == ".csv":
        return _csv(path)
    if ending == ".safetensors":
        found = _chosen(path, {name: tensor.float().numpy() for name, tensor in read_safetensors(path).items()})
    else:
        try:
            loaded = np.load(path, mmap_mode="r" if ending == ".npy" else None, allow_pickle=False)
            held = {"x": loaded} if ending == ".npy" else dict(loaded)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not a whole {ending} file of plain arrays: {error}") from error
        found = _chosen(path, held)
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise DataError(f"{path} must hold vectors, one a row; got {found.dtype} of shape {found.shape}")
    return found


def _chosen(path: Path, held: Mapping[str, Any]) -> Any:
    names = [name for name in NAMES if name in held] or list(held)
    if len(names) != 1:
        raise DataError(f"{path} must hold one array, or one named {NAMES[0]!r}; got {', '.join(held) or 'none'}")
    return held[names[0]]


def _csv(path: Path) -> np.ndarray:
    rows: list[list[float]] = []
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines)
        for cells in reader:
            if not cells:
                continue
            try:
                rows.append([float(cell) for cell in cells])
            except ValueError as error:
                if reader.line_num == 1:
                    continue  # the header
                raise DataError(f"{path}, line {reader.line_num}: {error}") from error
            if len(rows[-1]) != len(rows[0]):
                raise DataError(f"{path}, line {reader.line_num}: {len(rows[-1])} columns, {len(rows[0])} before")
    return np.array(rows, np.float32)


def _sets(path: Path) -> Sets:
    sets, empty, opened = [], 0, gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    empty = empty or number
                    continue
                if empty:
                    raise DataError(f"{path}, line {empty} is empty: every line is a set, and ids count lines")
                try:
                    sets.append(np.array(line.replace(",", " ").split(), dtype=np.int64))
                except (ValueError, OverflowError) as error:
                    raise DataError(f"{path}, line {number}: a set is integers with spaces between; {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    return Sets.of(sets)
