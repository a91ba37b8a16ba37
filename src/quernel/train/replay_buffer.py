"""``ReplayBuffer``: a few samples of every class, kept for training on later classes.

Each sample that comes by draws a key; the samples with the smallest keys of their class stay.  So every sample of a
class, whenever it came, is kept with the same chance.  Memory: at most ``per_class`` samples a class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quernel import _random
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_int


@register(
    "stationary-representations",
    pillar="train",
    contract="trainer",
    paper="2405.02581",
    status="stable",
    headline=False,
)
class ReplayBuffer:
    """Keep a uniform random sample of each class, on the CPU.

    Parameters
    ----------
    per_class : int, default=20
        Samples kept of a class.
    seed : int, default=0

    Examples
    --------
    >>> memory = ReplayBuffer(2).add(torch.arange(10.0)[:, None], torch.arange(10) % 2)
    >>> x, y = memory.items()
    >>> len(memory), y.tolist(), bool((x[:, 0] % 2 == y).all())
    (4, [0, 0, 1, 1], True)
    """

    def __init__(self, per_class: int = 20, *, seed: int = 0) -> None:
        self.per_class = check_int("per_class", per_class, low=1)
        self._generator = _random.torch_generator(check_int("seed", seed, low=0))
        self._x: Tensor | None = None
        self._y = torch.zeros(0, dtype=torch.int64)
        self._keys = torch.zeros(0, dtype=torch.float64)

    def __len__(self) -> int:
        """Samples held."""
        return len(self._y)

    @property
    def nbytes(self) -> int:
        """Bytes of the samples held, their labels and their keys."""
        held = [self._y, self._keys, *([] if self._x is None else [self._x])]
        return sum(t.numel() * t.element_size() for t in held)

    def add(self, x: Tensor, y: Tensor) -> ReplayBuffer:
        """Offer samples; each class keeps ``per_class`` of all it was ever offered.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
        y : Tensor, shape (n,), integers

        Raises
        ------
        QuernelError
            If shapes do not fit each other or the samples held.
        """
        if y.ndim != 1 or len(x) != len(y) or y.is_floating_point():
            raise QuernelError(
                f"x and y must be n samples and n integer labels; got shapes {tuple(x.shape)} and {tuple(y.shape)} of "
                f"{y.dtype}"
            )
        if self._x is not None and (x.shape[1:] != self._x.shape[1:] or x.dtype != self._x.dtype):
            raise QuernelError(
                f"x must hold samples like those held, {self._x.dtype} of shape {tuple(self._x.shape[1:])}; got "
                f"{x.dtype} of {tuple(x.shape[1:])}"
            )
        keys = torch.rand(len(y), dtype=torch.float64, generator=self._generator)
        x, y = x.detach().cpu(), y.cpu().long()
        mine = self._smallest(y, keys)
        held = x[mine] if self._x is None else torch.cat((self._x, x[mine]))
        labels, drawn = torch.cat((self._y, y[mine])), torch.cat((self._keys, keys[mine]))
        kept = self._smallest(labels, drawn)
        self._x, self._y, self._keys = held[kept], labels[kept], drawn[kept]
        return self

    def items(self) -> tuple[Tensor, Tensor]:
        """Return all samples and labels, by label.

        Raises
        ------
        QuernelError
            If nothing was added yet.
        """
        if self._x is None:
            raise QuernelError("the buffer is empty; add samples first")
        return self._x, self._y

    def _smallest(self, y: Tensor, keys: Tensor) -> Tensor:
        """Return places of the smallest keys of each class, by label and key."""
        chosen = []
        for label in y.unique().tolist():
            places = (y == label).nonzero().flatten()
            chosen.append(places[keys[places].argsort()[: self.per_class]])
        return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)

    def __repr__(self) -> str:
        """Show sizes."""
        return f"ReplayBuffer(per_class={self.per_class}, samples={len(self)})"


def rows_of(dataset: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return samples and labels of some rows of a map-style dataset of ``(x, y)``."""
    if isinstance(dataset, torch.utils.data.TensorDataset):
        x, y = dataset[rows]
    else:
        x, y = torch.utils.data.default_collate([dataset[i] for i in rows.tolist()])
    return x, y
