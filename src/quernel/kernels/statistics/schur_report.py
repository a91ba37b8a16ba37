"""``SchurReport``: what ``SchurEntropy`` found, and S of one matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quernel.kernels.psd import psd_eigenvalues, spectral_entropy
from quernel.kernels.statistics.intervals import Interval

_MOST_ROUNDING = 1e-6


@dataclass(frozen=True)
class SchurReport:
    """What ``SchurEntropy.compute`` found. "Text" is the side that explains, "image" the side that is explained.

    Attributes
    ----------
    sce_image, sce_text : float
        S of what the prompts do not explain, and of what they do, in nats.
    score : float
        exp(sce_image), the published score; 1 where nothing was added.
    tau : float
        Share of the second moments that the prompts do not explain, in [0, 1]; sce_image is tau times an entropy.
    entropy_total, vendi : float
        S of all images, and its exponential: their diversity without regard to prompts.
    dof : float
        Effective degrees of freedom of the regression, a pair. Near 1 it explains anything.
    n_pairs : int
    eta, order : float
        Ridge and order of the entropy that were used.
    n_features : tuple of int, or None
        Sizes of both feature spaces; None for an exact kernel.
    form : {"features", "pairs"}
        Which of the two forms was computed.
    ci, ci_text : Interval or None
        Bootstrap intervals of ``sce_image`` and ``sce_text``.
    cross_fitted : float or None
        S of residuals whose regressions did not see them. Not part of an exact split: it counts what the prompts
        should have explained and did not, so it is larger where the regression is fitted to few pairs.
    """

    sce_image: float
    sce_text: float
    score: float
    tau: float
    entropy_total: float
    vendi: float
    dof: float
    n_pairs: int
    eta: float
    order: float
    n_features: tuple[int, int] | None
    form: Literal["features", "pairs"]
    ci: Interval | None = None
    ci_text: Interval | None = None
    cross_fitted: float | None = None

    @property
    def entropy_image(self) -> float:
        """Entropy of the residual's spectrum scaled to sum to 1: how it is spread, however little there is of it."""
        return self.sce_image / self.tau if self.tau > 0 else 0.0

    @property
    def entropy_text(self) -> float:
        """The same of what is explained."""
        return self.sce_text / (1 - self.tau) if self.tau < 1 else 0.0


def entropy(matrix: Tensor, order: float) -> tuple[float, float]:
    """Return S of a matrix whose trace is a part of 1, and the trace."""
    tau = max(float(matrix.trace()), 0.0)
    if order == 2.0:
        # sum l^2 is the squared Frobenius norm.
        square = float(matrix.square().sum())
        return (tau * math.log(tau**2 / square) if tau > 0 and square > 0 else 0.0), tau
    # Rounding of C_TT is divided by 4 eta at worst, so a tiny ridge leaves negative eigenvalues; orders below 1 would
    # count what it leaves of those that are 0.
    values = psd_eigenvalues(matrix, rounding=_MOST_ROUNDING)
    values = torch.where(values > len(values) * torch.finfo(values.dtype).eps, values, 0.0)
    return float(spectral_entropy(values, order)), tau
