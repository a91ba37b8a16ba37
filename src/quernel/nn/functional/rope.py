"""Rotary positions: ``rope1d`` and ``rope2d`` make tables of rotations, ``rotate`` turns pairs of features by them.

Adjacent features (x0, x1) of a token at position t turn by the angle t f: (x0 c - x1 s, x1 c + x0 s), c = cos, s = sin.
Frequencies are f = base^-u, u evenly spaced in [0, 1], both ends included (as in RetNet and NaLaFormer).  On a grid the
first half of the features turns with the row and the last half with the column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int


def rope1d(
    length: int,
    dim: int,
    *,
    start: int | Tensor = 0,
    base: float = 10_000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return rotations of a sequence for ``dim`` features, an even number.

    Parameters
    ----------
    length, dim : int
        Tokens and features.
    start : int or integer Tensor, default=0
        Position of the first token.
    base : float, default=10000
        The slowest pair turns by one radian in so many tokens.
    device, dtype : optional
        Angles are computed in float64.

    Returns
    -------
    rope : Tensor, shape (length, dim / 2, 2)
        Cosine and sine of each pair.

    Examples
    --------
    >>> rope1d(2, 2)
    tensor([[[1.0000, 0.0000]],
    <BLANKLINE>
            [[0.5403, 0.8415]]])
    """
    if check_int("dim", dim, low=2) % 2:
        raise QuernelError(f"dim must be even, as features turn in pairs; got {dim}")
    places = torch.arange(length, dtype=torch.float64, device=device) + start
    return _turns(places, _frequencies(dim // 2, base, device)).to(dtype)


def rope2d(
    height: int,
    width: int,
    dim: int,
    *,
    base: float = 10_000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return rotations of a grid, row by row, for ``dim`` features, a multiple of four.

    Parameters
    ----------
    height, width, dim : int
        Sides of the grid, and features.
    base, device, dtype
        As in ``rope1d``.

    Returns
    -------
    rope : Tensor, shape (height * width, dim / 2, 2)

    Examples
    --------
    >>> rope2d(2, 3, 8).shape
    torch.Size([6, 4, 2])
    """
    if check_int("dim", dim, low=4) % 4:
        raise QuernelError(f"dim must be a multiple of 4: pairs that turn by row and by column; got {dim}")
    frequencies = _frequencies(dim // 4, base, device)
    down, across = (
        _turns(torch.arange(n, dtype=torch.float64, device=device), frequencies).to(dtype) for n in (height, width)
    )
    shape = (height, width, dim // 4, 2)
    return torch.cat([down[:, None].expand(shape), across[None].expand(shape)], dim=2).flatten(0, 1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs of features by the rotations of their tokens.

    Parameters
    ----------
    x : Tensor, shape (..., N, F)
        float32 or float64; each block of ``dim`` features turns alike, the halves of a split feature map for instance.
    rope : Tensor, shape (N, dim / 2, 2)
        From ``rope1d`` or ``rope2d``; ``dim`` divides F.

    Returns
    -------
    y : Tensor, as x

    Raises
    ------
    QuernelError
        If the shapes do not fit.
    """
    check_rope(rope, x.shape[-2], x.shape[-1])
    # One pass: a complex product is the rotation of a pair.
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, rope.shape[1], 2)).contiguous())
    turns = torch.view_as_complex(rope.to(x.dtype).contiguous())[:, None]
    return torch.view_as_real(pairs * turns).flatten(-3)


def check_rope(rope: Tensor, tokens: int, features: int) -> None:
    """Raise unless the table is for so many tokens and features."""
    if rope.ndim != 3 or rope.shape[0] != tokens or rope.shape[2] != 2 or features % (2 * rope.shape[1]):
        raise QuernelError(
            f"rope must have shape ({tokens}, dim / 2, 2) for tokens of {features} features, dim a divisor of them; "
            f"got {tuple(rope.shape)}. Make it by rope1d or rope2d"
        )


def _frequencies(count: int, base: float, device: torch.device | str | None) -> Tensor:
    check_float("base", base, low=1.0, open_low=True)
    return base ** -torch.linspace(0.0, 1.0, count, dtype=torch.float64, device=device)


def _turns(places: Tensor, frequencies: Tensor) -> Tensor:  # (N,), (F,) -> (N, F, 2)
    angles = places[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)
