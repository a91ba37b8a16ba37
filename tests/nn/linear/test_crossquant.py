"""``CrossQuantLinear``: the identities of the method in its integer form, its options, what it refuses."""

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import CrossQuantLinear
from quernel.nn._int8_kernels import quantiser
from quernel.nn.functional.activation_quant import fake_quantize
from quernel.nn.linear.crossquant import channel_scale
from quernel.nn.weights import Int4GroupWeight, Int8Weight


def layer(inp=32, out=12, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inp, out, bias=bias)


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def outliers():
    """Return activations with five channels of hundredfold size, and a weight that takes them back: same function."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 1024, generator=g), torch.randn(256, 1024, generator=g)
    channels = [3, 141, 592, 653, 979]
    x[:, channels] *= 100
    w[:, channels] /= 100
    linear = nn.Linear(1024, 256, bias=False)
    linear.weight = nn.Parameter(w)
    return x, linear


def test_outlier_channels_cost_twenty_times_less_than_per_token(outliers):
    x, linear = outliers
    absmax, wanted = x.abs().amax(0), F.linear(x, linear.weight)
    with torch.no_grad():
        token = relative(CrossQuantLinear.from_linear(linear, absmax, alpha=1.0)(x), wanted)
        cross = relative(CrossQuantLinear.from_linear(linear, absmax, alpha=0.15)(x), wanted)
    assert token > 20 * cross
    assert cross < 0.015
    assert token > 0.3


def test_bound_rows_reproduce_the_papers_formula_on_the_calibration_data(outliers):
    # Static with the same data and an unrounded weight is the dynamic method: codes times both steps agree.
    x, _ = outliers
    alpha = 0.15
    scale = channel_scale(x.abs().amax(0), alpha)
    inverse, codes, steps = scale.reciprocal(), torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    places = [t.data_ptr() for t in (x, inverse, codes, steps)]
    bits = int(np.float64(alpha).view(np.int64))
    quantiser(False, True, True).ctypes(*places[:2], 127, bits, *places[2:], *x.shape)
    ours = codes * steps[:, None] * scale
    papers = fake_quantize(x, alpha=alpha)
    # Where x / step is a half up to rounding, the code may fall to either side.
    differs = (ours - papers).abs() > 1e-5 * papers.abs() + 1e-12
    assert differs.float().mean() < 1e-4
    assert relative(ours, papers) < 1e-4


@pytest.mark.parametrize("row", ["tight", "bound"])
@pytest.mark.parametrize("abits", [4, 6, 8])
def test_output_is_the_float_simulation_of_the_same_integers(row, abits):
    linear, x = layer(), torch.randn(20, 32)
    quantised = CrossQuantLinear.from_linear(linear, x.abs().amax(0), abits=abits, row=row)
    levels = 2 ** (abits - 1) - 1
    v = x * quantised.inverse
    peak = (v if row == "tight" else x).abs().amax(1, keepdim=True)
    step = (peak if row == "tight" else peak**0.15) / levels
    codes = (v / step).round().clamp(-levels, levels)
    simulation = F.linear(codes.double(), quantised.weight.codes.double()) * step * quantised.weight.scale + linear.bias
    with torch.no_grad():
        torch.testing.assert_close(quantised(x).double(), simulation.double(), rtol=1e-5, atol=1e-6)


def test_more_bits_come_nearer():
    linear, x = layer(128, 64), torch.randn(64, 128)
    with torch.no_grad():
        errors = [
            relative(CrossQuantLinear.from_linear(linear, x.abs().amax(0), abits=b)(x), linear(x))
            for b in (4, 5, 6, 7, 8)
        ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.012


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu)])
def test_fused_activation_is_the_activation(name, function):
    linear, x = layer(), torch.randn(9, 32)
    absmax = x.abs().amax(0)
    with torch.no_grad():
        plain = CrossQuantLinear.from_linear(linear, absmax)(x)
        fused = CrossQuantLinear.from_linear(linear, absmax, activation=name)(x)
    torch.testing.assert_close(fused, function(plain), rtol=1e-5, atol=2e-6)


def test_scale_is_folded_into_the_columns_before_rounding():
    linear, absmax = layer(8, 3), torch.linspace(0.1, 9, 8)
    quantised = CrossQuantLinear.from_linear(linear, absmax, alpha=0.4)
    scale = absmax**0.6
    torch.testing.assert_close(quantised.inverse, 1 / scale)
    assert torch.equal(quantised.weight.codes, Int8Weight.from_dense(linear.weight * scale).codes)


def test_nothing_is_divided_where_the_scale_is_one():
    for absmax, alpha in ((torch.rand(32) + 1, 1.0), (torch.ones(32), 0.15), (torch.zeros(32), 0.15)):
        quantised = CrossQuantLinear.from_linear(layer(), absmax, alpha=alpha)
        assert quantised.inverse is None
        assert "inverse" not in quantised.state_dict()


def test_channels_that_calibration_never_saw_move_do_no_harm():
    linear, x = layer(64, 24), torch.randn(128, 64)
    calibration = x.clone()
    calibration[:, [2, 30]] = 0
    quantised = CrossQuantLinear.from_linear(linear, calibration.abs().amax(0))
    with torch.no_grad():
        assert relative(quantised.weight.dense() * quantised.inverse, linear.weight) < 0.02
        assert relative(quantised(calibration), linear(calibration)) < 0.02
        assert relative(quantised(x), linear(x)) < 0.02


def test_faint_channels_are_lifted():
    assert channel_scale(torch.tensor([1e-9, 4.0, 4.0, 0.0]), 0.0).tolist() == pytest.approx([4e-5, 4.0, 4.0, 4.0])
    assert channel_scale(torch.full((3,), 1e-45), 0.0).reciprocal().isfinite().all()


def test_bytes_are_a_quarter():
    linear = layer(1024, 1024)
    file = save(CrossQuantLinear.from_linear(linear, torch.rand(1024) + 0.1).state_dict())
    assert len(file) <= 0.27 * len(save(linear.state_dict()))


def test_constants_stay_float32_and_the_output_follows_the_input():
    model = nn.Sequential(CrossQuantLinear.from_linear(layer(), torch.rand(32) + 0.1), nn.LayerNorm(12)).bfloat16()
    assert {t.dtype for t in model[0].state_dict().values()} == {torch.int8, torch.float32}
    assert model[1].weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.randn(3, 32).bfloat16()).dtype == torch.bfloat16
        assert model[0](torch.randn(3, 32)).dtype == torch.float32


def test_the_bias_may_be_dropped_and_is_a_copy():
    linear = layer()
    assert CrossQuantLinear.from_linear(linear, torch.ones(32), bias=False).bias is None
    assert CrossQuantLinear.from_linear(layer(bias=False), torch.ones(32)).bias is None
    kept = CrossQuantLinear.from_linear(linear, torch.ones(32)).bias
    assert torch.equal(kept, linear.bias)
    assert kept.data_ptr() != linear.bias.data_ptr()


def test_mode_and_trainability_are_kept():
    linear = layer().eval()
    linear.bias.requires_grad_(False)
    quantised = CrossQuantLinear.from_linear(linear, torch.ones(32))
    assert (quantised.training, quantised.bias.requires_grad) == (False, False)


@pytest.mark.parametrize(
    "options", [{}, {"row": "bound", "alpha": 0.3, "abits": 5, "activation": "silu"}, {"bias": False}]
)
@pytest.mark.parametrize("absmax", [torch.ones(32), torch.linspace(0.1, 3, 32)], ids=["one", "smooth"])
def test_config_round_trip(options, absmax):
    quantised = CrossQuantLinear.from_linear(layer(), absmax, **options)
    twin = CrossQuantLinear.from_config(quantised.config())
    twin.load_state_dict(quantised.state_dict())
    assert twin.config() == quantised.config()
    x = torch.randn(4, 32)
    assert torch.equal(twin(x), quantised(x))


@pytest.mark.parametrize("options", [{}, {"row": "bound", "alpha": 0.5}, {"abits": 6, "activation": "gelu"}])
def test_four_bit_weights_are_the_same_layer_over_another_storage(options):
    linear, x = layer(256, 64), torch.randn(300, 256, generator=torch.Generator().manual_seed(1))
    x[:, 7] *= 20
    small = CrossQuantLinear.from_linear(linear, x.abs().amax(0), wbits=4, **options)
    assert isinstance(small.weight, Int4GroupWeight) and small.weight.nbytes < 0.16 * 4 * linear.weight.numel()
    twin = CrossQuantLinear(
        Int8Weight((64, 256)), small.bias, small.inverse, **({"alpha": 0.15} | options)
    )  # the integers of the small weight, in int8
    twin.weight.codes, twin.weight.scale = small.weight.unpack_int8(), small.weight.scale
    assert torch.equal(small(x), twin(x))
    wide = CrossQuantLinear.from_linear(linear, x.abs().amax(0), **options)
    assert relative(small(x), wide(x)) < 0.25  # 4 bits, on columns stretched by the outlier's scale
    back = CrossQuantLinear.from_config(small.config())
    back.load_state_dict(small.state_dict())
    assert torch.equal(back(x), small(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -0.1}, "alpha must be"),
        ({"alpha": 1.1}, "alpha must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"absmax": None}, "absmax must be Tensor; got NoneType"),
        ({"absmax": torch.ones(31)}, r"absmax must have shape \(32,\).*got \(31,\)"),
        ({"absmax": torch.ones(32, 1)}, "absmax must be a vector"),
        ({"absmax": -torch.ones(32)}, "none negative.*abs"),
        ({"absmax": torch.full((32,), float("nan"))}, "absmax holds NaN or infinity"),
        ({"absmax": torch.full((32,), float("inf"))}, "absmax holds NaN or infinity"),
        ({"wbits": 6}, "wbits must be one of 4, 8"),
        ({"abits": 3}, r"bits must be an integer in \[4, 8\]"),
        ({"abits": 16}, "bits must be"),
        ({"row": "fit"}, "row must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"linear": nn.Conv2d(1, 1, 1)}, "linear must be Linear; got Conv2d"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(QuernelError, match=message):
        CrossQuantLinear.from_linear(**({"linear": layer(), "absmax": torch.ones(32)} | change))


def test_bad_weights_are_refused():
    linear = layer()
    linear.weight.data[0, 0] = float("nan")
    with pytest.raises(QuernelError, match="weight holds NaN or infinity"):
        CrossQuantLinear.from_linear(linear, torch.ones(32))
    linear.weight = nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(QuernelError, match=r"linear.weight must have two dimensions; got shape \(2, 3, 4\)"):
        CrossQuantLinear.from_linear(linear, torch.ones(32))
    with pytest.raises(QuernelError, match=r"inverse must have shape \(7,\)"):
        CrossQuantLinear(Int8Weight((5, 7)), inverse=torch.ones(5))
    with pytest.raises(QuernelError, match="at most 133144"):
        CrossQuantLinear(Int8Weight((1, 133145)))
