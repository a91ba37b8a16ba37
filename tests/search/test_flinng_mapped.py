"""A mapped index stays in its file: a query reads pages, not the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quernel._errors import FormatError
from quernel._io import CONFIG
from quernel.search import FlinngIndex

SCRIPT = """
import sys
from quernel.search import FlinngIndex

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024

FlinngIndex(metric="codes", n_tables=2, bits=16).add([[1, 1]]).save(sys.argv[2])
FlinngIndex.load(sys.argv[2]).search([[1, 1]], k=1)
before = resident()
index = FlinngIndex.load(sys.argv[1], mmap=sys.argv[3] == "mmap")
loaded = resident() - before
found = int(index.search([[7, 7]], k=1)[1][0, 0])
print(loaded, resident() - before, index.nbytes, found)
"""


def _resident(folder: Path, scratch: Path, how: str) -> tuple[int, int, int, int]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(scratch), how]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    loaded, searched, nbytes, found = map(int, lines[-1].split())
    return loaded, searched, nbytes, found


def _forget_pages(folder: Path) -> None:
    """Drop a folder's files from the page cache: the kernel keeps what was just written in pages of 2 MB, and maps
    each whole at the first byte that is read of it.
    """
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc")
def test_a_mapped_index_is_not_read_into_memory(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 2**16, (4_000_000, 2)).astype(np.uint16)
    codes[123] = 7
    folder = FlinngIndex(metric="codes", n_tables=2, bits=16).add(codes).save(tmp_path / "ix")
    _forget_pages(folder)
    loaded, searched, nbytes, found = _resident(folder, tmp_path / "small", "mmap")
    assert found == 123
    assert nbytes > 150e6
    # Read are the header and which items are deleted; some systems map megabytes around each first byte.
    assert loaded < 0.15 * nbytes
    # A query reads a dozen places, and as much around each of them.
    assert searched < 0.4 * nbytes
    whole, *_ = _resident(folder, tmp_path / "small", "whole")
    assert whole > 0.6 * nbytes


def test_a_mapped_load_skips_the_checksum_and_nothing_else(tmp_path: Path) -> None:
    index = FlinngIndex(metric="codes", n_tables=2, bits=2).add([[0, 1], [2, 3]])
    folder = index.save(tmp_path / "ix")
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError):
        FlinngIndex.load(folder, mmap=True)
    (folder / CONFIG).unlink()
    with pytest.raises(FormatError):
        FlinngIndex.load(folder, mmap=True)
