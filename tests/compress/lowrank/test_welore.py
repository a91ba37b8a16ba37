"""WeLore on small models: identities of the method, what the report says, tied layers, saving, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import Result, UniformLowRank, WeLore, compress
from quernel.nn import LowRankLinear, StoredLinear
from quernel.nn.weights import LowRankWeight, StackedWeight

# Sums of squares of float32 singular values.
TAIL = 1e-5
EXACT = 1e-5
# Whitened and plain errors are measured in float64 on float32 factors.
ROUNDING = 1e-6


def _weight(m: int, n: int, decay: float, generator: torch.Generator) -> Tensor:
    """Return a matrix whose singular values fall by 10^-decay."""
    u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator))
    return (u * torch.logspace(0, -decay, min(m, n))) @ v.T


def _model(decays: tuple[float, ...] = (2.0, 1.0, 0.3, 3.0)) -> nn.Sequential:
    """Stack layers of different spectra: some low-rank, some nearly flat."""
    generator = torch.Generator().manual_seed(0)
    sizes = [24, 32, 40, 32, 16][: len(decays) + 1]
    model = nn.Sequential()
    for n, m, decay in zip(sizes, sizes[1:], decays, strict=False):
        layer = nn.Linear(n, m)
        layer.weight = nn.Parameter(_weight(m, n, decay, generator))
        layer.bias = nn.Parameter(torch.randn(m, generator=generator) / 10)
        model += nn.Sequential(layer, nn.GELU())
    return model.eval()


def _data(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(32, 24, generator=generator) * torch.logspace(0.5, -1, 24) for _ in range(batches)]


def _layers(result: Result) -> dict[str, dict[str, Any]]:
    return {layer.name: dict(layer.details) for layer in result.report.layers if layer.details}


def _ranks(model: nn.Module, method: WeLore) -> list[Any]:
    return [details["rank"] for details in _layers(compress(model, method, data=_data(), dry_run=True)).values()]


def test_nothing_asked_leaves_the_model_bit_for_bit() -> None:
    model = _model()
    result = compress(model, WeLore(0.0))
    assert [type(m) for m in result.model] == [type(m) for m in model]
    assert all(
        torch.equal(a, b) for a, b in zip(result.model.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert result.report.summary["tau"] == 0.0
    assert result.report.summary["rank_reduction_attempted"] == 0.0


@pytest.mark.parametrize("target", [0.1, 0.37, 0.5, 0.8])
def test_rank_target_is_met_and_both_reductions_are_told(target: float) -> None:
    result = compress(_model(), WeLore(target))
    layers, summary = _layers(result), result.report.summary
    full, kept = (sum(d[key] for d in layers.values()) for key in ("full_rank", "rank"))
    assert abs((full - kept) - target * full) <= 1
    gone = sum(d["full_rank"] - d["rank"] for d in layers.values() if d["low_rank"])
    assert summary["rank_reduction_attempted"] == pytest.approx((full - kept) / full)
    assert summary["rank_reduction_achieved"] == pytest.approx(gone / full)
    assert summary["model_parameters_after"] == sum(p.numel() for p in result.model.parameters())
    assert summary["model_parameters_before"] == sum(p.numel() for p in _model().parameters())
    assert all(d["parameters_after"] <= d["parameters_before"] for d in layers.values())


def test_parameter_target_is_met() -> None:
    summary = compress(_model(), WeLore(0.4, budget="params")).report.summary
    # One value dropped from the largest matrix is 72 of 4,096 weights.
    assert 0.4 <= summary["weight_reduction"] <= 0.4 + 72 / 4096


def test_low_rank_and_dense_layers_are_told_apart() -> None:
    model = _model()
    result = compress(model, WeLore(0.5))
    layers = {layer.name: layer for layer in result.report.layers if layer.details}
    assert {layer.action for layer in layers.values()} == {"low-rank", "keep"}
    for name, layer in layers.items():
        new, details = result.model.get_submodule(name), layer.details
        assert isinstance(new, LowRankLinear) == details["low_rank"] == (layer.action == "low-rank")
        assert details["low_rank"] == (details["rank"] * (details["m"] + details["n"]) < details["m"] * details["n"])
        assert new.bias is not None
        assert torch.equal(new.bias, model.get_submodule(name).bias)
        if layer.action == "keep":
            assert torch.equal(new.weight, model.get_submodule(name).weight)
            assert "N-LRC" in layer.reason


def test_frobenius_error_is_the_tail_of_the_spectrum() -> None:
    model = _model()
    result = compress(model, WeLore(0.5))
    seen = 0
    for name, details in _layers(result).items():
        if details["low_rank"]:
            s = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double())
            expected = (s[details["rank"] :].square().sum() / s.square().sum()).sqrt()
            assert details["relative_frobenius_error"] == pytest.approx(float(expected), rel=TAIL)
            seen += 1
    assert seen


@pytest.mark.parametrize("factor", [1e-3, 0.3, 512.0])
def test_scale_changes_no_rank(factor: float) -> None:
    model, scaled = _model(), _model()
    with torch.no_grad():
        scaled[0].weight *= factor
        scaled[4].weight *= 1 / factor
    assert _ranks(scaled, WeLore(0.5)) == _ranks(model, WeLore(0.5))


def test_orthogonal_weights_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    nn.init.orthogonal_(model[0].weight)
    result = compress(model, WeLore(0.5))
    assert type(result.model[0]) is nn.Linear
    assert result.report.summary["rank_reduction_attempted"] == 0.0
    assert any("out of reach" in warning for warning in result.report.warnings)


def test_exact_low_rank_is_recovered() -> None:
    model = nn.Sequential(nn.Linear(32, 24))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(24, 4) @ torch.randn(4, 32))
    result = compress(model, WeLore(20 / 24))
    assert result.model[0].rank == 4
    assert _layers(result)["0"]["relative_frobenius_error"] < EXACT


def test_whitening_lowers_the_output_error_of_every_layer() -> None:
    plain = WeLore(0.5, whiten=True)  # for the Gram matrices of its plan only
    model, data = _model(), _data()
    layers = _layers(compress(model, plain, data=data))
    x = torch.cat(data)
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear) and layers[str(i)]["low_rank"]:
            other = LowRankLinear.from_linear(layer, layers[str(i)]["rank"])
            ours = layers[str(i)]["relative_output_error"]
            exact, approximate = (x @ w.T for w in (layer.weight, other.weight.dense()))
            assert ours <= float((exact - approximate).norm() / exact.norm()) * (1 + ROUNDING)
        x = layer(x).detach()


def test_reported_output_error_is_the_real_one() -> None:
    model, data = _model(), _data()
    result = compress(model, WeLore(0.5, whiten=True), data=data)
    x = torch.cat(data)
    name = next(n for n, d in _layers(result).items() if d["low_rank"] and n == "0")
    exact, now = (x @ w.T for w in (model[0].weight, result.model[0].weight.dense()))
    error = float((exact - now).detach().norm() / exact.detach().norm())
    assert _layers(result)[name]["relative_output_error"] == pytest.approx(error, rel=1e-3)


def test_whitened_spectrum_may_choose_the_ranks() -> None:
    plain, whitened = (_ranks(_model(), WeLore(0.5, whiten=True, spectrum=s)) for s in ("weight", "whitened"))
    assert sum(plain) == sum(whitened)
    assert plain != whitened


class _Masked(nn.Module):
    """Take padded sequences as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(x)


def test_padding_does_not_count() -> None:
    x, mask = torch.randn(3, 40, 24), torch.arange(40) < torch.tensor([[40], [31], [7]])
    weights = []
    for padding in (0.0, 1e3):
        batch = {"x": torch.where(mask[..., None], x, padding), "attention_mask": mask.long()}
        result = compress(_Masked().eval(), WeLore(0.5, whiten=True), data=[batch])
        weights.append(torch.cat([p.flatten() for p in result.model.parameters()]))
    assert torch.equal(*weights)


def test_shared_modules_are_factored_once_and_stay_shared() -> None:
    model = _model((3.0,))
    model.append(model[0])
    layers = compress(nn.ModuleList([*model]), WeLore(0.6)).model
    assert isinstance(layers[0], LowRankLinear)
    assert layers[0] is layers[2]


def test_tied_weights_are_factored_once_and_stay_tied() -> None:
    model = _model((3.0, 0.5))
    twin = nn.Linear(24, 32)
    twin.weight = model[0].weight
    model.append(twin)
    result = compress(nn.ModuleList([*model]), WeLore(0.5))
    one, two = result.model[0], result.model[4]
    assert one is not two
    assert isinstance(one, LowRankLinear)
    assert isinstance(two, LowRankLinear)
    assert one.weight.a is two.weight.a
    assert torch.equal(two.bias, twin.bias)
    assert result.report.summary["matrices"] == 2
    assert result.report.summary["model_parameters_after"] == sum(p.numel() for p in result.model.parameters())


def test_a_weight_tied_to_something_else_is_left_alone() -> None:
    model = _model((3.0, 0.5))
    table = nn.Embedding(32, 24)
    table.weight = model[0].weight
    result = compress(nn.ModuleDict({"layers": model, "tokens": table}), WeLore(0.5))
    reason = next(layer.reason for layer in result.report.layers if layer.name == "layers.0")
    assert reason == "its weight is tied to tokens.weight"
    assert result.model["layers"][0].weight is result.model["tokens"].weight


def test_embeddings_and_heads_are_excluded_by_name() -> None:
    model = nn.ModuleDict({"patch_embed": nn.Linear(8, 8), "body": _model((2.0,)), "lm_head": nn.Linear(8, 8)})
    result = compress(model, WeLore(0.6))
    assert isinstance(result.model["body"][0], LowRankLinear)
    assert type(result.model["patch_embed"]) is type(result.model["lm_head"]) is nn.Linear


def test_fused_projections_get_a_rank_a_part() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [_weight(24, 24, decay, generator) for decay in (3.0, 2.0, 0.1)]
    model = nn.ModuleDict({"qkv": nn.Linear(24, 72), "proj": nn.Linear(24, 24)})
    model["qkv"].weight = nn.Parameter(torch.cat(parts))
    model["proj"].weight = nn.Parameter(_weight(24, 24, 1.0, generator))
    result = compress(model, WeLore(0.5))
    fused, x = result.model["qkv"], torch.randn(5, 24)
    assert isinstance(fused, StoredLinear)
    assert isinstance(fused.weight, StackedWeight)
    ranks = [part.rank if isinstance(part, LowRankWeight) else 24 for part in fused.weight.parts]
    assert ranks[0] < ranks[1] < ranks[2] == 24
    assert torch.equal(fused.weight.dense()[48:], parts[2])
    # One matrix without split: a rank for all three.
    whole = compress(model, WeLore(0.5, split={})).model["qkv"]
    assert isinstance(whole, LowRankLinear)
    assert fused(x).shape == whole(x).shape == (5, 72)


@pytest.mark.parametrize("split", [(), (("qkv", 3),)])
def test_saved_and_loaded_in_the_factored_shapes(tmp_path: Path, split: tuple[tuple[str, int], ...]) -> None:
    model = nn.Sequential(_model())
    model.add_module("qkv", nn.Linear(16, 48))
    model.qkv.weight = nn.Parameter(_weight(48, 16, 3.0, torch.Generator().manual_seed(2)))
    result = compress(model, WeLore(0.6, split=split))
    folder = result.save(tmp_path / "saved")

    def architecture() -> nn.Module:
        bare = nn.Sequential(_model())
        bare.add_module("qkv", nn.Linear(16, 48))
        return bare

    loaded = quernel.load(folder, model=architecture)
    x = torch.randn(3, 24)
    assert torch.equal(loaded(x), result.model(x))
    assert {n for n, m in loaded.named_modules() if isinstance(m, LowRankWeight)} == {
        n for n, m in result.model.named_modules() if isinstance(m, LowRankWeight)
    }


def test_config_survives_json() -> None:
    for method in (WeLore(0.3, "params", 0.4, whiten=True, split={"qkv": 3, "kv": 2}), UniformLowRank(0.2)):
        again = type(method).from_config(json.loads(json.dumps(method.config())))
        assert again == method
        assert hash(again) == hash(method)


def test_half_precision_models_keep_their_dtype() -> None:
    model = _model().bfloat16()
    result = compress(model, WeLore(0.5))
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert any(isinstance(m, LowRankLinear) for m in result.model)


def test_min_ratio_below_break_even_is_warned_about() -> None:
    result = compress(_model(), WeLore(0.1, min_ratio=0.0))
    assert result.report.summary["weight_reduction"] < 0
    assert any("above break-even" in warning for warning in result.report.warnings)


def test_few_calibration_rows_are_warned_about() -> None:
    result = compress(_model(), WeLore(0.5, whiten=True), data=[_data()[0][:5]])
    assert any("fewer calibration rows" in warning for warning in result.report.warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.0}, r"target must be a finite number in \[0.0, 1.0\); got 1.0"),
        ({"target": -0.1}, "target must be"),
        ({"target": float("nan")}, "target must be"),
        ({"budget": "bytes"}, "budget must be one of 'rank', 'params'; got 'bytes'"),
        ({"min_ratio": "none"}, 'min_ratio must be "auto" or a number'),
        ({"min_ratio": 1.5}, "min_ratio must be"),
        ({"exclude": "lm_head"}, "exclude must be a sequence"),
        ({"whiten": 1}, "whiten must be bool"),
        ({"split": {"qkv": 1}}, "split must be an integer"),
        ({"spectrum": "whitened"}, "needs whiten=True"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        WeLore(**arguments)


def test_models_that_cannot_be_factored_are_refused() -> None:
    with pytest.raises(QuernelError, match="nothing to compress: WeLore found no Linear"):
        compress(nn.Sequential(nn.Conv2d(3, 8, 3)), WeLore())
    with pytest.raises(QuernelError, match="nothing to compress: WeLore found no Linear"):
        compress(_model(), WeLore(), exclude=("*",))
    with pytest.raises(QuernelError, match=r"target=0\.6 .* out of reach with min_ratio=0\.97: at most 0\.\d+ can go"):
        compress(_model(), WeLore(0.6, budget="params", min_ratio=0.97))
    with pytest.raises(QuernelError, match="WeLore needs data"):
        compress(_model(), WeLore(whiten=True))
    broken = _model()
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.nan
    with pytest.raises(QuernelError, match="the weight of '2' holds NaN"):
        compress(broken, WeLore())
    with pytest.raises(QuernelError, match="the inputs of '0' cannot be observed: x holds NaN"):
        compress(_model(), WeLore(whiten=True), data=[torch.full((4, 24), torch.nan)])


def test_a_model_of_excluded_layers_is_left_as_it_is() -> None:
    result = compress(nn.Sequential(nn.Linear(8, 8)), WeLore(exclude=("0",)))
    assert type(result.model[0]) is nn.Linear
    assert any("nothing was changed: its name holds '0'" in warning for warning in result.report.warnings)


def test_layers_the_data_never_reached_are_skipped() -> None:
    model = nn.ModuleDict({"used": _model((2.0,)), "idle": nn.Linear(24, 24)})
    result = compress(model, WeLore(0.6, whiten=True), data=_data(), forward=lambda m, x: m["used"](x))
    assert next(layer.reason for layer in result.report.layers if layer.name == "idle") == "the data never reached it"
