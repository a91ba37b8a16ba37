"""Convolutions by one-way filters equal dense ones: against loops, against torch over many geometries, gradients."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn.functional import one_way_conv, one_way_conv_transpose, one_way_kernel, one_way_parameters
from tests.reference import factorized_conv as oracle

# float32 sums in another order; relative to the whole output.
CLOSE = 1e-5
# float64 sums against loops over the same numbers.
EXACT = 1e-12
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def operands(kernel, rank=2, inputs=3, outputs=5, shared=False, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    channel = torch.randn(outputs, rank, inputs, generator=g, dtype=dtype)
    filters = inputs if shared else outputs
    spatial = [torch.randn(filters, rank, k, generator=g, dtype=dtype) for k in kernel]
    return channel, spatial, torch.randn(outputs, generator=g, dtype=dtype)


def image(*size, dtype=torch.float32):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def relative(got, wanted):
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("size", "kernel"), [((9,), (3,)), ((7, 6), (3, 2)), ((4, 5, 3), (2, 3, 1))])
def test_equals_loops_over_the_definition(size, kernel, shared):
    channel, spatial, bias = operands(kernel, shared=shared, dtype=torch.float64)
    dims = len(size)
    stride, dilation = [2, 1, 1][:dims], [1, 2, 1][:dims]
    padding = [(1, 2), (0, 1), (1, 1)][:dims]
    wanted_kernel = oracle.dense_kernel(channel.numpy(), [s.numpy() for s in spatial], shared)
    kernel = one_way_kernel(channel, spatial, shared=shared)
    assert relative(kernel, torch.from_numpy(wanted_kernel)) < EXACT
    x = image(*size, dtype=torch.float64)
    wanted = oracle.convolve(x.numpy(), wanted_kernel, bias.numpy(), stride, padding, dilation)
    for joined in (False, True):
        got = one_way_conv(
            x, channel, spatial, bias, stride=stride, padding=padding, dilation=dilation, shared=shared, joined=joined
        )
        assert relative(got, torch.from_numpy(wanted)) < EXACT


GEOMETRIES = list(itertools.product([1, 2, 3], [1, 2], [(3, 3), (1, 3), (5, 3)], [(0, 0), (1, 2)]))


@pytest.mark.parametrize("rank", [1, 2, 9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_dense_convolution(rank, layout):
    x = image(12, 11).contiguous(memory_format=layout)
    for stride, dilation, kernel, (py, px) in GEOMETRIES:
        channel, spatial, bias = operands(kernel, rank)
        dense = one_way_kernel(channel.double(), [s.double() for s in spatial])
        wanted = F.conv2d(x.double(), dense, bias.double(), stride, (py, px), dilation)
        geometry = {"stride": (stride,) * 2, "padding": [(py, py), (px, px)], "dilation": (dilation,) * 2}
        for joined in (None, False, True):
            got = one_way_conv(x, channel, spatial, bias, **geometry, joined=joined)
            assert relative(got, wanted) < CLOSE, (stride, dilation, kernel, joined)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_equal_the_dense_convolution(dims):
    kernel = (3, 2, 4)[:dims]
    channel, spatial, bias = operands(kernel, 3)
    x = image(*(9, 7, 8)[:dims])
    wanted = CONVS[dims](x, one_way_kernel(channel, spatial), bias, 2, 1, 1)
    got = one_way_conv(x, channel, spatial, bias, stride=(2,) * dims, padding=[(1, 1)] * dims, dilation=(1,) * dims)
    assert relative(got, wanted) < CLOSE


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 3])
def test_transposed_equals_the_dense_transposed_convolution(dims, rank):
    kernel = (3, 2, 4)[:dims]
    channel, spatial, bias = operands(kernel, rank)
    stride, padding, extra, dilation = [2, 3, 1][:dims], [1, 0, 2][:dims], [1, 2, 0][:dims], [1, 2, 1][:dims]
    x = image(*(5, 4, 6)[:dims])
    dense = one_way_kernel(channel, spatial).transpose(0, 1)
    wanted = TRANSPOSED[dims](x, dense, bias, stride, padding, extra, 1, dilation)
    got = one_way_conv_transpose(
        x, channel, spatial, bias, stride=stride, padding=padding, output_padding=extra, dilation=dilation
    )
    assert got.shape == wanted.shape
    assert relative(got, wanted) < CLOSE


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_through_the_dense_kernel(shared, memory_efficient):
    channel, spatial, bias = operands((3, 2), 2, shared=shared, dtype=torch.float64)
    x = image(5, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, channel, *spatial, bias)]
    geometry = {"stride": (2, 1), "padding": [(1, 1), (0, 1)], "dilation": (1, 1), "shared": shared}

    def ours(x, channel, rows, columns, bias):
        return one_way_conv(x, channel, [rows, columns], bias, **geometry, memory_efficient=memory_efficient)

    def dense(x, channel, rows, columns, bias):
        return F.conv2d(F.pad(x, (0, 1, 1, 1)), one_way_kernel(channel, [rows, columns], shared=shared), bias, (2, 1))

    assert torch.autograd.gradcheck(ours, leaves)
    wanted = dense(*leaves)
    grad = torch.randn(wanted.shape, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad(ours(*leaves), leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        assert relative(got, want) < EXACT


def test_parameter_counts_are_the_formulas():
    for kernel, inputs, outputs, rank in (
        ((3, 3), 64, 64, 1),
        ((5, 5), 7, 9, 3),
        ((3,), 4, 2, 2),
        ((3, 1, 2), 3, 4, 5),
    ):
        for shared in (False, True):
            channel, spatial, _ = operands(kernel, rank, inputs, outputs, shared)
            held = channel.numel() + sum(s.numel() for s in spatial)
            assert one_way_parameters(outputs, inputs, kernel, rank, shared=shared) == held
    assert 64 * 64 * 9 / one_way_parameters(64, 64, (3, 3), 1) == pytest.approx(8.2, abs=0.05)
    assert 64 * 64 * 25 / one_way_parameters(64, 64, (5, 5), 1) == pytest.approx(21.6, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 4, 8, 8)}, r"x must be of shape \(N, 3, H, W\)"),
        ({"x": torch.ones(3, 8, 8)}, "x must be of shape"),
        ({"spatial": [torch.ones(5, 2, 3), torch.ones(5, 1, 3)]}, r"must be of shape \(5, 2, k\)"),
        ({"spatial": []}, "one to three"),
        ({"x": torch.ones(2, 3, 2, 2)}, "Kernel size can't be greater than actual input size"),
    ],
)
def test_bad_input_is_named(change, message):
    channel, spatial, bias = operands((3, 3))
    arguments = {"x": image(8, 8), "channel": channel, "spatial": spatial, "bias": bias} | change
    with pytest.raises(QuernelError, match=message):
        one_way_conv(**arguments, stride=(1, 1), padding=[(0, 0), (0, 0)], dilation=(1, 1))


def test_a_kernel_beyond_the_input_fails_with_torchs_own_words():
    channel, spatial, _ = operands((3, 5))
    x = torch.ones(1, 3, 2, 3)
    with pytest.raises(RuntimeError) as theirs:
        F.conv2d(x, one_way_kernel(channel, spatial), padding=(0, 1), dilation=2)
    with pytest.raises(QuernelError) as ours:
        one_way_conv(x, channel, spatial, stride=(1, 1), padding=[(0, 0), (1, 1)], dilation=(2, 2))
    assert str(ours.value) == str(theirs.value).strip()
