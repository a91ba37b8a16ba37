"""FactorizeConv: what it takes and leaves, ranks, fresh filters, files, the budget search, ONNX."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import quernel
from quernel import models
from quernel._errors import QuernelError
from quernel.compress import Budget, FactorizeConv, WeightInt8, compress, search
from quernel.models import ResNet20
from quernel.nn import FactorizedConv1d, FactorizedConv2d, FactorizedConvTranspose2d
from quernel.nn.functional import fit_one_way

# Exact representations, rounded to float32 through a few layers.
EXACT = 1e-4
# What a file holds besides numbers: names and shapes.
FILE_RATIO = 0.03


def decoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 5, padding=2, groups=3),
        nn.Conv2d(12, 16, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
        nn.Conv2d(8, 2, (5, 1), padding="same"),
    ).eval()


def image(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def actions(result: quernel.compress.Result) -> dict[str, str]:
    return {layer.name: layer.reason or layer.action for layer in result.report.layers}


def test_each_layer_gets_filters_or_a_reason() -> None:
    model = decoder()
    result = compress(model, FactorizeConv(rank=2), data=[image()])
    small = result.model
    assert [type(m).__name__ for m in small if "Conv" in type(m).__name__] == [
        "Conv2d",
        "FactorizedConv2d",
        "Conv2d",
        "Conv2d",
        "FactorizedConvTranspose2d",
        "FactorizedConv2d",
    ]
    told = actions(result)
    assert "skip_first" in told["0"]
    assert "3 groups" in told["4"]
    assert "min_kernel=3" in told["5"]
    assert told["2"] == "one-way filters, decompose"
    assert small[2].bias is not model[2].bias  # the model is a copy
    assert torch.equal(small[2].bias, model[2].bias)
    assert (small[2].stride, small[7].output_padding, small[8].padding) == ((2, 2), (1, 1), "same")
    assert result.report.summary["factorized_convolutions"] == 3
    assert result.report.summary["model_parameters_after"] == sum(p.numel() for p in small.parameters())
    assert small(image()).shape == model(image()).shape


def test_the_first_is_the_first_of_the_model_whatever_is_selected() -> None:
    result = compress(decoder(), FactorizeConv(rank=1), include=("2", "8"))
    assert [type(result.model[i]).__name__ for i in (0, 2, 7, 8)] == [
        "Conv2d",
        "FactorizedConv2d",
        "ConvTranspose2d",
        "FactorizedConv2d",
    ]
    assert isinstance(compress(decoder(), FactorizeConv(rank=1, skip_first=False)).model[0], FactorizedConv2d)


def test_auto_takes_the_lowest_rank_within_the_tolerance() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, (5, 3)))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for conv, rank in zip(model, (1, 2, 4), strict=True):
            parts = [torch.randn(8, rank, n, generator=g) for n in (8, *conv.kernel_size)]
            conv.weight.copy_(torch.einsum("ori,ory,orx->oiyx", *parts))
    result = compress(model, FactorizeConv(tolerance=0.05, skip_first=False))
    for conv, layer in zip(model, result.model, strict=True):
        errors = [fit_one_way(conv.weight, rank).error for rank in range(1, layer.rank + 1)]
        assert errors[-1] <= 0.05
        assert all(error > 0.05 for error in errors[:-1])
    assert [layer.rank for layer in result.model][:2] == [1, 2]


def test_auto_leaves_what_no_saving_rank_can_represent() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(8, 8, 3))
    result = compress(model, FactorizeConv(tolerance=0.01), include=("1",))
    assert type(result.model[1]) is nn.Conv2d
    assert "next saves nothing" in actions(result)["1"]
    assert "nothing was changed" in " ".join(result.report.warnings)


def test_a_rank_that_saves_nothing_is_not_taken() -> None:
    result = compress(decoder(), FactorizeConv(rank=50))
    assert "rank 50 would save nothing" in actions(result)["2"]


def test_fresh_filters_are_seeded_small_and_announced() -> None:
    model = decoder()
    one, two = (compress(model, FactorizeConv(mode="init", seed=3)) for _ in range(2))
    other = compress(model, FactorizeConv(mode="init", seed=4)).model
    small = one.model
    assert isinstance(small[2], FactorizedConv2d)
    assert isinstance(small[7], FactorizedConvTranspose2d)
    assert (small[2].rank, small[2].init, small[7].init) == (1, "dirac", "kaiming")
    assert torch.equal(small[2].channel, two.model[2].channel)
    assert not torch.equal(small[2].channel, other[2].channel)
    assert torch.equal(small[2].bias, model[2].bias)
    assert any("train the result" in warning for warning in one.report.warnings)


def test_a_fresh_net_trains() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 5, padding=2))
    small = compress(net, FactorizeConv(rank=1, mode="init", skip_first=False)).model.train()
    x = torch.randn(16, 1, 12, 12)
    wanted = nn.functional.avg_pool2d(x, 3, 1, 1)
    optimizer = torch.optim.Adam(small.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (small(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_large_errors_are_announced() -> None:
    warnings = compress(decoder(), FactorizeConv(rank=1)).report.warnings
    assert any("raise rank" in warning for warning in warnings)


def test_other_dimensions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 7), nn.ReLU(), nn.Conv1d(8, 8, 7))
    small = compress(model, FactorizeConv(rank=3, skip_first=False), data=[torch.randn(2, 4, 30)]).model
    assert isinstance(small[2], FactorizedConv1d)
    volume = nn.Sequential(nn.Conv3d(4, 4, 3))
    assert compress(volume, FactorizeConv(rank=2, skip_first=False)).model[0].rank == 2


def test_weights_that_cannot_be_fitted_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[3].weight = model[2].weight
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    told = actions(compress(model, FactorizeConv(rank=1)))
    assert "NaN" in told["1"]
    assert "tied to 3.weight" in told["2"]


@pytest.mark.parametrize("rank", [1, 3])
def test_the_file_shrinks_as_the_parameters_do(rank: int, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(6)))
    result = compress(model, FactorizeConv(rank=rank, skip_first=False))
    sizes = [
        (quernel.models.save(each, tmp_path / name) / "model.safetensors").stat().st_size
        for name, each in (("dense", model), ("small", result.model))
    ]
    parameters = [sum(p.numel() for p in each.parameters()) for each in (model, result.model)]
    assert sizes[0] / sizes[1] == pytest.approx(parameters[0] / parameters[1], rel=FILE_RATIO)


def test_residual_net_and_its_batch_norms_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = ResNet20(width=8, blocks=1).eval()
    x = torch.rand(2, 3, 16, 16)
    small = compress(model, FactorizeConv(rank=4, iters=0), data=[x]).model
    assert sum(isinstance(m, FactorizedConv2d) for m in small.modules()) == 6
    assert sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()) == 7
    assert type(small.conv1) is nn.Conv2d


def test_joins_other_methods() -> None:
    result = compress(decoder(), [WeightInt8(), FactorizeConv(rank=1)], data=[image()])
    assert [m.partition("(")[0] for m in result.report.methods] == ["FactorizeConv", "WeightInt8"]
    assert type(result.model[0]).__name__ == "StoredConv2d"
    assert isinstance(result.model[2], FactorizedConv2d)


def test_the_menu_fits_trained_weights() -> None:
    menu = FactorizeConv.menu()
    assert all(isinstance(m, FactorizeConv) and m.mode == "decompose" for m in menu)
    assert {m.rank for m in menu} > {"auto"}


def test_a_search_tries_it() -> None:
    torch.manual_seed(0)
    model = ResNet20(width=8, blocks=1).eval()
    x = torch.rand(16, 3, 16, 16)
    with torch.no_grad():
        wanted = model(x)

    def closeness(net: nn.Module) -> float:
        with torch.no_grad():
            return -float((net(x) - wanted).norm() / wanted.norm())

    found = search(
        model, budget=Budget(bytes=0.95), methods=[FactorizeConv(4), FactorizeConv(tolerance=0.4)], data=[x],
        evaluate=closeness, example_inputs=x,
    )  # fmt: skip
    trials = {trial.label: trial for trial in found.report.trials}
    assert all(trial.status == "ok" for trial in trials.values())
    assert any("FactorizeConv" in label for label in trials)
    assert any(isinstance(m, FactorizedConv2d) for m in found.model.modules())


@pytest.mark.slow
def test_the_search_works_on_the_bundled_residual_net(real_data) -> None:
    model = models.load("resnet20-cifar10")
    task = models.task(model, "cifar10-lossless", max_examples=200)
    found = search(
        model, budget=Budget(bytes=0.95, drop=0.05), methods=[*FactorizeConv.menu()[:1], FactorizeConv(6)],
        data=task.calibration[:1], evaluate=task.judge,
    )  # fmt: skip
    assert found.report.satisfied
    assert any(isinstance(m, FactorizedConv2d) for m in found.model.modules())


def test_exports_to_onnx(tmp_path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    small = compress(decoder(), FactorizeConv(rank=1)).model
    file = quernel.compress.to_onnx(small, (image(),), tmp_path / "small.onnx")
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    got = torch.from_numpy(session.run(None, {name: image(3).numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(got, small(image(3)), rtol=EXACT, atol=EXACT)


def test_the_original_is_left_alone() -> None:
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    compress(model, FactorizeConv())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer"),
        ({"rank": "best"}, 'rank must be "auto" or an integer'),
        ({"min_kernel": 0}, "min_kernel must be"),
        ({"mode": "train"}, "mode must be one of"),
        ({"tolerance": 0.0}, "tolerance must be"),
        ({"iters": -1}, "iters must be"),
        ({"init": "zeros"}, "init must be one of"),
        ({"skip_first": 1}, "skip_first must be bool"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments_are_named(options, message) -> None:
    with pytest.raises(QuernelError, match=message):
        FactorizeConv(**options)
