"""``wave_data``: trajectories of waves from random bumps over random inclusions, split by trajectory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quernel import _random
from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.apps.wave_surrogate.solver import WaveSolver

# Speeds of the background and of inclusions; the first bounds the time step of every trajectory alike.
BACKGROUND, SLOWEST, FASTEST = 1.0, 0.5, 1.5
BUMPS, INCLUSIONS = 3, 2
WIDTHS, RADII = (0.03, 0.08), (0.08, 0.2)


@dataclass(frozen=True)
class WaveData:
    """Fields of N trajectories and the medium of each.

    Parameters
    ----------
    frames : Tensor, shape (N, T, n, n), float32
    speed : Tensor, shape (N, n, n), float32
    dt : float
        Time between two frames.
    """

    frames: Tensor
    speed: Tensor
    dt: float

    def __len__(self) -> int:
        return len(self.frames)

    def part(self, start: int, stop: int) -> WaveData:
        """Return some of the trajectories: data are split between them, never between frames of one."""
        return WaveData(self.frames[start:stop], self.speed[start:stop], self.dt)

    def split(self, train: int, validation: int) -> tuple[WaveData, WaveData, WaveData]:
        """Return the first ``train`` trajectories, the next ``validation``, and the rest for testing."""
        check_int("train", train, low=1)
        check_int("validation", validation, low=0)
        if train + validation >= len(self):
            raise QuernelError(
                f"train={train} and validation={validation} leave nothing of {len(self)} trajectories for testing"
            )
        return self.part(0, train), self.part(train, train + validation), self.part(train + validation, len(self))


def wave_data(
    n: int,
    *,
    size: int = 64,
    frames: int = 40,
    every: int = 4,
    courant: float = 0.5,
    inclusions: bool = True,
    seed: int = 0,
) -> WaveData:
    """Solve the wave equation for ``n`` random starts.

    Each starts at rest from one to three Gaussian bumps of random place, width, height and sign.  Half of the media
    hold one or two disks or rectangles of another speed, between 0.5 and 1.5 of the background.

    Parameters
    ----------
    n : int
        Trajectories; trajectory i depends on ``seed`` and i alone.
    size : int, default=64
        Nodes a side.
    frames, every : int, default=40, 4
        Fields kept, and solver steps between two of them.
    courant : float, default=0.5
        c dt / h at the fastest medium there can be, so that all trajectories share their time step.
    inclusions : bool, default=True
        Whether media vary.
    seed : int, default=0

    Returns
    -------
    data : WaveData

    Examples
    --------
    >>> data = wave_data(3, size=16, frames=5)
    >>> tuple(data.frames.shape), tuple(data.speed.shape)
    ((3, 5, 16, 16), (3, 16, 16))
    """
    check_int("n", n, low=1)
    check_int("size", size, low=4)
    check_float("courant", courant, low=0.0, open_low=True)
    drawn = [_draw(_random.generator(child), size, inclusions) for child in _random.spawn(seed, n)]
    start, speed = (torch.from_numpy(np.stack(parts)) for parts in zip(*drawn, strict=True))
    dt = courant / (size + 1) / FASTEST
    # Some at a time: float64 fields of all would be twice the memory of the result.
    kept = [
        WaveSolver(c, dt=dt).solve(u, frames=frames, every=every).float()
        for u, c in zip(start.split(32), speed.split(32), strict=True)
    ]
    return WaveData(torch.cat(kept), speed.float(), dt * every)


def _draw(draw: np.random.Generator, size: int, inclusions: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a start and a speed map."""
    axis = np.arange(1, size + 1) / (size + 1)
    x, y = axis[None, :], axis[:, None]
    start = np.zeros((size, size))
    for _ in range(draw.integers(1, BUMPS + 1)):
        (cx, cy), width = draw.uniform(0.15, 0.85, 2), draw.uniform(*WIDTHS)
        height = draw.uniform(0.5, 1.0) * draw.choice((-1.0, 1.0))
        start += height * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2))
    speed = np.full((size, size), BACKGROUND)
    if inclusions and draw.random() < 0.5:
        for _ in range(draw.integers(1, INCLUSIONS + 1)):
            (cx, cy), (a, b) = draw.uniform(0.2, 0.8, 2), draw.uniform(*RADII, 2)
            disk = ((x - cx) / a) ** 2 + ((y - cy) / a) ** 2 < 1
            box = (abs(x - cx) < a) & (abs(y - cy) < b)
            speed[disk if draw.random() < 0.5 else box] = draw.uniform(SLOWEST, FASTEST)
    return start, speed
