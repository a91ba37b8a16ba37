"""|<a_i | b_j>|^2 of all pairs of states by real matrix products, strip by strip.

A row of complex numbers read as twice as many floats has Re<a|b> as its dot product with b, and Im<a|b> with i b: two
real products, which run near the processor's peak where torch's complex ones do not. Cost 8 N M 2^n operations, half of
it for a symmetric matrix; besides the states a thread holds 4 MB and a strip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._threads import parallel_ranges, workspace

# Columns of a strip, and the amplitudes that are turned by i at a time: 4 MB of complex64. Fixed, so that the number of
# threads changes no bit.
_STRIP = 128
_DEPTH = 4096


def squared_overlaps(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Return |<a_i | b_j>|^2, not above 1; without ``b`` those of ``a`` with itself, exactly symmetric.

    Parameters
    ----------
    a, b : Tensor, shapes (N, D) and (M, D), complex64 or complex128
        Contiguous rows of length 1.

    Returns
    -------
    overlaps : Tensor, shape (N, M), float32 or float64
    """
    other = a if b is None else b
    out = torch.empty(len(a), len(other), dtype=a.real.dtype)
    strips = -(-len(other) // _STRIP)
    # Ends and beginnings in turn: half of the strips of a triangle are half of its area.
    order = sorted(range(strips), key=lambda j: min(j, strips - 1 - j))

    def work(start: int, stop: int) -> None:
        for j in order[start:stop]:
            part = slice(j * _STRIP, min((j + 1) * _STRIP, len(other)))
            height = len(a) if b is not None else part.stop
            _fill(a[:height], other[part], out[:height, part])

    parallel_ranges(work, strips)
    if b is None:
        _mirror(out)
    return out


def _fill(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the overlaps of all ``a`` with a strip of ``b`` to ``out``."""
    imaginary = workspace("imaginary parts", len(a) * len(b), out.dtype).view(len(a), len(b))
    turned = workspace("turned states", len(b) * min(_DEPTH, b.shape[1]), b.dtype)
    for first in range(0, a.shape[1], _DEPTH):
        left, right = _floats(a, first), b[:, first : first + _DEPTH]
        rotated = torch.mul(right, 1j, out=turned[: right.numel()].view(right.shape))
        for target, factor in ((out, _floats(b, first)), (imaginary, torch.view_as_real(rotated).flatten(1))):
            if first == 0:
                torch.mm(left, factor.T, out=target)
            else:
                target.addmm_(left, factor.T)
    out.square_().addcmul_(imaginary, imaginary).clamp_(max=1.0)


def _floats(states: Tensor, first: int) -> Tensor:
    """Return a range of amplitudes of every row as floats, real and imaginary parts in turn; a view."""
    return torch.view_as_real(states).flatten(1)[:, 2 * first : 2 * (first + _DEPTH)]


def _mirror(out: Tensor) -> None:
    """Copy what is above the diagonal below it, block by block: a transpose at once would be a second matrix."""
    for first in range(0, len(out), _STRIP):
        part = slice(first, first + _STRIP)
        out[part.stop :, part] = out[part, part.stop :].T
        block = out[part, part]
        block.copy_(block.triu() + block.triu(1).T)
