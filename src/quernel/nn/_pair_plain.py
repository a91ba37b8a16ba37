"""Sums of pair rows in torch's own operations: what the ops take, how it is checked, and the form for other devices.

Row numbers of all pairs are one integer tensor; rows are gathered and added one distance after the other, so no tensor
of tokens times window times columns is formed here either. The hash is that of ``_block_plain``, in signed arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn._block_plain import fastrange_of, mix, wide_dtype
from quernel.nn._pair_kernels import GAP, SOFTMAX, SQRT

STORED = (torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class Layout(NamedTuple):
    """What of a layer the ops take as integers.

    ``state`` is the hash of the seed as a signed number, ``rows`` counts pairs' rows, of ``hashes`` chunks of ``chunk``
    numbers each; ``vocab`` and ``window`` are 0 where there is no limit.
    """

    state: int
    rows: int
    hashes: int
    chunk: int
    vocab: int
    direct: int
    window: int
    distances: int
    keyed: int
    normaliser: int
    causal: int
    heads: int

    @property
    def width(self) -> int:
        """Columns of a sum."""
        return self.hashes * self.chunk

    @property
    def buckets(self) -> int:
        """Number of distances that are told apart."""
        return self.distances if self.causal else 2 * self.distances - 1

    def span(self, length: int) -> int:
        """Return the largest number of pairs that a query can have."""
        if self.window == 0:
            return length
        return min(length, self.window if self.causal else 2 * self.window - 1)

    def offsets(self, length: int) -> range:
        """Return the distances t - j that can occur, in the order in which ``pair_rows`` lists them."""
        reach = min(self.window, length) if self.window else length
        return range(0 if self.causal else 1 - reach, reach)

    def buckets_of(self, length: int) -> list[int]:
        """Return the bucket of each of these distances."""
        far = self.distances - 1
        return [min(d, far) if self.causal else max(-far, min(d, far)) + far for d in self.offsets(length)]


def check(
    weight: Tensor | None, scores: Tensor | None, relative: Tensor | None, ids: Tensor, layout: Layout, queries: int
) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    if ids.ndim != 2 or ids.dtype not in INTEGERS:
        raise QuernelError(f"ids must be integers of shape (B, T); got {ids.dtype} of shape {tuple(ids.shape)}")
    if queries > ids.shape[1]:
        raise QuernelError(f"queries must be at most the {ids.shape[1]} tokens; got {queries}")
    if weight is None:
        return
    wanted = (layout.rows * layout.hashes, layout.chunk)
    if weight.dtype not in STORED or weight.shape != wanted:
        raise QuernelError(
            f"weight must be float32, float64 or bfloat16 of shape {wanted}; got {weight.dtype} {tuple(weight.shape)}"
        )
    if (scores is not None) != (layout.normaliser == SOFTMAX):
        raise QuernelError("scores must be given for softmax, and for nothing else")
    if scores is not None and tuple(scores.shape) != (layout.rows, layout.heads):
        raise QuernelError(f"scores must have shape {(layout.rows, layout.heads)}; got {tuple(scores.shape)}")
    if relative is not None and tuple(relative.shape) != (layout.heads, layout.buckets):
        raise QuernelError(f"relative must have shape {(layout.heads, layout.buckets)}; got {tuple(relative.shape)}")


def refuse(ids: Tensor, layout: Layout) -> None:
    """Raise over the first id that is out of range, if there is one."""
    bad = ids[((ids < 0) & (ids != GAP)) | (ids >= (layout.vocab or 2**62))]
    if bad.numel():
        raise bad_id(bad[0], layout)


def bad_id(found: Tensor, layout: Layout) -> QuernelError:
    """Return the error over an id that is out of range."""
    most = str(layout.vocab) if layout.vocab else "inf"
    return QuernelError(f"ids must be in [0, {most}); got {int(found)}. Check the vocabulary, or mask padding")


def rows_plain(ids: Tensor, described: list[int], queries: int, padding: int) -> Tensor:
    """Return the rows of chunks of all pairs by distance, (B, Q, hashes, distances), ``padding`` for none."""
    layout = Layout(*described)
    length = ids.shape[-1]
    queries = queries or length
    check(None, None, None, ids, layout, queries)
    refuse(ids, layout)
    keys = ids.long()
    t = torch.arange(length - queries, length, device=ids.device)
    j = t[:, None] - torch.tensor(list(layout.offsets(length)), device=ids.device)  # (Q, distances)
    u, v = keys[:, length - queries :, None], keys[:, j.clamp(0, length - 1)]
    present = (j >= 0) & (j < length) & (u != GAP) & (v != GAP)
    buckets = torch.tensor(layout.buckets_of(length), device=ids.device)
    if layout.direct:
        row = u * layout.vocab + v
        rows = (row * layout.buckets + buckets if layout.keyed else row)[:, :, None]
    else:
        h = mix(mix(layout.state, u), v)
        h = mix(h, buckets) if layout.keyed else h
        chunks = [fastrange_of(mix(h, c), layout.rows) * layout.hashes + c for c in range(layout.hashes)]
        rows = torch.stack(chunks, dim=2)
    return rows.masked_fill(~present[:, :, None], padding)


def shares_of(
    scores: Tensor | None, relative: Tensor | None, rows: Tensor, layout: Layout, length: int, dtype: torch.dtype
) -> Tensor:  # (B, Q, heads, distances)
    """Return what each pair of ``pair_rows`` counts, zero where there is none; differentiable."""
    first = rows[:, :, 0] // layout.hashes  # (B, Q, distances)
    present = (first < layout.rows)[:, :, None]
    gains = None if relative is None else relative.to(dtype)[:, layout.buckets_of(length)]  # (heads, distances)
    if scores is None:
        n = present.sum(-1, keepdim=True).clamp_min(1).to(dtype)
        whole = present.to(dtype) / (n.sqrt() if layout.normaliser == SQRT else n)
        return whole if gains is None else whole * gains
    logits = scores.to(dtype)[first.clamp_max(layout.rows - 1)].transpose(2, 3)
    logits = (logits if gains is None else logits + gains).masked_fill(~present, -torch.inf)
    # A query without pairs would give 0 / 0.
    return logits.masked_fill(~present.any(-1, keepdim=True), 0).softmax(-1) * present


def sum_plain(
    weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor, described: list[int], queries: int
) -> Tensor:
    """Return the sums, shape (B, Q, width)."""
    layout, wide = Layout(*described), wide_dtype(weight.dtype)
    check(weight, scores, relative, ids, layout, queries or ids.shape[1])
    rows = rows_plain(ids, described, queries, len(weight))
    shares = shares_of(scores, relative, rows, layout, ids.shape[1], wide)
    out = shares.new_zeros(*rows.shape[:2], layout.width)
    for i in range(rows.shape[3]):
        share = shares[..., i].repeat_interleave(layout.width // layout.heads, dim=-1)
        out += share * weight[rows[..., i].clamp_max(len(weight) - 1)].to(wide).flatten(2)
    return out


def gradient_plain(
    grad: Tensor, weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor, described: list[int],
    queries: int, found: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients by weight, scores and relative; empty for what is not there.

    ``found`` are the rows of chunks that occur, ascending: then the gradient by weight has these rows only.
    """
    layout, wide = Layout(*described), wide_dtype(weight.dtype)
    per_head, grad = layout.width // layout.heads, grad.to(wide)
    held = [None if t is None else t.detach().to(wide).requires_grad_() for t in (scores, relative)]
    asked = [t for t in held if t is not None]
    rows = rows_plain(ids, described, queries, len(weight))
    with torch.enable_grad():
        shares = shares_of(held[0], held[1], rows, layout, ids.shape[1], wide)
    size = len(weight) if found is None else len(found)
    # One row more than there are: what is absent goes there.
    by_weight = grad.new_zeros(size + 1, layout.chunk)
    slopes = torch.zeros_like(shares)
    for i in range(rows.shape[3]):
        share = shares.detach()[..., i].repeat_interleave(per_head, dim=-1)
        places = rows[..., i] if found is None else torch.searchsorted(found, rows[..., i].contiguous())
        by_weight.index_add_(0, places.reshape(-1), (share * grad).reshape(-1, layout.chunk))
        if asked:
            products = weight[rows[..., i].clamp_max(len(weight) - 1)].to(wide).flatten(2) * grad
            slopes[..., i] = products.unflatten(-1, (layout.heads, per_head)).sum(-1)
    by_asked = iter(torch.autograd.grad(shares, asked, slopes) if asked else ())
    first, second = (grad.new_zeros(0) if t is None else next(by_asked) for t in held)
    return by_weight[:size], first, second
