"""``SparseLinear``: equal to the dense layer at every number of tokens; threads, gradients, refusals."""

import warnings

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.nn import SparseLinear
from quernel.nn import _native_ranges as native_ranges
from quernel.nn._sparse_ops import GRAIN
from quernel.nn.weights import SparseWeight

# float32 sums of at most a few hundred products, against float64.
RTOL = 1e-5


def pruned(outputs, inputs, sparsity, *, block=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    kept = torch.rand(-(-outputs // block), inputs, generator=g) >= sparsity
    weight = torch.randn(outputs, inputs, generator=g) * kept.repeat_interleave(block, 0)[:outputs]
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(torch.randn(outputs, generator=g))
    return linear.requires_grad_(False)


def sparse(linear, *options, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dense weights are tried too
        return SparseLinear.from_linear(linear, *options, **named)


def exact(linear, x):
    return x.double() @ linear.weight.double().T + linear.bias.double()


@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_equals_the_dense_layer(tokens, block, poisoned_memory):
    for outputs, inputs in ((1, 1), (3, 16), (16, 3), (33, 17), (64, 200), (130, 64)):
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            linear = pruned(outputs, inputs, sparsity, block=block)
            x = torch.randn(tokens, inputs)
            wanted = exact(linear, x).clamp(0, 6)
            y = sparse(linear, "relu6", block=block)(x)
            assert float((y - wanted).abs().max()) <= RTOL * max(1.0, float(exact(linear, x).abs().max()))


def test_shapes_and_layouts():
    linear = pruned(7, 18, 0.5)
    layer, x = sparse(linear), torch.randn(24, 18)
    wanted = layer(x)
    assert torch.equal(layer(x.view(2, 3, 4, 18)), wanted.view(2, 3, 4, 7))
    assert layer(x[5]).shape == (7,)
    assert torch.equal(layer(x.t().contiguous().t()), wanted)
    assert torch.equal(layer(torch.stack([x, x], -1)[..., 0]), wanted)
    assert layer(x[:0]).shape == (0, 7)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("team", [True, False])
@pytest.mark.parametrize("tokens", [64, 200])
def test_threads_change_no_bit(team, tokens, monkeypatch):
    layer = sparse(pruned(203, 300, 0.5, block=4), block=4)
    x = torch.randn(tokens, 300)
    assert layer.weight.nonzeros * tokens > 2 * GRAIN
    torch.set_num_threads(1)
    wanted = layer(x)
    if not team:
        monkeypatch.setattr(native_ranges, "native_team", lambda: None)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), wanted)


def test_gradients_reach_input_and_bias():
    linear = pruned(8, 12, 0.5)
    layer = sparse(linear, "relu")
    layer.bias.requires_grad_()
    x = torch.randn(2, 5, 12, requires_grad=True)
    layer(x).square().sum().backward()
    got = [x.grad, layer.bias.grad]
    x.grad, bias = None, linear.bias.detach().clone().requires_grad_()
    nn.functional.linear(x, linear.weight, bias).relu().square().sum().backward()
    for ours, wanted in zip(got, (x.grad, bias.grad), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_refusals():
    with pytest.raises(QuernelError, match="linear must be Linear; got Conv2d"):
        SparseLinear.from_linear(nn.Conv2d(4, 4, 1))
    with pytest.raises(QuernelError, match=r"weight must be float32.*got torch\.bfloat16"):
        SparseLinear.from_linear(nn.Linear(4, 4).bfloat16())
    with pytest.raises(QuernelError, match="weight must be SparseWeight"):
        SparseLinear(torch.eye(4))
    with pytest.raises(QuernelError, match="weight must be a StoredWeight of 2 dimensions"):
        SparseLinear(SparseWeight.from_dense(torch.eye(4)[:, :, None, None]))
    with pytest.raises(QuernelError, match=r"x must be floating of shape \(\.\.\., 4\)"):
        sparse(pruned(3, 4, 0.5))(torch.zeros(2, 5))


def test_opcheck():
    operands = SparseWeight.from_dense(torch.eye(4, 6)).operands()
    arguments = (torch.randn(3, 6), torch.randn(4), 0.0, 6.0, *operands)
    torch.library.opcheck(torch.ops.quernel.sparse_linear.default, arguments)
