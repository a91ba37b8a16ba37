"""What the reproductions of mixers share: pixels as tokens, and how a rate is chosen."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "reproductions")
    return importlib.import_module("_mixer_nets")


class Says(nn.Module):
    """The same answer to everything."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(x),), self.answer), 10).float()


def held(split: str) -> tuple[Tensor, Tensor]:
    assert split == "validation"
    return torch.zeros(8, 1, 2, 2), torch.tensor([1, 1, 1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(("answers", "best"), [((2, 1), 1), ((1, 2), 0), ((1, 1), 0)])
def test_the_rate_is_that_of_the_most_right_answers_the_first_of_equals(nets: Any, answers: Any, best: int) -> None:
    calls = []

    def trained(kind: str, rate: float, seed: int) -> nn.Module:
        calls.append((kind, rate, seed))
        return Says(answers[nets.RATES.index(rate)])

    assert nets.chosen_rate(trained, "ours", 3, held) == nets.RATES[best]
    assert nets.chosen_rate(trained, "ours", 3, held) == nets.RATES[best]
    assert calls == [("ours", rate, 3) for rate in nets.RATES]


def test_pixels_are_images_row_by_row(nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(18.0).view(2, 1, 3, 3)
    asked = []

    def images(split: str, count: int | None, side: int) -> tuple[Tensor, Tensor]:
        asked.append((split, count, side))
        return x, torch.tensor([4, 5])

    monkeypatch.setattr(nets, "images", images)
    pixels, labels = functools.partial(nets.pixels, side=3)("train", 2)
    assert asked == [("train", 2, 3)] and labels.tolist() == [4, 5]
    assert pixels.shape == (2, 9, 1) and pixels[1, :, 0].tolist() == list(range(9, 18))
