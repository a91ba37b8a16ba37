"""``SNNKLinear``: features by their definition, closed-form fits, exact bundling, every kind saved and exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quernel
from quernel import testing
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.nn import SNNKLinear
from quernel.nn.linear.snnk import activation_function
from quernel.nn.weights import unique_bytes
from tests.reference import snnk as oracle

CLOSE = 1e-5
# Universal features with 16,384 columns: standard error near 0.02, 96 outputs compared.
NOISE = 0.1
KINDS = [
    {"kind": "relu"},
    {"kind": "relu", "projection": "gaussian", "threshold": 0.1},
    {"kind": "relu", "projection": "hadamard"},
    {"kind": "urf", "activation": "sin"},
    {"kind": "urf", "activation": "gauss", "projection": "hadamard", "damping": 0.05},
]
every_kind = pytest.mark.parametrize("options", KINDS, ids=str)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(options: dict[str, Any], **more: Any) -> SNNKLinear:
    return SNNKLinear(7, 5, 12, generator=seeded(), **{**options, **more})


def dense_rows(layer: SNNKLinear) -> np.ndarray:
    """Return G / sqrt(m) of ReLU features as a matrix."""
    phi = layer.phi
    if phi.structured:
        return oracle.structured_rows(phi.signs.numpy(), phi.lengths.double().numpy())[:, : phi.in_features]
    return phi.directions.double().numpy()


@pytest.mark.parametrize("options", KINDS[:3], ids=str)
def test_relu_features_are_the_definition(options: dict[str, Any]) -> None:
    layer, x = made(options), torch.randn(3, 7)
    g = dense_rows(layer) * 12**0.5
    wanted = [oracle.relu_features(row, g, layer.phi.threshold) for row in x.double().numpy()]
    np.testing.assert_allclose(layer.phi(x).numpy(), wanted, atol=CLOSE)
    mean = torch.randn(7)
    layer.phi.set_center(mean)
    wanted = [oracle.relu_features(row, g, layer.phi.threshold) for row in (x - mean).double().numpy()]
    np.testing.assert_allclose(layer.phi(x).numpy(), wanted, atol=CLOSE)


def test_relu_features_converge_to_half_the_arc_cosine_kernel_and_not_to_relu() -> None:
    layer = SNNKLinear(16, 8, 1 << 15, generator=seeded())
    x, w = F.normalize(torch.randn(6, 16)), F.normalize(torch.randn(8, 16))
    got = layer.phi(x) @ layer.phi.of_weights(w, None).T
    wanted = [[oracle.arc_cosine(a, b, 1) / 2 for b in w.double().numpy()] for a in x.double().numpy()]
    # Standard deviation of a term below 1.5, over sqrt(2^15) terms, 48 of them.
    np.testing.assert_allclose(got.numpy(), wanted, atol=0.04)
    assert (got - (x @ w.T).relu()).abs().max() > 0.2


@pytest.mark.parametrize("activation", ["cos", "sin", "gauss"])
@pytest.mark.parametrize("projection", ["orthogonal", "hadamard"])
def test_universal_features_estimate_the_layer_without_data(activation: str, projection: str) -> None:
    linear = nn.Linear(32, 8)
    with torch.no_grad():
        linear.weight.copy_(0.8 * F.normalize(torch.randn(8, 32, generator=seeded()), dim=1))
    x = 0.8 * F.normalize(torch.randn(12, 32, generator=seeded(1)), dim=1)
    layer = SNNKLinear.from_linear(
        linear,
        activation,
        16384,
        kind="urf",
        projection=projection,  # type: ignore[arg-type]
        generator=seeded(2),
    )
    wanted = activation_function(activation)(linear(x))
    assert (layer(x) - wanted).abs().max() < NOISE
    assert layer.activation == activation


@every_kind
def test_two_and_three_axes_give_the_same(options: dict[str, Any]) -> None:
    layer, x = made(options), 0.5 * torch.randn(4, 3, 7)
    torch.testing.assert_close(layer(x), layer(x.reshape(12, 7)).reshape(4, 3, 5), rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0], rtol=CLOSE, atol=CLOSE)


@every_kind
def test_conformance_of_every_kind(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    example = {"make": lambda: made(options), "input": lambda g: (0.3 * torch.randn(4, 7, generator=g),)}
    monkeypatch.setattr(SNNKLinear, "_quernel_example", staticmethod(lambda: example))
    checks = testing.checks_for("module")
    for name in ("outputs", "low_precision", "batch_independence", "gradients", "copy", "config_round_trip"):
        checks[name](SNNKLinear)
    checks["save_and_load"](SNNKLinear)


@pytest.mark.slow
@every_kind
def test_export(options: dict[str, Any]) -> None:
    layer, x = made(options).eval(), 0.3 * torch.randn(4, 7)
    program = torch.export.export(layer, (x,), strict=False).module()
    torch.testing.assert_close(program(x), layer(x))


def test_fit_is_ridge_on_the_features() -> None:
    layer, x, y = made({}).double(), torch.randn(50, 7).double(), torch.randn(50, 5).double()
    found = layer.fit([(x[:20], y[:20]), (x[20:], y[20:])], alpha=1e-2)
    weight, bias = oracle.ridge(layer.phi(x).numpy(), y.numpy(), 1e-2)
    np.testing.assert_allclose(layer.weight.detach(), weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(layer.bias.detach(), bias, rtol=1e-8, atol=1e-10)
    lost = (layer(x) - y).detach().norm() / y.norm()
    assert found.relative_error == pytest.approx(float(lost), rel=1e-6)


def test_targets_in_the_span_are_reproduced() -> None:
    layer, x = made({}, dtype=torch.float64), torch.randn(200, 7, dtype=torch.float64)
    wanted = layer.phi(x) @ torch.randn(12, 5, dtype=torch.float64) - 3
    layer.fit([(x, wanted)], alpha=1e-14)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)


def test_distilling_gets_better_with_features_and_needs_data() -> None:
    linear = nn.Linear(16, 24)
    x, fresh = torch.randn(2000, 16), torch.randn(500, 16)
    wanted = F.gelu(linear(fresh))

    def error(m: int, data: Any) -> float:
        layer = SNNKLinear.from_linear(linear, "gelu", m, data=data, generator=seeded())
        return float((layer(fresh) - wanted).detach().norm() / wanted.detach().norm())

    errors = [error(m, x) for m in (16, 64, 256)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.2
    assert error(256, None) > 0.8  # data-free: a starting point, not an approximation
    assert error(64, [x[:900], x[900:]]) == pytest.approx(errors[1], rel=1e-3)


def test_centring_is_what_bends_the_features_where_the_inputs_are() -> None:
    linear = nn.Linear(16, 24)
    x = torch.randn(2000, 16) + 4
    with torch.no_grad():  # a layer whose activation is at work around the mean of its inputs
        linear.bias -= linear.weight.sum(1) * 4
    wanted = F.gelu(linear(x)).detach()
    centred = SNNKLinear.from_linear(linear, "gelu", 128, data=x, generator=seeded())
    plain = SNNKLinear(16, 24, 128, generator=seeded())
    plain.fit([(x, wanted)])
    assert (centred(x) - wanted).norm() < 0.9 * (plain(x) - wanted).norm()


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
@every_kind
def test_bundling_is_exact(options: dict[str, Any], biases: tuple[bool, bool]) -> None:
    first, following = made(options, bias=biases[0]), nn.Linear(5, 3, bias=biases[1])
    bundled, x = first.bundle(following), 0.5 * torch.randn(4, 7)
    torch.testing.assert_close(bundled(x), following(first(x)), rtol=CLOSE, atol=CLOSE)
    assert bundled.phi is first.phi
    assert (bundled.bias is None) == (biases == (False, False))


def test_bundling_towers() -> None:
    # linear, activation, linear, activation, linear: two fits and two products leave two matrices.
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 6), nn.GELU(), nn.Linear(6, 4))
    x = torch.randn(1000, 8)
    one = SNNKLinear.from_linear(net[0], "gelu", 128, data=x, generator=seeded()).bundle(net[2])
    two = SNNKLinear.from_linear(nn.Linear(6, 6), F.gelu, 64, data=one(x).detach(), generator=seeded(1))
    two.fit([(one(x).detach(), net[3](net[2](net[1](net[0](x)))))])
    tower = nn.Sequential(one, two.bundle(net[4]))
    assert (tower(x) - net(x)).norm() < 0.2 * net(x).norm()
    assert sum(p.numel() for p in tower.parameters()) == (128 + 1) * 6 + (64 + 1) * 4


@every_kind
def test_directions_are_fixed_saved_and_decided_by_the_seed(options: dict[str, Any]) -> None:
    one, two, other = made(options), made(options), SNNKLinear(7, 5, 12, generator=seeded(1), **options)
    assert {n for n, p in one.named_parameters()} == {"weight", "bias"}
    fixed = {k for k in one.state_dict() if k.startswith("phi.")}
    assert fixed and all(torch.equal(one.state_dict()[k], two.state_dict()[k]) for k in one.state_dict())
    assert any(not torch.equal(one.state_dict()[k], other.state_dict()[k]) for k in fixed)
    moved = made(options).to(torch.float64)
    assert all(t.dtype in (torch.float64, torch.int8) for t in moved.state_dict().values())
    assert all(t.is_meta for t in made(options).to("meta").state_dict().values())


def test_drawing_uses_the_given_generator_alone() -> None:
    before = torch.get_rng_state()
    made({})
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    one = SNNKLinear(7, 5, 12)
    torch.manual_seed(5)
    assert torch.equal(SNNKLinear(7, 5, 12).weight, one.weight)


@pytest.mark.parametrize("projection", ["orthogonal", "hadamard"])
def test_stored_bytes_are_the_formula_s(projection: str) -> None:
    layer = SNNKLinear(100, 30, 40, projection=projection)  # type: ignore[arg-type]
    trained = 4 * (30 * 40 + 30)
    fixed = 4 * (40 * 100 + 40) if projection == "orthogonal" else 3 * 128 + 4 * (40 + 40)
    assert unique_bytes(layer) == trained + fixed
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    state = sum(t.nbytes for held in optimizer.state.values() for t in held.values() if t.ndim)
    assert state == 2 * trained


def test_a_saved_bundle_loads_by_itself(tmp_path: Any) -> None:
    model = nn.Sequential(made({"projection": "hadamard"}, dtype=torch.bfloat16), nn.ReLU())
    twin = quernel.load(save_model(model, tmp_path), model=lambda: nn.Sequential(nn.Identity(), nn.ReLU()))
    x = torch.randn(3, 7)
    assert torch.equal(twin(x), model(x))
    assert twin[0].weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((7, 5, 0), {}, "n_features must be an integer in"),
        ((0, 5, 4), {}, "in_features must be"),
        ((7, 0, 4), {}, "out_features must be"),
        ((7, 5, 4), {"kind": "gelu"}, "kind must be one of 'relu', 'urf'"),
        ((7, 5, 4), {"projection": "dense"}, "projection must be one of"),
        ((7, 5, 4), {"kind": "urf", "activation": "gelu"}, "no integrable Fourier transform; use kind='relu'"),
        ((7, 5, 5), {"kind": "urf"}, "needs an even n_features"),
        ((7, 5, 4), {"kind": "urf", "threshold": 1.0}, "threshold is for kind='relu'"),
        ((7, 5, 4), {"kind": "urf", "damping": -1.0}, "damping must be"),
        ((7, 5, 4), {"threshold": float("nan")}, "threshold must be"),
        ((7, 5, 4), {"activation": "cos"}, "activation must be one of"),
        ((7, 5, 4), {"dtype": torch.int8}, "dtype must be one of"),
        ((7, 5, 4), {"bias": 1}, "bias must be bool"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        SNNKLinear(*arguments, **options)


def test_bad_inputs_are_named() -> None:
    layer = made({})
    with pytest.raises(QuernelError, match=r"x must have 7 features; got shape \(2, 8\)"):
        layer(torch.zeros(2, 8))
    with pytest.raises(QuernelError, match="x must have 7 features"):
        made({"projection": "hadamard"})(torch.zeros(2, 8))
    with pytest.raises(QuernelError, match=r"x has rows of length up to 70.*Normalise"):
        made({"kind": "urf"})(torch.full((1, 7), 70.0 / 7**0.5))
    with pytest.raises(QuernelError, match="x holds NaN or infinity"):
        layer.fit([(torch.full((2, 7), float("nan")), torch.zeros(2, 5))])
    with pytest.raises(QuernelError, match="following must read 5 features; it reads 4"):
        layer.bundle(nn.Linear(4, 2))
    with pytest.raises(QuernelError, match="following must be Linear"):
        layer.bundle(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="activation must be one of"):
        SNNKLinear.from_linear(nn.Linear(7, 5), "swish", 4)
    with pytest.raises(QuernelError, match="use kind='relu'"):
        SNNKLinear.from_linear(nn.Linear(7, 6), "gelu", 4, kind="urf")
    with pytest.raises(QuernelError, match="data must be readable more than once; got a generator"):
        SNNKLinear.from_linear(nn.Linear(7, 5), "gelu", 4, data=(torch.ones(2, 7) for _ in range(2)))
    with pytest.raises(QuernelError, match="linear must be Linear"):
        SNNKLinear.from_linear(nn.ReLU(), "gelu", 4)  # type: ignore[arg-type]
