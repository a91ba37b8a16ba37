"""``PrivacyTerms``: what a private structure promises, said once, in its constructor."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from quernel._errors import PrivacyError
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.sketch.dp.mechanism import KINDS, NEIGHBOURS, Mechanism, Neighbours, Sensitivity, calibrate


@dataclass(frozen=True)
class PrivacyTerms:
    """Epsilon, delta, what neighbours are, and how noise is made.

    Parameters
    ----------
    epsilon : float, default=1.0
        > 0.
    delta : float, default=0.0
        In [0, 1).
    neighbours : {"add_remove", "replace"}, default="add_remove"
        One record more or less (their number is private), or one exchanged (it is public).
    mechanism : {"auto", "gaussian", "laplace", "l2gamma"}, default="auto"
    unsafe_float : bool, default=False
        See ``calibrate``.
    insecure_noise_seed : int, optional
        For tests: noise that can be drawn again, and a release that says INSECURE.
    """

    epsilon: float = 1.0
    delta: float = 0.0
    neighbours: Neighbours = "add_remove"
    mechanism: str = "auto"
    unsafe_float: bool = False
    insecure_noise_seed: int | None = None

    def __post_init__(self) -> None:
        check_float("epsilon", self.epsilon, low=0.0, open_low=True)
        check_float("delta", self.delta, low=0.0, high=1.0, open_high=True)
        check_choice("neighbours", self.neighbours, NEIGHBOURS)
        check_choice("mechanism", self.mechanism, ("auto", *KINDS))
        check_bool("unsafe_float", self.unsafe_float)
        if self.insecure_noise_seed is not None:
            check_int("insecure_noise_seed", self.insecure_noise_seed, low=0)
        if self.mechanism == "gaussian" and self.delta == 0:
            raise PrivacyError('mechanism="gaussian" needs delta > 0; with delta=0 take "laplace" or "auto"')
        if self.mechanism == "l2gamma" and not self.unsafe_float:
            raise PrivacyError('mechanism="l2gamma" has no lattice form; it needs unsafe_float=True')

    def calibrated(self, sensitivity: Sensitivity) -> Mechanism:
        """Return the mechanism that keeps these terms."""
        return calibrate(sensitivity, self.epsilon, self.delta, kind=self.mechanism, unsafe_float=self.unsafe_float)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)
