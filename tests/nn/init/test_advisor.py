"""ArchitectureAdvisor: shapes near r*, the figures of the theory, learning rates as groups, models, refusals."""

import json
import math

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.kernels.theory import best_aspect_ratio, criticality
from quernel.models import DigitsCNN
from quernel.nn import ArchitectureAdvisor


def parameters(shape):
    layers, before = [], 64
    for _ in range(shape.depth - 1):
        layers += [nn.Linear(before, shape.width), nn.ReLU()]
        before = shape.width
    net = nn.Sequential(*layers, nn.Linear(before, 10))
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("params", [20_000, 200_000, 2_000_000])
def test_a_budget_is_kept_and_used_near_r_star(activation, params):
    advice = ArchitectureAdvisor(64, 10, activation, params=params).suggest()
    assert parameters(advice) == advice.parameters <= params
    # Another neuron would not fit.
    wider = ArchitectureAdvisor(64, 10, activation, depth=advice.depth, width=advice.width + 1).suggest()
    assert wider.parameters > params
    low, high = advice.r_range
    assert low < advice.r < high
    assert advice.r == pytest.approx(advice.depth / advice.width)


def test_r_star_is_the_published_order():
    assert best_aspect_ratio(criticality("relu").nu, 10) == pytest.approx(0.016)
    assert best_aspect_ratio(criticality("tanh").nu, 10) == pytest.approx(0.12)
    relu = ArchitectureAdvisor(64, 10, "relu", width=620).suggest()
    assert relu.depth == 10
    tanh = ArchitectureAdvisor(64, 10, "tanh", depth=12).suggest()
    assert tanh.width == 100


def test_figures_are_those_of_the_theory():
    advice = ArchitectureAdvisor(784, 10, nn.ReLU(), width=128, depth=50).suggest()
    assert advice.critical == criticality("relu")
    assert advice.kernels == (2.0,) * 50 and len(advice.fluctuations) == 50
    assert advice.fluctuation == advice.fluctuations[-1] == pytest.approx((1 + 5 / 128) ** 49 - 1)
    assert "above 1 / nu" in advice.warnings[0]
    tanh = ArchitectureAdvisor(784, 10, "tanh", width=128, depth=50).suggest()
    assert tanh.kernels[-1] == pytest.approx(1 / 100, rel=0.1)
    assert tanh.fluctuation == pytest.approx(2 / 3 * 49 / 128, rel=0.15)
    silu = ArchitectureAdvisor(784, 10, "silu", width=1280, depth=5).suggest()
    assert silu.kernels[0] == pytest.approx(14.32, abs=0.01)
    assert any("scale the first layer" in warning for warning in silu.warnings)


def test_skip_connections_allow_more_depth():
    plain = ArchitectureAdvisor(64, 10, "tanh", width=400).suggest()
    skip = ArchitectureAdvisor(64, 10, "tanh", width=400, residual=0.8).suggest()
    assert skip.depth > plain.depth
    assert skip.critical.residual == 0.8


def test_without_a_rate_the_recursion_stands_for_it():
    advice = ArchitectureAdvisor(64, 10, "elu", params=100_000).suggest()
    assert advice.critical.nu is None and 0 < advice.nu < 5
    assert any("nu is the growth over 32 layers" in warning for warning in advice.warnings)


def test_without_a_critical_point_it_says_what_to_take():
    advice = ArchitectureAdvisor(64, 10, "sigmoid", width=100, depth=3).suggest()
    assert "Take tanh, relu, gelu or silu" in advice.warnings[0]
    assert advice.nu is advice.r_star is advice.r_range is advice.fluctuation is None
    assert advice.kernels == advice.rates == ()
    with pytest.raises(QuernelError, match="'sigmoid' has no critical initialisation"):
        ArchitectureAdvisor(64, 10, "sigmoid", params=10_000).suggest()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_groups_hold_every_parameter_once_at_its_rate(activation):
    advice = ArchitectureAdvisor(6, 3, activation, width=8, depth=3).suggest()
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))
    for optimizer in ("sgd", "adam"):
        groups = advice.param_groups(net, 0.5, optimizer=optimizer)
        rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
        # Adam, and what is no layer of the theory: eta / depth.
        assert rates[id(net[1].weight)] == pytest.approx(0.5 / 3)
        for rate, (layer, fan_in) in zip(advice.rates, ((net[0], 6), (net[2], 8), (net[4], 8)), strict=True):
            wanted = 0.5 * rate.weight / fan_in if optimizer == "sgd" else 0.5 / 3
            assert rates[id(layer.weight)] == pytest.approx(wanted)
            if layer.bias is not None and optimizer == "sgd":
                assert rates[id(layer.bias)] == pytest.approx(0.5 * rate.bias)
        torch.optim.SGD(groups)
    with pytest.raises(QuernelError, match="the advice is for 3 layers with weights; the model has 1"):
        advice.param_groups(nn.Sequential(nn.Linear(6, 3)), 0.5)
    with pytest.raises(QuernelError, match="optimizer must be one of"):
        advice.param_groups(net, 0.5, optimizer="lbfgs")


def test_a_model_is_read_and_held_against_the_theory():
    net = DigitsCNN()
    advice = ArchitectureAdvisor.diagnose(net, example_inputs=torch.zeros(1, 1, 8, 8))
    assert advice.critical.activation == "relu" and advice.depth == 5 and advice.outputs == 10
    assert advice.width == round(4 / (1 / 32 + 1 / 64 + 1 / 64 + 1 / 128))
    assert advice.parameters == sum(p.numel() for p in net.parameters())
    # torch draws with variance 1 / (3 fan-in).
    assert advice.present_C_W == pytest.approx(1 / 3, rel=0.1)
    text = " ".join(advice.warnings)
    for word in ("3 convolutions", "3 BatchNorm2d left out: a norm sets K to 1", "stand at C_W = 0.3"):
        assert word in text


def test_a_report_is_plain_json():
    for activation in ("gelu", "relu", "sigmoid"):
        advice = ArchitectureAdvisor(8, 2, activation, width=16, depth=4).suggest()
        found = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
        assert found["class"] == advice.critical.cls and found["depth"] == 4 and "alternative" not in found
        assert [rate["layer"] for rate in found["rates"]] == ([1, 2, 3, 4] if activation != "sigmoid" else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_in": 0}, "n_in must be an integer in"),
        ({"n_out": 0}, "n_out must be an integer in"),
        ({"width": 0}, "width must be an integer in"),
        ({"depth": 0}, "depth must be an integer in"),
        ({"residual": 1.0}, "residual must be a finite number"),
        ({"activation": 7}, "activation must be a name or a callable"),
        ({"params": 100}, "give params="),
        ({"width": None, "depth": None}, "give params="),
        ({"width": None, "depth": None, "params": 5}, "params=5 is too few for a hidden layer"),
        ({"input_power": math.nan}, "input_power must be a finite number"),
    ],
)
def test_bad_input_is_refused(changes, message):
    given = {"n_in": 8, "n_out": 2, "activation": "relu", "width": 16, "depth": 4} | changes
    with pytest.raises(QuernelError, match=message):
        ArchitectureAdvisor(**given).suggest()
