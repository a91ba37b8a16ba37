"""``RobeEmbeddingBag``: torch's own bags under the identity map, fields of a click model, saving, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quernel
from quernel import testing
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.nn import RobeArray, RobeEmbedding, RobeEmbeddingBag

# Sums of a few rows, taken in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
OFFSETS = torch.tensor([0, 0, 4, 5, 5])


def rows_of(bag: RobeEmbeddingBag) -> Tensor:
    """Return the whole virtual table of one vocabulary, by the map's own words."""
    ids = np.arange(bag.num_embeddings)
    values = bag.memory.values.detach()
    return torch.from_numpy(bag.map.signs_of(ids)) * values[torch.from_numpy(bag.map.index(ids))]


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_bags_are_torch_over_the_same_rows(mode: Any, padding_idx: int | None, include_last_offset: bool) -> None:
    bag = RobeEmbeddingBag(20, 6, size=40, mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset)
    ids = torch.randint(0, 5, (9,))
    offsets = torch.cat([OFFSETS, torch.tensor([9])]) if include_last_offset else OFFSETS
    table = rows_of(bag)
    options: dict[str, Any] = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": include_last_offset}
    torch.testing.assert_close(bag(ids, offsets), F.embedding_bag(ids, table, offsets, **options), **CLOSE)
    matrix = torch.randint(0, 5, (4, 3))
    del options["include_last_offset"]
    torch.testing.assert_close(bag(matrix), F.embedding_bag(matrix, table, **options), **CLOSE)


def test_weighted_sums() -> None:
    bag, ids, weights = RobeEmbeddingBag(20, 6, size=40), torch.randint(0, 20, (9,)), torch.randn(9, requires_grad=True)
    wanted = F.embedding_bag(ids, rows_of(bag), OFFSETS, mode="sum", per_sample_weights=weights.detach())
    got = bag(ids, OFFSETS, weights)
    torch.testing.assert_close(got, wanted, **CLOSE)
    grad = torch.randn_like(got)
    got.backward(grad)
    of_bag = torch.bucketize(torch.arange(9), OFFSETS, right=True) - 1
    torch.testing.assert_close(weights.grad, (rows_of(bag)[ids] * grad[of_bag]).sum(1), **CLOSE)


@pytest.mark.parametrize("mode", [None, "sum", "mean"])
def test_fields_are_tables_behind_each_other(mode: Any) -> None:
    sizes, memory = [50, 9, 20], RobeArray(300, seed=3)
    fields = RobeEmbeddingBag(sizes, 8, memory=memory, mode=mode, scale=[1.0, 0.5, 2.0], offset=0)
    ids = torch.stack([torch.randint(0, size, (7,)) for size in sizes], dim=1)
    rows = [
        RobeEmbedding(size, 8, memory=memory, offset=sum(sizes[:f]), scale=scale)(ids[:, f])
        for f, (size, scale) in enumerate(zip(sizes, (1.0, 0.5, 2.0), strict=True))
    ]
    apart = torch.stack(rows, dim=1)
    wanted = apart if mode is None else apart.sum(1) if mode == "sum" else apart.mean(1)
    torch.testing.assert_close(fields(ids), wanted, **CLOSE)
    assert torch.equal(fields(ids.reshape(7, 1, 3))[:, 0], fields(ids))


def test_fields_with_weights_and_padding() -> None:
    fields = RobeEmbeddingBag([5, 6], 4, size=40, mode="sum", padding_idx=0)
    apart = RobeEmbeddingBag([5, 6], 4, memory=fields.memory, mode=None, padding_idx=0, offset=0)
    ids, weights = torch.tensor([[0, 1], [2, 0], [0, 0]]), torch.randn(3, 2)
    torch.testing.assert_close(fields(ids, None, weights), apart(ids, None, weights).sum(1), **CLOSE)
    assert not apart(ids)[ids == 0].any()
    fields(ids).sum().backward()
    touched = torch.from_numpy(fields.map.index(np.array([2, 6]))).reshape(-1).unique()
    assert set(fields.memory.values.grad.nonzero()[:, 0].tolist()) <= set(touched.tolist())


def test_initial_values_follow_the_largest_vocabulary() -> None:
    fields = RobeEmbeddingBag([10, 4000], 8, size=10_000, mode=None, scale="like")
    assert fields.memory.bound == 4000**-0.5
    assert fields.scale == pytest.approx([(4000 / 10) ** 0.5, 1.0])


def test_a_vocabulary_from_numpy_is_one_table() -> None:
    bag = RobeEmbeddingBag(np.int64(20), 6, size=40)  # type: ignore[arg-type]
    assert bag.one_table and json.dumps(bag.config())
    assert bag(torch.zeros(4, 3, dtype=torch.long)).shape == (4, 6)


def test_a_field_number_keeps_layers_apart() -> None:
    memory = RobeArray(100)
    one, two = (RobeEmbeddingBag(9, 4, memory=memory, field=f) for f in (0, 1))
    assert one.map.seed == RobeEmbedding(9, 4, memory=memory, field=0).map.seed != two.map.seed


@pytest.mark.parametrize(
    "make", [lambda: RobeEmbeddingBag(9, 4, size=20, mode="mean"), lambda: RobeEmbeddingBag([9, 8], 4, size=20)]
)
def test_saved_and_loaded(make: Any, tmp_path: Path) -> None:
    model = nn.Sequential(make())
    twin = quernel.load(save_model(model, tmp_path / "model"), model=lambda: nn.Sequential(nn.Identity()))
    ids = torch.randint(0, 8, (5, 2))
    assert torch.equal(twin(ids), model(ids))
    assert twin[0].config() == model[0].config()


def test_empty_batches_and_bags() -> None:
    bag = RobeEmbeddingBag(9, 4, size=20, mode="mean")
    assert bag(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 4)
    assert torch.equal(bag(torch.zeros(0, dtype=torch.long), torch.tensor([0, 0])), torch.zeros(2, 4))
    assert RobeEmbeddingBag([9, 8], 4, size=20, mode=None)(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RobeEmbeddingBag([], 4, size=20), "num_embeddings must be an integer or one a field; got none"),
        (lambda: RobeEmbeddingBag([9, 0], 4, size=20), "num_embeddings must be an integer"),
        (lambda: RobeEmbeddingBag(9, 4, size=20, mode="max"), "mode must be one of 'sum', 'mean'; got 'max'"),
        (lambda: RobeEmbeddingBag(9, 4, size=20, mode=None), "mode must be one of 'sum', 'mean'; got None"),
        (lambda: RobeEmbeddingBag([9, 9], 4, size=20, scale=[1.0]), "scale must be one number, or 2"),
        (lambda: RobeEmbeddingBag([9, 5], 4, size=20, padding_idx=5), "padding_idx must be an integer in"),
        (lambda: RobeEmbeddingBag(2**62, 4, size=20), "num_embeddings and offset must stay below"),
        (lambda: RobeEmbeddingBag([9, 5], 4, size=20)(torch.zeros(2, 3, dtype=torch.long)), r"shape \(..., 2\)"),
        (lambda: RobeEmbeddingBag([9, 5], 4, size=20)(torch.tensor([[0, 5]])), r"ids of field 1 must be in \[0, 5\)"),
        (lambda: RobeEmbeddingBag(9, 4, size=20)(torch.zeros(3, dtype=torch.long)), "ids must have 2 dimensions"),
        (
            lambda: RobeEmbeddingBag([9, 5], 4, size=20)(torch.zeros(3, 2).long(), None, torch.ones(2, 3)),
            r"per_sample_weights must have the shape of ids, \(3, 2\); got \(2, 3\)",
        ),
        (lambda: RobeEmbeddingBag(9, 4, memory=RobeArray(64)), "field or offset must be given with memory"),
        (
            lambda: RobeEmbeddingBag(9, 4, size=20)(torch.zeros(3, dtype=torch.long), torch.zeros(1)),
            "offsets must be integers",
        ),
        (
            lambda: RobeEmbeddingBag(9, 4, size=20, mode="mean")(torch.zeros(2, 2).long(), None, torch.ones(2, 2)),
            "per_sample_weights must be None with mode='mean'",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        make()


PEAK = """
import torch
from quernel.nn import RobeEmbeddingBag

torch.set_num_threads(1)
bag = RobeEmbeddingBag([200_000] * 26, 16, size=832_000, mode=None)
ids = torch.randint(0, 200_000, (2048, 26))

def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

with torch.inference_mode():
    held = [bag(ids), bag(ids)]  # compiled, and the allocator warm
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here on
    before = kilobytes("VmRSS")
    held.append(bag(ids))
print(1024 * (kilobytes("VmHWM") - before) - held[-1].nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's own counters")
def test_a_call_takes_little_memory_beside_its_output() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**20


def test_conformance() -> None:
    testing.check_module(RobeEmbeddingBag)
