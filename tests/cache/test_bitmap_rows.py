"""Bitmap rows: what is kept, how it is stored, and products with it, on both paths."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quernel._errors import QuernelError
from quernel.cache import BitmapRows, bitmap_rows
from quernel.cache._bitmap_intrinsics import BFLOAT16, FLOAT16, channel_order, vector_path
from quernel.cache._bitmap_kernels import unpack
from tests.reference import mustafar as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums of a few hundred products of size one in float32, in another order.
SUMS = {"rtol": 1e-5, "atol": 1e-4}
# Ties, both zeros, subnormal numbers, the largest and infinity.
AWKWARD = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0**-149, -(2.0**-140), 2.0**-126, 3.0e38, -3.0e38, float("inf"))


@pytest.fixture(params=["vector", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(bitmap_rows, "vector_path", lambda kind: False)
    elif not all(map(vector_path, range(3))):
        pytest.skip("no AVX-512 with VBMI2 here")
    return str(request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored_bits(rows: BitmapRows) -> list[list[int]]:
    """Return the bitmaps of the rows of the first head."""
    words = torch.cat([page.bitmaps[0, page.skip : page.rows] for page in rows.pages])
    return [[int(word) % 2**64 for word in row] for row in words]


# The first call compiles.
@settings(deadline=None)
@given(st.binary(min_size=70, max_size=210), st.integers(1, 70))
def test_exactly_the_largest_are_kept_bit_by_bit(drawn_bytes: bytes, n: int) -> None:
    whole = drawn_bytes[: len(drawn_bytes) // 70 * 70]
    x = torch.tensor([AWKWARD[byte % len(AWKWARD)] for byte in whole]).view(-1, 70)
    rows = BitmapRows.pack(x, n)
    assert stored_bits(rows) == [reference.bitmaps(line, n) for line in x.tolist()]
    wanted = torch.tensor([reference.pruned(line, n) for line in x.tolist()])
    # Compared as bits: a kept negative zero stays one.
    assert torch.equal(rows.unpack().view(torch.int32), wanted.view(torch.int32))
    assert all(sum(word.bit_count() for word in row) == n for row in stored_bits(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64, 65, 130, 300])
def test_pruned_rows_come_back(dtype: torch.dtype, dim: int) -> None:
    x = drawn(2, 9, dim).to(dtype)
    n = max(1, dim // 3)
    wanted = [[reference.pruned(row, n) for row in head] for head in x.tolist()]
    assert torch.equal(BitmapRows.pack(x, n).unpack(), torch.tensor(wanted, dtype=dtype))
    assert torch.equal(BitmapRows.pack(x, dim).unpack(), x)


def test_every_float16_unpacks_to_its_value() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    x = torch.from_numpy(bits.view(np.int16)).view(torch.float16)
    out = np.empty((2**16, 1), np.uint32)
    unpack(FLOAT16, np.ones((2**16, 1), np.uint64), x.data_ptr(), 1, out)
    got, wanted = torch.from_numpy(out.view(np.float32))[:, 0], x.float()
    same = (got == wanted) & (got.signbit() == wanted.signbit()) | (got.isnan() & wanted.isnan())
    assert bool(same.all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group"), [(8, 1), (32, 3), (48, 4), (80, 8), (128, 11), (200, 2)])
def test_products_are_those_of_the_unpacked_rows(
    path: str, dtype: torch.dtype, dim: int, group: int, poisoned_memory: None
) -> None:
    if path == "plain" and dtype != torch.float32:
        # Only the unpacking depends on the dtype there; each pair with a group would be a kernel to compile.
        group = 3
    x = drawn(2, 600, dim).to(dtype)
    rows = BitmapRows.pack(x[:, :77], -(-dim // 3)).append(x[:, 77:])
    held = rows.unpack().float()
    query, weights = drawn(2, group, dim, seed=1), drawn(2, group, 600, seed=2)
    torch.testing.assert_close(rows.qk(query), query @ held.mT, **SUMS)
    torch.testing.assert_close(rows.pv(weights), weights @ held, **SUMS)


def test_one_head_needs_no_axis() -> None:
    x = drawn(5, 16)
    rows = BitmapRows.pack(x, 4)
    assert rows.unpack().shape == (5, 16)
    assert rows.qk(drawn(3, 16)).shape == (3, 5)
    assert rows.pv(drawn(3, 5)).shape == (3, 16)


def test_rows_appended_in_pieces_are_rows_packed_at_once() -> None:
    x = drawn(2, 1300, 40)
    whole, pieces = BitmapRows.pack(x, 11), BitmapRows(2, 40, 11)
    for part in x.split([1, 62, 1, 64, 500, 1, 671], dim=1):
        pieces.append(part)
    assert torch.equal(pieces.unpack(), whole.unpack())
    assert len(pieces) == 1300
    # Room to spare is at most 63 rows: 8 bytes of bitmap and 11 floats each, of two heads.
    assert 0 <= pieces.nbytes - 2 * 1300 * (8 + 4 * 11) < 64 * 2 * (8 + 4 * 11)


@pytest.mark.parametrize("gone", [0, 1, 63, 64, 511, 512, 700, 1100])
def test_the_oldest_rows_can_go(gone: int) -> None:
    x = drawn(2, 1100, 40)
    rows = BitmapRows.pack(x, 11)
    wanted, before = rows.unpack()[:, gone:], rows.nbytes
    for part in (gone // 3, gone - gone // 3):
        rows.drop_first(part)
    assert torch.equal(rows.unpack(), wanted)
    if gone < 1100:
        query = drawn(2, 4, 40)
        torch.testing.assert_close(rows.qk(query), query @ wanted.mT, **SUMS)
        weights = drawn(2, 4, 1100 - gone)
        torch.testing.assert_close(rows.pv(weights), weights @ wanted, **SUMS)
    row = 2 * (8 + 4 * 11)
    assert rows.nbytes <= before - (gone - 127) * row
    rows.append(x[:, :5])
    assert torch.equal(rows.unpack()[:, -5:], BitmapRows.pack(x[:, :5], 11).unpack())


def test_copies_share_nothing() -> None:
    rows = BitmapRows.pack(drawn(1, 30, 20), 5)
    rows.qk(drawn(1, 1, 20))
    others = [rows.clone(), copy.deepcopy(rows)]
    wanted = rows.unpack()
    rows.append(drawn(1, 70, 20)).drop_first(40)
    for other in others:
        assert torch.equal(other.unpack(), wanted)
        torch.testing.assert_close(other.qk(drawn(1, 1, 20)), drawn(1, 1, 20) @ wanted.mT, **SUMS)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int) -> None:
    x, query = drawn(2, 20000, 64), drawn(2, 4, 64)
    torch.set_num_threads(1)
    rows = BitmapRows.pack(x, 20)
    wanted = rows.qk(query), rows.pv(torch.ones(2, 4, 20000))
    torch.set_num_threads(threads)
    again = BitmapRows.pack(x, 20)
    assert torch.equal(again.unpack(), rows.unpack())
    assert torch.equal(again.qk(query), wanted[0])
    assert torch.equal(again.pv(torch.ones(2, 4, 20000)), wanted[1])


def test_bytes_are_bitmaps_and_values() -> None:
    for dim, n, dtype in ((128, 39, torch.float32), (128, 39, torch.bfloat16), (200, 60, torch.float16)):
        rows = BitmapRows.pack(drawn(1, 512, dim).to(dtype), n)
        assert rows.nbytes == 512 * (8 * -(-dim // 64) + n * dtype.itemsize)


def test_the_order_of_channels_is_a_permutation_of_halves() -> None:
    order = channel_order(BFLOAT16, 64)
    assert order[:3].tolist() == [0, 2, 4]
    assert order[16:19].tolist() == [1, 3, 5]
    assert sorted(order[:32]) == list(range(32))
    assert order[32:].tolist() == [32 + c for c in order[:32]]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: BitmapRows.pack(torch.ones(2, 3, dtype=torch.int64), 1), "int64"),
        (lambda: BitmapRows.pack(torch.ones(2, 3, dtype=torch.float64), 1), "float64"),
        (lambda: BitmapRows.pack(torch.ones(3), 1), "shape"),
        (lambda: BitmapRows.pack(torch.ones(2, 3), 0), "n must"),
        (lambda: BitmapRows.pack(torch.ones(2, 3), 4), "n must"),
        (lambda: BitmapRows(1, 65536, 1), "dim"),
        (lambda: BitmapRows(1, 8, 1, torch.float64), "dtype"),
        (lambda: BitmapRows(2, 8, 1).append(torch.ones(2, 1, 7)), "shape"),
        (lambda: BitmapRows.pack(torch.full((1, 4), 1e5), 2, torch.float16), "65504"),
        (lambda: BitmapRows.pack(torch.ones(2, 3), 1).qk(torch.ones(1, 4)), "q must"),
        (lambda: BitmapRows.pack(torch.ones(2, 3), 1).pv(torch.ones(1, 3)), "p must"),
        (lambda: BitmapRows.pack(torch.ones(2, 3), 1).drop_first(3), "count"),
    ],
)
def test_errors_name_the_argument(call: object, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        call()  # type: ignore[operator]


def test_the_longest_rows() -> None:
    x = drawn(1, 20, 65535)
    rows = BitmapRows.pack(x, 100)
    held, query = rows.unpack(), drawn(1, 1, 65535, seed=1)
    torch.testing.assert_close(rows.qk(query), query @ held.mT, **SUMS)
    torch.testing.assert_close(rows.pv(torch.ones(1, 1, 20)), held.sum(1, keepdim=True), **SUMS)
