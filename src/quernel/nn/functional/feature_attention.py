"""``linear_attention``: attention by features, linear in the number of tokens; causal by chunks or step by step.

With features phi of queries and keys, and n the number of keys that count,

    o_i = (sum_j (rho phi_q_i . rho phi_k_j) v_j / n) / (sum_j (phi_q_i . phi_k_j) / n + eps)

rho turns features by rotary positions, in the numerator only.  The sum over keys is taken first: O(N F D) for F
features and values of size D.  Causal, j <= i: chunks of tokens exchange sums, and within a chunk a masked product is
formed; or a state of F D + F + 1 numbers goes from token to token.  A decay g weighs key j by g^(i - j), in n too.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int, check_type
from quernel.nn.functional.rope import check_rope, rotate

# Chunks whose decayed sums are added by one triangular product; more are taken in groups.
GROUP = 32
# Numbers of keys are divided by; a decay may leave less than one of them.  Below this no key counts, and sums of
# nothing are divided by 1: by less, their gradients would be infinite.
LEAST_COUNT = 1e-30
# Tokens that inference takes at a time, so that what is between features and result stays in the cache.
SEGMENT = 512


class LinearAttentionState(NamedTuple):
    """What causal linear attention carries from token to token.

    Attributes
    ----------
    values : Tensor, shape (B, H, F, D)
        Sum of rho(phi_k) v^T.
    keys : Tensor, shape (B, H, F)
        Sum of phi_k.
    n_keys : Tensor, shape (B, H)
        Number of keys; all three decayed if there is a decay.
    """

    values: Tensor
    keys: Tensor
    n_keys: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        features: int,
        size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Return the state before the first token."""
        shapes = ((batch, heads, features, size), (batch, heads, features), (batch, heads))
        return cls(*(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes))


def linear_attention(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    chunk: int = 128,
    normalize: bool = True,
    rope: Tensor | None = None,
    decay: Tensor | None = None,
    mask: Tensor | None = None,
    state: LinearAttentionState | None = None,
    eps: float = 1e-6,
) -> Any:
    """Mix values by products of features.

    Parameters
    ----------
    phi_q : Tensor, shape (B, H, N, F)
        Features of the queries, not negative where they are to be weights.
    phi_k : Tensor, shape (B, H, M, F)
        Features of the keys; M = N if causal.
    v : Tensor, shape (B, H, M, D)
        Values.
    causal : bool, default=False
        Whether token i sees the keys up to i only.
    chunk : int, default=128
        Tokens of a chunk, causal only; it changes the time and not the result.
    normalize : bool, default=True
        Whether to divide by the sum of weights; without, the sums of weighted values are returned as they are.
    rope : Tensor, shape (N, dim / 2, 2), optional
        Rotations of the tokens, from ``rope1d`` or ``rope2d``, applied to each block of ``dim`` features.
    decay : Tensor, shape (H,), optional
        Factors in (0, 1] a token, causal only.
    mask : Tensor, shape (B, M), optional
        True where a key counts; the features and values of others may be anything.
    state : LinearAttentionState, optional
        What came before the first token, causal only.
    eps : float, default=1e-6
        Added to the *mean* weight.  Where all keys are near zero it shrinks the output towards zero.

    Returns
    -------
    out : Tensor, shape (B, H, N, D), or (out, state) if a state was given
        In the dtype of ``v``; sums are in float32 at least.

    Raises
    ------
    QuernelError
        If shapes do not fit, or decay or state are given without ``causal``.

    References
    ----------
    Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arXiv 2006.16236, 2020.  Mean, eps and rotations as in NaLaFormer, arXiv 2506.21137.

    Examples
    --------
    >>> import torch
    >>> phi = torch.ones(1, 1, 3, 2)
    >>> linear_attention(phi, phi, torch.tensor([[[[0.0], [2.0], [4.0]]]]), causal=True).flatten().round(decimals=3)
    tensor([0., 1., 2.])
    """
    check_float("eps", eps, low=0.0)
    check_operands(phi_q, phi_k, v, causal, rope, decay, mask, state)
    given, dtype = v.dtype, torch.promote_types(torch.promote_types(phi_q.dtype, phi_k.dtype), torch.float32)
    phi_q, phi_k, v = phi_q.to(dtype), phi_k.to(dtype), v.to(dtype)
    if mask is not None:
        # Filled, not multiplied: what does not count may be NaN.
        gone = ~mask[:, None, :, None]
        phi_k, v = phi_k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
    turned_q, turned_k = (phi_q, phi_k) if rope is None else (rotate(phi_q, rope), rotate(phi_k, rope))
    operands = _Operands(phi_q, phi_k, turned_q, turned_k, v)
    if not causal:
        return _bidirectional(operands, mask, normalize, eps).to(given)
    gamma = None if decay is None else decay.to(dtype)[:, None, None]  # (H, 1, 1)
    batch, heads, tokens, features = phi_k.shape
    if state is None:
        before = LinearAttentionState.empty(batch, heads, features, v.shape[3], device=v.device, dtype=dtype)
    else:
        before = LinearAttentionState(*(t.to(dtype) for t in state))
    size = check_int("chunk", chunk, low=1)
    if tokens == 0:
        out, after = v, before
    elif tokens == 1:
        out, after = _recurrent(operands, before, gamma, mask, normalize, eps)
    elif in_segments(v, *operands, *before, decay):
        parts, after = [], before
        for here in segments(tokens, size):
            kept = None if mask is None else mask[:, here]
            part = _Operands(*(t[:, :, here] for t in operands))
            y, after = _chunked(part, after, gamma, kept, rope is not None, size, normalize, eps)
            parts.append(y)
        out = torch.cat(parts, dim=2)
    else:
        out, after = _chunked(operands, before, gamma, mask, rope is not None, size, normalize, eps)
    return out.to(given) if state is None else (out.to(given), after)


def in_segments(v: Tensor, *tensors: Tensor | None) -> bool:
    """Say whether to take a sequence piece by piece, in inference on a CPU; in a graph pieces only make it long."""
    if v.device.type != "cpu" or v.shape[2] < 2 * SEGMENT or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (v, *tensors)))


def segments(tokens: int, chunk: int) -> list[slice]:
    """Return about ``SEGMENT`` tokens at a time, whole chunks."""
    step = max(SEGMENT // chunk, 1) * chunk
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


class _Operands(NamedTuple):
    """Features, those of the numerator, and values; (B, H, N, F or D) each."""

    phi_q: Tensor
    phi_k: Tensor
    turned_q: Tensor
    turned_k: Tensor
    v: Tensor


def _bidirectional(operands: _Operands, mask: Tensor | None, normalize: bool, eps: float) -> Tensor:
    phi_q, phi_k, turned_q, turned_k, v = operands
    total = turned_k.mT @ v  # (B, H, F, D)
    if not normalize:
        return turned_q @ total
    n = float(max(v.shape[2], 1)) if mask is None else mask.sum(1).clamp_min(1).to(v.dtype)[:, None, None, None]
    weight = _column(phi_q, phi_k.sum(2, keepdim=True) / n) + eps  # (B, H, N, 1)
    return (turned_q @ (total / n)) / weight


def _divisor(count: Tensor) -> Tensor:
    return torch.where(count > LEAST_COUNT, count, 1.0)


def _recurrent(
    operands: _Operands,
    before: LinearAttentionState,
    gamma: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, LinearAttentionState]:
    """One token: decay what is held, add the key, read with the query."""
    phi_q, phi_k, turned_q, turned_k, v = operands
    values, keys, count = before
    if gamma is not None:
        values, keys, count = values * gamma, keys * gamma[..., 0], count * gamma[:, 0, 0]
    values = values + turned_k.mT * v
    keys = keys + phi_k[:, :, 0]
    count = count + (1.0 if mask is None else mask.to(count.dtype))
    out = turned_q @ values  # (B, H, 1, D)
    if normalize:
        n = _divisor(count)[..., None, None]
        out = (out / n) / (_column(phi_q, keys[:, :, None] / n) + eps)
    return out, LinearAttentionState(values, keys, count)


def _chunked(
    operands: _Operands,
    before: LinearAttentionState,
    gamma: Tensor | None,
    mask: Tensor | None,
    rotated: bool,
    chunk: int,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, LinearAttentionState]:
    """All tokens: sums over whole chunks, then for each chunk what came before it and a masked product inside."""
    tokens, kernels = operands.v.shape[2], _kernels(gamma, *operands)
    size = min(chunk, tokens) if kernels is None else kernels.CHUNK
    room = -tokens % size
    phi_q, phi_k, turned_q, turned_k, v = (
        (F.pad(t, (0, 0, 0, room)) if room else t).unflatten(2, (-1, size)) for t in operands
    )
    kept = v.new_ones(1, 1, tokens) if mask is None else mask.to(v.dtype)[:, None]
    kept = F.pad(kept, (0, room)).unflatten(2, (-1, size))[..., None]  # (B or 1, 1, T, C, 1)
    place = torch.arange(size, device=v.device, dtype=v.dtype)
    falls = _falls(gamma, place)
    # What is left, at each query of a chunk, of the sums before it.
    left: Tensor | float = 1.0 if gamma is None else (gamma ** (place[:, None] + 1))[:, None]  # (H, 1, C, 1)
    values, values_after = _sums(turned_k, v, before.values, gamma, room)
    keys, keys_after = _sums(phi_k, kept, before.keys[..., None], gamma, room)
    counts, count_after = _sums(torch.ones_like(kept), kept, before.n_keys[..., None, None], gamma, room)
    products = partial(_products, falls, left) if kernels is None else partial(kernels.chunk_products, gamma=gamma)
    out, weight = products(turned_q, turned_k, v, values, keys)
    if normalize:
        if rotated:
            weight = products(phi_q, phi_k, kept.expand(*phi_q.shape[:-1], 1), keys, keys)[1]
        n = _divisor(counts * left + falls @ kept)
        out = (out / n) / (weight / n + eps)
    after = LinearAttentionState(values_after, keys_after[..., 0], count_after[..., 0, 0])
    return out.flatten(2, 3)[:, :, :tokens], after


def _products(
    falls: Tensor, left: Tensor | float, q: Tensor, k: Tensor, v: Tensor, values: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted sums of values, (B, H, T, C, D), and of weights, (B, H, T, C, 1), of chunks and before."""
    inside, asked = (q @ k.mT) * falls, q * left
    return asked @ values + inside @ v, _column(asked, keys.mT) + inside.sum(-1, keepdim=True)


def _column(phi: Tensor, keys: Tensor) -> Tensor:
    """Return phi keys^T, (..., N, 1), of one row (..., 1, F); torch is slow at batches of products with one column."""
    return (keys @ phi.mT).mT


def _kernels(gamma: Tensor | None, *tensors: Tensor) -> Any:
    """Return the Triton kernels if they are there and for these tensors, else None."""
    usual = all(t.is_cuda and t.dtype is torch.float32 for t in tensors) and not torch.compiler.is_compiling()
    learned = gamma is not None and gamma.requires_grad
    if not usual or learned or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("quernel.nn._linear_attention_triton")


def _sums(k: Tensor, v: Tensor, first: Tensor, gamma: Tensor | None, room: int) -> tuple[Tensor, Tensor]:
    """Return the sums of k v^T before each chunk, (B, H, T, F, D), and after the last, which has ``room`` fillings.

    k: (B, H, T, C, F)  v: (B, H, T, C, D)  first: (B, H, F, D)
    """
    size = k.shape[3]
    first = first[:, :, None]
    if gamma is None:
        sums = torch.cat([first, (k[:, :, :-1].mT @ v[:, :, :-1]).expand(*first.shape[:2], -1, -1, -1)], 2).cumsum(2)
        return sums, sums[:, :, -1] + k[:, :, -1].mT @ v[:, :, -1]
    steps = torch.arange(size - 1, -1, -1, device=k.device, dtype=k.dtype)[:, None]
    chunks = (k[:, :, :-1] * (gamma**steps)[:, None]).mT @ v[:, :, :-1]
    sums = torch.cat([first, chunks.expand(*first.shape[:2], -1, -1, -1)], 2)  # (B, H, T, F, D)
    sums = _decayed_sums(sums.flatten(3), gamma**size).unflatten(3, first.shape[3:])
    rest = gamma ** (steps - room).clamp_min(0)
    return sums, sums[:, :, -1] * gamma ** (size - room) + (k[:, :, -1] * rest).mT @ v[:, :, -1]


def _falls(gamma: Tensor | None, place: Tensor) -> Tensor:
    """Return g^(i - j) for j <= i, else 0: (C, C), or (H, 1, C, C) with a decay."""
    steps = place[:, None] - place
    if gamma is None:
        return (steps >= 0).to(place.dtype)
    return torch.where(steps >= 0, gamma ** steps.clamp_min(0), 0.0)[:, None]


def _decayed_sums(x: Tensor, factor: Tensor) -> Tensor:
    """Return y_t = factor y_{t-1} + x_t; x: (B, H, T, E), factor: (H, 1, 1).  Powers of it only fall, never grow."""
    length = x.shape[2]
    if length <= GROUP:
        return _falls(factor, torch.arange(length, device=x.device, dtype=x.dtype))[:, 0] @ x
    groups = F.pad(x, (0, 0, 0, -length % GROUP)).unflatten(2, (-1, GROUP))  # (B, H, T / 32, 32, E)
    place = torch.arange(GROUP, device=x.device, dtype=x.dtype)
    inner = _falls(factor, place) @ groups
    ends = _decayed_sums(inner[:, :, :-1, -1], factor**GROUP)
    ends = F.pad(ends, (0, 0, 1, 0))[:, :, :, None]  # before each group
    sums = inner + ends * (factor ** (place[:, None] + 1))[:, None]
    return sums.flatten(2, 3)[:, :, :length]


def check_floating(**tensors: Tensor) -> None:
    """Raise unless these are tensors of floating numbers."""
    for name, x in tensors.items():
        if not check_type(name, x, Tensor).is_floating_point():
            raise QuernelError(f"{name} must be floating; got {x.dtype}. Convert it by {name}.float()")


def check_operands(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    causal: bool,
    rope: Tensor | None,
    decay: Tensor | None,
    mask: Tensor | None,
    state: LinearAttentionState | None,
) -> None:
    """Raise unless features (or what they are made of), values and options fit together."""
    check_floating(phi_q=phi_q, phi_k=phi_k, v=v)
    if phi_q.ndim != 4 or phi_k.ndim != 4 or v.ndim != 4:
        raise QuernelError(
            "phi_q, phi_k and v must have shapes (B, H, N, F), (B, H, M, F) and (B, H, M, D); got "
            f"{tuple(phi_q.shape)}, {tuple(phi_k.shape)} and {tuple(v.shape)}"
        )
    batch, heads, tokens, features = phi_k.shape
    if phi_q.shape[:2] != (batch, heads) or phi_q.shape[3] != features or v.shape[:3] != (batch, heads, tokens):
        raise QuernelError(
            "phi_q, phi_k and v must agree in batch and heads, phi_q and phi_k in features, phi_k and v in tokens; got "
            f"{tuple(phi_q.shape)}, {tuple(phi_k.shape)} and {tuple(v.shape)}"
        )
    if (causal or rope is not None) and phi_q.shape[2] != tokens:
        raise QuernelError(f"causal attention and rope need as many queries as keys; got {phi_q.shape[2]} and {tokens}")
    if rope is not None:
        check_rope(rope, tokens, features)
    if not causal and (decay is not None or state is not None):
        raise QuernelError(
            f"{'decay' if decay is not None else 'state'} needs causal=True: it follows an order of tokens"
        )
    if decay is not None and tuple(check_type("decay", decay, Tensor).shape) != (heads,):
        raise QuernelError(f"decay must have shape ({heads},), a factor in (0, 1] a head; got {tuple(decay.shape)}")
    if mask is not None and (tuple(mask.shape) != (batch, tokens) or mask.dtype is not torch.bool):
        raise QuernelError(f"mask must be bool of shape ({batch}, {tokens}); got {mask.dtype} of {tuple(mask.shape)}")
    if state is not None:
        wanted = (batch, heads, features, v.shape[3])
        if (
            tuple(state[0].shape) != wanted
            or tuple(state[1].shape) != wanted[:3]
            or tuple(state[2].shape) != wanted[:2]
        ):
            raise QuernelError(
                f"state must hold tensors of shapes {wanted}, {wanted[:3]} and {wanted[:2]}; got "
                f"{', '.join(str(tuple(t.shape)) for t in state)}"
            )
