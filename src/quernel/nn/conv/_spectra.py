"""``KernelCache``: what layers compute from their parameters, kept while these stay the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class KernelCache:
    """One value a name, for the newest key and state of a layer's parameters.

    Values are kept in eval mode without gradients only: elsewhere, and while torch traces, they are computed anew.  A
    parameter counts as changed when torch's version counter says so; writing through ``parameter.data`` escapes it,
    as it escapes autograd; a call of ``train()`` with a forward pass empties the cache.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[Any, Any]] = {}

    def get(self, owner: nn.Module, name: str, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return ``make()``, or what it returned for this key and these parameters before."""
        if owner.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            if owner.training:
                self._held.clear()
            return make()
        stamps = [_stamp(tensor) for tensor in (*owner.parameters(), *owner.buffers())]
        if any(stamp is None for stamp in stamps):
            return make()
        wanted = key, torch.is_inference_mode_enabled(), stamps
        # One look and one assignment: threads that share the layer see a whole entry or none.
        held = self._held.get(name)
        if held is None or held[0] != wanted:
            held = self._held[name] = wanted, make()
        value: Value = held[1]
        return value

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def _stamp(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return what changes with a tensor, None where torch counts no versions."""
    return None if tensor.is_inference() else (id(tensor), tensor._version, tensor.data_ptr())
