"""``RepresenterSketch``: which networks it takes and which it leaves, and what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import Budget, RepresenterSketch, WeightInt8, compress, search
from quernel.compress._context import Context
from quernel.compress._networks import find_networks
from quernel.nn import SketchLayer
from quernel.nn.weights import unique_bytes

SMALL = RepresenterSketch(n_rows=100, n_cells=8, n_anchors=50, proj_dim=4, n_steps=150)


def seeded(model: nn.Module, scale: float = 1.0) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=draw) / max(p.shape[-1], 1) ** 0.5)
    return model.eval()


def mlp(d: int = 6, hidden: int = 256, c: int = 2) -> nn.Sequential:
    return seeded(
        nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, c)), 2.0
    )


def rows(n: int = 1500, d: int = 6) -> list[torch.Tensor]:
    return list(torch.randn(n, d, generator=torch.Generator().manual_seed(1)).split(500))


class Whole(nn.Module):
    """A network of a class of one's own, with something before it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.net, self.tail = nn.Linear(6, 6), mlp(), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(torch.tanh(self.net(self.scale(x))))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 300), nn.Linear(300, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.slow
def test_a_network_becomes_look_ups_that_follow_it() -> None:
    model, x = mlp(), rows(6000)
    method = RepresenterSketch(n_rows=200, n_steps=1000, proj_dim=8, finetune_epochs=5)
    result = compress(model, method, data=x)
    with torch.no_grad():
        wanted, got = model(torch.cat(x)), result.model(torch.cat(x))
    relative = float((got - wanted).norm() / (wanted - wanted.mean(0)).norm())
    assert relative < 0.35
    (layer,) = [layer for layer in result.report.layers if layer.action == "sketch"]
    # Measured on rows that trained nothing: no better than on all of them, and near it.
    assert 0.9 * relative < layer.details["sketch_error"] < 0.5
    assert layer.details["sketch_bytes"] == unique_bytes(result.model)


def test_a_sequential_root_is_taken_from_its_first_rows_on() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Identity(), *mlp())
    data = [x.reshape(-1, 2, 3) for x in rows()]
    result = compress(model, SMALL, data=data)
    kinds = [type(m).__name__ for m in result.model]
    assert kinds == ["Flatten", "Identity", "SketchLayer", *["Identity"] * 4]
    assert result.model[2].bits == 16


def test_the_network_inside_a_model_is_found() -> None:
    result = compress(Whole().eval(), SMALL, data=rows())
    assert isinstance(result.model.net[0], SketchLayer)
    assert isinstance(result.model.scale, nn.Linear)
    assert isinstance(result.model.tail, nn.Linear)


def test_a_class_of_one_s_own_is_taken_by_name(tmp_path) -> None:
    def build() -> nn.Module:
        return seeded(nn.ModuleDict({"own": Own()}))

    model = build()
    forward = lambda m, x: m["own"](x)  # noqa: E731
    with pytest.raises(QuernelError, match="nothing to compress"):
        compress(model, SMALL, data=rows(), forward=forward)
    result = compress(model, SMALL, data=rows(), forward=forward, include=("own",))
    assert isinstance(result.model["own"], SketchLayer)
    twin = quernel.load(result.save(tmp_path), model=build)
    assert torch.equal(twin["own"](rows()[0]), result.model["own"](rows()[0]))


class RowMixer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("model", "data", "reason"),
    [
        (seeded(nn.Sequential(nn.Linear(6, 500))), rows(), "fewer than two linear layers"),
        (seeded(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))), rows(), "would not be smaller"),
        (mlp(), rows(500), "at least 512 rows"),
        (mlp(), [x.reshape(-1, 5, 6) for x in rows()], "not given rows"),
        (nn.Sequential(*mlp()[:2], RowMixer(), *mlp()[2:]), rows(), "rows beside it"),
        (
            seeded(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))),
            [torch.ones(2, 1, 8, 8)],
            "not given",
        ),
        (nn.Sequential(*mlp(), nn.Unflatten(1, (2, 1))), rows(), "does not map"),
    ],
    ids=["one layer", "small", "few rows", "tokens", "mixed rows", "images", "shape"],
)
def test_what_it_leaves_alone_it_says_why(model: nn.Module, data, reason: str) -> None:
    result = compress(model, SMALL, data=data)
    assert any(reason in layer.reason for layer in result.report.layers)
    assert not any(isinstance(m, SketchLayer) for m in result.model.modules())


def test_tied_and_repeated_networks_are_left_alone() -> None:
    model = nn.Sequential(mlp(6, 256, 6), mlp(6, 256, 2))
    model[1][0].weight = model[0][0].weight
    context = Context(rows())
    assert [n.refusal for n in find_networks(model, context)] == [""]  # as a whole it is one network
    tied = Whole()
    tied.scale = nn.Linear(6, 256)
    tied.scale.weight = tied.net[0].weight
    tied.forward = lambda x: tied.net(x) + tied.scale(x)[:, :2]  # type: ignore[method-assign]
    assert "tied" in find_networks(tied, context)[0].refusal
    twice = Whole()
    twice.net = mlp(6, 256, 6)
    twice.forward = lambda x: twice.net(twice.net(x))  # type: ignore[method-assign]
    assert "several times" in find_networks(twice, context)[0].refusal


def test_fine_tuning_trains_the_table_before_it_is_rounded() -> None:
    seen = []

    def finetune(model: nn.Module) -> None:
        seen.append(model[0].bits)
        with torch.no_grad():
            model[0].bias += 100

    result = compress(mlp(), SMALL, data=rows(), finetune=finetune)
    assert seen == [32]
    assert result.model[0].bits == 16
    assert result.model[0].bias.min() > 50


@pytest.mark.slow
def test_a_search_takes_it_where_it_fits_and_combines_it_with_nothing() -> None:
    model, x = mlp(), rows(3000)
    with torch.no_grad():
        wanted = model(torch.cat(x))

    def near(m: nn.Module) -> float:
        with torch.no_grad():
            return -float((m(torch.cat(x)).float() - wanted).norm() / wanted.norm())

    budget = Budget(bytes=0.2, drop=0.9)
    result = search(model, budget, [SMALL, WeightInt8()], data=x, evaluate=near)
    assert result.chosen == (SMALL,)
    assert result.satisfied
    assert [t.label for t in result.trials] == [SMALL.label, "WeightInt8"]


def test_the_menu_is_part_of_a_search() -> None:
    from quernel.compress._menu import default_methods

    menu = default_methods(frozenset({"data"}))
    assert set(RepresenterSketch.menu()) <= set(menu)
    assert RepresenterSketch() not in default_methods(frozenset())


@pytest.mark.parametrize(
    ("options", "word"),
    [({"n_cells": 1}, "n_cells"), ({"width": 0.0}, "width"), ({"bits": 4}, "bits"), ({"n_steps": 0}, "n_steps")],
)
def test_parameters_that_are_no_good_are_named(options, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        RepresenterSketch(**options)
