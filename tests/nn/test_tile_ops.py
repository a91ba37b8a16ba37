"""Tile ops against the definition: every shape, order, dtype and mode of the kernels; gradients; the general form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.hashing import TileMap
from quernel.nn import _tile_gradient as gradient
from quernel.nn import _tile_ops as ops
from quernel.nn import _tile_panels as panels
from quernel.nn import _tile_plain as plain
from quernel.nn._tile_ops import TileOperands, tile_conv2d, tile_expand, tile_linear, tile_rows, tile_scatter, tile_sums
from tests.reference import roast as oracle

CLOSE = 1e-5
# A sum of some hundred products in bfloat16 inputs.
COARSE = 2e-2
# (size, shape, tile): ragged both ways, single numbers, tiles larger than the matrix, runs across words of signs.
SHAPES = [
    (1, (1, 1), (1, 1)),
    (50, (17, 33), (1, 1)),
    (300, (17, 33), (4, 8)),
    (300, (17, 33), (3, 20)),
    (300, (17, 33), (5, 7)),
    (2000, (17, 33), (16, 64)),
    (9000, (10, 784), (32, 32)),
    (5000, (70, 100), (64, 64)),
    (400, (1, 129), (2, 40)),
    (400, (65, 1), (8, 16)),
]
every_shape = pytest.mark.parametrize(("size", "shape", "tile"), SHAPES, ids=str)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=seeded(seed)).to(dtype)


def operands(size: int, shape: Any, tile: Any, **options: Any) -> TileOperands:
    return TileOperands.of(TileMap(size, shape, tile, seed=5, **options))


@every_shape
@pytest.mark.parametrize("options", [{}, {"signs": False}, {"order": "k-major"}], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_expand_is_the_definition(size: int, shape: Any, tile: Any, options: dict[str, Any]) -> None:
    memory = numbers(size)
    if np.prod(shape) > 1000:  # the oracle takes 10 us a number; the map itself is tested against it
        mapped = TileMap(size, shape, tile, seed=5, **options)
        wanted = memory.numpy()[mapped.index()] * mapped.signs_of()
    else:
        wanted = oracle.weight(memory.numpy(), shape, tile, 5, **options)
    got = tile_expand(memory, operands(size, shape, tile, **options))
    assert np.array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [(3, 20), (1, 1)])
def test_expand_in_other_dtypes_moves_bits(dtype: torch.dtype, tile: Any) -> None:
    memory, tiles = numbers(300, dtype=dtype), operands(300, (17, 33), tile)
    assert torch.equal(tile_expand(memory, tiles).double(), tile_expand(memory.double(), tiles))


def test_given_maps(poisoned_memory: None) -> None:
    starts, signs = np.array([[0, 10], [3, 20], [5, 0]]), np.where(np.arange(15 * 9).reshape(15, 9) % 3, 1, -1)
    memory = numbers(60)
    for order in ("n-major", "k-major"):
        for flips in (None, signs.astype(np.int8)):
            mapped = TileMap.explicit(starts, 60, (15, 9), (5, 8), order=order, signs=flips)  # type: ignore[arg-type]
            wanted = memory.numpy()[mapped.index()] * mapped.signs_of()
            assert np.array_equal(tile_expand(memory, TileOperands.of(mapped)).numpy(), wanted)


@every_shape
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.usefixtures("poisoned_memory")
def test_linear_is_the_dense_product(size: int, shape: Any, tile: Any, rows: int, biased: bool) -> None:
    memory, x, tiles = numbers(size), torch.randn(rows, shape[1]), operands(size, shape, tile)
    bias = torch.randn(shape[0]) if biased else None
    wanted = F.linear(x, 0.7 * tile_expand(memory, tiles), bias)
    got = tile_linear(x, memory, bias, 0.7, tiles)
    torch.testing.assert_close(got, wanted, rtol=CLOSE, atol=CLOSE * float(wanted.abs().max()))


def test_linear_in_panels_smaller_than_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "PANEL_BYTES", 4 * 33 * 8)
    monkeypatch.setattr(panels, "GRAIN", 64)
    memory, x, bias = numbers(300), torch.randn(9, 33), torch.randn(70)
    tiles = operands(300, (70, 33), (4, 8))
    w = tile_expand(memory, tiles).double()
    for count in (1, 2):
        with threads(count):
            got = tile_linear(x, memory, bias, 1.0, tiles)
            dx, dm = ops._linear_backward(torch.ones(9, 70), x, memory, 1.0, [True, True], *tiles.arguments)
        torch.testing.assert_close(got.double(), F.linear(x.double(), w, bias.double()), rtol=CLOSE, atol=CLOSE)
        torch.testing.assert_close(dx.double(), torch.ones(9, 70).double() @ w, rtol=CLOSE, atol=CLOSE)
        wanted = tile_scatter(torch.ones(70, 9).double() @ x.double(), tiles)
        torch.testing.assert_close(dm.double(), wanted, rtol=CLOSE, atol=1e-4)


def test_linear_of_many_axes_and_none() -> None:
    memory, tiles, bias = numbers(300), operands(300, (17, 33), (4, 8)), torch.randn(17)
    x = torch.randn(2, 3, 33)
    torch.testing.assert_close(
        tile_linear(x, memory, bias, 1.0, tiles)[1, 2], tile_linear(x[1, 2], memory, bias, 1.0, tiles)
    )
    assert tile_linear(x[:0], memory, bias, 1.0, tiles).shape == (0, 3, 17)
    for dtype in (torch.bfloat16, torch.float16):
        got = tile_linear(x.to(dtype), memory.to(dtype), bias, 1.0, tiles)
        assert got.dtype is dtype
        wanted = tile_linear(x, memory, bias, 1.0, tiles)
        torch.testing.assert_close(got.float(), wanted, rtol=COARSE, atol=COARSE * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("size", "shape", "tile"), [(40, (5, 7), (2, 4)), (40, (5, 7), (1, 1)), (200, (9, 40), (3, 20))]
)
def test_gradients(size: int, shape: Any, tile: Any) -> None:
    tiles = operands(size, shape, tile)
    memory = numbers(size, dtype=torch.float64).requires_grad_()
    x = torch.randn(6, shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: tile_linear(*a, 0.7, tiles), (x, memory, bias))
    assert torch.autograd.gradcheck(lambda m: tile_expand(m, tiles), (memory,))
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: tile_scatter(w, tiles), (w,))
    ids = torch.tensor([[0, 3], [3, 4]])
    assert torch.autograd.gradcheck(lambda m: tile_rows(m, ids, tiles), (memory,))


def test_gradients_of_convolutions() -> None:
    tiles, geometry = operands(40, (6, 18), (2, 8)), ((6, 2, 3, 3), (2, 1), (1, 0), (1, 2), 2)
    memory = numbers(40, dtype=torch.float64).requires_grad_()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, m, b: tile_conv2d(x, m, b, 0.7, tiles, *geometry), (x, memory, bias))
    wanted = F.conv2d(x, 0.7 * tile_expand(memory, tiles).view(6, 2, 3, 3), bias, *geometry[1:4], 2)
    torch.testing.assert_close(tile_conv2d(x, memory, bias, 0.7, tiles, *geometry), wanted)


@every_shape
def test_scatter_is_the_transpose_of_expand(size: int, shape: Any, tile: Any) -> None:
    tiles, memory = operands(size, shape, tile), numbers(size, 1, torch.float64)
    w = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close((tile_expand(memory, tiles) * w).sum(), (tile_scatter(w, tiles) * memory).sum())
    ids = torch.tensor([0, shape[0] - 1, 0])
    assert torch.equal(tile_rows(memory, ids, tiles), tile_expand(memory, tiles)[ids])
    u, v = torch.randn(shape[0], dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    torch.testing.assert_close(tile_sums(u, v, tiles), tile_scatter(u[:, None] * v, tiles))


# Arrays of a few ranges, one array shared by slots, small tiles, no runs; one rectangle, and many.
SIZES = [
    (2000, (300, 500), (8, 16), {}),
    (2000, (300, 500), (32, 32), {}),
    (9000, (300, 500), (32, 32), {}),
    (90_000, (600, 700), (32, 32), {}),
    (1500, (32, 32), (32, 32), {}),
    (1500, (20, 3000), (32, 32), {}),
    (2000, (300, 500), (1, 1), {}),
    (2000, (300, 500), (32, 32), {"order": "k-major"}),
]


@pytest.mark.parametrize(("size", "shape", "tile", "options"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned_memory")
def test_the_gradient_of_the_array_does_not_depend_on_threads(
    size: int, shape: Any, tile: Any, options: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, memory = operands(size, shape, tile, **options), numbers(size, dtype=dtype)
    w = torch.randn(shape, dtype=dtype)
    for batch, rectangles in ((3, 1), (40, 1), (40, 4), (700, 40)):
        monkeypatch.setattr(gradient, "LEAST_NUMBERS", 2**17 if rectangles == 1 else 2**10)
        monkeypatch.setattr(gradient, "LEAST_RECTANGLES", rectangles)
        x, grad = torch.randn(batch, shape[1], dtype=dtype), torch.randn(batch, shape[0], dtype=dtype)
        found = []
        for count in (1, 2, 3, 2):
            with threads(count):
                by_product = ops._linear_backward(grad, x, memory, 0.5, [False, True], *tiles.arguments)[1]
                found.append((by_product, tile_scatter(w, tiles)))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
        wanted = plain.scatter(*tiles.arguments, 0.5 * grad.double().mT @ x.double())
        coarse = 1e-4 if dtype is torch.float32 else COARSE
        torch.testing.assert_close(found[0][0].double(), wanted, rtol=coarse, atol=coarse * float(wanted.abs().max()))


@every_shape
@pytest.mark.parametrize("options", [{}, {"signs": False}, {"order": "k-major"}], ids=str)
def test_the_general_form_is_the_same_map(size: int, shape: Any, tile: Any, options: dict[str, Any]) -> None:
    tiles, memory = operands(size, shape, tile, **options), numbers(size)
    arguments = tiles.arguments
    assert torch.equal(plain.expand(*arguments, memory), tile_expand(memory, tiles))
    w = torch.randn(shape)
    torch.testing.assert_close(plain.scatter(*arguments, w), tile_scatter(w, tiles), rtol=1e-4, atol=1e-4)


def test_the_general_form_of_every_op() -> None:
    mapped = TileMap.explicit(np.array([[0, 10], [3, 20], [5, 0]]), 60, (15, 9), (5, 8))
    for tiles in (TileOperands.of(mapped), operands(60, (15, 9), (5, 8))):
        memory, x, grad, bias = numbers(60), torch.randn(3, 9), torch.randn(3, 15), torch.randn(15)
        given, ids = tiles.arguments, torch.tensor([0, 14, 0])
        pairs = [
            (ops._linear_plain, ops._linear_cpu, (x, memory, bias, 0.7, *given)),
            (ops._linear_backward_plain, ops._linear_backward_cpu, (grad, x, memory, 0.7, [True, True], *given)),
            (ops._expand_plain, ops._expand_cpu, (memory, *given)),
            (ops._scatter_plain, ops._scatter_cpu, (grad.mT @ x, *given)),
            (ops._rows_plain, ops._rows_cpu, (memory, ids, *given)),
            (ops._scatter_rows_plain, ops._scatter_rows_cpu, (x, ids, *given)),
        ]
        for general, compiled, arguments in pairs:
            torch.testing.assert_close(general(*arguments), compiled(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(2, 4), (1, 1)])
def test_opcheck(tile: Any) -> None:
    tiles = operands(40, (6, 18), tile)
    memory = numbers(40).requires_grad_()
    x, bias = torch.randn(3, 18, requires_grad=True), torch.randn(6, requires_grad=True)
    image, ids = torch.randn(2, 4, 5, 6, requires_grad=True), torch.tensor([0, 3, 0])
    w, rows = torch.randn(6, 18, requires_grad=True), torch.randn(3, 18, requires_grad=True)
    geometry = ([6, 2, 3, 3], [2, 1], [1, 0], [1, 2], 2)
    given = tiles.arguments
    torch.library.opcheck(ops._linear, (x, memory, bias, 0.7, *given))
    torch.library.opcheck(ops._conv2d, (image, memory, bias, 0.7, *geometry, *given))
    torch.library.opcheck(ops._expand, (memory, *given))
    torch.library.opcheck(ops._scatter, (w, *given))
    torch.library.opcheck(ops._rows, (memory, ids, *given))
    torch.library.opcheck(ops._scatter_rows, (rows, ids, *given))


def test_bad_inputs_are_named() -> None:
    tiles, memory = operands(40, (5, 7), (2, 4)), numbers(40)
    with pytest.raises(QuernelError, match=r"x must be floating with 7 features; got torch.float32 of shape \(2, 8\)"):
        tile_linear(torch.zeros(2, 8), memory, None, 1.0, tiles)
    with pytest.raises(QuernelError, match="x must be floating"):
        tile_linear(torch.zeros(2, 7, dtype=torch.long), memory, None, 1.0, tiles)
    for wrong in (-1, 5):
        with pytest.raises(QuernelError, match=r"ids must lie in \[0, 5\)"):
            tile_rows(memory, torch.tensor([0, wrong]), tiles)
