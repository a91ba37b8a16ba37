"""A saved model in a process of its own: same class, same bytes, same outputs, same metric."""

import os
import subprocess
import sys

import pytest
import torch

from quernel import models
from quernel.compress import (
    DGQ,
    SNNK,
    Cast,
    CrossQuant,
    FeatureMerging,
    ShiftAdd,
    SparsePointwise,
    WeightInt4,
    WeightInt8,
    WeLore,
    compress,
)

SCRIPT = """
import sys, torch, quernel
from quernel.nn.weights import unique_bytes
folder, inputs, outputs = sys.argv[1:4]
model = quernel.load(folder)
batch = torch.load(inputs, weights_only=True)
with torch.inference_mode():
    y = model(**batch) if isinstance(batch, dict) else model(batch)
torch.save(y, outputs)
sys.stdout.write(f"{type(model).__name__} {unique_bytes(model)}")
"""


def in_a_fresh_process(result, batch, tmp_path):
    folder = result.save(tmp_path / "model")
    torch.save(batch, tmp_path / "in.pt")
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    name, size = done.stdout.split()
    assert name == type(result.model).__name__ and int(size) == result.report.bytes_after
    return torch.load(tmp_path / "out.pt", weights_only=True)


def outputs(model, batch):
    with torch.inference_mode():
        return model(**batch) if isinstance(batch, dict) else model(batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [
        [Cast()],
        [WeightInt8()],
        [WeightInt4()],
        [FeatureMerging(beta=1.0, max_ratio=0.5, refit=True), WeightInt8(), Cast()],
    ],
    ids=lambda methods: "+".join(type(m).__name__ for m in methods),
)
def test_digits_cnn(methods, tmp_path):
    model = models.load("digits-cnn")
    task = models.task(model, "digits")
    result = compress(model, methods, data=task.calibration, evaluate=task.judge)
    assert torch.equal(
        in_a_fresh_process(result, task.example_inputs, tmp_path), outputs(result.model, task.example_inputs)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [
        [CrossQuant()],
        [CrossQuant(alpha="auto", mode="fold")],
        [WeLore(0.2, budget="params", whiten=True), WeightInt8()],
        [SNNK(n_features=128), WeightInt8()],
        [DGQ(grid=(2, 6)), WeightInt4()],
        [ShiftAdd(None, "shift", "shift")],
        [SparsePointwise(0.8, fold_bn=False, linear=True)],
    ],
    ids=lambda methods: "+".join(type(m).__name__ for m in methods),
)
def test_minilm_without_any_data_set(methods, tmp_path):
    pytest.importorskip("transformers")
    model = models.load("minilm")
    batch = dict(model.tokenize([f"Sentence number {i} says something else." for i in range(16)]))
    result = compress(model, methods, data=[batch])
    assert torch.equal(in_a_fresh_process(result, batch, tmp_path), outputs(result.model, batch))
