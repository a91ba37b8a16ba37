"""Spatially varying depthwise filters of 3x3 and 5x5 taps, and their gradients, sixteen places or sets at a time.

A cell is one vector of lanes: pixels of a plane where planes are contiguous, weight sets of a pixel where channels are
last.  Its weights are loaded once and serve all channels that share them.  What differs between the filter and its
gradient by the input are only offsets: there the weights stand where the output's gradient is read.  Taps beyond the
border are masked out and not read.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types
from numba.extending import intrinsic

from quernel._intrinsics import BIT, F32, I16, I32, I64, LANES, Emitter, keyed
from quernel.nn._addresses import make_caller, pointer
from quernel.nn._spmm import ALL_LANES, ROW, kept

SIZES = (3, 5)
# What one call hands to its threads, all int64; addresses and strides in bytes.  A run is one channel of each weight
# set: channels c, c + sets, c + 2 sets, ... of one set are a run apart.
FIELDS = (
    *("x", "x_image", "w", "w_image", "y", "y_image", "sets", "runs", "run", "pixels", "size"),
    *("masks", "x_offsets", "w_offsets", "cell"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])


@functools.lru_cache(maxsize=256)
def tap_masks(size: int, height: int, width: int, lanes: int) -> torch.Tensor:
    """Return which lanes of each cell have a neighbour in the image, (cells, 2 size) as bits of int16.

    By row first, by column behind; with one lane a cell, a pixel, all bits are alike.
    """
    offsets = (np.arange(size) - size // 2)[:, None]
    pixels = np.arange(-(-height * width // lanes) * lanes).reshape(-1, 1, lanes)
    rows, columns = pixels // width + offsets, pixels % width + offsets  # (cells, size, lanes)
    on_plane = pixels < height * width
    inside = [on_plane & (rows >= 0) & (rows < height), on_plane & (columns >= 0) & (columns < width)]
    bits = (np.concatenate(inside, axis=1) << np.arange(lanes)).sum(-1)
    return torch.from_numpy((bits if lanes > 1 else bits * ALL_LANES).astype(np.uint16).view(np.int16))


@functools.lru_cache(maxsize=256)
def offsets(size: int, width: int, channels: int, sets: int, pixels: int, last: bool, flipped: bool) -> torch.Tensor:
    """Return where each tap is read, in bytes from the cell: (2, taps) of inputs and of weights, int64.

    ``flipped`` is for the gradient by the input: tap t of the weights at the place that tap t of an output would read
    is the tap that leads back from there.
    """
    taps = size * size
    t = np.arange(taps)
    places = (t // size - size // 2) * width + t % size - size // 2
    of_x = 4 * places * (channels if last else 1)
    of_w = 4 * t * (1 if last else pixels)
    if flipped:
        of_w = of_w[::-1] + 4 * places * (taps * sets if last else 1)
    return torch.from_numpy(np.stack([of_x, of_w]).astype(np.int64))


def _field(e: Emitter, table: Any, name: str) -> Any:
    return e.load(e.builder.add(table, I64(8 * FIELDS.index(name))), I64)


class _Cell:
    """What the two intrinsics share: masks, offsets, and vectors of weights in either layout."""

    def __init__(self, builder: Any, size: int, last: bool, table: Any, masks: Any, lanes: Any) -> None:
        self.e = e = Emitter(builder)
        self.taps, self.last, self.lanes = size * size, last, builder.trunc(lanes, I16)
        places = [e.load(builder.add(masks, I64(2 * i)), I16) for i in range(2 * size)]
        rows = [builder.and_(self.lanes, row) for row in places[:size]]
        self.masks = [builder.and_(rows[t // size], places[size + t % size]) for t in range(self.taps)]
        of_x, of_w = (_field(e, table, name) for name in ("x_offsets", "w_offsets"))
        self.x_offsets, self.w_offsets = (
            [e.load(builder.add(base, I64(8 * t)), I64) for t in range(self.taps)] for base in (of_x, of_w)
        )
        self.runs, self.run = _field(e, table, "runs"), _field(e, table, "run")

    def inputs(self, x: Any) -> list[Any]:
        """Load the neighbours of the lanes, a vector a tap."""
        e = self.e
        return [
            e.load_some(e.builder.add(x, offset), ROW, mask)
            for offset, mask in zip(self.x_offsets, self.masks, strict=True)
        ]

    def weights(self, w: Any) -> list[Any]:
        """Load the weights of the lanes, a vector a tap."""
        e = self.e
        places = [e.builder.add(w, offset) for offset in self.w_offsets]
        if not self.last:
            return [e.load_some(place, ROW, mask) for place, mask in zip(places, self.masks, strict=True)]
        return [self._gathered(place, mask) for place, mask in zip(places, self.masks, strict=True)]

    def put_weights(self, values: list[Any], w: Any) -> None:
        """Store a vector a tap, all lanes that the cell has."""
        e = self.e
        for value, offset in zip(values, self.w_offsets, strict=True):
            place = e.builder.add(w, offset)
            if self.last:
                self._call("llvm.masked.scatter.v16f32.v16p0f32", ir.VoidType(), [
                    value, self._pointers(place), I32(4), self._bits(self.lanes)
                ])  # fmt: skip
            else:
                e.store_some(value, place, self.lanes)

    def _gathered(self, place: Any, mask: Any) -> Any:
        operands = [self._pointers(place), I32(4), self._bits(mask), self.e.zeros(ROW)]
        return self._call("llvm.masked.gather.v16f32.v16p0f32", ROW, operands)

    def _bits(self, mask: Any) -> Any:
        return self.e.builder.bitcast(mask, ir.VectorType(BIT, LANES))

    def _pointers(self, place: Any) -> Any:
        """Return the addresses of one tap of sixteen weight sets, whose taps lie side by side."""
        builder = self.e.builder
        steps = ir.Constant(ir.VectorType(I64, LANES), [4 * self.taps * lane for lane in range(LANES)])
        return builder.inttoptr(builder.add(self.e.splat(place), steps), ir.VectorType(F32.as_pointer(), LANES))

    def _call(self, name: str, returns: Any, operands: list[Any]) -> Any:
        return self.e._call(name, returns, operands)


def _make_apply(size: int, last: bool) -> Any:
    """Return the intrinsic ``apply(table, x, w, y, masks, lanes)``: y = sum over taps of x and w, for every run."""

    @intrinsic
    def apply(typing: Any, table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            table, x, w, y, masks, lanes = args
            cell = _Cell(builder, size, last, table, masks, lanes)
            e, weights = cell.e, cell.weights(w)

            def one(_: Any, x: Any, y: Any) -> list[Any]:
                total = e.zeros(ROW)
                for value, weight in zip(cell.inputs(x), weights, strict=True):
                    total = e.fma(value, weight, total)
                e.store_some(total, y, cell.lanes)
                return [builder.add(x, cell.run), builder.add(y, cell.run)]

            e.loop(cell.runs, [x, y], one)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), emit

    return apply


def _make_correlate(size: int, last: bool) -> Any:
    """Return the intrinsic ``correlate(table, x, w, y, masks, lanes)``: w = sum over runs of x at each tap times y."""

    @intrinsic
    def correlate(typing: Any, table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            table, x, w, y, masks, lanes = args
            cell = _Cell(builder, size, last, table, masks, lanes)
            e = cell.e

            def one(_: Any, x: Any, y: Any, *sums: Any) -> list[Any]:
                grad = e.load_some(y, ROW, cell.lanes)
                sums = tuple(e.fma(value, grad, total) for value, total in zip(cell.inputs(x), sums, strict=True))
                return [builder.add(x, cell.run), builder.add(y, cell.run), *sums]

            _, _, *sums = e.loop(cell.runs, [x, y, *[e.zeros(ROW)] * cell.taps], one)
            cell.put_weights(sums, w)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), emit

    return correlate


_apply3, _apply5 = (_make_apply(size, False) for size in SIZES)
_apply3_last, _apply5_last = (_make_apply(size, True) for size in SIZES)
_correlate3, _correlate5 = (_make_correlate(size, False) for size in SIZES)
_correlate3_last, _correlate5_last = (_make_correlate(size, True) for size in SIZES)


def _filter3(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _apply3(table, x, w, y, masks, lanes)


def _filter5(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _apply5(table, x, w, y, masks, lanes)


def _filter3_last(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _apply3_last(table, x, w, y, masks, lanes)


def _filter5_last(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _apply5_last(table, x, w, y, masks, lanes)


def _weigh3(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _correlate3(table, x, w, y, masks, lanes)


def _weigh5(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _correlate5(table, x, w, y, masks, lanes)


def _weigh3_last(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _correlate3_last(table, x, w, y, masks, lanes)


def _weigh5_last(table: Any, x: Any, w: Any, y: Any, masks: Any, lanes: Any) -> None:
    _correlate5_last(table, x, w, y, masks, lanes)


_CELLS = {
    (3, False, False): _filter3, (5, False, False): _filter5, (3, True, False): _filter3_last,
    (5, True, False): _filter5_last, (3, False, True): _weigh3, (5, False, True): _weigh5,
    (3, True, True): _weigh3_last, (5, True, True): _weigh5_last,
}  # fmt: skip


@functools.cache
def cell(size: int, last: bool, weighs: bool) -> int:
    """Return the address of the C function over one cell: a filter, or the gradient by the weights."""
    function = _CELLS[size, last, weighs]
    return kept(cfunc(types.void(*[types.int64] * 6), cache=True, fastmath=False)(keyed(function)))


_call_cell = make_caller(*[I64] * 6, returns=ir.VoidType())


def _planes(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Compute the planes from ``start`` to ``stop``, one a weight set of an image, where planes are contiguous."""
    call = carray(pointer(table), (1,), CALL)[0]
    for item in range(start, stop):
        image, g = item // call.sets, item % call.sets
        x = call.x + image * call.x_image + 4 * g * call.pixels
        y = call.y + image * call.y_image + 4 * g * call.pixels
        w = call.w + image * call.w_image + 4 * g * call.pixels * call.size * call.size
        for first in range(0, call.pixels, LANES):
            masks = call.masks + first // LANES * 4 * call.size
            lanes = (1 << min(LANES, call.pixels - first)) - 1
            _call_cell(call.cell, (table, x + 4 * first, w + 4 * first, y + 4 * first, masks, lanes))


def _pixels(table: Any, start: Any, stop: Any, part: Any) -> None:
    """Compute the pixels from ``start`` to ``stop``, of all images one after another, where channels are last."""
    call = carray(pointer(table), (1,), CALL)[0]
    for item in range(start, stop):
        image, pixel = item // call.pixels, item % call.pixels
        x = call.x + image * call.x_image + 4 * pixel * call.sets * call.runs
        y = call.y + image * call.y_image + 4 * pixel * call.sets * call.runs
        w = call.w + image * call.w_image + 4 * pixel * call.sets * call.size * call.size
        masks = call.masks + pixel * 4 * call.size
        for g in range(0, call.sets, LANES):
            lanes = (1 << min(LANES, call.sets - g)) - 1
            _call_cell(call.cell, (table, x + 4 * g, w + 4 * g * call.size * call.size, y + 4 * g, masks, lanes))


@functools.cache
def planes() -> int:
    """Return the address of the C function over planes for ``run_ranges``; its fields are ``FIELDS``."""
    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(_planes))


@functools.cache
def pixels() -> int:
    """Return the address of the C function over pixels for ``run_ranges``; its fields are ``FIELDS``."""
    return kept(cfunc(types.void(*[types.int64] * 4), cache=True, fastmath=False)(_pixels))
