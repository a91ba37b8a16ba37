"""``FrankWolfe``: smooth convex minimisation over the hull of many atoms, with an index in place of the scan.

    s_t = argmin_{s in S} <s, grad g(w_t)>,   w_{t+1} = (1 - eta) w_t + eta s_t,
    gap G(w) = max_s <w - s, grad g(w)> >= g(w) - min g.

The scan over all atoms is an inner-product search, so an index answers it in sub-linear time (arXiv 2111.15139). An
index may be wrong; the paper's guarantee is in expectation over many tables. Here each answer is checked against a
bound on what is still to be gained (lazified Frank-Wolfe, arXiv 1610.05120), and a scan replaces the ones that fail,
so convergence and the reported gap are certain whatever the index does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float, check_int
from quernel.kernels._frank_wolfe_steps import (
    ActiveSet,
    Atoms,
    Evaluate,
    Given,
    LeastSquares,
    Objective,
    Vector,
    open_loop_step,
)
from quernel.kernels._lazy_oracle import Answer, ExactOracle, LazyOracle, Lookup

STEPS = ("linesearch", "2/(t+2)", "2/(ct+2)")
VARIANTS = ("vanilla", "away", "pairwise")
HISTORY = np.dtype([("objective", "f8"), ("gap", "f8"), ("step", "f8"), ("exact", "?")])


class FrankWolfe:
    """Minimise a smooth convex function over the convex hull of the rows of a matrix.

    Parameters
    ----------
    objective : {"lstsq"} or callable, default="lstsq"
        "lstsq" is |w - target|^2 / 2. A callable returns (value, gradient) for w of shape (d,).
    lmo : {"exact"} or index, default="exact"
        "exact" scans all atoms in every iteration. An index is asked instead: anything with ``add``, ``search`` and
        ``len``, such as ``quernel.search.MaxIPIndex``. One that is empty is copied and filled by ``fit``; one that is
        not must hold these atoms, with their row numbers as ids.
    step : {"linesearch", "2/(t+2)", "2/(ct+2)"}, default="linesearch"
        c is 1 / kappa. Line search needs to know neither c nor the curvature.
    variant : {"vanilla", "away", "pairwise"}, default="vanilla"
        The two others also take weight from bad atoms of w; their solutions use fewer atoms. Line search only.
    tol : float, default=1e-3
        Gap at which to stop, in units of the objective.
    max_iter : int, default=5000
    kappa : float, default=2.0
        An answer of an index is taken if it promises 1 / kappa of what may still be gained.
    start : int, optional
        Atom to start from; default is the best one for the gradient at the mean of the atoms.

    Attributes
    ----------
    support_, weights_ : array, shape (k,)
        The atoms that make up the solution, and their positive weights with sum 1.
    coef_ : sparse array, shape (n,)
        The same as one vector.
    point_ : array, shape (d,)
        The solution w.
    objective_, duality_gap_ : float
        Value and true gap there, the gap by an exact scan in float64.
    converged_ : bool
        Whether the gap reached ``tol``; then the objective is within ``tol`` of the least.
    n_iter_, n_exact_scans_ : int
    success_rate_ : float
        Share of the index's answers that were taken; NaN if none was asked for.
    history_ : structured array, shape (n_iter_,)
        Fields objective, gap (of the atom taken: the true gap where exact), step, exact.
    index_ : index or None
        The index that answered, to be used again.

    Notes
    -----
    Differs from the paper: (1) atoms are not lifted to [-s; 1]; an index that moves its items by their mean has a
    non-negative maximum too, the order is the same, and the angles are larger. (2) The certificate. (3) Step 2/(ct+2),
    under which h_t <= 2 (beta D^2 / c + h_0) / (ct + 2) for every t; the paper's min(1, 2/(c(t+2))) needs a first step
    with c = 1. (4) The paper prepares for queries that follow from earlier answers by a net of queries and more tables;
    here the certificate finds a bad answer out, and tables take no turns. (5) The step around the query runs in Python,
    a fixed cost an iteration that shows where atoms are few.

    References
    ----------
    Xu, Song, Shrivastava, "Breaking the Linear Iteration Cost Barrier for Some Well-known Conditional Gradient Methods
    Using MaxIP Data-structures", arXiv 2111.15139, 2021.
    Braun, Pokutta, Zink, "Lazifying Conditional Gradient Algorithms", arXiv 1610.05120, 2017.

    Examples
    --------
    >>> atoms = np.eye(3)
    >>> model = FrankWolfe(variant="pairwise", tol=1e-9).fit(atoms, [0.5, 0.4, -1.0])
    >>> model.support_.tolist(), model.weights_.round(3).tolist()
    ([0, 1], [0.55, 0.45])
    """

    def __init__(
        self,
        *,
        objective: Literal["lstsq"] | Evaluate = "lstsq",
        lmo: Literal["exact"] | Lookup | Any = "exact",
        step: Literal["linesearch", "2/(t+2)", "2/(ct+2)"] = "linesearch",
        variant: Literal["vanilla", "away", "pairwise"] = "vanilla",
        tol: float = 1e-3,
        max_iter: int = 5000,
        kappa: float = 2.0,
        start: int | None = None,
    ) -> None:
        if objective != "lstsq" and not callable(objective):
            raise QuernelError(f'objective must be "lstsq" or a callable; got {objective!r}')
        check_lookup("lmo", lmo)
        check_choice("step", step, STEPS)
        check_choice("variant", variant, VARIANTS)
        if variant != "vanilla" and step != "linesearch":
            raise QuernelError(f'variant={variant!r} needs step="linesearch"; got {step!r}')
        self.objective = objective
        self.lmo = lmo
        self.step = step
        self.variant = variant
        self.tol = check_float("tol", tol, low=0.0, open_low=True)
        self.max_iter = check_int("max_iter", max_iter, low=1)
        self.kappa = check_float("kappa", kappa, low=1.0)
        self.start = None if start is None else check_int("start", start, low=0)

    def fit(self, atoms: ArrayLike | Any, target: ArrayLike | None = None) -> Self:
        """Take the atoms, fill the index if it is empty, and solve.

        Parameters
        ----------
        atoms : array or CSR matrix, shape (n, d)
            float32 or float64, kept as they are. Sparse ones need ``lmo="exact"`` or an index that is filled.
        target : array, shape (d,)
            For "lstsq".
        """
        self._atoms = Atoms(atoms)
        self.index_ = None if isinstance(self.lmo, str) else filled("lmo", self.lmo, self._atoms)
        return self.solve(target)

    def solve(self, target: ArrayLike | None = None) -> Self:
        """Solve again over the atoms of the last ``fit``, for another target."""
        if not hasattr(self, "_atoms"):
            raise QuernelError("solve needs atoms; call fit(atoms, target) first")
        atoms, function = self._atoms, self._function(target)
        scan_first = self.start is None
        first = atoms.scan(function(atoms.mean)[1])[0] if scan_first else self.start
        if first is None or first >= atoms.n:
            raise QuernelError(f"start must be the number of an atom, below {atoms.n}; got {first}")
        oracle = (
            ExactOracle(atoms)
            if self.index_ is None
            else LazyOracle(atoms, self.index_, self.kappa, self.tol, function.floor)
        )
        oracle.scans += scan_first
        self._run(function, oracle, ActiveSet(first, atoms.row(first)))
        return self

    def _run(self, function: Objective, oracle: ExactOracle, active: ActiveSet) -> None:
        w = active.point()
        value, grad = function(w)
        history: list[tuple[float, float, float, bool]] = []
        for t in range(self.max_iter):
            along = float(w @ grad)
            found = oracle.answer(grad, along, value, active)
            if found.exact and found.gap <= self.tol:
                break
            direction, slope, limit, apply = self._move(w, grad, along, found, active)
            size = self._size(t, function, w, direction, slope, limit)
            history.append((value, found.gap, size, found.exact))
            apply(size)
            w = w + size * direction
            value, grad = function(w)
        else:
            found = oracle.scan(grad, float(w @ grad), value)
        # From the weights, so that both describe one point; w differs in the last digits.
        self.point_ = active.point()
        self.objective_ = function(self.point_)[0]
        self.duality_gap_ = found.gap
        self.converged_ = found.gap <= self.tol
        order = np.argsort(active.ids)
        self.support_, self.weights_ = active.ids[order], active.weights[order]
        self.n_iter_, self.n_exact_scans_ = len(history), oracle.scans
        self.success_rate_ = oracle.hits / oracle.queries if oracle.queries else float("nan")
        self.history_ = np.array(history, dtype=HISTORY)

    @property
    def coef_(self) -> sparse.coo_array:
        """Weights of all atoms, shape (n,), sparse."""
        return sparse.coo_array((self.weights_, (self.support_,)), shape=(self._atoms.n,))

    def _move(
        self, w: Vector, grad: Vector, along: float, found: Answer, active: ActiveSet
    ) -> tuple[Vector, float, float, Callable[[float], None]]:
        """Return direction, <grad, direction>, largest step, and what a step does to the weights."""
        if self.variant != "vanilla":
            products = active.rows @ grad
            worst = int(products.argmax())
            surplus, weight = float(products[worst]) - along, float(active.weights[worst])
            if self.variant == "pairwise":
                direction = found.row - active.rows[worst]
                return (
                    direction,
                    -found.gap - surplus,
                    weight,
                    lambda size: active.exchange(worst, found.atom, found.row, size),
                )
            if surplus > found.gap and weight < 1:
                limit = weight / (1 - weight)
                return w - active.rows[worst], -surplus, limit, lambda size: active.away(worst, size, limit)
        return found.row - w, -found.gap, 1.0, lambda size: active.toward(found.atom, found.row, size)

    def _size(self, t: int, function: Objective, w: Vector, direction: Vector, slope: float, limit: float) -> float:
        if self.step == "linesearch":
            return function.best_step(w, direction, slope, limit)
        return open_loop_step(t, 1.0 if self.step == "2/(t+2)" else 1 / self.kappa)

    def _function(self, target: ArrayLike | None) -> Objective:
        dim = self._atoms.dim
        if self.objective != "lstsq":
            if target is not None:
                raise QuernelError("target belongs to objective='lstsq'; a callable has its own")
            return Given(self.objective, dim)
        if target is None:
            raise QuernelError("target must be given for objective='lstsq'")
        held = np.asarray(target, dtype=np.float64)
        if held.shape != (dim,):
            raise QuernelError(f"target must have shape ({dim},), like an atom; got {held.shape}")
        check_finite("target", held)
        return LeastSquares(held)


def check_lookup(name: str, lmo: Any) -> None:
    """Raise unless ``lmo`` is "exact" or has the verbs of an index."""
    if isinstance(lmo, str):
        check_choice(name, lmo, ("exact",))
    elif not all(hasattr(lmo, verb) for verb in ("add", "search", "__len__")):
        raise QuernelError(
            f'{name} must be "exact" or an index with add, search and len; got {type(lmo).__name__}. '
            "Take e.g. quernel.search.MaxIPIndex(dim)"
        )


def filled(name: str, index: Any, atoms: Atoms) -> Lookup:
    """Return an index over the atoms: a filled copy of an empty one, or the one given if it has their number."""
    if len(index) == atoms.n:
        return index
    if len(index):
        raise QuernelError(f"{name} holds {len(index)} items, but there are {atoms.n} atoms; give it these, or none")
    if atoms.sparse:
        raise QuernelError(f'sparse atoms cannot be added to an index; take {name}="exact", or atoms.toarray()')
    own = copy.deepcopy(index)
    own.add(atoms.matrix.astype(np.float32, copy=False))
    return own
