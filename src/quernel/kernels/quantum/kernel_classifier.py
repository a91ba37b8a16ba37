"""``QuantumKernelClassifier``: a support vector machine on overlaps of quantum states (arXiv 1804.11326).

Columns are scaled to angles in [0, 2 pi], one qubit each; the kernel is computed exactly, or estimated by shots, and
the dual is solved by scikit-learn's ``SVC``. ``report_`` says what the kernel is worth beside a Gaussian one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_choice, check_float
from quernel.kernels._random_features import Floats
from quernel.kernels.psd import nearest_psd
from quernel.kernels.quantum._estimator import Labels, QuantumClassifier
from quernel.kernels.quantum.feature_map import Entanglement, Interactions
from quernel.kernels.quantum.geometry import KernelGeometry, kernel_geometry
from quernel.kernels.quantum.kernel import QuantumKernel, Repair, positive_projector, repaired

PRECISIONS = ("auto", "complex64", "complex128")
# Rows that the report looks at: its eigendecompositions would cost more than the machine beyond some hundreds.
_REPORTED_ROWS = 300


def _example() -> dict[str, Any]:
    return {"make": lambda: QuantumKernelClassifier(C=10.0, scale=0.3, random_state=0)}


@register(
    "quantum-kernels", pillar="kernels", contract="estimator", paper="1804.11326", status="stable", example=_example
)
class QuantumKernelClassifier(QuantumClassifier):
    """Classify by a support vector machine on the overlaps of quantum states.

    For data whose structure is that of the feature map; on ordinary tables a tuned ``SVC(kernel="rbf")`` usually wins,
    and ``report_.message`` says when no advantage can exist.

    Parameters
    ----------
    C : float, default=1.0
        Penalty of the support vector machine.
    reps, entanglement, interactions, scale
        Of the ``QuantumFeatureMap``; ``scale`` is the bandwidth, tune it first.
    rescale : bool, default=True
        Scale each column from its least and largest training value to [0, 2 pi]; new rows beyond that range by more
        than a quarter are warned about. If not, rows are angles already.
    precision : {"auto", "complex64", "complex128"}, default="auto"
        Of the states: "auto" is complex64 for float32 rows, else complex128.
    shots : int, optional
        Measurements an entry of the kernel, in ``fit`` and in ``predict``; default is the exact kernel.
    noise : float, default=0.0
        Depolarising share, see ``QuantumKernel``.
    psd : {"clip", "shift", "none"}, default="clip"
        Repair of an estimated kernel. After "clip" new rows are projected on the eigenvectors that are left.
    random_state : int, Generator or None, default=None
        Of the shots, and of the rows that the report looks at.

    Attributes
    ----------
    classes_ : array, shape (k,)
    low_, span_ : array, shape (n,)
        Least value and range of the columns.
    vectors_ : array, shape (m, n)
        Angles of the support vectors; of all rows if the kernel was repaired by projection.
    dual_coef_ : array, shape (k (k - 1) / 2, m)
        A decision of each pair of classes, positive for the second of the two.
    intercept_ : array, shape (k (k - 1) / 2,)
    report_ : KernelGeometry
        Of at most 300 training rows, against a Gaussian kernel of the same angles; ``save`` does not keep it.

    References
    ----------
    Havlicek et al., "Supervised learning with quantum enhanced feature spaces", arXiv 1804.11326, 2018.

    Examples
    --------
    >>> from quernel.kernels.quantum import make_adhoc
    >>> x, y = make_adhoc(60, random_state=0)
    >>> model = QuantumKernelClassifier(C=1e3, rescale=False).fit(x[:40], y[:40])
    >>> model.score(x[40:], y[40:]) > 0.9
    True
    """

    vectors_: Floats
    dual_coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    report_: KernelGeometry

    _state: ClassVar[Mapping[str, str]] = {
        **QuantumClassifier._state,
        "vectors_": "m d",
        "dual_coef_": "p m",
        "intercept_": "p",
    }

    def __init__(
        self,
        C: float = 1.0,
        *,
        reps: int = 2,
        entanglement: Entanglement = "full",
        interactions: Interactions = "zz",
        scale: float = 1.0,
        rescale: bool = True,
        precision: Literal["auto", "complex64", "complex128"] = "auto",
        shots: int | None = None,
        noise: float = 0.0,
        psd: Repair = "clip",
        random_state: Seed = None,
    ) -> None:
        self.C = C
        self.reps = reps
        self.entanglement = entanglement
        self.interactions = interactions
        self.scale = scale
        self.rescale = rescale
        self.precision = precision
        self.shots = shots
        self.noise = noise
        self.psd = psd
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        check_float("C", self.C, low=0.0, open_low=True)
        check_choice("precision", self.precision, PRECISIONS)
        self._kernel(np.dtype(np.float64), self.random_state)

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        if len(self.intercept_) != self._pairs:
            raise QuernelError(f"intercept_ must be {self._pairs} numbers for {len(self.classes_)} classes")

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit rows ``X``, shape (N, n), one qubit a column, to labels ``y``, shape (N,)."""
        x, places = self._training_rows(X, y)
        draw = generator(self.random_state, "random_state")
        measured = self._kernel(x.dtype, draw).estimate(x)
        k = measured if self.shots is None else repaired(measured, self.psd)
        # A seed only to keep it from drawing on the global generator: nothing random happens without probabilities.
        machine = SVC(C=self.C, kernel="precomputed", random_state=0).fit(k, places)
        self._take(x, machine, positive_projector(measured) if self.shots and self.psd == "clip" else None)
        self.report_ = self._reported(x, k, places, draw)
        return self

    def decision_function(self, X: ArrayLike) -> Floats:
        """Return decisions, shape (N,) for two classes, else votes of all pairs with their margins, shape (N, k)."""
        x, dtype = self._rows(X)
        k = self._kernel(x.dtype, self._seed_of_new_rows()).estimate(x, self.vectors_)
        pairwise = k.astype(np.float64) @ self.dual_coef_.T + self.intercept_
        scores = pairwise[:, 0] if len(self.classes_) == 2 else _votes(pairwise, len(self.classes_))
        return cast(Floats, scores.astype(dtype))

    def predict(self, X: ArrayLike) -> Labels:
        """Return the class of the largest decision, shape (N,)."""
        scores = self.decision_function(X)
        return self.classes_[scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(int)]

    def _kernel(self, dtype: np.dtype[Any], seed: Seed) -> QuantumKernel:
        own = "complex64" if dtype == np.float32 else "complex128"
        states = self._map(own if self.precision == "auto" else self.precision)
        return QuantumKernel(states, self.shots, self.noise, self.psd, seed)

    def _take(self, x: Floats, machine: SVC, projector: NDArray[np.float64] | None) -> None:
        held = np.zeros((self._pairs, len(x)))
        coef, starts = machine.dual_coef_, np.concatenate(([0], np.cumsum(machine.n_support_)))
        row = 0
        for i in range(len(self.classes_)):
            for j in range(i + 1, len(self.classes_)):
                # Row j - 1 holds a class's coefficients against a later class j, row i those against an earlier one.
                for one, against in ((i, j - 1), (j, i)):
                    part = slice(starts[one], starts[one + 1])
                    held[row, machine.support_[part]] = coef[against, part]
                row += 1
        # SVC's decisions are for the second of two classes, but for the first of a pair of several.
        sign = 1.0 if len(self.classes_) == 2 else -1.0
        self.intercept_ = sign * machine.intercept_
        if projector is None:
            self.vectors_, self.dual_coef_ = x[machine.support_], sign * held[:, machine.support_]
        else:
            self.vectors_, self.dual_coef_ = x, sign * held @ projector

    def _reported(self, x: Floats, k: Floats, places: NDArray[np.int64], draw: np.random.Generator) -> KernelGeometry:
        rows = np.arange(len(x)) if len(x) <= _REPORTED_ROWS else draw.choice(len(x), _REPORTED_ROWS, replace=False)
        if self.shots is not None and self.psd == "none":
            k = nearest_psd(k)
        spread = float(x[rows].var())
        gaussian = rbf_kernel(x[rows], gamma=1.0 / (x.shape[1] * spread) if spread > 0 else 1.0)
        return kernel_geometry(k[np.ix_(rows, rows)], gaussian, places[rows], n_qubits=x.shape[1])


def _votes(pairwise: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """pairwise: (N, pairs) -> (N, k): won pairs plus the summed margins, squeezed below a third of a vote."""
    margins, won = (np.zeros((len(pairwise), classes)) for _ in range(2))
    column = 0
    for i in range(classes):
        for j in range(i + 1, classes):
            decision = pairwise[:, column]
            margins[:, i] -= decision
            margins[:, j] += decision
            won[:, i] += decision <= 0
            won[:, j] += decision > 0
            column += 1
    return np.asarray(won + margins / (3 * (np.abs(margins) + 1)))
