"""``NeighborhoodAttention1d/2d/3d``: attention of each token to its nearest neighbors, O(N w^n) (arXiv 2403.04690).

    q, k, v = split(x W_qkv);   y = na(q, k, v);   out = y W_proj

The window holds exactly w tokens an axis, moved inward at the ends; see ``quernel.nn.functional.na2d`` for strides,
dilation and causal axes.  Cost 8 N C^2 + 4 N w^n C, memory O(N C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_float, check_int
from quernel.nn._mixer import Mixer
from quernel.nn._neighborhood_plan import axes_of
from quernel.nn.functional._neighborhood_options import Numbers, check_strides, checked_options, flags_of, per_axis
from quernel.nn.functional.neighborhood import na1d, na2d, na3d

# What a masked key's score is about, and the most that the number beside it may be that undoes a small scale.
FAR, MOST = -1e20, 1e4


def _example_1d() -> dict[str, Any]:
    make = seeded(lambda: NeighborhoodAttention1d(16, 2, 3, dilation=2, is_causal=True))
    return {"make": make, "input": lambda generator: (torch.randn(3, 9, 16, generator=generator),)}


# Windows of grids move inward at the last token that is there, masked or not.
def _example_2d() -> dict[str, Any]:
    return {
        "make": seeded(lambda: NeighborhoodAttention2d(16, 2, 3)),
        "input": lambda generator: (torch.randn(2, 5, 6, 16, generator=generator),),
        "shapes": {2: [(3, 3), (5, 7), (3, 16), (8, 8)]},
        "masks": False,
    }


def _example_3d() -> dict[str, Any]:
    return {
        "make": seeded(lambda: NeighborhoodAttention3d(8, 2, (2, 3, 3), stride=(1, 2, 1))),
        "input": lambda generator: (torch.randn(2, 3, 5, 4, 8, generator=generator),),
        "shapes": {3: [(2, 3, 3), (3, 3, 5)]},
        "masks": False,
    }


class _NeighborhoodAttention(Mixer):
    """What the three share; ``na`` attends on ``ndim`` axes."""

    options = ("num_heads", "kernel_size", "stride", "dilation", "is_causal", "qkv_bias", "qk_scale", "proj_drop")
    ndim: ClassVar[int]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Numbers,
        stride: Numbers = 1,
        dilation: Numbers = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim)
        self.num_heads = check_int("num_heads", num_heads, low=1)
        if dim % num_heads:
            raise QuernelError(f"num_heads must divide dim={dim}; got {num_heads}")
        self.kernel_size = per_axis("kernel_size", kernel_size, self.ndim)
        self.stride, self.dilation = per_axis("stride", stride, self.ndim), per_axis("dilation", dilation, self.ndim)
        check_strides(self.kernel_size, self.stride)
        self.is_causal = flags_of(is_causal, self.ndim)
        # Row by row, a token sees no later one only if every axis is causal.
        self.causal = all(self.is_causal)
        self.qkv_bias = check_bool("qkv_bias", qkv_bias)
        self.qk_scale = None if qk_scale is None else check_float("qk_scale", qk_scale, low=0.0, open_low=True)
        self.proj_drop = check_float("proj_drop", proj_drop, low=0.0, high=1.0, open_high=True)
        self.qkv = nn.Linear(dim, 3 * dim, bias=self.qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C), projections included; only tokens in the window count."""
        batch, *sizes, channels = shape
        options = checked_options(tuple(sizes), self.kernel_size, self.stride, self.dilation, self.is_causal)
        pairs = 1
        for axis in axes_of(*options.numbers):
            seen = (axis.seen(residue) for residue in range(min(axis.dilation, axis.length)))
            pairs *= sum(int((last - first + 1).sum()) for first, last in seen)
        return batch * (8 * math.prod(sizes) * channels * channels + 4 * pairs * channels)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:  # (B, *S, C) -> three (B, *S, H, D)
        parts: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return parts.unbind(-3)

    def _merged(self, y: Tensor) -> Tensor:  # (B, *S, H, D) -> (B, *S, C)
        return F.dropout(self.proj(y.flatten(-2)), self.proj_drop, self.training)

    def _scale(self) -> float:
        return (self.dim // self.num_heads) ** -0.5 if self.qk_scale is None else self.qk_scale

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._heads(x)
        if mask is not None:
            # One more channel of queries and keys adds so much less to the score of a masked key that its weight is 0.
            far = max(FAR, torch.finfo(k.dtype).min / 4)
            bias = torch.zeros_like(mask, dtype=k.dtype).masked_fill_(~mask, far)[..., None, None]
            q = F.pad(q, (0, 1), value=min(1 / self._scale(), MOST))
            k = torch.cat([k, bias.expand(*k.shape[:-1], 1)], -1)
        na = (na1d, na2d, na3d)[self.ndim - 1]
        y = na(q, k, v, self.kernel_size, self.stride, self.dilation, self.is_causal, self._scale())
        return self._merged(cast(Tensor, y))


@register(
    "neighborhood-attention",
    pillar="nn",
    contract="mixer",
    paper="2403.04690",
    status="experimental",
    headline=False,
    example=_example_1d,
)
class NeighborhoodAttention1d(_NeighborhoodAttention):
    """Attention to the nearest tokens of a sequence, (B, T, C) in and out.

    Parameters
    ----------
    dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop
        As in ``NeighborhoodAttention2d``.

    Notes
    -----
    With ``is_causal=True`` and no stride it goes on token by token: the state holds the keys and values of the last
    ``(kernel_size - 1) * dilation`` tokens.

    References
    ----------
    Hassani et al., "Faster Neighborhood Attention", arXiv 2403.04690, 2024.

    Examples
    --------
    >>> import torch
    >>> NeighborhoodAttention1d(64, num_heads=4, kernel_size=16, is_causal=True)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    spatial_ndim = (1,)
    ndim = 1

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return empty keys and values, (B, 0, heads, D) each."""
        self._check_recurrent()
        device, size = self._state_device(device), self.dim // self.num_heads
        empty = torch.empty(batch, 0, self.num_heads, size, device=device, dtype=dtype)
        return empty, empty

    def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:  # (B, T, C)
        if len(state[0]) != len(x):
            raise QuernelError(f"state must be of the {len(x)} streams of x; got one of {len(state[0])}")
        q, k, v = self._heads(x)
        before = state[0].shape[1]
        k, v = torch.cat([state[0].to(k.dtype), k], 1), torch.cat([state[1].to(v.dtype), v], 1)
        if x.shape[1] == 1:
            y = self._last(q, k, v)
        else:
            # Windows of a causal axis are counted from the query, so they do not move with the tokens before.
            q = F.pad(q, (0, 0, 0, 0, before, 0))
            y = cast(Tensor, na1d(q, k, v, self.kernel_size, 1, self.dilation, True, self._scale()))[:, before:]
        held = (self.kernel_size[0] - 1) * self.dilation[0]
        first = max(0, k.shape[1] - held)
        # Copies: slices would keep all tokens of x in memory.
        return self._merged(y), (k[:, first:].clone(), v[:, first:].clone())

    def _check_recurrent(self) -> None:
        if not self.causal or self.stride != (1,):
            raise QuernelError(
                "NeighborhoodAttention1d has a recurrent form only with is_causal=True and stride=1; with a stride the "
                "window of the last group depends on the length"
            )

    def _last(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, 1, H, D) -> (B, 1, H, D)
        """Attend from the last token."""
        length, step = k.shape[1], self.dilation[0]
        first = length - 1 - min(self.kernel_size[0] - 1, (length - 1) // step) * step
        k, v = k[:, first::step].transpose(1, 2), v[:, first::step].transpose(1, 2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=self._scale()).transpose(1, 2)


@register(
    "neighborhood-attention",
    pillar="nn",
    contract="mixer",
    paper="2403.04690",
    status="experimental",
    example=_example_2d,
)
class NeighborhoodAttention2d(_NeighborhoodAttention):
    """Attention of each token of a grid to its nearest neighbors, linear in the number of tokens.

    Parameters
    ----------
    dim : int
        Channels.
    num_heads : int
        Divides ``dim``.
    kernel_size, stride, dilation : int or tuple of int
        The window of an axis, how many queries share one, and the step between its tokens; ``kernel_size * dilation``
        must fit the grid.
    is_causal : bool or tuple of bool, default=False
        Whether the window of an axis ends with the query.
    qkv_bias : bool, default=True
        Whether queries, keys and values have a bias.
    qk_scale : float, optional
        > 0; default one over the square root of a head's size.
    proj_drop : float, default=0.0
        Dropout of the output while training, in [0, 1).

    Raises
    ------
    QuernelError
        If an option is out of range; in ``forward`` if the window does not fit the grid.

    Notes
    -----
    Masked tokens are left out of every softmax, but windows stay those of the whole grid: at its ends they move inward
    over masked tokens too.

    References
    ----------
    Hassani et al., "Faster Neighborhood Attention", arXiv 2403.04690, 2024.

    Examples
    --------
    >>> import torch
    >>> NeighborhoodAttention2d(64, num_heads=4, kernel_size=7)(torch.randn(2, 14, 14, 64)).shape
    torch.Size([2, 14, 14, 64])
    """

    spatial_ndim = (2,)
    ndim = 2


@register(
    "neighborhood-attention",
    pillar="nn",
    contract="mixer",
    paper="2403.04690",
    status="experimental",
    headline=False,
    example=_example_3d,
)
class NeighborhoodAttention3d(_NeighborhoodAttention):
    """Attention to the nearest tokens of a volume or a clip, (B, X, Y, Z, C) in and out.

    Parameters
    ----------
    dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop
        As in ``NeighborhoodAttention2d``.

    References
    ----------
    Hassani et al., "Faster Neighborhood Attention", arXiv 2403.04690, 2024.

    Examples
    --------
    >>> import torch
    >>> NeighborhoodAttention3d(32, 2, (2, 5, 5), is_causal=(True, False, False))(torch.randn(1, 4, 6, 6, 32)).shape
    torch.Size([1, 4, 6, 6, 32])
    """

    spatial_ndim = (3,)
    ndim = 3
