"""The custom op of neighborhood attention: outputs and logarithms of sums, with gradients, over the tiles of a plan.

    neighborhood_attention            q (B, N, H, D), k (B, N + M, G, D), v (B, N + M, G, E) -> (B, N, H, E), (B, N, H)
    neighborhood_attention_backward   their gradients; keeps q, k, v, the output and the logarithms

The plan is a constant of the shape and the options, which is all the op is told.  On CPUs float32 and half precision
take the compiled kernels, on GPUs those of Triton where it is installed; the rest takes torch's own operations.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._threads import parallel_ranges, workspace
from quernel.nn import _neighborhood_tiled as tiled
from quernel.nn._neighborhood_kernels import BLOCK, LOG2E, PIECE, attend, key_gradient, query_gradient, scratch_size
from quernel.nn._neighborhood_plan import NeighborhoodPlan, Tiles

# Queries of a tile: the lanes of a compiled kernel; for torch's operations and GPUs, large enough to be a product.
LANES, WIDE = 16, 64
# Multiply-adds that are worth a thread.
GRAIN = 2**18

Numbers = Sequence[int]
Access = tuple[int, int, int, int]


def plan_of(geometry: Numbers, lanes: int) -> NeighborhoodPlan:
    """Return the plan of a geometry: keys beyond the grid, then shape, windows, strides, dilations, causal flags."""
    extra, *rest = geometry
    n = len(rest) // 5
    shape, window, stride, dilation, causal = (tuple(rest[i * n : (i + 1) * n]) for i in range(5))
    return NeighborhoodPlan.of(shape, window, stride, dilation, [bool(c) for c in causal], tile=lanes, extra=extra)


def triton_kernels(backend: str, *tensors: Tensor) -> Any:
    """Return the Triton kernels if they are wanted or best, there, and made for these tensors, else None."""
    wanted = backend == "triton" or (backend == "auto" and all(t.is_cuda for t in tensors))
    if not wanted or importlib.util.find_spec("triton") is None:
        return None
    kernels = importlib.import_module("quernel.nn._neighborhood_triton")
    return kernels if kernels.takes(*tensors) else None


def is_compiled(backend: str, q: Tensor) -> bool:
    """Say whether the compiled kernels of CPUs are for these tensors."""
    return backend != "torch" and q.device.type == "cpu" and q.dtype is not torch.float64


def _forward(q: Tensor, k: Tensor, v: Tensor, geometry: Numbers, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    q, k, v = q.detach(), k.detach(), v.detach()
    if 0 in (*q.shape, *v.shape):
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3], dtype=_wide(q))
    kernels = triton_kernels(backend, q, k, v)
    if kernels is not None:
        return kernels.attend(q, k, v, plan_of(geometry, WIDE), scale)
    if is_compiled(backend, q):
        return _compiled(q, k, v, plan_of(geometry, LANES), scale)
    return tiled.attend(q, k, v, plan_of(geometry, WIDE), scale)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    geometry: Numbers,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, lse, delta = (t.detach() for t in (grad, q, k, v, lse, delta))
    if 0 in (*q.shape, *v.shape):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    kernels = triton_kernels(backend, grad, q, k, v)
    if kernels is not None:
        return kernels.gradients(q, k, v, grad, lse, delta, plan_of(geometry, WIDE), scale)
    if is_compiled(backend, q):
        return _compiled_gradients(q, k, v, grad, lse, delta, plan_of(geometry, LANES), scale)
    return tiled.gradients(q, k, v, grad, lse, delta, plan_of(geometry, WIDE), scale)


def _compiled(q: Tensor, k: Tensor, v: Tensor, plan: NeighborhoodPlan, scale: float) -> tuple[Tensor, Tensor]:
    dtype, (q, k, v) = q.dtype, map(_held, (q, k, v))
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    operands, sums = [_access(x) for x in (q, k, v, out)], lse.numpy()
    _run(attend, plan.queries, [*operands, sums], q, k, v, scale)
    return out.to(dtype), lse.mul_(1 / LOG2E)


def _compiled_gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, plan: NeighborhoodPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (q, k, v, grad) = q.dtype, map(_held, (q, k, v, grad))
    beside = [(lse * LOG2E).contiguous().numpy(), delta.contiguous().numpy()]
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    operands = [_access(x) for x in (q, k, v, grad)]
    _run(query_gradient, plan.queries, [*operands, _access(dq), *beside], q, k, v, scale)
    for tiles in plan.keys:
        _run(key_gradient, tiles, [*operands, _access(dk), _access(dv), *beside], q, k, v, scale)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _run(kernel: Any, tiles: Tiles, operands: list[Any], q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Run a kernel over all tiles of all samples and heads of keys."""
    tables, groups = tiles.packed, k.shape[2]
    sizes = (groups, q.shape[2] // groups, q.shape[3], v.shape[3])
    most = tables[3].shape[1]
    room, factor = scratch_size(max(sizes[2:]), max(PIECE, most)), np.float32(scale * LOG2E)

    def work(start: int, stop: int) -> None:
        scratch = workspace("neighborhood attention", room, torch.float32).numpy()
        near = workspace("neighborhood attention", most + BLOCK, torch.int32).numpy()
        kernel(*operands, tables, sizes, factor, scratch, near, start, stop)

    cost = most * LANES * sizes[1] * (sizes[2] + sizes[3])
    parallel_ranges(work, len(q) * groups * len(tables[0]), grain=max(1, GRAIN // cost))


def _held(x: Tensor) -> Tensor:
    """Return a tensor in float32 whose rows are dense."""
    x = x.to(torch.float32)
    return x if x.stride(-1) == 1 else x.contiguous()


def _access(x: Tensor) -> Access:
    """Return the address and the bytes from batch to batch, token to token and head to head."""
    batch, token, head = (4 * step for step in x.stride()[:3])
    return x.data_ptr(), batch, token, head


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.geometry, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)


def _grad(ctx: Any, grad: Tensor, lse_grad: Tensor) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    delta = (grad.to(lse.dtype) * out).sum(-1) - lse_grad
    return *_op_backward(grad, q, k, v, lse, delta, ctx.geometry, ctx.scale, ctx.backend), None, None, None


_library = torch.library.Library("quernel", "FRAGMENT")
_OPERANDS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "int[] geometry, float scale, str backend"
_BACKWARD = f"Tensor grad, {_OPERANDS}, Tensor lse, Tensor delta, {_OPTIONS}"
for _signature in (
    f"neighborhood_attention({_OPERANDS}, {_OPTIONS}) -> (Tensor, Tensor)",
    f"neighborhood_attention_backward({_BACKWARD}) -> (Tensor, Tensor, Tensor)",
):
    _library.define(_signature, tags=torch.Tag.pt2_compliant_tag)
_library.impl("neighborhood_attention", _forward, "CompositeExplicitAutograd")
_library.impl("neighborhood_attention_backward", _backward, "CompositeExplicitAutograd")
neighborhood_attention = torch.ops.quernel.neighborhood_attention.default
_op_backward = torch.ops.quernel.neighborhood_attention_backward.default


@torch.library.register_fake("quernel::neighborhood_attention", lib=_library)
def _fake(q: Tensor, k: Tensor, v: Tensor, geometry: Numbers, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=_wide(q))


@torch.library.register_fake("quernel::neighborhood_attention_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    geometry: Numbers,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise QuernelError(
        "neighborhood attention has no second derivative; where one is needed call quernel.nn.functional.na1d, na2d or "
        'na3d with backend="dense", which the layers do not take'
    )


torch.library.register_autograd("quernel::neighborhood_attention", _grad, setup_context=_setup, lib=_library)
torch.library.register_autograd("quernel::neighborhood_attention_backward", _no_second_derivative, lib=_library)


def _warmup() -> None:
    """Compile the kernels; ``quernel warmup`` calls it."""
    x = torch.ones(1, 4, 1, 4, requires_grad=True)
    out, _ = neighborhood_attention(x, x, x, (0, 4, 3, 1, 1, 0), 0.5, "auto")
    out.sum().backward()
