"""``DropPath``: stochastic depth, a residual branch left out for whole samples while training (arXiv 1603.09382)."""

from __future__ import annotations

from torch import Tensor, nn

from quernel._validate import check_float


class DropPath(nn.Module):
    """Zero the branch of a sample with a probability and scale the others up, in training mode only.

    Parameters
    ----------
    p : float
        In [0, 1).
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = check_float("p", p, low=0.0, high=1.0, open_high=True)

    def forward(self, x: Tensor) -> Tensor:  # (B, ...) -> (B, ...)
        """Return x, or in training mode x with the branches of some samples zeroed."""
        if self.p == 0.0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}"
