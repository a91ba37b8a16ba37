"""What mixers keep of their parameters: used again while nothing changes, and never after it has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quernel.nn import H3Conv, HyperZZWGlobal, LongConv, LongConvBlock, Mixer, SGConv
from quernel.nn.conv._spectra import CachingMixer

MAKES: list[Callable[[], Any]] = [
    lambda: LongConv(4, 9),
    lambda: LongConvBlock(4, 9),
    lambda: SGConv(4, 9),
    lambda: H3Conv(4, 9),
    lambda: HyperZZWGlobal(4, 3, hidden=8),
]
NAMES = ["LongConv", "LongConvBlock", "SGConv", "H3Conv", "HyperZZWGlobal"]


class Counting(CachingMixer):
    """Scales by a parameter and counts how often it looks at it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.scale, self.looks = torch.nn.Parameter(torch.ones(())), 0

    def _look(self) -> Tensor:
        self.looks += 1
        return self.scale * 1

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x * self._cache.get(self, "scale", None, self._look)

    def flops(self, shape: tuple[int, ...]) -> int:
        return 1


@torch.no_grad()
def looks(mixer: Counting, x: Tensor) -> int:
    before = mixer.looks
    torch.testing.assert_close(mixer(x), x * mixer.scale)
    return mixer.looks - before


def made(make: Callable[[], Any]) -> tuple[Mixer, Tensor]:
    torch.manual_seed(0)
    mixer = make().eval()
    return mixer, torch.randn(2, *(mixer.fixed_shape or (9,)), 4)


def test_nothing_changed_and_it_is_kept() -> None:
    mixer, x = Counting(4).eval(), torch.ones(1, 2, 4)
    assert [looks(mixer, x) for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.eval(),
        lambda m: m.train().eval(),
        lambda m: torch.nn.Sequential(m).eval(),
        lambda m: torch.nn.Sequential(m).load_state_dict({}, strict=False),
        lambda m: m.float(),
    ],
    ids=["eval", "train and eval", "a network around it", "load_state_dict", "a cast"],
)
def test_what_may_have_changed_it_unseen_empties_the_cache(change: Callable[[Counting], Any]) -> None:
    mixer, x = Counting(4).eval(), torch.ones(1, 2, 4)
    looks(mixer, x)
    mixer.scale.data.mul_(0.5)
    change(mixer)
    assert [looks(mixer, x) for _ in range(2)] == [1, 0]


def test_what_torch_sees_needs_no_call() -> None:
    mixer, x = Counting(4).eval(), torch.ones(1, 2, 4)
    looks(mixer, x)
    with torch.no_grad():
        mixer.scale.mul_(0.5)
    assert looks(mixer, x) == 1
    mixer.scale = torch.nn.Parameter(torch.tensor(3.0))
    assert looks(mixer, x) == 1


def test_another_parameter_in_the_place_of_one_that_is_gone_is_seen() -> None:
    mixer, x, numbers = Counting(4).eval(), torch.ones(1, 2, 4), np.ones(1, np.float32)
    for value in (2, 3, 4):
        # Nothing but the object tells them apart: one place in memory, no change of version.
        numbers[0] = value
        mixer.scale = torch.nn.Parameter(torch.from_numpy(numbers)[0])
        assert looks(mixer, x) == 1


@pytest.mark.parametrize("make", MAKES, ids=NAMES)
def test_weights_averaged_through_data_are_used_after_eval(make: Callable[[], Any]) -> None:
    mixer, x = made(make)
    twin = copy.deepcopy(mixer)
    with torch.no_grad():
        before = mixer(x)
        for m in (mixer, twin):
            for parameter in m.parameters():
                parameter.data.mul_(0.5)
        torch.testing.assert_close(mixer.eval()(x), twin(x))
        assert not torch.allclose(twin(x), before)
