"""``PrivacyLedger``: what has been released from a data set, and whether there is budget for more.

Mechanisms are stored, not numbers. Gaussian ones compose exactly (mu^2 adds up); pure ones enter as randomised response
of their epsilon; mixtures are composed by their privacy loss distributions with the package dp-accounting. The total is
never above the sum of the parts, which holds too.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quernel._errors import BudgetExceeded, MissingExtraError, PrivacyError, QuernelError
from quernel._validate import check_choice, check_float, check_type
from quernel.sketch.dp.calibration import gaussian_delta, gaussian_epsilon
from quernel.sketch.dp.mechanism import NEIGHBOURS, Mechanism, Neighbours

# Three thirds of a budget may be more than the whole by a few units in the last place.
_SLACK = 1e-12
_NOISE = tuple(field.name for field in fields(Mechanism))


@dataclass(frozen=True)
class Spending:
    """One release: what it was called, and its mechanism."""

    label: str
    mechanism: Mechanism


class PrivacyLedger:
    """The privacy budget of one data set.

    Parameters
    ----------
    epsilon : float
        > 0.
    delta : float, default=0.0
        In [0, 1).
    neighbours : {"add_remove", "replace"}, default="add_remove"
        The relation that all releases must be for.

    Notes
    -----
    One ledger belongs to one data set: also to its subsets, supersets and later versions, since a record may be in all
    of them. Safe to share between threads. It cannot be copied, since its budget would exist twice; ``to_json`` and
    ``from_json`` keep it from one process to the next, and ``enlarge`` raises the budget of the one there is. Sums of
    pure releases and of the mu^2 of Gaussian ones hold whatever later releases depend on; totals of both kinds together
    hold for releases that were planned beforehand, not for an epsilon that was chosen after looking at an answer.

    Examples
    --------
    >>> from quernel.sketch.dp import Mechanism
    >>> ledger = PrivacyLedger(1.0)
    >>> half = Mechanism("laplace", 1.0, 2.0, 1, "add_remove")
    >>> ledger.spend(half, "first").spend(half, "second").epsilon_spent
    1.0
    >>> ledger.can_afford(half)
    False
    """

    def __init__(self, epsilon: float, delta: float = 0.0, *, neighbours: Neighbours = "add_remove") -> None:
        self.epsilon = check_float("epsilon", epsilon, low=0.0, open_low=True)
        self.delta = check_float("delta", delta, low=0.0, high=1.0, open_high=True)
        self.neighbours: Neighbours = check_choice("neighbours", neighbours, NEIGHBOURS)
        self._spent: list[Spending] = []
        self._lock = threading.Lock()

    @property
    def spendings(self) -> tuple[Spending, ...]:
        """All releases so far."""
        return tuple(self._spent)

    @property
    def epsilon_spent(self) -> float:
        """Epsilon of all releases together, at the ledger's delta."""
        return total_epsilon([s.mechanism for s in self._spent], self.delta)

    @property
    def rho_spent(self) -> float:
        """Zero-concentrated privacy of all releases together; for the record, it decides nothing."""
        return math.fsum(s.mechanism.rho for s in self._spent)

    def can_afford(self, mechanism: Mechanism) -> bool:
        """Say whether one more release would stay within the budget."""
        self._check_relation(mechanism)
        return self._fits([*(s.mechanism for s in self._spent), mechanism])

    def spend(self, mechanism: Mechanism, label: str = "") -> PrivacyLedger:
        """Enter a release, before its noise is drawn; returns the ledger.

        Raises
        ------
        BudgetExceeded
            If the budget does not reach; then nothing was entered.
        PrivacyError
            If the release is for another relation of neighbours.
        """
        check_type("mechanism", mechanism, Mechanism)
        check_type("label", label, str)
        self._check_relation(mechanism)
        with self._lock:
            held = [s.mechanism for s in self._spent]
            if not self._fits([*held, mechanism]):
                if self.delta == 0 and mechanism.mu is not None:
                    raise BudgetExceeded(
                        f"{label or 'a release'} has Gaussian noise, which no epsilon covers at delta=0. Give the "
                        f"ledger a delta, e.g. PrivacyLedger({self.epsilon:g}, 1e-6), or the structure delta=0"
                    )
                raise BudgetExceeded(
                    f"{label or 'a release'} needs epsilon={mechanism.epsilon(self.delta):.4g} (delta={self.delta:g}); "
                    f"of the budget epsilon={self.epsilon:g}, {total_epsilon(held, self.delta):.4g} is spent on "
                    f"{len(held)} releases. Releases of one data set add up: ask for less, or accept a larger "
                    "budget with ledger.enlarge(epsilon=...)"
                )
            self._spent.append(Spending(label, mechanism))
        return self

    def enlarge(self, epsilon: float | None = None, delta: float | None = None) -> PrivacyLedger:
        """Accept a larger budget; returns the ledger, in which what is spent stays spent.

        Parameters
        ----------
        epsilon, delta : float, optional
            At least what they were.
        """
        with self._lock:
            epsilon = self.epsilon if epsilon is None else check_float("epsilon", epsilon, low=self.epsilon)
            if delta is not None:
                self.delta = check_float("delta", delta, low=self.delta, high=1.0, open_high=True)
            self.epsilon = epsilon
        return self

    def to_json(self) -> dict[str, Any]:
        """Return budget and releases as JSON values."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "neighbours": self.neighbours,
            "epsilon_spent": self.epsilon_spent,
            "rho_spent": self.rho_spent,
            "releases": [{"label": s.label, **s.mechanism.to_json()} for s in self._spent],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PrivacyLedger:
        """Build a ledger from ``to_json``; what is spent stays spent.

        Raises
        ------
        QuernelError
            If fields are missing, wrong or beyond the budget.
        """
        _check_fields("value", value, ("epsilon", "delta", "neighbours", "releases"))
        ledger = cls(value["epsilon"], value["delta"], neighbours=value["neighbours"])
        for release in check_type("releases", value["releases"], list):
            _check_fields("releases", release, ("label", *_NOISE))
            mechanism = Mechanism(**{name: release[name] for name in _NOISE})
            ledger._check_relation(mechanism)
            ledger._spent.append(Spending(check_type("label", release["label"], str), mechanism))
        if ledger._spent and not ledger._fits([s.mechanism for s in ledger._spent]):
            raise BudgetExceeded(
                f"releases of value need epsilon={ledger.epsilon_spent:.4g}, more than its budget {ledger.epsilon:g}"
            )
        return ledger

    def __getstate__(self) -> Any:
        raise PrivacyError("a ledger cannot be copied or pickled: its budget would exist twice. Use to_json()")

    def __repr__(self) -> str:
        return (
            f"PrivacyLedger(epsilon={self.epsilon:g}, delta={self.delta:g}, neighbours={self.neighbours!r}, "
            f"spent={self.epsilon_spent:.4g} on {len(self._spent)} releases)"
        )

    def _check_relation(self, mechanism: Mechanism) -> None:
        if mechanism.neighbours != self.neighbours:
            raise PrivacyError(
                f"the release is for neighbours={mechanism.neighbours!r}, the ledger for {self.neighbours!r}; "
                "guarantees for different relations do not add up. Build both for the same one"
            )

    def _fits(self, mechanisms: Sequence[Mechanism]) -> bool:
        if self.delta == 0:
            mu, pure = _parts(mechanisms)
            return mu == 0 and math.fsum(pure) <= self.epsilon * (1 + _SLACK)
        return total_delta(mechanisms, self.epsilon * (1 + _SLACK)) <= self.delta


def _check_fields(name: str, value: Any, needed: Sequence[str]) -> None:
    """Raise unless a mapping holds what is needed."""
    lacking = [field for field in needed if field not in check_type(name, value, Mapping)]
    if lacking:
        raise QuernelError(f"{name} must be what to_json gives; it lacks {', '.join(lacking)}")


def total_delta(mechanisms: Sequence[Mechanism], epsilon: float) -> float:
    """Return the delta of several releases together at an epsilon."""
    mu, pure = _parts(mechanisms)
    spent = math.fsum(pure)
    added = gaussian_delta(mu, epsilon - spent) if spent <= epsilon else 1.0
    # With one kind alone the sum of parts is exact, or says that delta = 0 is reached.
    if added == 0 or not pure or (mu == 0 and len(pure) == 1):
        return added
    return min(added, float(_distribution(mu, pure).get_delta_for_epsilon(epsilon)))


def total_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return the epsilon of several releases together at a delta."""
    mu, pure = _parts(mechanisms)
    added = math.fsum(pure) + gaussian_epsilon(mu, delta)
    if not pure or delta == 0 or (mu == 0 and len(pure) == 1):
        return added
    return min(added, float(_distribution(mu, pure).get_epsilon_for_delta(delta)))


def _parts(mechanisms: Sequence[Mechanism]) -> tuple[float, list[float]]:
    """Return mu of the Gaussian releases together, and the epsilons of the others."""
    mus = [m.mu for m in mechanisms if m.mu is not None]
    return math.sqrt(math.fsum(mu**2 for mu in mus)), [m.pure_epsilon for m in mechanisms if m.pure_epsilon is not None]


def _distribution(mu: float, pure: Sequence[float]) -> Any:
    """Return the privacy loss distribution of the composition, rounded towards less privacy."""
    try:
        losses = importlib.import_module("dp_accounting.pld.privacy_loss_distribution")
        common = importlib.import_module("dp_accounting.pld.common")
    except ImportError as error:
        raise MissingExtraError("composing releases of different kinds (dp-accounting)", "dp") from error
    # Each epsilon is rounded up to a multiple of the step: a thousandth of the smallest keeps the total within 0.1 %.
    step = min(1e-4, min(pure) / 1000)
    held = [
        losses.from_privacy_parameters(common.DifferentialPrivacyParameters(epsilon, 0.0), step) for epsilon in pure
    ]
    if mu > 0:
        held.append(losses.from_gaussian_mechanism(1 / mu, value_discretization_interval=step))
    total = held[0]
    for each in held[1:]:
        total = total.compose(each)
    return total
