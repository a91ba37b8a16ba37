"""``Int8Weight``: codes by the definition, products of every path equal to the dense one, float32 constants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn.weights import Int8Weight
from quernel.nn.weights import int8 as module

# bfloat16 keeps 8 bits of the output and of the scale.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def weight(out, inp, *kernel):
    return torch.randn(out, inp, *kernel, generator=torch.Generator().manual_seed(0))


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (6, 4, 3, 3), (3, 2, 5)])
def test_every_weight_is_within_half_a_step(shape):
    w = weight(*shape)
    stored = Int8Weight.from_dense(w)
    step = w.flatten(1).abs().amax(1) / 127
    assert torch.equal(stored.scale, step)
    assert stored.codes.abs().flatten(1).amax(1).tolist() == [127] * shape[0]
    error = (stored.dense() - w).abs().flatten(1).amax(1)
    assert (error <= step * 0.5001).all()
    assert stored.dense().shape == shape
    assert stored.nbytes == w.numel() + 4 * shape[0]


def test_dead_rows_and_empty_axes():
    w = weight(4, 6)
    w[2] = 0
    assert Int8Weight.from_dense(w).dense()[2].tolist() == [0] * 6
    assert Int8Weight.from_dense(torch.ones(3, 0)).dense().shape == (3, 0)
    assert Int8Weight.from_dense(torch.ones(3, 0)).matmul(torch.ones(2, 0)).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 40])
@pytest.mark.parametrize(("out", "inp"), [(33, 48), (7, 19), (64, 16)])
def test_products_equal_the_dense_ones(dtype, rows, out, inp):
    stored = Int8Weight.from_dense(weight(out, inp))
    x = torch.randn(2, rows, inp, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = stored.matmul(x)
    assert (got.shape, got.dtype) == ((2, rows, out), dtype)
    if rows:
        assert relative(got, F.linear(x.double(), stored.dense().double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_are_put_together_in_order(dtype, monkeypatch):
    stored, x = Int8Weight.from_dense(weight(37, 48)), weight(20, 48).to(dtype)  # 20 rows: too many for the GEMV
    wanted = stored.matmul(x)
    monkeypatch.setattr(module, "BLOCK_BYTES", 5 * 48 * x.element_size())
    # A GEMM of another shape may add in another order.
    torch.testing.assert_close(stored.matmul(x), wanted, rtol=TOLERANCE[dtype], atol=1e-5)


def test_memory_that_the_aligned_kernel_cannot_read_takes_another_path():
    codes, scale = torch.randint(-127, 128, (10 * 48 + 1,), dtype=torch.int8), torch.rand(10)
    stored = Int8Weight((10, 48))
    stored.scale = scale
    x = torch.randn(1 + 48).bfloat16()
    for first in (0, 1):
        stored.codes = codes[first : first + 480].view(10, 48)
        for start in (0, 1):
            row = x[start : start + 48].view(1, 48)
            assert relative(stored.matmul(row), row.double() @ stored.dense().double().T) < TOLERANCE[torch.bfloat16]
    stored.codes = codes[:480].view(48, 10).t()
    assert relative(stored.matmul(x[None, :48]), x[None, :48].double() @ stored.dense().double().T) < 2e-2


def test_the_int8_kernel_of_torch_is_used_where_it_wins(monkeypatch):
    calls = []
    original = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *a: calls.append(a[0].shape) or original(*a))
    stored = Int8Weight.from_dense(weight(32, 64))
    for rows in (1, 16, 17):
        stored.matmul(torch.randn(rows, 64).bfloat16())
        stored.matmul(torch.randn(rows, 64))
    assert calls == [(1, 64), (16, 64)]


def test_inputs_get_gradients():
    stored = Int8Weight.from_dense(weight(32, 64))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(2, 64, dtype=dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(stored.matmul(x).sum(), x)
        assert relative(grad[0], stored.dense().sum(0)) < TOLERANCE[dtype]


def test_rows():
    stored = Int8Weight.from_dense(weight(11, 6))
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(stored.rows(ids), stored.dense()[ids])


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)])
def test_scales_stay_float32_when_a_model_is_cast(cast):
    model = nn.Sequential(nn.Linear(4, 4), Int8Weight.from_dense(weight(4, 4)))
    before = model[1].dense()
    cast(model)
    assert model[0].weight.dtype != torch.float32
    assert torch.equal(model[1].dense(), before)
    assert model.to("meta")[1].scale.is_meta


def test_bad_weights_are_refused():
    with pytest.raises(QuernelError, match="two dimensions"):
        Int8Weight.from_dense(torch.ones(3))
    with pytest.raises(QuernelError, match="weight holds NaN or infinity"):
        Int8Weight.from_dense(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(QuernelError, match="weight holds NaN or infinity"):
        Int8Weight.from_dense(torch.tensor([[1.0, float("inf")]]))
