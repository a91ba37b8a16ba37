"""Pieces of the attention kernels, vector and portable, against NumPy: tiles, codes, normalised rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from quernel import _intrinsics
from quernel._intrinsics import LANES
from quernel.nn._binary_attention_kernels import TILE, make_binarise, make_normalise, make_tile

VECTOR = _intrinsics.target_features() >= _intrinsics.VECTOR_FEATURES
PATHS = [
    pytest.param(True, id="portable"),
    pytest.param(False, id="vector", marks=pytest.mark.skipif(not VECTOR, reason="no AVX-512 + VNNI here")),
]
# float32 sums of some ten terms in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def _normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("portable", PATHS)
@pytest.mark.parametrize("vectors", [1, 2])
def test_tile_is_a_product_with_any_strides(vectors: int, portable: bool) -> None:
    tile = make_tile(vectors, portable)
    steps, width = 5, vectors * LANES

    @njit
    def call(a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, n: Any, out: Any, out_row: Any) -> None:
        tile(a.ctypes.data, a_row, a_step, b.ctypes.data, b_step, n, out.ctypes.data, out_row)

    a, b = _normal(TILE, steps), _normal(steps, width + 3)
    for left, strides in ((a, (steps, 1)), (np.ascontiguousarray(a.T), (1, TILE))):
        out = np.full((TILE, width + 1), np.nan, np.float32)
        call(left, *strides, b, b.shape[1], steps, out, out.shape[1])
        np.testing.assert_allclose(out[:, :width], a @ b[:, :width], **CLOSE)
        assert np.isnan(out[:, width:]).all()
    out = np.full((TILE, width), np.nan, np.float32)
    call(a, steps, 1, b, b.shape[1], 0, out, width)
    assert not out.any()


@pytest.mark.parametrize("portable", PATHS)
def test_codes_are_ones_above_the_threshold(portable: bool) -> None:
    above, above_mean = make_binarise(False, portable), make_binarise(True, portable)

    @njit
    def call(by_row: Any, x: Any, out: Any, number: Any) -> None:
        if by_row:
            above_mean(x.ctypes.data, x.shape[1], out.ctypes.data, 2, x.shape[0], number)
        else:
            above(x.ctypes.data, x.shape[1], out.ctypes.data, 2, x.shape[0], number)

    x = _normal(6, 40)
    x[3, :32], x[4, 5] = 0, np.nan
    rows = x[:, :32]
    length = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    with np.errstate(invalid="ignore"):
        for number in (0.1, 0.0, -0.1):
            out = np.full((6, 32), np.nan, np.float32)
            call(False, x, out, np.float32(number))
            np.testing.assert_array_equal(out, rows > np.float32(number) * length)
        out = np.full((6, 32), np.nan, np.float32)
        call(True, x, out, np.float32(30))
        np.testing.assert_array_equal(out, rows > rows.sum(1, keepdims=True) / 30)


@pytest.mark.parametrize("portable", PATHS)
def test_rows_are_normalised_with_a_floor(portable: bool) -> None:
    normalise = make_normalise(portable)

    @njit
    def call(rows: Any, constant: Any, stride: Any, factor: Any, mixed: Any, out: Any) -> None:
        normalise(
            rows.ctypes.data, constant.ctypes.data, stride, factor, mixed.ctypes.data, out.ctypes.data, 40, 2, len(rows)
        )

    rows, constant, mixed = _normal(5, 32), _normal(5, 32)[::-1].copy(), 3 * _normal(5, 32)
    rows[2], constant[2] = 0, 0
    for stride in (32, 0):
        y = rows + np.float32(0.5) * (constant if stride else constant[:1])
        wanted = y / np.maximum(np.linalg.norm(y, axis=1, keepdims=True), 1e-12) + mixed
        out = np.full((5, 40), np.nan, np.float32)
        call(rows.copy(), constant, stride, np.float32(0.5), mixed, out)
        np.testing.assert_allclose(out[:, :32], wanted, **CLOSE)
        assert np.isnan(out[:, 32:]).all()
