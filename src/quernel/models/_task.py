"""Task: what joins a model and data for the compressor: calibration batches and two ways to judge.

``select`` is for choosing among candidates, ``judge`` for the number that is reported; they never look at
the same examples. Larger is better for every metric. Evaluators are small picklable objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quernel._errors import DataError, QuernelError
from quernel.nn._running import device_of, evaluating, to_device

Evaluate = Callable[[nn.Module], float]
Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """Calibration data, metric and example input for one model on one data set.

    Attributes
    ----------
    data : str
        Name of the data set, or the user's path.
    metric : str
        ``"accuracy"``, ``"spearman"``, ``"neg_cross_entropy"`` (nats a token, negative), or without labels
        ``"fidelity"`` (1 for the same outputs as the original model).
    calibration : tuple of batches
        Tensors or mappings, as ``compress(data=)`` takes them; no labels.
    select : callable
        ``select(model) -> float`` on the examples for choosing.
    judge : callable
        ``judge(model) -> float`` on other examples, for the number that is reported.
    example_inputs : Tensor or mapping
        One batch in the form and size that latency is measured on.
    extras : mapping of str to callable
        Further figures worth stating beside ``judge``, by their names.
    notes : tuple of str
        What a reader of the result must know about the data.
    forward : None
        Batches need no adapter; passed on to ``compress(forward=)``.

    Examples
    --------
    >>> from quernel import models
    >>> task = models.task(models.DigitsCNN(), "digits")
    >>> task.metric, task.calibration[0].shape
    ('accuracy', torch.Size([64, 1, 8, 8]))
    """

    data: str
    metric: str
    calibration: tuple[Batch, ...]
    select: Evaluate
    judge: Evaluate
    example_inputs: Batch
    extras: Mapping[str, Evaluate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    forward: None = None


@dataclass(frozen=True)
class Accuracy:
    """Share of examples whose largest output is at the label."""

    batches: tuple[Batch, ...]
    labels: Tensor  # (n,)

    def __call__(self, model: nn.Module) -> float:
        outputs = torch.cat(run(model, self.batches))
        if outputs.ndim != 2:
            raise QuernelError(f"accuracy needs outputs of shape (n, classes); the model gives {tuple(outputs.shape)}")
        return float((outputs.argmax(1) == self.labels).double().mean())


@dataclass(frozen=True)
class Fidelity:
    """One minus the relative distance to what the original model gave: 1 - ||y - y0|| / ||y0||."""

    batches: tuple[Batch, ...]
    original: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch]) -> Fidelity:
        """Remember the outputs of the original model."""
        return cls(tuple(batches), tuple(run(model, batches)))

    def __call__(self, model: nn.Module) -> float:
        outputs = run(model, self.batches)
        # One factor for all: a ratio a batch would let one with tiny outputs decide.
        distance = sum(float((y - y0).double().square().sum()) for y, y0 in zip(outputs, self.original, strict=True))
        norm = sum(float(y0.double().square().sum()) for y0 in self.original)
        return 1.0 - (distance / norm) ** 0.5 if norm else 1.0 - distance**0.5


def run(model: nn.Module, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the model's outputs, a batch each, as float tensors on the CPU."""
    device = device_of(model)
    outputs = []
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            moved = to_device(batch, device)
            output = model(moved) if isinstance(moved, Tensor) else model(**moved)
            if not isinstance(output, Tensor):
                raise QuernelError(f"the model must return one tensor; got {type(output).__name__}. Wrap the model")
            outputs.append(output.float().cpu())
    return outputs


def halves(n: int, what: str) -> tuple[slice, slice]:
    """Return even and odd places of ``n`` examples: sorted files stay balanced."""
    if n < 2:
        raise DataError(f"{what} must hold at least 2 examples, one to choose on and one to judge on; got {n}")
    return slice(0, None, 2), slice(1, None, 2)
