"""Representer sketches as scikit-learn estimators: trained anchors, counted into a table, read by look-ups.

``RepresenterRegressor`` fits an ``LSHKernelMachine`` to rows and targets (the logits of a teacher, say), sketches it
and tunes the table; ``RepresenterClassifier`` does the same with labels and cross-entropy (arXiv 2106.11426). What is
kept is a projection, a table and a seed: p d + L R C numbers, whatever the number of rows and anchors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int
from quernel.hashing._fused_cells import Projection
from quernel.kernels._machine_training import Loss, Settings, train_machine
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels._sketched_machine import STORED, Cells, Predictor, round_table, sketch_machine, tune_table
from quernel.kernels.lsh_kernel_machine import ScoreClassifier, ScoreRegressor


def _example_with(cls: type[_Representer]) -> dict[str, Any]:
    def make() -> _Representer:
        return cls(100, 8, n_anchors=40, proj_dim=6, n_steps=150, learning_rate=2e-2, random_state=0)

    return {"make": make}


class _Representer(SavedEstimator, BaseEstimator):
    """Parameters, training and look-ups: what both kinds of target share."""

    projection_: NDArray[np.float32]
    shift_: NDArray[np.float32]
    table_: NDArray[Any]
    scale_: NDArray[np.float32]
    intercept_: NDArray[np.float32]
    hash_seed_: int

    _state: ClassVar[Mapping[str, str]] = {
        "projection_": "p d",
        "shift_": "p",
        "table_": "l r q",
        "scale_": "l",
        "intercept_": "q",
        "hash_seed_": "int",
    }

    def __init__(
        self,
        n_rows: int = 400,
        n_cells: int | None = 16,
        *,
        n_anchors: int = 500,
        proj_dim: int = 16,
        kernel: Literal["l2", "l1", "angular"] = "l2",
        width: float = 4.0,
        n_concat: int = 2,
        l1: float = 1e-4,
        directions: Literal["gaussian", "rademacher", "sparse"] = "gaussian",
        n_steps: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 5e-3,
        finetune_epochs: int = 2,
        finetune_rate: float = 0.02,
        bits: Literal[32, 16, 8] = 16,
        random_state: Seed = None,
    ) -> None:
        self.n_rows = n_rows
        self.n_cells = n_cells
        self.n_anchors = n_anchors
        self.proj_dim = proj_dim
        self.kernel = kernel
        self.width = width
        self.n_concat = n_concat
        self.l1 = l1
        self.directions = directions
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.finetune_epochs = finetune_epochs
        self.finetune_rate = finetune_rate
        self.bits = bits
        self.random_state = random_state

    @property
    def settings(self) -> Settings:
        """The parameters of the kernel machine and its training, checked."""
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    @property
    def nbytes(self) -> int:
        """Bytes of the fitted arrays: all that inference needs besides the seed."""
        held = (self.projection_, self.shift_, self.table_, self.intercept_)
        return sum(array.nbytes for array in held) + (self.scale_.nbytes if self.bits < 32 else 0)

    def predictor(self) -> Predictor:
        """Return a function of rows (n, d) to scores (n, q) without scikit-learn's checks: microseconds a row."""
        check_is_fitted(self)
        cells = self._cells(self.hash_seed_)
        return Predictor(cells, self.projection_, self.shift_, self.table_, self.scale_, self.intercept_)

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        _ = self._cells(0)
        check_int("finetune_epochs", self.finetune_epochs, low=0)
        check_float("finetune_rate", self.finetune_rate, low=0.0, open_low=True)
        check_choice("bits", self.bits, tuple(STORED))
        generator(self.random_state, "random_state")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        cells = self._cells(check_int("hash_seed_", self.hash_seed_, low=0, high=2**63 - 1))
        stored = str(STORED[self.bits]).removeprefix("torch.")
        wanted = (cells.n_rows, cells.n_codes, len(self.intercept_))
        if self.table_.shape != wanted or self.table_.dtype != stored or len(self.projection_) != self.proj_dim:
            raise QuernelError(f"table_ must be {stored} of shape {wanted}, projection_ have {self.proj_dim} rows")
        floats = (self.projection_, self.shift_, self.scale_, self.intercept_)
        if any(array.dtype != np.float32 for array in floats):
            raise QuernelError("projection_, shift_, scale_ and intercept_ must be float32")

    def _cells(self, seed: int) -> Cells:
        return Cells.of(self.settings, self.n_rows, self.n_cells, self.directions, seed)

    def _train(self, x: Floats, y: NDArray[Any], loss: Loss) -> None:
        draw = generator(self.random_state, "random_state")
        self.hash_seed_ = int(draw.integers(2**63))
        cells = self._cells(self.hash_seed_)
        # Tables are float32, whatever the rows are.
        y = y.astype(np.float32) if loss == "squared" else y
        rows, targets = torch.from_numpy(np.array(x, np.float32)), torch.from_numpy(np.ascontiguousarray(y))
        machine = train_machine(rows, targets, self.settings, draw, loss)
        self.projection_, self.shift_ = machine.projection.numpy(), machine.shift.numpy()
        before = Projection.of(self.projection_, self.shift_)
        table = tune_table(
            sketch_machine(machine, cells),
            rows,
            targets,
            before,
            cells,
            draw,
            epochs=self.finetune_epochs,
            batch_size=self.batch_size,
            learning_rate=self.finetune_rate,
            loss=loss,
        )
        values, scale = (
            (table.values, torch.ones(cells.n_rows)) if self.bits == 32 else round_table(table.values, self.bits)
        )
        self.table_, self.scale_, self.intercept_ = values.numpy(), scale.numpy(), table.intercept.numpy()

    def _scores(self, X: ArrayLike) -> Floats:
        check_is_fitted(self)
        x = validate_data(self, X, dtype=FLOATS, reset=False)
        return self.predictor()(x).astype(x.dtype, copy=False)


@register(
    "representer-sketch",
    pillar="sketch",
    contract="estimator",
    paper="2106.11426",
    status="experimental",
    headline=False,
    example=lambda: _example_with(RepresenterRegressor),
)
class RepresenterRegressor(ScoreRegressor, _Representer):
    """Regression that is answered by a few hundred array look-ups.

    Parameters
    ----------
    n_rows : int, default=400
        Rows L of the table: look-ups an answer.
    n_cells : int or None, default=16
        Cells R of a row; None with ``kernel="angular"`` for 2^K.
    n_anchors, proj_dim, kernel, width, n_concat, l1, n_steps, batch_size, learning_rate
        Of the kernel machine that is sketched, see ``quernel.kernels.LSHKernelMachine``.
    directions : {"gaussian", "rademacher", "sparse"}, default="gaussian"
        Of the hashes.
    finetune_epochs : int, default=2
        Passes over the rows that train the table, hashes fixed.
    finetune_rate : float, default=0.02
        How far an answer may move in a step of that, in standard deviations of the targets.
    bits : {32, 16, 8}, default=16
        Of the numbers in the table.
    random_state : int, Generator or None, default=None

    Attributes
    ----------
    projection_, shift_ : array, shapes (p, d) and (p,)
    table_ : array, shape (L, R, q)
    scale_ : array, shape (L,)
        What the numbers of a row are multiplied by.
    intercept_ : array, shape (q,)
    hash_seed_ : int

    References
    ----------
    Coleman et al., "Efficient Inference via Universal LSH Kernel", arXiv 2106.11426, 2021.

    Examples
    --------
    >>> x = np.random.default_rng(0).uniform(-1, 1, (2000, 2))
    >>> y = np.sin(3 * x[:, 0]) + x[:, 1] ** 2
    >>> model = RepresenterRegressor(200, n_anchors=100, proj_dim=4, n_steps=500, random_state=0).fit(x, y)
    >>> model.score(x, y) > 0.9, model.nbytes
    (True, 7252)
    """

    _state: ClassVar[Mapping[str, str]] = {**_Representer._state, "single_target_": "flag"}


@register(
    "representer-sketch",
    pillar="sketch",
    contract="estimator",
    paper="2106.11426",
    status="experimental",
    headline=False,
    example=lambda: _example_with(RepresenterClassifier),
)
class RepresenterClassifier(ScoreClassifier, _Representer):
    """Classification that is answered by a few hundred array look-ups, one score a class.

    Parameters
    ----------
    n_rows, n_cells, n_anchors, proj_dim, kernel, width, n_concat, l1, directions, n_steps, batch_size, learning_rate,
    finetune_epochs, finetune_rate, bits, random_state
        As for ``RepresenterRegressor``.

    Attributes
    ----------
    classes_ : array, shape (q,)
    projection_, shift_, table_, scale_, intercept_, hash_seed_
        As for ``RepresenterRegressor``.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> RepresenterClassifier(200, n_anchors=40, proj_dim=4, n_steps=300, random_state=0).fit(x, y).score(x, y) > 0.9
    True
    """

    _state: ClassVar[Mapping[str, str]] = {**_Representer._state, "classes_": "labels q"}
