"""``task``: find what joins a model and a data set; the model's class and the data's kind decide."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from quernel import data
from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.data import Arrays, Pairs, Sentences
from quernel.models._bundled import load, names
from quernel.models._image_tasks import IMAGE_SETS, array_task, image_task
from quernel.models._lm_tasks import lm_task, own_text_lm_task
from quernel.models._sentence_tasks import own_text_task, stsb_task
from quernel.models._task import Task
from quernel.models.decoder import TinyLM
from quernel.models.digits_cnn import DigitsCNN
from quernel.models.resnet20 import ResNet20
from quernel.models.sentence_encoder import SentenceEncoder

_DEFAULTS: dict[type[nn.Module], str] = {
    DigitsCNN: "digits",
    ResNet20: "cifar10-lossless",
    SentenceEncoder: "stsb",
    TinyLM: "tinyshakespeare",
}


def task(
    model: str | nn.Module, source: str | os.PathLike[str] | None = None, *, max_examples: int | None = None
) -> Task:
    """Join a model and data into calibration batches, a metric, and evaluations on disjoint examples.

    Parameters
    ----------
    model : str or nn.Module
        A bundled name, or the original (uncompressed) model: without labels its own outputs are the truth.
    source : str or path, optional
        A data set's name, or the path of an own file (see ``quernel.data.from_path``); default is the set
        that the bundled model was made for.
    max_examples : int, optional
        Look at no more than this many examples in each evaluation; default all.

    Returns
    -------
    Task

    Raises
    ------
    QuernelError
        If this model cannot be judged on this data (says on which it can).
    DataError
        If the data is absent, damaged, empty or cannot be parsed.

    Examples
    --------
    >>> from quernel import models
    >>> model = models.DigitsCNN()
    >>> task = models.task(model, "digits")
    >>> 0.0 <= task.judge(model) <= 1.0
    True
    """
    limit = None if max_examples is None else check_int("max_examples", max_examples, low=1)
    net = load(model) if isinstance(model, str) else model
    if not isinstance(net, nn.Module):
        raise QuernelError(f"model must be a name ({', '.join(names())}) or an nn.Module; got {type(net).__name__}")
    if source is None:
        source = next((name for kind, name in _DEFAULTS.items() if isinstance(net, kind)), None)
        if source is None:
            raise QuernelError(f"no data set belongs to {type(net).__name__}; name one, or give a file")
    if str(source) in data.names():
        return _named(net, str(source), limit)
    if not Path(source).suffix and not Path(source).exists():
        raise QuernelError(f"data must be one of {', '.join(data.names())}, or a file; got {str(source)!r}")
    return _own(net, source, limit)


def _named(net: nn.Module, name: str, limit: int | None) -> Task:
    if isinstance(net, TinyLM):
        if name != "tinyshakespeare":
            raise QuernelError(f"data for a language model must be 'tinyshakespeare' or a text file; got {name!r}")
        return lm_task(net, limit)
    if name in IMAGE_SETS and not isinstance(net, SentenceEncoder):
        return image_task(net, name, limit)
    if not _reads_sentences(net):
        raise QuernelError(f"{type(net).__name__} cannot be judged on {name!r}; image sets: {', '.join(IMAGE_SETS)}")
    if name == "stsb":
        return stsb_task(net, limit)
    if name == "sst2":
        return own_text_task(net, data.load(name, split="dev"), name, limit)
    raise QuernelError(f"data for a sentence encoder must be 'stsb', 'sst2' or a file of sentences; got {name!r}")


def _own(net: nn.Module, source: str | os.PathLike[str], limit: int | None) -> Task:
    held, name = data.from_path(source), str(source)
    if isinstance(held, Arrays):
        return array_task(net, held, name, limit)
    if isinstance(net, TinyLM) and isinstance(held, Sentences):
        return own_text_lm_task(net, held, name, limit)
    if isinstance(held, Pairs | Sentences) and _reads_sentences(net):
        return own_text_task(net, held, name, limit)
    raise QuernelError(
        f"{type(net).__name__} does not read {'sentence pairs' if isinstance(held, Pairs) else 'sentences'}; "
        "give its inputs as array x in an .npz file"
    )


def _reads_sentences(net: nn.Module) -> bool:
    """Sentence encoders, and transformers models that came from a folder with a tokenizer."""
    return isinstance(net, SentenceEncoder) or bool(getattr(getattr(net, "config", None), "name_or_path", ""))
