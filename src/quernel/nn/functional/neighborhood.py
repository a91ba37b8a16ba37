"""``na1d``, ``na2d``, ``na3d``: each token attends to its nearest neighbors, O(N w^n) (arXiv 2403.04690).

    out_i = sum_j softmax_j(scale q_i . k_j) v_j,    j in the window of i on every axis

On an axis the window holds exactly w places, moved inward at the ends; with dilation d those of the same residue modulo
d; with stride s the s queries of a group share the window of its leader; a causal axis ends with the query itself.
Tiles of neighboring queries read the union of their windows once: D + E multiply-adds a query, head and row of that
union; memory linear in the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from quernel._errors import MissingExtraError, QuernelError
from quernel._validate import check_choice, check_float, check_type
from quernel.nn._neighborhood_op import neighborhood_attention, triton_kernels
from quernel.nn._neighborhood_plan import NeighborhoodPlan as NeighborhoodPlan
from quernel.nn.functional._neighborhood_options import Numbers, Options, checked_options
from quernel.nn.functional.neighborhood_dense import dense_attention, neighborhood_mask

Backend = Literal["auto", "dense", "tiled", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "dense", "tiled", "triton")
Output = Tensor | tuple[Tensor, Tensor]
Flags = bool | Sequence[bool]
# Up to this many tokens a mask and torch's fused attention take less time than tiles, where tiles are not compiled.
SMALL = 256


def na1d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Numbers,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Output:
    """Attend to the nearest tokens of a sequence; ``na2d`` with one axis, q: (B, X, Hq, D).

    Examples
    --------
    >>> x = torch.ones(1, 16, 2, 8)
    >>> na1d(x, x, x, kernel_size=5, is_causal=True).shape
    torch.Size([1, 16, 2, 8])
    """
    more = (additional_keys, additional_values)
    return _attend(1, q, k, v, (kernel_size, stride, dilation, is_causal), scale, more, backend, return_lse)


def na2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Numbers,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Output:
    """Attend to the nearest tokens of a grid.

    Parameters
    ----------
    q : Tensor, shape (B, X, Y, Hq, D)
        Any strides.
    k : Tensor, shape (B, X, Y, Hkv, D)
        Hkv divides Hq: query head h reads key head h // (Hq / Hkv).
    v : Tensor, shape (B, X, Y, Hkv, E)
    kernel_size : int or tuple of int
        Tokens of the window of an axis; of an even number one more stands before the query than behind it.
    stride : int or tuple of int, default=1
        Queries of a group, at most ``kernel_size``; they share the window of the middle one, on a causal axis that of
        the last one, up to themselves.
    dilation : int or tuple of int, default=1
        Step between the tokens of a window; ``kernel_size * dilation`` must fit the axis.
    is_causal : bool or tuple of bool, default=False
        Whether the window of an axis ends with the query.  There it may be longer than the axis.
    scale : float, optional
        Default D ** -0.5.
    additional_keys, additional_values : Tensor, shape (B, M, Hkv, D) and (B, M, Hkv, E), optional
        Every query attends to these as well, in the same softmax.
    backend : {"auto", "dense", "tiled", "triton"}, default="auto"
        "dense" is torch's attention under a mask of N x N; "tiled" is compiled on CPUs and torch's own operations
        elsewhere and for float64; "triton" needs the extra gpu.
    return_lse : bool, default=False
        Whether to return the logarithms of the sums of exponentials as well, for ``merge_attentions``.

    Returns
    -------
    out : Tensor, shape (B, X, Y, Hq, E)
        In the dtype of q.
    lse : Tensor, shape (B, X, Y, Hq)
        If asked for, in at least float32.

    Raises
    ------
    QuernelError
        If shapes, dtypes or devices do not fit each other, or a window does not fit its axis.

    Notes
    -----
    Half precision is added up in float32.  The same input gives the same bits, gradients included, for any number of
    threads.  Only the dense backend has second derivatives.  Differs from the authors' package: windows of one token
    and E != D are taken, there is a CPU backend, and a causal window may exceed its axis.

    References
    ----------
    Hassani et al., "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock
    Level", arXiv 2403.04690, 2024.

    Examples
    --------
    >>> x = torch.ones(1, 14, 14, 4, 32)
    >>> na2d(x, x, x, kernel_size=7).shape
    torch.Size([1, 14, 14, 4, 32])
    """
    more = (additional_keys, additional_values)
    return _attend(2, q, k, v, (kernel_size, stride, dilation, is_causal), scale, more, backend, return_lse)


def na3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Numbers,
    stride: Numbers = 1,
    dilation: Numbers = 1,
    is_causal: Flags = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    backend: Backend = "auto",
    return_lse: bool = False,
) -> Output:
    """Attend to the nearest tokens of a volume or a clip; ``na2d`` with three axes, q: (B, X, Y, Z, Hq, D).

    Examples
    --------
    >>> x = torch.ones(1, 4, 6, 6, 2, 8)
    >>> na3d(x, x, x, kernel_size=(2, 3, 3), is_causal=(True, False, False)).shape
    torch.Size([1, 4, 6, 6, 2, 8])
    """
    more = (additional_keys, additional_values)
    return _attend(3, q, k, v, (kernel_size, stride, dilation, is_causal), scale, more, backend, return_lse)


def _attend(
    ndim: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numbers: tuple[Numbers, Numbers, Numbers, Flags],
    scale: float | None,
    more: tuple[Tensor | None, Tensor | None],
    backend: Backend,
    return_lse: bool,
) -> Output:
    _check_operands(ndim, q, k, v)
    options = checked_options(tuple(q.shape[1:-2]), *numbers)
    scale = q.shape[-1] ** -0.5 if scale is None else check_float("scale", scale)
    check_choice("backend", backend, BACKENDS)
    flat, keys, values = (x.flatten(1, ndim) for x in (q, k, v))
    extra = _check_more(q, k, v, *more)
    if extra and more[0] is not None and more[1] is not None:
        keys, values = torch.cat([keys, more[0]], 1), torch.cat([values, more[1]], 1)
    lse: Tensor | None
    if _is_dense(backend, flat, options):
        mask = neighborhood_mask(*options.numbers, device=q.device)
        if extra:
            mask = torch.cat([mask, mask.new_ones(len(mask), extra)], 1)
        out, lse = dense_attention(flat, keys, values, mask, scale, return_lse)
    else:
        if backend == "triton":
            _check_triton(flat, keys, values)
        geometry = [extra, *(int(n) for held in options.numbers for n in held)]
        out, lse = neighborhood_attention(flat, keys, values, geometry, scale, backend)
    out = out.unflatten(1, options.shape)
    return (out, lse.unflatten(1, options.shape)) if return_lse and lse is not None else out


def _is_dense(backend: Backend, q: Tensor, options: Options) -> bool:
    """Say whether torch's attention under a mask is wanted, or the better choice."""
    if backend != "auto":
        return backend == "dense"
    compiled = q.device.type == "cpu" and q.dtype is not torch.float64
    return q.shape[1] <= SMALL and not compiled and not q.is_cuda


def _check_operands(ndim: int, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless queries, keys and values fit together: kernels read without bounds checks."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_type(name, x, Tensor)
        if x.ndim != ndim + 3:
            axes = ", ".join("XYZ"[:ndim])
            raise QuernelError(
                f"{name} must have shape (batch, {axes}, heads, head size) for na{ndim}d, heads after the tokens; got "
                f"{tuple(x.shape)}"
            )
    if k.shape[:-2] != q.shape[:-2] or v.shape[:-2] != q.shape[:-2]:
        raise QuernelError(
            f"k and v must have the batch and the grid of q, {tuple(q.shape[:-2])}; got {tuple(k.shape[:-2])} and "
            f"{tuple(v.shape[:-2])}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise QuernelError(f"k must have the head size of q, {q.shape[-1]}; got {k.shape[-1]}")
    heads, groups = q.shape[-2], k.shape[-2]
    if v.shape[-2] != groups or groups == 0 or heads % groups:
        raise QuernelError(
            f"k and v must have the same number of heads, which divides that of q, {heads}; got {groups} and "
            f"{v.shape[-2]}"
        )
    _check_kinds(q, k=k, v=v)


def _check_kinds(q: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if x.dtype != q.dtype or x.device != q.device or not q.is_floating_point():
            raise QuernelError(
                f"{name} must be of the dtype and on the device of q, which must be floating; got {x.dtype} on "
                f"{x.device} beside {q.dtype} on {q.device}"
            )


def _check_more(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None) -> int:
    """Return how many additional keys there are."""
    if keys is None and values is None:
        return 0
    if keys is None or values is None:
        raise QuernelError("additional_keys and additional_values must be given together")
    for name, x, like in (("additional_keys", keys, k), ("additional_values", values, v)):
        check_type(name, x, Tensor)
        wanted = (q.shape[0], keys.shape[1] if keys.ndim == 4 else 0, *like.shape[-2:])
        if tuple(x.shape) != wanted:
            raise QuernelError(
                f"{name} must have shape (batch, M, heads, head size) with {wanted[0]} samples and heads of "
                f"{tuple(like.shape[-2:])}, M alike for both; got {tuple(x.shape)}"
            )
    _check_kinds(q, additional_keys=keys, additional_values=values)
    return keys.shape[1]


def _check_triton(*tensors: Tensor) -> None:
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError('backend="triton"', "gpu")
    if triton_kernels("triton", *tensors) is None:
        raise QuernelError(
            'backend="triton" takes float32 and half precision on a GPU, heads of at most 256 numbers; got '
            f'{tensors[0].dtype} on {tensors[0].device}. Take backend="auto"'
        )
