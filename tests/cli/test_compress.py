"""``quernel compress`` on a small model of one's own: methods, search, saving, dry run, and every bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import quernel
from quernel.cli import main
from quernel.report import Report

FACTORY = """
import torch
from torch import nn

def build():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

def number():
    return 3
"""
# One value in int8 against four bytes in float32; a few bytes a row for scales.
INT8_SHARE = 0.35


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model factory, its data and its weights, as the current one."""
    (tmp_path / "toy_net.py").write_text(FACTORY, encoding="utf-8")
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def test_a_method_with_everything(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compress", "toy_net:build", "--method", "weight-int8", "--data", "x.npz"]
    assert main([*arguments, "--out", "small", "--report", "r.html", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_after"] < INT8_SHARE * found["bytes_before"]
    assert found["metric"] == "fidelity"
    assert found["metric_after"] <= found["metric_before"] == 1.0
    assert [layer["name"] for layer in found["layers"]] == ["0", "2"]
    assert {"latency_ms_before", "latency_ms_after", "methods"} <= set(found)
    assert "<html" in Path("r.html").read_text(encoding="utf-8")
    loaded = quernel.load("small", model=_build)
    x = torch.from_numpy(np.load("x.npz")["x"])
    with torch.no_grad():
        assert loaded(x).shape == (64, 4)


def test_text_and_json_reports(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "toy_net:build", "-m", "cast", "--report", "r.json"]) == 0
    assert "toy_net:build" in capsys.readouterr().out
    report = Report.load_json("r.json")
    assert report.bytes_after * 2 == report.bytes_before
    assert report.metric is None


def test_options_selection_and_dry_run(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compress", "toy_net:build", "-m", "cast", "-o", "cast.dtype=float16", "--include", "0", "--dry-run"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {layer["name"]: layer["action"] for layer in found["layers"]} == {"0": "float16", "2": "keep"}
    assert found["bytes_after"] == found["bytes_before"]
    assert found["title"].endswith("(dry run)")
    assert "the layers say what each would get" in found["warnings"][0]


def test_weights_are_used(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _build()
    nn.init.zeros_(model[0].weight)
    save_file(model.state_dict(), "w.safetensors")
    assert main(["compress", "toy_net:build", "-m", "cast", "--weights", "w.safetensors", "--out", "small"]) == 0
    assert float(quernel.load("small", model=_build).state_dict()["0.weight.values"].abs().max()) == 0.0


def test_a_saved_model_of_an_own_class_is_taken_and_goes_on(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _build()
    nn.init.zeros_(model[0].weight)
    quernel.models.save(model, "mine")
    words = ["compress", "toy_net:build", "-m", "weight-int8", "--json"]
    assert main([*words, "--include", "0", "--weights", "mine", "--out", "small"]) == 0
    assert float(quernel.load("small", model=_build)[0].weight.dense().abs().max()) == 0.0
    capsys.readouterr()
    assert main([*words, "--weights", "small"]) == 0
    assert {row["name"]: row["action"] for row in json.loads(capsys.readouterr().out)["layers"]}["2"] == "int8 weight"
    assert main(["compress", "mine", "-m", "cast"]) == 2
    assert "--weights with this folder" in capsys.readouterr().err


def test_search_keeps_its_budget_and_resumes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compress",
        "toy_net:build",
        "--data",
        "x.npz",
        "--budget",
        "bytes=0.6,drop=0.05",
        "-m",
        "cast,weight-int8",
    ]
    assert main([*arguments, "--resume", "trials", "--json"]) == 0
    out, err = capsys.readouterr()
    first = json.loads(out)
    assert err.splitlines()[:3] == ["1: Cast", "2: WeightInt8", "3: WeightInt8 + Cast"]
    assert first["satisfied"] is True
    assert sum(trial["chosen"] for trial in first["trials"]) == 1
    before = sorted(Path("trials").rglob("*"))
    assert before
    assert main([*arguments, "--resume", "trials", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert [t["key"] for t in again["trials"]] == [t["key"] for t in first["trials"]]
    assert sorted(Path("trials").rglob("*")) == before


def test_a_budget_that_cannot_be_met_gives_the_best_and_fails(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compress",
        "toy_net:build",
        "--data",
        "x.npz",
        "--budget",
        "bytes=0.01",
        "-m",
        "weight-int8",
        "--out",
        "small",
    ]
    assert main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["satisfied"] is False
    assert "was not met; best found" in err
    assert quernel.load("small", model=_build) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "say how: --method"),
        ("-m nosuch", "--method must be one of cast"),
        ("-m cast -o dtype=float16", "--option must read METHOD.NAME=VALUE"),
        ("-m cast -o weight-int8.x=1", "which --method does not name"),
        ("-m cast -o cast.nosuch=1", "cast has no option nosuch; it has: dtype"),
        ("-m cast -o cast.dtype=int3", "dtype must be one of"),
        ("--budget bytes=much --data x.npz", "bytes must be a number"),
        ("--budget drop=-1 --data x.npz", "drop must be a finite number"),
        ("--budget size=1 --data x.npz", "budget must hold bytes="),
        ("--budget bytes=0.5", "no data set belongs to Sequential"),
        ("--budget bytes=0.5 --dry-run --data x.npz", "--dry-run plans methods"),
        ("-m cast --dry-run --out small", "--dry-run makes no model"),
        ("-m cast --resume trials", "--resume continues a search"),
        ("-m cast --report r.pdf", "--report must end in .html or .json"),
        ("-m cast --report nosuch/r.html", "does not exist"),
        ("-m cast --data nosuch.npz", "nosuch.npz"),
        ("-m cast --weights nosuch.safetensors", "nosuch.safetensors: the file is missing"),
        ("-m crossquant", "needs data"),
        ("-m weight-int8 --include nosuch", "nothing to compress"),
    ],
)
def test_bad_input(arguments: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "toy_net:build", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("small").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nosuch", "model must be a bundled name"),
        ("nosuch_module:build", "cannot import 'nosuch_module'"),
        ("toy_net:nosuch", "has no function 'nosuch'"),
        ("toy_net:number", "must give an nn.Module; got int"),
        (".", "neither config.json nor modules.json"),
    ],
)
def test_bad_source(source: str, message: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", source, "-m", "cast"]) == 2
    assert message in capsys.readouterr().err


def test_damaged_weights_and_empty_data(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(_build().state_dict(), "w.safetensors")
    whole = Path("w.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file(nn.Sequential(nn.Linear(16, 32)).state_dict(), "other.safetensors")
    np.savez("empty.npz", x=np.zeros((0, 16), np.float32))
    for arguments in (["--weights", "cut.safetensors"], ["--weights", "other.safetensors"], ["--data", "empty.npz"]):
        assert main(["compress", "toy_net:build", "-m", "cast", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert arguments[1] in err
