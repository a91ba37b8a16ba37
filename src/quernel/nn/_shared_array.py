"""``SharedArray``: one trainable vector that many layers read, each through its own hashed map.

The layers hold the array as a submodule, so optimisers, copies and files see one parameter however many read it; a
map is a pure function of a seed that the layer derives from the array's with ``derived_seed``. Nothing but the
numbers, the maps' sizes and that seed is stored.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.hashing.mixers import as_u64, mix64
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES


class SharedArray(nn.Module):
    """A vector of ``size`` trainable numbers, drawn uniformly from (-bound, bound).

    Parameters
    ----------
    size : int
        Numbers m.
    seed : int, default=0
        From which the maps of all readers derive theirs; any 64-bit integer.
    bound : float, default=1.0
        Of the initial values.
    device, dtype : optional
        As in ``torch.nn.Linear``.
    generator : torch.Generator, optional
        For the initial values; default is torch's own.

    Examples
    --------
    >>> memory = SharedArray(1000, seed=7, bound=0.1)
    >>> memory.values.shape, memory.derived_seed(0) != memory.derived_seed(1)
    (torch.Size([1000]), True)
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        bound: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.size = check_int("size", size, low=1)
        self.seed = check_int("seed", seed)
        as_u64("seed", self.seed)
        self.bound = check_float("bound", bound, low=0.0)
        #: Maps handed out by ``next_seed``; part of the description, so that a loaded array goes on counting.
        self.readers = 0
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_choice("dtype", dtype, tuple(DTYPES.values()))
        self.values = nn.Parameter(torch.empty(self.size, device=device, dtype=dtype))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values."""
        if not self.values.is_meta:
            self.values.uniform_(-self.bound, self.bound, generator=generator)

    @property
    def std(self) -> float:
        """Standard deviation of the initial values."""
        return self.bound / 3**0.5

    def derived_seed(self, *keys: int) -> int:
        """Return the seed of one reader's map, from the array's seed and what tells the reader apart."""
        return int(mix64(self.seed, *keys))

    def next_seed(self) -> int:
        """Return a seed that no reader has had: equal layers on one array must not have equal weights."""
        self.readers += 1
        return self.derived_seed(0, self.readers)

    def forward(self) -> Tensor:
        """Return the array itself, shape (size,)."""
        return self.values

    def config(self) -> dict[str, Any]:
        """Return size, seed, bound, count of readers and dtype."""
        held = {"size": self.size, "seed": self.seed, "bound": self.bound, "readers": self.readers}
        return held | {"dtype": dtype_name(self.values.dtype)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an array of zeros from ``config()``; a loader fills it."""
        dtype = DTYPES[check_choice("dtype", config["dtype"], tuple(DTYPES))]
        new = cls(config["size"], seed=config["seed"], bound=config["bound"], dtype=dtype, device="meta")
        new.values = nn.Parameter(torch.zeros(new.size, dtype=dtype))
        new.readers = check_int("readers", config["readers"], low=0)
        return new

    def extra_repr(self) -> str:
        """Show size and seed."""
        return f"size={self.size}, seed={self.seed}"


def check_memory(memory: Any, least: int, why: str) -> SharedArray:
    """Return ``memory`` if it is a SharedArray of at least ``least`` numbers; ``why`` says what needs them."""
    if not isinstance(memory, SharedArray):
        raise QuernelError(f"memory must be a SharedArray; got {type(memory).__name__}")
    if memory.size < least:
        raise QuernelError(f"memory must hold at least {least} numbers, {why}; it holds {memory.size}")
    return memory
