"""``CrispLoss``: train a multi-vector encoder through the pooling of its tokens (arXiv 2505.11471).

    L = -mean_i log [ exp(S(P Q_i, P D_i) / T) / sum_j exp(S(P Q_i, P D_j) / T) ]

with the Chamfer score S, the pooling P that is used in search too, and j over all positives and hard negatives of the
batch.  Clusters are found anew at every step, without a gradient; it flows through their means.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_float, check_type
from quernel.nn.functional import chamfer_scores

Features = dict[str, Any]


@register("crisp", pillar="train", contract="trainer", paper="2505.11471", status="experimental")
class CrispLoss(nn.Module):
    """Contrastive loss on the Chamfer scores of pooled token vectors.

    Use it in a plain loop, ``loss([queries, positives]).backward()``, or give it to sentence-transformers' trainer.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(features, task="query")`` or ``"document"``; gives ``token_embeddings`` (B, L, d) and
        ``attention_mask`` (B, L) in a dict, as a ``MultiVectorEncoder`` does.
    pool : callable, optional
        Called in the same way on what the model gives: a ``ClusterPooling``, or a function of your own around
        ``nn.functional.cluster_tokens``. None where the model ends with its pooling already, or to train without one.
    temperature : float, default=0.05
        T, positive.
    length_normalize : bool, default=True
        Divide a score by the number of pooled vectors of its query, so that it lies where a cosine does. Without it a
        score is a sum, and T must be larger by as much.

    Notes
    -----
    With one pair in the batch and no negatives there is nothing to tell the positive from: the loss is zero, and a
    warning says so.

    References
    ----------
    Veneroso et al., "CRISP: Clustering Multi-Vector Representations for Denoising and Pruning", arXiv 2505.11471, 2025.

    Examples
    --------
    >>> from quernel.nn.functional import cluster_tokens
    >>> def pool(features, task):
    ...     vectors, mask = cluster_tokens(features["token_embeddings"], 2 if task == "query" else 4)
    ...     return {"token_embeddings": vectors, "attention_mask": mask}
    >>> class Encoder(torch.nn.Linear):
    ...     def forward(self, features, task):
    ...         return features | {"token_embeddings": super().forward(features["token_embeddings"])}
    >>> texts = [{"token_embeddings": torch.randn(3, n, 8), "attention_mask": torch.ones(3, n)} for n in (5, 9)]
    >>> CrispLoss(Encoder(8, 4), pool)(texts).shape
    torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Callable[..., Features] | None = None,
        *,
        temperature: float = 0.05,
        length_normalize: bool = True,
    ) -> None:
        super().__init__()
        if not callable(model) or not (pool is None or callable(pool)):
            raise QuernelError(f"model and pool must be callable; got {type(model).__name__}, {type(pool).__name__}")
        self.model, self.pool = model, pool
        self.temperature = check_float("temperature", temperature, low=0.0, open_low=True)
        self.length_normalize = check_type("length_normalize", length_normalize, bool)

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """Return the loss of a batch.

        Parameters
        ----------
        sentence_features : sequence of dict
            Features of the queries, of their positives, and of as many columns of hard negatives as there are; a
            ``"task"`` in them goes before the column's own.
        labels : Tensor, optional
            Not used; trainers pass it.

        Returns
        -------
        loss : Tensor, a scalar

        Raises
        ------
        QuernelError
            If there are fewer than two columns, they have different lengths, or a text has no vectors.
        """
        columns = [self._vectors(i, dict(features)) for i, features in enumerate(sentence_features)]
        sizes = [len(vectors) for vectors, _ in columns]
        if len(columns) < 2 or len(set(sizes)) != 1:
            raise QuernelError(
                f"sentence_features must hold queries, positives and perhaps negatives, as many of each; got {sizes}"
            )
        scores = self.scores(columns[0], columns[1:])
        if scores.shape[1] == 1:
            warnings.warn(
                "one pair and no negatives: the loss is zero whatever the model does. Use larger batches and drop the "
                "last one (dataloader_drop_last=True)",
                stacklevel=2,
            )
        return F.cross_entropy(scores / self.temperature, torch.arange(len(scores), device=scores.device))

    def scores(self, queries: tuple[Tensor, Tensor], columns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the scores (B, B columns) of pooled queries with pooled documents, positives first; each a pair of
        vectors (B, K, d) and mask (B, K).
        """
        asked, mask = queries
        parts = [chamfer_scores(asked, held, query_mask=mask, document_mask=there) for held, there in columns]
        scores = torch.cat(parts, dim=1)
        return scores / mask.sum(1, keepdim=True) if self.length_normalize else scores

    def get_config_dict(self) -> dict[str, Any]:
        """Return what a model card says of the loss."""
        pool = None if self.pool is None else getattr(self.pool, "__name__", type(self.pool).__name__)
        return {"pool": pool, "temperature": self.temperature, "length_normalize": self.length_normalize}

    def _vectors(self, column: int, features: Features) -> tuple[Tensor, Tensor]:
        task = features.get("task", "document" if column else "query")
        found = self.model(features, task=task)
        if self.pool is not None:
            found = self.pool(found, task=task)
        vectors, mask = found["token_embeddings"], found["attention_mask"].bool()
        empty = ~mask.any(1)
        if bool(empty.any()):
            raise QuernelError(
                f"sentence_features[{column}]: text {int(empty.nonzero()[0])} has no vectors; leave empty texts out"
            )
        return vectors, mask
