"""The Walsh-Hadamard transform, and random projections made of it: n rows for log(dim) work each.

A block of rows is sqrt(d) H D3 H D2 H D1 with H the orthonormal Hadamard matrix and D1..D3 random signs
(arXiv 1610.09072): orthogonal rows that are close to Gaussian ones, scaled to Gaussian lengths. Stored are 3 d
signs a block and n lengths instead of n d numbers. float32 and complex64 rows on a CPU are transformed in its
first-level cache by compiled passes (``_hadamard_kernels``), 1 us for d = 1024; everything else multiplies by two small
Hadamard matrices, a Kronecker factorisation of the large one. Both are custom ops with gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._threads import parallel_ranges
from quernel._validate import check_int
from quernel.kernels.features._hadamard_kernels import project_rows, transform_complex_rows, transform_rows
from quernel.kernels.linalg import Array, as_tensor, like

# Side of the largest Hadamard matrix that is multiplied as it is: products of 64 columns run near full speed.
_LARGEST_FACTOR = 64
# Rows worth a thread of their own: some tens of microseconds of work.
_GRAIN = 32


@dataclass(frozen=True, eq=False)
class HadamardDirections:
    """Random rows in factored form.

    Attributes
    ----------
    signs : array, shape (blocks, 3, padded), int8
        The three diagonals of every block; ``padded`` is ``dim`` rounded up to a power of two.
    lengths : array, shape (n,), float64
        Length of each row in the padded space.
    """

    signs: NDArray[np.int8]
    lengths: NDArray[np.float64]


def hadamard_directions(n: int, dim: int, seed: Seed) -> HadamardDirections:
    """Draw ``n`` structured random rows for vectors of length ``dim``.

    Examples
    --------
    >>> rows = hadamard_directions(6, 3, seed=0)
    >>> rows.signs.shape, rows.lengths.shape
    ((2, 3, 4), (6,))
    """
    check_int("n", n, low=1)
    check_int("dim", dim, low=1)
    padded = padded_size(dim)
    draw = generator(seed)
    signs = draw.integers(0, 2, (-(-n // padded), 3, padded), dtype=np.int8) * np.int8(2) - np.int8(1)
    return HadamardDirections(signs, np.sqrt(draw.chisquare(padded, n)))


def padded_size(dim: int) -> int:
    """Return the power of two that a vector of length ``dim`` is padded to."""
    return 1 << (dim - 1).bit_length()


def walsh_hadamard(x: Array, *, normalized: bool = False) -> Array:
    """Multiply the last axis by the Hadamard matrix in its natural (Sylvester) order.

    Parameters
    ----------
    x : Tensor or array, shape (..., d)
        Real or complex floating point; d is a power of two.
    normalized : bool, default=False
        Divide by sqrt(d), so that the transform keeps lengths and is its own inverse.

    Returns
    -------
    y : same kind, shape and dtype as ``x``
        float16 and bfloat16 are computed in float32.

    Raises
    ------
    QuernelError
        If d is not a power of two, or ``x`` is not floating point.

    Examples
    --------
    >>> walsh_hadamard(torch.tensor([1.0, 0.0, 2.0, 0.0])).tolist()
    [3.0, 3.0, -1.0, -1.0]
    """
    tensor = as_tensor("x", x)
    size = tensor.shape[-1] if tensor.ndim else 0
    if size < 1 or size & (size - 1):
        raise QuernelError(f"x must have a last axis whose size is a power of two; got shape {tuple(tensor.shape)}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise QuernelError(f"x must be real or complex floating point; got {tensor.dtype}")
    return like(_transform(tensor, normalized), x)


def hadamard_projection(x: Array, signs: Array, lengths: Array) -> Array:
    """Return ``x @ G.T`` for the rows G that ``hadamard_directions`` drew, without forming G.

    Parameters
    ----------
    x : Tensor or array, shape (..., dim)
        Floating point; padded with zeros up to the size of the signs.
    signs : same kind as ``x``, shape (blocks, 3, padded)
        Diagonals of +-1, any dtype.
    lengths : same kind as ``x``, shape (n,)
        Lengths of the rows; n <= blocks * padded.

    Returns
    -------
    projections : same kind and dtype as ``x``, shape (..., n)
        Gradients reach ``x`` alone: signs and lengths are constants.

    Examples
    --------
    >>> rows = hadamard_directions(6, 3, seed=0)
    >>> hadamard_projection(np.ones((2, 3)), rows.signs, rows.lengths).shape
    (2, 6)
    """
    rows, diagonals, scale = as_tensor("x", x), as_tensor("signs", signs), as_tensor("lengths", lengths)
    padded = diagonals.shape[-1]
    if not rows.is_floating_point() or padded_size(rows.shape[-1]) != padded:
        raise QuernelError(
            f"x must be floating point with a last axis that pads to {padded}; got {rows.dtype}, {tuple(rows.shape)}"
        )
    if scale.shape[0] > diagonals.shape[0] * padded:
        raise QuernelError(f"lengths must be at most {diagonals.shape[0] * padded}, a row each; got {scale.shape[0]}")
    dtype = torch.promote_types(rows.dtype, torch.float32)
    # Three unnormalised transforms make rows of length padded^1.5.
    projections: Tensor = _project_op(rows.to(dtype), diagonals.to(dtype), scale.to(dtype) * padded**-1.5)
    return like(projections.to(rows.dtype), x)


def _transform(x: Tensor, normalized: bool) -> Tensor:
    y: Tensor = _transform_op(x.resolve_conj().to(torch.promote_types(x.dtype, torch.float32)))
    return (y * x.shape[-1] ** -0.5 if normalized else y).to(x.dtype)


def _transform_cpu(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.complex64):
        return _transform_plain(x)
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    held = [(torch.view_as_real(t).flatten(1) if t.is_complex() else t).numpy() for t in (rows, out)]
    kernel = transform_complex_rows if x.is_complex() else transform_rows
    parallel_ranges(lambda start, stop: kernel(*held, start, stop), len(rows), grain=_GRAIN)
    return out.reshape(x.shape)


def _transform_plain(x: Tensor) -> Tensor:
    if x.is_complex():
        # A real matrix: two transforms cost half of what a complex product would.
        pair = _transform_plain(torch.view_as_real(x).movedim(-1, 0))
        return torch.view_as_complex(pair.movedim(0, -1).contiguous())
    return _multiply(x, _factors(x.shape[-1], x.dtype, x.device)).clone()


def _project_cpu(x: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
    """x: (..., dim), signs: (blocks, 3, size), scale: (m,), all of one dtype -> (..., m)."""
    if x.dtype is not torch.float32:
        return _project_plain(x, signs, scale)
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(rows.shape[0], scale.shape[0])
    held = rows.numpy(), signs.detach().contiguous().numpy(), scale.detach().contiguous().numpy(), out.numpy()
    parallel_ranges(lambda start, stop: project_rows(*held, start, stop), len(rows), grain=_GRAIN)
    return out.reshape(*x.shape[:-1], scale.shape[0])


def _project_plain(x: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
    size = signs.shape[2]
    small = _factors(size, x.dtype, x.device)
    wide = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    parts = []
    for diagonals in signs:
        y = _multiply(wide * diagonals[0], small)
        parts.append(_multiply(_multiply(y * diagonals[1], small) * diagonals[2], small))
    return torch.cat(parts, dim=-1)[..., : scale.shape[0]] * scale


def _transform_backward(ctx: Any, grad: Tensor) -> Tensor:
    # The matrix is symmetric and real.
    return _transform_op(grad)


def _project_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, signs, scale = inputs
    ctx.save_for_backward(signs, scale)
    ctx.dim = x.shape[-1]


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    signs, scale = ctx.saved_tensors
    blocks, _, size = signs.shape
    g = torch.nn.functional.pad(grad * scale, (0, blocks * size - scale.shape[0]))
    g = g.reshape(*grad.shape[:-1], blocks, size)
    for k in (2, 1, 0):
        g = _transform_op(g) * signs[:, k]
    return g.sum(-2)[..., : ctx.dim], None, None


def _factors(size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return Hadamard matrices of about equal size whose Kronecker product is the one of ``size``."""
    bits = size.bit_length() - 1
    count = max(1, -(-bits // (_LARGEST_FACTOR.bit_length() - 1)))
    made: dict[int, Tensor] = {}
    shares = [(bits + i) // count for i in range(count)]
    return [made[b] if b in made else made.setdefault(b, _hadamard(1 << b, dtype, device)) for b in shares]


def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # H[i, j] = (-1)^(number of bits that i and j share); made of operations that torch.export can trace.
    index = torch.arange(size, device=device)
    shared = index[:, None] & index
    for shift in (8, 4, 2, 1):
        shared = shared ^ (shared >> shift)
    return (1 - 2 * (shared & 1)).to(dtype)


def _multiply(x: Tensor, factors: list[Tensor]) -> Tensor:
    """Multiply the last axis by the Kronecker product of symmetric factors."""
    shape = x.shape
    left = 1
    y = x
    for i, factor in enumerate(factors):
        size = factor.shape[0]
        right = shape[-1] // (left * size)
        if i == len(factors) - 1:
            y = y.reshape(-1, size) @ factor
        else:
            y = torch.matmul(factor, y.reshape(-1, size, right))
        left *= size
    return y.reshape(shape)


_library = torch.library.Library("quernel", "FRAGMENT")
_library.define("walsh_hadamard(Tensor x) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.define("hadamard_projection(Tensor x, Tensor signs, Tensor scale) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("walsh_hadamard", _transform_cpu, "CPU")
_library.impl("walsh_hadamard", _transform_plain, "CUDA")
_library.impl("hadamard_projection", _project_cpu, "CPU")
_library.impl("hadamard_projection", _project_plain, "CUDA")
_transform_op = torch.ops.quernel.walsh_hadamard.default
_project_op = torch.ops.quernel.hadamard_projection.default


@torch.library.register_fake("quernel::walsh_hadamard", lib=_library)
def _transform_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("quernel::hadamard_projection", lib=_library)
def _project_fake(x: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


torch.library.register_autograd("quernel::walsh_hadamard", _transform_backward, lib=_library)
torch.library.register_autograd(
    "quernel::hadamard_projection", _project_backward, setup_context=_project_setup, lib=_library
)
