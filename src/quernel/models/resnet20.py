"""ResNet20: the CIFAR-10 residual net of He et al. (2015) with parameter-free shortcuts, as Idelbayev trained it.

3x3 conv (16) + BN + ReLU, three stages of three basic blocks with 16, 32, 64 channels, mean, linear. Where
a stage begins, the shortcut takes every second pixel and pads channels with zeros ("option A").
Input: pixels / 255, normalised with the ImageNet mean and deviation by whoever feeds the model.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel._module_tree import parameters_on_meta
from quernel._registry import register
from quernel._validate import check_int

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _example() -> dict[str, Any]:
    return {
        "make": lambda: ResNet20(width=4, blocks=1),
        "input": lambda generator: (torch.rand(2, 3, 16, 16, generator=generator),),
    }


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = 1 if in_channels == channels else 2
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


@register("resnet20-cifar10", pillar="models", contract="model", paper=None, status="stable", example=_example)
class ResNet20(nn.Module):
    """Residual net for 32 x 32 colour images; ``load_pretrained`` gives the published CIFAR-10 weights.

    Parameters
    ----------
    num_classes : int, default=10
        Number of outputs.
    width : int, default=16
        Channels of the first stage; doubled at the second and the third.
    blocks : int, default=3
        Basic blocks a stage; the depth is ``6 * blocks + 2``.

    References
    ----------
    He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, 2015, section 4.2.
    Y. Idelbayev, "Proper ResNet implementation for CIFAR10/CIFAR100 in PyTorch".

    Examples
    --------
    >>> import torch
    >>> from quernel.models import ResNet20
    >>> ResNet20().eval()(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self._config = {
            "num_classes": check_int("num_classes", num_classes, low=1),
            "width": check_int("width", width, low=1),
            "blocks": check_int("blocks", blocks, low=1),
        }
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks)
        self.layer2 = _stage(width, 2 * width, blocks)
        self.layer3 = _stage(2 * width, 4 * width, blocks)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)

    @classmethod
    def load_pretrained(cls) -> Self:
        """Return the published CIFAR-10 weights (data set ``resnet20-checkpoint``), in eval mode."""
        with parameters_on_meta():
            model = cls()
        model.load_state_dict(dict(data.load("resnet20-checkpoint").tensors), assign=True)
        return model.eval().requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 32, 32) -> (B, num_classes)
        """Return class logits of normalised images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(BasicBlock(channels if i else in_channels, channels) for i in range(blocks)))
