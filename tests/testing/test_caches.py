"""The suite of caches finds what it is there to find: each broken cache fails the check that its fault belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quernel.cache import WindowCache
from quernel.cache._layer import CacheLayer
from quernel.cache.window import WindowRow
from quernel.testing import ConformanceError, checks_for


def broken(row: type[WindowRow] = WindowRow, layer: dict[str, Any] | None = None, **cache: Any) -> type:
    """Return a registered cache whose rows, layers or methods are other ones."""

    def make_row(self: Any, keys: Tensor, values: Tensor) -> WindowRow:
        return row(keys, values, self.budget, self.sink)

    made = type("Broken", (WindowCache,), {"_make_row": make_row, **cache})

    def make(config: Any) -> Any:
        held = made(config, budget=24, sink=4)
        if layer:
            kind = type("BrokenLayer", (CacheLayer,), layer)
            held.layers = [kind(held._make_row) for _ in held.layers]
        return held

    made._quernel_example = staticmethod(lambda: {"make": make, "exact_to": 24})  # type: ignore[attr-defined]
    return made


class LosesAToken(WindowRow):
    def extend(self, keys: Tensor, values: Tensor) -> None:
        super().extend(keys[:, 1:] if keys.shape[1] > 1 else keys, values[:, 1:] if values.shape[1] > 1 else values)


class StoresTwice(WindowRow):
    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.extend(key, value)
        return super().step(query, key, value, scale)


class IgnoresScale(WindowRow):
    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return super().step(query, key, value, 1.0)


class ChunkSeesNothingBefore(WindowRow):
    def visible(self) -> tuple[Tensor, Tensor]:
        keys, values = super().visible()
        return keys[:, :0], values[:, :0]

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.extend(key, value)
        keys, values = super().visible()
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scale)


class RoundsAway(WindowRow):
    """In float32 nothing is wrong with it, nor while it holds few tokens."""

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = super().step(query, key, value, scale)
        return -out if key.dtype != torch.float32 and self._count > 40 else out


def shares_rows(self: Any, indices: Tensor) -> None:
    self.rows = [self.rows[i] for i in indices.tolist()]


def ignores_padding(self: Any, module: Any, query: Any, key: Any, value: Any, mask: Any, scale: float) -> Tensor:
    return CacheLayer.attend(self, module, query, key, value, None, scale)


def forgets_little(self: Any) -> None:
    self._length = 0


def short_mask(self: Any, query_length: int) -> tuple[int, int]:
    return min(24, self._length) + query_length, 0


def never_asks(self: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    self._asked = False
    return CacheLayer.update(self, key, value)


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (broken(LosesAToken), "exact_where_promised"),
        (broken(StoresTwice), "exact_where_promised"),
        (broken(IgnoresScale), "exact_where_promised"),
        (broken(LosesAToken), "generate"),
        (broken(ChunkSeesNothingBefore), "chunks"),
        (broken(layer={"attend": ignores_padding}), "left_padding"),
        (broken(layer={"attend": ignores_padding}), "generate_with_left_padding"),
        (broken(LosesAToken), "generate_with_left_padding"),
        (broken(layer={"attend": ignores_padding}), "a_row_does_not_see_the_others"),
        (broken(layer={"batch_select_indices": shares_rows}), "beams"),
        (broken(layer={"reset": forgets_little}), "reset"),
        (broken(layer={"get_mask_sizes": short_mask}), "long_contexts"),
        (broken(layer={"update": never_asks}), "attention_is_needed"),
        (broken(layer={"crop": lambda self, n: None}), "refusals"),
        (broken(nbytes=property(lambda self: 0)), "report"),
        (broken(StoresTwice), "low_precision"),
        (broken(RoundsAway), "low_precision_of_long_contexts"),
    ],
)
def test_a_fault_is_found(cls: type, check: str) -> None:
    with pytest.raises(ConformanceError):
        checks_for("cache")[check](cls)


@pytest.mark.parametrize("check", sorted(checks_for("cache")))
def test_the_frame_itself_is_sound(check: str) -> None:
    found: Callable[[type], None] = checks_for("cache")[check]
    found(broken())
