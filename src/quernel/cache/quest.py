"""``QuestCache``: pages of a fixed size, chosen anew at every step by bounds on their keys (Quest, arXiv 2406.10774).

A page keeps the least and the largest value of each key dimension.  No key of it has a larger product with the query
than sum_j max(q_j min_j, q_j max_j); the pages of the largest bounds are attended to.  The peer of ``LouisKVCache`` at
the same budget, over the same pool: what differs is how units are formed, scored and when they are chosen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_int
from quernel.cache._cache import tokens_in
from quernel.cache._layer import CacheRow
from quernel.cache._packed_pool import dtype_named, make_pool, packing
from quernel.cache._pool import STORAGES
from quernel.cache._retrieval import Layout, RetrievalRow
from quernel.cache.louiskv import PART, RetrievalCache, group_scores


class QuestRow(RetrievalRow):
    """Pages throughout; every step chooses."""

    def _moved(self, query: Tensor) -> bool:
        return True

    def _units(self, keys: Tensor) -> tuple[Tensor | None, np.ndarray]:
        n, page = keys.shape[1], self.layout.piece
        sizes = np.minimum(page, n - np.arange(0, n, page))
        return None, np.broadcast_to(sizes, (keys.shape[0], len(sizes)))

    def _summaries(self, keys: Tensor, sizes: np.ndarray) -> Tensor:
        page = int(sizes[0, 0])
        whole = keys.shape[1] // page * page
        parts = [keys[:, :whole].unflatten(1, (-1, page))]
        if whole < keys.shape[1]:
            parts.append(keys[:, None, whole:])
        return torch.cat([torch.cat((part.amax(2), part.amin(2)), dim=-1) for part in parts], dim=1)

    def _scores(self, query: Tensor, summaries: Tensor, absent: Tensor | None, scale: float) -> Tensor:
        # max(q min, q max) is q max where q is positive and q min elsewhere.
        signed = torch.cat((query.clamp(min=0), query.clamp(max=0)), dim=-1) * scale
        return group_scores(torch.bmm(signed, summaries.mT), absent)


def _example() -> dict[str, Any]:
    def make(config: Any) -> QuestCache:
        return QuestCache(config, budget=12, page_size=4, sink=2, buffer=8, dense_below=0)

    return {"make": make, "exact_to": 22}


@register(
    "louiskv", pillar="cache", contract="cache", paper="2406.10774", status="stable", headline=False, example=_example
)
class QuestCache(RetrievalCache):
    """Keep everything, attend to the pages whose keys may match the query best.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.
    budget : int, optional
        Tokens of the chosen pages, besides sinks and newest tokens.
    page_size : int, default=16
        Tokens of a page; at most the budget.
    sink : int, default=0
        First tokens that are always attended to; the paper has none.
    buffer : int, optional
        Newest tokens that are always attended to; default one page.
    storage : {"ram", "memmap"}
    pool_dtype : str, optional
        In which the pool is kept, e.g. ``"bfloat16"``; default the model's.
    dense_below : int, default=0
        Up to so many tokens of a row nothing is left out.
    audit : bool, default=False
        See ``LouisKVConfig``.
    budget_bytes : int, optional
        Instead of ``budget``: bytes of the chosen pages as the pool holds them, all layers of one sequence together.
    k_sparsity, v_sparsity : float, default=0.0, 0.0
        Share of the channels that the pool drops, as in ``LouisKVConfig``.

    Raises
    ------
    QuernelError
        If a value is out of its range, or a layer of the model attends to a sliding window.

    Notes
    -----
    Query heads that share a key head choose together, by the mean of their softmax over the bounds: the paper treats
    every head alone. Its two dense first layers are left out: all layers choose.

    References
    ----------
    J. Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774, ICML 2024.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> QuestCache(LlamaConfig(num_hidden_layers=2), budget=256).report().bytes_stored
    0
    """

    def __init__(
        self,
        config: Any,
        budget: int | None = None,
        page_size: int = 16,
        *,
        sink: int = 0,
        buffer: int | None = None,
        storage: str = "ram",
        pool_dtype: str | None = None,
        dense_below: int = 0,
        audit: bool = False,
        budget_bytes: int | None = None,
        k_sparsity: float = 0.0,
        v_sparsity: float = 0.0,
    ) -> None:
        self.pool_dtype = dtype_named(pool_dtype)
        self.dropped = packing(k_sparsity, v_sparsity, self.pool_dtype)
        self._bytes = budget_bytes
        tokens = tokens_in(config, budget, budget_bytes, self.pool_dtype, self.dropped)
        page = check_int("page_size", page_size, low=1)
        _check_page(page, tokens)
        self.storage = check_choice("storage", storage, STORAGES)
        self.layout = Layout(
            budget=tokens,
            sink=check_int("sink", sink, low=0),
            buffer=page if buffer is None else check_int("buffer", buffer, low=1),
            piece=page,
            shortest=page,
            longest=page,
            part=-(-PART // page) * page,
            dense_below=check_int("dense_below", dense_below, low=0),
            audit=check_bool("audit", audit),
        )
        super().__init__(config)

    def _make_row(self, keys: Tensor, values: Tensor) -> CacheRow:
        pool = make_pool(keys, values, self.pool_dtype, self.storage, self.dropped)
        if self._bytes is not None:
            tokens = tokens_in(self.config, None, self._bytes, pool.dtype, self.dropped)
            _check_page(self.layout.piece, tokens)
            self.layout = replace(self.layout, budget=tokens)
        return QuestRow(keys, values, self.layout, pool)


def _check_page(page: int, tokens: int) -> None:
    if page > tokens:
        raise QuernelError(f"page_size must be at most the budget of {tokens} tokens; got {page}")
