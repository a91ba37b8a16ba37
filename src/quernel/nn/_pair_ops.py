"""Custom ops of PairConnect: ``quernel::pair_sum``, its gradient, and ``quernel::pair_rows``, the rows alone.

    out[t] = sum over the pairs (t, j) of  share(t, j) row(x_t, x_j)

Nothing but ids is kept for the backward pass: it hashes them again, a block of queries at a time, and adds into the
rows that occur (a sparse gradient) or into all of them. Sums of bfloat16 rows are in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._errors import QuernelError
from quernel._threads import num_threads, parallel_ranges, workspace
from quernel.nn import _pair_kernels
from quernel.nn._block_plain import wide_dtype
from quernel.nn._native_ranges import parts_for, run_ranges
from quernel.nn._pair_plain import Layout, check, gradient_plain, refuse, rows_plain, sum_plain

# Numbers read below which a second thread costs more than it saves.
_GRAIN = 2**16
# Pairs whose rows and shares the backward pass holds at a time: a few megabytes.
_BLOCK_PAIRS = 2**17
_STORED = {torch.bfloat16: "uint16", torch.float32: "float32", torch.float64: "float64"}


def pair_sum(
    weight: Tensor,
    ids: Tensor,
    layout: Layout,
    *,
    scores: Tensor | None = None,
    relative: Tensor | None = None,
    queries: int = 0,
    sparse: bool = False,
) -> Tensor:
    """Return the weighted sums of pair rows.

    Parameters
    ----------
    weight : Tensor, shape (rows * hashes, chunk)
        Row ``r * hashes + c`` is chunk c of pair row r.
    ids : integer Tensor, shape (B, T)
        ``GAP`` is padding.
    layout : Layout
    scores : Tensor, shape (rows, heads), optional
        For softmax, in the dtype of the sums.
    relative : Tensor, shape (heads, buckets), optional
        Gain, or under softmax bias, of each distance.
    queries : int, default=0
        Only the last so many tokens; 0 is all.
    sparse : bool, default=False
        Whether the gradients of ``weight`` and ``scores`` are coalesced sparse tensors.

    Returns
    -------
    out : Tensor, shape (B, Q, hashes * chunk)
        float32, or float64 for such a weight; zero at padding.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, scores, relative)):
        out: Tensor = _Summed.apply(weight, scores, relative, ids, tuple(layout), queries, sparse)  # type: ignore[no-untyped-call]
        return out
    return _sum(weight, scores, relative, ids, layout, queries)


def pair_rows(ids: Tensor, layout: Layout, padding: int, *, queries: int = 0) -> Tensor:
    """Return rows of chunks of all pairs by distance, int64 (B, Q, hashes, distances), ``padding`` for none."""
    return _rows(ids, tuple(layout), queries, padding)


def _sum_compute(
    weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor, described: list[int], queries: int
) -> Tensor:
    layout = Layout(*described)
    batch, length = ids.shape if ids.ndim == 2 else (0, 0)
    queries = queries or length
    check(weight, scores, relative, ids, layout, queries)
    # The names keep the memory behind the addresses alive.
    weight, ids, wide = weight.contiguous(), _keys(ids), wide_dtype(weight.dtype)
    scores = None if scores is None else scores.to(wide).contiguous()
    relative = None if relative is None else relative.to(wide).contiguous()
    out = torch.empty(batch, queries, layout.width, dtype=wide)
    items = batch * queries
    if items == 0:
        return out
    addresses = [0 if t is None else t.data_ptr() for t in (weight, scores, relative, ids, out)]
    work = address_of_sums(weight.dtype, ids.dtype)
    parts = parts_for(items, items * layout.span(length) * layout.width, _GRAIN)
    if run_ranges(work, (*addresses, batch, length, queries, *described), items, parts):
        refuse(ids, layout)
    return out


def address_of_sums(stored: torch.dtype, ids: torch.dtype) -> int:
    """Return the address of the compiled sums for a table and ids of these dtypes, int32 or int64."""
    return _pair_kernels.sums(_STORED[stored], "int32" if ids is torch.int32 else "int64")


def _gradient_compute(
    grad: Tensor, weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor, described: list[int],
    queries: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    queries = queries or ids.shape[1]
    blocks = _Blocks(grad, weight, scores, relative, ids, Layout(*described), queries)
    return blocks.gradient(None)


def sparse_gradient(
    grad: Tensor, weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor,
    described: tuple[int, ...], queries: int,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return the gradients by weight and scores as coalesced sparse tensors of the rows that occur."""
    layout, queries = Layout(*described), queries or ids.shape[1]
    if grad.device.type == "cpu":
        blocks = _Blocks(grad, weight, scores, relative, ids, layout, queries)
        with blocks:
            found = torch.from_numpy(blocks.found)
            by_weight, by_scores, by_relative = blocks.gradient(blocks.found)
    else:
        padding = len(weight)
        found = rows_plain(ids, list(described), queries, padding).unique()
        found = found[found < padding]
        by_weight, dense, by_relative = gradient_plain(
            grad, weight, scores, relative, ids, list(described), queries, found
        )
        by_scores = dense if scores is None else dense[found // layout.hashes]
    rows = _rowwise(found, by_weight, len(weight))
    if scores is None:
        return rows, None, by_relative
    first = found % layout.hashes == 0  # a pair's score stands beside its first chunk
    return rows, _rowwise(found[first] // layout.hashes, by_scores[first], len(scores)), by_relative


def _rowwise(rows: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.sparse_coo_tensor(
        rows[None], values, (size, values.shape[1]), is_coalesced=True, check_invariants=False
    )


class _Blocks:
    """The backward pass over blocks of queries; as a context it knows the rows that occur, in ``found``."""

    def __init__(
        self, grad: Tensor, weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor, layout: Layout,
        queries: int,
    ) -> None:  # fmt: skip
        self.layout, self.length, self.queries = layout, ids.shape[1], queries
        self.items, self.span = ids.shape[0] * queries, layout.span(ids.shape[1])
        self.ids = _keys(ids).reshape(-1).numpy()
        self.calls = _call(layout, ids.shape[0], ids.shape[1], queries)
        wide = wide_dtype(weight.dtype)
        self.grad = grad.detach().to(wide).reshape(self.items, layout.width).contiguous().numpy()
        self.weight = stored_array(weight)
        self.scores, self.relative = (_flat(t, wide) for t in (scores, relative))
        self.asks = scores is not None or relative is not None
        self.slots = np.zeros(0, np.int32)
        self.found = np.zeros(0, np.int64)

    def __enter__(self) -> _Blocks:
        rows = self.weight.shape[0]
        # Zeros between calls: what is marked here is cleared in __exit__.
        self.slots = workspace("pair slots", rows, torch.int32, zeroed=True).numpy()
        found = np.empty(min(rows, self.items * self.layout.hashes * self.span), np.int64)
        n = 0
        try:
            for first, size in self._ranges():
                _, rows_here, _, counts, *_ = self._terms(first, size, slopes=False)
                n = _pair_kernels.note_rows(rows_here, counts, self.slots, found, n)
            self.found = np.sort(found[:n])
            _pair_kernels.number_rows(self.slots, self.found)
        except BaseException:
            # An interrupt too; it may come before n is known, so all marks go.
            self.slots.fill(0)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.slots[self.found] = 0

    def gradient(self, found: NDArray[np.int64] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients by the rows in ``found``, or by all, by their scores, and by the distances."""
        layout, dtype = self.layout, self.grad.dtype
        places = self.weight.shape[0] if found is None else len(found)
        by_weight = np.zeros((places, layout.chunk), dtype)
        scored = 0 if self.scores.size == 0 else layout.rows if found is None else places
        by_scores = np.zeros((scored, layout.heads), dtype)
        by_relative = np.zeros((layout.heads, layout.buckets if self.relative.size else 0), dtype)
        slots = self.slots if found is not None else np.zeros(0, np.int32)
        for first, size in self._ranges():
            _, rows, distances, counts, shares, slopes = self._terms(first, size, slopes=self.asks)
            held = (self.calls, slots, rows, counts, shares, slopes, self.grad, first, by_weight, by_scores)
            threads = max(1, min(num_threads(), size * self.span * layout.width // _GRAIN))
            parallel_ranges(_adder(held), places, threads=threads)
            if self.relative.size:
                _pair_kernels.add_distances(self.calls, distances, counts, slopes, by_relative)
        rows, scores, gains = (torch.from_numpy(a) for a in (by_weight, by_scores, by_relative))
        return rows, scores if scored else scores.reshape(-1), gains if self.relative.size else gains.reshape(-1)

    def _ranges(self) -> list[tuple[int, int]]:
        step = max(1, _BLOCK_PAIRS // max(1, self.span))
        return [(first, min(step, self.items - first)) for first in range(0, self.items, step)]

    def _terms(self, first: int, size: int, *, slopes: bool) -> tuple[Any, ...]:
        """Find and weigh the pairs of a block of queries."""
        layout, dtype = self.layout, self.grad.dtype
        rows = np.empty((size, layout.hashes, self.span), np.int64)
        distances, counts = np.empty((size, self.span), np.int64), np.empty(size, np.int64)
        shares = np.empty((size, layout.heads, self.span), dtype)
        slope = np.empty(shares.shape if slopes else (0, 0, 0), dtype)
        operands = (self.calls, self.ids, self.weight, self.scores, self.relative, self.grad, first)
        held = (*operands, rows, distances, counts, shares, slope)
        parallel_ranges(lambda start, stop: _pair_kernels.pair_terms(*held, start, stop), size, grain=256)
        return first, rows, distances, counts, shares, slope


def _adder(held: tuple[Any, ...]) -> Any:
    return lambda low, high: _pair_kernels.add_rows(*held, low, high)


def _call(layout: Layout, batch: int, length: int, queries: int) -> NDArray[Any]:
    """Return the operands of the kernels over arrays."""
    call = np.zeros(1, _pair_kernels.CALL)
    numbers = {"batch": batch, "length": length, "queries": queries} | layout._asdict()
    for name, number in numbers.items():
        call[name] = number
    return call


def _keys(ids: Tensor) -> Tensor:
    held = ids if ids.dtype in (torch.int32, torch.int64) else ids.long()
    return held if held.is_contiguous() else held.contiguous()


def stored_array(weight: Tensor) -> NDArray[Any]:
    """Return a table's memory; bfloat16 enters the kernels as uint16."""
    held = weight.detach().contiguous()
    array: NDArray[Any] = (held.view(torch.uint16) if held.dtype is torch.bfloat16 else held).numpy()
    return array


def _flat(tensor: Tensor | None, wide: torch.dtype) -> NDArray[Any]:
    held = torch.zeros(0, dtype=wide) if tensor is None else tensor.detach().to(wide).contiguous()
    array: NDArray[Any] = held.reshape(-1).numpy()
    return array


def _rows_compute(ids: Tensor, described: list[int], queries: int, padding: int) -> Tensor:
    layout = Layout(*described)
    batch, length = ids.shape if ids.ndim == 2 else (0, 0)
    queries = queries or length
    check(None, None, None, ids, layout, queries)
    out = torch.empty(batch, queries, layout.hashes, len(layout.offsets(length)), dtype=torch.int64)
    calls, tokens = _call(layout, batch, length, queries), _keys(ids).reshape(-1).numpy()
    array = out.flatten(0, 1).numpy()
    failed: list[int] = []

    def work(start: int, stop: int) -> None:
        if _pair_kernels.list_rows(calls, tokens, padding, array, start, stop):
            failed.append(start)

    parallel_ranges(work, batch * queries, grain=256)
    if failed:
        refuse(ids, layout)
    return out


class _Summed(torch.autograd.Function):
    """Gradients by table, scores and distances."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        weight, scores, relative, ids, described, queries, sparse = arguments
        out: Tensor = _sum(weight, scores, relative, ids, described, queries)
        ctx.save_for_backward(weight, scores, relative, ids)
        ctx.described, ctx.queries, ctx.sparse = described, queries, sparse
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        weight, scores, relative, ids = ctx.saved_tensors
        if ctx.sparse and torch.compiler.is_compiling():
            raise QuernelError("sparse gradients cannot be compiled; make the table with sparse=False")
        gradient = sparse_gradient if ctx.sparse else _gradient
        found = gradient(grads[0], weight, scores, relative, ids, ctx.described, ctx.queries)
        held = (weight, scores, relative)
        return *(None if t is None else g.to(t.dtype) for t, g in zip(held, found, strict=True)), *[None] * 4


_library = torch.library.Library("quernel", "FRAGMENT")
_table = "Tensor weight, Tensor? scores, Tensor? relative, Tensor ids, int[] layout, int queries"
for _schema in (
    f"pair_sum({_table}) -> Tensor",
    f"pair_sum_gradient(Tensor grad, {_table}) -> (Tensor, Tensor, Tensor)",
    "pair_rows(Tensor ids, int[] layout, int queries, int padding) -> Tensor",
):
    _library.define(_schema, tags=torch.Tag.pt2_compliant_tag)
for _name, _compiled, _plain in (
    ("pair_sum", _sum_compute, sum_plain),
    ("pair_sum_gradient", _gradient_compute, gradient_plain),
    ("pair_rows", _rows_compute, rows_plain),
):
    _library.impl(_name, _compiled, "CPU")
    _library.impl(_name, _plain, "CUDA")
_sum = torch.ops.quernel.pair_sum.default
_gradient = torch.ops.quernel.pair_sum_gradient.default
_rows = torch.ops.quernel.pair_rows.default


@torch.library.register_fake("quernel::pair_sum", lib=_library)
def _sum_fake(
    weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor, described: list[int], queries: int
) -> Tensor:
    layout = Layout(*described)
    check(weight, scores, relative, ids, layout, queries)
    return weight.new_empty(ids.shape[0], queries or ids.shape[1], layout.width, dtype=wide_dtype(weight.dtype))


@torch.library.register_fake("quernel::pair_sum_gradient", lib=_library)
def _gradient_fake(
    grad: Tensor, weight: Tensor, scores: Tensor | None, relative: Tensor | None, ids: Tensor, described: list[int],
    queries: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = wide_dtype(weight.dtype)
    first, second, third = (
        weight.new_empty(0 if t is None else t.shape, dtype=wide) for t in (weight, scores, relative)
    )
    return first, second, third


@torch.library.register_fake("quernel::pair_rows", lib=_library)
def _rows_fake(ids: Tensor, described: list[int], queries: int, padding: int) -> Tensor:
    layout, (batch, length) = Layout(*described), ids.shape
    return ids.new_empty(batch, queries or length, layout.hashes, len(layout.offsets(length)), dtype=torch.int64)


def _warmup() -> None:
    """Compile the kernels for float32 tables; ``quernel warmup`` calls it."""
    layout = Layout(1, 8, 2, 4, 0, 0, 2, 2, 1, 0, 1, 1)
    weight, ids = torch.ones(16, 4, requires_grad=True), torch.zeros(1, 2, dtype=torch.int64)
    pair_sum(weight, ids.int(), layout)
    for sparse in (False, True):
        pair_sum(weight, ids, layout, sparse=sparse).sum().backward()
        weight.grad = None
    pair_rows(ids, layout, 16)
