"""``gaussian_kernel``: exp(-||x - y||^2 / 2) between rows of two tensors, its matrix formed once and in place.

||x - y||^2 = ||x||^2 + ||y||^2 - 2 x.y, not below 0 whatever rounding does.  With K the matrix and G the gradient of K
times K itself, the gradient of x is G y - (G 1) x, and that of y is G^T x - (G^T 1) y: nothing but K is kept for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the Gaussian kernel of width 1 between all rows.

    Parameters
    ----------
    x : Tensor, shape (*batch, n, d)
    y : Tensor, shape (*batch, m, d)
        Divide both by the width you want; half precision is taken to float32.

    Returns
    -------
    k : Tensor, shape (*batch, n, m)
        In (0, 1]; float32, or float64 for float64 inputs.

    Raises
    ------
    QuernelError
        If the shapes do not fit.

    Examples
    --------
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> gaussian_kernel(x, x).round(decimals=4)
    tensor([[1.0000, 0.3679],
            [0.3679, 1.0000]])
    """
    if x.ndim < 2 or x.ndim != y.ndim or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise QuernelError(
            f"x and y must be (*batch, n, d) and (*batch, m, d); got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    wide = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    x, y = x.to(wide), y.to(wide)
    if x is y:
        # torch.compile traces no function of its own that gets one tensor twice.
        y = y.view_as(y)
    result: Tensor = _GaussianKernel.apply(x, y)  # type: ignore[no-untyped-call]
    return result


class _GaussianKernel(torch.autograd.Function):
    """Three passes over the matrix forward and one product more backward."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        """Form the matrix in one buffer: a product, then what is left of the distance, then its exponential."""
        k = x @ y.mT
        k -= 0.5 * x.square().sum(-1, keepdim=True)
        k -= 0.5 * y.square().sum(-1)[..., None, :]
        return k.clamp_(max=0.0).exp_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep both inputs and the matrix."""
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and y."""
        x, y, k = ctx.saved_tensors
        g = grads[0] * k
        return g @ y - g.sum(-1, keepdim=True) * x, g.mT @ x - g.sum(-2)[..., None] * y
