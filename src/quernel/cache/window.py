"""``WindowCache``: the first tokens and the newest ones, nothing between (StreamingLLM's rule, arXiv 2309.17453).

The peer of every cache at the same budget: constant memory, no look at what the text says.  A prompt is read with
full attention and cut afterwards; a later chunk sees what was kept and itself.  Kept keys stay as they were rotated,
at their true positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_int
from quernel.cache._cache import Cache, tokens_in
from quernel.cache._layer import CacheRow, dense_step


def _example() -> dict[str, Any]:
    return {"make": lambda config: WindowCache(config, budget=24, sink=4), "exact_to": 24}


class WindowRow(CacheRow):
    """Sinks, then a ring of the newest tokens: attention does not ask for their order."""

    def __init__(self, keys: Tensor, values: Tensor, budget: int, sink: int) -> None:
        self._budget, self._sink = budget, sink
        self._keys, self._values = keys[:, :0].clone(), values[:, :0].clone()
        self._count = 0

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Store a chunk: what of it will still be there at its end."""
        places = self._count + torch.arange(keys.shape[1], device=keys.device)
        self._count += keys.shape[1]
        kept = (places < self._sink) | (places >= self._count - (self._budget - self._sink))
        slots = self._slots(places[kept])
        if self._held > self._keys.shape[1]:
            room = min(self._budget, max(self._held, 2 * self._keys.shape[1]))
            self._keys, self._values = (_with_room(t, room) for t in (self._keys, self._values))
        self._keys[:, slots], self._values[:, slots] = keys[:, kept], values[:, kept]

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Let the new token take the place of the oldest, then attend."""
        self.extend(key, value)
        return dense_step(query, *self.visible(), scale)

    def visible(self) -> tuple[Tensor, Tensor]:
        """Return what is kept."""
        return self._keys[:, : self._held], self._values[:, : self._held]

    def tensors(self) -> list[Tensor]:
        """Return keys and values."""
        return [self._keys, self._values]

    @property
    def _held(self) -> int:
        return min(self._count, self._budget)

    def _slots(self, places: Tensor) -> Tensor:
        ring = self._sink + (places - self._sink) % (self._budget - self._sink)
        return torch.where(places < self._sink, places, ring)


def _with_room(held: Tensor, room: int) -> Tensor:
    more = held.new_empty(held.shape[0], room - held.shape[1], held.shape[2])
    return torch.cat((held, more), dim=1)


@register("window-cache", pillar="cache", contract="cache", paper="2309.17453", status="stable", example=_example)
class WindowCache(Cache):
    """Keep the first tokens and the newest ones of every sequence.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.
    budget : int, optional
        Tokens kept a sequence, sinks included.
    sink : int, default=4
        First tokens kept for ever; fewer than the budget.
    budget_bytes : int, optional
        Instead of ``budget``: bytes of one sequence, all layers together, in the dtype of the keys that come.

    Raises
    ------
    QuernelError
        If a layer of the model attends to a sliding window, or the budget leaves no room for the newest token.

    References
    ----------
    G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, ICLR 2024.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> WindowCache(LlamaConfig(num_hidden_layers=2), budget=64).report().bytes_stored
    0
    """

    def __init__(self, config: Any, budget: int | None = None, sink: int = 4, budget_bytes: int | None = None) -> None:
        self.budget, self._bytes = tokens_in(config, budget, budget_bytes), budget_bytes
        self.sink = check_int("sink", sink, low=0)
        self._check_sink()
        super().__init__(config)

    def _check_sink(self) -> None:
        if self.sink >= self.budget:
            raise QuernelError(f"sink must be smaller than the budget of {self.budget} tokens; got {self.sink}")

    def _make_row(self, keys: Tensor, values: Tensor) -> CacheRow:
        if self._bytes is not None:
            self.budget = tokens_in(self.config, None, self._bytes, keys.dtype)
            self._check_sink()
        return WindowRow(keys, values, self.budget, self.sink)
