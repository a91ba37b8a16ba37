"""Peak memory of long convolutions, measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

START = """
import re, time
from pathlib import Path
import torch
from quernel.nn import SGConv
from quernel.nn.functional import fft_conv

torch.set_num_threads(2)

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def naive(u, k):
    n = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : u.shape[-1]]

def train(convolve, batch, length):
    u, k = torch.ones(batch, 64, length, requires_grad=True), torch.ones(64, length, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = status("VmRSS")
    convolve(u, k).square().sum().backward()
    return status("VmHWM") - before
"""
TRAINED = START + "train({0}, 1, 64)\nprint(train({0}, 4, 16384))\n"
MILLION = (
    START
    + """
layer, x = SGConv(16, 1 << 20).eval(), torch.ones(1, 1 << 20, 16)
start = time.perf_counter()
with torch.inference_mode():
    layer(x)
print(time.perf_counter() - start, status("VmHWM"))
"""
)
needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


def printed(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
@needs_linux
def test_training_takes_at_most_three_fifths_of_the_plain_expression() -> None:
    (ours,), (plain,) = printed(TRAINED.format("fft_conv")), printed(TRAINED.format("naive"))
    assert 0 < ours <= 0.6 * plain


@pytest.mark.slow
@needs_linux
def test_a_million_tokens_take_less_than_three_gigabytes_and_ten_seconds() -> None:
    seconds, peak_mb = printed(MILLION)
    assert peak_mb <= 3072
    assert seconds <= 10
