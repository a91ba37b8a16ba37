"""``SparseWeight``: only the nonzeros of a weight, in float32 with 16-bit column indices (arXiv 1911.09723).

Row by row as in CSR: values, columns, and where each row begins. With ``block`` 2 or 4, that many consecutive output
rows share one pattern and one index stands for all their values; rows left over at the end are stored singly.
Bytes: 6 a nonzero (4 + 2 / block in blocks) and 4 a row, against 4 a weight: 90 % zeros take 0.15 to 0.16 of the dense
weight, below a third of zeros nothing is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from quernel._errors import FormatError, QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int, check_type
from quernel.nn._sparse_ops import NO_LIMITS, Sparse, dense_weight, sparse_linear
from quernel.nn._spmm import BLOCKS
from quernel.nn.weights._base import StoredWeight
from quernel.nn.weights.int8 import BLOCK_BYTES, keep_float32

MAX_INPUTS = 2**16  # what 16 bits can number


def row_groups(matrix: Tensor, block: int) -> Iterator[Tensor]:
    """Yield some rows at a time, (groups, block, in), and at the end rows that are left over, (rows, 1, in)."""
    outputs, inputs = matrix.shape
    split = outputs // block * block
    step = block * max(1, BLOCK_BYTES // (4 * block * max(1, inputs)))
    for part, size in ((matrix[:split], block), (matrix[split:], 1)):
        for rows in part.split(step) if len(part) else ():
            yield rows.view(len(rows) // size, size, inputs)


def _example() -> dict[str, Any]:
    dense = torch.linspace(-1, 1, 35).reshape(5, 7).sin()
    return {
        "make": lambda: SparseWeight.from_dense(dense * (torch.arange(35).reshape(5, 7) % 3 == 0), block=2),
        "input": lambda generator: (torch.randn(3, 7, generator=generator),),
    }


@register(
    "fast-sparse-convnets",
    pillar="nn",
    contract="weight",
    paper="1911.09723",
    status="stable",
    headline=False,
    example=_example,
)
class SparseWeight(StoredWeight):
    """The nonzeros of a weight, with their places.

    Parameters
    ----------
    shape : sequence of int
        ``(out, in)``, or ``(out, in, 1, 1)`` of a 1x1 convolution.
    values, indices : int
        How many are stored; equal with ``block=1``.
    block : {1, 2, 4}, default=1
        Consecutive output rows that share a pattern.

    Notes
    -----
    Values stay float32 when a module around them is cast.  Indices are unsigned 16-bit numbers in tensors of int16.

    Examples
    --------
    >>> import torch
    >>> weight = SparseWeight.from_dense(torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
    >>> weight.indices.tolist(), weight.pointers.tolist(), weight.nbytes
    ([1], [0, 1, 1], 18)
    """

    values: Tensor
    indices: Tensor
    pointers: Tensor

    def __init__(self, shape: tuple[int, ...], values: int, indices: int, block: int = 1) -> None:
        super().__init__()
        self.shape = tuple(check_int("shape", size, low=0) for size in shape)
        check_choice("block", block, BLOCKS)
        if len(self.shape) not in (2, 4) or self.shape[2:] not in ((), (1, 1)):
            raise QuernelError(f"shape must be (out, in) or (out, in, 1, 1) for SparseWeight; got {self.shape}")
        if self.shape[1] > MAX_INPUTS:
            raise QuernelError(
                f"weight must have at most {MAX_INPUTS} inputs for 16-bit indices; got shape {self.shape}. "
                "Split the layer along its inputs and add the parts"
            )
        outputs, inputs = self.shape[:2]
        groups, left = outputs // block, outputs % block
        # values = block * shared + single, indices = shared + single
        surplus = check_int("values", values) - check_int("indices", indices)
        shared, rest = divmod(surplus, block - 1) if block > 1 else (indices, surplus)
        if rest or not (0 <= shared <= groups * inputs and 0 <= indices - shared <= left * inputs):
            raise QuernelError(
                f"values={values} and indices={indices} do not fit shape {self.shape} with block={block}"
            )
        self.block = block
        self.register_buffer("values", torch.zeros(values))
        self.register_buffer("indices", torch.zeros(indices, dtype=torch.int16))
        # A valid pattern from the beginning: the first rows hold everything.
        first = (inputs * torch.arange(groups + 1)).clamp_max(shared)
        last = (inputs * torch.arange(1, left + 1)).clamp_max(indices - shared) + shared
        self.register_buffer("pointers", torch.cat([first, last]).to(torch.int32))

    @classmethod
    def from_dense(cls, weight: Tensor, block: int = 1) -> Self:
        """Store the nonzeros of ``weight``, shape (out, in) or (out, in, 1, 1), float32.

        Raises
        ------
        QuernelError
            If ``weight`` is not float32, not finite, of another shape, or has more than 65 536 inputs.
        """
        check_type("weight", weight, Tensor)
        if weight.dtype is not torch.float32:
            raise QuernelError(
                f"weight must be float32, what the sparse kernels compute in; got {weight.dtype}. "
                "Convert the layer with .float() first"
            )
        check_finite("weight", weight)
        cls(tuple(weight.shape), 0, 0, block)  # the shape is checked before any work
        matrix = weight.detach().flatten(1)
        counts = [(rows != 0).any(1).sum(1) for rows in row_groups(matrix, block)]
        pointers = torch.cat([torch.zeros(1, dtype=torch.int64, device=matrix.device), *counts]).cumsum(0)
        indices = int(pointers[-1])
        shared = int(pointers[len(matrix) // block])
        new = cls(tuple(weight.shape), indices + (block - 1) * shared, indices, block).to(weight.device)
        new.pointers = pointers.to(torch.int32)
        value = index = 0
        for rows in row_groups(matrix, block):
            pattern = (rows != 0).any(1)
            columns = pattern.nonzero()[:, 1]
            values = rows.transpose(1, 2)[pattern].flatten()
            new.values[value : value + len(values)] = values
            new.indices[index : index + len(columns)] = torch.where(columns > 0x7FFF, columns - MAX_INPUTS, columns)
            value, index = value + len(values), index + len(columns)
        return new

    @property
    def nonzeros(self) -> int:
        """Stored values; in blocks some of them may be zero."""
        return int(self.values.numel())

    @property
    def sparsity(self) -> float:
        """Share of the weights that are not stored."""
        size = self.shape[0] * self.shape[1]
        return 1.0 - self.nonzeros / size if size else 0.0

    def operands(self) -> Sparse:
        """Return what the ops take."""
        held: Any = self._buffers  # attributes of a module take ten times as long
        outputs, inputs = self.shape[:2]
        return Sparse(held["values"], held["indices"], held["pointers"], outputs, inputs, self.block)

    def dense(self) -> Tensor:
        """Return the weight with its zeros, float32."""
        return dense_weight(*self.operands()).view(self.shape)

    def matmul(self, x: Tensor) -> Tensor:  # x: (..., in) -> (..., out)
        """Return ``x @ W.T`` in the dtype of ``x``, computed in float32."""
        return sparse_linear(x, self.operands(), None, *NO_LIMITS)

    def config(self) -> dict[str, Any]:
        """Return shape, sizes and block."""
        sizes = {"values": self.nonzeros, "indices": int(self.indices.numel())}
        return {"shape": list(self.shape), **sizes, "block": self.block}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty weight from ``config()``."""
        return cls(tuple(config["shape"]), config["values"], config["indices"], config["block"])

    def extra_repr(self) -> str:
        """Show shape, sparsity, block and bytes."""
        return f"shape={self.shape}, sparsity={self.sparsity:.3f}, block={self.block}, nbytes={self.nbytes}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        # The kernels follow these numbers without looking.
        pointers, indices = self.pointers, self.indices
        if pointers.is_meta or indices.is_meta:
            return
        groups, block = self.shape[0] // self.block, self.block
        ends = [int(pointers[0]), int(pointers[-1]), int(pointers[groups]) * (block - 1) + int(pointers[-1])]
        if ends != [0, indices.numel(), self.values.numel()] or bool((pointers.diff() < 0).any()):
            raise FormatError(f"{prefix}pointers: must rise from 0 to {indices.numel()} and fit the values")
        if bool(((indices.int() & 0xFFFF) >= self.shape[1]).any()):
            raise FormatError(f"{prefix}indices: must number the {self.shape[1]} inputs of the weight")
