"""``nala_feature_map``: features of queries and keys that keep the norm of a query and all signs (arXiv 2506.21137).

With n = ||q||, u = q / max(n, 1e-12), p = lambda (0.5 + tanh(n / s)), elementwise and per head,

    split    phi_q = [relu(u)^p ; relu(-u)^p],              phi_k = [relu(k)^lambda ; relu(-k)^lambda]
    cosine   phi_q = [|u|^p cos a(q) ; |u|^p sin a(q)],     phi_k = [|k|^lambda cos a(k) ; |k|^lambda sin a(k)]

with angles a(x) = pi / 4 x / ||x||.  Products of features are never negative: coordinates of one sign add up, those of
opposite signs add nothing (split) or less (cosine).  A longer query has a larger power, so its weights are sharper; in
linear attention with a homogeneous map (ReLU) its norm would cancel.  ``nala_attention`` joins map and attention.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.nn._nala_kernels import EPS
from quernel.nn._nala_ops import nala_attention_op, power_features
from quernel.nn.functional.feature_attention import (
    LinearAttentionState,
    check_floating,
    check_operands,
    in_segments,
    linear_attention,
    segments,
)

Variant = Literal["split", "cosine"]
VARIANTS: tuple[Variant, ...] = ("split", "cosine")
# Of the power of keys: the smallest power of a query is half of it and must be 1 at least to have gradients at zero.
LEAST_POWER = 2.0


def nala_feature_map(
    q: Tensor, k: Tensor, *, power: float = 3.0, norm_scale: float | Tensor = 1.0, variant: Variant = "split"
) -> tuple[Tensor, Tensor]:
    """Return the features of queries and keys for ``linear_attention``.

    Parameters
    ----------
    q : Tensor, shape (B, H, N, D)
        Queries; half precision is computed in float32.
    k : Tensor, shape (B, H, M, D)
        Keys.  They keep their norm: features grow with its cube.
    power : float, default=3.0
        lambda, at least 2.
    norm_scale : float or Tensor of shape (H,), default=1.0
        s: norms of queries far beyond it are no longer told apart.  1 is the published form; for queries that are not
        normalised, whose norms are near sqrt(D), sqrt(D) keeps the map sensitive to them.
    variant : {"split", "cosine"}, default="split"
        "split" is the map of the authors' code, "cosine" a reconstruction of the paper's first version.

    Returns
    -------
    phi_q, phi_k : Tensor, shapes (B, H, N, 2 D) and (B, H, M, 2 D)
        float32, or float64 for such inputs.

    Raises
    ------
    QuernelError
        If shapes do not fit or an option is out of range.

    Notes
    -----
    A query or key of zeros has features of zeros, and gradients of zeros.  The compiled kernels, of the split map in
    float32 on CPUs, have no second derivatives.

    References
    ----------
    Meng et al., "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137, 2025.

    Examples
    --------
    >>> import torch
    >>> phi_q, phi_k = nala_feature_map(torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[-2.0, 1.0]]]]))
    >>> phi_k.flatten()
    tensor([0., 1., 8., 0.])
    """
    rates = _checked(q, k, power, norm_scale, variant)
    q, k = _widened(q), _widened(k)
    if variant == "split" and _compiled(q) and _compiled(k):
        return power_features(q, rates.to(q.dtype), power), power_features(k, None, power)
    return composed(q, k, power, rates.to(q.dtype), variant)


def nala_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    power: float = 3.0,
    norm_scale: float | Tensor = 1.0,
    variant: Variant = "split",
    causal: bool = False,
    chunk: int = 128,
    rope: Tensor | None = None,
    decay: Tensor | None = None,
    mask: Tensor | None = None,
    state: LinearAttentionState | None = None,
    eps: float = 1e-6,
) -> Any:
    """Return ``linear_attention`` with the features of ``nala_feature_map``, which inference never holds in memory.

    Parameters
    ----------
    q, k, v : Tensor
        Shapes (B, H, N, D), (B, H, M, D) and (B, H, M, E).
    power, norm_scale, variant
        As in ``nala_feature_map``.
    causal, chunk, rope, decay, mask, state, eps
        As in ``linear_attention``.

    Returns
    -------
    out : Tensor, shape (B, H, N, E), or (out, state) if a state was given

    Examples
    --------
    >>> import torch
    >>> q = k = v = torch.randn(1, 2, 9, 8)
    >>> nala_attention(q, k, v).shape
    torch.Size([1, 2, 9, 8])
    """
    rates = _checked(q, k, power, norm_scale, variant)
    check_operands(q, k, v, causal, rope, decay, mask, None if causal else state)
    check_float("eps", eps, low=0.0)
    check_int("chunk", chunk, low=1)
    if mask is not None:
        # The features of zeros are zeros; what does not count may be NaN.
        gone = ~mask[:, None, :, None]
        k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, rates))
    wide = [_widened(t) for t in (q, k, v)]
    if not causal and not graded and variant == "split" and all(_compiled(t) for t in wide):
        turns = None if rope is None else rope.to(torch.float32)
        return nala_attention_op(*wide, rates.float(), power, turns, mask, eps).to(v.dtype)

    def attend(here: slice, state: LinearAttentionState | None) -> Any:
        phi = nala_feature_map(q[:, :, here], k[:, :, here], power=power, norm_scale=norm_scale, variant=variant)
        turns, kept = None if rope is None else rope[here], None if mask is None else mask[:, here]
        told: dict[str, Any] = {"chunk": chunk, "rope": turns, "decay": decay, "mask": kept, "eps": eps}
        return linear_attention(*phi, v[:, :, here], causal=causal, state=state, **told)

    if not causal or graded or not in_segments(v):
        return attend(slice(None), state)
    batch, heads, _, size = q.shape
    parts, like = [], wide[0]
    after = state or LinearAttentionState.empty(
        batch, heads, 2 * size, v.shape[3], device=like.device, dtype=like.dtype
    )
    for here in segments(k.shape[2], chunk):
        y, after = attend(here, after)
        parts.append(y)
    out = torch.cat(parts, dim=2)
    return out if state is None else (out, after)


def composed(q: Tensor, k: Tensor, power: float, rates: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Return the features by torch operations, for any device, dtype and variant; rates: (H,) = 1 / norm_scale."""
    norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    unit = q / norm.clamp_min(EPS)
    p = power * (0.5 + torch.tanh(norm * rates[:, None, None]))
    size_q, size_k = unit.abs() ** p, k.abs() ** power
    if variant == "cosine":
        angles = [x * (math.pi / 4) for x in (unit, torch.nn.functional.normalize(k, dim=-1, eps=EPS))]
        pairs = zip((size_q, size_k), angles, strict=True)
        phi_q, phi_k = (torch.cat([size * a.cos(), size * a.sin()], dim=-1) for size, a in pairs)
    else:
        phi_q, phi_k = (_split(size, x) for size, x in ((size_q, q), (size_k, k)))
    return phi_q, phi_k


def _split(size: Tensor, x: Tensor) -> Tensor:
    # What is not negative, not what is positive: NaN stays.
    zero = size.new_zeros(())
    return torch.cat([torch.where(x <= 0, zero, size), torch.where(x >= 0, zero, size)], dim=-1)


def _checked(q: Tensor, k: Tensor, power: float, norm_scale: float | Tensor, variant: str) -> Tensor:
    """Raise unless the operands fit; return 1 / norm_scale, (H,)."""
    check_choice("variant", variant, VARIANTS)
    check_float("power", power, low=LEAST_POWER)
    check_floating(q=q, k=k)
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise QuernelError(
            "q and k must have shapes (B, H, N, D) and (B, H, M, D), alike in batch, heads and head size; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    heads = q.shape[1]
    if isinstance(norm_scale, Tensor):
        if tuple(norm_scale.shape) != (heads,):
            raise QuernelError(f"norm_scale must have shape ({heads},), one a head; got {tuple(norm_scale.shape)}")
        return norm_scale.reciprocal()
    check_float("norm_scale", norm_scale, low=0.0, open_low=True)
    return torch.full((heads,), 1.0 / norm_scale, device=q.device)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype is torch.float32
