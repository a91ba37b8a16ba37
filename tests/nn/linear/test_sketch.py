"""``SketchLayer``: answers by the oracle in every storage, a table that trains, gradients of the bag."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernel import testing
from quernel._errors import QuernelError
from quernel.nn import SketchLayer
from quernel.nn.weights import unique_bytes
from tests.reference import sketch as oracle

KINDS = [
    {},
    {"kernel": "l1", "n_cells": 8},
    {"kernel": "angular", "n_cells": None, "n_concat": 4},
    {"kernel": "angular", "directions": "sparse"},
    {"directions": "sparse", "n_concat": 3},
]
every_kind = pytest.mark.parametrize("options", KINDS, ids=str)


def made(bits: int = 32, **options) -> SketchLayer:
    layer = SketchLayer(7, 3, 128, generator=torch.Generator().manual_seed(0), **options)
    return layer if bits == 32 else layer.rounded(bits)  # type: ignore[arg-type]


@every_kind
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_answers_are_those_of_the_oracle(options, bits: int) -> None:
    layer, x = made(bits, **options), torch.randn(9, 7)
    codes = layer.cells.fused.cells((x @ layer.projection.T + layer.shift).contiguous().numpy())
    held = [getattr(layer, name).detach().numpy() for name in ("table", "scale")]
    wanted = oracle.read(*held, codes, layer.bias.detach().numpy())
    # Where a hidden number is rounded otherwise a cell may change: not seen for these nine rows.
    np.testing.assert_allclose(layer.eval()(x).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        np.testing.assert_allclose(layer(x).numpy(), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.predictor()(x.numpy()), wanted, rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("bits", [32, 8])
def test_conformance_of_every_kind(options, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    example = {"make": lambda: made(bits, **options), "input": lambda g: (torch.randn(4, 7, generator=g),)}
    monkeypatch.setattr(SketchLayer, "_quernel_example", staticmethod(lambda: example))
    checks = testing.checks_for("module")
    for name in ("outputs", "batch_independence", "gradients", "copy", "config_round_trip", "save_and_load"):
        checks[name](SketchLayer)


def test_the_table_gets_the_gradients_of_an_embedding_bag() -> None:
    layer, x = made(), torch.randn(5, 7)
    layer(x).sum().backward()
    assert float(layer.table.grad.sum()) == 5 * 128 * 3
    assert layer.table.grad.amax() <= 5
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), 5.0))


def test_a_table_learns() -> None:
    layer, x = SketchLayer(2, 1, 64, 16, 2, width=1.0, generator=torch.Generator().manual_seed(0)), torch.randn(500, 2)
    y = x.abs().sum(1, keepdim=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    assert (layer(x) - y).square().mean() < 0.1 * y.var()


def test_bytes_are_those_of_the_formula() -> None:
    assert unique_bytes(made()) == 4 * (128 * 16 * 3 + 16 * 8 + 3)
    assert unique_bytes(made(8)) == 128 * 16 * 3 + 4 * (128 + 16 * 8 + 3)
    assert unique_bytes(made(16)) - unique_bytes(made(8)) == 128 * 16 * 3


def test_any_leading_shape_and_dtype() -> None:
    layer, x = made().eval(), torch.randn(2, 3, 7)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer(x.flatten(0, 1)).reshape(2, 3, 3))
        torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])
        assert layer(x.double()).dtype == torch.float64
        assert layer.double()(x.double()).dtype == torch.float64
    assert layer(x.double()).shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: SketchLayer(7, 3, n_cells=1), "n_cells"),
        (lambda: SketchLayer(0, 3), "in_features"),
        (lambda: SketchLayer(7, 3, proj_dim=0), "dim"),
        (lambda: made(8).rounded(8), "bits"),
        (lambda: made().rounded(4), "bits"),
        (lambda: made(8).reset_parameters(), "8 bits"),
        (lambda: made()(torch.ones(2, 6)), "x must"),
        (lambda: made()(torch.ones(2, 7, dtype=torch.int64)), "x must"),
        (lambda: made()(torch.full((2, 7), float("nan"))), "row 0"),
        (lambda: made().predictor()(np.ones((2, 6))), "rows must"),
    ],
)
def test_bad_input_is_named(call, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        call()
