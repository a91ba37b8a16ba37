"""``fold_batch_norm``: one layer computes what layer and batch norm did, for every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn.functional import fold_batch_norm

# Rounding of float32 sums over at most 45 products of order one.
CLOSE = 1e-5
CLOSE64 = 1e-13

CASES = {
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), (4, 5)),
    "conv1d": (nn.Conv1d(5, 6, 3), nn.BatchNorm1d(6), (4, 5, 7)),
    "conv2d without bias": (nn.Conv2d(5, 6, 3, bias=False), nn.BatchNorm2d(6), (4, 5, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (4, 4, 7, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6, eps=1e-3), (4, 6, 7, 7)),
    "conv3d": (nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6, affine=False), (4, 2, 3, 3, 3)),
}


def trained(norm: Any) -> Any:
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm.eval()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, CLOSE), (torch.float64, CLOSE64)])
def test_folded_layer_computes_the_same(name: str, dtype: torch.dtype, close: float) -> None:
    layer, norm, shape = CASES[name]
    layer, norm = layer.to(dtype), trained(norm).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = norm(layer(x))
    weight, bias = fold(layer, norm)
    assert weight.dtype == bias.dtype == dtype
    assert weight.shape == layer.weight.shape
    folded = torch.func.functional_call(with_bias(layer), {"weight": weight, "bias": bias}, x)
    torch.testing.assert_close(folded, expected, rtol=close, atol=close)


def fold(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    return fold_batch_norm(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def with_bias(layer: Any) -> Any:
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
    return layer


def test_small_variances_are_folded_in_float64() -> None:
    layer, norm = nn.Linear(5, 6), trained(nn.BatchNorm1d(6, eps=1e-12))
    norm.running_var.fill_(1e-10)
    weight, _ = fold(layer, norm)
    scale = norm.weight.double() / (norm.running_var.double() + 1e-12).sqrt()
    expected = (layer.weight.double() * scale[:, None]).float()
    torch.testing.assert_close(weight, expected, rtol=1e-7, atol=0)  # one rounding, at the end


def test_gradients_reach_every_operand() -> None:
    layer, norm = nn.Conv2d(2, 3, 3).double(), trained(nn.BatchNorm2d(3)).double()
    tensors = [layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
    inputs = tuple(t.detach().clone().requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(lambda *t: fold_batch_norm(*t, eps=norm.eps), inputs)


def test_vectors_of_another_layer_are_refused() -> None:
    layer, norm = nn.Linear(5, 6), nn.BatchNorm1d(7)
    with pytest.raises(QuernelError, match=r"running_mean must hold one value for each of the 6 rows.*\(7,\)"):
        fold(layer, norm)
    with pytest.raises(QuernelError, match="eps must be"):
        fold_batch_norm(layer.weight, None, torch.zeros(6), torch.ones(6), eps=-1.0)
