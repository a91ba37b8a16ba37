"""Vectors that somebody's encoder made: CLIP's text embeddings of the class names of four detection sets."""

from __future__ import annotations

import io
import zipfile

import numpy as np

from quernel._errors import DataError
from quernel.data._kinds import Arrays
from quernel.data._sources import DataSet, File, Source

_CLIP = File(
    "clip/clip_vitb32_text_class_embeddings.npz", "78ac47b31dd759d263c3c2a58011c346b85322dbea928c2394b4d56ed5cf2565"
)
_CLIP_SETS = ("lvis", "oid", "o365", "coco")


def _clip(split: str, content: bytes) -> Arrays:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as held:
            rows = held[split].astype(np.float32)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"not a NumPy archive with an array {split!r}: {error}") from error
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise DataError(f"array {split!r} must be finite, one vector a class; got shape {rows.shape}")
    return Arrays(rows)


SETS = (
    DataSet(
        "clip-class-names",
        "CLIP ViT-B/32 text vectors, 512 numbers, of 'a <class name>': 1,203 / 500 / 365 / 80 classes",
        "Apache-2.0",
        "OpenAI CLIP, computed for Detic (Meta AI): github.com/facebookresearch/Detic, datasets/metadata",
        _CLIP_SETS,
        (Source(_clip, dict.fromkeys(_CLIP_SETS, (_CLIP,))),),
    ),
)
