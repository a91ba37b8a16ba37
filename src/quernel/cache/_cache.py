"""``Cache``: layers for every block of a model, budgets in tokens or bytes, and a report of what is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache as TransformersCache

from quernel._errors import QuernelError
from quernel._validate import check_int
from quernel.cache._attention import check_inside
from quernel.cache._bitmap_intrinsics import TILE
from quernel.cache._layer import CacheLayer, CacheRow
from quernel.cache.pruning import kept_channels


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds now.

    Parameters
    ----------
    tokens : int
        Tokens that have passed, padding included, all sequences together.
    bytes_stored : int
        Bytes of all layers and sequences, whatever they lie in.
    bytes_resident : int
        Those of them in memory.
    bytes_dense : int
        What the plain cache would hold for the same tokens.
    details : mapping
        Figures of the method by name.
    """

    tokens: int
    bytes_stored: int
    bytes_resident: int
    bytes_dense: int
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Bytes stored as a share of the plain cache's; NaN while nothing is held."""
        return self.bytes_stored / self.bytes_dense if self.bytes_dense else float("nan")


class Cache(TransformersCache, ABC):
    """Base of the caches: a subclass makes rows and says what they report.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model; all of its layers must attend to the full context.

    Raises
    ------
    QuernelError
        If a layer of the model attends to a sliding window or keeps another state.
    """

    layers: list[CacheLayer]

    def __init__(self, config: Any) -> None:
        try:
            decoder = config.get_text_config(decoder=True)
        except AttributeError as error:
            raise QuernelError(
                f"config must be that of a model of transformers; got {type(config).__name__}"
            ) from error
        kinds = set(layer_kinds(decoder))
        if kinds != {"full_attention"}:
            raise QuernelError(
                f"the layers of this model are {', '.join(sorted(kinds))}; Quernel's caches are for full attention in "
                "every layer. Use a cache of transformers"
            )
        self.config = decoder
        super().__init__(layers=[CacheLayer(self._make_row) for _ in range(decoder.num_hidden_layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values to the layer of this number, see ``CacheLayer.update``."""
        if layer_idx >= len(self.layers):
            raise QuernelError(
                f"this cache was made for a model of {len(self.layers)} layers; layer {layer_idx + 1} of another asks. "
                "Make it with that model's config"
            )
        if self.layers[layer_idx].get_seq_length():
            check_inside()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @abstractmethod
    def _make_row(self, keys: Tensor, values: Tensor) -> CacheRow:
        """Return an empty row for keys and values like these, (Hk, n, d) each."""

    def _details(self, rows: list[CacheRow]) -> Mapping[str, float]:
        """Return figures of the method by name."""
        return {}

    @property
    def nbytes(self) -> int:
        """Bytes stored, all layers and sequences together."""
        return sum(row.nbytes for layer in self.layers for row in layer.rows)

    def report(self) -> CacheReport:
        """Say what is held now."""
        rows = [row for layer in self.layers for row in layer.rows]
        held = [(layer.get_seq_length(), layer) for layer in self.layers if layer.rows]
        return CacheReport(
            tokens=max((length * len(layer.rows) for length, layer in held), default=0),
            bytes_stored=self.nbytes,
            bytes_resident=sum(row.resident_nbytes for row in rows),
            bytes_dense=sum(length * len(layer.rows) * layer.dense_bytes_a_token for length, layer in held),
            details=self._details(rows),
        )


def layer_kinds(decoder: Any) -> list[str]:
    """Return what each layer attends to, in the words of transformers, from the config of a decoder."""
    if hasattr(cache_utils, "get_layer_types_and_kwargs"):
        kinds = list(cache_utils.get_layer_types_and_kwargs(decoder)[0])
    else:
        # Before transformers 5.16 each of its caches works this out for itself.
        bounds = (getattr(decoder, name, None) for name in ("sliding_window", "attention_chunk_size"))
        kind = "full_attention" if all(bound is None for bound in bounds) else "sliding_attention"
        kinds = list(getattr(decoder, "layer_types", None) or [kind] * decoder.num_hidden_layers)
        kinds = kinds[: len(kinds) - (getattr(decoder, "num_kv_shared_layers", None) or 0)]
    # Layers that share the keys of others have no cache of their own; earlier versions leave them out.
    return kinds + ["dummy"] * (decoder.num_hidden_layers - len(kinds))


def tokens_in(
    config: Any,
    budget: int | None,
    budget_bytes: int | None,
    dtype: torch.dtype | None = None,
    sparsities: tuple[float, float] | None = None,
) -> int:
    """Return a budget in tokens a sequence, given in tokens or in bytes of all layers of one sequence.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    budget : int, optional
    budget_bytes : int, optional
        Bytes of keys and values of one sequence, all layers together.
    dtype, sparsities : optional
        How they are stored, see ``bytes_a_token``. A config may name another dtype than the model computes in: a cache
        asks again, with the dtype of the keys, when it gets the first.

    Raises
    ------
    QuernelError
        If not exactly one is given, or the bytes hold no token.
    """
    if budget is None and budget_bytes is None:
        raise QuernelError("give budget (tokens) or budget_bytes; got neither")
    refuse_both(budget, budget_bytes)
    if budget is not None:
        return check_int("budget", budget, low=1)
    one = bytes_a_token(config, dtype, sparsities)
    check_int("budget_bytes", budget_bytes, low=one)
    return int(budget_bytes or 0) // one


def refuse_both(budget: int | None, budget_bytes: int | None) -> None:
    """Raise if a budget is given in tokens and in bytes."""
    if budget is not None and budget_bytes is not None:
        raise QuernelError(f"give budget (tokens) or budget_bytes, not both; got {budget!r} and {budget_bytes!r}")


def bytes_a_token(config: Any, dtype: torch.dtype | None = None, sparsities: tuple[float, float] | None = None) -> int:
    """Return the bytes of one token's keys and values, all layers together.

    Those of the plain cache in ``dtype``, by default that of the config, else float32; packed as ``BitmapRows`` packs
    them where ``sparsities`` are given, of keys and of values.
    """
    decoder = config.get_text_config(decoder=True)
    heads, dim = key_heads(decoder)
    size = (dtype or getattr(decoder, "dtype", None) or torch.float32).itemsize
    if sparsities is None:
        head = 2 * dim * size
    else:
        head = sum(8 * -(-dim // TILE) + kept_channels(dim, sparsity) * size for sparsity in sparsities)
    return int(heads * decoder.num_hidden_layers * head)


def key_heads(decoder: Any) -> tuple[int, int]:
    """Return the key heads of a layer and the numbers of each, from the config of a decoder."""
    heads = getattr(decoder, "num_key_value_heads", None) or decoder.num_attention_heads
    dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    return int(heads), int(dim)
