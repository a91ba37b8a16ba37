"""CrossQuant as a method: exact fusion and folding, tuned exponents, refusals, the outlier claim."""

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import Cast, Context, CrossQuant, SmoothQuant, compress
from quernel.compress.quant._adjacent import activation_kind, activations_after, scalable_producers
from quernel.compress.quant._calibration import Calibration, output_error
from quernel.nn import CrossQuantLinear
from quernel.nn.functional.activation_quant import fake_quantize, quantization_kernel
from quernel.nn.linear.crossquant import channel_scale

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 32, generator=GENERATOR)
X[:, 5] *= 40


def mlp(activation=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), activation or nn.GELU(), nn.Linear(64, 8)).eval()


class PostNorm(nn.Module):
    """A norm whose output also feeds a residual stream, and a pre-activation that is read twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)

    def forward(self, x):
        x = self.norm(x)
        h = self.up(x)
        return x + self.down(self.act(h)) + h


def test_fusion_is_found_where_the_activation_alone_reads():
    assert activations_after(mlp(), Context([X]), ["1", "3"]) == {"1": ("2", "gelu")}


def test_fusion_is_refused_where_the_preactivation_goes_elsewhere_too():
    assert activations_after(PostNorm().eval(), Context([X]), ["up", "down"]) == {}


def test_folding_is_found_before_the_reader_and_refused_at_a_residual():
    assert scalable_producers(mlp(), Context([X]), ["1", "3"]) == {"0": ("1",)}
    assert scalable_producers(PostNorm().eval(), Context([X]), ["up", "down"]) == {}


def test_shared_activation_module_stays():
    shared = nn.GELU()
    model = nn.Sequential(nn.Linear(32, 32), shared, nn.Linear(32, 32), shared).eval()
    assert activations_after(model, Context([X]), ["0", "2"]) == {}


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
        (nn.Tanh(), None),
        (nn.Identity(), None),
        (nn.Dropout(), None),
        (nn.LayerNorm(65), None),
        (nn.PReLU(), None),
        (nn.Flatten(), None),
    ],
)
def test_activations_are_told_by_their_numbers(module, kind):
    assert activation_kind(module.eval()) == kind


@pytest.mark.parametrize("mode", ["static", "fold"])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.GELU("tanh")])
def test_modes_agree_and_stay_near_the_original(mode, activation):
    model = mlp(activation)
    result = compress(model, CrossQuant(mode=mode, activations="keep"), data=[X])
    wanted = model(X)
    # 8-bit steps on both factors of two layers.
    assert (result.model(X) - wanted).norm() < 0.03 * wanted.norm()
    assert isinstance(result.model[1], CrossQuantLinear) and isinstance(result.model[2], nn.Identity)
    assert result.report.summary["fused activations"] == 1


def test_fold_leaves_the_division_to_the_norm():
    result = compress(mlp(), CrossQuant(mode="fold"), data=[X])
    rows = {layer.name: layer for layer in result.report.layers}
    assert rows["1"].details["folded"] and not rows["3"].details["folded"]
    assert result.report.summary["folded layers"] == 1


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU(), nn.SiLU(), nn.GELU("tanh")])
def test_error_of_a_layer_with_its_activation_is_that_of_both(activation):
    errors = {
        fuse: compress(mlp(activation), CrossQuant(fuse=fuse, activations="keep"), data=[X]).report.layers[1]
        for fuse in (True, False)
    }
    assert errors[True].name == "1" and errors[True].details["activation"]
    assert errors[True].relative_error < 3 * errors[False].relative_error


def test_bfloat16_runs_between_the_layers():
    model = nn.Sequential(nn.Embedding(10, 32), *mlp()).eval()
    ids = torch.arange(10)
    result = compress(model, CrossQuant(), data=[ids])
    assert result.model[0].weight.dtype == torch.bfloat16 and result.model(ids).dtype == torch.bfloat16
    kept = compress(model, CrossQuant(activations="keep"), data=[ids])
    assert kept.model[0].weight.dtype == torch.float32 and kept.model(ids).dtype == torch.float32


def test_auto_takes_the_exponent_with_the_least_error():
    result = compress(mlp(), CrossQuant(alpha="auto", activations="keep"), data=[X])
    details = {layer.name: layer.details for layer in result.report.layers if layer.details}
    stats = Calibration(32, 100.0)
    stats.update(mlp()[0](X))
    weight = mlp()[1].weight.detach()
    errors = {
        a: output_error(stats.sample, weight, channel_scale(stats.absmax.value, a), abits=8)
        for a in (0.15, 0.3, 0.5, 0.65, 0.8, 1.0)
    }
    assert details["1"]["alpha"] == min(errors, key=errors.get)


def test_dead_channels_keep_their_weight():
    x = X.clone()
    x[:, 7] = 0
    result = compress(nn.Sequential(nn.Linear(32, 16)).eval(), CrossQuant(activations="keep"), data=[x])
    assert result.model(x).isfinite().all() and result.report.layers[0].relative_error < 0.02


def test_channel_that_wakes_after_calibration_does_not_drown_its_row():
    quiet, awake = X.clone(), X.clone()
    quiet[:, 7] = 0
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    result = compress(model, CrossQuant(activations="keep"), data=[quiet])
    assert (result.model(awake) - model(awake)).norm() < 0.03 * model(awake).norm()


class GemmaNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 32))

    def forward(self, x):
        return nn.functional.rms_norm(x, (32,)) * (1 + self.weight)


def test_fold_is_refused_where_the_output_does_not_follow_the_weight():
    model = nn.Sequential(GemmaNorm(), nn.Linear(32, 16)).eval()
    assert scalable_producers(model, Context([X]), ["1"]) == {}


def test_fold_is_refused_where_the_producers_weight_is_tied():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.other = nn.LayerNorm(32), nn.Linear(32, 32), nn.LayerNorm(32)
            self.other.weight = self.norm.weight

        def forward(self, x):
            return self.other(self.linear(self.norm(x)))

    assert scalable_producers(Twice().eval(), Context([X]), ["linear"]) == {}


def test_proving_leaves_the_weights_bit_equal():
    model = mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}
    scalable_producers(model, Context([X]), ["1", "3"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_output_without_visible_tensors_proves_nothing():
    class Opaque:
        def __init__(self, value):
            self.hidden = value

    class Wrapped(PostNorm):
        def forward(self, x):
            return Opaque(super().forward(x))

    assert activations_after(Wrapped().eval(), Context([X]), ["up", "down"]) == {}


@pytest.mark.parametrize("method", [CrossQuant(), Cast()])
def test_excluded_layers_keep_their_numbers_and_still_run(method):
    model = nn.Sequential(nn.Embedding(10, 32), *mlp()).eval()
    ids = torch.arange(10)
    result = compress(model, method, data=[ids], exclude=("4",))
    kept = result.model[4].weight
    assert torch.equal(kept.dense() if isinstance(kept, nn.Module) else kept, model[4].weight)
    assert result.model(ids).isfinite().all()
    assert {layer.name: layer.action for layer in result.report.layers}["4"] == "keep"


@pytest.mark.parametrize("mode", ["static", "fold"])
def test_four_bit_weights_are_stored_and_tuned_for(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)).eval()
    x = torch.randn(64, 128)
    sizes, errors = {}, {}
    for bits in (4, 8):
        result = compress(model, CrossQuant(wbits=bits, alpha="auto", mode=mode, activations="keep"), data=[x])
        sizes[bits], errors[bits] = result.report.bytes_after, (result.model(x) - model(x)).norm() / model(x).norm()
        row = result.report.layers[1]
        assert row.action == f"int{bits} x int8" and result.report.summary[f"int{bits} layers"] == 2
    assert sizes[4] < 0.65 * sizes[8]
    assert errors[8] < 0.02 < errors[4] < 0.15


def test_report_holds_the_kernel_of_each_layer():
    details = compress(mlp(), CrossQuant(), data=[X]).report.layers[1].details
    assert details["kernel"] == pytest.approx(quantization_kernel(mlp()[0](X).detach()), abs=1e-3)
    assert details["kernel"] < details["kernel_per_token"]


def test_padding_does_not_set_the_scales():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, attention_mask):
            return self.linear(x)

    x = torch.ones(2, 3, 4)
    x[:, 2] = 1e6
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0]])}
    method = CrossQuant(alpha=0.0, activations="keep")
    plan = method.plan(Masked().eval(), Context([batch]))
    assert torch.equal(plan.payload.decisions["linear"].scale, torch.ones(4))


def test_layer_that_never_runs_is_reported():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x):
            return self.used(x)

    rows = {layer.name: layer for layer in compress(Half().eval(), CrossQuant(), data=[X]).report.layers}
    assert rows["unused"].action == "skip" and "never reached" in rows["unused"].reason


def test_dynamic_mode_is_the_paper_formula_and_says_that_it_is_for_reference():
    linear = nn.Linear(32, 16, bias=False)
    result = compress(nn.Sequential(linear).eval(), CrossQuant(mode="dynamic", activations="keep"), data=[X])
    weight = result.model[0].weight.dense()
    assert torch.allclose(result.model(X), fake_quantize(X) @ weight.T, rtol=1e-5, atol=1e-4)
    assert any("simulated" in warning for warning in result.report.warnings)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"alpha": -0.1}, "alpha"),
        ({"alpha": 1.5}, "alpha"),
        ({"alpha": "best"}, "alpha"),
        ({"wbits": 6}, "wbits"),
        ({"wbits": 4, "mode": "dynamic"}, "wbits=8"),
        ({"abits": 9}, "abits"),
        ({"mode": "fast"}, "mode"),
        ({"row": "loose"}, "row"),
        ({"percentile": 0}, "percentile"),
        ({"percentile": 100.1}, "percentile"),
        ({"activations": "int4"}, "activations"),
        ({"row": "bound", "mode": "fold"}, "bound"),
    ],
)
def test_settings_out_of_range_are_refused(options, word):
    with pytest.raises(QuernelError, match=word):
        CrossQuant(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_calibration_is_refused(value):
    x = X.clone()
    x[3, 3] = value
    with pytest.raises(QuernelError, match="NaN or inf"):
        compress(nn.Sequential(nn.Linear(32, 8)).eval(), CrossQuant(), data=[x])


def test_missing_calibration_is_refused():
    with pytest.raises(QuernelError, match="data"):
        compress(mlp(), CrossQuant())


def outlier_layer():
    """The seeded construction: five channels times 100 in X, over 100 in W; the product is unchanged."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    channels = torch.randperm(1024, generator=generator)[:5]
    x[:, channels] *= 100
    w[:, channels] /= 100
    linear = nn.Linear(1024, 256, bias=False)
    linear.weight = nn.Parameter(w)
    return nn.Sequential(linear).eval(), x


def test_outlier_channels_cost_per_token_quantisation_20_times_more():
    model, x = outlier_layer()
    error = {
        alpha: compress(model, CrossQuant(alpha=alpha, activations="keep"), data=[x]).report.layers[0].relative_error
        for alpha in (0.15, 1.0)
    }
    assert error[1.0] >= 20 * error[0.15]
    assert error[0.15] < 0.02


def test_smoothquant_uses_the_weight_columns():
    model, x = outlier_layer()
    plan = SmoothQuant(migration=0.5).plan(model, Context([x]))
    scale = plan.payload.decisions["0"].scale
    wanted = x.abs().amax(0) ** 0.5 / model[0].weight.detach().abs().amax(0) ** 0.5
    assert torch.allclose(scale, wanted)


def test_result_loads_and_gives_the_same_numbers(tmp_path):
    result = compress(mlp(), CrossQuant(alpha="auto"), data=[X])
    back = quernel.load(result.save(tmp_path), model=mlp)
    for x in (X, X.bfloat16()):
        assert torch.equal(back(x), result.model(x)) and back(x).dtype == x.dtype
