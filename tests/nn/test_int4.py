"""4-bit weights: packing, and products that equal int64 arithmetic bit for bit on every path."""

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel._threads import _process
from quernel.nn import _int4_chain, _int4_kernels
from quernel.nn._int4_packing import ROWS, pack, packed_shape, unpack, unpack_rows
from quernel.nn.functional import int4 as module
from quernel.nn.functional import int4_linear, int8_linear
from quernel.nn.weights import Int4GroupWeight, Int4TableWeight

POWERS = [0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64]
FORMS = [0, 32, 64, 128]
# Integers, or the same float expressions of equal integers.
EXACT = {"rtol": 0, "atol": 0}
# Where int8 layers run as plain torch operations, a product that rounds to a tie may become the other neighbour, and
# sums are scaled in another order; relative to the norm, in the coarsest dtype.
PLAIN = 2e-3


def weight(out, inputs, group, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, inputs), generator=g, dtype=torch.uint8)
    scale = torch.rand(out, generator=g) + 0.1
    if not group:
        return Int4TableWeight.from_codes(codes, scale, POWERS)
    size = (out, -(-inputs // group))
    scales, zeros = torch.randint(1, 9, size, generator=g), torch.randint(0, 16, size, generator=g)
    return Int4GroupWeight.from_codes(codes, scale, scales, zeros, group)


def integer_weight(w):
    """The definition, in int64: ``s (q - z)`` or ``T[q]``."""
    q = w.unpack().long().numpy()
    if isinstance(w, Int4TableWeight):
        return np.asarray(POWERS)[q]
    columns = np.arange(q.shape[1]) // w.group_size
    s, z = (part[: len(q)].long().numpy()[:, columns] for part in (w.group_scale, w.group_zero))
    return s * (q - z)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 128), (5, 129), (7, 384), (8, 63)])
def test_packing_round_trip(rows, columns):
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == packed_shape(rows, columns)
    assert torch.equal(unpack(packed, rows, columns), codes)
    ids = torch.tensor([rows - 1, 0])
    assert torch.equal(unpack_rows(packed[ids // ROWS, :, ids % ROWS], columns), codes[ids])


def test_a_byte_holds_inputs_64_apart():
    codes = torch.zeros(1, 128, dtype=torch.uint8)
    codes[0, 3], codes[0, 67] = 5, 9
    assert pack(codes)[0, 0, 0].nonzero().tolist() == [[3]]
    assert int(pack(codes)[0, 0, 0, 3]) == 5 | 9 << 4


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(QuernelError, match=r"0\.\.15.*16"):
        pack(torch.full((2, 2), 16, dtype=torch.uint8))
    with pytest.raises(QuernelError, match="uint8"):
        pack(torch.zeros(2, 2))


@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("inputs", [1, 31, 128, 130, 384])
@pytest.mark.parametrize("plain", [False, True], ids=["vector", "portable"])
def test_kernels_are_exact(group, inputs, plain):
    if not plain and _int4_kernels.portable():
        pytest.skip("this processor or QUERNEL_PORTABLE=1 takes the portable path")
    w = weight(7, inputs, group, seed=inputs)
    blocks, chunks = w.codes.shape[:2]
    n = 6  # one group of four tokens and two single ones
    x = torch.zeros(n, chunks * 128, dtype=torch.int8)
    x[:, :inputs] = torch.randint(-127, 128, (n, inputs), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    sums = torch.zeros(n, blocks * ROWS, dtype=torch.int32)
    if group:
        x_sums = x.view(n, -1, group).sum(-1, dtype=torch.int32)
        constants, zeros = w.group_scale, w.group_zero.data_ptr()
    else:
        x_sums, constants, zeros = x.sum(-1, dtype=torch.int32), (w.table.int() + 64).to(torch.uint8), -64
    addresses = [t.data_ptr() for t in (w.codes, x, constants)]
    kernel = _int4_kernels.product(group, plain).ctypes
    kernel(*addresses, zeros, x_sums.data_ptr(), sums.data_ptr(), chunks, n, blocks, 0, blocks)
    wanted = x[:, :inputs].long().numpy() @ integer_weight(w).T
    np.testing.assert_array_equal(sums[:, :7].numpy(), wanted)

    out = torch.full((7, inputs), 99, dtype=torch.int8)
    constants, zeros = (w.group_scale, w.group_zero) if group else (w.table, w.table)
    places = [t.data_ptr() for t in (w.codes, constants, zeros, out)]
    _int4_kernels.expand(group, plain)(*places, 7, inputs, 0, blocks)
    np.testing.assert_array_equal(out.numpy(), integer_weight(w))
    assert torch.equal(out, w.unpack_int8())


@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("inputs", [128, 384, 4096])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_equals_int8_product(group, inputs, tokens, dtype):
    w = weight(13, inputs, group)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(3)).to(dtype)
    bias = torch.linspace(-1, 1, 13)
    got = w.linear(x, bias, activation="gelu")
    wanted = int8_linear(x, w.unpack_int8(), w.scale, bias, activation="gelu")
    if _int4_kernels.portable():
        assert (got.float() - wanted.float()).norm() <= PLAIN * wanted.float().norm()
    else:
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("group", [0, 64])
def test_threads_and_the_pool_give_the_same(group, monkeypatch):
    monkeypatch.setattr(_int4_chain, "GRAIN", 1)
    w, before = weight(64, 256, group), torch.get_num_threads()
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(4))
    try:
        torch.set_num_threads(1)
        alone = w.matmul(x)
        torch.set_num_threads(2)
        torch.testing.assert_close(w.matmul(x), alone, **EXACT)
        monkeypatch.setattr(_process, "forked", True)  # where only the pool may run
        torch.testing.assert_close(w.matmul(x), alone, **EXACT)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", FORMS)
def test_plain_torch_path_equals_the_kernels(group):
    w, x = weight(9, 200, group), torch.randn(5, 200, generator=torch.Generator().manual_seed(5))
    operands = (x, w.codes, w.scale, *w._packed()[1:], None, None, 127, None, "silu")
    # The same integers; silu and the final product round differently by an ulp or two.
    torch.testing.assert_close(module._plain(*operands), module._compute(*operands), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("group", [0, 128])
def test_op_obeys_the_rules_of_torch(group, tokens):
    w = weight(6, 130, group)
    x, bias = torch.randn(tokens, 130, requires_grad=True), torch.zeros(6, requires_grad=True)
    arguments = (x, w.codes, w.scale, *w._packed()[1:], bias, None, 127, None, None)
    torch.library.opcheck(
        torch.ops.quernel.int4_linear.default,
        tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments),
        test_utils=("test_schema", "test_faketensor"),
    )
    y = module.apply_int4_linear(*arguments)
    g = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(6))
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ w.dense())
    torch.testing.assert_close(bias.grad, g.sum(0))


def test_static_scale_clips():
    w = weight(5, 64, 32)
    x = torch.tensor([[0.5, 3.0] + [0.0] * 62])
    inverse = torch.full((64,), 1.0)  # a calibrated maximum of 1: larger values are clamped to it
    got = int4_linear(
        x, w.codes, w.scale, group_scale=w.group_scale, group_zero=w.group_zero, inverse=inverse, row="bound", alpha=0.0
    )
    wanted = torch.tensor([[64.0, 127.0]]) @ w.dense()[:, :2].T / 127
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("group", FORMS)
def test_rows_and_nan(group):
    w = weight(9, 70, group)
    ids = torch.tensor([[8, 0], [3, 3]])
    torch.testing.assert_close(w.rows(ids), w.dense()[ids], **EXACT)
    x = torch.randn(2, 70)
    x[1, 3] = torch.nan
    y = w.matmul(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


def test_bytes():
    w = weight(256, 1024, 128)
    assert w.nbytes == 256 * 1024 // 2 + 2 * 256 * 8 + 4 * 256
    assert w.bits_per_weight == pytest.approx(4 + 16 / 128 + 32 / 1024)
    assert weight(256, 1024, 0).nbytes == 256 * 1024 // 2 + 4 * 256


def test_bad_operands_are_named():
    w, t = weight(4, 64, 32), weight(4, 64, 0)
    x = torch.zeros(2, 64)
    groups = {"group_scale": w.group_scale, "group_zero": w.group_zero}
    with pytest.raises(QuernelError, match="codes must be uint8 of shape"):
        int4_linear(torch.zeros(2, 200), w.codes, w.scale, **groups)
    with pytest.raises(QuernelError, match="either group_scale and group_zero, or table"):
        int4_linear(x, w.codes, w.scale, **groups, table=t.table)
    with pytest.raises(QuernelError, match="either group_scale and group_zero, or table"):
        int4_linear(x, w.codes, w.scale)
    with pytest.raises(QuernelError, match="group_zero must be"):
        int4_linear(x, w.codes, w.scale, group_scale=w.group_scale, group_zero=w.group_scale)
    with pytest.raises(QuernelError, match=r"bias .*\(4,\)"):
        int4_linear(x, w.codes, w.scale, torch.zeros(3), **groups)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    one = torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(QuernelError, match=r"-127\.\.127.*150"):
        Int4GroupWeight.from_codes(codes, torch.ones(1), 10 * one, 15 * one, 32)
    with pytest.raises(QuernelError, match=r"group_zero must lie in 0\.\.15"):
        Int4GroupWeight.from_codes(codes, torch.ones(1), one, 16 * one, 32)
    with pytest.raises(QuernelError, match="group_size"):
        Int4GroupWeight((4, 64), 48)
    with pytest.raises(QuernelError, match="16 integers"):
        Int4TableWeight((4, 64), range(15))
