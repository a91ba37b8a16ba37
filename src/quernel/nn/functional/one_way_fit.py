"""``fit_one_way``: the one-way filters closest to a trained kernel, by alternating least squares on every filter.

Each filter K_o (C_in x kh x kw) is approximated by R products of vectors.  The start are singular vectors of nested
unfoldings, whose products are orthogonal to each other: the R strongest, from the best order of nesting.  Then sweeps:
with all directions but one fixed, the best vectors of that one solve an R x R system,

    A <- (K_(0) Z^T + m A)(Z Z^T + m I)^-1,          Z the products of the other directions,

where the small proximal term m keeps systems of nearly parallel filters solvable and lets no sweep raise the error.
R = kh kw (or C_in times all sides but one) represents any kernel, which the start then does exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float, check_int

# Sweeps stop where the squared error falls by less than this share of the kernel's square.
SMALLEST_GAIN = 1e-9


@dataclass(frozen=True)
class OneWayFit:
    """Filters fitted to a kernel; dtype of the kernel.

    Parameters
    ----------
    channel : Tensor, shape (C_out, R, C_in)
        Carries the size of each product.
    spatial : tuple of Tensor, each of shape (C_out, R, k)
        Unit vectors; zero where a filter needs fewer than R products.
    errors : tuple of float
        Relative Frobenius error of the whole kernel at the start and after every sweep; never rising.
    filter_errors : Tensor, shape (C_out,)
        That of each filter at the end; 0 for a filter of zeros.
    """

    channel: Tensor
    spatial: tuple[Tensor, ...]
    errors: tuple[float, ...]
    filter_errors: Tensor

    @property
    def error(self) -> float:
        """Relative Frobenius error at the end."""
        return self.errors[-1]


def fit_one_way(kernel: Tensor, rank: int, *, iters: int = 30, ridge: float = 1e-6) -> OneWayFit:
    """Approximate every filter of a kernel by a sum of R products of one-way filters.

    Parameters
    ----------
    kernel : Tensor, shape (C_out, C_in, *k)
        With one to three directions of space; any floating dtype, computed in float64.
    rank : int
        R >= 1.
    iters : int, default=30
        Most sweeps of alternating least squares; 0 gives the start.
    ridge : float, default=1e-6
        Proximal term, as a share of the mean diagonal of each system.

    Returns
    -------
    fit : OneWayFit

    Raises
    ------
    QuernelError
        If the kernel is not a finite floating tensor of three to five dimensions, or an option is out of range.

    Notes
    -----
    Draws nothing.  Time a sweep O(C_out C_in kh kw R).

    References
    ----------
    Carroll and Chang 1970 and Harshman 1970 (CP by alternating least squares); Lebedev et al., arXiv 1412.6553
    (CP of convolution kernels, there of all filters together).

    Examples
    --------
    >>> import torch
    >>> kernel = torch.einsum("oi,oy,ox->oiyx", torch.ones(4, 3), torch.ones(4, 3), torch.ones(4, 3))
    >>> fit_one_way(kernel, 1).error < 1e-6
    True
    """
    if not 3 <= kernel.ndim <= 5 or not kernel.is_floating_point() or 0 in kernel.shape:
        raise QuernelError(
            "kernel must be a non-empty floating tensor of shape (out, in, *size) with one to three sizes; "
            f"got {kernel.dtype} of shape {tuple(kernel.shape)}"
        )
    check_int("rank", rank, low=1)
    check_int("iters", iters, low=0)
    check_float("ridge", ridge, low=0.0, open_low=True)
    check_finite("kernel", kernel)
    target = kernel.detach().to(torch.float64)
    factors = _start(target, rank)
    total = float(target.square().sum())
    losses = _filter_losses(target, factors)
    history = [float(losses.sum())]
    for _ in range(iters if total > 0 else 0):
        swept = _sweep(target, factors, ridge)
        new = _filter_losses(target, swept)
        # Where rounding makes a converged filter worse, it stays as it was.
        better = new < losses
        factors = [torch.where(better[:, None, None], a, b) for a, b in zip(swept, factors, strict=True)]
        losses = torch.where(better, new, losses)
        history.append(float(losses.sum()))
        if history[-2] - history[-1] <= SMALLEST_GAIN * total:
            break
    sizes = target.flatten(1).square().sum(1)
    errors = (losses / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)).clamp_min(0).sqrt()
    channel, *spatial = _normalised(factors)
    return OneWayFit(
        channel.transpose(1, 2).to(kernel.dtype).contiguous(),
        tuple(factor.transpose(1, 2).to(kernel.dtype).contiguous() for factor in spatial),
        tuple(math.sqrt(max(0.0, loss) / total) if total > 0 else 0.0 for loss in history),
        errors.to(torch.float64),
    )


def _start(target: Tensor, rank: int) -> list[Tensor]:
    """Return factors (C_out, n, R) of each direction, channels first, from the best order of nesting a filter."""
    dims = target.ndim - 1
    orders = [(first, *(i for i in range(dims) if i != first)) for first in range(dims)]
    best: list[Tensor] = []
    least = torch.full((len(target),), math.inf, dtype=target.dtype, device=target.device)
    for order in orders[1:] + orders[:1]:  # where orders tie, one that is exact at the lowest rank
        weights, ordered = _nested(target.permute(0, *(i + 1 for i in order)))
        chosen = weights.argsort(dim=1, descending=True, stable=True)[:, :rank]
        factors = [torch.empty(0)] * dims
        for direction, factor in zip(order, ordered, strict=True):
            index = chosen[:, None, :].expand(-1, factor.shape[1], -1)
            factors[direction] = factor.gather(2, index)
        kept = weights.gather(1, chosen)
        factors[0] = factors[0] * kept[:, None, :]
        short = rank - kept.shape[1]
        factors = [torch.nn.functional.pad(factor, (0, short)) for factor in factors]
        loss = _filter_losses(target, factors)
        take = loss < least
        best = (
            [torch.where(take[:, None, None], new, old) for new, old in zip(factors, best, strict=True)]
            if best
            else factors
        )
        least = torch.where(take, loss, least)
    return best


def _nested(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Write batches of tensors (B, n1, n2, ...) as sums of orthogonal products of unit vectors.

    Returns the weights (B, T) and the vectors (B, n, T) of each direction: the singular vectors of the first direction
    against all others, and for each of them, recursively, the products that its other side is made of.
    """
    batch, first, *rest = tensor.shape
    u, s, vh = torch.linalg.svd(tensor.reshape(batch, first, -1), full_matrices=False)
    if len(rest) == 1:
        return s, [u, vh.transpose(1, 2)]
    terms = s.shape[1]
    weights, vectors = _nested(vh.reshape(batch * terms, *rest))
    inner = weights.shape[1]
    joined = [
        v.reshape(batch, terms, v.shape[1], inner).transpose(1, 2).reshape(batch, v.shape[1], terms * inner)
        for v in vectors
    ]
    return (s[:, :, None] * weights.reshape(batch, terms, inner)).flatten(1), [
        u.repeat_interleave(inner, dim=2),
        *joined,
    ]


def _sweep(target: Tensor, factors: Sequence[Tensor], ridge: float) -> list[Tensor]:
    """Solve for the factors of each direction in turn."""
    new = _normalised(factors)
    letters = "iyxz"[: len(new)]
    for k, letter in enumerate(letters):
        others = [(factor, other) for factor, other in zip(new, letters, strict=True) if other != letter]
        terms = ",".join(f"o{other}r" for _, other in others)
        right = torch.einsum(f"o{letters},{terms}->o{letter}r", target, *(factor for factor, _ in others))
        gram = torch.ones((), dtype=target.dtype, device=target.device)
        for factor, _ in others:
            gram = gram * (factor.transpose(1, 2) @ factor)
        mean = gram.diagonal(dim1=1, dim2=2).mean(1)
        # A filter of zeros has a system of zeros; one keeps it solvable and its solution zero.
        near = torch.where(mean > 0, ridge * mean, torch.ones_like(mean))[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=target.dtype, device=target.device)
        solved = torch.linalg.solve(gram + near * eye, (right + near * new[k]).transpose(1, 2))
        new[k] = solved.transpose(1, 2)
    return new


def _normalised(factors: Sequence[Tensor]) -> list[Tensor]:
    """Move the length of every spatial vector to its channel vector."""
    channel, *spatial = factors
    unit = []
    for factor in spatial:
        length = factor.norm(dim=1, keepdim=True)
        unit.append(factor / torch.where(length > 0, length, torch.ones_like(length)))
        channel = channel * length
    return [channel, *unit]


def _filter_losses(target: Tensor, factors: Sequence[Tensor]) -> Tensor:
    letters = "iyxz"[: len(factors)]
    terms = ",".join(f"o{letter}r" for letter in letters)
    return (target - torch.einsum(f"{terms}->o{letters}", *factors)).flatten(1).square().sum(1)
