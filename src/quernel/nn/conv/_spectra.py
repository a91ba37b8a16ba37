"""``KernelCache``: what layers compute from their parameters, kept while these stay the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from quernel.nn._mixer import Mixer

Value = TypeVar("Value")


class _Held(NamedTuple):
    """A value, what it was asked by, and the tensors it came from with what changes when they do."""

    key: Any
    tensors: list[weakref.ref[Tensor]]
    stamps: list[tuple[int, int]]
    value: Any


class KernelCache:
    """One value a name, for the newest key and state of a layer's parameters.

    Values are kept in eval mode without gradients only: elsewhere, and while torch traces, they are computed anew.  A
    parameter counts as changed when torch's version counter says so; writing through ``parameter.data`` escapes it,
    as it escapes autograd, until the layer's owner calls ``clear``: see ``CachingMixer``.
    """

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def get(self, owner: nn.Module, name: str, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return ``make()``, or what it returned for this key and these parameters before."""
        if owner.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            if owner.training:
                self.clear()
            return make()
        tensors = [*owner.parameters(), *owner.buffers()]
        if any(tensor.is_inference() for tensor in tensors):  # torch counts no versions of these
            return make()
        wanted = key, torch.is_inference_mode_enabled()
        stamps = [(tensor._version, tensor.data_ptr()) for tensor in tensors]
        # One look and one assignment: threads that share the layer see a whole entry or none, and what one of them is
        # computing while the cache is emptied is kept in the dictionary that is gone.
        kept = self._held
        held = kept.get(name)
        if held is None or held.key != wanted or held.stamps != stamps or not _same(held.tensors, tensors):
            held = kept[name] = _Held(wanted, [weakref.ref(tensor) for tensor in tensors], stamps, make())
        value: Value = held.value
        return value

    def clear(self) -> None:
        """Forget all values."""
        self._held = {}

    def __deepcopy__(self, memo: Any) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class CachingMixer(Mixer):
    """Base of mixers that keep what they compute from their parameters, until these may have changed.

    A change of mode (``train()``, ``eval()``), ``load_state_dict`` and a change of dtype or device empty the cache, and
    so does whatever torch's version counters see, such as the step of an optimiser.  What writes through
    ``parameter.data``, as some moving averages of weights do, must call ``eval()`` again.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._cache = KernelCache()

    def train(self, mode: bool = True) -> Self:
        """Set the mode and forget what was kept."""
        self._cache.clear()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._cache.clear()
        super()._load_from_state_dict(*args, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Casts write through .data, and a later tensor may lie where an earlier one did.
        self._cache.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _same(kept: list[weakref.ref[Tensor]], tensors: list[Tensor]) -> bool:
    return all(ref() is tensor for ref, tensor in zip(kept, tensors, strict=True))
