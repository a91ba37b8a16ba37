"""``RobeEmbeddings``: which tables it takes, what it leaves alone and why, and that the result trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quernel
from quernel import testing
from quernel._errors import QuernelError
from quernel.compress import RobeEmbeddings, compress
from quernel.nn import RobeEmbedding, RobeEmbeddingBag
from quernel.nn.weights import unique_bytes


class Clicks(nn.Module):
    """Two tables, a bag and a small table; the mean of all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(200, 8, padding_idx=0)
        self.item = nn.Embedding(100, 4)
        self.tags = nn.EmbeddingBag(300, 6, mode="mean", padding_idx=1)
        self.day = nn.Embedding(7, 4)
        self.out = nn.Linear(22, 1)

    def forward(self, ids: Tensor) -> Tensor:
        user, item, day = (table(ids[:, k] % table.num_embeddings) for k, table in enumerate(self.tables()))
        return self.out(torch.cat([user, item, day, self.tags(ids % 300)], dim=1))

    def tables(self) -> tuple[nn.Embedding, ...]:
        return self.user, self.item, self.day


IDS = torch.randint(0, 1000, (16, 3), generator=torch.Generator().manual_seed(0))


def plan_of(model: nn.Module, **options: Any) -> dict[str, Any]:
    result = compress(model, RobeEmbeddings(**{"min_numel": 100, **options}), example_inputs=IDS)
    return {layer.name: layer for layer in result.report.layers}


def test_every_large_table_becomes_a_view_of_one_array() -> None:
    model = Clicks()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = compress(model, RobeEmbeddings(ratio=0.1, min_numel=100, block=4), example_inputs=IDS)
    small = result.model
    assert [type(t) for t in (small.user, small.item, small.tags, small.day)] == [
        RobeEmbedding,
        RobeEmbedding,
        RobeEmbeddingBag,
        nn.Embedding,
    ]
    assert small.user.memory is small.item.memory is small.tags.memory
    numbers = 200 * 8 + 100 * 4 + 300 * 6
    assert small.user.memory.size == numbers // 10
    assert result.report.summary["embedding numbers before"] == numbers
    assert result.report.summary["embedding numbers after"] == numbers // 10
    rest = sum(p.numel() for m in (model.day, model.out) for p in m.parameters())
    assert result.report.bytes_before == 4 * (numbers + rest)
    assert result.report.bytes_after == 4 * (numbers // 10 + rest) == unique_bytes(small)
    assert len({small.user.map.seed, small.item.map.seed, small.tags.map.seed}) == 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_frozen_tables_stay_frozen() -> None:
    model = Clicks()
    model.item.weight.requires_grad_(False)
    small = compress(model, RobeEmbeddings(ratio=0.1, min_numel=100, block=4), example_inputs=IDS).model
    assert small.user.memory is small.tags.memory is not small.item.memory
    assert small.user.memory.values.requires_grad and not small.item.memory.values.requires_grad


def test_padding_keeps_its_meaning() -> None:
    model = Clicks()
    small = compress(model, RobeEmbeddings(ratio=0.2, min_numel=100), example_inputs=IDS).model
    assert not small.user(torch.tensor([0])).any()
    ids = torch.tensor([[1, 5, 1]])
    torch.testing.assert_close(small.tags(ids), small.tags(ids[:, 1:2]))
    small.user(torch.tensor([0, 0])).sum().backward()
    assert not small.user.memory.values.grad.any()


def test_a_padding_row_that_was_not_zero_is_told() -> None:
    model = Clicks()
    with torch.no_grad():
        model.user.weight[0] = 1
    result = compress(model, RobeEmbeddings(min_numel=100), example_inputs=IDS)
    assert any("user: the row of padding_idx was not zero" in warning for warning in result.report.warnings)


def test_an_array_as_long_as_the_tables_keeps_what_its_slots_can() -> None:
    model, method = Clicks(), RobeEmbeddings(ratio=1.0, min_numel=100, block=1)
    small = compress(model, method, example_inputs=IDS).model
    kept = 0.0
    for table, layer in ((model.user, small.user), (model.item, small.item)):
        rows = layer(torch.arange(table.num_embeddings))
        kept += 1 - float(((rows - table.weight).square().sum() / table.weight.square().sum()).detach())
    # m numbers of n: a fraction m / n of the variance of unrelated numbers, which a hashed map with m = n reaches
    # only as far as slots are hit at all, 1 - 1/e of them.
    assert kept / 2 == pytest.approx(0.632, abs=0.06)


class Tied(nn.Module):
    """A language model's input and output over one table."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 8)
        self.head = nn.Linear(8, 100, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.tokens(ids % 100))


def test_tied_tables_are_left_alone_with_a_reason() -> None:
    layers = plan_of(Tied())
    assert layers["tokens"].action == "skip"
    assert "its weight is tied to head.weight" in layers["tokens"].reason


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(100, 8, max_norm=1.0), "max_norm"),
        (lambda: nn.Embedding(100, 8, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: nn.EmbeddingBag(100, 8, mode="max"), "mode='max'"),
        (lambda: nn.Embedding(10, 8), "fewer than min_numel=100"),
    ],
)
def test_what_it_leaves_alone(make: Any, reason: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = make()

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids % 10)

    layers = plan_of(Holder())
    assert layers["table"].action == "skip"
    assert reason in layers["table"].reason


def test_nan_is_refused() -> None:
    model = Clicks()
    with torch.no_grad():
        model.item.weight[3, 1] = float("nan")
    with pytest.raises(QuernelError, match="'item' holds NaN or infinity"):
        compress(model, RobeEmbeddings(min_numel=100), example_inputs=IDS)


def test_the_result_trains_and_is_saved_once(tmp_path: Path) -> None:
    model = Clicks()
    wanted = torch.randn(16, 1)
    losses = []

    def finetune(small: nn.Module) -> None:
        optimizer = torch.optim.Adam(small.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (small(IDS) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))

    result = compress(model, RobeEmbeddings(ratio=0.1, min_numel=100), example_inputs=IDS, finetune=finetune)
    assert losses[-1] < 0.1 * losses[0]
    assert not any("nothing trains" in warning for warning in result.report.warnings)
    folder = result.save(tmp_path / "small")
    twin = quernel.load(folder, model=Clicks)
    assert torch.equal(twin(IDS), result.model(IDS))
    assert len(list(twin.parameters())) == len(list(result.model.parameters()))


def test_untrained_it_says_so() -> None:
    result = compress(Clicks(), RobeEmbeddings(min_numel=100), example_inputs=IDS)
    assert any("nothing trains the array" in warning for warning in result.report.warnings)
    assert RobeEmbeddings.menu() == ()


def test_half_precision_and_sparse_tables_keep_their_kind() -> None:
    model = nn.Sequential(nn.Embedding(100, 8, sparse=True)).bfloat16()
    small = compress(model, RobeEmbeddings(min_numel=100), example_inputs=IDS % 100).model
    assert small[0].memory.values.dtype is torch.bfloat16
    assert small[0].sparse


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must be a finite number in"),
        ({"ratio": 1.1}, "ratio must be a finite number in"),
        ({"ratio": -0.5}, "ratio must be a finite number in"),
        ({"block": 0}, "block must be an integer"),
        ({"min_numel": 0}, "min_numel must be an integer"),
        ({"signs": 1}, "signs must be bool"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        RobeEmbeddings(**options)


def test_conformance() -> None:
    testing.check_method(RobeEmbeddings)
