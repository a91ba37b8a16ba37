"""``LouisKVCache``: all keys and values in a pool, a small working set re-chosen where the text turns (2510.11292).

In each layer a step compares its queries with those of the step before: r = mean over the heads of their cosine.  Below
``tau`` the model has changed its subject, and units of tokens are chosen anew: clusters of similar keys in the prompt,
contiguous segments in the generated text.  A unit's score is the mean over the query heads of a key head of
softmax_u(q c_u / sqrt(d)), c_u the mean of its keys.  Attention is exact over sinks, chosen units and newest tokens.
Cost of a step O(budget d), of a choice O(T / cluster_size d) and one copy of the chosen units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.cache._cache import Cache, refuse_both, tokens_in
from quernel.cache._layer import CacheRow
from quernel.cache._packed_pool import dtype_named, make_pool, packing
from quernel.cache._pool import STORAGES, KVPool
from quernel.cache._retrieval import Layout, RetrievalRow
from quernel.kernels.clustering import cluster_means, kmeans

BUDGET = 1024
# Measured: dense attention takes as long as choosing at three steps of ten where a row is 1.4 times the working set, as
# long as choosing at every step at 2.2 times. Up to here nothing is left out, as there is next to nothing to win.
CROSSOVER = 2.0
# Prompt tokens clustered together: the work grows with their number, and the clusters hardly get better.
PART = 2048


@dataclass(frozen=True)
class LouisKVConfig:
    """Settings of a ``LouisKVCache``.

    Parameters
    ----------
    budget : int, optional
        Tokens chosen from the pool, besides sinks and newest tokens; default 1024.
    cluster_size : int, default=16
        Mean number of prompt tokens of a unit; at most the budget.
    tau : float, default=0.7
        Units are chosen anew where the queries' mean cosine to those before is below. 0.7 is the paper's for Qwen3-8B;
        ``calibrate_tau`` finds it for another model. Above 1: at every step; -1: only once after a prompt.
    sink : int, default=16
        First tokens, always attended to.
    buffer : int, default=128
        Newest tokens, always attended to.
    min_segment, max_segment : int, default=4, 64
        Generated tokens of a unit; at most ``buffer``.
    kmeans_iters : int, default=10
        Lloyd's iterations at most.
    storage : {"ram", "memmap"}
        Where the pool lies: in memory, or in a temporary file.
    pool_dtype : str, optional
        In which the pool is kept, e.g. ``"bfloat16"``; default the model's.
    dense_below : int, optional
        Up to so many tokens of a row nothing is left out; default where dense attention was measured to be as fast,
        twice the largest working set.
    audit : bool, default=False
        Measure at every step which share of the full attention is covered; reads all keys, so it is slow.
    budget_bytes : int, optional
        Instead of ``budget``: bytes of the chosen keys and values as the pool holds them, all layers of one sequence
        together. The working set holds them in the model's dtype, unpacked.
    k_sparsity, v_sparsity : float, default=0.0, 0.0
        Share of the channels of a key and of a value that the pool drops, in [0, 1): a token that leaves the newest
        ones keeps its largest, packed as by ``MustafarCache``. Where both are 0 the pool is not packed.

    Raises
    ------
    QuernelError
        If a value is out of its range or two do not fit together.

    Examples
    --------
    >>> LouisKVConfig(budget=256).cluster_size
    16
    """

    budget: int | None = None
    cluster_size: int = 16
    tau: float = 0.7
    sink: int = 16
    buffer: int = 128
    min_segment: int = 4
    max_segment: int = 64
    kmeans_iters: int = 10
    storage: str = "ram"
    pool_dtype: str | None = None
    dense_below: int | None = None
    audit: bool = False
    budget_bytes: int | None = None
    k_sparsity: float = 0.0
    v_sparsity: float = 0.0

    def __post_init__(self) -> None:
        if self.budget is None and self.budget_bytes is None:
            object.__setattr__(self, "budget", BUDGET)
        refuse_both(self.budget, self.budget_bytes)
        check_int("cluster_size", self.cluster_size, low=1)
        if self.budget is not None and check_int("budget", self.budget, low=1) < self.cluster_size:
            raise QuernelError(
                f"cluster_size must be at most the budget of {self.budget} tokens; got {self.cluster_size}"
            )
        check_float("tau", self.tau)
        check_int("sink", self.sink, low=0)
        check_int("buffer", self.buffer, low=1)
        if check_int("max_segment", self.max_segment, low=1) > self.buffer:
            raise QuernelError(
                f"buffer must be at least max_segment={self.max_segment}, or an open segment could outgrow it; got "
                f"{self.buffer}. Lower max_segment, or raise buffer"
            )
        check_int("min_segment", self.min_segment, low=1, high=self.max_segment)
        check_int("kmeans_iters", self.kmeans_iters, low=1)
        check_choice("storage", self.storage, STORAGES)
        dtype_named(self.pool_dtype)
        packing(self.k_sparsity, self.v_sparsity, self.dtype)
        check_bool("audit", self.audit)
        if self.dense_below is not None:
            check_int("dense_below", self.dense_below, low=0)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the pool; None for the model's."""
        return dtype_named(self.pool_dtype)

    @property
    def dropped(self) -> tuple[float, float] | None:
        """Shares of channels that the pool drops, of keys and of values; None if it is not packed."""
        return packing(self.k_sparsity, self.v_sparsity, self.dtype)

    def layout(self) -> Layout:
        """Return the sizes of a row's parts; the budget must be one of tokens."""
        budget = check_int("budget", self.budget, low=1)
        piece = min(self.cluster_size, self.max_segment)
        largest = self.sink + budget + self.buffer + self.max_segment - 1
        return Layout(
            budget=budget,
            sink=self.sink,
            buffer=self.buffer,
            piece=piece,
            shortest=self.min_segment,
            longest=self.max_segment,
            part=-(-PART // piece) * piece,
            dense_below=int(CROSSOVER * largest) if self.dense_below is None else self.dense_below,
            audit=self.audit,
        )


class LouisKVRow(RetrievalRow):
    """Clusters in the prompt, segments between turns in what is generated."""

    def __init__(self, keys: Tensor, values: Tensor, settings: LouisKVConfig, pool: KVPool) -> None:
        super().__init__(keys, values, settings.layout(), pool)
        self._settings = settings
        self._last: Tensor | None = None  # queries of the step before, of length 1

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Store a chunk; what comes after it is compared with nothing before it."""
        super().extend(keys, values)
        self._last = None

    def tensors(self) -> list[Tensor]:
        """Return what the base stores, and the last queries."""
        return super().tensors() + ([] if self._last is None else [self._last])

    def _moved(self, query: Tensor) -> bool:
        wide = query.detach().to(torch.promote_types(query.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(torch.finfo(wide.dtype).tiny)
        now = (wide / length).flatten()
        last, self._last = self._last, now
        return last is None or float(now.dot(last)) < self._settings.tau * length.numel()

    def _units(self, keys: Tensor) -> tuple[Tensor | None, np.ndarray]:
        wanted = -(-keys.shape[1] // self._settings.cluster_size)
        found = kmeans(keys, wanted, iterations=self._settings.kmeans_iters)
        sizes = found.counts.cpu().numpy()
        if not sizes.all():
            # Heads with fewer clusters have their empty ones at the end.
            sizes = np.take_along_axis(sizes, (sizes == 0).argsort(axis=1, kind="stable"), axis=1)
        return found.assignment.argsort(dim=1, stable=True), sizes

    def _summaries(self, keys: Tensor, sizes: np.ndarray) -> Tensor:
        if sizes.shape[1] == 1:
            return keys.mean(1, keepdim=True)
        units = torch.arange(sizes.shape[1]).repeat(len(sizes)).repeat_interleave(torch.from_numpy(sizes).flatten())
        return cluster_means(keys, units.view(keys.shape[:2]).to(keys.device), sizes.shape[1])

    def _scores(self, query: Tensor, summaries: Tensor, absent: Tensor | None, scale: float) -> Tensor:
        return group_scores(torch.bmm(query * scale, summaries.mT), absent)


def group_scores(logits: Tensor, absent: Tensor | None) -> Tensor:
    """Return the mean over a key head's query heads of their softmax over the units, (Hk, g, U) -> (Hk, U)."""
    if absent is not None:
        logits = logits.masked_fill(absent[:, None], -torch.inf)
    return logits.softmax(-1).mean(1)


class RetrievalCache(Cache):
    """What caches over a pool report."""

    def _details(self, rows: list[CacheRow]) -> Mapping[str, float]:
        held = [row for row in rows if isinstance(row, RetrievalRow)]
        steps = sum(row.counts.steps for row in held)
        sparse = sum(row.counts.sparse_steps for row in held)
        found = {
            "retrieval_rate": sum(row.counts.selections for row in held) / sparse if sparse else 0.0,
            "tokens_read": sum(row.counts.tokens_read for row in held) / steps if steps else 0.0,
            "bytes_pool": float(sum(row.pool.nbytes for row in held)),
            "bytes_resident": float(sum(row.resident_nbytes for row in held)),
        }
        for number, layer in enumerate(self.layers):
            row_counts = [row.counts for row in layer.rows if isinstance(row, RetrievalRow) and row.layout.audit]
            audited = [counts for counts in row_counts if counts.steps]
            if audited:
                covered, taken = sum(c.covered for c in audited), sum(c.steps for c in audited)
                found[f"recall_layer_{number}"] = covered / taken
        return found


def _example() -> dict[str, Any]:
    def make(config: Any) -> LouisKVCache:
        # So small that the contexts of the suite pass every limit.
        return LouisKVCache(
            config, budget=12, cluster_size=4, tau=0.9, sink=2, buffer=8, min_segment=2, max_segment=4, dense_below=0
        )

    return {"make": make, "exact_to": 22}


@register("louiskv", pillar="cache", contract="cache", paper="2510.11292", status="stable", example=_example)
class LouisKVCache(RetrievalCache):
    """Keep everything, attend to what the present passage needs.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.
    settings : LouisKVConfig, optional
    **options
        Fields of ``LouisKVConfig``, in place of or on top of ``settings``.

    Raises
    ------
    QuernelError
        If a layer of the model attends to a sliding window, or settings are out of their range.

    Notes
    -----
    ``report().details`` holds ``retrieval_rate`` (choices a step beyond the dense stage), ``tokens_read`` (mean a step,
    layer and sequence), ``bytes_pool``, ``bytes_resident`` and, with ``audit=True``, ``recall_layer_<i>``: the mean
    share of the true softmax over all tokens that the working set covers.

    References
    ----------
    "LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences", arXiv 2510.11292, 2025.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> LouisKVCache(LlamaConfig(num_hidden_layers=2), budget=256).settings.budget
    256
    """

    def __init__(self, config: Any, settings: LouisKVConfig | None = None, **options: Any) -> None:
        try:
            chosen = replace(settings, **options) if settings is not None else LouisKVConfig(**options)
        except TypeError as error:
            raise QuernelError(f"LouisKVCache takes the fields of LouisKVConfig as options; got {options}") from error
        self._bytes = chosen.budget_bytes
        self.settings = self._in_tokens(config, chosen, chosen.dtype)
        super().__init__(config)

    def _in_tokens(self, config: Any, settings: LouisKVConfig, dtype: torch.dtype | None) -> LouisKVConfig:
        """Return settings whose budget is one of tokens, for a pool of this dtype."""
        if self._bytes is None:
            return settings
        tokens = tokens_in(config, None, self._bytes, dtype, settings.dropped)
        return replace(settings, budget=tokens, budget_bytes=None)

    def _make_row(self, keys: Tensor, values: Tensor) -> CacheRow:
        self.settings = self._in_tokens(self.config, self.settings, self.settings.dtype or keys.dtype)
        return LouisKVRow(keys, values, self.settings, self._make_pool(keys, values))

    def _make_pool(self, keys: Tensor, values: Tensor) -> KVPool:
        """Return an empty pool for one row."""
        chosen = self.settings
        return make_pool(keys, values, chosen.dtype, chosen.storage, chosen.dropped)
