"""Fewer vectors for a text: means of clusters, last tokens, every n-th token; and the Chamfer score (arXiv 2505.11471).

    S(Q, D) = sum over q in Q of max over x in D of <q, x>

A text is a set of token vectors, a batch is (B, L, d) with a mask.  Clusters are found without a gradient; their means
are in the graph, so x_t gets g_c / |c| of its cluster's gradient.  A text with too few tokens gives fewer vectors,
which the mask says: padding never takes part in a score.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.kernels.clustering import cluster_means, kmeans

# A share times a number of tokens may be a rounding below the integer that it means: 0.29 * 100.
_ROUNDING = 1e-9


class PooledTokens(NamedTuple):
    """Vectors of every text and which of them are there."""

    vectors: Tensor  # (B, K, d), zeros where the mask is False
    mask: Tensor  # (B, K) bool


def cluster_tokens(
    x: Tensor, k: int | float, *, mask: Tensor | None = None, iterations: int = 10, normalize: bool = True
) -> PooledTokens:
    """Replace the token vectors of each text by the means of k clusters.

    Parameters
    ----------
    x : Tensor, shape (B, L, d)
        Token vectors.
    k : int or float
        Clusters of a text: a number, at least 1, or a share of its tokens in (0, 1), rounded down and at least one.
    mask : Tensor of bool, shape (B, L), optional
        True for real tokens; default all.
    iterations : int, default=10
        Steps of k-means.
    normalize : bool, default=True
        Divide means by their lengths.  Means of unit vectors are shorter than one, the shorter the looser the cluster.

    Returns
    -------
    PooledTokens
        A text of at most k tokens keeps them as they are; one of fewer than k distinct tokens has as many vectors as
        it has distinct ones.

    Raises
    ------
    QuernelError
        If k is out of range, a text has no tokens, or a real token is not finite.

    Notes
    -----
    Seeds are points far from each other, so the result does not depend on the order of the tokens, apart from exact
    ties of distances.  Nothing is drawn.  O(iterations L K d) a text.

    References
    ----------
    Veneroso et al., "CRISP: Clustering Multi-Vector Representations for Denoising and Pruning", arXiv 2505.11471, 2025.

    Examples
    --------
    >>> x = torch.tensor([[[0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]]])
    >>> cluster_tokens(x, 2, normalize=False).vectors.sort(1).values
    tensor([[[-1.0000,  0.0000],
             [ 0.7000,  0.7000]]])
    """
    x, real = _checked(x, mask)
    wanted = _budget(k, real.sum(1))
    kept = real.sum(1) <= wanted
    # A text that is kept is a partition into single tokens: their means are the tokens, bit for bit.
    place = torch.where(real, real.cumsum(1) - 1, -1)
    many = (~kept).nonzero()[:, 0]
    if len(many):
        found = kmeans(x[many], wanted[many], mask=real[many], iterations=iterations, start="farthest")
        place[many] = found.assignment
    size = int(place.max()) + 1 if place.numel() else 0
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    vectors = cluster_means(wide, place, size)
    if normalize:
        vectors = torch.where(kept[:, None, None], vectors, F.normalize(vectors, dim=-1))
    there = (place[..., None] == torch.arange(size, device=x.device)).any(1)
    return PooledTokens(vectors.to(x.dtype), there)


def tail_tokens(x: Tensor, k: int | float, *, mask: Tensor | None = None) -> PooledTokens:
    """Keep the last k real tokens of each text, in their order; arguments as in ``cluster_tokens``.

    Examples
    --------
    >>> x = torch.arange(4.0)[None, :, None]
    >>> tail_tokens(x, 2, mask=torch.tensor([[True, True, True, False]])).vectors.flatten().tolist()
    [1.0, 2.0]
    """
    x, real = _checked(x, mask)
    there = real.sum(1, keepdim=True)
    return _kept(x, real & (real.cumsum(1) > there - _budget(k, there[:, 0])[:, None]))


def spaced_tokens(x: Tensor, step: int, *, mask: Tensor | None = None) -> PooledTokens:
    """Keep the real tokens 0, step, 2 step, ... of each text.

    Examples
    --------
    >>> spaced_tokens(torch.arange(5.0)[None, :, None], 2).vectors.flatten().tolist()
    [0.0, 2.0, 4.0]
    """
    check_int("step", step, low=1)
    x, real = _checked(x, mask)
    return _kept(x, real & ((real.cumsum(1) - 1) % step == 0))


def chamfer_scores(
    queries: Tensor, documents: Tensor, *, query_mask: Tensor | None = None, document_mask: Tensor | None = None
) -> Tensor:
    """Return the Chamfer score of every query with every document, also called MaxSim.

    Parameters
    ----------
    queries : Tensor, shape (Q, m, d)
    documents : Tensor, shape (N, n, d)
    query_mask : Tensor of bool, shape (Q, m), optional
        True for vectors that count; default all.
    document_mask : Tensor of bool, shape (N, n), optional

    Returns
    -------
    scores : Tensor, shape (Q, N)
        In at least float32.  Minus infinity for a document without vectors, zero for a query without any.

    Notes
    -----
    The products of all pairs are held at once, Q N m n numbers: made for training batches.  ``MultiVectorIndex``
    searches many documents.

    Examples
    --------
    >>> chamfer_scores(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[0.6, 0.8], [1.0, 0.0]]]))
    tensor([[1.8000]])
    """
    if queries.ndim != 3 or documents.ndim != 3 or queries.shape[2] != documents.shape[2]:
        raise QuernelError(
            "queries and documents must be (Q, m, d) and (N, n, d) of one d; got "
            f"{tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
    asked, held = _real(queries, "query_mask", query_mask), _real(documents, "document_mask", document_mask)
    # Filled first: what stands in padding may be anything, and not a number times zero stays one.
    q = queries.to(wide).masked_fill(~asked[..., None], 0.0)
    x = documents.to(wide).masked_fill(~held[..., None], 0.0)
    products = torch.einsum("qmd,nld->qnml", q, x).masked_fill(~held[None, :, None], -torch.inf)
    if not products.shape[-1]:
        products = F.pad(products, (0, 1), value=-torch.inf)
    return products.amax(-1).masked_fill(~asked[:, None], 0.0).sum(-1)


def _checked(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return tokens with zeros in the padding, and which are real."""
    if x.ndim != 3 or not x.is_floating_point():
        raise QuernelError(f"x must be (B, L, d) of floats; got {x.dtype} of shape {tuple(x.shape)}")
    real = _real(x, "mask", mask)
    empty = ~real.any(1)
    if bool(empty.any()):
        raise QuernelError(f"x[{int(empty.nonzero()[0])}] has no tokens; leave empty texts out")
    x = x.masked_fill(~real[..., None], 0.0)
    broken = ~x.isfinite().flatten(1).all(1)
    if bool(broken.any()):
        raise QuernelError(
            f"x[{int(broken.nonzero()[0])}] holds NaN or infinity in a real token. Likely causes: (a) a training that "
            "diverged, (b) the division of a vector of zeros by its length"
        )
    return x, real


def _real(x: Tensor, name: str, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if mask.shape != x.shape[:2]:
        raise QuernelError(f"{name} must have shape {tuple(x.shape[:2])}; got {tuple(mask.shape)}")
    return mask.bool()


def check_size(name: str, k: int | float) -> int | float:
    """Return ``k`` if it is a number of vectors, at least 1, or a share of them in (0, 1)."""
    if isinstance(k, float):
        return check_float(name, k, low=0.0, high=1.0, open_low=True, open_high=True)
    return check_int(name, k, low=1)


def _budget(k: int | float, there: Tensor) -> Tensor:
    """Return the vectors that each text may have, (B,) int64."""
    k = check_size("k", k)
    if isinstance(k, float):
        return (k * there.double() + _ROUNDING).floor().long().clamp(min=1)
    return torch.full_like(there, k)


def _kept(x: Tensor, keep: Tensor) -> PooledTokens:
    """Return the tokens to keep, moved to the front."""
    size = int(keep.sum(1).max()) if len(keep) else 0
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :size]
    there = keep.gather(1, order)
    vectors = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    return PooledTokens(vectors.masked_fill(~there[..., None], 0.0), there)
