"""``Int8Weight``: int8 codes with one float32 scale an output channel, a quarter of the bytes of float32.

w_kj ~= scale_k q_kj with scale_k = max_j |w_kj| / 127; codes lie in [-127, 127].
Products decode a block of rows at a time, small enough to stay in the cache, and scale afterwards; few rows
in bfloat16 take torch's GEMV, which reads the codes themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_finite
from quernel.nn.weights._base import StoredWeight

# Bytes of codes decoded at a time. One piece of a 4096 x 4096 weight took 20 to 40 ms, its blocks 3 to 6 ms:
# large temporaries go back to the system and fault in again. Smaller blocks lose to the cost of their calls.
BLOCK_BYTES = 2**21
# Up to here torch's GEMV over int8 beats decoding; measured equal at 16 rows, 1.5x slower at 32.
GEMV_ROWS = 16


def keep_float32(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let ``Module.to`` move constants but not round them: scales in bfloat16 would err by 0.2 %."""

    def kept(tensor: Tensor) -> Tensor:
        moved = apply(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return kept


def _example() -> dict[str, Any]:
    return {
        "make": lambda: Int8Weight.from_dense(torch.linspace(-1, 1, 35).reshape(5, 7)),
        "input": lambda generator: (torch.randn(3, 7, generator=generator),),
    }


@register("weight-int8", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_example)
class Int8Weight(StoredWeight):
    """A weight in int8, symmetric per output channel.

    Parameters
    ----------
    shape : sequence of int
        ``(out, in, *kernel)``.

    Notes
    -----
    The scales stay float32 when a module around them is cast.

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
        self.register_buffer("scale", torch.zeros(self.shape[0], dtype=torch.float32))

    @classmethod
    def from_dense(cls, weight: Tensor) -> Self:
        """Round ``weight``, shape (out, in, *kernel), to the nearest codes.

        Raises
        ------
        QuernelError
            If ``weight`` holds NaN or infinity, or has fewer than two dimensions.
        """
        check_finite("weight", weight)
        new = cls(tuple(weight.shape)).to(weight.device)
        whole = weight.detach().flatten(1)
        # A block of rows at a time: rounding a whole layer at once would need several copies of it.
        block = max(1, BLOCK_BYTES // (4 * max(1, whole.shape[1])))
        for rows, codes, scale in zip(
            *(part.split(block) for part in (whole, new.codes.flatten(1), new.scale)), strict=True
        ):
            values = rows.float()
            if values.shape[1]:
                scale.copy_(values.abs().amax(dim=1) / 127)
            codes.copy_(values.div(torch.where(scale > 0, scale, 1.0)[:, None]).round_().clamp_(-127, 127))
        return new

    def dense(self) -> Tensor:
        """Return ``scale * codes`` in float32."""
        return self.codes * self.scale.view(-1, *(1,) * (len(self.shape) - 1))

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T`` in the dtype of ``x``; the scale is rounded to that dtype."""
        if x.dtype == torch.float16:
            return super().matmul(x)  # unscaled sums would leave the range of float16
        if self._gemv_fits(x):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            return torch._weight_int8pack_mm(rows, self.codes, self.scale.to(x.dtype)).view(*x.shape[:-1], -1)
        block = max(1, BLOCK_BYTES // (x.element_size() * max(1, self.shape[1])))
        parts = [F.linear(x, codes.to(x.dtype)) for codes in self.codes.split(block)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return y * self.scale.to(x.dtype)

    def _gemv_fits(self, x: Tensor) -> bool:
        """Whether torch's kernel may run: its vector loads are aligned, have no tail and no gradient."""
        return (
            x.dtype == torch.bfloat16
            and type(x) is Tensor
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not (x.requires_grad and torch.is_grad_enabled())
            and 0 < x.numel() <= GEMV_ROWS * self.shape[1]
            and x.shape[-1] == self.shape[1]
            and self.shape[1] % 16 == 0
            and x.data_ptr() % 32 == 0
            and self.codes.data_ptr() % 16 == 0
            and self.codes.is_contiguous()
        )

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Decode only the rows of ``ids``."""
        return F.embedding(ids, self.codes) * self.scale[ids].unsqueeze(-1)

    def config(self) -> dict[str, Any]:
        """Return the shape."""
        return {"shape": list(self.shape)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(tuple(config["shape"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]
