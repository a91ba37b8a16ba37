"""``SketchLayer``: a small network as sums of table look-ups, y = sum_l T[l, H_l(A x + s)] + b (arXiv 2106.11426).

A (p x d) is a short projection, H_l mixes K hashes of the p numbers into one of R cells; hashes come from the seed and
are not stored. Cost a row: p d + p L K multiply-adds and L C additions, independent of what the network was. Bytes:
L R C numbers of 32, 16 or 8 bits (one scale a row of the table), p (d + 1) + C float32.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int
from quernel.kernels._sketched_machine import STORED, Cells, Predictor, Table, look_up, round_table
from quernel.nn._sketch_ops import as_numpy, sketch_places, sketch_sums


def _example() -> dict[str, Any]:
    return {
        "make": lambda: SketchLayer(7, 3, 128, generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(4, 7, generator=generator),),
    }


@register(
    "representer-sketch",
    pillar="nn",
    contract="module",
    paper="2106.11426",
    status="experimental",
    headline=False,
    example=_example,
)
class SketchLayer(nn.Module):
    """Answers of a network by table look-ups behind a short projection.

    Made by ``quernel.compress.RepresenterSketch`` from a trained network; on its own it starts from a random
    projection and small random numbers, and its table can be trained like an embedding bag. No gradient reaches the
    input: a hash is constant almost everywhere.

    Parameters
    ----------
    in_features, out_features : int
        Sizes d and C.
    n_rows : int, default=256
        Rows L of the table.
    n_cells : int or None, default=16
        Cells R of a row; None with ``kernel="angular"`` for 2^K.
    proj_dim : int, default=16
        Numbers p that are hashed.
    kernel, width, n_concat
        As in ``quernel.kernels.LSHKernel``.
    directions : {"gaussian", "rademacher", "sparse"}, default="gaussian"
        Of the hashes.
    seed : int, default=0
        Decides the hashes.
    generator : torch.Generator, optional
        For the initial values; default is torch's own.

    Examples
    --------
    >>> layer = SketchLayer(8, 2, n_rows=64)
    >>> layer(torch.ones(3, 8)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 2]), 2050)
    """

    projection: Tensor
    shift: Tensor
    table: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_rows: int = 256,
        n_cells: int | None = 16,
        proj_dim: int = 16,
        *,
        kernel: Literal["l2", "l1", "angular"] = "l2",
        width: float = 4.0,
        n_concat: int = 2,
        directions: Literal["gaussian", "rademacher", "sparse"] = "gaussian",
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        cells = Cells(kernel, proj_dim, n_rows, n_concat, n_cells, width, directions, seed)
        self._hold(in_features, out_features, cells, 32)
        self.reset_parameters(generator)

    def _hold(self, in_features: int, out_features: int, cells: Cells, bits: int) -> None:
        """Make the layer of zeros."""
        super().__init__()
        self.in_features = check_int("in_features", in_features, low=1)
        self.out_features = check_int("out_features", out_features, low=1)
        check_int("proj_dim", cells.dim, low=1)
        check_choice("bits", bits, tuple(STORED))
        self.cells, self.bits = cells, bits
        self.register_buffer("projection", torch.zeros(cells.dim, in_features))
        self.register_buffer("shift", torch.zeros(cells.dim))
        shape = (cells.n_rows, cells.n_codes, out_features)
        if bits == 32:
            self.table = nn.Parameter(torch.zeros(shape))
            self.register_buffer("scale", torch.ones(cells.n_rows), persistent=False)
        else:
            self.register_buffer("table", torch.zeros(shape, dtype=STORED[bits]))
            self.register_buffer("scale", torch.ones(cells.n_rows))
        self.bias = nn.Parameter(torch.zeros(out_features))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a fresh projection and small numbers in the table."""
        if self.bits != 32:
            raise QuernelError(f"a table of {self.bits} bits cannot be drawn afresh; build a new layer")
        self.projection.normal_(std=self.in_features**-0.5, generator=generator)
        self.shift.zero_()
        self.table.normal_(std=self.cells.n_rows**-0.5, generator=generator)
        self.bias.zero_()

    @classmethod
    @torch.no_grad()
    def of(cls, projection: Tensor, shift: Tensor, table: Table, cells: Cells) -> Self:
        """Build a layer of these numbers in float32; projection: (p, d), shift: (p,)."""
        new = cls.__new__(cls)  # __init__ would draw values only to drop them
        new._hold(projection.shape[1], len(table.intercept), cells, 32)
        for mine, given in zip(
            (new.projection, new.shift, new.table, new.bias), (projection, shift, *table), strict=True
        ):
            mine.copy_(given)
        return new

    @torch.no_grad()
    def rounded(self, bits: Literal[16, 8]) -> SketchLayer:
        """Return the layer with a table of 16 or 8 bits and one scale a row."""
        check_choice("bits", bits, (16, 8))
        if self.bits != 32:
            raise QuernelError(f"only a table of 32 bits can be rounded; this one has {self.bits}")
        new = SketchLayer.__new__(SketchLayer)
        new._hold(self.in_features, self.out_features, self.cells, bits)
        new.to(self.bias.device)
        codes, scale = round_table(self.table, bits)
        pairs = {"projection": self.projection, "shift": self.shift, "table": codes, "scale": scale, "bias": self.bias}
        for name, value in pairs.items():
            getattr(new, name).copy_(value)
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return the answers in the dtype of ``x``."""
        if self.bits == 32 and torch.is_grad_enabled() and self.table.requires_grad:
            places = sketch_places(x, self.projection, self.shift, self.cells)
            y = look_up(places.flatten(0, -2), self.table, self.bias).reshape(*x.shape[:-1], self.out_features)
        else:
            y = sketch_sums(x, self.projection, self.shift, self.table, self.scale, self.cells) + self.bias
        return y.to(x.dtype)

    def predictor(self) -> Predictor:
        """Return a function of NumPy rows (n, d) that gives the same answers without torch in the way.

        It keeps prepared copies of the tensors as they are now.
        """
        held = (self.projection, self.shift, self.table, self.scale, self.bias)
        return Predictor(self.cells, *(as_numpy(tensor).copy() for tensor in held))

    def config(self) -> dict[str, Any]:
        """Return sizes, hashes and bits."""
        cells = self.cells
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "n_rows": cells.n_rows,
            "n_cells": cells.n_cells,
            "proj_dim": cells.dim,
            "kernel": cells.kernel,
            "width": cells.width,
            "n_concat": cells.n_concat,
            "directions": cells.directions,
            "seed": cells.seed,
            "bits": self.bits,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        names = ("kernel", "proj_dim", "n_rows", "n_concat", "n_cells", "width", "directions", "seed")
        new = cls.__new__(cls)
        new._hold(
            config["in_features"], config["out_features"], Cells(*(config[name] for name in names)), config["bits"]
        )
        return new

    def extra_repr(self) -> str:
        """Show sizes and hashes."""
        cells = self.cells
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_rows={cells.n_rows}, "
            f"n_cells={cells.n_codes}, proj_dim={cells.dim}, kernel={cells.kernel}, bits={self.bits}"
        )
