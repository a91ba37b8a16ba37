"""What ``load`` and ``from_path`` return: small frozen dataclasses, one a kind of data.

Arrays are plain NumPy arrays in the units of the source (pixels 0..255, scores 0..5); scaling and
tokenising belong to the task that feeds a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Images:
    """Labelled images of one split.

    Attributes
    ----------
    x : ndarray of uint8, shape (n, h, w) or (n, h, w, 3)
        Grey or RGB pixels, 0..255 (the scikit-learn digits: 0..16).
    y : ndarray of int64, shape (n,)
        Index into ``classes``.
    classes : tuple of str
        Class names.
    note : str
        What a reader of a result should know about these images; may be empty.
    """

    x: npt.NDArray[np.uint8]
    y: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    note: str = ""

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Arrays:
    """Model inputs as they are, with labels or without.

    Attributes
    ----------
    x : ndarray, shape (n, ...)
        What the model takes; floats go in as float32.
    y : ndarray of int64, shape (n,), or None
        Class indices.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with a similarity score.

    Attributes
    ----------
    first, second : tuple of str, length n
        The sentences.
    score : ndarray of float32, shape (n,)
        Similarity by human judgement; STS-B: 0 (unrelated) .. 5 (same meaning).
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    score: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class Retrieval:
    """Documents, queries, and which documents a person found relevant to each query.

    Attributes
    ----------
    documents : tuple of str, length n
        Title and text; a few may be empty.
    queries : tuple of str, length m
    relevant : tuple of ndarray of int64, length m
        Numbers of the relevant documents of each query, ascending.
    """

    documents: tuple[str, ...]
    queries: tuple[str, ...]
    relevant: tuple[npt.NDArray[np.int64], ...]

    def __len__(self) -> int:
        return len(self.queries)


@dataclass(frozen=True)
class Sentences:
    """Sentences, with class labels or without.

    Attributes
    ----------
    text : tuple of str, length n
        One sentence or passage each.
    y : ndarray of int64, shape (n,), or None
        Index into ``classes``.
    classes : tuple of str
        Class names; empty without labels.
    """

    text: tuple[str, ...]
    y: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Table:
    """Rows of numbers with a numeric target.

    Attributes
    ----------
    x : ndarray of float64, shape (n, d)
        Features in the units of the source.
    y : ndarray of float64, shape (n,)
        What to predict.
    test_rows : ndarray of bool, shape (n, k), or None
        Column k marks the test rows of the k-th published split, where there are any.
    """

    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    test_rows: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Text:
    """One long text.

    Attributes
    ----------
    text : str
        The characters, line ends included.
    """

    text: str

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class Tokens:
    """A stream of words that the source has already split.

    Attributes
    ----------
    words : tuple of str, length n
        Words in reading order; ``end`` closes each line or sentence.
    end : str
        The end-of-line token.
    """

    words: tuple[str, ...]
    end: str

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class Checkpoint:
    """Weights that somebody published, as they published them.

    Attributes
    ----------
    tensors : mapping of str to Tensor
        Named as in the source.
    config : mapping of str to int or float
        What the file says about the architecture or its accuracy; may be empty.
    vocabulary : tuple of (bytes, float)
        Pieces of the tokenizer with their scores, in id order; empty for models without one.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, int | float] = field(default_factory=dict)
    vocabulary: tuple[tuple[bytes, float], ...] = ()
