"""DigitsCNN: a small convolutional net for scikit-learn's 8 x 8 digits, trained in seconds on first use.

Three conv + batch norm + ReLU stages, a mean over the image and two linear layers: something for every
compression method to work on (folding, channel merging, low rank, int8), offline and without a download.
"""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel._progress import Progress
from quernel._registry import register
from quernel._timing import threads
from quernel._validate import check_int
from quernel.models._cached import measured, seeded, trained

_RECIPE: dict[str, Any] = {
    "version": 1,
    "data": "digits/train",
    "seed": 0,
    "epochs": 24,
    "batch": 64,
    "learning_rate": 4e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "architecture": {"channels": [32, 64, 64], "hidden_dim": 128},
}


def _example() -> dict[str, Any]:
    return {
        "make": lambda: DigitsCNN(channels=(4, 6, 6), hidden_dim=8),
        "input": lambda generator: (torch.rand(2, 1, 8, 8, generator=generator),),
    }


@register("digits-cnn", pillar="models", contract="model", paper=None, status="stable", example=_example)
class DigitsCNN(nn.Module):
    """A small convolutional net for 8 x 8 digits.

    Parameters
    ----------
    channels : sequence of 3 ints, default=(32, 64, 64)
        Output channels of the convolutions.
    hidden_dim : int, default=128
        Width between the two linear layers.
    num_classes : int, default=10
        Number of outputs.

    Examples
    --------
    >>> import torch
    >>> from quernel.models import DigitsCNN
    >>> DigitsCNN().eval()(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, channels: tuple[int, int, int] = (32, 64, 64), hidden_dim: int = 128, num_classes: int = 10
    ) -> None:
        super().__init__()
        first, second, third = (check_int("channels", c, low=1) for c in channels)
        self._config = {
            "channels": [first, second, third],
            "hidden_dim": check_int("hidden_dim", hidden_dim, low=1),
            "num_classes": check_int("num_classes", num_classes, low=1),
        }
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(third)
        self.fc1 = nn.Linear(third, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, num_classes)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)

    @classmethod
    def load_pretrained(cls, *, progress: Progress | None = None) -> DigitsCNN:
        """Return the trained model in eval mode; the first call trains it (seconds) and caches it."""
        return cast(DigitsCNN, trained("digits-cnn", _RECIPE, lambda: _train(progress)))

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 8, 8), pixels 0..1 -> (B, num_classes)
        """Return class logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)  # (B, second, 4, 4)
        x = F.relu(self.bn3(self.conv3(x))).mean((2, 3))
        logits: Tensor = self.fc2(F.relu(self.fc1(x)))
        return logits


def digits_cnn_measured() -> dict[str, float]:
    """Return test accuracy and seconds of the cached model's training."""
    return measured("digits-cnn", _RECIPE)


def digits_tensors(split: str) -> tuple[Tensor, Tensor]:
    """Return a split of the digits as the model takes them: x (n, 1, 8, 8) in 0..1, y (n,)."""
    images = data.load("digits", split=split)
    return torch.from_numpy(images.x).float().div(16).unsqueeze(1), torch.from_numpy(images.y)


def _train(progress: Progress | None) -> tuple[DigitsCNN, dict[str, float]]:
    # One thread: batches this small gain nothing from a second, and sums come out the same on every machine size.
    with threads(1):
        return _trained_on_one_thread(_RECIPE, progress)


def _trained_on_one_thread(recipe: dict[str, Any], progress: Progress | None) -> tuple[DigitsCNN, dict[str, float]]:
    model = cast(DigitsCNN, seeded(recipe["seed"], lambda: DigitsCNN(**recipe["architecture"])))
    generator = torch.Generator().manual_seed(recipe["seed"])
    x, y = digits_tensors("train")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe["weight_decay"])
    batches = -(-len(x) // recipe["batch"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe["learning_rate"], recipe["epochs"] * batches)
    model.train()
    for epoch in range(recipe["epochs"]):
        for rows in torch.split(torch.randperm(len(x), generator=generator), recipe["batch"]):
            logits = model(_shifted(x[rows], generator))
            loss = F.cross_entropy(logits, y[rows], label_smoothing=recipe["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress("training digits-cnn", (epoch + 1) / recipe["epochs"])
    model.eval()
    x, y = digits_tensors("test")
    with torch.no_grad():
        return model, {"test_accuracy": float((model(x).argmax(1) == y).double().mean())}


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move the whole batch by at most one pixel: the cheapest augmentation that helps."""
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return F.pad(x, (1 + right, 1 - right, 1 + down, 1 - down))[:, :, 1:-1, 1:-1]
