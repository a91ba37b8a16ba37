"""``binary_linear_attention``: attention linear in the number of tokens, with queries and keys of zeros and ones.

Per head, with rows normalised and binarised, b = 1[x / ||x|| > threshold],

    y = v / 2 + (1 / pi) b_q (b_k^T v),    out = y / ||y|| + DWConv(v),

the first order of the angular kernel 1 - angle / pi (arXiv 2306.06446).  As b holds zeros and ones only, the products
are additions.  On the CPU and without gradients one fused kernel does all of it, else a composition of torch
operations, whose gradient through b is that of clamp(x / ||x||, 0, 1).  Cost O(N D^2) a head, memory O(N D).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._intrinsics import LANES
from quernel._threads import parallel_ranges, workspace
from quernel._validate import check_choice, check_float
from quernel.nn._binary_attention_kernels import (
    CHUNK,
    EPS,
    finish_chunks,
    merge_chunks,
    scratch_size,
    sum_chunks,
    sums_size,
)
from quernel.nn.functional.straight_through import heaviside_through

CONSTANTS = ("self", "sum")
FUSED = (torch.bfloat16, torch.float16, torch.float32)
_EMPTY = np.empty(0, np.float32)


def binary_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv: Tensor,
    *,
    q_threshold: Tensor | None = None,
    k_threshold: Tensor | None = None,
    constant: str = "self",
    sparse: float | None = None,
) -> Tensor:
    """Mix tokens by binary linear attention and a depthwise convolution.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, H, N, D)
        Any strides.
    conv : Tensor, shape (H, kernel)
        One filter a head, ``kernel`` odd, centred on the token; zeros beyond the ends.
    q_threshold, k_threshold : Tensor, shape (H,), optional
        What a normalised value must exceed to count as 1; None is the mean of each row.
    constant : {"self", "sum"}, default="self"
        The constant term: half the token's own value, or half the sum over all tokens, which is the literal first
        order of the kernel.
    sparse : float, optional
        Add ``softmax(q k^T / sqrt(D)) v`` with weights up to this value left out; quadratic in N, for training.

    Returns
    -------
    out : Tensor, shape (B, H, N, D)
        Dtype of ``q``; heads are the third axis in memory, so that they merge without a copy.

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit, or ``kernel`` is even.

    Notes
    -----
    A row of zeros, of ``q`` or of ``y``, gives finite values: lengths count as 1e-12 at least.  A whole-batch mean as
    threshold makes a row depend on the others of its batch; give a constant one in inference.

    References
    ----------
    You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
    arXiv 2306.06446, 2023.  The constant term on the token's own value follows the authors' code.

    Examples
    --------
    >>> import torch
    >>> q = k = v = torch.eye(4).reshape(1, 1, 4, 4)
    >>> binary_linear_attention(q, k, v, torch.zeros(1, 3))[0, 0, 0].round(decimals=3)
    tensor([1., 0., 0., 0.])
    """
    check_choice("constant", constant, CONSTANTS)
    if sparse is not None:
        check_float("sparse", sparse, low=0.0, high=1.0)
    _check(q, k, v, conv, q_threshold, k_threshold)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, conv))
    if wants_grad or sparse is not None or q.dtype not in FUSED or q.device.type != "cpu":
        return composed(q, k, v, conv, q_threshold, k_threshold, constant == "sum", sparse)
    return _op(q, k, v, conv, q_threshold, k_threshold, constant == "sum")


def binary_codes(x: Tensor, threshold: Tensor | None) -> Tensor:
    """Return 1 where ``x / ||x||`` exceeds the threshold, else 0; ``x``: (B, H, N, D), threshold (H,) or None."""
    unit = F.normalize(x, dim=-1, eps=EPS)
    limit = unit.detach().mean(-1, keepdim=True) if threshold is None else threshold.to(x.dtype).view(-1, 1, 1)
    return heaviside_through(unit, limit)


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv: Tensor,
    q_threshold: Tensor | None,
    k_threshold: Tensor | None,
    total: bool,
    sparse: float | None = None,
) -> Tensor:
    """The same by torch operations, with gradients; half precision is summed in float32."""
    dtype = q.dtype
    if dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    sums = binary_codes(k, k_threshold).transpose(-2, -1) @ v  # (B, H, D, D)
    y = (binary_codes(q, q_threshold) @ sums) * (1 / math.pi)  # (B, H, N, D)
    y = y + 0.5 * (v.sum(-2, keepdim=True) if total else v)
    if sparse is not None:
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)  # (B, H, N, N)
        y = y + torch.where(weights > sparse, weights, 0.0) @ v
    heads, size = conv.shape
    mixed = F.conv2d(v, conv.to(v.dtype).view(heads, 1, size, 1), padding=(size // 2, 0), groups=heads)
    return (F.normalize(y, dim=-1, eps=EPS) + mixed).to(dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, conv: Tensor, q_threshold: Tensor | None, k_threshold: Tensor | None
) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise QuernelError(
            "q, k and v must have one shape (batch, heads, tokens, head size); got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise QuernelError(f"q, k and v must be of one floating dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    heads = q.shape[1]
    if conv.ndim != 2 or conv.shape[0] != heads or conv.shape[1] % 2 == 0:
        raise QuernelError(
            f"conv must have shape ({heads}, kernel) with an odd kernel, one filter a head; got {tuple(conv.shape)}"
        )
    for name, threshold in (("q_threshold", q_threshold), ("k_threshold", k_threshold)):
        if threshold is not None and tuple(threshold.shape) != (heads,):
            raise QuernelError(f"{name} must have shape ({heads},), one entry a head; got {tuple(threshold.shape)}")


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv: Tensor,
    q_threshold: Tensor | None,
    k_threshold: Tensor | None,
    total: bool,
) -> Tensor:
    _check(q, k, v, conv, q_threshold, k_threshold)
    batch, heads, n, d = q.shape
    width = -(-d // LANES) * LANES
    out = torch.empty(batch, n, heads, width, dtype=torch.float32, device="cpu")
    if out.numel():
        a, b, c = (_rows(x, width) for x in (q, k, v))
        sizes, size = (heads, n, width, d), sums_size(width)
        items = batch * heads * -(-n // CHUNK)
        sums = workspace("binary_attention sums", items * size, torch.float32).view(items, size).numpy()
        filters = _constant(conv)
        queries, keys, values = ((x.data_ptr(), *x.stride()[:3]) for x in (a, b, c))
        limits, place = [_constant(t) for t in (q_threshold, k_threshold)], out.data_ptr()

        def scratch() -> npt.NDArray[np.float32]:
            rows = workspace("binary_attention chunk", scratch_size(width, filters.shape[1]), torch.float32)
            return rows.numpy()

        def accumulate(start: int, stop: int) -> None:
            sum_chunks(keys, values, sizes, limits[1], sums, scratch(), start, stop)

        def finish(start: int, stop: int) -> None:
            finish_chunks(queries, values, sizes, limits[0], filters, total, sums, place, scratch(), start, stop)

        parallel_ranges(accumulate, items)
        parallel_ranges(lambda start, stop: merge_chunks(sums, sizes, start, stop), batch * heads)
        parallel_ranges(finish, items)
    out = out if width == d else out[..., :d].contiguous()
    return out.to(q.dtype).transpose(1, 2)


def _rows(x: Tensor, width: int) -> Tensor:
    """Return ``x`` in float32 with dense rows of whole vectors."""
    x = x.detach().to(torch.float32)
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _constant(x: Tensor | None) -> npt.NDArray[np.float32]:
    """Return a small tensor as the kernels read it; an empty array for None."""
    held: npt.NDArray[np.float32] = _EMPTY if x is None else x.detach().to(torch.float32).contiguous().numpy()
    return held


# The low-level interface: an op made by torch.library.custom_op costs 10 us a call, this one 2.5 us.
_library = torch.library.Library("quernel", "FRAGMENT")
_library.define(
    "binary_attention(Tensor q, Tensor k, Tensor v, Tensor conv, Tensor? q_threshold, Tensor? k_threshold, bool total)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("binary_attention", _compute, "CPU")
_op = torch.ops.quernel.binary_attention.default


@torch.library.register_fake("quernel::binary_attention", lib=_library)
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    conv: Tensor,
    q_threshold: Tensor | None,
    k_threshold: Tensor | None,
    total: bool,
) -> Tensor:
    _check(q, k, v, conv, q_threshold, k_threshold)
    batch, heads, n, d = q.shape
    return q.new_empty((batch, n, heads, d)).transpose(1, 2)


def _warmup() -> None:
    """Compile the kernels; ``quernel warmup`` calls it."""
    x = torch.ones(1, 1, 2, LANES)
    _compute(x, x, x, torch.ones(1, 3), None, None, False)
