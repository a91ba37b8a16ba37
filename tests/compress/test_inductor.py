"""Compressed models under torch's default compiler, which builds C++: every kind of inserted layer as a whole graph."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn

from quernel.compress import DGQ, SNNK, Cast, CrossQuant, Roast, ShiftAdd, WeightInt4, WeightInt8, WeLore, compress

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs a C++ compiler"),
]
# The compiler may fuse and reorder float32 sums; bfloat16 layers round at other places.
CLOSE, HALF = {"rtol": 1e-3, "atol": 1e-3}, {"rtol": 0.05, "atol": 0.05}


@pytest.mark.parametrize(
    "method",
    [
        Cast("bfloat16"),
        CrossQuant(),
        DGQ(),
        Roast(0.5),
        ShiftAdd(attention=None, mlp="shift"),
        SNNK(),
        WeLore(0.3),
        WeightInt4(),
        WeightInt8(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_the_default_compiler_takes_a_compressed_model_whole(method: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
        x = torch.randn(160, 64)
    model = compress(net, method, data=[x]).model
    with torch.inference_mode():
        wanted = model(x)
        got = torch.compile(model, fullgraph=True)(x)
    torch.compiler.reset()
    torch.testing.assert_close(got.float(), wanted.float(), **(HALF if isinstance(method, Cast) else CLOSE))
