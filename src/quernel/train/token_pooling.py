"""Token poolings for sentence-transformers' multi-vector models, for queries and documents alike (arXiv 2505.11471).

``ClusterPooling`` is the one that CRISP trains through; ``TailPooling`` and ``SpacingPooling`` are the paper's
baselines.  Each is a ``BaseTokenPooling``: append it to a ``MultiVectorEncoder``, pass it as ``token_pooling=`` to
``encode_*``, call ``pool`` on token matrices, or give it to ``CrispLoss``.  The work is done for a whole batch by
``quernel.nn.functional``.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import torch
from sentence_transformers.multi_vector_encoder.modules.token_pooling import BaseTokenPooling
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int, check_type
from quernel.nn.functional import PooledTokens, cluster_tokens, spaced_tokens, tail_tokens
from quernel.nn.functional.token_pooling import check_size

# In features, and on the tensors that ``pool`` returns: that they are pooled already.
_MARK = "quernel_pooled"


class _TaskPooling(BaseTokenPooling):
    """A pooling that is told the task; a subclass pools a padded batch."""

    def __init__(self, tasks: str | list[str] | None) -> None:
        super().__init__(tasks=["query", "document"] if tasks is None else tasks)

    @abstractmethod
    def _pooled(self, x: Tensor, mask: Tensor, query: bool) -> PooledTokens:
        """Return the pooled vectors of a batch (B, L, d)."""

    def forward(self, features: dict[str, Any], task: str | None = None) -> dict[str, Any]:
        """Pool ``token_embeddings`` under ``attention_mask``; without a task they count as documents."""
        x = features["token_embeddings"]
        if not self.applies_to(task) or not len(x):
            return features
        if features.get(_MARK):
            _warn_twice(type(self).__name__)
        vectors, mask = self._pooled(x, features["attention_mask"].bool(), task == "query")
        return features | {"token_embeddings": vectors, "attention_mask": mask, _MARK: True}

    def pool(
        self,
        embeddings: list[Tensor] | Tensor,
        *,
        task: str | None = None,
        attention_mask: Tensor | None = None,
        padding_side: str = "right",
    ) -> list[Tensor] | Tensor:
        """Pool token matrices (n_i, d), or a padded batch of them with its mask.

        Parameters
        ----------
        embeddings : list of Tensor, or Tensor of shape (B, L, d)
        task : {"query", "document"}, optional
            None counts as "document".
        attention_mask : Tensor of bool, shape (B, L)
            Needed with a padded batch.
        padding_side : {"left", "right"}, default="right"
            Where the result for a padded batch is padded, with zeros.

        Returns
        -------
        list of Tensor, or Tensor
            As ``embeddings`` came.
        """
        if not self.applies_to(task) or not len(embeddings):
            return embeddings
        check_choice("padding_side", padding_side, ("left", "right"))
        if isinstance(embeddings, Tensor):
            if attention_mask is None:
                raise QuernelError(
                    "attention_mask must be given with a padded batch: a token vector of zeros and padding look alike"
                )
            x, mask = embeddings, attention_mask.bool()
        else:
            if any(getattr(one, _MARK, False) for one in embeddings):
                _warn_twice(type(self).__name__)
            lengths = torch.tensor([len(one) for one in embeddings], device=embeddings[0].device)
            x = pad_sequence(list(embeddings), batch_first=True)
            mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        vectors, there = self._pooled(x, mask, task == "query")
        single = [one[kept] for one, kept in zip(vectors, there, strict=True)]
        if isinstance(embeddings, Tensor):
            return pad_sequence(single, batch_first=True, padding_side=padding_side)
        for one in single:
            setattr(one, _MARK, True)
        return single

    def pool_one(self, embedding: Tensor, **kwargs: Any) -> Tensor:
        """Pool one matrix (n, d); ``task=`` as in ``pool``."""
        pooled: Tensor = self.pool([embedding], task=kwargs.get("task"))[0]
        return pooled


@register("crisp", pillar="train", contract="trainer", paper="2505.11471", status="experimental", headline=False)
class ClusterPooling(_TaskPooling):
    """Replace the token vectors of a text by the means of their clusters.

    Parameters
    ----------
    k_query, k_document : int or float, default=8 and 32
        Vectors of a query and of a document: a number, or a share of its tokens in (0, 1), rounded down. Texts with no
        more tokens keep them as they are.
    iters : int, default=10
        Steps of k-means.
    normalize : bool, default=True
        Divide means by their lengths.
    tasks : list of str, optional
        What is pooled; default queries and documents.

    References
    ----------
    Veneroso et al., "CRISP: Clustering Multi-Vector Representations for Denoising and Pruning", arXiv 2505.11471, 2025.

    Examples
    --------
    >>> pool = ClusterPooling(k_query=2, k_document=4)
    >>> [len(v) for v in pool.pool([torch.eye(8), torch.eye(8)[:3]])]
    [4, 3]
    """

    config_keys = ["k_query", "k_document", "iters", "normalize", "tasks"]

    def __init__(
        self,
        k_query: int | float = 8,
        k_document: int | float = 32,
        *,
        iters: int = 10,
        normalize: bool = True,
        tasks: str | list[str] | None = None,
    ) -> None:
        super().__init__(tasks)
        self.k_query, self.k_document = check_size("k_query", k_query), check_size("k_document", k_document)
        self.iters = check_int("iters", iters, low=1)
        self.normalize = check_type("normalize", normalize, bool)

    def _pooled(self, x: Tensor, mask: Tensor, query: bool) -> PooledTokens:
        k = self.k_query if query else self.k_document
        return cluster_tokens(x, k, mask=mask, iterations=self.iters, normalize=self.normalize)


@register("crisp", pillar="train", contract="trainer", paper="2505.11471", status="experimental", headline=False)
class TailPooling(_TaskPooling):
    """Keep the last k tokens of a text.

    Parameters
    ----------
    k_query, k_document : int or float, default=8 and 32
        A number, or a share of the tokens in (0, 1), rounded down.
    tasks : list of str, optional
        What is pooled; default queries and documents.
    """

    config_keys = ["k_query", "k_document", "tasks"]

    def __init__(
        self,
        k_query: int | float = 8,
        k_document: int | float = 32,
        *,
        tasks: str | list[str] | None = None,
    ) -> None:
        super().__init__(tasks)
        self.k_query, self.k_document = check_size("k_query", k_query), check_size("k_document", k_document)

    def _pooled(self, x: Tensor, mask: Tensor, query: bool) -> PooledTokens:
        return tail_tokens(x, self.k_query if query else self.k_document, mask=mask)


@register("crisp", pillar="train", contract="trainer", paper="2505.11471", status="experimental", headline=False)
class SpacingPooling(_TaskPooling):
    """Keep every n-th token of a text, beginning with the first.

    Parameters
    ----------
    step_query, step_document : int, default=2
        Distances of the tokens that are kept.
    tasks : list of str, optional
        What is pooled; default queries and documents.
    """

    config_keys = ["step_query", "step_document", "tasks"]

    def __init__(self, step_query: int = 2, step_document: int = 2, *, tasks: str | list[str] | None = None) -> None:
        super().__init__(tasks)
        self.step_query = check_int("step_query", step_query, low=1)
        self.step_document = check_int("step_document", step_document, low=1)

    def _pooled(self, x: Tensor, mask: Tensor, query: bool) -> PooledTokens:
        return spaced_tokens(x, self.step_query if query else self.step_document, mask=mask)


def _warn_twice(name: str) -> None:
    warnings.warn(
        f"{name} gets vectors that are pooled already, and pooling what is pooled gives others: leave one of the two "
        "out (a module of the model, token_pooling= of encode, the pool of the loss, a call of pool)",
        stacklevel=3,
    )
