"""The op of neighborhood attention: compiled kernels against torch's operations, threads, compilation, peak memory."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._timing import threads
from quernel.nn import _neighborhood_op as ops
from quernel.nn import _neighborhood_tiled as tiled
from quernel.nn.functional import na1d, na2d, na3d

# Sums of some hundred products in float32, in another order; and of gradients.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# Additional keys, then shape, windows, strides, dilations and causal flags.
GEOMETRIES = {
    "one axis": (0, 50, 9, 1, 1, 0),
    "strided, dilated, causal": (3, 41, 8, 3, 2, 1),
    "a grid": (0, 13, 10, 7, 4, 1, 2, 1, 2, 0, 0),
    "three axes": (2, 4, 6, 5, 2, 3, 5, 1, 2, 1, 2, 1, 1, 1, 0, 0),
    "many keys": (700, 30, 5, 1, 1, 0),
    "a long window": (0, 1300, 1201, 1, 1, 0),
}
# Batch, heads of queries and keys, D, Dv: whole vectors, remainders of every block, one number.
SIZES = [(2, 4, 2, 32, 16), (1, 3, 3, 21, 7), (1, 2, 1, 1, 1)]

PEAK = """
import re
from pathlib import Path
import torch
from quernel.nn.functional import na2d

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def inputs(side):
    return [torch.ones(1, side, side, 4, 32) for _ in range(3)]

na2d(*inputs(8), 7)  # libraries and compiled kernels are loaded before
q, k, v = inputs(128)
Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
before = status("VmRSS")
out = na2d(q, k, v, 7)
print(status("VmHWM") - before)
"""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operands(geometry: tuple[int, ...], sizes: tuple[int, ...]) -> list[Tensor]:
    batch, heads, groups, d, e = sizes
    extra, *rest = geometry
    tokens = int(torch.Size(rest[: len(rest) // 5]).numel())
    shapes = ((tokens, heads, d), (tokens + extra, groups, d), (tokens + extra, groups, e))
    draw = generator()
    return [torch.randn(batch, *shape, generator=draw).requires_grad_() for shape in shapes]


def run(leaves: list[Tensor], geometry: tuple[int, ...], backend: str) -> list[Tensor]:
    outputs = ops.neighborhood_attention(*leaves, geometry, 0.3, backend)
    weights = [torch.randn(x.shape, generator=generator(1)) for x in outputs]
    total = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_are_torchs_operations(name: str, sizes: tuple[int, ...]) -> None:
    geometry = GEOMETRIES[name]
    leaves = operands(geometry, sizes)
    assert ops.is_compiled("auto", leaves[0]) and not ops.is_compiled("torch", leaves[0])
    wanted = run(leaves, geometry, "torch")
    for got, want in zip(run(leaves, geometry, "auto"), wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_tiles_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES["strided, dilated, causal"]
    leaves = operands(geometry, SIZES[0])
    wanted = run(leaves, geometry, "torch")
    monkeypatch.setattr(tiled, "BUDGET", 1)
    for got, want in zip(run(leaves, geometry, "torch"), wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_bits_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "GRAIN", 1)
    geometry = GEOMETRIES["three axes"]
    leaves = operands(geometry, SIZES[0])
    held = []
    for count in (1, 2, 5):
        with threads(count):
            held.append(run(leaves, geometry, "auto"))
    assert all(torch.equal(a, b) for other in held[1:] for a, b in zip(held[0], other, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_op_keeps_its_promises(backend: str) -> None:
    geometry = GEOMETRIES["a grid"]
    leaves = operands(geometry, (1, 2, 1, 4, 3))
    torch.library.opcheck(ops.neighborhood_attention, (*leaves, geometry, 0.5, backend))


@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
def test_it_compiles_as_one_graph(backend: Any) -> None:
    x = torch.randn(1, 8, 9, 2, 4, generator=generator()).requires_grad_()

    def attend(x: Tensor) -> Tensor:
        return na2d(x, x * 2, x + 1, (3, 4), (1, 2), is_causal=(True, False), backend=backend).square().sum()  # type: ignore[union-attr]

    wanted = torch.autograd.grad(attend(x), x)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), wanted, **CLOSE)
    torch.compiler.reset()


@pytest.mark.slow
def test_it_compiles_by_inductor() -> None:
    q, k, v = (torch.randn(1, 40, 2, 8, generator=generator(i)) for i in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return na1d(q.sin(), k, v, 7, return_lse=True)

    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(q, k, v), attend(q, k, v), **CLOSE)
    torch.compiler.reset()


@pytest.mark.slow
def test_portable_and_vector_kernels_agree(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from quernel.nn.functional import na2d; g = torch.Generator().manual_seed(0);"
        "x = [torch.randn(1, 9, 11, 4, 24, generator=g).requires_grad_() for _ in range(3)];"
        "out = na2d(*x, 5); out.square().sum().backward();"
        "torch.save([out.detach(), *(t.grad for t in x)], sys.argv[1])"
    )
    held = []
    for portable in ("0", "1"):
        file = tmp_path / portable
        environment = os.environ | {"QUERNEL_PORTABLE": portable}
        subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=environment)
        held.append(torch.load(file, weights_only=True))
    torch.testing.assert_close(*held, **CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_sixteen_thousand_tokens_take_forty_megabytes() -> None:
    # With the output, which is 8 MB; a mask alone would be 268.
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 40


def test_warming_up_compiles_forward_and_backward() -> None:
    ops._warmup()
    for kernel in ("attend", "query_gradient", "key_gradient"):
        assert getattr(importlib.import_module("quernel.nn._neighborhood_kernels"), kernel).signatures


def test_rank_three_in_float64_is_torchs_operations() -> None:
    x = torch.randn(1, 3, 4, 5, 1, 2, dtype=torch.float64, generator=generator())
    assert not ops.is_compiled("auto", x)
    torch.testing.assert_close(na3d(x, x, x, 3, backend="tiled"), na3d(x, x, x, 3, backend="dense"))
