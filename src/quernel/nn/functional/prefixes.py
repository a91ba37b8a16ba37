"""Prefixes of embeddings whose first coordinates are embeddings themselves (arXiv 2205.13147)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_int

SMALLEST = 8


def nested_dims(d: int, smallest: int = SMALLEST) -> tuple[int, ...]:
    """Return the powers of two times ``smallest`` below ``d``, and ``d``: the usual prefix lengths.

    Parameters
    ----------
    d : int
        Coordinates of an embedding.
    smallest : int, default=8

    Examples
    --------
    >>> nested_dims(384)
    (8, 16, 32, 64, 128, 256, 384)
    >>> nested_dims(4)
    (4,)
    """
    length, found = check_int("smallest", smallest, low=1), []
    while length < check_int("d", d, low=1):
        found.append(length)
        length *= 2
    return (*found, d)


def unit_prefix(z: Tensor, dim: int | None = None) -> Tensor:
    """Return the first ``dim`` coordinates of each row divided by their length, so that prefixes can be compared.

    Parameters
    ----------
    z : Tensor, shape (..., d)
        Floating point; lengths are taken in at least float32.
    dim : int, optional
        In [1, d]; default d.

    Returns
    -------
    prefix : Tensor, shape (..., dim)
        A row of zeros stays one.

    Raises
    ------
    QuernelError
        If ``dim`` is out of range or ``z`` is not floating point.

    Examples
    --------
    >>> import torch
    >>> unit_prefix(torch.tensor([[3.0, 4.0, 12.0]]), 2)
    tensor([[0.6000, 0.8000]])
    """
    if z.ndim < 1 or not z.is_floating_point():
        raise QuernelError(f"z must be floating point of shape (..., d); got {z.dtype} of shape {tuple(z.shape)}")
    width = z.shape[-1]
    cut = z[..., : width if dim is None else check_int("dim", dim, low=1, high=width)]
    wide = cut if cut.dtype.itemsize >= 4 else cut.float()
    return F.normalize(wide, dim=-1).to(z.dtype)
