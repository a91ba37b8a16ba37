"""``VariationalQuantumClassifier``: a trained circuit behind the feature map, its parity the label (arXiv 1804.11326).

p_y(x) = (1 + y <Phi(x)| W^+ f W |Phi(x)>) / 2 with f the parity of all qubits; y = 1 iff p_1 > p_-1 - b. The decision
is tr(O(theta) rho(x)) + b, linear in the features of the quantum kernel: on the training objective it cannot beat the
unconstrained optimum of that kernel. More than two classes are told apart one against the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from quernel._errors import QuernelError
from quernel._progress import Progress, check_progress
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels._random_features import Floats
from quernel.kernels.quantum._circuit import Circuit
from quernel.kernels.quantum._estimator import Labels, QuantumClassifier, difference_or_scores
from quernel.kernels.quantum._training import Problem, measured, train_adam, train_spsa
from quernel.kernels.quantum.feature_map import Entanglement, Interactions

OPTIMIZERS = ("adam", "spsa")
LOSSES = ("paper", "logistic")


def _example() -> dict[str, Any]:
    options: dict[str, Any] = {"scale": 0.1, "n_steps": 15, "learning_rate": 0.3, "n_restarts": 1, "random_state": 0}
    return {"make": lambda: VariationalQuantumClassifier(2, loss="logistic", **options)}


@register(
    "quantum-kernels",
    pillar="kernels",
    contract="estimator",
    paper="1804.11326",
    status="stable",
    headline=False,
    example=_example,
)
class VariationalQuantumClassifier(QuantumClassifier):
    """Classify by the parity of qubits behind a trained circuit.

    Parameters
    ----------
    depth : int, default=4
        Entangling layers l; the circuit has 2 n (l + 1) angles.
    optimizer : {"adam", "spsa"}, default="adam"
        Exact gradients of exact expectations, or the paper's simultaneous perturbation, which needs none.
    loss : {"paper", "logistic"}, default="paper"
        The paper's probability that the shots give the wrong label (200 shots where expectations are exact), or
        log(1 + exp(-5 y d)) of the decision d.
    shots : int, optional
        Measurements R an expectation, in training and in prediction, with "spsa" only; default is exact expectations.
    n_steps : int, default=250
    learning_rate : float, default=0.1
        Of Adam; falls along a cosine. SPSA finds its own.
    n_restarts : int, default=3
        Random beginnings; the one of least risk is kept.
    reps, entanglement, interactions, scale
        Of the ``QuantumFeatureMap``; the circuit couples the same qubits.
    rescale : bool, default=True
        Scale each column from its least and largest training value to [0, 2 pi].
    random_state : int, Generator or None, default=None

    Attributes
    ----------
    classes_ : array, shape (k,)
    low_, span_ : array, shape (n,)
    angles_ : array, shape (q, depth + 1, n, 2)
        Of the Y and Z rotations; q is 1 for two classes, else k.
    intercept_ : array, shape (q,)
        The bias b.
    risk_ : array, shape (q,)
        Empirical risk at the end of the training.

    Notes
    -----
    Time: O(N 2^n n (l + 1)) a step, or O(4^n n (l + 1) + N 4^n) where N is above 2^n; memory as many complex128 numbers
    a layer.

    References
    ----------
    Havlicek et al., "Supervised learning with quantum enhanced feature spaces", arXiv 1804.11326, 2018.

    Examples
    --------
    >>> from quernel.kernels.quantum import make_adhoc
    >>> x, y = make_adhoc(60, random_state=0)
    >>> model = VariationalQuantumClassifier(rescale=False, random_state=0).fit(x[:40], y[:40])
    >>> model.score(x[40:], y[40:]) > 0.9
    True
    """

    angles_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    risk_: NDArray[np.float64]

    _state: ClassVar[Mapping[str, str]] = {
        **QuantumClassifier._state,
        "angles_": "q layers d rotations",
        "intercept_": "q",
        "risk_": "q",
    }

    def __init__(
        self,
        depth: int = 4,
        *,
        optimizer: Literal["adam", "spsa"] = "adam",
        loss: Literal["paper", "logistic"] = "paper",
        shots: int | None = None,
        n_steps: int = 250,
        learning_rate: float = 0.1,
        n_restarts: int = 3,
        reps: int = 2,
        entanglement: Entanglement = "full",
        interactions: Interactions = "zz",
        scale: float = 1.0,
        rescale: bool = True,
        random_state: Seed = None,
    ) -> None:
        self.depth = depth
        self.optimizer = optimizer
        self.loss = loss
        self.shots = shots
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.n_restarts = n_restarts
        self.reps = reps
        self.entanglement = entanglement
        self.interactions = interactions
        self.scale = scale
        self.rescale = rescale
        self.random_state = random_state

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        super().check_params()
        check_int("depth", self.depth, low=0)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("loss", self.loss, LOSSES)
        check_int("n_steps", self.n_steps, low=1)
        check_float("learning_rate", self.learning_rate, low=0.0, open_low=True)
        check_int("n_restarts", self.n_restarts, low=1)
        if self.shots is not None and self.optimizer == "adam":
            raise QuernelError(
                f"shots={self.shots} needs optimizer='spsa': Adam follows gradients of exact expectations"
            )

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        k = len(self.classes_)
        wanted = (1 if k == 2 else k, self.depth + 1, self.low_.shape[0], 2)
        if self.angles_.shape != wanted:
            raise QuernelError(f"angles_ must have shape {wanted}; got {self.angles_.shape}")

    def fit(self, X: ArrayLike, y: ArrayLike, *, progress: Progress | None = None) -> Self:
        """Fit rows ``X``, shape (N, n), one qubit a column, to labels ``y``, shape (N,).

        ``progress(message, fraction)`` is called after every step.
        """
        check_progress(progress)
        x, places = self._training_rows(X, y)
        draw = generator(self.random_state, "random_state")
        k = len(self.classes_)
        sides = places == 1 if k == 2 else places == np.arange(k)[:, None]
        targets = torch.from_numpy(np.where(np.atleast_2d(sides), 1.0, -1.0)).repeat_interleave(self.n_restarts, 0)
        problem = Problem(self._circuit(x.shape[1]), self._states(x), targets, self.loss, self.shots, draw)
        start = draw.uniform(-math.pi, math.pi, (len(targets), self.depth + 1, x.shape[1], 2))
        if self.optimizer == "adam":
            trained = train_adam(problem, torch.from_numpy(start), self.n_steps, self.learning_rate, progress)
        else:
            trained = train_spsa(problem, torch.from_numpy(start), self.n_steps, progress)
        best = trained.best_of(self.n_restarts)
        self.angles_, self.intercept_, self.risk_ = (t.numpy() for t in (best.angles, best.biases, best.risks))
        return self

    def decision_function(self, X: ArrayLike) -> Floats:
        """Return expectation plus bias, shape (N,) for two classes, else one a class, shape (N, k)."""
        return difference_or_scores(self._scores(X))

    def predict(self, X: ArrayLike) -> Labels:
        """Return the class of the largest decision, shape (N,)."""
        scores = self._scores(X)
        return self.classes_[scores.argmax(1) if scores.shape[1] > 1 else (scores[:, 0] > 0).astype(int)]

    def predict_proba(self, X: ArrayLike) -> Floats:
        """Return probabilities, shape (N, k): (1 + y d) / 2, with decisions d that a bias moves scaled into [-1, 1]."""
        scores = self._scores(X)
        share = (1 + scores / (1 + np.abs(self.intercept_).max()).astype(scores.dtype)).clip(0.0, 2.0) / 2
        if share.shape[1] == 1:
            return np.concatenate((1 - share, share), axis=1)
        total = share.sum(1, keepdims=True)
        return np.where(total > 0, share / np.where(total > 0, total, 1), 1 / share.shape[1]).astype(scores.dtype)

    def _circuit(self, n_qubits: int) -> Circuit:
        return Circuit.of(n_qubits, self.entanglement)

    def _states(self, x: Floats) -> torch.Tensor:
        maps = self._map("complex128")
        return maps.states(maps.checked("X", x))

    def _scores(self, X: ArrayLike) -> Floats:
        x, dtype = self._rows(X)
        with torch.no_grad():
            found = self._circuit(x.shape[1]).expectations(self._states(x), torch.from_numpy(self.angles_))
            found = measured(found, self.shots, generator(self._seed_of_new_rows()))
        return cast(Floats, (found.numpy().T + self.intercept_).astype(dtype))
