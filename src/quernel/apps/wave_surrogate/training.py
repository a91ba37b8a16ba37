"""Training and judging a surrogate: Adam on windows of the trajectories, one-step and rollout errors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quernel import _random
from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.apps.wave_surrogate.dataset import WaveData
from quernel.apps.wave_surrogate.surrogate import WaveSurrogate, rollout
from quernel.nn._running import evaluating

# Largest norm of a gradient, and share of the steps in which the rate rises: the loss is steep in products of three.
CLIP = 1.0
WARM_UP = 0.05
# Trajectories that are judged at once.
BATCH = 32


def train_surrogate(
    model: WaveSurrogate,
    data: WaveData,
    *,
    windows: int,
    batch_size: int = 8,
    lr: float = 1e-2,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> WaveSurrogate:
    """Train a surrogate in place to predict the next frame.

    Parameters
    ----------
    model : WaveSurrogate
        Dense or factorised.
    data : WaveData
        Trajectories to train on.
    windows : int
        Windows of frames to learn from in all; each trajectory has ``T - history``, dealt anew when all were seen.
    batch_size : int, default=8
    lr : float, default=1e-2
        Peak of the rate of Adam, which warms up and falls to zero along a cosine.
    seed : int, default=0
        Of the order.
    progress : callable, optional
        ``progress(step, loss)``.

    Returns
    -------
    model : WaveSurrogate
        The same object, in eval mode.

    Raises
    ------
    QuernelError
        If trajectories are shorter than the model's history, or training diverges.
    """
    check_int("windows", windows, low=1)
    check_int("batch_size", batch_size, low=1)
    check_float("lr", lr, low=0.0, open_low=True)
    starts = data.frames.shape[1] - model.history
    if starts < 1:
        raise QuernelError(f"trajectories must have more than {model.history} frames; got {data.frames.shape[1]}")
    with torch.no_grad():
        model.field_std.fill_(float(data.frames.std()))
        model.change_std.fill_(float(data.frames.diff(dim=1).std()))
    generator = _random.torch_generator(seed)
    steps = -(-windows // batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    warm = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm)),
        ],
        [warm],
    )
    model.train()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(data) * starts, generator=generator)])
        chosen, order = order[:batch_size], order[batch_size:]
        frames, speed, target = _windows(data, chosen, starts, model.history)
        loss = ((model(frames, speed) - target) / model.change_std).square().mean()
        if not bool(loss.isfinite()):
            raise QuernelError(f"training diverged at step {step}: lower lr={lr}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    return model.eval()


def _windows(data: WaveData, chosen: Tensor, starts: int, history: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return frames, speeds and next frames of numbered windows."""
    which, first = chosen // starts, chosen % starts
    rows = first[:, None] + torch.arange(history + 1)
    cut = data.frames[which[:, None], rows]  # (B, history + 1, n, n)
    return cut[:, :-1], data.speed[which], cut[:, -1]


def one_step_error(model: WaveSurrogate, data: WaveData, *, every: int = 4) -> float:
    """Return the relative L2 error of the next frame, sums over windows that start every ``every`` frames."""
    return rollout_errors(model, data, steps=1, every=every)[0]


def rollout_errors(model: WaveSurrogate, data: WaveData, *, steps: int = 10, every: int = 4) -> list[float]:
    """Return the relative L2 error after 1, 2, ..., ``steps`` predictions in a row.

    Parameters
    ----------
    model : WaveSurrogate
    data : WaveData
        Trajectories to judge on.
    steps : int, default=10
    every : int, default=4
        Windows start every so many frames.

    Returns
    -------
    errors : list of float
        sqrt(sum |predicted - true|^2 / sum |true|^2) over all windows.
    """
    check_int("steps", steps, low=1)
    check_int("every", every, low=1)
    history = model.history
    starts = data.frames.shape[1] - history - steps + 1
    if starts < 1:
        raise QuernelError(
            f"trajectories must have {history + steps} frames for {steps} steps; got {data.frames.shape[1]}"
        )
    wrong, size = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    with evaluating(model):
        for first in range(0, starts, every):
            for part in (data.part(i, i + BATCH) for i in range(0, len(data), BATCH)):
                made = rollout(model, part.frames[:, first : first + history], part.speed, steps)
                true = part.frames[:, first + history : first + history + steps]
                wrong += (made - true).double().square().sum((0, 2, 3))
                size += true.double().square().sum((0, 2, 3))
    return (wrong / size).sqrt().tolist()
