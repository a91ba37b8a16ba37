"""``quernel advise``: shapes, budgets, models and folders; text, JSON and page; every bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quernel import models
from quernel.cli import main


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["advise", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


SHAPE = ("--width", "128", "--depth", "50", "--activation", "relu", "--outputs", "10")


def test_a_shape_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, *SHAPE)
    assert found["class"] == "scale-invariant" and found["C_W"] == 2 and found["C_b"] == 0 and found["K_star"] is None
    assert found["r"] == 50 / 128 and found["r_star"] == pytest.approx(0.016)
    assert found["depth"] == 50 and found["width"] == 128 and len(found["rates"]) == len(found["kernels"]) == 50
    assert found["warnings"] and found["title"] == "relu network of 50 layers, width 128"


def test_a_shape_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *SHAPE]) == 0
    out, err = capsys.readouterr()
    for word in ("scale-invariant", "r*", "0.016", "chaos from depth", "learning rates", "/ fan-in"):
        assert word in out
    assert err.startswith("warning: r = 0.39 is above 1 / nu = 0.2")


def test_a_budget_and_a_skip_connection(capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(
        capsys,
        *("--params", "200000", "--inputs", "64", "--outputs", "10", "--activation", "tanh", "--residual", "0.5"),
    )
    assert found["parameters"] <= 200_000 and found["residual"] == 0.5
    assert found["r_range"][0] < found["r"] < found["r_range"][1]


@pytest.mark.parametrize("activation", ["gelu", "sigmoid"])
def test_a_page(activation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "advice.html"
    words = ("--width", "64", "--depth", "8", "--activation", activation, "--outputs", "10", "--report", str(file))
    assert main(["advise", *words]) == 0
    assert "report: " in capsys.readouterr().err
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "Quernel advice" in page
    assert page.count("<polyline") == (3 if activation == "gelu" else 0)
    assert ("nu l / n" in page) == (activation == "gelu")
    assert ("has no" in page or "Take tanh" in page) == (activation == "sigmoid")


def test_a_saved_folder_whose_functions_are_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models.save(models.DigitsCNN(), tmp_path / "net")
    found = _json(capsys, str(folder))
    assert found["activation"] == "relu" and found["depth"] == 5 and found["outputs"] == 10
    assert any("BatchNorm2d" in warning for warning in found["warnings"])
    assert found["present_C_W"] > 0


def test_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some_nets.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = _json(capsys, "some_nets:build")
    assert found["class"] == "K*=0" and found["depth"] == 2 and found["width"] == 20


@pytest.mark.slow
def test_bundled_and_transformers_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    found = _json(capsys, "digits-cnn")
    assert found["activation"] == "relu" and found["warnings"]
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng(devices=[]):
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    found = _json(capsys, str(tmp_path / "bert"))
    assert "gelu" in found["activation"] and found["depth"] == 13
    text = " ".join(found["warnings"])
    for word in ("LayerNorm left out", "Embedding left out: a look-up has no fan-in", "stand side by side"):
        assert word in text
    assert text.startswith("attention is outside of the theory")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a model, or a shape"),
        (("--width", "8", "--activation", "relu"), "name a model, or a shape"),
        (("--depth", "8", "--activation", "relu", "--outputs", "2"), "lacks --inputs (where --width is not given)"),
        (("--params", "5"), "which lacks --activation and --outputs and --inputs"),
        (("--width", "-1", "--depth", "3"), "--width must be an integer"),
        (("--width", "8", "--outputs", "-3"), "--outputs must be an integer"),
        (("--activation", "nope", "--width", "10"), "activation must be a callable or one of"),
        (
            ("--width", "8", "--params", "500", "--activation", "relu", "--outputs", "2"),
            "--params is a budget for which depth and width are chosen",
        ),
        (("digits-cnn", "--width", "8"), "--width: a model has its shape"),
        (("--width", "8", "--activation", "rleu", "--outputs", "2"), "activation must be a callable or one of"),
        (("--width", "0", "--inputs", "4", "--activation", "relu", "--outputs", "2"), "width must be an integer"),
        (("--width", "8", "--activation", "relu", "--outputs", "2", "--report", "a.txt"), "--report must be a FILE"),
        (("--width", "8", "--activation", "relu", "--outputs", "2", "--residual", "1"), "residual must be a finite"),
        (("--width", "8", "--activation", "sigmoid", "--outputs", "2"), "'sigmoid' has no critical initialisation"),
        (("no-such-model",), "model must be a bundled name"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
