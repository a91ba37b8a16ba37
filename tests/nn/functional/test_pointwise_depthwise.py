"""The fused pointwise-depthwise convolution: both paths against float64, gradients, operators, threads, refusals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.nn.functional import pointwise_depthwise as module
from quernel.nn.functional import pointwise_depthwise_conv2d

# float32 sums in another order, relative to the whole tensor.
CLOSE = 1e-5
# in, out, rank, size, kernel, stride, dilation, padding (top, bottom, left, right)
CASES = [
    (1, 1, 1, (1, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    (5, 7, 1, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    (3, 16, 2, (8, 8), (5, 3), (2, 1), (1, 2), (2, 1, 0, 3)),
    (16, 33, 3, (7, 6), (1, 3), (3, 2), (2, 2), (0, 0, 4, 4)),
    (64, 64, 1, (12, 13), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    (1, 1, 9, (5, 4), (3, 3), (1, 1), (1, 1), (3, 3, 3, 3)),
    (7, 96, 2, (4, 4), (2, 4), (2, 2), (1, 1), (1, 1, 2, 2)),
    (7, 112, 2, (20, 23), (5, 5), (1, 1), (2, 2), (4, 4, 4, 4)),
    (8, 48, 1, (3, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    (20, 8, 1, (9, 9), (3, 3), (4, 4), (1, 1), (0, 0, 0, 0)),
]


@pytest.fixture(params=["vector", "portable"])
def path(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(module, "portable", lambda: True)
    elif module.portable():
        pytest.skip("no AVX-512 + VNNI here")
    return request.param


def operands(inputs, outputs, rank, size, kernel, images=3):
    g = torch.Generator().manual_seed(0)
    shapes = (images, inputs, *size), (outputs, rank, inputs), (outputs, rank, *kernel), (outputs,)
    return [torch.randn(shape, generator=g) for shape in shapes]


def relative(got, wanted):
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_dense_convolution_in_float64(case, path, poisoned_memory):
    inputs, outputs, rank, size, kernel, stride, dilation, padding = case
    tensors = operands(inputs, outputs, rank, size, kernel)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    narrow = [t.clone().requires_grad_() for t in tensors]
    got = pointwise_depthwise_conv2d(*narrow, **geometry)
    x, a, d, bias = wide = [t.double().requires_grad_() for t in tensors]
    dense = torch.einsum("ori,oryx->oiyx", a, d)
    top, bottom, left, right = padding
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    wanted = torch.nn.functional.conv2d(padded, dense, bias, stride, 0, dilation)
    assert got.shape == wanted.shape
    assert relative(got, wanted) < CLOSE
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(got, narrow, grad), torch.autograd.grad(wanted, wide, grad.double()), strict=True
    ):
        assert relative(ours, theirs) < CLOSE


def test_layouts_and_missing_parts(path):
    x, a, d, bias = operands(5, 7, 2, (9, 8), (3, 3))
    wanted = pointwise_depthwise_conv2d(x, a, d, bias)
    assert wanted.is_contiguous(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    spread = torch.stack([x, x], dim=-1)[..., 0]
    for same in (last, spread, last.flip(0).flip(0)):
        assert relative(pointwise_depthwise_conv2d(same, a, d, bias), wanted) < CLOSE
    without = pointwise_depthwise_conv2d(x, a, d)
    assert relative(without + bias[:, None, None], wanted) < CLOSE
    assert pointwise_depthwise_conv2d(x[:0], a, d, bias).shape == (0, 7, 7, 6)


def test_threads_change_nothing_but_the_order_of_sums(path):
    x, a, d, bias = (t.requires_grad_() for t in operands(16, 32, 1, (40, 40), (3, 3), images=4))
    results = []
    for n in (1, 2):
        with threads(n):
            y = pointwise_depthwise_conv2d(x, a, d, bias, padding=(1, 1, 1, 1))
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, d, bias))])
    for one, two in zip(*results, strict=True):
        assert relative(two, one) < CLOSE


def test_only_wanted_gradients_are_made(path):
    x, a, d, bias = operands(3, 4, 1, (6, 6), (3, 3))
    a.requires_grad_()
    pointwise_depthwise_conv2d(x, a, d, bias).sum().backward()
    assert a.grad is not None
    assert x.grad is d.grad is bias.grad is None


def test_the_operators_keep_their_promises():
    x, a, d, bias = (t.requires_grad_() for t in operands(3, 5, 2, (6, 7), (3, 2)))
    geometry = ([2, 1], [1, 1, 0, 1], [1, 2])
    torch.library.opcheck(torch.ops.quernel.pointwise_depthwise.default, (x, a, d, bias, *geometry))
    grad = torch.ones_like(torch.ops.quernel.pointwise_depthwise.default(x, a, d, bias, *geometry))
    plain = [t.detach() for t in (grad, x, a, d)]
    torch.library.opcheck(torch.ops.quernel.pointwise_depthwise_backward.default, (*plain, *geometry, True))


def test_gradients_in_float64():
    tensors = [t.double().requires_grad_() for t in operands(3, 2, 2, (5, 4), (2, 3), images=2)]
    assert torch.autograd.gradcheck(
        lambda *t: pointwise_depthwise_conv2d(*t, stride=(2, 1), padding=(1, 0, 1, 1)), tensors
    )


def test_compiles_whole():
    x, a, d, bias = (t.requires_grad_() for t in operands(3, 5, 1, (6, 7), (3, 3)))
    compiled = torch.compile(lambda *t: pointwise_depthwise_conv2d(*t).relu(), backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(pointwise_depthwise_conv2d(x, a, d, bias).relu().sum(), a)[0]
    assert relative(torch.autograd.grad(compiled(x, a, d, bias).sum(), a)[0], wanted) < CLOSE


def test_flops_are_counted():
    x, a, d, _ = operands(3, 5, 2, (6, 7), (3, 2), images=2)
    with FlopCounterMode(display=False) as counter:
        pointwise_depthwise_conv2d(x, a, d)
    assert counter.get_total_flops() == 2 * 2 * 5 * 2 * (6 * 7 * 3 + 4 * 6 * 6)


def test_a_second_derivative_is_refused():
    x, a, d, bias = (t.requires_grad_() for t in operands(3, 2, 1, (5, 5), (3, 3)))
    y = pointwise_depthwise_conv2d(x, a, d, bias).square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(QuernelError, match="memory_efficient=False"):
        torch.autograd.grad(first.sum(), a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 4, 6, 6)}, r"x must be of shape \(N, 3, H, W\)"),
        ({"a": torch.ones(5, 3)}, "a must be of shape"),
        ({"d": torch.ones(5, 2, 3, 3)}, "a must be of shape"),
        ({"bias": torch.ones(4)}, r"bias must be of shape \(5,\)"),
        ({"a": torch.ones(5, 1, 3).double()}, "one floating dtype"),
        ({"stride": (0, 1)}, "stride and dilation must be two positive"),
        ({"padding": (1, -1, 0, 0)}, "padding four that are not negative"),
        ({"x": torch.ones(1, 3, 2, 2)}, "Kernel size can't be greater"),
    ],
)
def test_bad_input_is_named(change, message):
    x, a, d, bias = operands(3, 5, 1, (6, 6), (3, 3))
    with pytest.raises(QuernelError, match=message):
        pointwise_depthwise_conv2d(**({"x": x, "a": a, "d": d, "bias": bias} | change))
