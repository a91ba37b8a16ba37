"""Custom ops of ``SketchLayer``: ``quernel::sketch_sums`` (rows to answers) and ``quernel::sketch_places`` (to places).

Both take the arguments of ``Cells`` apart, since an op takes tensors and numbers; the hashes themselves are made from
the seed once and shared. Elsewhere than on the CPU the rows travel there and the answers back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.hashing._fused_cells import Projection
from quernel.kernels._sketched_machine import Cells, Predictor, cells_of

_CELLS = "str kernel, int dim, int n_rows, int n_concat, int n_cells, float width, str directions, int seed"


def sketch_sums(x: Tensor, projection: Tensor, shift: Tensor, table: Tensor, scale: Tensor, cells: Cells) -> Tensor:
    """Return sum_l scale_l table[l, H_l(A x + s)]; x: (..., d) of any float, table: (L, R, C) -> (..., C) float32.

    No gradient passes: towards x it is zero almost everywhere, and a table that trains is read by ``look_up``.
    """
    held = (t.detach() for t in (x, projection, shift, table, scale))
    out: Tensor = _sums_op(*held, *_spread(cells))
    return out


def sketch_places(x: Tensor, projection: Tensor, shift: Tensor, cells: Cells) -> Tensor:
    """Return the places of rows in the flat table; x: (..., d) -> (..., L) int64."""
    out: Tensor = _places_op(x.detach(), projection, shift, *_spread(cells))
    return out


def _spread(cells: Cells) -> tuple[str, int, int, int, int, float, str, int]:
    return (
        cells.kernel,
        cells.dim,
        cells.n_rows,
        cells.n_concat,
        cells.n_cells or 0,
        cells.width,
        cells.directions,
        cells.seed,
    )


def _gathered(
    kernel: str, dim: int, n_rows: int, n_concat: int, n_cells: int, width: float, directions: str, seed: int
) -> Cells:
    return Cells(kernel, dim, n_rows, n_concat, n_cells or None, width, directions, seed)


def _rows(x: Tensor, projection: Tensor) -> Tensor:
    """Return x as rows (n, d) float32 on the CPU."""
    if not x.ndim or x.shape[-1] != projection.shape[1] or not x.is_floating_point():
        raise QuernelError(
            f"x must be floating point of shape (..., {projection.shape[1]}); got {x.dtype} of shape {tuple(x.shape)}"
        )
    return x.detach().reshape(-1, x.shape[-1]).to(device="cpu", dtype=torch.float32).contiguous()


def as_numpy(tensor: Tensor) -> Any:
    """Return a tensor as an array of float32, or of its integers."""
    plain = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return plain.cpu().contiguous().numpy()


def _compute_sums(
    x: Tensor, projection: Tensor, shift: Tensor, table: Tensor, scale: Tensor,
    kernel: str, dim: int, n_rows: int, n_concat: int, n_cells: int, width: float, directions: str, seed: int,
) -> Tensor:  # fmt: skip
    cells = _gathered(kernel, dim, n_rows, n_concat, n_cells, width, directions, seed)
    nothing = np.zeros(table.shape[2], np.float32)
    predict = Predictor(cells, as_numpy(projection), as_numpy(shift), as_numpy(table), as_numpy(scale), nothing)
    sums = predict(_rows(x, projection).numpy())
    return torch.from_numpy(sums).reshape(*x.shape[:-1], table.shape[2]).to(x.device)


def _compute_places(
    x: Tensor, projection: Tensor, shift: Tensor,
    kernel: str, dim: int, n_rows: int, n_concat: int, n_cells: int, width: float, directions: str, seed: int,
) -> Tensor:  # fmt: skip
    cells = _gathered(kernel, dim, n_rows, n_concat, n_cells, width, directions, seed)
    places = cells_of(_rows(x, projection), Projection.of(as_numpy(projection), as_numpy(shift)), cells)
    return places.reshape(*x.shape[:-1], n_rows).to(x.device)


_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    f"sketch_sums(Tensor x, Tensor projection, Tensor shift, Tensor table, Tensor scale, {_CELLS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"sketch_places(Tensor x, Tensor projection, Tensor shift, {_CELLS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)
for _device in ("CPU", "CUDA"):
    _library.impl("sketch_sums", _compute_sums, _device)
    _library.impl("sketch_places", _compute_places, _device)
_sums_op = torch.ops.quernel.sketch_sums.default
_places_op = torch.ops.quernel.sketch_places.default


@torch.library.register_fake("quernel::sketch_sums", lib=_library)
def _fake_sums(x: Tensor, projection: Tensor, shift: Tensor, table: Tensor, scale: Tensor, *cells: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], table.shape[2]), dtype=torch.float32)


@torch.library.register_fake("quernel::sketch_places", lib=_library)
def _fake_places(
    x: Tensor, projection: Tensor, shift: Tensor,
    kernel: str, dim: int, n_rows: int, n_concat: int, n_cells: int, width: float, directions: str, seed: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], n_rows), dtype=torch.int64)


def _warmup() -> None:
    """Compile the kernels of every stored dtype; ``quernel warmup`` calls it."""
    cells = Cells("l2", 1, 1, 1, 2, 1.0, "gaussian", 0)
    for dtype in (torch.float32, torch.int16, torch.int8):
        one = torch.ones(1, 1)
        sketch_sums(one, one, torch.ones(1), torch.ones(1, 2, 1, dtype=dtype), torch.ones(1), cells)
