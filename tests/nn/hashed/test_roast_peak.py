"""Training memory of a network of 50 million virtual weights, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_MB = 60
CHILD = """
import re, sys
from pathlib import Path
import torch
from torch import nn
from quernel._load import save_model
from quernel.nn import RoastLinear, SharedArray, roast_param_groups

torch.set_num_threads(2)

def net(width, size):
    memory = SharedArray(size, seed=1)
    layers = [RoastLinear(width, width, memory=memory) for _ in range(3)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

def train(model, width):
    optimizer = torch.optim.Adam(roast_param_groups(model, 1e-3))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(16, width)).square().mean().backward()
        optimizer.step()

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

train(net(64, 2000), 64)  # libraries and compiled kernels are loaded before
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
before = status("VmRSS")
model = net(4096, 3 * 4096**2 // 100)
train(model, 4096)
print(status("VmHWM") - before)
folder = save_model(model, sys.argv[1])
print(sum(f.stat().st_size for f in folder.iterdir()) - 4 * sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_fifty_million_weights_train_in_sixty_megabytes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True)
    grown_mb, beside_bytes = (float(word) for word in done.stdout.split())
    assert 0 < grown_mb < LIMIT_MB
    # Numbers once, and a description.
    assert 0 < beside_bytes < 10_000
