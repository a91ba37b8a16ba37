"""Fold an evaluation-mode batch norm into the convolution or linear layer before it.

BN(W x + b) = a (W x + b - mean) + shift with a = gain / sqrt(var + eps) is again affine, so
W' = a W (row by row) and b' = a (b - mean) + shift compute it in one layer.  Exact up to rounding;
grouped and depthwise weights fold the same way, because every row belongs to one output channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float


def fold_batch_norm(
    weight: Tensor,  # (out, in / groups, *kernel)
    bias: Tensor | None,  # (out,)
    running_mean: Tensor,  # (out,)
    running_var: Tensor,  # (out,)
    gain: Tensor | None = None,  # (out,)
    shift: Tensor | None = None,  # (out,)
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of the one layer that does the work of layer and batch norm.

    Parameters
    ----------
    weight : Tensor, shape (out, in / groups, *kernel)
        Of a convolution of any dimension and grouping, or of a linear layer.
    bias : Tensor, shape (out,), or None
        None stands for zeros.
    running_mean, running_var : Tensor, shape (out,)
        Statistics of the batch norm as it uses them in evaluation mode.
    gain, shift : Tensor, shape (out,), optional
        Its ``weight`` and ``bias``; None stands for ones and zeros.
    eps : float, default=1e-5
        The batch norm's own, > 0 or 0 where no variance is 0.

    Returns
    -------
    weight, bias : Tensor, shapes as ``weight`` and (out,)
        In the dtype of ``weight``; computed in float64 and differentiable.

    Raises
    ------
    QuernelError
        If a vector does not have one value a row of ``weight``.

    Examples
    --------
    >>> import torch
    >>> conv, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8).eval()
    >>> w, b = fold_batch_norm(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    >>> x = torch.ones(1, 3, 5, 5)
    >>> torch.allclose(torch.conv2d(x, w, b), norm(conv(x)), atol=1e-5)
    True
    """
    check_float("eps", eps, low=0.0)
    vectors = {"bias": bias, "running_mean": running_mean, "running_var": running_var, "gain": gain, "shift": shift}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != weight.shape[:1]:
            raise QuernelError(
                f"{name} must hold one value for each of the {weight.shape[0]} rows of weight "
                f"{tuple(weight.shape)}; got shape {tuple(vector.shape)}. Pass the batch norm that follows this layer"
            )
    # A variance near eps makes the scale large; float32 would lose digits that the two layers together keep.
    scale = (running_var.to(torch.float64) + eps).rsqrt()
    if gain is not None:
        scale = scale * gain.to(torch.float64)
    folded_bias = -running_mean.to(torch.float64) if bias is None else bias.to(torch.float64) - running_mean
    folded_bias = folded_bias * scale
    if shift is not None:
        folded_bias = folded_bias + shift.to(torch.float64)
    folded = weight.to(torch.float64) * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return folded.to(weight.dtype), folded_bias.to(weight.dtype)
