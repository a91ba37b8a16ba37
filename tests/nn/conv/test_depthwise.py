"""``DepthwiseConv2d``: equal to its definition and to torch's at every size, stride and layout; what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import DepthwiseConv2d
from quernel.nn import _native_ranges as native_ranges
from quernel.nn._channel_major import aligned_copy, aligned_step
from quernel.nn._depthwise_kernels import border_masks
from quernel.nn._depthwise_op import GRAIN, _plain
from tests.reference import fast_sparse_convnets as oracle

# Sums of at most 25 products and a bias of size one.
ATOL = 1e-5
PLANES = [(1, 1), (1, 5), (3, 2), (3, 3), (4, 4), (7, 7), (8, 8), (5, 31), (17, 33), (16, 16), (9, 65), (32, 32)]


def filters(channels, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(channels, 1, size, size, generator=g), torch.randn(channels, generator=g)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_equals_torch_at_every_plane(size, stride, poisoned_memory):
    weight, bias = filters(3, size)
    for height, width in PLANES:
        x = torch.randn(2, 3, height, width)
        wanted = F.conv2d(x, weight, bias, stride, size // 2, groups=3)
        for aligned in (False, True):
            y = DepthwiseConv2d(weight, bias, stride=stride, aligned=aligned)(x)
            torch.testing.assert_close(y, wanted, rtol=0, atol=ATOL)
            y = DepthwiseConv2d(weight, None, stride=stride, activation="relu6", aligned=aligned)(aligned_copy(x))
            clamped = F.conv2d(x, weight, None, stride, size // 2, groups=3).clamp(0, 6)
            torch.testing.assert_close(y, clamped, rtol=0, atol=ATOL)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
def test_equals_the_definition(size, stride):
    weight, bias = filters(2, size)
    x = torch.randn(1, 2, 6, 19)
    wanted = oracle.depthwise(x[0].numpy(), weight[:, 0].numpy(), bias.numpy(), stride, 0.0)
    got = DepthwiseConv2d(weight, bias, stride=stride, activation="relu")(x)[0]
    torch.testing.assert_close(got.double(), torch.from_numpy(wanted), rtol=0, atol=ATOL)


def test_masks_leave_out_what_lies_beyond_the_border():
    masks = border_masks(3, 1, 4, 5).numpy().view(np.uint16)  # 20 pixels: two vectors, and one behind
    assert masks.shape == (3, 6)
    above, left = masks[0, 0], masks[0, 3]
    assert [above >> lane & 1 for lane in range(16)] == [0] * 5 + [1] * 11
    assert [left >> lane & 1 for lane in range(16)] == [lane % 5 > 0 for lane in range(16)]
    assert not masks[2].any()
    assert [masks[1, 2] >> lane & 1 for lane in range(16)] == [0] * 16


@pytest.mark.parametrize("stride", [1, 2])
def test_reads_every_layout(stride):
    weight, bias = filters(6, 3)
    layer = DepthwiseConv2d(weight, bias, stride=stride)
    x = torch.randn(2, 6, 8, 10)
    views = [
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.randn(2, 12, 8, 10)[:, ::2],
        torch.randn(2, 6, 11, 13)[:, :, 2:10, 1:11],
        x[:1].expand(3, -1, -1, -1),
        x[:0],
    ]
    for view in views:
        wanted = F.conv2d(view.contiguous(), weight, bias, stride, 1, groups=6)
        torch.testing.assert_close(layer(view), wanted, rtol=0, atol=ATOL)


def test_the_aligned_output_hands_on_its_layout():
    weight, bias = filters(6, 3)
    x = torch.randn(2, 6, 7, 7)
    y = DepthwiseConv2d(weight, bias, aligned=True)(x)
    assert y.stride() == (6 * aligned_step(49), aligned_step(49), 7, 1)
    assert torch.equal(y, DepthwiseConv2d(weight, bias)(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_nan_stays_within_its_reach(stride):
    weight, bias = filters(2, 3)
    layer, x = DepthwiseConv2d(weight, bias, stride=stride, activation="relu6"), torch.randn(1, 2, 9, 9)
    x[0, 1, 4, 4] = float("nan")
    reached = F.conv2d(x, weight, bias, stride, 1, groups=2).isnan()
    assert reached.any()
    assert torch.equal(layer(x).isnan(), reached)


@pytest.mark.parametrize("team", [True, False])
def test_threads_change_no_bit(team, monkeypatch):
    weight, bias = filters(70, 3)
    layer, x = DepthwiseConv2d(weight, bias), torch.randn(2, 70, 16, 16)
    assert x.numel() * 9 > 2 * GRAIN
    torch.set_num_threads(1)
    wanted = layer(x)
    if not team:
        monkeypatch.setattr(native_ranges, "native_team", lambda: None)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_are_torchs(stride, activation):
    weight, bias = (t.requires_grad_() for t in filters(4, 3))
    layer = DepthwiseConv2d(nn.Parameter(weight), nn.Parameter(bias), stride=stride, activation=activation)
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    layer(x).square().sum().backward()
    got = [x.grad, layer.weight.grad, layer.bias.grad]
    x.grad, w, b = None, weight.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    y = F.conv2d(x, w, b, stride, 1, groups=4)
    (y if activation is None else y.relu()).square().sum().backward()
    for ours, wanted in zip(got, (x.grad, w.grad, b.grad), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_takes_over_a_trained_convolution():
    conv = nn.Conv2d(5, 5, 5, 2, 2, groups=5).eval()
    layer = DepthwiseConv2d.from_conv(conv, "relu")
    assert layer.weight is conv.weight
    assert not layer.training
    x = torch.randn(1, 5, 9, 9)
    torch.testing.assert_close(layer(x), conv(x).relu(), rtol=0, atol=ATOL)
    half = layer.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3, "padding": 1}, "1 groups for 4 inputs"),
        ({"kernel_size": 7, "padding": 3, "groups": 4}, r"kernel is \(7, 7\)"),
        ({"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4}, r"dilation \(2, 2\)"),
        ({"kernel_size": 3, "padding": 1, "stride": 3, "groups": 4}, r"stride is \(3, 3\)"),
        ({"kernel_size": 3, "groups": 4}, r"padding is \(0, 0\)"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 4}, "reflect"),
        ({"kernel_size": 3, "padding": 1, "groups": 4, "dtype": torch.float64}, "float64"),
    ],
)
def test_refuses_other_convolutions(options, message):
    with pytest.raises(QuernelError, match=message):
        DepthwiseConv2d.from_conv(nn.Conv2d(4, 4, **options))


def test_refuses_bad_arguments():
    weight, bias = filters(4, 3)
    for shape in ((4, 2, 3, 3), (4, 1, 3, 5), (4, 1, 7, 7), (4, 3, 3)):
        with pytest.raises(QuernelError, match=r"weight must have shape \(C, 1, 3, 3\)"):
            DepthwiseConv2d(torch.zeros(shape))
    with pytest.raises(QuernelError, match=r"bias must have shape \(4,\); got \(3,\)"):
        DepthwiseConv2d(weight, bias[:3])
    with pytest.raises(QuernelError, match="stride must be one of 1, 2; got 3"):
        DepthwiseConv2d(weight, stride=3)
    layer = DepthwiseConv2d(weight)
    for x in (torch.zeros(1, 5, 3, 3), torch.zeros(4, 3, 3), torch.zeros(1, 4, 3, 3, dtype=torch.int32)):
        with pytest.raises(QuernelError, match=r"x must be floating of shape \(N, 4, H, W\)"):
            layer(x)


@pytest.mark.parametrize("stride", [1, 2])
def test_devices_without_kernels_take_torchs_convolution(stride):
    weight, bias = filters(3, 5)
    x = torch.randn(2, 3, 7, 6)
    y = _plain(x, weight, bias, 0.0, 6.0, stride, True)
    wanted = DepthwiseConv2d(weight, bias, stride=stride, activation="relu6", aligned=True)(x)
    assert y.stride() == wanted.stride()
    torch.testing.assert_close(y, wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(stride):
    weight, bias = filters(3, 3)
    arguments = (torch.randn(2, 3, 5, 6), weight, bias, 0.0, 6.0, stride, True)
    torch.library.opcheck(torch.ops.quernel.depthwise_conv2d.default, arguments)
