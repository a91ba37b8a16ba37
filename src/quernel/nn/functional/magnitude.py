"""``magnitude_mask``: which weights to keep when the smallest go (Zhu & Gupta, arXiv 1710.01878).

Single weights are ranked by |w|, blocks of consecutive output rows by the mean of |w|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_probability

BLOCKS = (1, 2, 4)


def magnitude_mask(weight: Tensor, sparsity: float, *, block: int = 1) -> Tensor:
    """Return which weights stay when a share of them is set to zero.

    Parameters
    ----------
    weight : Tensor, shape (out, in, ...)
        Of a linear layer or a convolution.
    sparsity : float
        Share to remove, in [0, 1].
    block : {1, 2, 4}, default=1
        Consecutive output rows that are kept or removed together; rows left over at the end count singly.

    Returns
    -------
    mask : Tensor, shape of ``weight``, bool
        True where a weight stays.  ``round(sparsity * weight.numel())`` are False; with blocks up to
        ``block - 1`` fewer.

    Raises
    ------
    QuernelError
        If an argument is out of range or ``weight`` is not finite.

    Notes
    -----
    What is zero already goes first, so masks of rising sparsity on masked weights lie within each other.  Equal
    magnitudes go in order of their place.

    Examples
    --------
    >>> import torch
    >>> magnitude_mask(torch.tensor([[3.0, -1.0], [0.5, 2.0]]), 0.5)
    tensor([[ True, False],
            [False,  True]])
    """
    check_probability("sparsity", sparsity)
    check_choice("block", block, BLOCKS)
    if weight.ndim < 2:
        raise QuernelError(f"weight must have at least two dimensions (out, in, ...); got shape {tuple(weight.shape)}")
    check_finite("weight", weight)
    matrix = weight.detach().abs().float().flatten(1)
    groups = len(matrix) // block
    split = groups * block
    grouped = matrix[:split].view(groups, block, matrix.shape[1]).mean(1)
    scores = torch.cat([grouped.flatten(), matrix[split:].flatten()])
    sizes = torch.ones_like(scores, dtype=torch.int64)
    sizes[: grouped.numel()] = block
    order = scores.argsort(stable=True)
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = sizes[order].cumsum(0) > round(sparsity * matrix.numel())
    first = kept[: grouped.numel()].view(grouped.shape).repeat_interleave(block, dim=0)
    return torch.cat([first, kept[grouped.numel() :].view(matrix[split:].shape)]).view(weight.shape)
