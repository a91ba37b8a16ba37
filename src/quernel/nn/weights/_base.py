"""``StoredWeight``: the storage of a weight, apart from the method that filled it and the layer that uses it.

A subclass holds its buffers or parameters and says how to turn them back into the dense tensor; products
and row look-ups follow from that and are overridden where the format has a faster way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unique_bytes(module: nn.Module) -> int:
    """Bytes that a module really stores: parameters and persistent buffers, shared storage counted once."""
    seen: dict[tuple[int, int, int], int] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            size = tensor.numel() * tensor.element_size()
            # A view of a part is stored as its own elements, so the key holds the extent as well as the place.
            place = id(tensor) if tensor.is_meta else tensor.data_ptr()
            seen[(place, int(tensor.storage_offset()), size)] = size
    return sum(seen.values())


class StoredWeight(nn.Module):
    """Base of all storage formats of a logical weight of shape ``(out, in, *kernel)``.

    Subclasses set ``shape`` and define ``dense``, ``config`` and ``from_config``.
    """

    shape: tuple[int, ...]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """In a function of torch, a stored weight stands for its dense tensor.

        Modules of torch that read ``layer.weight`` of their children (``TransformerEncoderLayer``) look for this
        method and then call the children instead of a fused kernel.
        """

        def decoded(value: Any) -> Any:
            return value.dense() if isinstance(value, StoredWeight) else value

        return func(*map(decoded, args), **{k: decoded(v) for k, v in (kwargs or {}).items()})

    def dense(self) -> Tensor:
        """Return the weight as a plain tensor of shape ``self.shape`` in the format's compute dtype."""
        raise TypeError(f"{type(self).__name__} must define dense()")

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T`` in the dtype of ``x``."""
        return F.linear(x, self.dense().to(x.dtype))

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Return the rows ``W[ids]``."""
        return F.embedding(ids, self.dense())

    @property
    def nbytes(self) -> int:
        """Bytes really stored, each shared storage once."""
        return unique_bytes(self)

    def config(self) -> dict[str, Any]:
        """Return the JSON-able arguments of ``from_config``."""
        raise TypeError(f"{type(self).__name__} must define config()")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return an instance with tensors of the right shapes and dtypes and undefined values."""
        raise TypeError(f"{cls.__name__} must define from_config()")

    def extra_repr(self) -> str:
        """Show shape and bytes."""
        return f"shape={tuple(self.shape)}, nbytes={self.nbytes}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``"bfloat16"`` for ``torch.bfloat16``: how configs spell a dtype."""
    return str(dtype).removeprefix("torch.")
