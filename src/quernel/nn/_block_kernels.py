"""Compiled sums of table rows that a ``BlockMap`` reads from one shared array, and the two gradients.

Rows come in chunks. First all blocks and all sign words of a chunk are hashed, in loops that vectorise; then its rows
are moved in pieces, at most sixteen numbers of one block each (``_block_moves``). Both directions are the same move,
``to += sign * factor * from``: rows read the array, gradients add to it.

Threads share the work of a gradient by slots of the array and not by rows: each reads all ids and adds only to its own
slots, in the order of the ids. So nothing is added twice at a time, no buffer but the gradient is needed, and every
number is the same whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from quernel._intrinsics import LANES
from quernel.hashing.block_map import MIXED, sign_word, start_of_block
from quernel.hashing.mixers import U64, fastrange_small, mix64_step
from quernel.nn._block_moves import add, keyed_by_moves, put, scatter

# What a call hands over as one int64 array: a map and the sizes that follow from it.
DIM, BLOCK, PER_ROW, PITCH, KIND, SIGNED, WORDS, BLOCKS, PIECES = range(9)
# Pieces of a row: which of its blocks, where in the block, where in the row, how many numbers.
OWNER, INNER, COLUMN, LENGTH = range(4)
# Rows of a field: number of the first, how many there are, and which id is padding (-1: none).
FIRST, LIMIT, PADDING = range(3)
# Blocks hashed at once: what is known of them stays in the first cache.
_CHUNK = 256

_LOW, _S6, _S63 = U64(0xFFFFFFFF), U64(6), U64(63)


@njit(nogil=True, cache=True, fastmath=False)
def _hash_blocks(blocks: Any, n: Any, kind: Any, constants: Any, starts: Any, per_row: Any, slots: Any) -> None:
    """Write where each of n blocks begins."""
    state, places = constants[0], constants[1]
    if kind == MIXED and places <= _LOW:
        for i in range(n):
            slots[i] = np.int64(fastrange_small(mix64_step(state, blocks[i]), places))
    else:
        for i in range(n):
            slots[i] = np.int64(start_of_block(kind, constants, starts, blocks[i], U64(per_row)))


@njit(nogil=True, cache=True, fastmath=False)
def _hash_signs(positions: Any, n: Any, per_position: Any, state: Any, given: Any, words: Any) -> None:
    """Write the ``per_position`` sign words from that of each position on."""
    if given.size:
        for r in range(n):
            for w in range(per_position):
                first = np.int64(((positions[r] >> _S6) + U64(w)) << _S6)
                word = U64(0)
                for k in range(min(64, given.size - first)):
                    word |= U64(given[first + k] < 0) << U64(k)
                words[r * per_position + w] = word
    elif per_position == 1:
        for r in range(n):
            words[r] = sign_word(state, positions[r])
    else:
        for r in range(n):
            for w in range(per_position):
                words[r * per_position + w] = sign_word(state, positions[r] + (U64(w) << _S6))


@njit(nogil=True, cache=True, fastmath=False)
def _locate(ids: Any, item: Any, n: Any, fields: Any, size: Any, shape: Any, constants: Any, starts: Any, given: Any,
            pieces: Any, scratch: Any) -> Any:  # fmt: skip
    """Hash the rows of n ids from place ``item`` on; return the place of the first id out of range, or -1."""
    blocks, begins, slots, columns, lengths, positions, words, present = scratch
    dim, block, per_row, n_pieces = shape[DIM], shape[BLOCK], shape[PER_ROW], shape[PIECES]
    pitch, n_fields = U64(shape[PITCH]), fields.shape[0]
    f = item % n_fields
    for r in range(n):
        key = ids[item + r]
        if key < 0 or key >= fields[f, LIMIT]:
            return item + r
        positions[r] = U64(key + fields[f, FIRST])
        present[r] = 0 if key == fields[f, PADDING] else -1
        f = f + 1 if f + 1 < n_fields else 0
    if block > dim:
        for r in range(n):
            positions[r] *= pitch
            first = positions[r] // U64(block)
            left = block - np.int64(positions[r] % U64(block))
            blocks[2 * r] = first
            # A row that ends with its block reads no second one, which a map with given starts may not have.
            blocks[2 * r + 1] = first + U64(left < dim)
    else:
        if per_row == 1:
            for r in range(n):
                blocks[r] = positions[r]
        else:
            for r in range(n):
                for c in range(per_row):
                    blocks[r * per_row + c] = positions[r] * U64(per_row) + U64(c)
        for r in range(n):
            positions[r] *= pitch
    _hash_blocks(blocks, n * shape[BLOCKS], shape[KIND], constants, starts, per_row, begins)
    if block > dim:
        for r in range(n):
            _cut(r, block - np.int64(positions[r] % U64(block)), size, shape, begins, slots, columns, lengths)
    elif slots.size:
        for r in range(n):
            for p in range(n_pieces):
                slot = begins[r * per_row + pieces[p, OWNER]] + pieces[p, INNER]
                slots[r * n_pieces + p] = slot - size if slot >= size else slot
    if shape[SIGNED]:
        _hash_signs(positions, n, shape[WORDS], constants[0], given, words)
    return -1


@njit(nogil=True, cache=True, fastmath=False)
def _cut(r: Any, left: Any, size: Any, shape: Any, begins: Any, slots: Any, columns: Any, lengths: Any) -> None:
    """Cut row r, of which its first block holds at most ``left`` numbers, into pieces; those too many are empty."""
    dim, n_pieces = shape[DIM], shape[PIECES]
    column = 0
    for p in range(r * n_pieces, (r + 1) * n_pieces):
        length = min(LANES, left - column if column < left else dim - column, dim - column)
        begin = begins[2 * r] + shape[BLOCK] - left + column if column < left else begins[2 * r + 1] + column - left
        slots[p] = begin - size if begin >= size else begin
        columns[p], lengths[p] = column, length
        column += length


@njit(nogil=True, cache=True, fastmath=False)
def _scratch(shape: Any, pieces: Any) -> Any:
    """Return how many rows are hashed at once, and the memory for it."""
    rows = max(1, _CHUNK // shape[BLOCKS])
    blocks, cut = rows * shape[BLOCKS], rows * shape[PIECES]
    straddling = shape[BLOCK] > shape[DIM]
    # Where each block is one piece, it begins where its block does; the other pieces are alike in all rows.
    columns = np.empty(cut, np.int64) if straddling else pieces[:, COLUMN].copy()
    lengths = np.empty(cut, np.int64) if straddling else pieces[:, LENGTH].copy()
    return rows, (
        np.empty(blocks, np.uint64),
        np.empty(blocks, np.int64),
        np.empty(cut if straddling or shape[PIECES] > shape[BLOCKS] else 0, np.int64),
        columns,
        lengths,
        np.empty(rows, np.uint64),
        np.zeros(rows * shape[WORDS] + 1, np.uint64),  # all +1 where the map has no signs
        np.empty(rows, np.int64),
    )


@njit(nogil=True, cache=True, fastmath=False)
def _fields(shape: Any, scratch: Any, places: Any, factors: Any, array: Any, low: Any, high: Any) -> Any:
    """Return what a move is told; ``places`` and ``factors`` are those of the chunk's rows."""
    _, begins, slots, columns, lengths, positions, words, present = scratch
    at = slots.ctypes.data if slots.size else begins.ctypes.data
    per_slots, per_words = 8 * shape[PIECES], 8 * shape[WORDS]
    # As int64: beside one, an unsigned address would turn into a float.
    return (
        np.int64(at), np.int64(columns.ctypes.data), np.int64(lengths.ctypes.data), np.int64(words.ctypes.data),
        np.int64(positions.ctypes.data), np.int64(present.ctypes.data), np.int64(places.ctypes.data),
        np.int64(factors.ctypes.data), per_slots, per_slots * (shape[BLOCK] > shape[DIM]), per_words, shape[PIECES],
        np.int64(array.ctypes.data), np.int64(array.size), np.int64(low), np.int64(high),
    )  # fmt: skip


@njit(nogil=True, cache=True, fastmath=False)
def _end_of(bag: Any, bounds: Any, per_bag: Any) -> Any:
    return bounds[bag + 1] if bounds.size else (bag + 1) * per_bag


@njit(nogil=True, cache=True, fastmath=False)
def _share(ids: Any, first: Any, last: Any, fields: Any) -> Any:
    """Return one over the number of ids of a bag that are not padding, 1 where there are none."""
    count = 0
    for i in range(first, last):
        count += ids[i] != fields[i % fields.shape[0], PADDING]
    return 1.0 / count if count else 1.0


@njit(nogil=True, cache=True, fastmath=False)
def _assign(ids: Any, weights: Any, bounds: Any, per_bag: Any, mean: Any, fields: Any, scales: Any, item: Any, n: Any,
            bag: Any, end: Any, share: Any, origin: Any, pitch: Any, places: Any, factors: Any) -> Any:  # fmt: skip
    """Write where the bags of n rows from ``item`` on are and what each row is multiplied by.

    Returns bag, its end and its share as they are then, for the next chunk.
    """
    n_fields, ragged, weighted = fields.shape[0], bounds.size > 0, weights.size > 0
    f = item % n_fields
    for r in range(n):
        while item + r >= end:
            bag += 1
            first, end = end, bounds[bag + 1] if ragged else end + per_bag
            if mean:
                share = _share(ids, first, end, fields)
        places[r] = origin + pitch * bag
        factors[r] = scales[f] * (weights[item + r] * share if weighted else share)
        f = f + 1 if f + 1 < n_fields else 0
    return bag, end, share


@njit(nogil=True, cache=True, fastmath=False)
@keyed_by_moves
def sum_bags(values: Any, ids: Any, weights: Any, bounds: Any, per_bag: Any, mean: Any, shape: Any, constants: Any,
             starts: Any, given: Any, pieces: Any, fields: Any, scales: Any, out: Any, start: Any,
             stop: Any) -> Any:  # fmt: skip
    """Add the sums of the rows of bags [start, stop) to ``out``; where every bag is one row, write it.

    values: (m,)  ids: (n,)  weights: (n,) or empty  bounds: (bags + 1,), or empty where bags hold ``per_bag`` ids each
    shape, constants, starts, given, pieces: the map  fields: (F, 3)  scales: (F,)  out: (bags, dim), float32 or float64

    Returns
    -------
    place : int
        Of the first id that is out of range; -1 if there is none.
    """
    rows, scratch = _scratch(shape, pieces)
    places, factors, like = np.empty(rows, np.int64), np.empty(rows, out.dtype), values.dtype.type(0)
    told = _fields(shape, scratch, places, factors, values, 0, values.size)
    origin, pitch, one = np.int64(out.ctypes.data), out.itemsize * out.shape[1], per_bag == 1
    item, last = _end_of(start - 1, bounds, per_bag), _end_of(stop - 1, bounds, per_bag)
    bag, end, share = start - 1, item, 1.0
    while item < last:
        n = min(rows, last - item)
        bad = _locate(ids, item, n, fields, values.size, shape, constants, starts, given, pieces, scratch)
        if bad >= 0:
            return bad
        bag, end, share = _assign(
            ids,
            weights,
            bounds,
            per_bag,
            mean,
            fields,
            scales,
            item,
            n,
            bag,
            end,
            share,
            origin,
            pitch,
            places,
            factors,
        )
        if one:
            put(told, n, factors.dtype.type(0), like)
        else:
            add(told, n, factors.dtype.type(0), like)
        item += n
    return -1


@njit(nogil=True, cache=True, fastmath=False)
@keyed_by_moves
def scatter_bags(grad: Any, ids: Any, weights: Any, bounds: Any, per_bag: Any, mean: Any, shape: Any, constants: Any,
                 starts: Any, given: Any, pieces: Any, fields: Any, scales: Any, out: Any, low: Any,
                 high: Any) -> Any:  # fmt: skip
    """Add the gradient of ``sum_bags`` by the array to the slots [low, high) of ``out`` (m,); grad: (bags, dim).

    Returns the same as ``sum_bags``.
    """
    rows, scratch = _scratch(shape, pieces)
    places, factors, like = np.empty(rows, np.int64), np.empty(rows, out.dtype), out.dtype.type(0)
    told = _fields(shape, scratch, places, factors, out, low, high)
    origin, pitch = np.int64(grad.ctypes.data), grad.itemsize * grad.shape[1]
    item, bag, end, share = 0, -1, 0, 1.0
    while item < ids.size:
        n = min(rows, ids.size - item)
        bad = _locate(ids, item, n, fields, out.size, shape, constants, starts, given, pieces, scratch)
        if bad >= 0:
            return bad
        bag, end, share = _assign(
            ids,
            weights,
            bounds,
            per_bag,
            mean,
            fields,
            scales,
            item,
            n,
            bag,
            end,
            share,
            origin,
            pitch,
            places,
            factors,
        )
        scatter(told, n, like, like)
        item += n
    return -1


@njit(nogil=True, cache=True, fastmath=False)
@keyed_by_moves
def dot_rows(values: Any, ids: Any, grad: Any, bounds: Any, per_bag: Any, shape: Any, constants: Any, starts: Any,
             given: Any, pieces: Any, fields: Any, scales: Any, out: Any, start: Any, stop: Any) -> Any:  # fmt: skip
    """Write the gradient by the weights of bags [start, stop): row times gradient; grad: (bags, dim), out: (n,).

    Returns the same as ``sum_bags``.
    """
    rows, scratch = _scratch(shape, pieces)
    held = np.empty((rows, grad.shape[1]), grad.dtype)
    places, factors = (
        np.int64(held.ctypes.data) + held.itemsize * held.shape[1] * np.arange(rows),
        np.empty(rows, out.dtype),
    )
    told, like = _fields(shape, scratch, places, factors, values, 0, values.size), values.dtype.type(0)
    for bag in range(start, stop):
        item, end = _end_of(bag - 1, bounds, per_bag), _end_of(bag, bounds, per_bag)
        while item < end:
            n = min(rows, end - item)
            bad = _locate(ids, item, n, fields, values.size, shape, constants, starts, given, pieces, scratch)
            if bad >= 0:
                return bad
            for r in range(n):
                factors[r] = scales[(item + r) % fields.shape[0]]
            put(told, n, factors.dtype.type(0), like)
            for r in range(n):
                total = 0.0
                for j in range(grad.shape[1]):
                    total += held[r, j] * grad[bag, j]
                out[item + r] = total
            item += n
    return -1
