"""Kernels from coordinates: the formula, scales at the start, grids, context, the renormalisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn import MAGNet
from quernel.nn.magnet import renormalised
from tests.reference import hyperzzw as reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(*args: Any, **options: Any) -> MAGNet:
    torch.manual_seed(0)
    return MAGNet(*args, **options)


@pytest.mark.parametrize(("ndim", "size"), [(1, 7), (2, (3, 5)), (3, (2, 3, 2)), (1, 1)])
def test_it_is_the_formula_point_by_point(ndim: int, size: Any) -> None:
    net = made(4, ndim, size, hidden=5, layers=2)
    with torch.no_grad():
        net.map.copy_(draw(*net.map.shape))
        net.phases.copy_(draw(*net.phases.shape, seed=1))
    torch.testing.assert_close(net()[0], reference.magnet(net).float(), rtol=1e-4, atol=1e-6)


def test_rows_come_first() -> None:
    net = made(1, 2, (3, 4), hidden=4, layers=1)
    with torch.no_grad():
        net.frequencies[..., 1] = 0.0  # nothing along a row
    w = net()[0, 0]
    torch.testing.assert_close(w, w[:, :1].expand_as(w))
    assert float((w[0] - w[1]).abs().max()) > 0


def test_the_scale_at_the_start_is_about_one_over_the_root_of_the_grid() -> None:
    for size in (8, 32):
        stds = [float(MAGNet(16, 2, size).forward().std()) for _ in range(5)]
        assert 0.2 < size * sum(stds) / len(stds) < 5.0


@pytest.mark.parametrize(("omega0", "low", "high"), [(0.1, 0.85, 1.0), (1.0, 0.6, 0.95), (10.0, -0.1, 0.3)])
def test_neighbours_agree_by_the_scale_of_the_frequencies(omega0: float, low: float, high: float) -> None:
    w = made(64, 2, 32, omega0=omega0)()[0].flatten(1).double()
    w = (w - w.mean(1, keepdim=True)).unflatten(1, (32, 32))
    together = (w[:, :, 1:] * w[:, :, :-1]).mean() / w.square().mean()
    assert low < float(together) < high


def test_later_layers_have_smaller_frequencies() -> None:
    net = made(1, 2, 4, hidden=4000, layers=2)
    sizes = net.frequencies.detach().abs().mean((1, 2))
    # The mean of Gamma(6 / (i + 1)) is 6 / (i + 1); the mean of the uniform's size is fixed.
    torch.testing.assert_close(sizes / sizes[0], torch.tensor([1.0, 1 / 2, 1 / 3]), rtol=0.1, atol=0.0)


def test_large_frequencies_are_computed_in_double() -> None:
    net = made(2, 2, 9, hidden=6, omega0=2000.0)
    torch.testing.assert_close(net()[0], reference.magnet(net).float(), rtol=1e-4, atol=1e-6)


def test_parameters_do_not_grow_with_the_grid_but_for_the_map() -> None:
    def count(net: MAGNet) -> int:
        return sum(p.numel() for p in net.parameters())

    small, large = made(8, 2, 4), made(8, 2, 64)
    assert count(large) - count(small) == 64 * 64 - 4 * 4


def test_another_grid_samples_the_same_function() -> None:
    net = made(3, 2, 5, hidden=8)
    with torch.no_grad():
        net.map.copy_(draw(1, 1, 5, 5))
    # Every second point of nine is a point of five.
    torch.testing.assert_close(net(size=(9, 9))[..., ::2, ::2], net(), rtol=1e-4, atol=1e-5)


def test_kernels_follow_the_content_of_each_image() -> None:
    net = made(4, 2, 3, hidden=6, context_dim=5)
    content = draw(2, 5, 7, 8)
    w = net(content)
    assert w.shape == (2, 4, 3, 3)
    torch.testing.assert_close(net(content[1:]), w[1:])
    assert float((w[0] - w[1]).abs().max()) > 1e-3
    with pytest.raises(QuernelError, match="content must have 5 channels"):
        net(draw(2, 4, 3, 3))


def test_the_renormalisation_and_its_gradient() -> None:
    z, keep, renew = draw(2, 3, 3, 4).requires_grad_(), torch.full((4,), 1.5), torch.full((4,), 0.2)
    norm = z.detach().square().sum((1, 2), keepdim=True).sqrt()
    y = renormalised(z, keep, renew)
    torch.testing.assert_close(y, 1.5 * z + 0.2 * z / norm)
    (got,) = torch.autograd.grad((y * draw(*y.shape, seed=1)).sum(), z)
    (wanted,) = torch.autograd.grad(
        (0.2 * z / z.square().sum((1, 2), keepdim=True).sqrt() * draw(*y.shape, seed=1)).sum(), z
    )
    torch.testing.assert_close(got, wanted)
    assert renormalised(torch.zeros(1, 2, 2, 4), keep, renew).isfinite().all()


def test_gradients() -> None:
    net = made(2, 2, 3, hidden=3, layers=1, context_dim=2).double()
    net.keep.data.zero_()  # what gradients do not flow through by design
    content = draw(1, 2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(net, (content,))
    plain = made(2, 1, 4, hidden=3).double()
    parameters = tuple(p.detach().clone().requires_grad_() for p in plain.parameters())
    names = [name for name, _ in plain.named_parameters()]
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(plain, dict(zip(names, values, strict=True)), ()), parameters
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, 3), "out_channels"),
        ((2, 4, 3), "ndim"),
        ((2, 2, (3,)), "size"),
        ((2, 2, 0), "size"),
        ((2, 2, 3, 0), "hidden"),
        ((2, 2, 3, 4, 0), "layers"),
        ((2, 2, 3, 4, 2, 0.0), "omega0"),
    ],
)
def test_what_cannot_be_right_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        MAGNet(*arguments)


def test_shapes_are_found_on_the_meta_device() -> None:
    assert MAGNet(4, 2, 5, hidden=3).to("meta")().shape == (1, 4, 5, 5)
