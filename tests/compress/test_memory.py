"""Memory while compressing in place: at most the model, one layer and what a method keeps of the data.

Each method runs in a process of its own, on a model of 604 MB made for it; the peak is the kernel's own count.
Not here are methods that need minutes for a model of this size: low-rank factors by SVD, whose plans hold the factors,
fits of one-way filters, DGQ's search, whose codes wait for the last pass over the data, and feature merging, which
takes whole groups to float64.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A minute each on a quiet machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Model -> width and layers; all of the same size.
MODELS = {
    "linear": (4096, 9),
    "mlp": (4096, 9),
    "pointwise": (4096, 9),
    "conv": (128, 1024),
}
MODEL_BYTES = 9 * 4 * 4096**2
# The stored form of one layer and thread stacks: no layer of 67 MB hides in here.
SLACK = 2**25
# glibc gives every block back when it is freed: what is counted is what is held, and not what an allocator, which has
# as many arenas as threads and raises its own threshold as it goes, has kept for later.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

SCRIPT = """
import sys, torch
from pathlib import Path
from torch import nn
from quernel.compress import *

def status(field):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
    return int(line.split()[1]) * 1024

torch.manual_seed(0)
method, kind, width, layers = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def made(width, layers):
    def layer():
        if kind == "conv":
            return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU()]
        if kind == "pointwise":
            return [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return [nn.Linear(width, width, bias=False), *([nn.ReLU()] if kind == "mlp" else [])]
    return nn.Sequential(*(m for _ in range(layers) for m in layer())).requires_grad_(False).eval()
def inputs(width):
    return torch.randn(2, width, 4, 4) if kind in ("conv", "pointwise") else torch.randn(256, width)
# What is loaded and compiled once belongs to no model: a small one first, yet wide enough that every method changes it.
options = {"inplace": True, "finetune": (lambda model: None) if "finetune" in method.needs else None}
compress(made(256, 2), method, data=[inputs(256)], **options)
model, data = made(width, layers), [inputs(width)]
model(data[0])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
result = compress(model, method, data=data, **options)
sys.stdout.write(f"{status('VmHWM') - before} {result.report.bytes_after}")
"""

# Method -> model, and the bytes that it may keep besides: all that it has learned from the data, or what is said there.
METHODS = {
    "Cast('bfloat16')": ("linear", 0),
    "WeightInt8()": ("linear", 0),
    "WeightInt4()": ("linear", 0),
    # Maxima and a sample of the rows.
    "CrossQuant()": ("linear", 9 * 8 * 128 * 4096),
    "ShiftAdd(None, 'shift', 'shift')": ("linear", 0),
    # The sums of the regression, and the layers that they are solved for.
    "SNNK(n_features=128, bundle=False)": ("mlp", 9 * (8 * 128 + 8 * 4096 + 4 * 4096) * 128),
    "SparsePointwise(0.8)": ("pointwise", 0),
    "FactorizeConv(rank=1, mode='init')": ("conv", 0),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("method", METHODS)
def test_peak_is_the_model_one_layer_and_statistics(method):
    kind, kept = METHODS[method]
    width, layers = MODELS[kind]
    command = [sys.executable, "-c", SCRIPT, method, kind, str(width), str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ALLOCATOR)
    assert done.returncode == 0, done.stderr
    extra, after = map(int, done.stdout.split())
    assert after < MODEL_BYTES
    assert extra <= MODEL_BYTES // layers + kept + SLACK, f"{extra / 2**20:.0f} MB above the model"
