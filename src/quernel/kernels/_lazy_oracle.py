"""Answers to "which atom next?": by an exact scan, or by an index whose answers are accepted only if they are good.

The certificate is a bound on the primal gap, Phi = g(w) - floor >= g(w) - min g. The floor is what the objective itself
promises (0 for least squares) or the best g(w) - G(w) of the scans so far, G the duality gap; it only rises, and Phi
follows g down or up, so it is a bound under any step rule. An answer s with <w - s, grad> >= Phi / kappa is a step that
converges; anything less is a miss, which costs a scan and raises the floor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from quernel._errors import QuernelError
from quernel.kernels._frank_wolfe_steps import ActiveSet, Atoms, Vector

# Answers below the tolerance that are taken in a row before a scan looks whether the end is reached: a scan costs
# tens of queries, so a few more steps are cheap.
PATIENCE = 8


class Lookup(Protocol):
    """What an index must answer; ``quernel.search.Index`` does."""

    def __len__(self) -> int:
        """Items held."""

    def search(self, q: Any, k: int) -> tuple[Any, Any]:
        """Return scores and ids, larger inner products first."""


class Answer(NamedTuple):
    """An atom, <w - s, grad>, and whether no atom is better."""

    atom: int
    row: Vector
    gap: float
    exact: bool


def nearest(index: Lookup, query: Vector) -> int:
    """Return the id an index finds for one query, -1 if none; ``best`` is used where there is one."""
    if hasattr(index, "best"):
        return int(index.best(query)[0])
    return int(index.search(query[None].astype(np.float32), 1)[1][0, 0])


class ExactOracle:
    """Scan all atoms, every time."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.scans = self.queries = self.hits = 0

    def scan(self, grad: Vector, along: float, value: float) -> Answer:
        """Return the best atom; ``along`` is <w, grad>."""
        self.scans += 1
        atom, product = self.atoms.scan(grad)
        return Answer(atom, self.atoms.row(atom), along - product, True)

    def answer(self, grad: Vector, along: float, value: float, active: ActiveSet) -> Answer:
        """Return the atom for the next step at a point with this value and gradient."""
        return self.scan(grad, along, value)


class LazyOracle(ExactOracle):
    """Ask an index, and scan where its answer is not good enough.

    Parameters
    ----------
    atoms : Atoms
    index : Lookup
        Over the same atoms, ids being their row numbers.
    kappa : float
        Share of the bound that an answer must reach, as 1 / kappa.
    tol : float
        Gap at which the method ends.
    floor : float
        No value of the objective is below; -inf if nothing is known.
    """

    def __init__(self, atoms: Atoms, index: Lookup, kappa: float, tol: float, floor: float) -> None:
        super().__init__(atoms)
        self.index, self.kappa, self.tol, self.floor = index, kappa, tol, floor
        self.small = 0

    def scan(self, grad: Vector, along: float, value: float) -> Answer:
        """Return the best atom and raise the floor."""
        found = super().scan(grad, along, value)
        self.floor, self.small = max(self.floor, value - found.gap), 0
        return found

    def answer(self, grad: Vector, along: float, value: float, active: ActiveSet) -> Answer:
        """Return what the index or the active set has, if it is good enough; else scan."""
        if self.floor == -np.inf:
            return self.scan(grad, along, value)
        self.queries += 1
        found = self._found(grad, along, active)
        needed = max(value - self.floor, self.tol) / self.kappa
        self.small = self.small + 1 if found is not None and found.gap <= self.tol else 0
        if found is None or not found.gap >= needed or self.small > PATIENCE:
            return self.scan(grad, along, value)
        self.hits += 1
        return found

    def _found(self, grad: Vector, along: float, active: ActiveSet) -> Answer | None:
        atom = nearest(self.index, -grad)
        if atom >= self.atoms.n:
            raise QuernelError(f"lmo answered with id {atom}; ids must be row numbers of the {self.atoms.n} atoms")
        row = self.atoms.row(atom) if atom >= 0 else None
        gap = along - float(row @ grad) if row is not None else -np.inf
        products = active.rows @ grad
        place = int(products.argmin())
        if along - products[place] > gap:
            return Answer(int(active.ids[place]), active.rows[place].copy(), along - float(products[place]), False)
        return None if row is None else Answer(atom, row, gap, False)
