"""``Sketch``: the verbs of every sketch, and what they share: merging by kind, saving.

    update(x, weight=1)    query(q)    merge(other)    save(path), load(path)    nbytes

A sketch is linear in what it was given: weights add up, a negative weight takes back, and merging two sketches is
the sketch of both streams. That holds only between sketches of the same functions, so another seed, shape or family
is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

from quernel._array_folder import ArrayFolder
from quernel._errors import QuernelError


class Sketch(ArrayFolder):
    """Base of the sketches.

    A subclass writes ``update``, ``query`` and ``_add``, and describes itself in ``config``, ``_arrays`` and
    ``_restore``; two sketches with the same ``config()`` are of the same functions.
    """

    kind: ClassVar[str] = "sketch"

    @abstractmethod
    def update(self, x: Any, weight: Any = 1) -> Self:
        """Take items in, each with a weight; returns the sketch itself."""

    @abstractmethod
    def query(self, q: Any) -> Any:
        """Return the estimates for queries."""

    def merge(self, other: Self) -> Self:
        """Add another sketch of the same functions, in place; returns the sketch itself.

        Raises
        ------
        QuernelError
            If ``other`` is of another class, or differs in an argument of the constructor; then nothing changed.
        """
        if type(other) is not type(self):
            raise QuernelError(f"other must be a {type(self).__name__} to be merged; got {type(other).__name__}")
        mine, theirs = self.config(), other.config()
        apart = [
            f"{name}={mine[name]!r} here and {theirs[name]!r} there" for name in mine if mine[name] != theirs[name]
        ]
        if apart:
            raise QuernelError(
                f"other must have the same hash functions to be merged; it has {', '.join(apart)}. Build both sketches "
                "with the same arguments"
            )
        self._add(other)
        return self

    @abstractmethod
    def _add(self, other: Self) -> None:
        """Add the contents of a sketch of the same functions."""
