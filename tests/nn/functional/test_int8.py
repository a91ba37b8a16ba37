"""``int8_linear`` against its definition: exact integers, awkward operands, NaN, threads, compilers, gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import _int8_chain
from quernel.nn._int8_kernels import ACTIVATIONS
from quernel.nn.functional import int8 as module
from quernel.nn.functional import int8_linear
from tests.reference import nn as oracle

# The sums are exact; what is left are three float32 roundings and the activation's own 1e-6.
RTOL, ATOL = 1e-5, 2e-6


def operands(n, k, m, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=g).to(dtype)
    codes = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    scale, bias = torch.rand(m, generator=g) * 0.01, torch.randn(m, generator=g)
    return x, codes, scale, bias, torch.rand(k, generator=g) + 0.5


def simulated(x, codes, scale, bias, inverse, levels=127, alpha=None, activation=None):
    arrays = [None if t is None else t.float().numpy() for t in (x, codes, scale, bias, inverse)]
    y, q, sums = oracle.int8_linear(*arrays, levels, alpha, activation)
    return torch.from_numpy(y), q, sums


@pytest.mark.parametrize("n", [0, 1, 2, 7, 33])
@pytest.mark.parametrize(("k", "m"), [(1, 1), (1, 5), (2, 3), (7, 1), (16, 16), (17, 33), (64, 5)])
def test_equals_the_float_simulation_of_the_same_integers(n, k, m, poisoned_memory):
    x, codes, scale, bias, inverse = operands(n, k, m)
    for options in ({}, {"bias": bias}, {"bias": bias, "inverse": inverse}):
        wanted, _, _ = simulated(x, codes, scale, options.get("bias"), options.get("inverse"))
        got = int8_linear(x, codes, scale, **options)
        assert got.shape == (n, m)
        torch.testing.assert_close(got.double(), wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.15, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_option_equals_the_simulation(bits, alpha, activation):
    x, codes, scale, bias, inverse = operands(9, 31, 6)
    row = {} if alpha is None else {"row": "bound", "alpha": alpha}
    got = int8_linear(x, codes, scale, bias, inverse=inverse, bits=bits, activation=activation, **row)
    wanted, _, _ = simulated(x, codes, scale, bias, inverse, 2 ** (bits - 1) - 1, alpha, activation)
    torch.testing.assert_close(got.double(), wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_integers_are_exact(n):
    x, codes, _, _, _ = operands(n, 83, 19)
    x[0] = torch.where(torch.arange(83) % 3 == 0, 1.0, -1.0)  # codes +-127: the largest sums there are
    codes[0] = (127 * x[0]).to(torch.int8)
    _, _, sums = simulated(x, codes, torch.ones(19), None, None)
    step = x.abs().amax(1, keepdim=True) / 127
    assert sums[0][0] == 83 * 127**2
    assert torch.equal(int8_linear(x, codes, torch.ones(19)), torch.tensor(sums).float() * step)


def test_the_portable_path_has_the_same_integers(monkeypatch):
    for k, alpha in ((48, None), (48, 0.3), (2000, None)):  # 2000 inputs need float64 sums
        x, codes, scale, bias, inverse = operands(21, k, 8)
        x[4], x[5, 3] = 0, float("nan")
        arguments = (codes, scale, None, inverse, 127, alpha, None)
        fast = module.apply_int8_linear(x, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(module, "portable", lambda: True)
            plain = module.apply_int8_linear(x, *arguments)
            near = int8_linear(x[:3], codes, scale, bias, activation="gelu")
        wanted = int8_linear(x[:3], codes, scale, bias, activation="gelu")
        torch.testing.assert_close(plain, fast, rtol=3e-7, atol=0, equal_nan=True)
        torch.testing.assert_close(near, wanted, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_bfloat16_is_the_float32_result_rounded_once(activation):
    x, codes, scale, bias, inverse = operands(65, 48, 33, dtype=torch.bfloat16)
    options = {"inverse": inverse, "activation": activation}
    got, exact = int8_linear(x, codes, scale, bias, **options), int8_linear(x.float(), codes, scale, bias, **options)
    assert got.dtype == torch.bfloat16
    differing = got != exact.bfloat16()
    # Fused multiply-adds may fall differently in the two loops; that moves a value over a rounding edge rarely.
    assert differing.float().mean() < 1e-3
    torch.testing.assert_close(got.float(), exact, rtol=2**-8, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_pass_through_float32(dtype):
    x, codes, scale, bias, _ = operands(3, 20, 4, dtype=dtype)
    got = int8_linear(x, codes, scale, bias)
    assert got.dtype == dtype
    torch.testing.assert_close(got, int8_linear(x.float(), codes, scale, bias).to(dtype), rtol=0, atol=0)


def test_constants_of_other_dtypes_are_read_as_what_they_are():
    x, codes, scale, bias, inverse = operands(3, 20, 4)
    halves = [t.bfloat16() for t in (scale, bias, inverse)]
    got = int8_linear(x, codes, halves[0], halves[1], inverse=halves[2])
    floats = [t.float() for t in halves]
    assert torch.equal(got, int8_linear(x, codes, floats[0], floats[1], inverse=floats[2]))


def test_shapes_and_layouts():
    x, codes, scale, bias, _ = operands(24, 18, 7)
    wanted = int8_linear(x, codes, scale, bias)
    assert torch.equal(int8_linear(x.view(2, 3, 4, 18), codes, scale, bias), wanted.view(2, 3, 4, 7))
    assert torch.equal(int8_linear(x[5], codes, scale, bias), wanted[5])
    assert torch.equal(int8_linear(x.t().contiguous().t(), codes, scale, bias), wanted)
    assert torch.equal(int8_linear(x[::3], codes, scale, bias), wanted[::3])
    assert torch.equal(int8_linear(x[:1].expand(4, 18), codes, scale, bias), wanted[:1].expand(4, 7))
    assert torch.equal(int8_linear(x, codes.t().contiguous().t(), scale, bias), wanted)
    assert torch.equal(int8_linear(x, codes, scale.repeat_interleave(2)[::2], bias), wanted)
    odd = codes[:1].as_strided((1, 18), (1, 1))  # the stride of an axis of size one may be anything
    assert torch.equal(int8_linear(x, odd, scale[:1], bias[:1]), wanted[:, :1])


def test_empty_axes():
    assert int8_linear(torch.ones(2, 0, 5), torch.ones(3, 5, dtype=torch.int8), torch.ones(3)).shape == (2, 0, 3)
    assert int8_linear(torch.ones(4, 5), torch.ones(0, 5, dtype=torch.int8), torch.ones(0)).shape == (4, 0)
    codes, bias = torch.ones(2, 0, dtype=torch.int8), torch.tensor([-1.0, 2.0])
    y = int8_linear(torch.ones(4, 0), codes, torch.ones(2), bias, activation="relu")
    assert y.tolist() == [[0.0, 2.0]] * 4


@pytest.mark.parametrize("n", [1, 200])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", ["tight", "bound"])
def test_a_row_that_is_not_finite_comes_out_as_nan_alone(n, bad, row):
    x, codes, scale, bias, inverse = operands(n, 40, 6)
    for activation in ACTIVATIONS:
        options = {"inverse": inverse, "row": row, "activation": activation}
        wanted = int8_linear(x, codes, scale, bias, **options)
        broken = x.clone()
        broken[-1, 17] = bad
        got = int8_linear(broken, codes, scale, bias, **options)
        assert got[-1].isnan().all()
        assert torch.equal(got[:-1], wanted[:-1])


def test_a_zero_row_comes_out_as_the_bias():
    x, codes, scale, bias, _ = operands(3, 20, 4)
    x[1] = 0
    assert torch.equal(int8_linear(x, codes, scale, bias)[1], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_blocks_do_not_change_a_bit(dtype, monkeypatch):
    x, codes, scale, bias, inverse = operands(301, 48, 20, dtype=dtype)
    torch.set_num_threads(1)
    wanted = int8_linear(x, codes, scale, bias, inverse=inverse)
    torch.set_num_threads(2)
    assert torch.equal(int8_linear(x, codes, scale, bias, inverse=inverse), wanted)
    monkeypatch.setattr(_int8_chain, "BLOCK", 37)
    assert torch.equal(int8_linear(x, codes, scale, bias, inverse=inverse), wanted)
    assert torch.equal(int8_linear(x[:5], codes, scale, bias, inverse=inverse), wanted[:5])


def test_memory_kept_from_inference_mode_serves_outside_it():
    x, codes, scale, _, _ = operands(100, 3001, 11)  # larger than what other tests have left behind
    with torch.inference_mode():
        inside = int8_linear(x, codes, scale)
    assert torch.equal(int8_linear(x, codes, scale), inside)


def test_fake_and_meta_tensors_have_the_right_shape():
    x, codes, scale, bias, _ = (t.to("meta") for t in operands(6, 20, 4, dtype=torch.bfloat16))
    y = int8_linear(x.view(2, 3, 20), codes, scale, bias)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 4), torch.bfloat16, "meta")


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_the_op_is_registered_as_torch_wants_it(alpha):
    x, codes, scale, bias, inverse = operands(5, 16, 4)
    for options in ((bias, inverse, 127, alpha, "gelu"), (None, None, 7, alpha, None)):
        arguments = (x, codes, scale, *options)
        torch.library.opcheck(torch.ops.quernel.int8_linear.default, arguments)


class Layer(torch.nn.Module):
    def __init__(self, *constants):
        super().__init__()
        self.constants = constants

    def forward(self, x):
        codes, scale, bias, inverse = self.constants
        return int8_linear(x * 2, codes, scale, bias, inverse=inverse, activation="gelu") + 1


def test_compiles_and_exports_with_a_free_batch():
    x, *constants = operands(6, 16, 4)
    layer = Layer(*constants)
    wanted = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), wanted)
    torch.testing.assert_close(compiled(x[:3]), wanted[:3])
    for strict in (False, True):
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
        assert any("int8_linear" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x[:2]), wanted[:2])
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(compiled(leaf).sum(), leaf)
    other = x.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(layer(other).sum(), other)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_layer_without_rounding(activation, dtype):
    x, codes, scale, bias, inverse = operands(12, 30, 8, dtype=dtype)
    g = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    leaves = x.view(3, 4, 30).clone().requires_grad_(), bias.clone().requires_grad_()
    y = int8_linear(leaves[0], codes, scale, leaves[1], inverse=inverse, activation=activation)
    got = torch.autograd.grad(y, leaves, g.to(dtype))
    plain = leaves[0].detach().float().requires_grad_(), bias.clone().requires_grad_()
    before = F.linear(plain[0] * inverse, codes * scale[:, None], plain[1])
    # Where the rounded layer puts its pre-activation: the slope is taken there.
    rounded = int8_linear(leaves[0].detach().float(), codes, scale, bias, inverse=inverse)
    slopes = rounded.clone().requires_grad_()
    (slope,) = torch.autograd.grad(module._activate(slopes * 1, activation), slopes, g.to(dtype).float())
    wanted = torch.autograd.grad(before, plain, slope)
    for mine, theirs, kind in zip(got, wanted, (dtype, torch.float32), strict=True):
        assert mine.dtype == kind
        torch.testing.assert_close(mine.float(), theirs, rtol=2**-7 if kind == torch.bfloat16 else 1e-4, atol=1e-4)


def test_gradient_of_a_single_row():
    x, codes, scale, bias, _ = operands(1, 20, 4)
    leaves = x[0].clone().requires_grad_(), bias.clone().requires_grad_()
    grads = torch.autograd.grad(int8_linear(leaves[0], codes, scale, leaves[1]).sum(), leaves)
    torch.testing.assert_close(grads[0], (codes * scale[:, None]).sum(0))
    assert torch.equal(grads[1], torch.ones(4))


def test_no_gradient_without_asking():
    x, codes, scale, bias, _ = operands(3, 20, 4)
    assert not int8_linear(x, codes, scale, bias).requires_grad
    with torch.no_grad():
        assert not int8_linear(x.requires_grad_(), codes, scale, bias).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 5)}, r"x must be floating of shape \(..., 4\).*got torch.float32 of shape \(3, 5\)"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, "x must be floating"),
        ({"x": torch.tensor(1.0)}, "x must be floating"),
        ({"codes": torch.ones(2, 4)}, "codes must be int8"),
        ({"codes": torch.ones(2, 4, 1, dtype=torch.int8)}, r"codes must be int8 of shape \(out, in\)"),
        ({"scale": torch.ones(3)}, r"scale must be floating of shape \(2,\)"),
        ({"scale": torch.ones(2, 1)}, "scale must be"),
        ({"bias": torch.ones(1)}, r"bias must be floating of shape \(2,\)"),
        ({"bias": torch.ones(2, dtype=torch.int32)}, "bias must be floating"),
        ({"inverse": torch.ones(2)}, r"inverse must be floating of shape \(4,\)"),
        ({"bits": 3}, r"bits must be an integer in \[4, 8\]; got 3"),
        ({"bits": 9}, "bits"),
        ({"row": "loose"}, "row must be one of 'tight', 'bound'"),
        ({"row": "bound", "alpha": 1.5}, r"alpha must be a finite number in \[0.0, 1.0\]"),
        ({"activation": "tanh"}, "activation must be one of"),
    ],
)
def test_bad_operands_are_named(change, message):
    good = {"x": torch.ones(3, 4), "codes": torch.ones(2, 4, dtype=torch.int8), "scale": torch.ones(2)}
    with pytest.raises(QuernelError, match=message):
        int8_linear(**(good | change))


def test_more_inputs_than_int32_can_sum_are_refused():
    widest = module.MAX_FEATURES
    assert widest * 127**2 < 2**31 <= (widest + 1) * 127**2
    codes = torch.full((1, widest), 127, dtype=torch.int8)
    assert int8_linear(torch.ones(2, widest), codes, torch.ones(1)).tolist() == [[float(np.float32(widest * 127))]] * 2
    with pytest.raises(QuernelError, match=r"at most 133144.*Split the layer"):
        int8_linear(torch.ones(1, widest + 1), torch.ones(1, widest + 1, dtype=torch.int8), torch.ones(1))
