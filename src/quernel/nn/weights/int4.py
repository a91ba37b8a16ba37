"""4-bit storage: ``Int4GroupWeight`` (integer scale and zero point a group) and ``Int4TableWeight`` (a byte a code).

W[o, k] = scale[o] * W8[o, k] with an int8 matrix W8 that is never stored: it is ``group_scale * (code - group_zero)``
or ``table[code]``.  Products quantise the rows of x to int8 and run in integers.
Bytes: half a byte a weight, 4 an output, and 2 a group (DGQ's form, arXiv 2310.04836).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite
from quernel.nn._int4_packing import CHUNK, GROUP_SIZES, ROWS, pack, packed_shape, unpack, unpack_rows
from quernel.nn.functional.dual_grained import LEVELS, DGQWeight, auto_group_size, dgq_search
from quernel.nn.functional.int4 import apply_int4_linear, expand_int4
from quernel.nn.weights._base import StoredWeight
from quernel.nn.weights.int8 import keep_float32

# Rows whose products are checked at a time, in 12 bytes a weight.
_CHECKED_ROWS = 256
W = TypeVar("W", bound="Int4Weight")


class Int4Weight(StoredWeight):
    """What both forms share; ``shape`` may be that of a convolution, whose kernel counts as inputs."""

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise QuernelError(f"shape must be (out, in, ...) with sizes of at least 1; got {self.shape}")
        self.columns = math.prod(self.shape[1:])
        self.register_buffer("codes", torch.zeros(packed_shape(self.shape[0], self.columns), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(self.shape[0]))

    @property
    def bits_per_weight(self) -> float:
        """Bits stored, scales and padding included, a weight."""
        return 8 * self.nbytes / math.prod(self.shape)

    def unpack(self) -> Tensor:
        """Return the codes, shape (out, in * kernel), uint8 in 0..15."""
        return unpack(self.codes, self.shape[0], self.columns)

    def unpack_int8(self) -> Tensor:
        """Return the integer weight, shape (out, in * kernel), int8."""
        return expand_int4(*self._packed(), self.shape[0], self.columns)

    def dense(self) -> Tensor:
        """Return the weight in float32."""
        return (self.unpack_int8() * self.scale[:, None]).view(self.shape)

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T`` in the dtype of ``x``, with the rows of ``x`` rounded to int8."""
        return self.linear(x, None)

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None,
        *,
        inverse: Tensor | None = None,
        levels: int = LEVELS,
        alpha: float | None = None,
        activation: str | None = None,
    ) -> Tensor:  # x: (..., in) -> (..., out)
        """Return the whole layer as one operation; options as ``apply_int4_linear`` takes them."""
        if x.shape[-1:] != (self.columns,):  # codes are padded to whole chunks, so the product cannot tell
            raise QuernelError(f"x must be of shape (..., {self.columns}) to fit {self.shape}; got {tuple(x.shape)}")
        # Read as attributes of a module, the tensors would cost a decoded token several us.
        held: Any = self._buffers
        group_scale, group_zero, table = held.get("group_scale"), held.get("group_zero"), held.get("table")
        weight = (held["codes"], held["scale"], group_scale, group_zero, table)
        return apply_int4_linear(x, *weight, bias, inverse, levels, alpha, activation)

    def rows(self, ids: Tensor) -> Tensor:  # ids: any shape -> (*ids.shape, in)
        """Decode only the rows of ``ids``."""
        flat = ids.reshape(-1)
        q = unpack_rows(self.codes[flat // ROWS, :, flat % ROWS], self.columns)
        return (self._decode(q, flat) * self.scale[flat].unsqueeze(-1)).view(*ids.shape, *self.shape[1:])

    def _packed(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        raise TypeError(f"{type(self).__name__} must define _packed(): codes, group scales, group zeros, table")

    def _decode(self, q: Tensor, rows: Tensor) -> Tensor:  # q: (n, columns) codes of ``rows`` -> int8
        raise TypeError(f"{type(self).__name__} must define _decode()")

    def config(self) -> dict[str, Any]:
        """Return the shape."""
        return {"shape": list(self.shape)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]


def _group_example() -> dict[str, Any]:
    def make() -> Int4GroupWeight:
        codes = (torch.arange(5 * 70) * 7 % 16).to(torch.uint8).view(5, 70)
        scales = (torch.arange(15) % 7 + 1).to(torch.int8).view(5, 3)
        return Int4GroupWeight.from_codes(codes, torch.linspace(0.1, 1, 5), scales, torch.full((5, 3), 8), 32)

    return {"make": make, "input": lambda generator: (torch.randn(3, 70, generator=generator),)}


@register("dgq", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_group_example)
class Int4GroupWeight(Int4Weight):
    """A weight in 4-bit codes with an integer scale and zero point a group of inputs: ``s1 * s2 * (q - z)``.

    Parameters
    ----------
    shape : sequence of int
        ``(out, in, *kernel)``.
    group_size : {32, 64, 128}, default=128
        Inputs of a row that share a scale; the last group of a row may be shorter.

    Notes
    -----
    ``group_scale`` (int8) and ``group_zero`` (uint8) have rows in blocks of 4 and columns for whole 128 inputs, as the
    kernels read them; padding is scale 1, zero 0.  ``scale`` stays float32 when a module around it is cast.

    Examples
    --------
    >>> import torch
    >>> weight = Int4GroupWeight.from_codes(torch.tensor([[0, 15]], dtype=torch.uint8), torch.tensor([0.5]),
    ...                                     torch.tensor([[2]]), torch.tensor([[8]]), group_size=32)
    >>> weight.dense().tolist()
    [[-8.0, 7.0]]
    """

    group_scale: Tensor
    group_zero: Tensor

    def __init__(self, shape: Sequence[int], group_size: int = 128) -> None:
        super().__init__(shape)
        self.group_size = check_choice("group_size", group_size, GROUP_SIZES)
        padded = (self.codes.shape[0] * ROWS, self.codes.shape[1] * CHUNK // group_size)
        self.register_buffer("group_scale", torch.ones(padded, dtype=torch.int8))
        self.register_buffer("group_zero", torch.zeros(padded, dtype=torch.uint8))

    @property
    def groups(self) -> int:
        """Groups of a row that hold weights."""
        return -(-self.columns // self.group_size)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        group_scale: Tensor,
        group_zero: Tensor,
        group_size: int = 128,
        shape: Sequence[int] | None = None,
    ) -> Self:
        """Store given codes.

        Parameters
        ----------
        codes : Tensor, shape (out, in), uint8 in 0..15
        scale : Tensor, shape (out,)
        group_scale, group_zero : Tensor, shape (out, groups), integers
            1 to 127, and 0 to 15; ``groups`` is ``ceil(in / group_size)``.
        group_size : {32, 64, 128}
        shape : sequence of int, optional
            Logical shape of a convolution's weight; its kernel is flattened into ``in``.

        Raises
        ------
        QuernelError
            If shapes do not fit, numbers leave their range, or a product leaves [-127, 127].
        """
        new = cls(tuple(codes.shape) if shape is None else shape, group_size).to(codes.device)
        size = (new.shape[0], new.groups)
        for name, part, low, high in (("group_scale", group_scale, 1, LEVELS), ("group_zero", group_zero, 0, 15)):
            if tuple(part.shape) != size or part.is_floating_point():
                raise QuernelError(f"{name} must hold integers of shape {size}; got {part.dtype} {tuple(part.shape)}")
            if int(part.min()) < low or int(part.max()) > high:
                raise QuernelError(f"{name} must lie in {low}..{high}; got {int(part.min())}..{int(part.max())}")
        _fill(new, codes, scale)
        new.group_scale[: size[0], : size[1]] = group_scale.to(torch.int8)
        new.group_zero[: size[0], : size[1]] = group_zero.to(torch.uint8)
        columns = torch.arange(new.columns, device=codes.device) // group_size
        largest = 0
        for q, scales, zeros in zip(
            *(part.split(_CHECKED_ROWS) for part in (codes, group_scale, group_zero)), strict=True
        ):
            products = scales.int()[:, columns] * (q.int() - zeros.int()[:, columns])
            largest = max(largest, int(products.abs().max()))
        if largest > LEVELS:
            raise QuernelError(
                f"group_scale * (code - group_zero) must stay in -127..127; got a magnitude of {largest}"
            )
        return new

    @classmethod
    def from_dense(cls, weight: Tensor, group_size: int | Literal["auto"] = "auto") -> Self:
        """Store ``weight``, shape (out, in, *kernel), with the scales of ``dgq_search`` for its own error.

        Parameters
        ----------
        weight : Tensor
        group_size : {"auto", 32, 64, 128}, default="auto"
            "auto" is 32 below 1024 inputs, else 128.

        Raises
        ------
        QuernelError
            If ``weight`` holds NaN or infinity, or has fewer than two dimensions.
        """
        if weight.ndim < 2:
            raise QuernelError(f"weight must have at least two dimensions (out, in, ...); got {tuple(weight.shape)}")
        rows = weight.detach().flatten(1)
        size = auto_group_size(rows.shape[1]) if group_size == "auto" else group_size
        return cls.from_search(dgq_search(rows, None, size), tuple(weight.shape))

    @classmethod
    def from_search(cls, found: DGQWeight, shape: Sequence[int] | None = None) -> Self:
        """Store what ``dgq_search`` found; ``shape`` as in ``from_codes``."""
        return cls.from_codes(found.q, found.s1, found.S2, found.z, found.group_size, shape)

    def _packed(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.codes, self.group_scale, self.group_zero, None

    def _decode(self, q: Tensor, rows: Tensor) -> Tensor:
        columns = torch.arange(self.columns, device=q.device) // self.group_size
        scales, zeros = self.group_scale[rows], self.group_zero[rows]
        return scales[:, columns] * (q.to(torch.int8) - zeros[:, columns].to(torch.int8))

    def config(self) -> dict[str, Any]:
        """Return shape and group size."""
        return {**super().config(), "group_size": self.group_size}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(config["shape"], config["group_size"])

    def extra_repr(self) -> str:
        """Show shape, group size and bits."""
        return f"shape={self.shape}, group_size={self.group_size}, bits_per_weight={self.bits_per_weight:.2f}"


def _table_example() -> dict[str, Any]:
    def make() -> Int4TableWeight:
        codes = (torch.arange(5 * 70) * 7 % 16).to(torch.uint8).view(5, 70)
        return Int4TableWeight.from_codes(codes, torch.linspace(0.1, 1, 5), list(range(-64, 64, 8)))

    return {"make": make, "input": lambda generator: (torch.randn(3, 70, generator=generator),)}


@register(
    "shiftaddvit", pillar="nn", contract="weight", paper=None, status="stable", headline=False, example=_table_example
)
class Int4TableWeight(Int4Weight):
    """A weight in 4-bit codes that name one of 16 integers: ``scale * table[code]``.

    Parameters
    ----------
    shape : sequence of int
        ``(out, in, *kernel)``.
    table : sequence of 16 int
        Value of each code, in -127..127; part of the configuration, not of the stored tensors.

    Examples
    --------
    >>> import torch
    >>> powers = [0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64]
    >>> weight = Int4TableWeight.from_codes(torch.tensor([[7, 9]], dtype=torch.uint8), torch.tensor([0.5]), powers)
    >>> weight.dense().tolist()
    [[32.0, -0.5]]
    """

    table: Tensor

    def __init__(self, shape: Sequence[int], table: Sequence[int]) -> None:
        super().__init__(shape)
        values = [int(value) for value in table]
        if len(values) != 16 or max(map(abs, values)) > LEVELS:
            raise QuernelError(f"table must hold 16 integers in -127..127; got {values}")
        self.register_buffer("table", torch.tensor(values, dtype=torch.int8, device="cpu"), persistent=False)
        self._values = values

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, table: Sequence[int], shape: Sequence[int] | None = None) -> Self:
        """Store ``codes``, shape (out, in), uint8 in 0..15, with ``scale``, shape (out,)."""
        return _fill(cls(tuple(codes.shape) if shape is None else shape, table).to(codes.device), codes, scale)

    def _packed(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.codes, None, None, self.table

    def _decode(self, q: Tensor, rows: Tensor) -> Tensor:
        return self.table[q.int()]

    def config(self) -> dict[str, Any]:
        """Return shape and table."""
        return {**super().config(), "table": self._values}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(config["shape"], config["table"])

    def extra_repr(self) -> str:
        """Show shape and bits."""
        return f"shape={self.shape}, bits_per_weight={self.bits_per_weight:.2f}"


def _fill(weight: W, codes: Tensor, scale: Tensor) -> W:
    """Pack ``codes`` and copy ``scale`` into a new weight."""
    wanted = (weight.shape[0], weight.columns)
    if tuple(codes.shape) != wanted:
        raise QuernelError(
            f"codes must have shape {wanted} to fit the weight's {weight.shape}; got {tuple(codes.shape)}"
        )
    if tuple(scale.shape) != wanted[:1]:
        raise QuernelError(f"scale must have shape {wanted[:1]}; got {tuple(scale.shape)}")
    check_finite("scale", scale)
    weight.codes = pack(codes)
    weight.scale = scale.detach().float().clone()
    return weight
