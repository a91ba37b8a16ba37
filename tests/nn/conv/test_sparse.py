"""``SparseConv1x1``: equal to the dense convolution and to the authors' stream, in every layout; what it refuses."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.nn import SparseConv1x1
from quernel.nn import _native_ranges as native_ranges
from quernel.nn._channel_major import aligned_copy, aligned_step
from quernel.nn._sparse_ops import GRAIN, _plain_conv, _plain_linear
from quernel.nn.weights import SparseWeight
from tests.reference import fast_sparse_convnets as oracle

# float32 sums of at most a thousand products, against float64.
RTOL = 1e-5
PLANES = {1: (1, 1), 7: (1, 7), 49: (7, 7), 63: (9, 7), 64: (8, 8), 65: (5, 13), 196: (14, 14), 3136: (56, 56)}
SIZES = (1, 3, 16, 64, 1000)


def pruned(outputs, inputs, sparsity, *, bias=True, block=1, stride=1, seed=0):
    """Return a 1x1 convolution with random zeros, in blocks of output channels."""
    g = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=bias)
    kept = torch.rand(-(-outputs // block), inputs, generator=g) >= sparsity
    weight = torch.randn(outputs, inputs, generator=g) * kept.repeat_interleave(block, 0)[:outputs]
    conv.weight = nn.Parameter(weight[:, :, None, None])
    if bias:
        conv.bias = nn.Parameter(torch.randn(outputs, generator=g))
    return conv.requires_grad_(False)


def sparse(conv, *options, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dense weights are tried too
        return SparseConv1x1.from_conv(conv, *options, **named)


def exact(conv, x):
    """Return the convolution in float64, as a product of matrices."""
    weight, bias = conv.weight[:, :, 0, 0].double(), 0.0 if conv.bias is None else conv.bias.double()[:, None]
    x = x[:, :, :: conv.stride[0], :: conv.stride[1]]
    return (weight @ x.double().flatten(2) + bias).view(len(x), len(weight), *x.shape[2:])


def assert_near(got, wanted):
    limit = RTOL * float(wanted.abs().max())
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= limit


@pytest.mark.parametrize("pixels", PLANES)
def test_equals_the_dense_convolution(pixels, poisoned_memory):
    g = torch.Generator().manual_seed(1)
    few_enough = [(o, k) for o in SIZES for k in SIZES if o * k * pixels <= 4e6 and (o + k) * pixels <= 3e5]
    for i, (outputs, inputs) in enumerate(few_enough):
        large = outputs * inputs > 1000
        for s in ((0.0, 0.5, 0.9, 1.0)[i % 4],) if large else (0.0, 0.5, 0.9, 1.0):
            conv = pruned(outputs, inputs, s, bias=i % 3 > 0, seed=i)
            x = torch.randn(2, inputs, *PLANES[pixels], generator=g)
            wanted = exact(conv, x)
            assert_near(sparse(conv)(x), wanted)
            assert_near(sparse(conv, "relu6", aligned=True)(aligned_copy(x)), wanted.clamp(0, 6))


@pytest.mark.slow
def test_equals_the_dense_convolution_where_it_is_large():
    conv = pruned(1000, 1000, 0.9)
    x = torch.randn(1, 1000, 56, 56)
    assert_near(sparse(conv)(x), exact(conv, x))


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize(("outputs", "inputs", "pixels"), [(7, 5, 49), (16, 3, 63), (9, 20, 70), (1, 1, 1)])
def test_equals_the_authors_stream_of_moves(block, outputs, inputs, pixels):
    conv = pruned(outputs, inputs, 0.6, block=block)
    x = torch.randn(1, inputs, 1, pixels)
    packed = oracle.pack(conv.weight[:, :, 0, 0].numpy(), conv.bias.numpy(), pixels, block)
    wanted = oracle.convolve(x[0, :, 0].numpy(), packed, 0.0, 6.0)
    assert_near(sparse(conv, "relu6", block=block)(x)[0, :, 0], torch.from_numpy(wanted))


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("pixels", [1, 49, 65])
def test_blocks_equal_the_unstructured_kernel(block, pixels):
    for outputs in (block, 4 * block, 4 * block + 3, block - 1):
        conv = pruned(outputs, 33, 0.8, block=block)
        x = torch.randn(2, 33, *PLANES[pixels])
        assert_near(sparse(conv, block=block)(x), sparse(conv)(x))


def test_rows_without_nonzeros_give_the_bias_at_the_limits():
    conv = pruned(6, 8, 1.0)
    conv.bias = nn.Parameter(torch.tensor([-2.0, 0.0, 3.0, 6.0, 7.0, 1.0]), requires_grad=False)
    y = sparse(conv, "relu6")(torch.randn(1, 8, 5, 3))
    assert torch.equal(y, torch.tensor([0.0, 0, 3, 6, 6, 1])[None, :, None, None].expand(1, 6, 5, 3))


def layouts():
    x = torch.randn(3, 24, 6, 10)
    twice = torch.randn(3, 48, 6, 10)
    return {
        "plain": x,
        "aligned": aligned_copy(x),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "turned": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second channel": twice[:, ::2],
        "channels of an aligned tensor": aligned_copy(twice)[:, 5:29],
        "rows of a plane": torch.randn(3, 24, 9, 10)[:, :, 2:8],
        "a window": torch.randn(3, 24, 9, 14)[:, :, 2:8, 1:11],
        "one image for all": x[:1].expand(3, -1, -1, -1),
        "off the alignment": torch.randn(3 * 24 * 60 + 1)[1:].view(3, 24, 6, 10),
        "no image": x[:0],
        "no pixel": x[:, :, :0],
    }


@pytest.mark.parametrize("name", layouts())
def test_reads_every_layout(name):
    x, conv = layouts()[name], pruned(10, 24, 0.7)
    before, wanted = x.clone(), exact(conv, x)
    for aligned in (False, True):
        y = sparse(conv, aligned=aligned)(x)
        assert aligned or y.is_contiguous()
        assert y.shape == wanted.shape
        assert not wanted.numel() or float((y - wanted).abs().max()) <= RTOL * float(wanted.abs().max())
    assert torch.equal(x, before)


def test_an_aligned_output_is_where_kernels_want_it_and_read_by_torch():
    conv, x = pruned(10, 24, 0.7), torch.randn(2, 24, 7, 7)
    plain, aligned = sparse(conv)(x), sparse(conv, aligned=True)(x)
    assert aligned.stride() == (10 * aligned_step(49), aligned_step(49), 7, 1)
    assert aligned_step(49) // 16 % 2 == 1
    assert aligned.data_ptr() % 64 == 0
    assert torch.equal(plain, aligned)
    assert torch.equal(plain.flatten(1), aligned.flatten(1))
    assert torch.equal(nn.functional.max_pool2d(plain, 2), nn.functional.max_pool2d(aligned, 2))
    # The same strips and the same order of sums, in place or copied.
    assert torch.equal(sparse(conv)(x), sparse(conv)(aligned_copy(x)))


def test_nan_and_infinity_reach_the_pixels_they_are_in():
    conv, x = pruned(4, 6, 0.3), torch.randn(1, 6, 4, 5)
    clean = sparse(conv, "relu6")(x)
    x[0, 2, 1, 1] = float("nan")
    y = sparse(conv, "relu6")(x)
    touched = torch.zeros(4, 4, 5, dtype=torch.bool)
    touched[conv.weight[:, 2, 0, 0] != 0, 1, 1] = True
    assert torch.equal(y[0].isnan(), touched)
    assert torch.equal(y[0][~touched], clean[0][~touched])


@pytest.mark.parametrize("team", [True, False])
@pytest.mark.parametrize(("images", "pixels"), [(1, 49), (3, 64), (1, 3136)])
def test_threads_change_no_bit(team, images, pixels, monkeypatch):
    conv = pruned(160, 256, 0.5, block=2)
    x = torch.randn(images, 256, *PLANES[pixels])
    layer = sparse(conv, block=2)
    assert layer.weight.nonzeros * pixels * images > 2 * GRAIN
    torch.set_num_threads(1)
    wanted = layer(x)
    if not team:
        monkeypatch.setattr(native_ranges, "native_team", lambda: None)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), wanted)


def test_strides_subsample():
    conv = pruned(8, 12, 0.5, stride=2)
    x = torch.randn(2, 12, 9, 6)
    assert_near(sparse(conv)(x), exact(conv, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_through_float32(dtype):
    layer, x = sparse(pruned(8, 12, 0.5)), torch.randn(2, 12, 5, 5).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x.float()).to(dtype))
    halved = copy.deepcopy(layer).to(torch.bfloat16)
    assert halved.weight.values.dtype == torch.float32
    assert torch.equal(halved(x), y)


@pytest.mark.parametrize("activation", [None, "relu6"])
def test_gradients_reach_input_and_bias(activation):
    conv = pruned(8, 12, 0.5)
    layer = sparse(conv, activation)
    layer.bias.requires_grad_()
    x = torch.randn(2, 12, 5, 5, requires_grad=True)
    layer(x).square().sum().backward()
    got = [x.grad, layer.bias.grad]
    x.grad, bias = None, conv.bias.detach().clone().requires_grad_()
    y = nn.functional.conv2d(x, conv.weight, bias)
    (y if activation is None else y.clamp(0, 6)).square().sum().backward()
    for ours, wanted in zip(got, (x.grad, bias.grad), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_bytes_are_a_sixth_of_the_dense_layer():
    conv = pruned(256, 256, 0.0)
    order = conv.weight.abs().flatten().argsort()
    conv.weight.view(-1)[order[: round(0.9 * order.numel())]] = 0
    assert sparse(conv).weight.nbytes <= 0.16 * conv.weight.nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3}, r"kernel is \(3, 3\)"),
        ({"kernel_size": 1, "groups": 2}, "2 groups"),
        ({"kernel_size": 1, "stride": (1, 2)}, "strides differ"),
        ({"kernel_size": 1, "padding": 1}, "pads by"),
        ({"kernel_size": 1, "dtype": torch.float64}, r"convert it with \.float\(\)"),
    ],
)
def test_refuses_other_convolutions(options, message):
    with pytest.raises(QuernelError, match=message):
        SparseConv1x1.from_conv(nn.Conv2d(4, 4, **options))


def test_refuses_bad_arguments():
    weight = SparseWeight.from_dense(torch.eye(4)[:, :, None, None])
    with pytest.raises(QuernelError, match="activation must be one of None, 'relu', 'relu6'; got 'gelu'"):
        SparseConv1x1(weight, activation="gelu")
    with pytest.raises(QuernelError, match=r"stride must be an integer in \[1"):
        SparseConv1x1(weight, stride=0)
    with pytest.raises(QuernelError, match=r"bias must have shape \(4,\)"):
        SparseConv1x1(weight, torch.zeros(3))
    with pytest.raises(QuernelError, match="weight must be a StoredWeight of 4 dimensions"):
        SparseConv1x1(SparseWeight.from_dense(torch.eye(4)))
    with pytest.raises(QuernelError, match="conv must be Conv2d; got Linear"):
        SparseConv1x1.from_conv(nn.Linear(4, 4))
    layer = SparseConv1x1(weight)
    for shape in ((1, 5, 3, 3), (4, 3, 3), (4,)):
        with pytest.raises(QuernelError, match=r"x must be floating of shape \(N, 4, H, W\)"):
            layer(torch.zeros(shape))
    with pytest.raises(QuernelError, match=r"got torch\.int64"):
        layer(torch.zeros(1, 4, 3, 3, dtype=torch.int64))


def test_warns_of_the_break_even():
    with pytest.warns(UserWarning, match="50% zeros: sparse products break even"):
        SparseConv1x1.from_conv(nn.Conv2d(4, 4, 1, bias=False).requires_grad_(False).apply(_halve))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseConv1x1.from_conv(pruned(64, 64, 0.9))


def _halve(conv):
    conv.weight.view(-1)[::2] = 0
    conv.weight.view(-1)[1::2] = 1


@pytest.mark.parametrize("aligned", [False, True])
def test_opcheck(aligned):
    weight = SparseWeight.from_dense(torch.eye(4, 6)).operands()
    x = torch.randn(2, 6, 5, 3)
    arguments = (x, torch.randn(4), 0.0, 6.0, *weight, aligned)
    torch.library.opcheck(torch.ops.quernel.sparse_conv1x1.default, arguments)


def test_a_chain_runs_compiled_and_exported():
    net = nn.Sequential(
        sparse(pruned(20, 12, 0.6), "relu", aligned=True), sparse(pruned(8, 20, 0.6, seed=1)), nn.Flatten()
    ).eval()
    x = torch.randn(2, 12, 7, 7)
    with torch.no_grad():
        wanted = net(x)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)(x)
        exported = torch.export.export(net, (x,)).module()(x)
    torch.compiler.reset()
    assert torch.equal(compiled, wanted)
    assert torch.equal(exported, wanted)


def test_an_exported_graph_takes_other_sizes():
    net = nn.Sequential(sparse(pruned(20, 12, 0.6), "relu", aligned=True), sparse(pruned(8, 20, 0.6, seed=1))).eval()
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(net, (torch.randn(2, 12, 7, 8),), dynamic_shapes=({**free},)).module()
        for shape in ((2, 12, 7, 8), (3, 12, 14, 5)):
            x = torch.randn(shape)
            assert torch.equal(program(x), net(x))


@pytest.mark.parametrize("aligned", [False, True])
def test_devices_without_kernels_take_the_dense_weight(aligned):
    conv, x = pruned(10, 24, 0.7, block=4), torch.randn(2, 24, 5, 7)
    operands = sparse(conv, block=4).weight.operands()
    y = _plain_conv(x, conv.bias, 0.0, 6.0, *operands, aligned)
    assert y.stride() == sparse(conv, aligned=aligned)(x).stride()
    assert_near(y, sparse(conv, "relu6")(x))
    assert_near(_plain_linear(x[0, :, 0].T, conv.bias, 0.0, 6.0, *operands), y[0, :, 0].T)


def test_the_oracle_is_the_dense_product():
    g = np.random.default_rng(0)
    weight = (g.normal(size=(7, 5)) * (g.random((7, 5)) < 0.4)).astype(np.float32)
    bias, a = g.normal(size=7).astype(np.float32), g.normal(size=(5, 71)).astype(np.float32)
    for block in (1, 2, 4):
        got = oracle.convolve(a, oracle.pack(weight, bias, 71, block))
        np.testing.assert_allclose(got, weight.astype(np.float64) @ a + bias[:, None], atol=1e-12)
