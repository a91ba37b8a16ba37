"""``FactorizedConvTranspose1d/2d/3d``: the dense layer's numbers, sizes, conversions, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quernel._errors import QuernelError
from quernel.nn import FactorizedConvTranspose1d, FactorizedConvTranspose2d, FactorizedConvTranspose3d

LAYERS = {1: FactorizedConvTranspose1d, 2: FactorizedConvTranspose2d, 3: FactorizedConvTranspose3d}
CONVS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
# float32 sums in another order; relative to the whole output.
CLOSE = 1e-5


def image(dims, channels=4):
    return torch.randn(2, channels, *(6, 5, 4)[:dims], generator=torch.Generator().manual_seed(1))


def relative(got, wanted):
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_torchs_layer(dims):
    x = image(dims)
    for stride, padding, dilation, rank in itertools.product((1, 2, 3), (0, 1), (1, 2), (1, 3)):
        extra = min(1, stride - 1)
        layer = LAYERS[dims](4, 6, (3, 2, 4)[:dims], stride, padding, extra, dilation, rank)
        dense = layer.to_conv()
        assert type(dense) is CONVS[dims]
        assert relative(layer(x), dense(x)) < CLOSE
        assert relative(dense.weight, layer.kernel()) < CLOSE


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_from_conv_and_fuse(dims):
    conv = CONVS[dims](4, 6, (3, 2, 3)[:dims], stride=2, padding=1, output_padding=1).eval()
    layer = LAYERS[dims].from_conv(conv, rank=(3, 6, 18)[dims - 1])
    x = image(dims)
    assert relative(layer.kernel(), conv.weight) < CLOSE
    assert relative(layer(x), conv(x)) < CLOSE
    plain = layer.fuse()
    assert relative(plain(x), conv(x)) < CLOSE
    assert not any("Factorized" in type(part).__name__ for part in plain.modules())


def test_output_size_chooses_among_what_a_stride_leaves_open():
    layer, x = FactorizedConvTranspose2d(4, 6, 3, stride=3), image(2)
    dense = layer.to_conv()
    for size in ((18, 15), (19, 16), (20, 17), (2, 6, 19, 15)):
        assert relative(layer(x, size), dense(x, size)) < CLOSE
    assert torch.equal(layer(x[0], (19, 16)), layer(x, (19, 16))[0])
    for size in ((17, 15), (18, 18), (18,)):
        with pytest.raises(QuernelError, match=r"output_size must be between \[18, 15\] and \[20, 17\]"):
            layer(x, size)


def test_multiply_adds_are_what_torch_counts():
    layer, x = FactorizedConvTranspose2d(4, 6, (3, 5), (2, 3), 1, (1, 0), rank=2, bias=False), image(2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * len(x) * layer.multiply_adds(6, 5)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_gradients_are_those_through_the_dense_kernel(memory_efficient):
    layer = FactorizedConvTranspose2d(3, 4, 3, 2, 1, rank=2, dtype=torch.float64, memory_efficient=memory_efficient)
    x = image(2, 3).double().requires_grad_()
    dense = torch.nn.functional.conv_transpose2d(x, layer.kernel(), layer.bias, 2, 1)
    leaves = [x, *layer.parameters()]
    for got, wanted in zip(
        torch.autograd.grad(layer(x).square().sum(), leaves),
        torch.autograd.grad(dense.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_bad_arguments_are_named():
    with pytest.raises(QuernelError, match="rank must be an integer in"):
        FactorizedConvTranspose1d(3, 4, 3, rank=0)
    with pytest.raises(QuernelError, match="conv must be ConvTranspose2d"):
        FactorizedConvTranspose2d.from_conv(nn.Conv2d(3, 4, 3), 1)
    with pytest.raises(QuernelError, match="x must be of shape"):
        FactorizedConvTranspose2d(3, 4, 3)(torch.ones(1, 2, 4, 4))
