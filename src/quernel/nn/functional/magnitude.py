"""``magnitude_mask``: which weights to keep when the smallest go (Zhu & Gupta, arXiv 1710.01878).

Single weights are ranked by |w|, blocks of consecutive output rows by the mean of |w|.  The magnitude where the share
is reached is found by counting bits: three passes over some rows at a time, and no sorted copy of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_probability

BLOCKS = (1, 2, 4)
# Bytes of scores that are looked at together: larger temporaries go back to the system and fault in again.
_CHUNK_BYTES = 2**19


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
    matrix = weight.detach().flatten(1)
    budget = round(sparsity * matrix.numel())
    turning, left = _turning_point(matrix, block, budget)
    mask = torch.empty(matrix.shape, dtype=torch.bool, device=matrix.device)
    for rows, bits, size in _scores(matrix, block):
        equal = bits == turning
        kept = bits > turning
        ties = int(equal.count_nonzero())
        if ties:
            # Once a tie does not fit, none behind it does.
            places = equal.flatten().cumsum(0).view_as(equal)
            kept |= equal & (size * places > left)
            left = max(0, left - size * ties)
        mask[rows].view(len(kept), size, matrix.shape[1])[:] = kept[:, None]
    return mask.view(weight.shape)


def _scores(matrix: Tensor, block: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Yield some rows at a time: where, the bits of their scores, and for how many weights each score stands."""
    outputs, inputs = matrix.shape
    split = outputs // block * block
    step = block * max(1, _CHUNK_BYTES // (4 * block * max(1, inputs)))
    for first, last, size in ((0, split, block), (split, outputs, 1)):
        for start in range(first, last, step):
            rows = slice(start, min(start + step, last))
            check_finite("weight", matrix[rows])
            scores = matrix[rows].abs().float().reshape(-1, size, inputs) if inputs else matrix.new_zeros(0, size, 0)
            yield rows, scores.float().mean(1).view(torch.int32), size


def _turning_point(matrix: Tensor, block: int, budget: int) -> tuple[int, int]:
    """Return the bits of the score at which ``budget`` weights run out, and how many are left for that score.

    Floats that are not negative have the order of their bits, so two counts, of the upper and the lower 16, find it.
    """
    upper, left = _passed(((bits >> 16, size) for _, bits, size in _scores(matrix, block)), budget)
    inside = ((bits[bits >> 16 == upper] & 0xFFFF, size) for _, bits, size in _scores(matrix, block))
    lower, left = _passed(inside, left)
    return min((upper << 16) + lower, 2**31 - 1), left  # above every score where all of them go


def _passed(keys: Iterator[tuple[Tensor, int]], budget: int) -> tuple[int, int]:
    """Return the first key of 16 bits whose weights do not fit into ``budget`` any more, and what is left before it."""
    counts = sum(
        (size * part.flatten().bincount(minlength=2**16).cpu() for part, size in keys), torch.zeros(2**16).long()
    )
    fitting = counts[counts.cumsum(0) <= budget]
    return len(fitting), budget - int(fitting.sum())
