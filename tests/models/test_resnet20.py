"""ResNet20: the published architecture, by count, by hand and by what its checkpoint scores."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from quernel import models
from quernel._errors import QuernelError
from quernel._module_tree import parameters_on_meta
from quernel.models import ResNet20
from quernel.models.resnet20 import BasicBlock


def test_parameter_count_is_the_published_one() -> None:
    # He et al., table 6: 0.27 M; Idelbayev counts 269,722 with option A.
    assert sum(p.numel() for p in ResNet20().parameters()) == 269_722
    assert sum(p.numel() for p in ResNet20(num_classes=100).parameters()) == 269_722 + 90 * 65


def test_shortcut_takes_every_second_pixel_and_pads_channels() -> None:
    block = BasicBlock(4, 8).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), F.relu(expected), rtol=0, atol=0)


def test_stages_halve_the_image() -> None:
    model = ResNet20(width=4, blocks=1).eval()
    x = model.layer1(torch.rand(1, 4, 16, 16))
    assert x.shape == (1, 4, 16, 16)
    assert model.layer3(model.layer2(x)).shape == (1, 16, 4, 4)


def test_rebuilds_from_json() -> None:
    model = ResNet20(width=4, blocks=2).eval()
    with parameters_on_meta():
        empty = ResNet20.from_config(json.loads(json.dumps(model.config())))
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(empty.eval()(x), model(x), rtol=0, atol=0)


def test_bad_width_is_named() -> None:
    with pytest.raises(QuernelError, match="width must be an integer"):
        ResNet20(width=0)


def test_checkpoint_scores_what_was_verified(real_data: object) -> None:
    before = torch.get_rng_state()
    model = models.load("resnet20-cifar10")
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    task = models.task(model, "cifar10-lossless", max_examples=100)
    # 99.8 % on these training images; one mistake of 100 is allowed.
    assert task.judge(model) >= 0.99
    assert any("training images" in note for note in task.notes)
