"""Triton kernels of tile maps, interpreted on the CPU, against the compiled passes; and that they compile for a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quernel.hashing import TileMap
from quernel.nn import RoastLinear, SharedArray
from quernel.nn import _tile_ops as ops
from quernel.nn import _tile_plain as plain
from quernel.nn._tile_ops import TileOperands
from tests.triton_process import check_compiles, interpreted, needs_triton, outside, passed_interpreted

pytestmark = needs_triton
# Sums of some hundred products in float32, in another order; rounding of half precision.
CLOSE, COARSE = 1e-4, 2e-2
# (size, shape, tile): ragged both ways, a single tile, tiles larger than the matrix, tiles that are not square.
SHAPES = [
    (9000, (70, 100), (32, 32)),
    (256, (16, 16), (16, 16)),
    (5000, (3, 5), (64, 64)),
    (3000, (40, 300), (16, 128)),
]
KINDS: list[dict[str, Any]] = [{}, {"signs": False}, {"order": "k-major"}]
every_map = pytest.mark.parametrize(("size", "shape", "tile"), SHAPES, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)

TILES = {"SIGNED": True, "HIGH": 32, "WIDE": 64, "BY_COLUMNS": True}
MATMUL = {"PRECISION": "ieee", "BATCH": 16}
CONSTANTS: dict[str, dict[str, Any]] = {
    "linear": {"BIASED": True, "TILES": 3, **MATMUL},
    "input": {"TILES": 3, **MATMUL},
    "memory": {"STEPS": 2, **MATMUL},
    "expand": {},
    "scatter": {},
}
TYPES = dict.fromkeys(("batch", "size", "rows", "columns"), "i32") | {"scale": "fp32", "seed": "i64", "dm": "*fp32"}
COMPILED = {name: (TILES | given, TYPES, "*bf16") for name, given in CONSTANTS.items()}


@pytest.fixture(scope="module")
def kernels() -> Any:
    return importlib.import_module("quernel.nn._tile_triton")


@pytest.mark.slow
@outside
def test_kernels_interpreted() -> None:
    assert passed_interpreted(__file__) >= 20


def case(size: int, shape: Any, tile: Any, kind: Any, batch: int = 20) -> tuple[TileOperands, tuple[Tensor, ...]]:
    tiles = TileOperands.of(TileMap(size, shape, tile, seed=-5, **kind))
    generator = torch.Generator().manual_seed(0)
    shapes = ((size,), (batch, shape[1]), (batch, shape[0]), (shape[0],), tuple(shape))
    return tiles, tuple(torch.randn(held, generator=generator) for held in shapes)


def same(got: Any, wanted: Any, close: float = CLOSE) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close * float(b.abs().max()) if b.numel() else 0.0)


@interpreted
@every_map
@every_kind
@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_are_the_compiled_passes(kernels: Any, size: int, shape: Any, tile: Any, kind: Any) -> None:
    tiles, (memory, x, grad, bias, w) = case(size, shape, tile, kind)
    map_, given = tiles.operands, tiles.arguments
    assert kernels.takes(map_, memory, x)
    assert torch.equal(kernels.expand(map_, memory), ops._expand(memory, *given))
    same([kernels.scatter(map_, w)], [ops._scatter(w, *given)])
    for b in (bias, None):
        same([kernels.linear(map_, x, memory, b, 0.7)], [ops._linear(x, memory, b, 0.7, *given)])
    wanted = ops._linear_backward(grad, x, memory, 0.7, [True, True], *given)
    got = kernels.input_gradient(map_, grad, memory, 0.7), kernels.memory_gradient(map_, grad, x, 0.7)
    same(got, wanted)


@interpreted
@pytest.mark.parametrize("batch", [0, 1, 17, 700])
def test_batches_of_any_size(kernels: Any, batch: int) -> None:
    tiles, (memory, x, grad, _, _) = case(9000, (40, 50), (32, 32), {}, batch)
    map_, given = tiles.operands, tiles.arguments
    same([kernels.linear(map_, x, memory, None, 1.0)], [ops._linear(x, memory, None, 1.0, *given)])
    wanted = ops._linear_backward(grad, x, memory, 1.0, [True, True], *given)
    same((kernels.input_gradient(map_, grad, memory, 1.0), kernels.memory_gradient(map_, grad, x, 1.0)), wanted)


@interpreted
def test_half_precision_adds_in_float32(kernels: Any) -> None:
    tiles, held = case(9000, (70, 100), (32, 32), {})
    memory, x, grad, bias, _ = (t.half() for t in held)
    map_, given = tiles.operands, tiles.arguments
    wide = ops._linear_backward(grad.float(), x.float(), memory.float(), 1.0, [True, True], *given)
    total = kernels.memory_gradient(map_, grad, x, 1.0)
    assert total.dtype is torch.float32
    same([total], [wide[1]])
    y, dx = kernels.linear(map_, x, memory, bias, 1.0), kernels.input_gradient(map_, grad, memory, 1.0)
    assert y.dtype is dx.dtype is torch.float16
    same([y.float()], [ops._linear(x.float(), memory.float(), bias.float(), 1.0, *given)], COARSE)
    same([dx.float()], [wide[0]], COARSE)


@interpreted
def test_bfloat16_is_moved_and_added(kernels: Any) -> None:
    # Its products are for a GPU: the interpreter multiplies the bits of bfloat16 as integers.
    tiles, (memory, *_, w) = case(9000, (70, 100), (32, 32), {})
    map_, given, half = tiles.operands, tiles.arguments, memory.bfloat16()
    assert torch.equal(kernels.expand(map_, half), ops._expand(half, *given))
    same([kernels.scatter(map_, w.bfloat16())], [ops._scatter(w.bfloat16().float(), *given)])


@interpreted
def test_what_ops_of_other_devices_call(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, (memory, x, grad, bias, w) = case(9000, (70, 100), (32, 32), {})
    given = tiles.arguments
    monkeypatch.setattr(plain, "fused", lambda *arguments: kernels)
    monkeypatch.setattr(plain, "expand", None)  # nothing else is reached
    same([ops._linear_plain(x, memory, bias, 0.7, *given)], [ops._linear(x, memory, bias, 0.7, *given)])
    for wanted in ([True, True], [True, False], [False, True]):
        arguments = (grad, x, memory, 0.7, wanted, *given)
        same(ops._linear_backward_plain(*arguments), ops._linear_backward(*arguments))
    same([ops._expand_plain(memory, *given)], [ops._expand(memory, *given)])
    same([ops._scatter_plain(w, *given)], [ops._scatter(w, *given)])


@interpreted
def test_what_is_left_to_torch(kernels: Any) -> None:
    tiles, (memory, x, *_) = case(9000, (70, 100), (32, 32), {})
    assert plain.fused(*tiles.arguments, x, memory) is None  # no GPU
    for tile in ((8, 32), (32, 24), (1, 1)):
        assert not kernels.takes(TileMap(9000, (70, 100), tile).operands(), x)
    assert not kernels.takes(tiles.operands, x.double())
    assert not kernels.takes((2**31, *tiles.operands[1:]), x)
    given = TileMap.explicit(np.zeros((1, 1), np.int64), 2000, (30, 30), (32, 32))
    assert plain.fused(*TileOperands.of(given).arguments, x) is None


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    check_compiles("quernel.nn._tile_triton", COMPILED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_layers_on_a_gpu_equal_those_on_the_cpu() -> None:
    layer, x = RoastLinear(300, 200, memory=SharedArray(5000, seed=1)), torch.randn(50, 300)
    wanted = layer(x)
    wanted.square().sum().backward()
    by_cpu, layer.memory.values.grad = layer.memory.values.grad, None
    got = layer.cuda()(x.cuda())
    got.square().sum().backward()
    same([got.cpu(), layer.memory.values.grad.cpu()], [wanted, by_cpu], 1e-3)
