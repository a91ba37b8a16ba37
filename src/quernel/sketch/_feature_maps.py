"""Maps of rows to vectors of bounded length, summed on an integer lattice: random features of a kernel, or the rows.

A map says how long its vectors are (``l1``, ``l2``), adds rounded vectors to integer totals a class, and multiplies
vectors of queries with published sums. Blocks of rows always have one size, padded with zeros: a row's angles then do
not depend on how the rows were dealt out, and shards add up bit for bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._random import spawn
from quernel._threads import parallel_ranges
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels.features import SHIFT_INVARIANT, hadamard_directions, hadamard_projection, spectral_directions
from quernel.sketch._exponential_sum import ExponentialSum
from quernel.sketch._pair_kernels import add_pairs, add_rows, projected, write_pairs
from quernel.sketch.dp.domain import ROUNDING
from quernel.sketch.dp.noise import Integers
from quernel.sketch.dp.vector_sum import GRAIN

Rows = NDArray[np.floating[Any]]
Floats = NDArray[np.float64]
# Rows multiplied at a time; always so many, see the module's docstring.
BLOCK = 512
# Frequencies are padded to a multiple of it.
_PANEL = 64
# Columns worth a thread of their own.
_GRAIN_COLUMNS, _GRAIN_ROWS = 256, 16
# Kernels of Euclidean distances, which random projections keep.
_EUCLIDEAN = ("gaussian", "exponential", "inverse-square", "inverse-l2")


class FeatureMap(Protocol):
    """What the private structures need of a map; contributions are in units in which ``GRAIN`` is one step."""

    @property
    def n_coords(self) -> int:
        """Length of a vector."""

    @property
    def l1(self) -> float:
        """Largest L1 length of a vector."""

    @property
    def l2(self) -> float:
        """Largest L2 length of a vector."""

    def add(self, x: Rows, labels: Integers, totals: Integers) -> None:
        """Add rounded vectors of rows (n, d) to the totals (C, n_coords) of their labels (n,)."""

    def dots(self, y: Rows, values: Floats) -> Floats:
        """Return the products (n, C) of the vectors of rows y with values (C, n_coords)."""


@dataclass(frozen=True)
class SpectralMap:
    """Paired random features a_j [cos(w_j.x), sin(w_j.x)] of a kernel, of length f(0)^1/2 wherever x lies.

    Attributes
    ----------
    kernel : str or ExponentialSum
    bandwidth : float
    n_features : int
        Frequencies J; vectors have 2 J coordinates.
    dim : int
    jl_dim : int or None
        Coordinates that rows are first projected to, by a public random map that keeps Euclidean distances about.
    seed : int
        Of directions and of that map; public.
    """

    kernel: Any
    bandwidth: float
    n_features: int
    dim: int
    jl_dim: int | None
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, ExponentialSum):
            check_choice("kernel", self.kernel, SHIFT_INVARIANT)
        check_bandwidth(self.bandwidth)
        check_int("n_features", self.n_features, low=1)
        check_int("dim", self.dim, low=1)
        check_int("feature_seed", self.seed, low=0)
        if self.jl_dim is not None:
            check_int("jl_dim", self.jl_dim, low=1)
            euclidean = (
                self.kernel.distance != "l1" if isinstance(self.kernel, ExponentialSum) else (self.kernel in _EUCLIDEAN)
            )
            if not euclidean:
                raise QuernelError(
                    f"jl_dim keeps Euclidean distances only, and {self.kernel!r} is a kernel of L1 distances; "
                    "leave jl_dim out"
                )

    @property
    def n_coords(self) -> int:
        """Length of a vector."""
        return 2 * self.n_features

    @property
    def l1(self) -> float:
        """Largest L1 length of a vector: sqrt(2) times the amplitudes, where every cosine equals its sine."""
        return math.sqrt(2.0) * float(self._drawn[1].sum()) * (1 + ROUNDING)

    @property
    def l2(self) -> float:
        """Length of every vector."""
        return math.sqrt(float((self._drawn[1] ** 2).sum())) * (1 + ROUNDING)

    def add(self, x: Rows, labels: Integers, totals: Integers) -> None:
        """Add rounded vectors of rows (n, d) to the totals (C, 2 J) of their labels (n,)."""
        # Integers below 2^53 are exact in float64; a row adds less than 2^21 to a coordinate.
        added = np.zeros(totals.shape)
        steps = self._drawn[1] / GRAIN
        for start, angles in self._angles(x):
            held = labels[start : start + len(angles)]
            parallel_ranges(
                functools.partial(add_pairs, angles, held, steps, added), self.n_features, grain=_GRAIN_COLUMNS
            )
        totals += added.astype(np.int64)

    def dots(self, y: Rows, values: Floats) -> Floats:
        """Return the products (n, C) of the vectors of rows y with values (C, 2 J)."""
        result = np.empty((len(y), len(values)))
        weights = torch.from_numpy(np.ascontiguousarray(values.T, y.dtype))
        features = np.empty((min(BLOCK, max(1, len(y))), self.n_coords), y.dtype)
        for start, angles in self._angles(y):
            out = features[: len(angles)]
            parallel_ranges(functools.partial(write_pairs, angles, self._drawn[1], out), len(angles), grain=_GRAIN_ROWS)
            result[start : start + len(angles)] = torch.from_numpy(out).mm(weights).numpy()
        return result

    def _angles(self, x: Rows) -> Iterator[tuple[int, Rows]]:
        """Yield the first row and the angles (m, J or more) of every block; the array is used again."""
        columns = self._columns(x.dtype.type)
        block, angles = np.zeros((BLOCK, self.dim), x.dtype), torch.empty(BLOCK, columns.shape[1], dtype=columns.dtype)
        for start in range(0, len(x), BLOCK):
            rows = x[start : start + BLOCK]
            block[: len(rows)] = rows
            block[len(rows) :] = 0
            torch.mm(torch.from_numpy(self._reduced(block)), columns, out=angles)
            yield start, angles.numpy()[: len(rows)]

    def _reduced(self, block: Rows) -> Rows:
        if self.jl_dim is None:
            return block
        if block.dtype == np.float32:
            signs, lengths = self._projection
            return hadamard_projection(block, signs, lengths)
        # In float64 that goes through products, where a row's place may matter.
        return projected(np.asarray(block, np.float64), self._axes)

    @functools.cached_property
    def _drawn(self) -> tuple[Floats, Floats]:
        """Directions (J, k) and amplitudes (J,)."""
        dim, seed = self.jl_dim or self.dim, spawn(self.seed, 2)[0]
        if isinstance(self.kernel, ExponentialSum):
            return self.kernel.directions(self.n_features, dim, bandwidth=self.bandwidth, seed=seed)
        directions = spectral_directions(self.kernel, self.n_features, dim, bandwidth=self.bandwidth, seed=seed)
        return directions, np.full(self.n_features, self.n_features**-0.5)

    @functools.cached_property
    def _projection(self) -> tuple[Any, Any]:
        drawn = hadamard_directions(self.jl_dim or 1, self.dim, spawn(self.seed, 2)[1])
        return drawn.signs, drawn.lengths * (self.jl_dim or 1) ** -0.5

    @functools.cached_property
    def _axes(self) -> Floats:
        """Rows of the projection as a matrix (k, dim)."""
        signs, lengths = self._projection
        return np.ascontiguousarray(hadamard_projection(np.eye(self.dim), signs, lengths).T)

    @functools.cached_property
    def _cast(self) -> dict[Any, torch.Tensor]:
        return {}

    def _columns(self, dtype: Any) -> torch.Tensor:
        if dtype not in self._cast:
            # Narrow products take another way through the library, on which a row's place matters; hence the padding.
            columns = np.zeros((self._drawn[0].shape[1], -(-self.n_features // _PANEL) * _PANEL), dtype)
            columns[:, : self.n_features] = self._drawn[0].T
            self._cast[dtype] = torch.from_numpy(columns)
        return self._cast[dtype]


@dataclass(frozen=True)
class RowMap:
    """The rows themselves, divided by the radius of the ball that they lie in."""

    dim: int
    radius: float

    @property
    def n_coords(self) -> int:
        """Length of a vector."""
        return self.dim

    @property
    def l1(self) -> float:
        """Largest L1 length of a vector."""
        return math.sqrt(self.dim) * (1 + ROUNDING)

    @property
    def l2(self) -> float:
        """Largest L2 length of a vector."""
        return 1 + ROUNDING

    def add(self, x: Rows, labels: Integers, totals: Integers) -> None:
        """Add rounded vectors of rows (n, d), which lie in the ball, to the totals (C, d) of their labels (n,)."""
        added = np.zeros(totals.shape)
        scale = 1 / (self.radius * GRAIN)
        parallel_ranges(functools.partial(add_rows, x, labels, scale, added), self.dim, grain=_GRAIN_COLUMNS)
        totals += added.astype(np.int64)

    def dots(self, y: Rows, values: Floats) -> Floats:
        """Return the products (n, C) of rows y with values (C, d), in units of the radius."""
        return np.asarray(y @ values.T / self.radius, np.float64)


# Rules by which kernels' widths are usually read off the rows.
_DATA_RULES = ("median", "scale", "auto", "scott", "silverman")


def check_bandwidth(bandwidth: Any) -> float:
    """Return a bandwidth > 0; refuse the rules that would look at the rows."""
    if isinstance(bandwidth, str) and bandwidth in _DATA_RULES:
        raise QuernelError(
            f"bandwidth={bandwidth!r} would be computed from the private rows, and would tell of them whatever "
            "noise is added later. Give a number that you know from public data or from the units of the columns"
        )
    return check_float("bandwidth", bandwidth, low=0.0, open_low=True)


def kernel_to_json(kernel: Any) -> Any:
    """Return a kernel's name, or the fields of an ``ExponentialSum``."""
    return kernel.to_json() if isinstance(kernel, ExponentialSum) else kernel


def kernel_from_json(value: Any) -> Any:
    """Return the kernel that ``kernel_to_json`` described."""
    return ExponentialSum(**value) if isinstance(value, dict) else value
