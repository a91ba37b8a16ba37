"""Tasks of sentence encoders: rank correlation with human similarity, or fidelity to the original vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel._errors import QuernelError
from quernel.data import Pairs, Sentences
from quernel.models._sentence_folder import tokenize
from quernel.models._task import Batch, Evaluate, Task, halves
from quernel.models.sentence_encoder import SentenceEncoder, mean_of_tokens
from quernel.nn._running import device_of, evaluating, to_device

_CALIBRATION, _BATCH, _EVALUATION_BATCH = 64, 32, 64
_LATENCY_BATCH, _LATENCY_TOKENS = 32, 64
_MAX_LENGTH = 256  # tokens, where the model itself does not say


@dataclass(frozen=True)
class _Embedding:
    """Sentences tokenised once, in batches of similar length; gives one unit vector each."""

    batches: tuple[Mapping[str, Tensor], ...]
    place: Tensor  # where each sentence stands in the joined batches

    @classmethod
    def of(cls, model: nn.Module, sentences: Sequence[str]) -> _Embedding:
        order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
        starts = range(0, len(order), _EVALUATION_BATCH)
        groups = [[sentences[i] for i in order[start : start + _EVALUATION_BATCH]] for start in starts]
        return cls(tuple(_tokenize(model, group) for group in groups), torch.tensor(order).argsort())

    def __call__(self, model: nn.Module) -> Tensor:
        device = device_of(model)
        vectors = []
        with evaluating(model), torch.inference_mode():
            for batch in self.batches:
                moved = to_device(batch, device)
                output = model(**moved)
                if not isinstance(output, Tensor):
                    output = mean_of_tokens(output.last_hidden_state, moved.get("attention_mask"))
                vectors.append(F.normalize(output.double(), dim=-1).cpu())
        return torch.cat(vectors)[self.place]


@dataclass(frozen=True)
class Spearman:
    """Rank correlation of cosine similarity with the human score, -1 to 1."""

    embed: _Embedding
    first: Tensor  # (n,) indices of sentences
    second: Tensor
    score: np.ndarray

    @classmethod
    def of(cls, model: nn.Module, pairs: Pairs) -> Spearman:
        """Tokenise every distinct sentence once."""
        index = {sentence: i for i, sentence in enumerate(dict.fromkeys((*pairs.first, *pairs.second)))}
        first, second = (torch.tensor([index[s] for s in part]) for part in (pairs.first, pairs.second))
        return cls(_Embedding.of(model, tuple(index)), first, second, pairs.score)

    def __call__(self, model: nn.Module) -> float:
        vectors = self.embed(model)
        cosine = (vectors[self.first] * vectors[self.second]).sum(1).numpy()
        # Equal scores in, no ranks out: NaN says so, and the compressor refuses it by name.
        return float(spearmanr(cosine, self.score).statistic) if np.ptp(cosine) > 0 else float("nan")


@dataclass(frozen=True)
class CosineFidelity:
    """Mean cosine between the model's vectors and the original model's."""

    embed: _Embedding
    original: Tensor  # (n, D)

    @classmethod
    def of(cls, model: nn.Module, sentences: Sequence[str]) -> CosineFidelity:
        """Remember the vectors of the original model."""
        embed = _Embedding.of(model, sentences)
        return cls(embed, embed(model))

    def __call__(self, model: nn.Module) -> float:
        # Rounding may lift the mean of ones by a last bit.
        return min(1.0, float((self.embed(model) * self.original).sum(1).mean()))


def stsb_task(model: nn.Module, limit: int | None) -> Task:
    """Join a sentence encoder and STS-B: calibrate on train, choose on dev, judge on test."""
    train, dev, test = (data.load("stsb", split=split) for split in ("train", "dev", "test"))
    return _task("stsb", "spearman", model, train.first, *(Spearman.of(model, _first(p, limit)) for p in (dev, test)))


def own_text_task(model: nn.Module, held: Pairs | Sentences, path: str, limit: int | None) -> Task:
    """Join a sentence encoder and other sentences: half to calibrate and choose, half to judge."""
    even, odd = halves(len(held), path)
    if isinstance(held, Pairs):
        parts = [Pairs(held.first[half], held.second[half], held.score[half]) for half in (even, odd)]
        scores = [Spearman.of(model, _first(part, limit)) for part in parts]
        return _task(path, "spearman", model, parts[0].first, *scores)
    fidelity = [CosineFidelity.of(model, held.text[half][:limit]) for half in (even, odd)]
    return _task(path, "fidelity", model, held.text[even], *fidelity)


def _task(
    name: str, metric: str, model: nn.Module, sentences: Sequence[str], select: Evaluate, judge: Evaluate
) -> Task:
    places = np.linspace(0, len(sentences) - 1, min(_CALIBRATION, len(sentences)), dtype=np.int64)
    chosen = [sentences[i] for i in places]
    calibration: tuple[Batch, ...] = tuple(
        _tokenize(model, chosen[start : start + _BATCH]) for start in range(0, len(chosen), _BATCH)
    )
    return Task(name, metric, calibration, select, judge, _latency_batch(model, sentences))


def _latency_batch(model: nn.Module, sentences: Sequence[str]) -> Batch:
    """Return 32 x 64 real tokens without padding: sentences joined until each row is full."""
    rows = []
    for row in range(_LATENCY_BATCH):
        words: list[str] = []
        at = row * _LATENCY_TOKENS
        while len(words) < _LATENCY_TOKENS:
            # A sentence without a word still moves on, and "." keeps the row growing.
            words += sentences[at % len(sentences)].split() or ["."]
            at += 1
        rows.append(" ".join(words))
    return {name: ids[:, :_LATENCY_TOKENS] for name, ids in _tokenize(model, rows).items()}


def _tokenize(model: nn.Module, sentences: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(model, SentenceEncoder):
        return model.tokenize(sentences)
    folder = Path(str(getattr(getattr(model, "config", None), "name_or_path", "")))
    if not folder.is_dir() or folder == Path():
        raise QuernelError(f"{type(model).__name__} names no folder with a tokenizer; open the model from its folder")
    return tokenize(folder, sentences, _MAX_LENGTH)


def _first(pairs: Pairs, limit: int | None) -> Pairs:
    return pairs if limit is None else Pairs(pairs.first[:limit], pairs.second[:limit], pairs.score[:limit])
