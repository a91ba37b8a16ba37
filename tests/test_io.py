"""The folder format: round trips, commit order under kill -9, and every kind of damage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from quernel._errors import FormatError, QuernelError
from quernel._io import CONFIG, digest_of, read_folder, write_folder
from quernel._load import load, save_model


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_round_trip_keeps_values_dtypes_and_aliases(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared, "c": shared.T, "d": torch.ones(2, dtype=torch.bfloat16), "e": torch.empty(0)}
    write_folder(tmp_path, {"kind": "test"}, tensors)
    back = read_folder(tmp_path).tensors
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    assert back["a"] is back["b"] and back["c"] is not back["a"]


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path):
    def build():
        model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
        model[1].weight = model[0].weight
        return model

    save_model(build(), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.5 * 50 * 8 * 4
    back = load(tmp_path, model=build)
    assert back[1].weight is back[0].weight


def test_foreign_keys_of_config_are_kept(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"model_type": "bert"}))
    write_folder(tmp_path, {}, {})
    write_folder(tmp_path, {"again": True}, {})
    assert json.loads((tmp_path / CONFIG).read_text())["model_type"] == "bert"


def test_content_is_digested_as_a_reader_sees_it(tmp_path):
    write_folder(tmp_path, {"names": {i: str(i) for i in range(12)}, "pair": (1, 2)}, {}, foreign={2: "b", "a": 1})
    folder = read_folder(tmp_path)
    assert folder.content == {"names": {str(i): str(i) for i in range(12)}, "pair": [1, 2]}
    assert folder.foreign == {"2": "b", "a": 1}
    with pytest.raises(QuernelError, match="content must be JSON"):
        write_folder(tmp_path, {"x": {1, 2}}, {})


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-0123456789abcdef.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "modules.json",
    ],
)
@pytest.mark.parametrize("config", [None, '{"model_type": "bert"}'])
def test_folder_with_weights_of_others_is_refused_and_untouched(tmp_path, name, config):
    if config:
        (tmp_path / CONFIG).write_text(config)
    if name.endswith(".safetensors"):
        safetensors.torch.save_file({"x": torch.ones(2)}, tmp_path / name, metadata={"format": "pt"})
    else:
        (tmp_path / name).write_bytes(b"theirs")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(QuernelError, match="did not save"):
        save_model(small(), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_own_leftover_of_a_killed_first_save_is_replaced(tmp_path):
    write_folder(tmp_path, {}, {"x": torch.ones(2)})
    (tmp_path / CONFIG).unlink()
    write_folder(tmp_path, {}, {"x": torch.zeros(3)})
    assert torch.equal(read_folder(tmp_path).tensors["x"], torch.zeros(3))


def test_second_save_replaces_the_first_and_leaves_no_old_tensors(tmp_path):
    for value in (1.0, 2.0, 3.0):
        write_folder(tmp_path, {}, {"x": torch.full((4,), value)})
        assert torch.equal(read_folder(tmp_path).tensors["x"], torch.full((4,), value))
        assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        (lambda d: d.pop("quernel"), "quernel"),
        (lambda d: d["quernel"].update(format=99), "format"),
        (lambda d: d["quernel"]["content"].update(kind="other"), "digest"),
        (lambda d: _redigest(d, lambda q: q["tensors"].update(file="../secret")), "file"),
        (lambda d: _redigest(d, lambda q: q["tensors"].update(file="absent.safetensors")), "missing"),
        (lambda d: _redigest(d, lambda q: q["tensors"].update(sha256="0")), "sha256"),
        (lambda d: _redigest(d, lambda q: q["tensors"].update(aliases={"x": "nowhere"})), "aliases"),
        (lambda d: _redigest(d, lambda q: q.update(content=[])), "content"),
        (lambda d: _redigest(d, lambda q: q["content"].update(architecture=3)), "architecture"),
        (
            lambda d: _redigest(
                d, lambda q: q["content"]["modules"].update({"0": {"class": "os.system", "config": {}}})
            ),
            "0",
        ),
        (
            lambda d: _redigest(
                d, lambda q: q["content"]["modules"].update({"9": {"class": "torch.Linear", "config": {}}})
            ),
            "9",
        ),
        (lambda d: _redigest(d, lambda q: q["content"]["modules"]["0"].update({"class": "torch.Transformer"})), "0"),
        (lambda d: _redigest(d, lambda q: q["content"]["modules"]["0"]["config"].update(in_features=7)), "0.weight"),
    ],
)
def test_damage_is_refused_by_file_and_field(tmp_path, damage, field):
    save_model(small(), tmp_path)
    document = json.loads((tmp_path / CONFIG).read_text())
    damage(document)
    (tmp_path / CONFIG).write_text(json.dumps(document))
    with pytest.raises(FormatError, match=field.replace(".", r"\.")) as caught:
        load(tmp_path, model=small)
    assert str(tmp_path) in str(caught.value)


def _redigest(document, change):
    subtree = document["quernel"]
    change(subtree)
    subtree["digest"] = digest_of({k: v for k, v in subtree.items() if k != "digest"})


@pytest.mark.parametrize("keep", [0, 3, 9, 100, -1])
def test_truncated_tensors_are_refused(tmp_path, keep):
    save_model(small(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        load(tmp_path, model=small)


def test_unknown_architecture_asks_for_the_model(tmp_path):
    save_model(small(), tmp_path)
    with pytest.raises(ValueError, match="model="):
        load(tmp_path)


def test_non_persistent_buffers_are_rebuilt_and_keep_their_dtype(tmp_path):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(4.0), persistent=False)
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x * self.table)

    model = Rotary()
    model.table = model.table.to(torch.bfloat16)
    save_model(model, tmp_path)
    back = load(tmp_path, model=Rotary)
    assert back.table.dtype == torch.bfloat16 and torch.equal(back.table, model.table)


WRITER = """
import sys, torch
from quernel._io import write_folder
value = 0.0
while True:
    value += 1
    write_folder(sys.argv[1], {"value": value}, {"x": torch.full((200_000,), value)})
    sys.stdout.write("."); sys.stdout.flush()
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.013, 0.05])
def test_kill_9_leaves_the_old_object_or_the_new_one(tmp_path, delay_s):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    for _ in range(3):  # at least three whole saves happened
        writer.stdout.read(1)
    time.sleep(delay_s)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    folder = read_folder(tmp_path)
    assert float(folder.tensors["x"][0]) == float(folder.tensors["x"][-1]) == folder.content["value"]
    write_folder(tmp_path, {}, {"x": torch.zeros(3)})
    assert len(list(Path(tmp_path).glob("*.safetensors"))) == 1
    assert torch.equal(read_folder(Path(tmp_path)).tensors["x"], torch.zeros(3))


def test_scratch_of_killed_saves_goes_with_a_later_save_once_it_is_old(tmp_path):
    write_folder(tmp_path, {}, {})
    old, new, foreign = (
        tmp_path / name for name in (".config.json.12.tmp", ".model.safetensors.13.tmp", ".notes.1.tmp")
    )
    for file in (old, new, foreign):
        file.write_bytes(b"half")
    for file in (old, foreign):
        os.utime(file, (0, 0))
    write_folder(tmp_path, {}, {})
    assert (old.exists(), new.exists(), foreign.exists()) == (False, True, True)


def test_a_folder_that_nothing_was_saved_in_says_so(tmp_path):
    with pytest.raises(FormatError, match="its first save was interrupted"):
        read_folder(tmp_path)
