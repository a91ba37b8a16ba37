"""``TokenAttention``: the first attention of a model together with the token embedding that feeds it.

    y_t = MHA(x_t, x, x),   x = norm(embedding(ids)),   scores + bias(t - j)

Where nothing but ids goes in, every term of the softmax is a function of a pair of ids and their distance; that is what
``compress.AttentionToPairs`` makes a ``PairConnect`` of. It has no place for absolute positions.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_int, check_type
from quernel.nn.attention.pair_connect import masked, whole
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES


def _example() -> dict[str, Any]:
    @seeded
    def make() -> TokenAttention:
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        return TokenAttention(nn.Embedding(12, 8), attention, rel_bias=torch.randn(2, 3))

    return {"make": make, "input": lambda generator: (torch.randint(0, 12, (3, 6), generator=generator),)}


@register(
    "pairconnect", pillar="nn", contract="module", paper="2106.08235", status="stable", headline=False, example=_example
)
class TokenAttention(nn.Module):
    """Self-attention over embedded tokens, ids in and mixed tokens out.

    Parameters
    ----------
    embedding : nn.Embedding
    attention : nn.MultiheadAttention
        Of the embedding's width.
    norm : nn.LayerNorm, optional
        Between the two.
    rel_bias : Tensor, shape (num_heads, D), optional
        Summand of the scores at distance min(t - j, D - 1), trained; without causality (num_heads, 2 D - 1), the
        farthest later token first.
    causal : bool, default=True
        Look at earlier tokens only.

    Examples
    --------
    >>> layer = TokenAttention(torch.nn.Embedding(50, 16), torch.nn.MultiheadAttention(16, 4))
    >>> layer(torch.tensor([[3, 1, 4, 1, 5]])).shape
    torch.Size([1, 5, 16])
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        attention: nn.MultiheadAttention,
        norm: nn.LayerNorm | None = None,
        rel_bias: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = check_type("embedding", embedding, nn.Embedding)
        self.attention = check_type("attention", attention, nn.MultiheadAttention)
        self.norm = None if norm is None else check_type("norm", norm, nn.LayerNorm)
        self.causal = check_type("causal", causal, bool)
        check_layers(embedding, attention, rel_bias, causal)
        self.rel_bias = None if rel_bias is None else nn.Parameter(rel_bias.detach().clone())

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, T) -> (B, T, dim)
        """Return the mixed tokens; ``mask`` (B, T) is True where a token counts, outputs elsewhere are zero."""
        keys = (whole(ids) if mask is None else masked(ids, mask)).long()
        x = self.embedding(keys if mask is None else keys.clamp_min(0))
        x = x if self.norm is None else self.norm(x)
        if len(ids) == 0:
            return x  # torch's layer cannot reshape an empty batch
        first = self.attention.batch_first
        biases = self._biases(ids.shape[1], x.dtype, x.device)  # (heads, T, T)
        if mask is not None:
            hidden = ~mask[:, None, None, :] & ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
            biases = biases.expand(len(ids), -1, -1, -1).masked_fill(hidden, -torch.inf)
        else:
            biases = biases.expand(len(ids), -1, -1, -1)
        x = x if first else x.transpose(0, 1)
        y, _ = self.attention(x, x, x, attn_mask=biases.flatten(0, 1), need_weights=False)
        y = y if first else y.transpose(0, 1)
        return y if mask is None else y * mask[..., None]

    def config(self) -> dict[str, Any]:
        """Return sizes and options of the layers."""
        attention, norm = self.attention, self.norm
        bias = self.rel_bias
        return {
            "vocab": self.embedding.num_embeddings,
            "padding_idx": self.embedding.padding_idx,
            "dim": attention.embed_dim,
            "num_heads": attention.num_heads,
            "bias": attention.in_proj_bias is not None,
            "batch_first": attention.batch_first,
            "dropout": attention.dropout,
            "norm": None
            if norm is None
            else {"eps": norm.eps, "affine": norm.elementwise_affine, "bias": _biased(norm)},
            "buckets": None if bias is None else bias.shape[1],
            "causal": self.causal,
            "dtype": dtype_name(self.embedding.weight.dtype),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained layer from ``config()``."""
        dtype, dim, heads = DTYPES[config["dtype"]], config["dim"], config["num_heads"]
        embedding = nn.Embedding(config["vocab"], dim, padding_idx=config["padding_idx"], dtype=dtype)
        attention = nn.MultiheadAttention(
            dim,
            heads,
            dropout=config["dropout"],
            bias=config["bias"],
            batch_first=config["batch_first"],
            dtype=dtype,
        )
        described = config["norm"]
        norm = None
        if described is not None:
            norm = nn.LayerNorm(dim, described["eps"], described["affine"], described["bias"], dtype=dtype)
        buckets = config["buckets"]
        bias = None if buckets is None else torch.zeros(heads, check_int("buckets", buckets, low=1), dtype=dtype)
        return cls(embedding, attention, norm, bias, causal=config["causal"])

    def extra_repr(self) -> str:
        """Show the order and the distances."""
        return f"causal={self.causal}, buckets={None if self.rel_bias is None else self.rel_bias.shape[1]}"

    def _biases(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return what is added to the scores, (heads, T, T)."""
        t = torch.arange(length, device=device)
        distance = t[:, None] - t
        if self.rel_bias is None:
            biases = torch.zeros(self.attention.num_heads, length, length, dtype=dtype, device=device)
        else:
            far = distances_of(self.rel_bias, self.causal) - 1
            place = distance.clamp(0, far) if self.causal else distance.clamp(-far, far) + far
            biases = self.rel_bias[:, place]
        return biases.masked_fill(distance < 0, -torch.inf) if self.causal else biases


def distances_of(rel_bias: Tensor, causal: bool) -> int:
    """Return the number of distances D that a bias tells apart."""
    return rel_bias.shape[1] if causal else (rel_bias.shape[1] + 1) // 2


def check_layers(
    embedding: nn.Embedding, attention: nn.MultiheadAttention, rel_bias: Tensor | None, causal: bool
) -> None:
    """Raise unless embedding, attention and bias make a function of pairs of ids together."""
    if not attention._qkv_same_embed_dim or embedding.embedding_dim != attention.embed_dim:
        raise QuernelError(
            f"attention must read queries, keys and values of the embedding's width {embedding.embedding_dim}; "
            f"it reads {attention.embed_dim}, {attention.kdim} and {attention.vdim}"
        )
    if attention.bias_k is not None or attention.add_zero_attn:
        raise QuernelError(
            "attention must not add keys of its own (add_bias_kv, add_zero_attn): they belong to no token"
        )
    if embedding.max_norm is not None:
        raise QuernelError("embedding must not renormalise its rows (max_norm); scale them once")
    if rel_bias is None:
        return
    heads, buckets = attention.num_heads, rel_bias.shape[-1]
    if rel_bias.ndim != 2 or rel_bias.shape[0] != heads or buckets < 1 or (not causal and buckets % 2 == 0):
        wanted = "D" if causal else "2 D - 1"
        raise QuernelError(f"rel_bias must have shape ({heads}, {wanted}), one row a head; got {tuple(rel_bias.shape)}")


def _biased(norm: nn.LayerNorm) -> bool:
    return getattr(norm, "bias", None) is not None
