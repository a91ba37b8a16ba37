"""``WaveSurrogate``: a stack of convolutions that predicts the next frame of a wave; ``rollout`` feeds it back.

Input are the last frames and the map of the wave speed, output is the change of the last frame.  Zero padding stands
for the walls, where the field is zero.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_int


def _example() -> dict[str, Any]:
    def make() -> nn.Module:
        model = WaveSurrogate(channels=6, layers=3)
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape) / (i + 1))
        return model

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 8, 8, generator=generator) + 0.5

    return {"make": make, "input": inputs}


@register(
    "wave-surrogate",
    pillar="apps",
    contract="model",
    paper="2304.04964",
    status="experimental",
    headline=False,
    example=_example,
)
class WaveSurrogate(nn.Module):
    """Predict the next frame of a wave from the last ones.

    Parameters
    ----------
    channels : int, default=32
        Of every hidden layer.
    layers : int, default=6
        Convolutions, at least 2.
    kernel_size : int, default=3
        Odd.
    history : int, default=4
        Frames that the network sees, at least 2: one has no velocity.

    Notes
    -----
    Fields are divided by one number for the whole data set, since amplitude is physics; ``train_surrogate`` sets it.

    Examples
    --------
    >>> import torch
    >>> model = WaveSurrogate(channels=8, layers=3)
    >>> model(torch.zeros(1, 4, 16, 16), torch.ones(1, 16, 16)).shape
    torch.Size([1, 16, 16])
    """

    field_std: Tensor
    change_std: Tensor

    def __init__(self, channels: int = 32, layers: int = 6, kernel_size: int = 3, history: int = 4) -> None:
        super().__init__()
        self._config = {
            "channels": check_int("channels", channels, low=1),
            "layers": check_int("layers", layers, low=2),
            "kernel_size": check_int("kernel_size", kernel_size, low=1),
            "history": check_int("history", history, low=2),
        }
        if kernel_size % 2 == 0:
            raise QuernelError(f"kernel_size must be odd, so that frames keep their size; got {kernel_size}")
        widths = [history + 1, *[channels] * (layers - 1), 1]
        convs = [nn.Conv2d(a, b, kernel_size, padding=kernel_size // 2) for a, b in pairwise(widths)]
        self.convs = nn.ModuleList(convs)
        self.register_buffer("field_std", torch.ones(()))
        self.register_buffer("change_std", torch.ones(()))

    @property
    def history(self) -> int:
        """Frames that the network sees."""
        return self._config["history"]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)

    def forward(self, frames: Tensor, speed: Tensor) -> Tensor:  # (N, history, n, n), (N, n, n) -> (N, n, n)
        """Return the next frame."""
        if frames.ndim != 4 or frames.shape[1] != self.history or speed.shape != frames[:, 0].shape:
            raise QuernelError(
                f"frames must be of shape (N, {self.history}, n, n) and speed (N, n, n); got {tuple(frames.shape)} "
                f"and {tuple(speed.shape)}"
            )
        x = torch.cat([frames / self.field_std, (speed - 1).unsqueeze(1)], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        *hidden, last = self.convs
        for conv in hidden:
            x = F.gelu(conv(x), approximate="tanh")
        change: Tensor = last(x)
        return frames[:, -1] + self.change_std * change[:, 0]


def rollout(model: nn.Module, frames: Tensor, speed: Tensor, steps: int) -> Tensor:
    """Predict ``steps`` frames in a row, each from the predictions before it.

    Parameters
    ----------
    model : nn.Module
        ``model(frames, speed) -> next frame``.
    frames : Tensor, shape (N, history, n, n)
        Where to start from.
    speed : Tensor, shape (N, n, n)
    steps : int
        At least 1.

    Returns
    -------
    predicted : Tensor, shape (N, steps, n, n)
    """
    check_int("steps", steps, low=1)
    history, made = frames, []
    with torch.no_grad():
        for _ in range(steps):
            made.append(model(history, speed))
            history = torch.cat([history[:, 1:], made[-1].unsqueeze(1)], dim=1)
    return torch.stack(made, dim=1)
