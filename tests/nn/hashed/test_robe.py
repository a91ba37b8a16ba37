"""``RobeEmbedding`` and its array: torch's own layer under the identity map, sharing, saving, bad input."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import quernel
from quernel import testing
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.hashing import BlockMap, mix64
from quernel.nn import RobeArray, RobeEmbedding, RobeEmbeddingBag, SharedArray
from tests.reference import robe as oracle


def identity(rows: int, dim: int, **options: Any) -> RobeEmbedding:
    memory = RobeArray(rows * dim)
    return RobeEmbedding.over(memory, BlockMap.explicit(np.arange(rows) * dim, rows * dim, dim, dim), rows, **options)


class TwoFields(nn.Module):
    """A model of two fields over one array."""

    def __init__(self, memory: RobeArray | None = None) -> None:
        super().__init__()
        memory = RobeArray(100, seed=7) if memory is None else memory
        self.user = RobeEmbedding(1000, 8, memory=memory, field=0)
        self.item = RobeEmbedding(50, 4, memory=memory, field=1)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.user(user), self.item(item)], dim=-1)


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_identity_is_torch_bit_for_bit(padding_idx: int | None) -> None:
    ours = identity(12, 5, padding_idx=padding_idx)
    theirs = nn.Embedding(12, 5, padding_idx=padding_idx)
    with torch.no_grad():
        theirs.weight.copy_(ours.memory.values.reshape(12, 5))
        if padding_idx is not None:
            theirs.weight[padding_idx] = 0
    ids = torch.randint(0, 12, (7, 3))
    grad = torch.randn(7, 3, 5)
    ours(ids).backward(grad)
    theirs(ids).backward(grad)
    assert torch.equal(ours(ids), theirs(ids))
    assert torch.equal(ours.memory.values.grad.reshape(12, 5), theirs.weight.grad)


@pytest.mark.parametrize("dim", [4, 16, 40])
def test_rows_are_the_definition(dim: int) -> None:
    for field in (0, 3):
        table = RobeEmbedding(100, dim, size=64, field=field)
        seed = int(mix64(table.memory.seed, field))
        starts, signs = oracle.mixed_starts(seed, 64), oracle.random_signs(seed)
        values = table.memory.values.detach()
        for row in (0, 57, 99):
            wanted = [s * values[p] for p, s in oracle.terms(row, dim, 64, min(dim, 16), starts, signs)]
            assert torch.equal(table(torch.tensor(row)), torch.tensor(wanted))


def test_offset_joins_tables_into_one() -> None:
    memory = RobeArray(500)
    one = RobeEmbedding(100, 8, memory=memory, offset=0)
    two = RobeEmbedding(60, 8, memory=memory, offset=40)
    assert torch.equal(two(torch.arange(60)), one(torch.arange(40, 100)))


def test_fields_have_maps_of_their_own() -> None:
    memory = RobeArray(500)
    tables = [RobeEmbedding(100, 8, memory=memory, field=f)(torch.arange(100)) for f in (0, 1, 2)]
    # Two rows agree in one of 8 numbers by chance less than once in a hundred: the maps have nothing in common.
    assert all(float((a == b).float().mean()) < 0.05 for a, b in itertools.combinations(tables, 2))
    alone = RobeEmbedding(100, 8, size=500)
    assert alone.map.config() == RobeEmbedding(100, 8, size=500, field=0).map.config()


def test_sizes_from_numpy_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(RobeEmbedding(np.int64(30), np.int64(8), size=np.int64(50), block=np.int32(4)))  # type: ignore[arg-type]
    twin = quernel.load(save_model(model, tmp_path / "model"), model=lambda: nn.Sequential(nn.Identity()))
    assert torch.equal(twin(torch.arange(30)), model(torch.arange(30)))


def test_the_array_is_not_decayed() -> None:
    memory = RobeArray(100)
    table = RobeEmbedding(30, 8, memory=memory, field=0)
    (group,) = table.param_groups(0.5)
    assert group == {"params": [memory.values], "lr": 0.5, "weight_decay": 0.0}
    (of_bag,) = RobeEmbeddingBag([9, 8], 4, memory=memory, offset=0).param_groups(0.5)
    assert of_bag == group
    with pytest.raises(QuernelError, match="lr must be a finite number"):
        table.param_groups(-1.0)


def test_a_shared_array_is_one_parameter() -> None:
    model = TwoFields()
    assert [tuple(p.shape) for p in model.parameters()] == [(100,)]
    user, item = torch.randint(0, 1000, (32,)), torch.randint(0, 50, (32,))
    grad = torch.randn(32, 12)
    model(user, item).backward(grad)
    wanted = torch.zeros(100)
    for table, ids, part in ((model.user, user, grad[:, :8]), (model.item, item, grad[:, 8:])):
        slots, signs = table.map.index(ids.numpy()), table.map.signs_of(ids.numpy())
        wanted.index_add_(0, torch.from_numpy(slots).reshape(-1), (part * torch.from_numpy(signs)).reshape(-1))
    torch.testing.assert_close(model.user.memory.values.grad, wanted)


def test_a_shared_array_is_saved_once(tmp_path: Path) -> None:
    model = TwoFields()
    folder = save_model(model, tmp_path / "model")
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 400 + 1000
    twin = quernel.load(folder, model=TwoFields)
    assert len(list(twin.parameters())) == 1
    ids = torch.arange(50)
    assert torch.equal(twin(ids, ids), model(ids, ids))
    twin(ids, ids).sum().backward()
    assert twin.item.memory.values.grad is twin.user.memory.values.grad


def test_checkpoints_hold_the_array_and_the_seed(tmp_path: Path) -> None:
    table = RobeEmbedding(10**9, 16, size=1000)
    assert list(table.state_dict()) == ["memory.values"]
    buffer = io.BytesIO()
    torch.save(table.state_dict(), buffer)
    folder = save_model(nn.Sequential(table), tmp_path / "model")
    stored = sum(f.stat().st_size for f in folder.iterdir())
    assert max(stored, buffer.tell()) <= 4 * 1000 + 2048


def test_the_same_seed_is_the_same_model_everywhere() -> None:
    # Computed by the oracle's Python integers; any machine, process and thread count must give these.
    mapped = RobeEmbedding(None, 16, memory=RobeArray(997, seed=7), field=3).map
    seed = oracle.mix64(7, 3)
    rows = [0, 1, 2**59]
    wanted = [[p for p, _ in oracle.terms(r, 16, 997, 16, oracle.mixed_starts(seed, 997), lambda _: 1)] for r in rows]
    assert mapped.index(np.array(rows)).tolist() == wanted
    assert [row[0] for row in wanted] == [919, 146, 969]


def test_open_vocabularies_take_ids_never_seen() -> None:
    table = RobeEmbedding(None, 16, size=1000)
    rows = table(torch.tensor([0, 123_456_789_012_345, 2**58]))
    assert bool(rows.isfinite().all())
    assert not torch.equal(rows[1], rows[2])
    with pytest.raises(QuernelError, match="open vocabulary has no end"):
        table.materialize()
    with pytest.raises(QuernelError, match=r"ids must be in"):
        table(torch.tensor([2**62]))


@pytest.mark.parametrize("stride", [1, 2, 2**10, 2**20])
def test_starts_are_uniform_over_a_prime(stride: int) -> None:
    # 10^6 keys over 997 slots; the specification's level, at a fixed seed.
    mapped = RobeEmbedding(None, 1, memory=RobeArray(997, seed=1), field=0).map
    counts = np.bincount(mapped.index(np.arange(10**6) * stride)[:, 0], minlength=997)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_materialize_and_back() -> None:
    table = RobeEmbedding(40, 6, size=50, padding_idx=1, scale=0.5, sparse=True)
    plain = table.materialize()
    ids = torch.randint(0, 40, (9,))
    assert torch.equal(plain(ids), table(ids))
    assert (plain.padding_idx, plain.sparse, plain.weight.requires_grad) == (1, True, True)


def test_fit_is_least_squares() -> None:
    memory = RobeArray(60, seed=2)
    layers = [RobeEmbedding(30, 4, memory=memory, field=0), RobeEmbedding(11, 6, memory=memory, field=1, scale=0.3)]
    tables = [torch.randn(30, 4), 0.3 * torch.randn(11, 6)]
    memory.fit(list(zip(layers, tables, strict=True)))
    matrix, wanted = torch.zeros(30 * 4 + 11 * 6, 60, dtype=torch.float64), []
    row = 0
    for layer, table in zip(layers, tables, strict=True):
        ids = np.arange(len(table))
        for slots, signs, numbers in zip(
            layer.map.index(ids), layer.map.signs_of(ids), table / layer.scale, strict=True
        ):
            for slot, sign, number in zip(slots, signs, numbers, strict=True):
                matrix[row, slot] = float(sign)
                wanted.append(float(number))
                row += 1
    best = torch.linalg.lstsq(matrix, torch.tensor(wanted, dtype=torch.float64)[:, None], driver="gelsd").solution
    torch.testing.assert_close(memory.values.double(), best[:, 0], rtol=1e-4, atol=1e-5)


def test_scale_like_gives_every_field_its_own_magnitude() -> None:
    memory = RobeArray(10_000, bound=0.02)
    for rows in (10, 1000, 100_000):
        table = RobeEmbedding(rows, 16, memory=memory, scale="like", field=rows)
        largest = float(table(torch.arange(10)).detach().abs().max())
        assert 0.8 * rows**-0.5 < largest <= rows**-0.5 * (1 + 1e-6)


def test_without_signs() -> None:
    table = RobeEmbedding(30, 8, memory=RobeArray(50, signs=False), field=0)
    values = table.memory.values.detach()
    assert torch.equal(table(torch.arange(30)), values[torch.from_numpy(table.map.index(np.arange(30)))])


def test_a_plain_shared_array_works_too(tmp_path: Path) -> None:
    model = nn.Sequential(RobeEmbedding(30, 8, memory=SharedArray(50, seed=1), field=0))
    folder = save_model(model, tmp_path / "model")
    twin = quernel.load(folder, model=lambda: nn.Sequential(nn.Identity()))
    assert type(twin[0].memory) is SharedArray
    assert torch.equal(twin(torch.arange(30)), model(torch.arange(30)))


def test_published_map_is_saved(tmp_path: Path) -> None:
    mapped = BlockMap.mod_prime(11, 7, 3, 2038074743, 50, 8, 4, circular=False)
    model = nn.Sequential(RobeEmbedding.over(RobeArray(50), mapped, 30))
    twin = quernel.load(save_model(model, tmp_path / "model"), model=lambda: nn.Sequential(nn.Identity()))
    assert torch.equal(twin(torch.arange(30)), model(torch.arange(30)))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients_train(make: Any) -> None:
    table = RobeEmbedding(1000, 4, size=64, sparse=True)
    optimizer = make(table.parameters(), lr=0.1)
    ids, wanted = torch.arange(8), torch.randn(8, 4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (table(ids) - wanted).square().mean()
        loss.backward()
        assert table.memory.values.grad.is_sparse
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_compiled_with_gradients() -> None:
    table = RobeEmbedding(100, 8, size=64, padding_idx=0)
    ids = torch.randint(0, 100, (5, 3))
    compiled: Any = torch.compile(table, backend="aot_eager", fullgraph=True)
    compiled(ids).square().sum().backward()
    by_compiled, table.memory.values.grad = table.memory.values.grad, None
    table(ids).square().sum().backward()
    torch.testing.assert_close(by_compiled, table.memory.values.grad)
    torch.compiler.reset()


def test_empty_batch() -> None:
    table = RobeEmbedding(10, 4, size=16)
    assert table(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RobeEmbedding(10, 16, size=15), "memory must hold at least 16 numbers, one block of 16; it holds 15"),
        (lambda: RobeEmbedding(10, 16, size=64, block=0), "block must be an integer"),
        (lambda: RobeEmbedding(10, 16, size=64, block=-4), "block must be an integer"),
        (lambda: RobeEmbedding(10, 0, size=64), "dim must be an integer"),
        (lambda: RobeEmbedding(0, 16, size=64), "num_embeddings must be an integer"),
        (lambda: RobeEmbedding(10, 16), "memory or size must be given"),
        (lambda: RobeEmbedding(10, 16, size=64, memory=RobeArray(64), field=0), "memory or size must be given"),
        (lambda: RobeEmbedding(10, 16, memory=nn.Linear(2, 2), field=0), "memory must be a SharedArray; got Linear"),
        (lambda: RobeEmbedding(10, 16, memory=RobeArray(64)), "field or offset must be given with memory: layers with"),
        (lambda: RobeEmbedding(10, 16, size=64, field=1, offset=5), "field or offset must be given, not both"),
        (lambda: RobeEmbedding(10, 16, size=64, field=-1), "field must be an integer"),
        (lambda: RobeEmbedding(10, 16, size=64, offset=-1), "offset must be an integer"),
        (lambda: RobeEmbedding(10, 16, size=64, offset=2**63 - 5), "num_embeddings and offset must stay below"),
        (lambda: RobeEmbedding(None, 16, size=64, offset=2**63), "num_embeddings must be an integer"),
        (lambda: RobeEmbedding(10, 16, size=64, padding_idx=10), "padding_idx must be an integer in"),
        (lambda: RobeEmbedding(10, 16, size=64, scale="big"), "scale must be a finite number"),
        (lambda: RobeEmbedding(None, 16, size=64, scale="like"), "scale='like' needs num_embeddings"),
        (lambda: RobeEmbedding(10, 16, size=64, sparse=1), "sparse must be bool"),
        (lambda: RobeEmbedding(10, 16, size=64)(torch.tensor([-1])), r"ids must be in \[0, 10\); got -1"),
        (lambda: RobeEmbedding(10, 16, size=64)(torch.tensor([10])), r"ids must be in \[0, 10\); got 10"),
        (lambda: RobeEmbedding(10, 16, size=64)(torch.tensor([1.0])), "ids must be integers; got torch.float32"),
        (lambda: RobeEmbedding(10, 16, size=64)([1]), "ids must be Tensor; got list"),
        (lambda: RobeEmbedding.over(RobeArray(9), BlockMap(8, 4, 4), 10), "map must be over the 9 numbers"),
        (lambda: RobeArray(0), "size must be an integer"),
        (lambda: RobeArray(9, signs=1), "signs must be bool"),
        (lambda: identity(4, 4).config(), "cannot be written as JSON"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        make()


def test_conformance() -> None:
    testing.check_module(RobeEmbedding)
