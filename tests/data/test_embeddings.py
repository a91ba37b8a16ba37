"""The parser of embedding archives: what it reads, and what it refuses."""

from __future__ import annotations

import io

import numpy as np
import pytest

from quernel import data
from quernel._errors import DataError
from quernel.data import embeddings


def _npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def test_a_set_of_the_archive_is_read_in_float32() -> None:
    coco = np.arange(6, dtype=np.float16).reshape(2, 3)
    found = embeddings._clip("coco", _npz(coco=coco, lvis=np.zeros((1, 3), np.float16)))
    np.testing.assert_array_equal(found.x, coco)
    assert found.x.dtype == np.float32 and found.y is None and len(found) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", _npz(lvis=np.zeros((1, 3))), _npz(coco=np.zeros(3)), _npz(coco=np.full((1, 2), np.nan))],
    ids=["empty", "other", "absent", "one-axis", "nan"],
)
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="coco"):
        embeddings._clip("coco", content)


@pytest.mark.slow
def test_the_real_archive_has_its_classes(real_data: object) -> None:
    assert {split: len(data.load("clip-class-names", split=split)) for split in ("lvis", "oid", "o365", "coco")} == {
        "lvis": 1203,
        "oid": 500,
        "o365": 365,
        "coco": 80,
    }
