"""The pool against plain indexing: ranges of records, in memory and in a file, and what it counts."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.cache import KVPool

HEADS = 3
both = pytest.mark.parametrize("storage", ["ram", "memmap"])


def filled(storage: str, width: int = 8, dtype: torch.dtype = torch.float32, parts: int = 40) -> tuple[KVPool, list]:
    draw = torch.Generator().manual_seed(0)
    pool = KVPool(HEADS, width, dtype, storage)
    held = []
    for i in range(parts):
        rows = torch.randn(HEADS, (500, 7, 64, 1)[i % 4], width, generator=draw)
        if i % 4 == 0:
            pool.reserve(rows.shape[1])
        held.append((pool.append(rows), rows.to(dtype)))
    return pool, held


def record(held: list, number: int) -> torch.Tensor:
    """Return a record by its number."""
    first, rows = next((f, r) for f, r in reversed(held) if f <= number)
    place = number - first
    return rows[place // rows.shape[1], place % rows.shape[1]]


@both
@pytest.mark.parametrize("width", [8, 6, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ranges_are_what_was_appended(storage: str, width: int, dtype: torch.dtype) -> None:
    pool, held = filled(storage, width, dtype)
    draw = np.random.default_rng(0)
    starts, counts = np.zeros((2, HEADS, 30), np.int64)
    for h in range(HEADS):
        for r in range(30):
            first, rows = held[draw.integers(len(held))]
            n = rows.shape[1]
            counts[h, r] = draw.integers(1, n + 1)
            starts[h, r] = first + h * n + draw.integers(0, n - counts[h, r] + 1)
    longest = int(counts.sum(1).max())
    out = torch.full((HEADS, longest + 5, width + 0), torch.nan, dtype=dtype)
    pool.gather(starts, counts, out[:, 2 : longest + 2])
    converted = torch.empty(HEADS, longest, width, dtype=torch.float16)
    pool.gather(starts, counts, converted)
    for h in range(HEADS):
        numbers = [s + i for s, c in zip(starts[h], counts[h], strict=True) for i in range(c)]
        wanted = torch.stack([record(held, number) for number in numbers])
        assert torch.equal(out[h, 2 : 2 + len(numbers)], wanted)
        assert torch.equal(converted[h, : len(numbers)], wanted.half())
    assert out[:, :2].isnan().all() and out[:, longest + 2 :].isnan().all()
    for block, (_, rows) in zip(pool.blocks(), held, strict=True):
        assert torch.equal(block, rows)


@both
def test_bytes_are_counted(storage: str) -> None:
    pool, held = filled(storage, dtype=torch.bfloat16)
    least = sum(rows.nbytes for _, rows in held)
    assert pool.tokens == sum(rows.shape[1] for _, rows in held)
    if storage == "memmap":
        assert pool.nbytes == least and pool.resident_nbytes == 0 and pool.tensors() == []
    else:
        assert least <= pool.nbytes == pool.resident_nbytes <= 1.25 * least
        assert sum(t.untyped_storage().nbytes() for t in pool.tensors()) == pool.nbytes
    empty = KVPool(HEADS, 8, storage=storage)
    assert empty.nbytes == empty.tokens == 0 and list(empty.blocks()) == []
    empty.append(torch.empty(HEADS, 0, 8))
    assert empty.tokens == 0


@both
def test_a_prompt_takes_its_own_bytes_and_no_more(storage: str) -> None:
    pool = KVPool(HEADS, 8, storage=storage)
    pool.reserve(1000)
    for part in torch.zeros(HEADS, 1000, 8).split(300, dim=1):
        pool.append(part)
    assert pool.nbytes == 1000 * HEADS * 8 * 4 and len(pool.tensors()) <= 1


@both
def test_a_clone_shares_nothing(storage: str) -> None:
    pool, held = filled(storage, parts=3)
    other = pool.clone()
    pool.append(torch.ones(HEADS, 9, 8))
    assert other.tokens == pool.tokens - 9
    other.append(torch.zeros(HEADS, 4, 8))
    assert torch.equal(list(pool.blocks())[-1], torch.ones(HEADS, 9, 8))
    for block, (_, rows) in zip(other.blocks(), held, strict=False):
        assert torch.equal(block, rows)


def test_without_madvise_the_mapping_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [block.clone() for block in filled("memmap")[0].blocks()]
    monkeypatch.delattr(mmap, "MADV_DONTNEED", raising=False)
    pool, _ = filled("memmap")
    assert all(torch.equal(a, b) for a, b in zip(pool.blocks(), wanted, strict=True))
    assert pool._store._mapping is None  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what a mapping holds")
def test_pages_that_were_read_do_not_stay_resident() -> None:
    pool, _ = filled("memmap", width=64, parts=60)
    sum(float(block.sum()) for block in pool.blocks())
    inode = os.fstat(pool._store._file.fileno()).st_ino  # type: ignore[attr-defined]
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines()
    heads = [i for i, line in enumerate(lines) if f" {inode} " in line]
    assert heads, "the mapping is not found"
    resident = [next(line for line in lines[i:] if line.startswith("Rss:")) for i in heads]
    assert sum(int(line.split()[1]) for line in resident) == 0


def test_the_file_goes_with_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool, _ = filled("memmap", parts=2)
    descriptor = pool._store._file.fileno()  # type: ignore[attr-defined]
    list(pool.blocks())
    del pool
    assert not any(tmp_path.iterdir())
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_errors_name_the_argument() -> None:
    for options, word in (
        ({"heads": 0}, "heads"),
        ({"width": 0}, "width"),
        ({"storage": "disk"}, "storage"),
        ({"dtype": torch.int8}, "dtype"),
    ):
        with pytest.raises(QuernelError, match=word):
            KVPool(**{"heads": 1, "width": 2, **options})  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match=r"rows must be \(1, n, 2\)"):
        KVPool(1, 2).append(torch.zeros(2, 3, 2))
