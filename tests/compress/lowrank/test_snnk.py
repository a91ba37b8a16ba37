"""SNNK as a method: which chains it takes, exact bytes, fits that hold, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quernel
from quernel._errors import QuernelError
from quernel.compress import SNNK, WeightInt8, WeLore, compress
from quernel.compress._context import Context
from quernel.models import SentenceEncoder
from quernel.nn import SNNKLinear
from quernel.nn.weights import unique_bytes

# float32 products of a few hundred terms, through a bundled matrix.
CLOSE = 1e-4


def data(rows: int = 512, size: int = 16, batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, size, generator=generator) for _ in range(batches)]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 96), nn.GELU(), nn.Linear(96, 24), nn.Tanh(), nn.Linear(24, 4)).eval()


def wide() -> nn.Sequential:
    """Return a net whose first layer is large enough that fewer bytes hold enough random features for it alone."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 24)).eval()


def kinds(model: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in model]


@torch.no_grad()
def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_a_chain_becomes_one_matrix() -> None:
    model = mlp()
    result = compress(model, SNNK(n_features=64), data=data())
    assert kinds(result.model) == ["SNNKLinear", "Identity", "Identity", "Tanh", "Linear"]
    layer = result.model[0]
    assert (layer.in_features, layer.out_features, layer.n_features) == (16, 24, 64)
    x = data()[0]
    error = relative(layer(x), model[:3](x))
    rows = {row.name: row for row in result.report.layers}
    assert error == pytest.approx(rows["0"].details["relative_fit_error"], rel=0.1)
    assert error < 0.5
    assert rows["2"].action == "bundled into 0" and rows["2"].bytes_after == 0
    assert rows["4"].reason == "no activation alone reads its output"
    assert result.report.summary["random features"] == 64


def test_without_bundling_the_activation_goes_and_the_next_layer_stays() -> None:
    model, batches = wide(), data(size=64)
    result = compress(model, SNNK(n_features=48, bundle=False), data=batches)
    assert kinds(result.model) == ["SNNKLinear", "Identity", "Linear"]
    assert result.model[0].activation == "gelu"
    row = next(row for row in result.report.layers if row.name == "0")
    x = batches[0]
    # The report compares with the layer and its activation.
    assert row.relative_error == pytest.approx(relative(result.model[0](x), F.gelu(model[0](x))), rel=1e-4)


def test_bundling_is_the_product_of_the_two_fits() -> None:
    model, batches = wide(), data(size=64)
    bundled = compress(model, SNNK(n_features=48), data=batches).model[0]
    apart = compress(model, SNNK(n_features=48, bundle=False), data=batches).model
    x = batches[0]
    torch.testing.assert_close(bundled(x), apart[2](apart[0](x)), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("projection", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("target", [0.1, 0.5])
@pytest.mark.parametrize("bundle", [True, False])
def test_target_is_met_in_stored_bytes(projection: str, target: float, bundle: bool) -> None:
    method = SNNK(target=target, bundle=bundle, projection=projection)  # type: ignore[arg-type]
    model = mlp()
    layer = compress(model, method, data=data()).model[0]
    before = unique_bytes(model[0]) + (unique_bytes(model[2]) if bundle else 0)
    one_more = unique_bytes(SNNKLinear(16, layer.out_features, layer.n_features + 1, projection=projection))  # type: ignore[arg-type]
    assert unique_bytes(layer) <= (1 - target) * before < one_more


def test_more_features_fit_better_on_fresh_rows() -> None:
    model, fresh = mlp(), torch.randn(400, 16, generator=torch.Generator().manual_seed(7))
    errors = [
        relative(compress(model, SNNK(n_features=m), data=data()).model(fresh), model(fresh)) for m in (8, 32, 90)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_fine_tuning_goes_on_from_the_fit() -> None:
    model = mlp()

    def finetune(small: nn.Module) -> None:
        optimizer = torch.optim.Adam(small.parameters(), lr=1e-2)
        for _ in range(20):
            for x in data():
                optimizer.zero_grad()
                (small(x) - model(x).detach()).square().mean().backward()
                optimizer.step()

    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(7))
    fitted = compress(model, SNNK(n_features=32), data=data()).model
    tuned = compress(model, SNNK(n_features=32), data=data(), finetune=finetune).model
    assert relative(tuned(x), model(x)) < relative(fitted(x), model(x))


class Residual(nn.Module):
    """The hidden layer is also read by a sum: it must not disappear."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.one(x))
        return self.two(hidden) + hidden


def test_what_something_else_reads_is_not_bundled() -> None:
    model = Residual().eval()
    small = compress(model, SNNK(target=0.2), data=data()).model
    assert type(small.one) is SNNKLinear and type(small.two) is nn.Linear
    x = data()[0]
    torch.testing.assert_close(small(x), small.two(small.one(x)) + small.one(x))


def test_skipped_with_reasons() -> None:
    model = mlp()
    tied = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    tied[2].weight = tied[0].weight
    plan = SNNK().plan(tied, Context(data()))
    assert {layer.name: layer.reason for layer in plan.layers} == {
        "0": "its weight is tied to 2.weight",
        "2": "its weight is tied to 0.weight",
    }
    plan = SNNK(n_features=5000).plan(model, Context(data()))
    assert "5000 random features would not be smaller" in plan.layers[0].reason
    assert not plan.payload
    plan = SNNK(n_features=16).plan(model, Context(data(), exclude=("1",)))
    assert all(layer.skipped for layer in plan.layers)
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(QuernelError, match=r"'0' holds NaN or infinity"):
        compress(model, SNNK(), data=data())


def test_few_rows_are_warned_about() -> None:
    result = compress(mlp(), SNNK(n_features=64), data=data(20))
    assert any("64 features were fitted on 60 rows" in warning for warning in result.report.warnings)


def test_padding_stays_out_of_the_fit() -> None:
    config = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    model = SentenceEncoder(config | {"num_hidden_layers": 1, "vocab_size": 64}).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (8, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor([12, 5, 9, 3, 12, 7, 8, 10])[:, None]).long()
    found = []
    for filler in (0, 33):
        batch = {"input_ids": torch.where(mask.bool(), ids, filler), "attention_mask": mask}
        result = compress(model, SNNK(n_features=24), data=[batch])
        found.append(result.model.encoder.encoder.layer[0].intermediate.dense)
    assert type(found[0]) is SNNKLinear and found[0].out_features == 16
    torch.testing.assert_close(found[0].weight, found[1].weight, rtol=1e-3, atol=1e-4)


def test_bfloat16_models_are_fitted_in_float32() -> None:
    model = mlp().bfloat16()
    batches = [x.bfloat16() for x in data()]
    small = compress(model, SNNK(n_features=64), data=batches).model
    assert small[0].weight.dtype is torch.bfloat16
    assert relative(small(batches[0]).float(), model(batches[0]).float()) < 0.5


def test_it_composes_with_other_methods_and_is_repeated_from_its_recipe(tmp_path: Path) -> None:
    methods = [WeightInt8(), SNNK(n_features=64), WeLore(0.2, budget="params")]
    result = compress(mlp(), methods, data=data())
    assert type(result.model[0]) is SNNKLinear
    twin = quernel.load(result.save(tmp_path), model=mlp)
    x = data()[0]
    assert torch.equal(twin(x), result.model(x))
    again = compress(mlp(), quernel.compress.methods_from_recipe(result.recipe), data=data())
    assert torch.equal(again.model(x), result.model(x))


def test_other_seeds_give_other_features() -> None:
    one, two = (compress(mlp(), SNNK(n_features=32, seed=seed), data=data()).model[0] for seed in (0, 1))
    assert not torch.equal(one.phi.lengths, two.phi.lengths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "target must be"),
        ({"n_features": 0}, "n_features must be"),
        ({"bundle": 1}, "bundle must be bool"),
        ({"projection": "dense"}, "projection must be one of"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        SNNK(**options)
