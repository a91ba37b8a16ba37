"""Tasks of image classifiers, and of any module on a user's own arrays."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from quernel import data
from quernel._errors import DataError, QuernelError
from quernel.data import Arrays, Images
from quernel.models._task import Accuracy, Evaluate, Fidelity, Task, halves
from quernel.models.digits_cnn import DigitsCNN
from quernel.models.resnet20 import MEAN, STD, ResNet20

_CALIBRATION, _BATCH, _EVALUATION_BATCH = 512, 64, 500
# What the bundled models were made for: 8 x 8 pixels, and normalised 32 x 32 colour.
_SETS: dict[type[nn.Module], tuple[str, ...]] = {
    DigitsCNN: ("digits",),
    ResNet20: ("cifar10-lossless", "cifar10-jpeg"),
}
IMAGE_SETS = ("digits", "fashion-mnist", "mnist", "cifar10-lossless", "cifar10-jpeg")


def image_task(model: nn.Module, name: str, limit: int | None) -> Task:
    """Join a classifier and a named image set."""
    allowed = next((sets for kind, sets in _SETS.items() if isinstance(model, kind)), IMAGE_SETS)
    if name not in allowed:
        known = ", ".join(map(repr, allowed))
        raise QuernelError(f"data for {type(model).__name__} must be one of {known}; got {name!r}")
    notes: list[str] = []
    extras: dict[str, Evaluate] = {}
    if name == "cifar10-lossless":
        choosing, judging = (data.load(name, split=split) for split in ("calibration", "test"))
        fitting = choosing
        jpeg = data.info("cifar10-jpeg")
        if "test" in jpeg.present:
            images = data.load("cifar10-jpeg", split="test")
            extras["accuracy on the JPEG test set"] = _accuracy(model, images, limit)
            notes.append(f"JPEG test set: {images.note}")
        else:
            notes.append("no figure on the JPEG test set: data set 'cifar10-jpeg' is absent")
    elif name == "cifar10-jpeg":
        images = data.load(name, split="test")
        even, odd = halves(len(images), name)
        fitting = choosing = _rows(images, even)
        judging = _rows(images, odd)
    elif name == "digits":
        fitting, choosing, judging = (data.load(name, split=split) for split in ("train", "validation", "test"))
    else:
        train = data.load(name, split="train")
        fitting, choosing = _rows(train, slice(0, 5000)), _rows(train, slice(5000, 10000))
        judging = data.load(name, split="test")
    if not isinstance(model, DigitsCNN | ResNet20):
        notes.append("pixels are fed as 0..1 without normalisation; for another input, give arrays in an .npz file")
    notes += [image_set.note for image_set in (judging,) if image_set.note]
    batches = _batches(_pixels(model, _spread(fitting, _CALIBRATION)), _BATCH)
    return Task(
        name,
        "accuracy",
        batches,
        _accuracy(model, choosing, limit),
        _accuracy(model, judging, limit),
        batches[0],
        extras,
        tuple(notes),
    )


def array_task(model: nn.Module, arrays: Arrays, path: str, limit: int | None) -> Task:
    """Join any module and a user's own inputs: accuracy with labels, fidelity without."""
    even, odd = halves(len(arrays), path)
    x = torch.from_numpy(np.ascontiguousarray(arrays.x))
    if x.is_floating_point():
        x = x.float()
    y = None if arrays.y is None else torch.from_numpy(arrays.y)
    first, second = x[even][:limit], x[odd][:limit]
    select, judge = (_batches(part, _EVALUATION_BATCH) for part in (first, second))
    evaluators: list[Evaluate]
    if y is not None:
        evaluators = [Accuracy(select, y[even][:limit]), Accuracy(judge, y[odd][:limit])]
    else:
        try:
            evaluators = [Fidelity.of(model, select), Fidelity.of(model, judge)]
        except (RuntimeError, TypeError, IndexError) as error:
            raise DataError(
                f"{path}: the model cannot run on x of shape {tuple(x.shape)}, dtype {x.dtype}: {error}"
            ) from error
    batches = _batches(x[even][:_CALIBRATION], _BATCH)
    metric = "fidelity" if y is None else "accuracy"
    return Task(path, metric, batches, evaluators[0], evaluators[1], batches[0])


def _pixels(model: nn.Module, images: Images) -> Tensor:
    """Return images as the model takes them, (n, c, h, w) float32."""
    x = torch.from_numpy(images.x)
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2)
    scaled = x.contiguous().float() / (16.0 if x.shape[-1] == 8 else 255.0)
    if isinstance(model, ResNet20):
        scaled = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return scaled


def _accuracy(model: nn.Module, images: Images, limit: int | None) -> Accuracy:
    chosen = images if limit is None else _spread(images, limit)
    return Accuracy(_batches(_pixels(model, chosen), _EVALUATION_BATCH), torch.from_numpy(chosen.y))


def _spread(images: Images, n: int) -> Images:
    """Take at most ``n`` evenly spaced images: some sets are sorted by class."""
    return _rows(images, np.linspace(0, len(images) - 1, min(n, len(images)), dtype=np.int64))


def _rows(images: Images, rows: slice | np.ndarray) -> Images:
    return Images(images.x[rows], images.y[rows], images.classes, images.note)


def _batches(x: Tensor, size: int) -> tuple[Tensor, ...]:
    return torch.split(x, size)
