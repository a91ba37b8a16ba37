"""``ProjectionDPP`` and ``VolumeSampler``: random points that repel each other, for least squares from few values.

The projection determinantal point process of a space has m points of density (1/m!) det[phi(x_1) .. phi(x_m)]^2 dmu^m;
each has marginal nu = |phi|^2/m dmu. Sampled by the chain rule: a point from nu is kept with probability
1 - |Q phi|^2/|phi|^2, Q the projector on those kept before; m (1 + 1/2 + .. + 1/m) proposals on average, O(m^3 log m).
Volume-rescaled sampling, of density det(G) drho^n, is m points of the process, n - m independent ones of rho, shuffled.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_finite, check_float, check_int
from quernel.kernels._dpp_kernels import extend
from quernel.kernels.design_spaces import Space, check_orthonormal
from quernel.kernels.weighted_least_squares import Design, gram_min, warn_if_ill

Array = NDArray[np.float64]
Points = NDArray[Any]

METHODS = ("volume", "dpp_repeat", "iid")
# The last of m points is met by a proposal with probability 1/m: missing it so often has probability e^-200.
_HOPELESS = 200
# Halvings of an interval that holds an eigenvalue, relative to its length.
_HALVINGS = 48


@runtime_checkable
class Reference(Protocol):
    """Another measure rho to draw independent points from, with w = dmu/drho as the weight of points (n,)."""

    def sample(self, n: int, random_state: Seed = None) -> Points: ...

    def weight(self, points: Points) -> Array: ...


@register("volume-sampling-least-squares", pillar="kernels", contract="diagnostic", paper="2312.14057",
          status="stable", headline=False)  # fmt: skip
class ProjectionDPP:
    """The projection determinantal point process of a space: m different points, exactly.

    Parameters
    ----------
    space : Space
        ``LegendreSpace``, ``TrigonometricSpace``, ``EmpiricalSpace`` or your own.

    Notes
    -----
    Points are accepted one by one from independent proposals; norms of what is left of a proposal are taken after two
    passes of Gram-Schmidt, and one of less than 1e-12 of its squared length is never accepted. Nothing but the
    proposals grows with the population.

    References
    ----------
    Nouy and Michel, "Weighted least-squares approximation with determinantal point processes and generalized volume
    sampling", arXiv 2312.14057, 2023.

    Examples
    --------
    >>> from quernel.kernels import EmpiricalSpace
    >>> rows = ProjectionDPP(EmpiricalSpace(np.random.default_rng(0).standard_normal((50, 4)))).sample(0)
    >>> len(set(rows.tolist()))
    4
    """

    def __init__(self, space: Space) -> None:
        check_orthonormal(space)
        self.space = space

    def sample(self, random_state: Seed = None) -> Points:
        """Return m points in random order: (m, dim), or row numbers (m,)."""
        return self._chain(generator(random_state, "random_state"))[0]

    def _chain(self, rng: np.random.Generator) -> tuple[Points, Array]:
        """Return the points in the order of the chain rule, and the orthonormal basis (m, m) that they left."""
        m = self.space.n_features
        basis, chosen = np.zeros((m, m)), np.zeros(m, np.int64)
        kept: list[Points] = []
        filled, missed = 0, 0
        while filled < m:
            # As many as what is left needs on average, and some more.
            n = math.ceil(1.2 * m * sum(1 / k for k in range(1, m - filled + 1))) + 8
            points = self.space.sample_nu(n, rng)
            rows = np.ascontiguousarray(self.space.phi(points), np.float64)
            now = extend(rows, rng.random(n), basis, filled, chosen)
            missed = 0 if now > filled else missed + n
            if missed > _HOPELESS * m:
                raise QuernelError(
                    f"no point was found that the {filled} before leave room for: the {m} functions of space look "
                    "linearly dependent where sample_nu draws. EmpiricalSpace(phi(points)) finds their rank"
                )
            kept.append(points[chosen[filled:now]])
            filled = now
        return np.concatenate(kept), basis


@register("volume-sampling-least-squares", pillar="kernels", contract="diagnostic", paper="2312.14057",
          status="stable", headline=False)  # fmt: skip
class VolumeSampler:
    """Draw designs for weighted least squares: which points to measure at, and how much each counts.

    Parameters
    ----------
    space : Space
        What will be fitted in; m functions.
    method : {"volume", "dpp_repeat", "iid"}, default="volume"
        "volume" is volume-rescaled sampling, which makes least squares unbiased. "dpp_repeat" joins independent
        projection processes: biased, much better conditioned, the most accurate for as many values. "iid" draws all
        points independently.
    n : int, optional
        Points; default 2m. At least m unless "iid". Where it is no multiple of m, "dpp_repeat" adds a random part of
        one more process.
    delta : float, optional
        Draw again until the least eigenvalue of G is at least 1 - delta, in (0, 1). Errors are then bounded surely in
        terms of the best approximation in the supremum norm, and the draw is no longer unbiased.
    max_tries : int, default=1000
        Draws before giving up.
    boost : bool, default=False
        With ``delta``: then leave out points one by one, the one that matters least first, as long as the least
        eigenvalue stays at 1 - delta; the design has between m and n points. Each costs O(n m^2).
    reference : {"nu", "mu"} or Reference, default="nu"
        What independent points are drawn from. The weights of all points, those of the process too, are dmu/drho.

    Attributes
    ----------
    unbiased_ : bool
        Whether least squares on these designs has the projection as its mean.

    Raises
    ------
    QuernelError
        If n < m for "volume" and "dpp_repeat", or no draw is good enough (by ``sample``).

    Warns
    -----
    IllConditionedDesignWarning
        If a draw does not determine the fit; by ``sample``, before anything is measured.

    References
    ----------
    Nouy and Michel, arXiv 2312.14057, 2023. Derezinski, Warmuth, Hsu, "Unbiased estimators for random design
    regression", arXiv 1907.03411, 2019. Haberstich, Nouy, Perrin, "Boosted optimal weighted least-squares", arXiv
    1912.07075, 2019.

    Examples
    --------
    >>> from quernel.kernels import LegendreSpace
    >>> sampler = VolumeSampler(LegendreSpace(9), "dpp_repeat", n=20, delta=0.7)
    >>> design = sampler.sample(0)
    >>> design.points.shape, design.gram_min >= 0.3, sampler.unbiased_
    ((20, 1), True, False)
    """

    def __init__(
        self,
        space: Space,
        method: Literal["volume", "dpp_repeat", "iid"] = "volume",
        *,
        n: int | None = None,
        delta: float | None = None,
        max_tries: int = 1000,
        boost: bool = False,
        reference: Literal["nu", "mu"] | Reference = "nu",
    ) -> None:
        check_choice("method", method, METHODS)
        self.process = ProjectionDPP(space)
        self.space = space
        self.method = method
        m = space.n_features
        self.n = 2 * m if n is None else check_int("n", n, low=1)
        if self.n < m and method != "iid":
            raise QuernelError(f"n must be at least the number of functions, {m}, for method={method!r}; got {self.n}")
        self.delta = (
            None if delta is None else check_float("delta", delta, low=0, high=1, open_low=True, open_high=True)
        )
        self.max_tries = check_int("max_tries", max_tries, low=1)
        self.boost = check_bool("boost", boost)
        if boost and delta is None:
            raise QuernelError("boost=True needs delta=, the eigenvalue that must remain is 1 - delta")
        if isinstance(reference, str):
            check_choice("reference", reference, ("nu", "mu"))
        elif not isinstance(reference, Reference):
            raise QuernelError(
                f'reference must be "nu", "mu" or have sample and weight; got {type(reference).__name__}'
            )
        if method == "dpp_repeat" and reference != "nu":
            raise QuernelError("reference must be 'nu' for method='dpp_repeat', whose points all come from nu")
        self.reference = reference

    @property
    def unbiased_(self) -> bool:
        """Whether the mean of the coefficients over all draws is the projection's."""
        one_process = self.method == "dpp_repeat" and self.n == self.space.n_features
        return self.delta is None and (self.method == "volume" or one_process)

    def sample(self, random_state: Seed = None) -> Design:
        """Return a design.

        Raises
        ------
        QuernelError
            If ``max_tries`` draws have a least eigenvalue below 1 - delta.
        """
        rng = generator(random_state, "random_state")
        best = 0.0
        for tries in range(1, self.max_tries + 1):
            points = self._draw(rng)
            phi = np.asarray(self.space.phi(points), np.float64)
            weights = self._weights(points, phi)
            least = gram_min(phi, weights)
            best = max(best, least)
            if self.delta is None or least >= 1 - self.delta:
                return self._design(points, phi, weights, least, tries)
        raise QuernelError(
            f"none of {self.max_tries} designs of n={self.n} points has a least eigenvalue of 1 - delta = "
            f"{1 - (self.delta or 0):.3g}; the best has {best:.3g}. Take more points"
            f"{'' if self.method == 'dpp_repeat' else ', method=' + repr('dpp_repeat')} or a larger delta"
        )

    def _draw(self, rng: np.random.Generator) -> Points:
        m = self.space.n_features
        if self.method == "iid":
            return self._independent(self.n, rng)
        if self.method == "volume":
            parts = [self.process.sample(rng), self._independent(self.n - m, rng)]
        else:
            parts = [self.process.sample(rng) for _ in range(-(-self.n // m))]
            # Any part chosen apart from the points keeps their marginals, which is what the weights need.
            parts[-1] = rng.permutation(parts[-1])[: self.n - m * (len(parts) - 1)]
        return rng.permutation(np.concatenate(parts))

    def _independent(self, n: int, rng: np.random.Generator) -> Points:
        if isinstance(self.reference, str):
            return (self.space.sample_nu if self.reference == "nu" else self.space.sample_mu)(n, rng)
        return self.reference.sample(n, rng)

    def _weights(self, points: Points, phi: Array) -> Array:
        if self.reference == "nu":
            weights: Array = self.space.n_features / np.einsum("ij,ij->i", phi, phi)
            return weights
        if isinstance(self.reference, str):
            return np.ones(len(points))
        given = np.asarray(self.reference.weight(points), np.float64)
        if given.shape != (len(points),) or not (given > 0).all():
            raise QuernelError(f"reference.weight must give a positive number a point; got shape {given.shape}")
        check_finite("reference.weight", given)
        return given

    def _design(self, points: Points, phi: Array, weights: Array, least: float, tries: int) -> Design:
        if self.boost and self.delta is not None:
            kept = boosted(phi, weights, 1 - self.delta)
            points, phi, weights = points[kept], phi[kept], weights[kept]
            least = gram_min(phi, weights)
        warn_if_ill(least, len(points), self.space.n_features)
        rows = getattr(self.space, "n_rows", None)
        return Design(points, weights, least, self.method, self.unbiased_, tries, rows)


def boosted(phi: Array, weights: Array, floor: float) -> NDArray[np.int64]:
    """Return which points to keep when they are left out greedily while the least eigenvalue of G is >= ``floor``."""
    rows = phi * np.sqrt(weights)[:, None]
    kept = np.arange(len(rows))
    while len(kept) > rows.shape[1]:
        least = _least_without(rows[kept])
        worst = int(least.argmax())
        # A hair above, so that rounding in a different order of sums cannot end up below.
        if least[worst] < (len(kept) - 1) * floor * (1 + 1e-12):
            break
        kept = np.delete(kept, worst)
    return kept


def _least_without(rows: Array) -> Array:
    """Return the least eigenvalue of rows^T rows without each row, (n, m) -> (n,).

    With rows^T rows = U diag(d) U^T and z = U^T row it is the root below d_1 of sum_i z_i^2/(d_i - t) = 1, or d_1.
    """
    d, u = np.linalg.eigh(rows.T @ rows)
    squares = (rows @ u) ** 2
    high = np.full(len(rows), d[0])
    low = high - squares.sum(1)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        gaps = np.maximum(d - middle[:, None], np.finfo(np.float64).tiny)
        below = (squares / gaps).sum(1) < 1
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low
