"""``neighborhood_mask`` and attention under it: the definition of neighborhood attention, O(N^2) (arXiv 2403.04690)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel.nn.functional._neighborhood_options import Numbers, checked_options


def neighborhood_mask(
    shape: Sequence[int],
    kernel_size: Numbers,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which tokens see which: the mask that neighborhood attention stands for.

    Parameters
    ----------
    shape : sequence of int
        The token grid, of any number of axes; tokens count row by row.
    kernel_size, stride, dilation, is_causal : int or bool, or one an axis
        As in ``na2d``.
    device : optional

    Returns
    -------
    mask : Tensor of bool, shape (N, N)
        True where the query of the row sees the key of the column.

    Raises
    ------
    QuernelError
        If a window does not fit.

    Examples
    --------
    >>> neighborhood_mask((5,), 3).int()[0]
    tensor([1, 1, 1, 0, 0], dtype=torch.int32)
    """
    options = checked_options(tuple(shape), kernel_size, stride, dilation, is_causal)
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    for numbers in options.axes:
        mine = _axis_mask(*numbers, device)
        both = mask[:, None, :, None] & mine[None, :, None, :]
        mask = both.reshape(mask.shape[0] * mine.shape[0], -1)
    return mask


def _axis_mask(
    length: int, window: int, stride: int, dilation: int, causal: bool, device: torch.device | str | None
) -> Tensor:
    """Return the mask of one axis, (length, length)."""
    i = torch.arange(length, device=device)
    residue, t = i % dilation, i // dilation
    last_place = (length - 1 - residue) // dilation
    group = t // stride * stride
    if causal:
        first = torch.minimum(group + stride - 1, last_place) - (window - 1)
        last = t
    else:
        lead = torch.minimum(group + stride // 2, last_place)
        first = torch.minimum((lead - window // 2).clamp_min(0), last_place - (window - 1))
        last = first + (window - 1)
    same = residue[:, None] == residue
    return same & (t >= first[:, None]) & (t <= last[:, None])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return attention under a mask (N, M); q: (B, N, H, D), k: (B, M, G, D), v: (B, M, G, E)."""
    share = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if share > 1:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    if not wants_lse:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2), None
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).mT * scale).masked_fill(~mask, -math.inf)
    out = torch.softmax(scores, -1) @ v.to(wide)
    return out.to(q.dtype).transpose(1, 2), torch.logsumexp(scores, -1).transpose(1, 2)
