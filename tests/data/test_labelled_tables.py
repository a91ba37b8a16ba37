"""Tables with two classes: parsers on small files of their form, and damage."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest

from quernel._errors import DataError
from quernel.data import labelled_tables


def test_libsvm_rows() -> None:
    found = labelled_tables._adult("train", gzip.compress(b"-1 3:1 123:1\n+1 1:1\n"))
    assert found.x.shape == (2, 123)
    assert (found.x[0, 2], found.x[0, 122], found.x[1, 0], found.x.sum()) == (1, 1, 1, 3)
    np.testing.assert_array_equal(found.y, [-1, 1])


def test_archive() -> None:
    stream = io.BytesIO()
    np.savez(stream, X=np.array([[-1, 0]], np.int8), y=np.array([1], np.int8))
    found = labelled_tables._phishing("all", stream.getvalue())
    np.testing.assert_array_equal(found.x, [[-1.0, 0.0]])
    assert found.y.tolist() == [1.0]


@pytest.mark.parametrize(
    "content",
    [b"", b"text", gzip.compress(b"a b"), gzip.compress(b"1 200:1\n")],
    ids=["empty", "no gzip", "no numbers", "beyond the columns"],
)
def test_damage_is_named(content: bytes) -> None:
    with pytest.raises(DataError):
        labelled_tables._adult("train", content)
    with pytest.raises(DataError):
        labelled_tables._phishing("all", content)
