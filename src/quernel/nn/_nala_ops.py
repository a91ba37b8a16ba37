"""Custom ops of norm-aware attention: ``quernel::power_features`` with its gradient, and ``quernel::nala_attention``.

The second keeps no features: those of some thousand rows at a time are written to a workspace that stays in the cache
and multiplied there, first the keys' for the sums, then the queries'.  Only float32 on the CPU; elsewhere
``functional.nala`` composes them of torch operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._threads import num_threads, parallel_ranges, workspace
from quernel.nn._nala_kernels import write_features, write_gradients

# Rows that are worth a second thread.
GRAIN = 512
# Numbers of features at a time and thread: what stays in the cache with values and results.
BLOCK = 2**19
_NONE = np.empty(0, np.float32)


@torch.library.custom_op("quernel::power_features", mutates_args=(), device_types="cpu")
def power_features(x: Tensor, rates: Tensor | None, power: float) -> Tensor:
    """Return the features of queries, or of keys if there are no ``rates``; x: (B, H, N, D) -> (B, H, N, 2 D)."""
    out = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    _write(_rows(x), rates, power, out)
    return out


@power_features.register_fake
def _(x: Tensor, rates: Tensor | None, power: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])


@torch.library.custom_op("quernel::power_features_backward", mutates_args=(), device_types="cpu")
def power_features_backward(
    grad: Tensor, phi: Tensor, x: Tensor, rates: Tensor | None, power: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients by x, (B, H, N, D), and by the rate of each row's head, (B, H, N)."""
    x, phi, grad = _rows(x), phi.contiguous(), grad.contiguous()
    out, slopes = torch.empty(x.shape), torch.zeros(x.shape[:-1])
    held = (_described(x), tuple(x.shape[1:]), _numbers(rates), power, phi.data_ptr(), grad.data_ptr(), out.data_ptr())
    flat = slopes.view(-1).numpy()
    parallel_ranges(lambda start, stop: write_gradients(*held, flat, start, stop), flat.size, grain=GRAIN)
    return out, slopes


@power_features_backward.register_fake
def _(grad: Tensor, phi: Tensor, x: Tensor, rates: Tensor | None, power: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, rates, ctx.power = inputs
    ctx.save_for_backward(x, rates, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, rates, phi = ctx.saved_tensors
    dx, slopes = power_features_backward(grad, phi, x, rates, ctx.power)
    return dx, None if rates is None else slopes.sum((0, 2)), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise QuernelError(
        "nala_feature_map has no second derivative in float32 on a CPU; give float64, or take it on another device"
    )


power_features.register_autograd(_backward, setup_context=_keep)
power_features_backward.register_autograd(_no_second_derivative)


@torch.library.custom_op("quernel::nala_attention", mutates_args=(), device_types="cpu")
def nala_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    power: float,
    rope: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    """Return bidirectional attention without gradients, (B, H, N, D), heads the third axis in memory."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    batch, heads, tokens, size = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    if out.numel() == 0:
        return out.transpose(1, 2)
    rows = max(BLOCK * num_threads() // (2 * size * heads), 16)  # of all heads
    turns = None if rope is None else torch.view_as_complex(rope.contiguous())[:, None]  # (N, 1, D / 2)
    step = max(rows // max(tokens, k.shape[2]), 1)  # samples at a time
    for first in range(0, batch, step):
        part = slice(first, first + step)
        kept = None if mask is None else mask[part].to(q.dtype)
        values, keys = _summed(k[part], v[part], power, turns, kept, rows)
        for start in range(0, tokens, rows):
            here = slice(start, start + rows)
            phi = _features(q[part, :, here], rates, power)
            # Turned around: torch is eight times slower at many products of a matrix with one column.
            weight = (keys @ phi.mT).add_(eps).mT  # (B, H, N, 1)
            _turn(phi, turns, here)
            torch.div(phi @ values, weight, out=out[part, here].transpose(1, 2))
    return out.transpose(1, 2)


@nala_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    power: float,
    rope: Tensor | None,
    mask: Tensor | None,
    eps: float,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _summed(
    k: Tensor, v: Tensor, power: float, turns: Tensor | None, kept: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the means of rho(phi_k) v^T, (B, H, 2 D, D), and of phi_k, (B, H, 1, 2 D), over the keys that count."""
    batch, heads, tokens, size = k.shape
    values, keys = k.new_zeros(batch, heads, 2 * size, v.shape[3]), k.new_zeros(batch, heads, 2 * size)
    for start in range(0, tokens, rows):
        here = slice(start, start + rows)
        phi = _features(k[:, :, here], None, power)
        if kept is not None:
            phi *= kept[:, None, here, None]
        keys += phi.sum(2)
        _turn(phi, turns, here)
        flat, given = phi.flatten(0, 1), v[:, :, here].reshape(batch * heads, -1, v.shape[3])
        values.view(batch * heads, 2 * size, -1).baddbmm_(flat.mT, given)
    n = float(max(tokens, 1)) if kept is None else kept.sum(1).clamp_min_(1)[:, None, None]
    return values.div_(n if kept is None else n[..., None]), keys.div_(n)[:, :, None]  # type: ignore[index]


def _features(x: Tensor, rates: Tensor | None, power: float) -> Tensor:
    """Return the features in this thread's workspace."""
    shape = (*x.shape[:-1], 2 * x.shape[-1])
    phi: Tensor = workspace("norm-aware features", torch.Size(shape).numel(), torch.float32).view(shape)
    _write(x, rates, power, phi)
    return phi


def _turn(phi: Tensor, turns: Tensor | None, here: slice) -> None:
    """Rotate both halves of the features in place."""
    if turns is not None:
        torch.view_as_complex(phi.unflatten(-1, (-1, turns.shape[-1], 2))).mul_(turns[here])


def _write(x: Tensor, rates: Tensor | None, power: float, out: Tensor) -> None:
    held = (_described(x), tuple(x.shape[1:]), _numbers(rates), power, out.data_ptr())
    parallel_ranges(lambda start, stop: write_features(*held, start, stop), x.shape[:-1].numel(), grain=GRAIN)


def _described(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def _rows(x: Tensor) -> Tensor:
    """Return x with its last axis dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _numbers(rates: Tensor | None) -> Any:
    return _NONE if rates is None else rates.detach().contiguous().numpy()


def _warmup() -> None:
    """Compile the kernels; ``quernel warmup`` calls it."""
    x = torch.ones(1, 1, 1, 2)
    for rates in (None, torch.ones(1)):
        phi = power_features(x, rates, 3.0)
        power_features_backward(phi, phi, x, rates, 3.0)
