"""Ridge regression in one pass: the sums that decide it, mergeable over batches, workers and machines.

``NormalEquations`` keeps count, sum x, sum y, X^T X, X^T Y and sum y^2 in float64; ``solve`` gives
argmin ||X W^T + c - Y||^2 + lambda ||W||^2 with c unpenalised, and its training error, without the rows.
Cost: n p (p + q) multiply-adds, memory p (p + q) numbers, a Cholesky factorisation of p^3 / 3 a solve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float, check_int, check_type
from quernel.kernels.linalg import jittered_cholesky

# Rows of one float32 product before it is added in float64; larger blocks spend less time on adding p x p sums.
_BLOCK_ROWS = 1024
_SUMS = ("x", "y", "xx", "xy", "yy")


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """What a solve gives, float64.

    Attributes
    ----------
    weight : Tensor, shape (q, p)
        ``x @ weight.T + intercept`` predicts.
    intercept : Tensor, shape (q,)
        Zero without an intercept.
    relative_error : float
        ``||predictions - Y|| / ||Y||`` over the rows that were summed.
    """

    weight: Tensor
    intercept: Tensor
    relative_error: float


class NormalEquations:
    """Mergeable sums of rows (x, y) from which ridge regression is solved.

    Parameters
    ----------
    features, targets : int
        Sizes p and q of the last axes of x and y.
    compute_dtype : torch.float32 or torch.float64, default=torch.float32
        Precision of the products; float64 rows are always multiplied in float64. float32 multiplies blocks of
        1,024 rows and adds them in float64: relative error about 1e-6, twice as fast.
    device : torch.device or str, default="cpu"
        Where the sums are kept.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> sums = NormalEquations(1, 1)
    >>> sums.update(x, 3 * x + 1)
    >>> found = sums.solve(alpha=0.0)
    >>> round(found.weight.item(), 6), round(found.intercept.item(), 6)
    (3.0, 1.0)
    """

    def __init__(
        self,
        features: int,
        targets: int,
        *,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.features = check_int("features", features, low=1)
        self.targets = check_int("targets", targets, low=1)
        self.compute_dtype = check_choice("compute_dtype", compute_dtype, (torch.float32, torch.float64))
        self.count = 0
        shapes: dict[str, tuple[int, ...]] = {"x": (features,), "y": (targets,), "yy": (targets,)}
        shapes |= {"xx": (features, features), "xy": (features, targets)}
        self._sums = {n: torch.zeros(shapes[n], dtype=torch.float64, device=device) for n in _SUMS}

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take rows in: x (..., p), y (..., q), floating point and finite.

        Raises
        ------
        QuernelError
            If shapes do not fit or a value is not finite; nothing is taken in then.
        """
        rows, targets = _rows("x", x, self.features), _rows("y", y, self.targets)
        if rows.shape[0] != targets.shape[0]:
            raise QuernelError(f"x and y must have as many rows; got {tuple(x.shape)} and {tuple(y.shape)}")
        self.count += rows.shape[0]
        dtype = torch.promote_types(torch.promote_types(rows.dtype, targets.dtype), self.compute_dtype)
        for a, b in zip(rows.split(_BLOCK_ROWS), targets.split(_BLOCK_ROWS), strict=True):
            a, b = a.to(dtype), b.to(dtype)
            self._sums["x"] += a.sum(0)
            self._sums["y"] += b.sum(0)
            self._sums["xx"] += a.mT @ a
            self._sums["xy"] += a.mT @ b
            self._sums["yy"] += b.square().sum(0)

    def merge(self, other: NormalEquations) -> None:
        """Take everything in that ``other`` saw; both must describe the same features and targets."""
        check_type("other", other, NormalEquations)
        if (other.features, other.targets) != (self.features, self.targets):
            raise QuernelError(
                f"merge needs the same sizes: {self.features} features and {self.targets} targets here, "
                f"{other.features} and {other.targets} in other"
            )
        self.count += other.count
        for name, value in self._sums.items():
            value += other._sums[name].to(value)

    def solve(self, alpha: float = 1e-3, *, intercept: bool = True) -> LinearSolution:
        """Solve the ridge regression of all rows so far.

        Parameters
        ----------
        alpha : float, default=1e-3
            Regularisation relative to the mean diagonal of X^T X (about the mean with an intercept), >= 0.
        intercept : bool, default=True
            Whether a constant, which is not penalised, is fitted beside the weights.

        Raises
        ------
        QuernelError
            If no row was seen or ``alpha`` is negative.

        Warns
        -----
        JitterWarning
            If features are so dependent that ``alpha`` does not make the system definite.
        """
        check_float("alpha", alpha, low=0.0)
        if self.count == 0:
            raise QuernelError("the sums have seen no rows; call update() first")
        s = self._sums
        xx, xy, yy = (s["xx"] + s["xx"].mT) / 2, s["xy"], s["yy"]
        if intercept:
            mean_x, mean_y = s["x"] / self.count, s["y"] / self.count
            xx = xx - self.count * mean_x.outer(mean_x)
            xy = xy - self.count * mean_x.outer(mean_y)
            yy = (yy - self.count * mean_y.square()).clamp_min(0)
        diagonal = xx.diagonal().clamp_min(0).mean()
        # Features that never vary explain nothing; float64 sums of squares hold about 15 digits.
        if float(diagonal) <= 1e-14 * float(s["xx"].diagonal().mean()):
            weight = torch.zeros_like(xy)
        else:
            # On the diagonal itself: an identity of this size would be another p x p matrix.
            xx.diagonal().add_(alpha * diagonal)
            weight = torch.cholesky_solve(xy, jittered_cholesky(xx))
            xx.diagonal().sub_(alpha * diagonal)
        constant = s["y"] / self.count - weight.mT @ (s["x"] / self.count) if intercept else torch.zeros_like(yy)
        residual = float((yy - 2 * (weight * xy).sum(0) + (weight * (xx @ weight)).sum(0)).clamp_min(0).sum())
        total = float(s["yy"].sum())
        return LinearSolution(weight.mT.contiguous(), constant, (residual / total) ** 0.5 if total > 0 else 0.0)

    def state(self) -> dict[str, Tensor]:
        """Return the sums by name, and the count; ``from_state`` takes them back."""
        return {**self._sums, "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Self:
        """Rebuild the sums from ``state()``.

        Raises
        ------
        QuernelError
            If a sum is missing, of another shape, or not float64.
        """
        if set(state) != {*_SUMS, "count"}:
            raise QuernelError(f"state must hold {', '.join((*_SUMS, 'count'))}; got {', '.join(sorted(state))}")
        count = check_int("count", int(state["count"]), low=0)
        sums = cls(int(state["x"].numel()), int(state["y"].numel()))
        for name, own in sums._sums.items():
            if state[name].shape != own.shape or state[name].dtype != own.dtype:
                raise QuernelError(f"state[{name!r}] must be float64 of shape {tuple(own.shape)}; got {state[name]!r}")
            sums._sums[name] = state[name].clone()
        sums.count = count
        return sums


def _rows(name: str, value: Tensor, size: int) -> Tensor:
    check_type(name, value, Tensor)
    if value.ndim == 0 or value.shape[-1] != size or not value.is_floating_point():
        raise QuernelError(f"{name} must be floating point of shape (..., {size}); got {value.dtype}, {value.shape}")
    # A finite sum has finite terms, and costs a fraction of asking each; an infinite one may have overflowed.
    if not bool(value.detach().sum().isfinite()):
        check_finite(name, value)
    return value.detach().reshape(-1, size)
