"""The contract of private structures: update or partial_fit, merge, release(ledger) -> a public object with query.

A ``PrivateStructure`` holds exact integer sums over private rows and never answers. ``release`` enters the mechanism in
the ledger, draws noise once, and returns a ``PublicRelease``: it may be published, saved and asked for ever, since
whatever is computed from it is post-processing. A subclass says what its sums are, how much one record moves them, and
what is made of the noisy ones.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from quernel._array_folder import ArrayFolder
from quernel._errors import FormatError, PrivacyError, QuernelError
from quernel._validate import check_float, check_type
from quernel.sketch.dp.ledger import PrivacyLedger
from quernel.sketch.dp.mechanism import Mechanism, Sensitivity
from quernel.sketch.dp.noise import Integers, NoiseSource
from quernel.sketch.dp.terms import PrivacyTerms

# What a release says about itself.
_DESCRIPTION = {
    "epsilon", "delta", "neighbours", "mechanism", "discrete", "sensitivity", "scale", "n_coords", "grain", "rho",
    "status",
}  # fmt: skip
INSECURE = "INSECURE: the noise was drawn with a seed and can be subtracted"
UNSAFE = "UNSAFE FLOAT"
STATUSES = ("private", INSECURE, UNSAFE)
# Sensitivity and scale are written in units of the contributions: dividing them by the grain again rounds.
_ROUNDED = 1e-9


class PrivateStructure(ABC):
    """Sums over private rows, to be released once with noise.

    Parameters
    ----------
    terms : PrivacyTerms
        What a release promises.

    Notes
    -----
    Records are taken in by ``partial_fit`` (or ``update``, the same); shards are merged before the release, so that
    noise is added once. The object itself is as private as the rows: it cannot be saved. Whether a row is refused (a
    value that is not finite, or outside the domain without ``clip``, a label that is not among the classes) depends on
    that row alone, but shows to whoever sees the error: no guarantee covers it.
    """

    # Columns of a row; None where no row was seen and nobody said.
    dim: int | None

    def __init__(self, terms: PrivacyTerms) -> None:
        self._terms = check_type("terms", terms, PrivacyTerms)
        self._noise = NoiseSource(terms.insecure_noise_seed)
        self._ledger: PrivacyLedger | None = None
        self._lock = threading.Lock()
        self._taken_over = False

    @property
    def terms(self) -> PrivacyTerms:
        """What a release promises unless it is asked for other terms."""
        return self._terms

    @property
    def ledger(self) -> PrivacyLedger | None:
        """Where releases of these rows are paid; None before the first one."""
        return self._ledger

    @abstractmethod
    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Take rows in; returns the structure itself."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return what two structures must agree on to be merged."""

    @property
    @abstractmethod
    def grain(self) -> float:
        """What one step of the integer sums stands for."""

    @abstractmethod
    def sensitivity(self) -> Sensitivity:
        """Return how far the sums can move between neighbours, in steps."""

    @abstractmethod
    def _sums(self) -> Integers:
        """Return the exact sums, int64 of shape (n_coords,)."""

    @abstractmethod
    def _add(self, other: Self) -> None:
        """Add the sums of a structure with the same ``config()``."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop all rows."""

    @abstractmethod
    def _published(self, values: NDArray[np.float64], privacy: dict[str, Any]) -> PublicRelease:
        """Build the public object from noisy sums, in units of the contributions."""

    def update(self, x: Any, y: Any = None) -> Self:
        """Take rows in, like ``partial_fit``: the verb that sketches have."""
        return self.partial_fit(x, y)

    def merge(self, other: Self) -> Self:
        """Take over another structure's rows; returns the structure itself.

        ``other`` is empty afterwards and cannot be released, so that its rows are paid for, and counted, once; what it
        collects later can be taken over again. The parts must be of different records: no release could know of one
        that was given to both.

        Raises
        ------
        QuernelError
            If ``other`` is of another class or differs in a setting; then nothing changed.
        PrivacyError
            If it is this structure itself, or was released.
        """
        if type(other) is not type(self):
            raise QuernelError(f"other must be a {type(self).__name__} to be merged; got {type(other).__name__}")
        mine, theirs = self.config(), other.config()
        # Columns are public: a part that has not seen a row may learn them from one that has.
        mine, theirs = _known(mine, theirs), _known(theirs, mine)
        apart = [f"{k}={mine[k]!r} here and {theirs[k]!r} there" for k in mine if mine[k] != theirs[k]]
        if apart:
            raise QuernelError(f"other must have the same settings to be merged; it has {', '.join(apart)}")
        if other is self:
            raise PrivacyError("other must be another structure: each record would count twice")
        if other._ledger is not None:
            raise PrivacyError(
                "other was released, under a budget that this one's release need not know of; merge first, then release"
            )
        if "dim" in mine:
            self.dim = other.dim = mine["dim"]
        self._add(other)
        other._forget()
        # A part that gave its rows away before may take all of them back.
        self._taken_over, other._taken_over = False, True
        return self

    def mechanism(self) -> Mechanism:
        """Return the noise that a release gets unless it is asked for other terms."""
        return self.terms.calibrated(self.sensitivity())

    def release(
        self,
        ledger: PrivacyLedger | None = None,
        *,
        epsilon: float | None = None,
        delta: float | None = None,
        mechanism: str | None = None,
        label: str | None = None,
    ) -> Any:
        """Spend budget, add noise, and return the object that may be published.

        Parameters
        ----------
        ledger : PrivacyLedger, optional
            The budget of the data set. Default is that of the release before, and for the first one a ledger of this
            object's own, of exactly its epsilon and delta: enough for one release, and right only if nothing else is
            released from these rows. Every ledger knows its own releases only: give all releases of a data set the
            same one. This object insists on it for its own releases; those of other objects from the same rows it
            cannot see.
        epsilon, delta, mechanism : optional
            Other terms for this release than the structure was built with; what is not named stays.
        label : str, optional
            What the ledger calls it; default is the class's name.

        Returns
        -------
        release : PublicRelease

        Raises
        ------
        BudgetExceeded
            If the ledger does not reach, e.g. for a second release.
        PrivacyError
            If an earlier release went to another ledger, the rows were taken over by ``merge``, or the mechanism cannot
            keep the terms.

        Notes
        -----
        Rows may be added after a release; the next one covers all rows, and is paid in full.
        """
        if ledger is not None:
            check_type("ledger", ledger, PrivacyLedger)
        label = type(self).__name__ if label is None else label
        terms = replace(
            self.terms,
            epsilon=self.terms.epsilon if epsilon is None else epsilon,
            delta=self.terms.delta if delta is None else delta,
            mechanism=self.terms.mechanism if mechanism is None else mechanism,
        )
        with self._lock:
            paid = self._where_to_pay(ledger)
            chosen, sums = terms.calibrated(self.sensitivity()), self._sums()
            self._noise.check()  # a missing package should cost nothing
            paid.spend(chosen, label)
            self._ledger = paid
        noisy = chosen.randomise(sums, self._noise)
        return self._published(noisy.astype(np.float64) * self.grain, self._described(chosen, terms))

    def _where_to_pay(self, ledger: PrivacyLedger | None) -> PrivacyLedger:
        """Return the ledger of the next release, or say why there is none."""
        if self._taken_over:
            raise PrivacyError(
                f"the rows of this {type(self).__name__} were taken over by merge; release the one that took them "
                "(it can take over later rows of this one too)"
            )
        if self._ledger is None:
            own = PrivacyLedger(self.terms.epsilon, self.terms.delta, neighbours=self.terms.neighbours)
            return own if ledger is None else ledger
        if ledger is not None and ledger is not self._ledger:
            raise PrivacyError(
                "these rows were released under another ledger before, and this one does not know of it; leave ledger "
                "out, or give the one that is this structure's ledger. Its enlarge() raises the budget"
            )
        return self._ledger

    def query(self, *_: Any, **__: Any) -> Any:
        """Refuse: exact sums are private."""
        raise PrivacyError(f"{type(self).__name__} answers nothing itself; release(ledger) gives an object that does")

    def __getstate__(self) -> Any:
        raise PrivacyError(
            f"{type(self).__name__} holds private sums and cannot be copied out; save what release() gives"
        )

    def _described(self, mechanism: Mechanism, terms: PrivacyTerms) -> dict[str, Any]:
        """Return what a release says about itself."""
        return {
            "epsilon": terms.epsilon,
            "delta": terms.delta,
            "neighbours": terms.neighbours,
            "mechanism": mechanism.kind,
            "discrete": mechanism.discrete,
            # In units of the contributions, as the released values are.
            "sensitivity": mechanism.sensitivity * self.grain,
            "scale": mechanism.scale * self.grain,
            "n_coords": mechanism.n_coords,
            "grain": self.grain,
            "rho": mechanism.rho,
            "status": INSECURE if self._noise.insecure else "private" if mechanism.discrete else UNSAFE,
        }


def _known(config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the columns of another where its own are not known yet."""
    return config | {"dim": other["dim"]} if "dim" in config and config["dim"] is None else config


class PublicRelease(ArrayFolder):
    """What a release gives: answers queries, is saved and loaded, says in ``privacy`` what it promises."""

    kind: ClassVar[str] = "private release"

    privacy: dict[str, Any]

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in a fixed direction of unit length, in units of the contributions."""
        return self._mechanism.std * float(self.privacy["grain"])

    @property
    def _mechanism(self) -> Mechanism:
        p = self.privacy
        return Mechanism(
            p["mechanism"], p["sensitivity"] / p["grain"], p["scale"] / p["grain"], p["n_coords"], p["neighbours"],
            p["discrete"],
        )  # fmt: skip

    def _check_contents(self) -> None:
        """Check that a file says what was promised, and that the noise it names gives it.

        How far one record moves the sums is taken from the file: load releases from those whom you believe.
        """
        if not isinstance(self.privacy, dict) or set(self.privacy) != _DESCRIPTION:
            raise FormatError(f"privacy must have {sorted(_DESCRIPTION)}; got {self.privacy!r}")
        p = self.privacy
        PrivacyTerms(p["epsilon"], p["delta"], p["neighbours"])
        check_float("noise_std", self.noise_std, low=0.0, open_low=True)
        held = self._mechanism
        if abs(held.rho - p["rho"]) > _ROUNDED * max(1.0, held.rho):
            raise FormatError(f"privacy says rho={p['rho']!r}; its noise gives {held.rho:.6g}")
        if held.epsilon(p["delta"]) > p["epsilon"] * (1 + _ROUNDED):
            raise FormatError(
                f"privacy promises epsilon={p['epsilon']:g}; its noise gives {held.epsilon(p['delta']):.4g}"
            )
        if p["status"] not in STATUSES or (p["status"] == "private" and not p["discrete"]):
            raise FormatError(f"privacy says status={p['status']!r}, which its mechanism is not")

    def __repr__(self) -> str:
        p = self.privacy
        return (
            f"{type(self).__name__}(epsilon={p['epsilon']:g}, delta={p['delta']:g}, neighbours={p['neighbours']!r}, "
            f"{p['status']})"
        )
