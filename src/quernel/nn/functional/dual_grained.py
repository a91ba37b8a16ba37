r"""Dual grained quantisation as pure functions: integer group scales under one float scale a row (arXiv 2310.04836).

    W[o,k] ~= s1[o] S2[o,G(k)] (q[o,k] - z[o,G(k)]),    q, z in 0..15,  S2 in 1..127,  |S2 (q - z)| <= 127

Phase 1 (``fine_search``) gives each group the float step with the least output error, phase 2 (``coarse_search``) each
row the scale s1 of which the steps become integer multiples.  Errors are taken on the layer's inputs through their Gram
matrix H = X^T X, ||X d^T||^2 = d H d^T, so the number of tokens does not matter.
Cost O(n1 O K g + n2 O K^2) for n1 + n2 grid points, where a joint search would need n1 n2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_int
from quernel.nn._int4_packing import GROUP_SIZES

CODES, LEVELS = 15, 127
# Fewer inputs than this, and 32 of them share a scale by default, else 128: small layers have less to average over.
SMALL = 1024
# Bytes of one array of a block of rows: larger temporaries go back to the system and fault in again at every step.
BLOCK_BYTES = 2**21
# From here on the error of a difference takes only the lower triangle of H, in tiles of this size.
TILE = 512


@dataclass(frozen=True, eq=False)
class DGQWeight:
    """What ``dgq_search`` found: ``s1 * S2 * (q - z)``.

    Attributes
    ----------
    q : Tensor, shape (O, K), uint8
        Codes, 0 to 15.
    S2 : Tensor, shape (O, groups), int8
        Integer scale of each group of a row, 1 to 127.
    z : Tensor, shape (O, groups), uint8
        Integer zero point of each group, 0 to 15.
    s1 : Tensor, shape (O,)
        Scale of each row.
    group_size : int
    fine_error, error : Tensor, shape (O,)
        ``||X (w - w_hat)^T||^2`` of each row after phase 1, with float steps a group, and of the result.
    signal : Tensor, shape (O,)
        ``||X w^T||^2`` of each row, to set them against.
    """

    q: Tensor
    S2: Tensor
    z: Tensor
    s1: Tensor
    group_size: int
    fine_error: Tensor
    error: Tensor
    signal: Tensor

    @property
    def relative_errors(self) -> tuple[float, float]:
        """Relative error of the layer's output after phase 1 and of the result."""
        whole = self.signal.sum().clamp_min(torch.finfo(self.signal.dtype).tiny)
        return float((self.fine_error.sum() / whole).sqrt()), float((self.error.sum() / whole).sqrt())

    def integers(self) -> Tensor:
        """Return ``S2 * (q - z)``, shape (O, K), int8."""
        columns = torch.arange(self.q.shape[1], device=self.q.device) // self.group_size
        return self.S2[:, columns] * (self.q.to(torch.int8) - self.z[:, columns].to(torch.int8))

    def dense(self) -> Tensor:
        """Return the weight in the dtype of ``s1``."""
        return self.integers() * self.s1[:, None]


@dataclass(frozen=True, eq=False)
class FineGrid:
    """What phase 1 found: ``step * (q - zero)`` with a float step a group.

    Attributes
    ----------
    step, zero : Tensor, shape (O, groups)
    error : Tensor, shape (O, groups)
        Error of each group on its own inputs.
    """

    step: Tensor
    zero: Tensor
    error: Tensor


def dgq_search(
    W: Tensor,
    H: Tensor | None,
    group_size: int = 128,
    grid: tuple[int, int] = (20, 80),
    *,
    strict: bool = False,
) -> DGQWeight:
    """Find 4-bit codes with integer group scales that keep the outputs of a layer.

    Parameters
    ----------
    W : Tensor, shape (O, K)
        Weight; searched in float32, or float64 if it is float64.
    H : Tensor, shape (K, K), optional
        ``X^T X`` of the inputs, any positive scale.  None counts every input alike: the error of the weight itself.
    group_size : {32, 64, 128}, default=128
        Inputs that share a scale; the last group of a row may be shorter.
    grid : (int, int), default=(20, 80)
        Ratios tried for the steps of groups and for the scales of rows.
    strict : bool, default=False
        Refuse an incomplete last group.

    Returns
    -------
    found : DGQWeight

    Raises
    ------
    QuernelError
        If shapes do not fit, a number is not finite, an option is out of range, or ``strict`` and ``group_size``
        does not divide K.

    Notes
    -----
    Deterministic; memory is that of a few blocks of rows.  Differs from the authors' code: the range of a group
    includes zero and zero points stay in 0..15, so that they fit 4 bits; errors use all calibration data.

    References
    ----------
    Zhang et al., "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM", arXiv 2310.04836, 2023.

    Examples
    --------
    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> W, X = torch.randn(8, 64, generator=generator), torch.randn(256, 64, generator=generator)
    >>> found = dgq_search(W, X.T @ X, group_size=32)
    >>> bool((X @ (W - found.dense()).T).norm() < 0.1 * (X @ W.T).norm())
    True
    """
    fine, coarse = check_grid(grid)
    W, H = checked(W, H, group_size, strict)
    # Only ratios of errors matter in the search; a typical entry of 1 keeps float32 far from its ends.
    typical = 1.0 if H is None else float(H.diagonal().mean()) or 1.0
    scaled = None if H is None else (H / typical).to(W.dtype)
    first = fine_search(W, scaled, group_size, fine_ratios(fine))
    s1, _ = coarse_search(W, scaled, first, group_size, coarse_ratios(coarse))
    found = requantise(W, scaled, first, s1, group_size)
    errors = (found.fine_error, found.error, found.signal)
    fine_error, error, signal = (part * typical for part in errors)
    return replace(found, fine_error=fine_error, error=error, signal=signal)


def check_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the two numbers of ratios, each at least 1."""
    if not isinstance(grid, tuple) or len(grid) != 2:
        raise QuernelError(f"grid must be two numbers of ratios, (groups, rows); got {grid!r}")
    return check_int("grid[0]", grid[0], low=1), check_int("grid[1]", grid[1], low=1)


def round_to_nearest(W: Tensor, group_size: int | None = None) -> Tensor:
    """Return ``W``, shape (O, K), rounded to 4 bits without a search: the baseline of every 4-bit method.

    Each group of inputs (each row, with None) has a float step ``(hi - lo) / 15`` and an integer zero point, with
    lo, hi its least and largest weight and zero; the last group may be shorter.
    """
    W, _ = checked(W, None, GROUP_SIZES[0], False)
    size = W.shape[1] if group_size is None else check_int("group_size", group_size, low=1)
    w = _grouped(W, size)
    base, zero = _range(w)
    d = torch.empty_like(w)
    _difference(w, base, -zero, CODES - zero, out=d)
    return (w - d).flatten(1)[:, : W.shape[1]]


def auto_group_size(in_features: int) -> int:
    """Return the group size of ``group_size="auto"``."""
    return GROUP_SIZES[0] if in_features < SMALL else GROUP_SIZES[-1]


def fine_ratios(n: int) -> list[float]:
    """Return the ratios of phase 1, 1.009 down to 0.80 for n = 20; more than 1 is deliberate."""
    return [1.02 - 0.22 * (i + 1) / n for i in range(n)]


def coarse_ratios(n: int) -> list[float]:
    """Return the ratios of phase 2, 1.01 down to 0.20 for n = 80."""
    return [1.02 - 0.82 * (i + 1) / n for i in range(n)]


def fine_search(W: Tensor, H: Tensor | None, group_size: int, ratios: Sequence[float]) -> FineGrid:
    """Return for each group of each row the step and zero point with the least error on the group's inputs.

    With lo, hi the least and largest weight of the group and zero: ``step = (hi - lo) ratio / 15``, ``zero`` the code
    of 0.
    """
    blocks = _diagonal_blocks(H, group_size)
    parts = []
    for (rows,) in _row_blocks(W):
        w = _grouped(rows, group_size).transpose(0, 1).contiguous()  # (G, R, g)
        base, zero = _range(w)  # (G, R, 1)
        low, high = -zero, CODES - zero
        best, step = torch.full_like(base, torch.inf), base
        d, product = torch.empty_like(w), torch.empty_like(w)
        for ratio in ratios:
            tried = base * ratio
            _difference(w, tried, low, high, out=d)
            if blocks is None:
                torch.mul(d, d, out=product)
            else:
                torch.bmm(d, blocks, out=product).mul_(d)
            error = product.sum(-1, keepdim=True)
            better = error < best
            best, step = torch.where(better, error, best), torch.where(better, tried, step)
        parts.append([part.squeeze(-1).T for part in (step, zero, best)])
    return FineGrid(*(torch.cat(part).contiguous() for part in zip(*parts, strict=True)))


def coarse_search(
    W: Tensor, H: Tensor | None, fine: FineGrid, group_size: int, ratios: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return for each row the scale with the least error over the whole row, shape (O,), and that error.

    ``s1 = max|w| ratio / 127``; the steps of phase 1 become the nearest integers, at least 1, times s1.
    """
    found = []
    for rows, step, zero in _row_blocks(W, fine.step, fine.zero):
        w, step, zero = _grouped(rows, group_size), step.unsqueeze(-1), zero.unsqueeze(-1)  # (R, G, g), (R, G, 1)
        top = _safe(w.abs().amax((1, 2), keepdim=True) / LEVELS)
        best, s1 = torch.full_like(top, torch.inf), top
        d = torch.empty_like(w)
        for ratio in ratios:
            tried = top * ratio
            scales, low, high = _integer_grid(step, zero, tried)
            _difference(w, scales * tried, low, high, out=d)
            error = output_errors(d.flatten(1), H).view_as(top)
            better = error < best
            best, s1 = torch.where(better, error, best), torch.where(better, tried, s1)
        found.append((s1.flatten(), best.flatten()))
    return torch.cat([s1 for s1, _ in found]), torch.cat([error for _, error in found])


def requantise(W: Tensor, H: Tensor | None, fine: FineGrid, s1: Tensor, group_size: int) -> DGQWeight:
    """Return the codes that the results of both phases give."""
    codes, scales, signals = [], [], []
    fine_errors: list[Tensor] = []
    errors: list[Tensor] = []
    for rows, step, zero, row_scale in _row_blocks(W, fine.step, fine.zero, s1):
        w, step, zero = _grouped(rows, group_size), step.unsqueeze(-1), zero.unsqueeze(-1)
        row_scale = row_scale.view(-1, 1, 1)
        S2, low, high = _integer_grid(step, zero, row_scale)
        q = (w / (S2 * row_scale)).round_().clamp_(low, high).add_(zero)
        codes.append(q.flatten(1)[:, : W.shape[1]].to(torch.uint8))
        scales.append(S2.squeeze(-1).to(torch.int8))
        d = torch.empty_like(w)
        for total, grid, bounds in (
            (fine_errors, step, (-zero, CODES - zero)),
            (errors, S2 * row_scale, (low, high)),
        ):
            _difference(w, grid, *bounds, out=d)
            total.append(output_errors(d.flatten(1), H))
        signals.append(output_errors(w.flatten(1), H))
    return DGQWeight(
        q=torch.cat(codes),
        S2=torch.cat(scales),
        z=fine.zero.to(torch.uint8),
        s1=s1.to(W.dtype),
        group_size=group_size,
        fine_error=torch.cat(fine_errors),
        error=torch.cat(errors),
        signal=torch.cat(signals),
    )


def _integer_grid(step: Tensor, zero: Tensor, s1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return integer scales and the bounds of ``q - z`` within which products stay in [-127, 127]."""
    scales = (step / s1).round().clamp(1, LEVELS)
    reach = (LEVELS / scales).floor()
    return scales, torch.maximum(-zero, -reach), torch.minimum(CODES - zero, reach)


def _range(w: Tensor) -> tuple[Tensor, Tensor]:  # (..., g) -> (..., 1)
    """Return the step that covers the least and the largest weight and zero, and the code of zero."""
    lo, hi = w.amin(-1, keepdim=True).clamp_max(0.0), w.amax(-1, keepdim=True).clamp_min(0.0)
    base = _safe((hi - lo) / CODES)
    return base, (-lo / base).round().clamp(0, CODES)


def _difference(w: Tensor, step: Tensor, low: Tensor, high: Tensor, out: Tensor) -> None:
    """Write ``w - step * clamp(round(w / step), low, high)`` to ``out``."""
    torch.div(w, step, out=out).round_()
    torch.minimum(torch.maximum(out, low, out=out), high, out=out).mul_(step)
    torch.sub(w, out, out=out)


def output_errors(d: Tensor, H: Tensor | None) -> Tensor:  # d: (R, K) -> (R,)
    """Return ``d H d^T`` of each row."""
    if H is None:
        return d.square().sum(-1)
    width = H.shape[0]
    d = d[:, :width]  # what pads a row is exactly zero
    if width <= TILE:
        return torch.mm(d, H).mul_(d).sum(-1)
    total = d.new_zeros(len(d))
    for start in range(0, width, TILE):
        own = d[:, start : start + TILE]
        rest = H[start + TILE :, start : start + TILE]
        half = torch.mm(own, H[start : start + TILE, start : start + TILE])
        total += half.addmm_(d[:, start + TILE :], rest, alpha=2).mul_(own).sum(-1)
    return total


def _grouped(W: Tensor, group_size: int) -> Tensor:  # (R, K) -> (R, G, g)
    """Fill rows with zeros to whole groups; a zero is always represented exactly."""
    return F.pad(W, (0, -W.shape[1] % group_size)).view(len(W), -1, group_size)


def _diagonal_blocks(H: Tensor | None, group_size: int) -> Tensor | None:  # (K, K) -> (G, g, g)
    if H is None:
        return None
    extra = -H.shape[0] % group_size
    H = F.pad(H, (0, extra, 0, extra))
    groups = H.shape[0] // group_size
    return torch.stack([H.view(groups, group_size, groups, group_size)[i, :, i] for i in range(groups)])


def _row_blocks(W: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one number of rows into blocks that fit the cache for W."""
    size = max(16, BLOCK_BYTES // (W.element_size() * W.shape[1]))
    return zip(*(rows.split(size) for rows in (W, *others)), strict=True)


def _safe(step: Tensor) -> Tensor:
    # A group or row of zeros has no range; any positive step gives the code of zero.
    return torch.where(step > 0, step, 1.0)


def checked(W: Tensor, H: Tensor | None, group_size: int, strict: bool) -> tuple[Tensor, Tensor | None]:
    """Return both as they are computed with, or raise."""
    if W.ndim != 2 or not W.is_floating_point() or not W.numel():
        raise QuernelError(f"W must be a floating matrix (out, in); got {W.dtype} of shape {tuple(W.shape)}")
    check_finite("W", W)
    check_choice("group_size", group_size, GROUP_SIZES)
    if strict and W.shape[1] % group_size:
        raise QuernelError(
            f"group_size must divide the {W.shape[1]} inputs with strict=True; got {group_size}. Without it the last "
            "group is shorter"
        )
    dtype = torch.float64 if W.dtype is torch.float64 else torch.float32
    W = W.detach().to(dtype)
    if H is None:
        return W, None
    if tuple(H.shape) != (W.shape[1], W.shape[1]):
        raise QuernelError(f"H must have shape {(W.shape[1],) * 2} to fit W; got {tuple(H.shape)}")
    check_finite("H", H)
    return W, H.to(W.device)
