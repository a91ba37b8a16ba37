"""Hashed weights: what they stand for, sums by slot and their memory, the kept weight, and versions of their maps."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.hashing import BlockMap, TileMap
from quernel.nn import SharedArray, _block_ops
from quernel.nn.weights import HashedBlockWeight, HashedTileWeight
from quernel.nn.weights.hashed import HashedWeight

SIZE = 300
PEAK = """
import re
from pathlib import Path
import torch
from quernel.hashing import BlockMap
from quernel.nn import SharedArray
from quernel.nn.weights import HashedBlockWeight

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def weight(rows):
    return HashedBlockWeight(SharedArray(10_000), BlockMap(10_000, 32, 32), rows)

weight(100).counts()  # compiles
one = weight(1_000_000)
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
before = status("VmRSS")
one.counts()
print(status("VmHWM") - before)
"""


def tiles(**options: Any) -> HashedTileWeight:
    memory = SharedArray(SIZE, seed=1, generator=torch.Generator().manual_seed(0))
    return HashedTileWeight(memory, TileMap(SIZE, (17, 33), (4, 8), seed=5), **{"scale": -0.5} | options)


def blocks(**options: Any) -> HashedBlockWeight:
    memory = SharedArray(SIZE, seed=1, generator=torch.Generator().manual_seed(0))
    return HashedBlockWeight(memory, BlockMap(SIZE, 7, 4, seed=5), 23, **{"scale": -0.5} | options)


def map_of(weight: HashedWeight) -> tuple[np.ndarray, np.ndarray]:
    mapped = weight.mapped
    if isinstance(mapped, TileMap):
        return mapped.index(), mapped.signs_of()
    return mapped.index(np.arange(weight.shape[0])), mapped.signs_of(np.arange(weight.shape[0]))


every_weight = pytest.mark.parametrize("make", [tiles, blocks])


@every_weight
@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.usefixtures("poisoned_memory")
@torch.no_grad()
def test_dense_rows_and_products_are_those_of_the_map(make: Any, mode: Any) -> None:
    weight = make(mode=mode)
    slots, signs = map_of(weight)
    wanted = -0.5 * weight.memory.values[torch.from_numpy(slots)] * torch.from_numpy(signs)
    x, ids = torch.randn(5, weight.shape[1]), torch.tensor([[0, 16], [3, 3]])
    for _ in range(2):
        assert torch.equal(weight.dense(), wanted)
        assert torch.equal(weight.rows(ids), wanted[ids])
        torch.testing.assert_close(weight.matmul(x), F.linear(x, wanted), rtol=1e-5, atol=1e-5)


@every_weight
@pytest.mark.parametrize("at_once", [1, 20, 2**18])
def test_sums_and_counts_by_slot(make: Any, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_block_ops, "_NUMBERS_AT_ONCE", at_once)
    weight = make()
    slots, signs = (array.ravel() for array in map_of(weight))
    matrix = torch.randn(weight.shape, dtype=torch.float64)
    wanted = np.zeros((2, SIZE))
    np.add.at(wanted[0], slots, signs * matrix.numpy().ravel())
    np.add.at(wanted[1], slots, 1)
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = weight.fold(matrix.to(dtype))
        assert got.dtype is dtype
        np.testing.assert_allclose(got.numpy(), wanted[0], rtol=close, atol=close)
    assert np.array_equal(weight.counts().numpy(), wanted[1])
    assert weight.parts() == [(-0.5, matrix.numel())]
    ((scale, counts),) = weight.part_counts()
    assert scale == -0.5 and torch.equal(counts, weight.counts())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_counting_forms_no_table() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    # The table of 32 million numbers would be 256 MB in float64.
    assert float(done.stdout) < 20


@every_weight
@torch.no_grad()
def test_a_kept_weight_is_not_taken_for_that_of_another_array_at_its_address(make: Any) -> None:
    weight = make(mode="speed")
    values = weight.memory.values
    for number in range(1, 30):
        values.data = torch.zeros(0)  # lets go of the numbers; the next ones often lie where they were
        values.data = torch.full((SIZE,), float(number))
        assert float(weight.dense().abs().max()) == 0.5 * number


@every_weight
def test_a_kept_weight_follows_training_that_counts_no_versions(make: Any) -> None:
    weight = make(mode="speed")
    with torch.no_grad():
        before = weight.dense()
        assert weight.dense() is before
    weight.dense().sum().backward()
    weight.memory.values.data.add_(weight.memory.values.grad)
    with torch.no_grad():
        assert not torch.equal(weight.dense(), before)
        assert torch.equal(weight.dense(), copy.deepcopy(weight).dense())


@every_weight
def test_arrays_of_inference_mode_are_read_anew(make: Any) -> None:
    with torch.inference_mode():
        weight = make(mode="speed")
        assert weight.memory.values.is_inference()
        before = weight.dense()
        weight.memory.values.mul_(2)
        assert torch.equal(weight.dense(), 2 * before)
    assert torch.equal(weight.dense(), 2 * before)


@every_weight
def test_versions_of_the_hash(make: Any) -> None:
    weight = make()
    config, kind = weight.config(), type(weight)
    assert config["hash"] == config["map"]["hash"] == 1
    old = config | {"map": {k: v for k, v in config["map"].items() if k != "hash"}}
    twin = kind.from_config(old)
    twin.load_state_dict(weight.state_dict())
    assert torch.equal(twin.dense(), weight.dense()) and twin.config() == config
    for newer in (config | {"hash": 2}, config | {"map": config["map"] | {"hash": 2}}):
        with pytest.raises(QuernelError, match="hash must be at most 1, the newest known here; got 2"):
            kind.from_config(newer)
    for field in ("size", "seed", "signs"):
        with pytest.raises(QuernelError, match=f"must have the fields.*; it lacks {field}"):
            kind.from_config(config | {"map": {k: v for k, v in config["map"].items() if k != field}})


@pytest.mark.parametrize("ids", [torch.tensor([0.7]), torch.tensor([True]), torch.tensor([1j])], ids=lambda t: t.dtype)
def test_ids_that_are_no_integers_are_refused(ids: torch.Tensor) -> None:
    for weight in (tiles(), blocks()):
        with pytest.raises(QuernelError, match=f"ids must be integers; got {ids.dtype}"):
            weight.rows(ids)


def test_bad_arguments_are_named() -> None:
    memory = SharedArray(SIZE)
    with pytest.raises(QuernelError, match="mapped must be over an array of 300 numbers; it is over 200"):
        HashedBlockWeight(memory, BlockMap(200, 7, 4), 23)
    with pytest.raises(QuernelError, match="mapped must be TileMap; got BlockMap"):
        HashedTileWeight(memory, BlockMap(SIZE, 7, 4))  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="mapped must be BlockMap; got TileMap"):
        HashedBlockWeight(memory, TileMap(SIZE, (5, 7), (2, 4)), 5)  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="n_rows must be an integer"):
        HashedBlockWeight(memory, BlockMap(SIZE, 7, 4), 0)
