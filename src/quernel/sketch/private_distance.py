"""``PrivateDistanceSum``: sums of distances to private rows, from noisy trees of counts or moments (arXiv 2403.08917).

    l1, lp   one tree of counts over m leaves of [low, high] a coordinate; every node gets noise. A record touches
             h = log2(m) + 1 nodes a tree: D1 = d h, D2 = sqrt(d h); exchanged, twice and sqrt(2) times that.
    l2       trees of s public random projections: E_g |g.(x - y)| = sqrt(2 / pi) |x - y|
    l2sq     the moments (sum of u / B, sum of |u|^2 / B^2, n) of rows u about the middle of the box, |u| <= B

"consistent" makes each tree a least-squares one and reads sum_b c_b |g_b - y| off prefix sums: O(1) a coordinate and
query, no multiplicative error. "shells" is the paper's query, from O(log m) nodes a shell. Leaves stand at their
centres, which moves a distance by at most half a leaf.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import QuernelError
from quernel._random import spawn
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_finite, check_float, check_int
from quernel.kernels.features import orthogonal_directions
from quernel.sketch._count_trees import centres_below, consistent_leaves, l1_coefficients, shell_sums, tree_nodes
from quernel.sketch._pair_kernels import projected
from quernel.sketch.dp.domain import ROUNDING, Box, checked_rows
from quernel.sketch.dp.mechanism import Neighbours, Sensitivity
from quernel.sketch.dp.noise import Integers
from quernel.sketch.dp.structure import PrivateStructure, PublicRelease
from quernel.sketch.dp.terms import PrivacyTerms
from quernel.sketch.dp.vector_sum import GRAIN

Floats = NDArray[np.float64]
Metric = Literal["l1", "l2", "l2sq", "lp"]
METRICS: tuple[Metric, ...] = get_args(Metric)
METHODS = ("consistent", "shells")
# Counts are multiples of it: fine enough for discrete Gaussian noise to be as good as a continuous one.
COUNT_GRAIN = 2.0**-10
# Queries compared with all leaves at a time, for "lp".
_BLOCK = 256


@register("private-kde", pillar="sketch", contract="diagnostic", paper="2403.08917", status="stable", headline=False)
class PublicDistanceSum(PublicRelease):
    """Private sums of distances that may be published; ``PrivateDistanceSum.release`` makes it.

    Attributes
    ----------
    n_rows : float
        Number of private rows, exact where it is public ("replace"), else noisy.
    privacy : dict
        Epsilon, delta, neighbours, mechanism, sensitivity, scale, number of released coordinates.
    """

    def __init__(
        self,
        metric: Metric,
        p: float | None,
        low: list[float],
        high: list[float],
        leaves: int,
        method: str,
        shell_ratio: float,
        n_projections: int,
        projection_seed: int,
        n_rows: float,
        privacy: dict[str, Any],
    ) -> None:
        self.metric: Metric = check_choice("metric", metric, METRICS)
        self.p = check_power(metric, p)
        self.domain = Box(low, high)
        self.leaves, self.method = check_leaves(leaves), check_choice("method", method, METHODS)
        self.shell_ratio = check_float("shell_ratio", shell_ratio, low=1.0, open_low=True)
        self.n_projections = check_int("n_projections", n_projections, low=1)
        self.projection_seed = check_int("projection_seed", projection_seed, low=0)
        self.n_rows = check_float("n_rows", n_rows)
        self.privacy = privacy
        self.dim = len(np.atleast_1d(np.asarray(self.domain.low)))
        self.values = np.zeros(self._shape)

    def query(self, y: ArrayLike, *, mean: bool = False) -> Floats:
        """Return sums of distances to the private rows; costs no privacy.

        Parameters
        ----------
        y : array, shape (n, d)
            Queries, also outside the box.
        mean : bool, default=False
            Divide by the number of rows, at least 1.

        Returns
        -------
        sums : array, shape (n,), float64
        """
        rows = checked_rows("y", y, self.dim).astype(np.float64)
        check_bool("mean", mean)
        sums = self._squares(rows) if self.metric == "l2sq" else self._trees(rows)
        return sums / max(self.n_rows, 1.0) if mean else sums

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        low, high = self.domain.box(self.dim)
        return {
            "metric": self.metric,
            "p": self.p,
            "low": low.tolist(),
            "high": high.tolist(),
            "leaves": self.leaves,
            "method": self.method,
            "shell_ratio": self.shell_ratio,
            "n_projections": self.n_projections,
            "projection_seed": self.projection_seed,
            "n_rows": self.n_rows,
            "privacy": self.privacy,
        }

    @property
    def _shape(self) -> tuple[int, ...]:
        """Shape of what is published: moments, leaves or nodes."""
        if self.metric == "l2sq":
            return (self.dim + 1,)
        n_trees = self.n_projections if self.metric == "l2" else self.dim
        return n_trees, self.leaves if self.method == "consistent" else 2 * self.leaves - 1

    def _arrays(self) -> Arrays:
        return {"values": self.values}

    def _restore(self, arrays: Arrays) -> None:
        self.values = take(arrays, "values", np.float64, self._shape)
        check_finite("array 'values'", self.values)

    def _squares(self, y: Floats) -> Floats:
        """Sum |u - v|^2 = sum |u|^2 - 2 v . sum u + n |v|^2 about the middle of the box."""
        centred = y - middle_of(self.domain, self.dim)
        return self.values[-1] - 2 * centred @ self.values[:-1] + self.n_rows * (centred**2).sum(1)

    def _trees(self, y: Floats) -> Floats:
        low, width, projection = tree_axes(self)
        points = y if projection is None else y @ projection.T
        one = self._one_tree
        total = np.zeros(len(y))
        for j in range(points.shape[1]):
            total += one(j, points[:, j], float(low[j]), float(width[j]))
        # The mean length of a projection of a unit vector on a Gaussian one is sqrt(2 / pi).
        return total if projection is None else total * (math.sqrt(math.pi / 2) / self.n_projections)

    def _one_tree(self, j: int, y: Floats, low: float, width: float) -> Floats:
        if self.method == "shells":
            return shell_sums(self.values[j], y, low, width, self.shell_ratio)
        if self.metric == "lp":
            centres = low + (np.arange(self.leaves) + 0.5) * width
            parts = [
                np.abs(part[:, None] - centres) ** self.p @ self.values[j]
                for part in np.array_split(y, max(1, len(y) // _BLOCK))
            ]
            return np.concatenate(parts)
        slopes, intercepts = self._coefficients
        place = centres_below(y, low, width, self.leaves)
        return np.asarray(slopes[j].take(place) * y + intercepts[j].take(place))

    @functools.cached_property
    def _coefficients(self) -> tuple[Floats, Floats]:
        low, width, _ = tree_axes(self)
        return l1_coefficients(self.values, low, width)


@register("private-kde", pillar="sketch", contract="diagnostic", paper="2403.08917", status="stable", headline=False)
class PrivateDistanceSum(PrivateStructure):
    """Publish sums of distances to private rows with differential privacy, to be queried for ever.

    Parameters
    ----------
    metric : {"l1", "l2", "l2sq", "lp"}, default="l1"
        sum_i |x_i - y|_1, |x_i - y|_2, its square, or sum over coordinates of |x_i - y|^p.
    p : float, optional
        For "lp", > 0.
    low, high : float or sequence of floats, default=0.0 and 1.0
        The box in which rows lie, for all coordinates or for each; known without looking at the rows.
    epsilon, delta, neighbours, mechanism, unsafe_float, insecure_noise_seed
        See ``quernel.sketch.dp.PrivacyTerms``. With several coordinates a delta > 0 helps: Gaussian noise grows like
        sqrt(d), pure noise like d.
    leaves : int, default=256
        Leaves m of a tree, a power of two.
    method : {"consistent", "shells"}, default="consistent"
        "shells" is the paper's query, for "l1" and "l2"; on average more than twenty times less accurate.
    shell_ratio : float, default=1.1
        1 + alpha of the shells.
    n_projections : int, default=32
        For "l2": more make the estimate of the norm better and the noise larger.
    projection_seed : int, default=0
        Public.
    clip : bool, default=False
        Move rows outside the box to its edge instead of refusing them.
    dim : int, optional
        Columns; learnt from the box or the first rows.

    References
    ----------
    Backurs et al., "Efficiently Computing Similarities to Private Datasets", arXiv 2403.08917, 2024; Hay et al.,
    "Boosting the Accuracy of Differentially Private Histograms Through Consistency", arXiv 0904.0942, 2010.

    Examples
    --------
    >>> x = np.random.default_rng(0).random((10_000, 1))
    >>> sums = PrivateDistanceSum("l1", epsilon=1.0, insecure_noise_seed=0).partial_fit(x)  # no seed to be private
    >>> release = sums.release()
    >>> bool(abs(release.query([[0.5]], mean=True)[0] - np.abs(x - 0.5).mean()) < 0.01)
    True
    """

    def __init__(
        self,
        metric: Metric = "l1",
        *,
        p: float | None = None,
        low: ArrayLike = 0.0,
        high: ArrayLike = 1.0,
        epsilon: float = 1.0,
        delta: float = 0.0,
        neighbours: Neighbours = "add_remove",
        mechanism: str = "auto",
        leaves: int = 256,
        method: Literal["consistent", "shells"] = "consistent",
        shell_ratio: float = 1.1,
        n_projections: int = 32,
        projection_seed: int = 0,
        clip: bool = False,
        dim: int | None = None,
        unsafe_float: bool = False,
        insecure_noise_seed: int | None = None,
    ) -> None:
        super().__init__(PrivacyTerms(epsilon, delta, neighbours, mechanism, unsafe_float, insecure_noise_seed))
        self.metric: Metric = check_choice("metric", metric, METRICS)
        self.p = check_power(metric, p)
        self.domain = Box(low, high)
        self.leaves = check_leaves(leaves)
        self.method = check_choice("method", method, METHODS)
        if method == "shells" and metric not in ("l1", "l2"):
            raise QuernelError(f'method="shells" sums distances, for metric="l1" and "l2"; got metric={metric!r}')
        self.shell_ratio = check_float("shell_ratio", shell_ratio, low=1.0, open_low=True)
        self.n_projections = check_int("n_projections", n_projections, low=1)
        self.projection_seed = check_int("projection_seed", projection_seed, low=0)
        self.clip = check_bool("clip", clip)
        given = max(np.ndim(self.domain.low), np.ndim(self.domain.high))
        known = max(np.size(self.domain.low), np.size(self.domain.high)) if given else None
        self.dim = known if dim is None else check_int("dim", dim, low=1)
        if self.dim is not None:
            self.domain.box(self.dim)
        self._held: Integers | None = None
        self._rows = 0

    @property
    def grain(self) -> float:
        """What one step of the sums stands for."""
        return GRAIN if self.metric == "l2sq" else COUNT_GRAIN

    def partial_fit(self, X: ArrayLike, y: object = None) -> Self:
        """Add rows (n, d); ``y`` is ignored. If anything is wrong with one, none is added."""
        rows = checked_rows("X", X, self.dim)
        applied = self.domain.applied("X", rows, clip=self.clip)
        self.dim = rows.shape[1]
        # Rows in float32 may leave the box by a rounding; the domain put them back in float32 only.
        inside = np.asarray(self.domain.project(applied.astype(np.float64)), np.float64)
        self._exact += self._moments(inside) if self.metric == "l2sq" else self._leaves_of(inside)
        self._rows += len(rows)
        return self

    def sensitivity(self) -> Sensitivity:
        """Return how far the sums move between neighbours."""
        replaced = self.terms.neighbours == "replace"
        on_lattice: Callable[..., Sensitivity] = functools.partial(
            Sensitivity.on_lattice, grain=self.grain, neighbours=self.terms.neighbours
        )
        if self.metric == "l2sq":
            length = 1 + ROUNDING
            side = math.sqrt(self._dim) * length
            if replaced:  # squares lie in [0, 1], and the number of rows does not change
                return on_lattice(2 * side + length, math.hypot(2, 1) * length, n_coords=self._dim + 1)
            return on_lattice(side + 2 * length, math.sqrt(3) * length, n_coords=self._dim + 2)
        touched = self._n_trees * (self.leaves.bit_length())
        factor = 2 if replaced else 1
        n_coords = self._n_trees * (2 * self.leaves - 1)
        return on_lattice(factor * touched, math.sqrt(factor * touched), n_coords=n_coords, records=0)

    def config(self) -> dict[str, Any]:
        """Return what two structures must agree on to be merged."""
        names = ("metric", "p", "leaves", "method", "shell_ratio", "n_projections", "projection_seed", "clip", "dim")
        return {name: getattr(self, name) for name in names} | {
            "domain": self.domain.to_json(),
            **self.terms.to_json(),
        }

    @property
    def _dim(self) -> int:
        if self.dim is None:
            raise QuernelError("dim is unknown: give rows to partial_fit first, or dim= to the constructor")
        return self.dim

    @property
    def _n_trees(self) -> int:
        return self.n_projections if self.metric == "l2" else self._dim

    @property
    def _exact(self) -> Integers:
        """Exact sums: rounded moments (d + 1,) or leaf counts (trees, m)."""
        if self._held is None:
            shape = (self._dim + 1,) if self.metric == "l2sq" else (self._n_trees, self.leaves)
            self._held = np.zeros(shape, np.int64)
        return self._held

    @_exact.setter
    def _exact(self, value: Integers) -> None:
        self._held = value

    def _moments(self, rows: Floats) -> Integers:
        centred = (rows - middle_of(self.domain, self._dim)) / self.domain.radius_of(self._dim)
        columns = np.concatenate((centred, np.minimum((centred**2).sum(1, keepdims=True), 1.0)), axis=1)
        return np.rint(columns / GRAIN).astype(np.int64).sum(0)

    def _leaves_of(self, rows: Floats) -> Integers:
        low, width, projection = tree_axes(self)
        points = rows if projection is None else projected(rows, projection)
        places = np.clip(np.floor((points - low) / width), 0, self.leaves - 1).astype(np.int64)
        flat = (places + np.arange(self._n_trees) * self.leaves).ravel()
        return np.bincount(flat, minlength=self._n_trees * self.leaves).reshape(self._n_trees, self.leaves)

    def _sums(self) -> Integers:
        if self.metric == "l2sq":
            # Under "replace" everybody knows how many rows there are.
            count = [] if self.terms.neighbours == "replace" else [self._rows * round(1 / GRAIN)]
            return np.concatenate((self._exact, np.array(count, np.int64)))
        return tree_nodes(self._exact).ravel() * round(1 / COUNT_GRAIN)

    def _add(self, other: Self) -> None:
        if other._held is not None:
            self._exact += other._held
        self._rows += other._rows

    def _forget(self) -> None:
        self._held, self._rows = None, 0

    def _published(self, values: Floats, privacy: dict[str, Any]) -> PublicDistanceSum:
        low, high = self.domain.box(self._dim)
        public = {"low": low.tolist(), "high": high.tolist(), "n_rows": float(self._rows), "privacy": privacy}
        names = ("metric", "p", "leaves", "method", "shell_ratio", "n_projections", "projection_seed")
        replaced = self.terms.neighbours == "replace"
        if self.metric == "l2sq":
            if not replaced:
                public["n_rows"] = float(values[-1])
            radius = self.domain.radius_of(self._dim)
            held = values[: self._dim + 1] * np.array([radius] * self._dim + [radius**2])
        else:
            nodes = values.reshape(self._n_trees, -1)
            held = consistent_leaves(nodes) if self.method == "consistent" else nodes
            if not replaced:
                # Each tree counts all rows, with noise of its own.
                public["n_rows"] = float((held.sum(1) if self.method == "consistent" else nodes[:, 0]).mean())
        made = PublicDistanceSum(**{name: getattr(self, name) for name in names}, **public)
        made.values = np.ascontiguousarray(held)
        return made


def tree_axes(held: PrivateDistanceSum | PublicDistanceSum) -> tuple[Floats, Floats, Floats | None]:
    """Return where trees begin and how wide a leaf is, (trees,) each, and projections (s, d) for "l2"."""
    dim = int(held.dim or 1)
    low, high = held.domain.box(dim)
    projection = None
    if held.metric == "l2":
        projection = orthogonal_directions(held.n_projections, dim, spawn(held.projection_seed, 1)[0])
        middle, reach = projection @ ((low + high) / 2), np.abs(projection) @ ((high - low) / 2)
        low, high = middle - reach, middle + reach
    return low, (high - low) / held.leaves, projection


def middle_of(domain: Box, dim: int) -> Floats:
    """Return the middle of a box."""
    low, high = domain.box(dim)
    return (low + high) / 2


def check_leaves(leaves: Any) -> int:
    """Return a power of two."""
    if check_int("leaves", leaves, low=2, high=2**20) & (leaves - 1):
        raise QuernelError(f"leaves must be a power of two; got {leaves}")
    return int(leaves)


def check_power(metric: str, p: Any) -> float | None:
    """Return p for "lp", None for the other metrics."""
    if metric == "lp":
        return check_float("p", p, low=0.0, open_low=True)
    if p is not None:
        raise QuernelError(f'p belongs to metric="lp"; got p={p!r} with metric={metric!r}')
    return None
