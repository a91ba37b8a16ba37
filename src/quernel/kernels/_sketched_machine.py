"""From a kernel machine to a table of counts: sum_i alpha_i k(A x, z_i)^K = E sum_l T[l, H_l(A x)] + c.

Anchors are counted into L rows of R cells with their weights. The correction for chance collisions, the mean over the
rows and the machine's intercept are all linear, so they are multiplied into the table once: an answer is L look-ups
and a constant. ``tune_table`` then trains the table itself, hashes fixed, like an embedding bag; ``round_table``
stores it in 8 or 16 bits with one scale a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.hashing._cell_kernels import scatter
from quernel.hashing._fused_cells import FusedCells, Projection, Rows, fused_cells, plain
from quernel.kernels._machine_training import Loss, Machine, Settings, loss_of

Bits = Literal[32, 16, 8]
STORED = {32: torch.float32, 16: torch.int16, 8: torch.int8}
_ROWS = 4096


@dataclass(frozen=True)
class Cells:
    """Which hashes a table is indexed by: everything that a seed can bring back; checked on construction.

    Attributes
    ----------
    kernel, width, n_concat
        As in ``LSHKernel``, vectors only.
    dim : int
        Coordinates p of what is hashed.
    n_rows : int
    n_cells : int or None
        None packs bits, for "angular".
    directions : {"gaussian", "rademacher", "sparse"}
    seed : int
    """

    kernel: str
    dim: int
    n_rows: int
    n_concat: int
    n_cells: int | None
    width: float
    directions: str
    seed: int

    def __post_init__(self) -> None:
        check_choice("kernel", self.kernel, ("l2", "l1", "angular"))
        check_int("n_rows", self.n_rows, low=1, high=2**20)
        check_int("n_concat", self.n_concat, low=1)
        check_choice("directions", self.directions, ("gaussian", "rademacher", "sparse"))
        if self.n_cells is not None:
            check_int("n_cells", self.n_cells, low=2, high=2**20)
        elif self.kernel != "angular" or self.n_concat > 20:
            raise QuernelError('n_cells may be None for kernel="angular" with n_concat <= 20 only')
        check_float("width", self.width, low=0.0, open_low=True)
        check_int("seed", self.seed, low=0, high=2**63 - 1)

    @classmethod
    def of(cls, settings: Settings, n_rows: int, n_cells: int | None, directions: str, seed: int) -> Cells:
        """Return the hashes whose kernel a machine with these settings has."""
        return cls(
            settings.kernel,
            settings.proj_dim,
            n_rows,
            settings.n_concat,
            n_cells,
            settings.width,
            "gaussian" if settings.kernel == "l1" else directions,
            seed,
        )

    @property
    def n_codes(self) -> int:
        """Cells of a row."""
        return 2**self.n_concat if self.n_cells is None else self.n_cells

    @property
    def fused(self) -> FusedCells:
        """The prepared hashes; equal ones share their arrays."""
        return fused_cells(
            self.kernel, self.dim, self.n_rows, self.n_concat, self.n_cells, self.width, self.directions, self.seed
        )


class Table(NamedTuple):
    """What is looked up: numbers (L, R, C) float32, and the constant (C,)."""

    values: Tensor
    intercept: Tensor


def sketch_machine(machine: Machine, cells: Cells) -> Table:
    """Count the anchors of a machine, and fold correction, mean and intercept in."""
    weights = machine.weights.double().numpy()
    counts = np.zeros((cells.n_rows, cells.n_codes, weights.shape[1]))
    scatter(cells.fused.cells(machine.anchors.float().contiguous().numpy()), weights, counts)
    intercept = machine.intercept.double().numpy()
    counts /= cells.n_rows
    if cells.n_cells is not None:
        counts *= cells.n_cells / (cells.n_cells - 1)
        intercept = intercept - weights.sum(0) / (cells.n_cells - 1)
    return Table(torch.from_numpy(counts).float(), torch.from_numpy(intercept).float())


def cells_of(x: Tensor, before: Projection, cells: Cells) -> Tensor:
    """Return places (n, L) int64 of rows in the table laid out flat: row l begins at l R."""
    codes = cells.fused.cells(x.detach().float().contiguous().numpy(), before)
    return torch.from_numpy(codes.astype(np.int64) + np.arange(cells.n_rows) * cells.n_codes)


def look_up(places: Tensor, table: Tensor, intercept: Tensor) -> Tensor:  # (n, L), (L, R, C) -> (n, C)
    """Return the sums of what the places hold; differentiable in the table."""
    return F.embedding_bag(places, table.flatten(0, 1), mode="sum") + intercept


def tune_table(
    table: Table,
    x: Tensor,
    y: Tensor,
    before: Projection,
    cells: Cells,
    draw: np.random.Generator,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    loss: Loss = "squared",
) -> Table:
    """Train the table with fixed hashes.

    Parameters
    ----------
    table : Table
    x, y : Tensor
        Rows (n, d), and numbers (n, C) or labels (n,).
    before, cells
        How rows become places: computed once.
    draw : numpy Generator
        For the order of the rows.
    epochs, batch_size : int
    learning_rate : float
        How far an answer may move in a step, in standard deviations of the targets; falls to 0 by a cosine.
    """
    if not epochs or not len(x):
        return table
    places = torch.cat([cells_of(rows, before, cells).int() for rows in x.split(_ROWS)])
    spread = y.float().std(0, correction=0).clamp_min(1e-12) if loss == "squared" else torch.ones(())
    values = (table.values / spread).contiguous().requires_grad_()
    intercept = (table.intercept / spread).requires_grad_()
    targets = (y.float() / spread) if loss == "squared" else y
    # All L cells of a row move together, so that a step of a cell is an L-th of that of an answer.
    rates = (learning_rate / cells.n_rows, learning_rate)
    optimizer = torch.optim.Adam([{"params": [values]}, {"params": [intercept]}], lr=learning_rate, fused=True)
    steps, step = epochs * -(-len(x) // batch_size), 0
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.from_numpy(draw.permutation(len(x))).split(batch_size):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                loss_of(look_up(places[chosen].long(), values, intercept), targets[chosen], loss).backward()
                optimizer.step()
                step += 1
    return Table(values.detach() * spread, intercept.detach() * spread)


def round_table(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the numbers (L, R, C) in 8 or 16 bits, and the scale of each row (L,) float32."""
    largest = 2 ** (bits - 1) - 1
    scale = values.abs().amax((1, 2)) / largest
    scale = scale.masked_fill(scale == 0, 1.0)
    return (values / scale[:, None, None]).round().clamp(-largest, largest).to(STORED[bits]), scale


class Predictor:
    """Answers for NumPy rows by one call of one compiled function: microseconds for a single row.

    Parameters
    ----------
    cells : Cells
    projection, shift : array, shapes (p, d) and (p,)
    table : array, shape (L, R, C), float32, int16 or int8
    scale : array, shape (L,), float32
        What the numbers of each row of the table are multiplied by.
    intercept : array, shape (C,), float32
    """

    def __init__(self, cells: Cells, projection: Rows, shift: Rows, table: Any, scale: Rows, intercept: Rows) -> None:
        self._fused, self._before = cells.fused, Projection.of(projection, shift)
        self._table, self._scale = plain(table), plain(scale)
        self._intercept = np.asarray(intercept, dtype=np.float32)

    def __call__(self, X: ArrayLike) -> Rows:
        """Return the answers for rows (n, d), shape (n, C), float32."""
        rows = np.asarray(X, dtype=np.float32)
        sums: Rows = self._fused.sums(rows, self._table, self._scale, before=self._before)[:, 0]
        sums += self._intercept
        return sums
