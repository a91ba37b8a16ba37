"""Terminator: published sizes, the loss of its slow nets, single images, refusals."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.models import Terminator, slow_neural_loss
from quernel.nn import MAGNet
from quernel.nn.conv.sfne import tiled


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_published_sizes() -> None:
    net = Terminator()
    nets = [m for m in net.modules() if isinstance(m, MAGNet)]
    # In public code the factors of the renormalisation are no parameters.
    factors = sum(m.keep.numel() + m.renew.numel() for m in nets if m.context_dim is not None)
    total, slow = count(net) - factors, sum(map(count, nets)) - factors
    assert round(total / 1e6, 3) == 1.337
    assert round(slow / 1e3) == 319 and round(100 * slow / total) == 24
    worlds = sum(count(block.world) for block in net.blocks)
    assert round(worlds / 1e3) == 71 and round(100 * worlds / total) == 5


def test_everything_is_a_parameter_and_in_the_state() -> None:
    net = Terminator(size=4, factors=(4, 1), layers=(1, 1), dropout=(0, 0))
    assert {name for name, _ in net.named_parameters()} <= set(net.state_dict())
    twin = Terminator.from_config(net.config())
    twin.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(twin.eval()(x), net.eval()(x))
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)


def test_maps_grow_with_the_image_and_nothing_else() -> None:
    sizes = [count(Terminator(size=size, factors=(4, 3))) for size in (8, 16)]
    maps = [sum(p.numel() for name, p in Terminator(size=s, factors=(4, 3)).named_parameters() if name.endswith("map"))
            for s in (8, 16)]  # fmt: skip
    assert sizes[1] - sizes[0] == maps[1] - maps[0]


def test_the_slow_loss_is_zero_for_repeated_kernels_and_known_for_constants() -> None:
    first = torch.randn(1, 3, 4, 4)
    second, third = tiled(first, 12), tiled(first, 24)
    assert float(slow_neural_loss([first, second, third], (4, 2))) == 0
    constants = [torch.full((1, c, 2, 2), v) for c, v in ((3, 1.0), (12, 3.0), (24, 6.0))]
    assert float(slow_neural_loss(constants, (4, 2, 2))) == 4 + 9 + 25
    with pytest.raises(QuernelError, match="factors must lead from 3 channels"):
        slow_neural_loss([first, second], (2,))


def test_the_slow_loss_reaches_the_slow_nets_alone() -> None:
    net = Terminator(size=4, factors=(4, 3), layers=(1, 1))
    net.slow_loss().backward()
    reached = {name for name, p in net.named_parameters() if p.grad is not None}
    assert reached and all(".world.slow." in name for name in reached)


def test_the_penalty_is_the_sum_of_norms() -> None:
    torch.manual_seed(0)
    net = Terminator(size=4, factors=(4, 1), num_classes=3)
    fast = slow = 0.0
    for name, p in net.named_parameters():
        parts = name.split(".")
        net_of = next((m for n, m in net.named_modules() if isinstance(m, MAGNet) and name.startswith(n + ".")), None)
        if net_of is None:
            fast += float(p.detach().double().square().sum().sqrt())
        elif parts[-1] == "weight":
            slow += float(p.detach().double().square().sum().sqrt())
        elif parts[-1] == "frequencies":  # one layer of sines each
            slow += sum(float(u.double().square().sum().sqrt()) for u in p.detach())
    penalty = net.norm_penalty(1e-3)
    assert float(penalty) == pytest.approx(1e-3 * (fast + 1e-6 * slow), rel=1e-5)
    assert slow > 1 and float(net.norm_penalty(0.0)) == 0.0
    penalty.backward()
    zeros = net.biases
    assert float(zeros.detach().abs().max()) == 0 and torch.equal(zeros.grad, torch.zeros_like(zeros))
    weight = net.head.weight
    torch.testing.assert_close(weight.grad, 1e-3 * weight.detach() / weight.detach().norm())
    with pytest.raises(QuernelError, match="factor"):
        net.norm_penalty(-1.0)


def test_it_trains_without_residuals() -> None:
    torch.manual_seed(0)
    net = Terminator(size=8, in_channels=1, factors=(12, 2), num_classes=4, dropout=(0, 0))
    x, y = torch.randn(16, 1, 8, 8), torch.arange(16) % 4
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": ()}, "1 to 5 blocks"),
        ({"factors": (4, 3), "layers": (1,)}, "one value for each"),
        ({"factors": (5,)}, "multiple of 12"),
        ({"size": 0}, "size"),
        ({"omega0": 0.0}, "omega0"),
    ],
)
def test_what_cannot_be_right_is_refused(options: dict, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        Terminator(**options)
