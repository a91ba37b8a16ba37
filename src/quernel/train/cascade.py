"""``CascadeClassifier``: classify with as few dimensions as an input needs (arXiv 2205.13147, adaptive classification).

For m in increasing order: predict with classifier m, stop if its largest softmax output is at least t_m.  The
thresholds minimise the expected dimension on a validation set at an accuracy near that of the last classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_finite, check_float, check_int, check_type
from quernel.nn import MatryoshkaHead

# A threshold that no softmax output reaches.
NEVER = 2.0
# Prices of an error that are tried, from one dimension a sample up to all dimensions of all samples.
_PRICES = 60
_SWEEPS = 20


@register("matryoshka", pillar="train", contract="trainer", paper="2205.13147", status="stable", headline=False)
class CascadeClassifier:
    """Stop at the first nested classifier that is sure enough.

    Parameters
    ----------
    head : MatryoshkaHead
        Trained; used as it is.
    thresholds : sequence of float, optional
        A threshold for each of ``head.dims`` but the last, whose classifier always answers; default above 1, which is
        the whole head for every input. ``calibrate`` finds them.

    Attributes
    ----------
    thresholds_ : tuple of float
    expected_dim_ : float
        Mean dimension on the data of ``calibrate``; there is none before.
    accuracy_ : float
        Share of right answers there.

    References
    ----------
    Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, 2022, section 4.2.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import MatryoshkaHead
    >>> head, z = MatryoshkaHead(16, 3, dims=(2, 4, 16)), torch.randn(100, 16)
    >>> cascade = CascadeClassifier(head).calibrate(z, head.eval()(z).argmax(1), max_drop=0.05)
    >>> labels, dims = cascade.predict(z, return_dims=True)
    >>> bool(cascade.accuracy_ >= 0.95), set(dims.tolist()) <= {2, 4, 16}
    (True, True)
    """

    expected_dim_: float
    accuracy_: float

    def __init__(self, head: MatryoshkaHead, thresholds: Sequence[float] | None = None) -> None:
        self.head = check_type("head", head, MatryoshkaHead)
        early = len(head.dims) - 1
        given = (NEVER,) * early if thresholds is None else tuple(thresholds)
        if len(given) != early:
            raise QuernelError(f"thresholds must be {early} numbers, one for each of dims but the last; got {given}")
        self.thresholds_ = tuple(check_float("thresholds", t, low=0.0) for t in given)

    def calibrate(self, X: Any, y: Any, *, max_drop: float = 0.003, n_grid: int = 100) -> Self:
        """Choose the thresholds on data that the head was not trained on.

        Parameters
        ----------
        X : array or Tensor, shape (n, d)
            Representations of a validation set. Never those that the result is judged on.
        y : array or Tensor, shape (n,), integer
            Their classes.
        max_drop : float, default=0.003
            Accuracy that may be lost against the last classifier, in [0, 1].
        n_grid : int, default=100
            Thresholds tried for each classifier: quantiles of its largest softmax outputs.

        Returns
        -------
        self

        Notes
        -----
        Minimises E[dimension] + price * E[error] one threshold after the other until nothing changes, for prices on a
        grid, takes the smallest expected dimension that keeps the accuracy, and lowers it by single changes.
        """
        max_drop = check_float("max_drop", max_drop, low=0.0, high=1.0)
        n_grid = check_int("n_grid", n_grid, low=2)
        z = self._representations(X)
        labels = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
        if labels.shape != (len(z),) or labels.dtype.kind not in "iu" or not len(z):
            raise QuernelError(f"y must be {len(z)} integers, n > 0; got {labels.dtype} of shape {labels.shape}")
        sure, guesses = (np.stack(parts) for parts in zip(*(self._sure(z, m) for m in self.head.dims), strict=True))
        problem = _Thresholds(sure, guesses != labels, np.array(self.head.dims, float), n_grid)
        allowed = float((guesses[-1] != labels).mean()) + max_drop
        chosen, self.expected_dim_, error = problem.cheapest(allowed)
        self.thresholds_, self.accuracy_ = tuple(chosen.tolist()), 1.0 - error
        return self

    def predict(self, X: Any, *, return_dims: bool = False) -> Any:
        """Return the class of each input, and with ``return_dims`` how many dimensions it took.

        Parameters
        ----------
        X : array or Tensor, shape (n, d)
        return_dims : bool, default=False

        Returns
        -------
        labels : array or Tensor, shape (n,), int64
            What ``X`` was.
        dims : array or Tensor, shape (n,), int64
            Only with ``return_dims``.
        """
        z = self._representations(X)
        labels = torch.empty(len(z), dtype=torch.int64, device=z.device)
        used = torch.empty_like(labels)
        left = torch.arange(len(z), device=z.device)
        for m, threshold in zip(self.head.dims, (*self.thresholds_, 0.0), strict=True):
            largest, guesses = self._largest(z[left], m)
            done = largest >= threshold if m != self.head.dims[-1] else torch.ones_like(guesses, dtype=torch.bool)
            labels[left[done]], used[left[done]] = guesses[done], m
            left = left[~done]
        if isinstance(X, Tensor):
            return (labels, used) if return_dims else labels
        found = labels.cpu().numpy()
        return (found, used.cpu().numpy()) if return_dims else found

    def _representations(self, X: Any) -> Tensor:
        weight = self.head.weights[0]
        z = torch.as_tensor(X.detach() if isinstance(X, Tensor) else np.asarray(X)).to(weight.device, weight.dtype)
        if z.ndim != 2 or z.shape[1] != self.head.in_features:
            raise QuernelError(f"X must have shape (n, {self.head.in_features}); got {tuple(z.shape)}")
        check_finite("X", z)
        return z

    @torch.no_grad()
    def _largest(self, z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        logits: Any = self.head(z, dim=dim)
        found = logits.float().softmax(-1).max(-1)
        return found.values, found.indices

    def _sure(self, z: Tensor, dim: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        largest, guesses = self._largest(z, dim)
        return largest.cpu().numpy(), guesses.cpu().numpy()


class _Thresholds:
    """The choice of thresholds as numbers: sure (G, n), wrong (G, n), dims (G,)."""

    def __init__(self, sure: NDArray[Any], wrong: NDArray[Any], dims: NDArray[Any], n_grid: int) -> None:
        self.sure, self.wrong, self.dims = sure, wrong, dims
        shares = np.linspace(0, 1, n_grid)
        self.grids = [np.append(np.unique(np.quantile(row, shares, method="lower")), NEVER) for row in sure[:-1]]

    def exits(self, thresholds: NDArray[Any]) -> NDArray[np.int64]:
        """Return at which classifier each sample stops."""
        stops = np.vstack([self.sure[:-1] >= thresholds[:, None], np.ones((1, self.sure.shape[1]), bool)])
        return stops.argmax(0)

    def measured(self, thresholds: NDArray[Any]) -> tuple[float, float]:
        """Return expected dimension and error."""
        stops = self.exits(thresholds)
        return float(self.dims[stops].mean()), float(self.wrong[stops, np.arange(len(stops))].mean())

    def cheapest(self, allowed: float) -> tuple[NDArray[Any], float, float]:
        """Return thresholds of the smallest expected dimension at an error of at most ``allowed``, and both figures."""
        start = np.full(len(self.dims) - 1, NEVER)
        best = (start, *self.measured(start))
        for price in np.geomspace(1.0, self.dims[-1] * self.sure.shape[1], _PRICES):
            thresholds = self.optimum(start, float(price))
            dim, error = self.measured(thresholds)
            if error <= allowed and (dim, error) < best[1:]:
                best = (thresholds, dim, error)
        return self.polished(*best, allowed)

    def polished(
        self, thresholds: NDArray[Any], dim: float, error: float, allowed: float
    ) -> tuple[NDArray[Any], float, float]:
        """Change single thresholds while that takes fewer dimensions: prices reach only corners of the trade-off."""
        for _ in range(_SWEEPS):
            before = dim
            for stage, grid in enumerate(self.grids):
                for value in grid:
                    tried = thresholds.copy()
                    tried[stage] = value
                    found = self.measured(tried)
                    if found[1] <= allowed and found[0] < dim:
                        thresholds, (dim, error) = tried, found
            if dim == before:
                break
        return thresholds, dim, error

    def optimum(self, thresholds: NDArray[Any], price: float) -> NDArray[Any]:
        """Return thresholds that no change of a single one makes cheaper."""
        thresholds = thresholds.copy()
        for _ in range(_SWEEPS):
            before = thresholds.copy()
            for stage in range(len(thresholds) - 1, -1, -1):
                thresholds[stage] = self._best_of(stage, thresholds, price)
            if np.array_equal(before, thresholds):
                break
        return thresholds

    def _best_of(self, stage: int, thresholds: NDArray[Any], price: float) -> float:
        cost = self.dims[:, None] + price * self.wrong
        reach = (self.sure[:stage] < thresholds[:stage, None]).all(0)
        later = thresholds.copy()
        later[: stage + 1] = NEVER
        on = cost[self.exits(later), np.arange(cost.shape[1])]
        gains = np.where(reach, on - cost[stage], 0.0)
        # Gain of stopping here with each threshold: sums from the surest sample down.
        order = np.argsort(-self.sure[stage], kind="stable")
        sums = np.concatenate([[0.0], np.cumsum(gains[order])])
        counts = np.searchsorted(-self.sure[stage][order], -self.grids[stage], side="right")
        return float(self.grids[stage][::-1][np.argmax(sums[counts][::-1])])
