"""Roast: which weights are taken, how large arrays and scales become, ties, reports, and the way back to dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import Roast, compress
from quernel.nn import RoastConv2d, RoastEmbedding, RoastLinear
from quernel.nn.weights import unique_bytes


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 120), nn.ReLU(), nn.Linear(120, 120), nn.ReLU(), nn.Linear(120, 10))


class Text(nn.Module):
    """A table, a convolution, a head that is tied to the table, and what no map can read."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 32, padding_idx=0)
        self.mix = nn.Conv2d(32, 32, (3, 1), padding="same")
        self.each = nn.Conv2d(32, 32, 15, padding="same", groups=32)
        self.other = nn.Conv1d(32, 32, 9, padding="same")
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Any) -> Any:
        x = self.table(ids).mT
        x = self.each(self.mix(x[..., None]))[..., 0]
        return self.head(self.norm(self.other(x).mT))


def test_a_global_array_and_what_stays() -> None:
    model = mlp()
    result = compress(model, Roast(ratio=0.1))
    small, replaced = result.model, 100 * 120 + 120 * 120
    assert [type(layer).__name__ for layer in small] == ["RoastLinear", "ReLU", "RoastLinear", "ReLU", "Linear"]
    assert small[0].memory is small[2].memory and small[0].memory.size == replaced // 10
    assert sum(p.numel() for p in small.parameters()) == replaced // 10 + 240 + 1210
    assert result.report.bytes_after == unique_bytes(small) == 4 * (replaced // 10 + 1450)
    assert result.report.bytes_before == 4 * (replaced + 1450)
    assert result.report.summary["compression"] == pytest.approx(result.report.bytes_before / result.report.bytes_after)
    layers = {layer.name: layer for layer in result.report.layers}
    assert layers["0"].action == "view of 2640 shared numbers" and layers["0"].details["tile"] == 16
    assert "fewer than min_numel=4096" in layers["4"].reason
    assert any("train the model" in warning for warning in result.report.warnings)


def test_local_arrays() -> None:
    small = compress(mlp(), Roast(ratio=0.1, sharing="local", min_numel=1000)).model
    assert [small[i].memory.size for i in (0, 2, 4)] == [1200, 1440, 120]
    assert [small[i].weight.scale for i in (0, 2, 4)] == [1.0, 1.0, 1.0]
    # Tiles get smaller with the array.
    assert [small[i].weight.mapped.tile[0] for i in (0, 2, 4)] == [16, 16, 4]


@pytest.mark.parametrize("sharing", ["global", "local"])
def test_weights_keep_their_size(sharing: Any) -> None:
    # Arrays of 10,000 numbers and more: the spread is known to 0.5 %.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Linear(400, 300), nn.Embedding(500, 200))
    with torch.no_grad():
        model[1].weight *= 5
    small = compress(model, Roast(ratio=0.2, sharing=sharing)).model
    for before, after in zip(model, small, strict=True):
        assert float(after.materialize().detach().std()) == pytest.approx(float(before.weight.detach().std()), rel=0.03)


def test_text_model_with_ties_and_unsupported_layers(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Text().eval()
    ids = torch.tensor([[1, 299, 7, 0]])
    result = compress(model, Roast(ratio=0.1, min_numel=1000), example_inputs=(ids,))
    small = result.model
    kinds = (type(small.table), type(small.mix), type(small.each), type(small.other), type(small.head))
    assert kinds == (RoastEmbedding, RoastConv2d, nn.Conv2d, nn.Conv1d, RoastLinear)
    assert small.table.weight is small.head.weight and small.table.memory is small.mix.memory
    layers = {layer.name: layer for layer in result.report.layers}
    assert layers["other"].reason == "Conv1d is not a kind that is read from an array"
    assert layers["each"].reason == "depthwise convolutions are small already"
    assert layers["table"].action == layers["head"].action == "view of 1267 shared numbers"
    result.save(tmp_path)
    loaded = quernel.load(tmp_path, model=Text)
    assert torch.equal(loaded(ids), small(ids))
    assert loaded.head.memory.values is loaded.mix.memory.values
    dense = Roast.to_dense(small)
    assert dense.head.weight is dense.table.weight and dense.table.padding_idx == 0
    assert type(small.head) is RoastLinear
    unpadded = ids[:, :3]
    torch.testing.assert_close(dense(unpadded), small(unpadded), rtol=1e-4, atol=1e-4)


def test_to_dense_gives_torchs_layers_and_the_same_numbers() -> None:
    small = compress(mlp(), Roast(ratio=0.1)).model
    dense = Roast.to_dense(small)
    assert {type(m) for m in dense} == {nn.Linear, nn.ReLU}
    x = torch.randn(4, 100)
    torch.testing.assert_close(dense(x), small(x), rtol=1e-4, atol=1e-5)
    assert type(Roast.to_dense(small[0])) is nn.Linear
    conv = compress(nn.Sequential(nn.Conv2d(8, 16, 3, 2, "valid", 2, 2, False, "reflect")), Roast(min_numel=100)).model
    image = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(Roast.to_dense(conv)(image), conv(image), rtol=1e-4, atol=1e-5)


def test_a_table_of_its_own_becomes_dense_with_a_zero_padding_row() -> None:
    small = compress(nn.Sequential(nn.Embedding(300, 32, padding_idx=5)), Roast()).model
    dense = Roast.to_dense(small)
    assert not dense[0].weight[5].any() and dense[0].padding_idx == 5
    torch.testing.assert_close(dense(torch.arange(300)), small(torch.arange(300)))


def test_projection_keeps_more_than_chance_and_less_than_a_model_needs() -> None:
    layers = compress(mlp(), Roast(ratio=0.25, init="project")).report.layers
    errors = [layer.details["relative weight error"] for layer in layers if layer.action.startswith("view")]
    # Four independent weights a slot: sqrt(1 - 1/4) = 0.87 of the length is lost.
    assert all(0.8 < error < 0.93 for error in errors)
    assert Roast.menu() == ()


def test_seeds_and_repeats() -> None:
    model = mlp()
    one, same, other = (compress(model, Roast(seed=seed)).model[0].materialize() for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_an_all_zero_weight_is_drawn_as_torch_would() -> None:
    model = nn.Sequential(nn.Linear(100, 120), nn.Linear(120, 100))
    nn.init.zeros_(model[1].weight)
    small = compress(model, Roast(ratio=0.5)).model
    assert float(small[1].materialize().detach().std()) == pytest.approx((3 * 120) ** -0.5, rel=0.05)


def test_frozen_dtype_and_mode() -> None:
    small = compress(mlp().bfloat16(), Roast(mode="speed")).model
    assert small[0].memory.values.dtype is torch.bfloat16 and small[0].weight.mode == "speed"
    assert small(torch.ones(2, 100, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("sharing", ["global", "local"])
def test_frozen_weights_stay_frozen(sharing: Any) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    result = compress(model, Roast(sharing=sharing, init="project"))
    frozen, trained = result.model[0], result.model[2]
    assert frozen.memory is not trained.memory
    assert not frozen.memory.values.requires_grad and trained.memory.values.requires_grad
    assert any(
        "frozen weights stay frozen" in warning and warning.endswith(": 0") for warning in result.report.warnings
    )
    before = frozen.materialize().clone()
    optimizer = torch.optim.AdamW(quernel.nn.roast_param_groups(result.model, 1e-2, weight_decay=0.1))
    result.model(torch.randn(8, 100)).square().sum().backward()
    optimizer.step()
    assert torch.equal(frozen.materialize(), before)
    assert not Roast.to_dense(result.model)[0].weight.requires_grad
    assert Roast.to_dense(result.model)[2].weight.requires_grad
    thawed = compress(mlp(), Roast(sharing=sharing)).report.warnings
    assert not any("frozen" in warning for warning in thawed)


def test_a_model_that_does_not_shrink_warns() -> None:
    report = compress(mlp(), Roast(ratio=1.0)).report
    assert any("nothing is saved" in warning for warning in report.warnings)


def test_finetuning_is_enough_to_learn() -> None:
    x = torch.randn(512, 100, generator=torch.Generator().manual_seed(0))
    wanted = (x[:, :10] + x[:, 10:20]).argmax(1)

    def finetune(model: nn.Module) -> None:
        optimizer = torch.optim.Adam(quernel.nn.roast_param_groups(model, 3e-3))
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), wanted).backward()
            optimizer.step()

    result = compress(mlp(), Roast(ratio=0.1), finetune=finetune)
    assert not any("train the model" in warning for warning in result.report.warnings)
    assert float((result.model(x).argmax(1) == wanted).float().mean()) > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio must be a finite number"),
        ({"ratio": 1.5}, "ratio must be a finite number"),
        ({"sharing": "lms"}, "sharing must be one of 'global', 'local'"),
        ({"tile": 0}, "tile must be an integer"),
        ({"min_numel": 0}, "min_numel must be an integer"),
        ({"init": "svd"}, "init must be one of 'std', 'project'"),
        ({"signs": 0}, "signs must be bool"),
        ({"mode": "fast"}, "mode must be one of"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        Roast(**options)


def test_a_weight_with_nan_is_refused() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(QuernelError, match="'2' holds NaN or infinity; repair or exclude the layer"):
        compress(model, Roast())
