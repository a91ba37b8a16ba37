"""Memory of training by pairs, measured in a process of its own: kernels allocate past torch's profiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BATCH, LENGTH, DIM, WINDOW = 16, 512, 64, 64
CHILD = """
import re, sys
from pathlib import Path
import torch
from quernel.nn import PairConnect, PairTable

batch, length, dim, window, sparse, softmax = map(int, sys.argv[1:])
torch.set_num_threads(2)
options = {"normalise": "softmax", "n_heads": 2} if softmax else {}
layer = PairConnect(PairTable(5000, dim, vocab=100, sparse=bool(sparse)), window, **options)

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

layer(torch.zeros(2, 8, dtype=torch.long)).sum().backward()  # libraries and compiled kernels are loaded before
layer.zero_grad()
ids = torch.randint(0, 100, (batch, length))
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
before = status("VmRSS")
y = layer(ids)
forward = status("VmHWM") - before
y.sum().backward()
print(forward, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_training_takes_memory_of_tokens_not_of_pairs(sparse: bool, softmax: bool) -> None:
    sizes = map(str, (BATCH, LENGTH, DIM, WINDOW, int(sparse), int(softmax)))
    done = subprocess.run([sys.executable, "-c", CHILD, *sizes], capture_output=True, text=True, check=True)
    forward, whole = map(int, done.stdout.split())
    tokens = 4 * BATCH * LENGTH * DIM  # 2 MB: what the layer returns
    assert 0 < forward < 2 * tokens
    # Its gradient, that of the table, and what is known of one block of pairs: a few megabytes, whatever the batch.
    assert whole < 10 * tokens < tokens * WINDOW / 4
