"""Models by name: ``names``, ``load``; and ``save``, the counterpart of ``quernel.load``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from quernel._errors import QuernelError
from quernel._load import save_model
from quernel._progress import Progress, check_progress
from quernel.models._lm_training import tiny_lm
from quernel.models.decoder import TinyLM
from quernel.models.digits_cnn import DigitsCNN
from quernel.models.resnet20 import ResNet20
from quernel.models.sentence_encoder import MiniLM

_LOADERS: dict[str, Callable[[Progress | None], nn.Module]] = {
    "digits-cnn": lambda progress: DigitsCNN.load_pretrained(progress=progress),
    "minilm": lambda progress: MiniLM.load_pretrained(),
    "resnet20-cifar10": lambda progress: ResNet20.load_pretrained(),
    "stories260k": lambda progress: TinyLM.stories260k(),
    "tiny-lm": lambda progress: tiny_lm(progress=progress),
}


def names() -> list[str]:
    """Return the names of the bundled models, sorted.

    Examples
    --------
    >>> from quernel import models
    >>> models.names()
    ['digits-cnn', 'minilm', 'resnet20-cifar10', 'stories260k', 'tiny-lm']
    """
    return sorted(_LOADERS)


def load(name: str, *, progress: Progress | None = None) -> nn.Module:
    """Return a pretrained model in eval mode; no global generator is touched.

    Parameters
    ----------
    name : str
        ``"digits-cnn"`` and ``"tiny-lm"`` are trained on first use (seconds, minutes) and cached;
        ``"minilm"`` is read from an installed package; the others from ``quernel.data``.
    progress : callable, optional
        ``progress(message, fraction)``, called while training.

    Raises
    ------
    QuernelError
        If no bundled model has this name.
    DataError, MissingExtraError
        If its weights or its training data are absent.
    """
    if name not in _LOADERS:
        raise QuernelError(f"bundled model must be one of {', '.join(map(repr, names()))}; got {name!r}")
    check_progress(progress)
    return _LOADERS[name](progress)


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write a model into a folder that ``quernel.load`` and ``quernel compress`` read; returns the folder.

    A model of ``quernel.models`` or of transformers comes back from the folder alone. Of a class of your own the folder
    holds the weights and what methods changed; who reads it gives the architecture:
    ``quernel.load(path, model=MyNet)``, ``quernel compress mymodels.net:build --weights path``.

    Parameters
    ----------
    model : nn.Module
        Trained, compressed or both.
    path : path
        Created, or replaced in one step.

    Examples
    --------
    >>> import quernel, tempfile
    >>> from quernel.models import DigitsCNN
    >>> folder = quernel.models.save(DigitsCNN(), tempfile.mkdtemp())
    >>> type(quernel.load(folder)).__name__
    'DigitsCNN'
    """
    if not isinstance(model, nn.Module):
        raise QuernelError(
            f"model must be an nn.Module; got {type(model).__name__}. Estimators have a save() of their own; of a "
            "Pipeline save the last step, e.g. pipeline[-1].save(path)"
        )
    return save_model(model, path)
