"""``Int8Weight``: int8 codes with one float32 scale an output channel, a quarter of the bytes of float32.

w_kj ~= scale_k q_kj with scale_k = max_j |w_kj| / 127; codes lie in [-127, 127].
Cost: one rounding pass to make; decoding is a multiply per element.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_finite
from quernel.nn.weights._base import StoredWeight


def _example() -> dict[str, Any]:
    return {
        "make": lambda: Int8Weight.from_dense(torch.linspace(-1, 1, 35).reshape(5, 7)),
        "input": lambda generator: (torch.randn(3, 7, generator=generator),),
    }


@register(
    "weight-int8", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_example
)
class Int8Weight(StoredWeight):
    """A weight in int8, symmetric per output channel.

    Parameters
    ----------
    shape : sequence of int
        ``(out, in, *kernel)``.

    Examples
    --------
    >>> import torch
    >>> weight = Int8Weight.from_dense(torch.tensor([[1.0, -0.5], [0.0, 0.0]]))
    >>> weight.codes.tolist()
    [[127, -64], [0, 0]]
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if len(self.shape) < 2:
            raise QuernelError(f"weight must have at least two dimensions (out, in, ...); got shape {self.shape}")
        self.register_buffer("codes", torch.zeros(self.shape, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(self.shape[0]))

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        """Round ``weight``, shape (out, in, *kernel), to the nearest codes."""
        check_finite("weight", weight)
        new = cls(tuple(weight.shape)).to(weight.device)
        rows = weight.detach().float().reshape(weight.shape[0], -1)
        scale = rows.abs().amax(dim=1) / 127 if rows.shape[1] else torch.zeros(rows.shape[0])
        safe = torch.where(scale > 0, scale, 1.0)
        new.codes = (rows / safe[:, None]).round().clamp(-127, 127).to(torch.int8).reshape(weight.shape)
        new.scale = scale
        return new

    def dense(self) -> Tensor:
        """Return ``scale * codes`` in float32."""
        return self.codes * self.scale.view(-1, *(1,) * (len(self.shape) - 1))

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Decode only the rows of ``ids``."""
        return torch.nn.functional.embedding(ids, self.codes) * self.scale[ids].unsqueeze(-1)

    def config(self) -> dict[str, Any]:
        """Return the shape."""
        return {"shape": list(self.shape)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(tuple(config["shape"]))
