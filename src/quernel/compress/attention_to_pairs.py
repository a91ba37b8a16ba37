"""AttentionToPairs: the first attention of a model, over token embeddings, becomes a table of pairs (arXiv 2106.08235).

    y_t = sum_j exp(q_u . k_v / sqrt(dh)) v_v / sum_j exp(...),  u = x_t, v = x_j

Both terms are functions of the ids alone, so n(u, v) = v_v and s(u, v) = q_u . k_v / sqrt(dh) reproduce the layer
exactly, heads, biases and relative position biases included. No projection of queries, keys and values is left to
compute; V^2 rows are to be stored, so the vocabulary must be small. Later layers attend to hidden states, which no
table of ids can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_int, check_type
from quernel.compress._method import LayerPlan, PerModuleMethod
from quernel.nn import PairConnect, PairTable, TokenAttention
from quernel.nn.attention.token_attention import check_layers, distances_of


def _example() -> dict[str, Any]:
    def model() -> nn.Module:
        attention = nn.MultiheadAttention(16, 2, batch_first=True)
        net = nn.Sequential(TokenAttention(nn.Embedding(5, 16), attention), nn.Linear(16, 3)).eval()
        for parameter in net.parameters():
            parameter.data = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape).sin()
        return net

    data = [torch.arange(12).reshape(3, 4) % 5]
    return {"method": AttentionToPairs(), "model": model, "data": data, "example_inputs": (data[0],)}


@register(
    "pairconnect",
    pillar="compress",
    contract="method",
    paper="2106.08235",
    status="stable",
    headline=False,
    example=_example,
)
@dataclass(frozen=True)
class AttentionToPairs(PerModuleMethod):
    """Replace attention over token embeddings by look-ups of pairs, exactly.

    Takes ``quernel.nn.TokenAttention`` in a model; ``compress`` (the method of this class) takes the bare layers.

    Parameters
    ----------
    budget_bytes : int, default=2**30
        A layer whose table would be larger is left alone.

    Notes
    -----
    For speed, not for size: V^2 (dim + heads) numbers are stored. With one head the output projection goes into the
    rows, with several it stays behind the sum.

    References
    ----------
    "PairConnect: A Compute-Efficient MLP Alternative to Attention", arXiv 2106.08235, 2021.

    Examples
    --------
    >>> import torch
    >>> embedding, attention = torch.nn.Embedding(30, 16), torch.nn.MultiheadAttention(16, 4).eval()
    >>> pairs = AttentionToPairs().compress(attention, embedding)
    >>> ids = torch.tensor([[3, 1, 4, 1, 5]])
    >>> torch.allclose(pairs(ids), TokenAttention(embedding, attention)(ids), atol=1e-5)
    True
    """

    budget_bytes: int = 2**30

    stage: ClassVar[str] = "lowrank"
    action: ClassVar[str] = "pairs"
    targets: ClassVar[tuple[type[nn.Module], ...]] = (TokenAttention,)

    def __post_init__(self) -> None:
        check_int("budget_bytes", self.budget_bytes, low=1)

    def compress(
        self,
        attention: nn.MultiheadAttention,
        embedding: nn.Embedding,
        rel_bias: Tensor | None = None,
        *,
        norm: nn.LayerNorm | None = None,
        positions: Any = None,
        causal: bool = True,
        window: int | None = None,
    ) -> PairConnect:
        """Return the layer of pairs that computes ``attention`` over embedded tokens.

        Parameters
        ----------
        attention : nn.MultiheadAttention
        embedding : nn.Embedding
            What feeds it.
        rel_bias : Tensor, shape (num_heads, D), optional
            Summand of the scores at distance min(t - j, D - 1); (num_heads, 2 D - 1) without causality.
        norm : nn.LayerNorm, optional
            Between embedding and attention.
        positions : optional
            Absolute positions, which are refused: a term would depend on t and j, not on the pair and its distance.
        causal : bool, default=True
        window : int, optional
            Tokens that a token looks at, where the attention has such a limit.

        Returns
        -------
        layer : PairConnect
            Equal to the attention at tokens that count, in its dtype; zero at padding.
        """
        if positions is not None or not isinstance(embedding, nn.Embedding):
            what = type(embedding if positions is None else positions).__name__
            raise QuernelError(
                "embedding must be an nn.Embedding of the ids alone: absolute positions make the attention a function "
                f"of t and j, which no table of id pairs holds; got {what}. "
                "Use rel_bias= (a function of the distance), or keep the attention"
            )
        check_type("attention", attention, nn.MultiheadAttention)
        check_layers(embedding, attention, rel_bias, causal)
        needed = table_bytes(attention, embedding)
        if needed > self.budget_bytes:
            raise QuernelError(self._too_large(embedding, attention, needed))
        return _convert(attention, embedding, norm, rel_bias, causal, window)

    def decide(self, name: str, module: nn.Module, stats: Any) -> LayerPlan:
        """Take a layer whose table fits."""
        layer = cast(TokenAttention, module)
        needed = table_bytes(layer.attention, layer.embedding)
        details = {"pairs": layer.embedding.num_embeddings**2, "table bytes": needed}
        if needed > self.budget_bytes:
            return LayerPlan(name, "skip", self._too_large(layer.embedding, layer.attention, needed), details)
        return LayerPlan(name, self.action, details=details)

    def convert(self, module: nn.Module, stats: Any, layer: LayerPlan) -> nn.Module:
        """Return the layer of pairs."""
        held = cast(TokenAttention, module)
        return _convert(held.attention, held.embedding, held.norm, held.rel_bias, held.causal, None).train(
            held.training
        )

    def _too_large(self, embedding: nn.Embedding, attention: nn.MultiheadAttention, needed: int) -> str:
        return (
            f"a vocabulary of {embedding.num_embeddings} makes {embedding.num_embeddings**2} pairs of "
            f"{attention.embed_dim} numbers and {attention.num_heads} scores, {needed} bytes, more than "
            f"budget_bytes={self.budget_bytes}"
        )


def table_bytes(attention: nn.MultiheadAttention, embedding: nn.Embedding) -> int:
    """Return the bytes of rows and scores of all pairs."""
    numbers = attention.embed_dim + attention.num_heads
    return embedding.num_embeddings**2 * numbers * embedding.weight.element_size()


@torch.no_grad()
def _convert(
    attention: nn.MultiheadAttention,
    embedding: nn.Embedding,
    norm: nn.LayerNorm | None,
    rel_bias: Tensor | None,
    causal: bool,
    window: int | None,
) -> PairConnect:
    dim, heads, vocab, dtype = (
        attention.embed_dim,
        attention.num_heads,
        embedding.num_embeddings,
        embedding.weight.dtype,
    )
    x = embedding.weight if norm is None else norm(embedding.weight)
    x = x.double()
    weights = attention.in_proj_weight.double().chunk(3)
    biases = [0, 0, 0] if attention.in_proj_bias is None else list(attention.in_proj_bias.double().chunk(3))
    q, k, v = (x @ weight.T + bias for weight, bias in zip(weights, biases, strict=True))  # (V, dim)
    q, k = (part.unflatten(1, (heads, attention.head_dim)) for part in (q, k))
    scores = torch.einsum("uhd,vhd->uvh", q, k) / attention.head_dim**0.5
    out = attention.out_proj
    if heads == 1:  # the output projection goes through the one sum, whose shares add up to 1
        v = v @ out.weight.double().T + (0 if out.bias is None else out.bias.double())
    place: dict[str, Any] = {"device": x.device, "dtype": dtype}
    table = PairTable(vocab**2, dim, direct=True, vocab=vocab, std=0.0, budget_bytes=2**62, **place)
    options: dict[str, Any] = {"n_heads": heads, "normalise": "softmax"}
    if rel_bias is not None:
        options |= {"relative": "bias", "rel_buckets": distances_of(rel_bias, causal)}
    layer = PairConnect(table, window, causal=causal, **options)
    table.weight.view(vocab, vocab, dim).copy_(v)  # the same row for every u
    layer.scores.copy_(scores.flatten(0, 1))
    if rel_bias is not None:
        layer.bias.copy_(rel_bias)
    if heads > 1:
        # Without drawing initial values, which would move the global generator.
        layer.out_proj = nn.utils.skip_init(nn.Linear, dim, dim, **place)
        layer.out_proj.weight.copy_(out.weight)
        layer.out_proj.bias.copy_(torch.zeros_like(layer.out_proj.bias) if out.bias is None else out.bias)
    return layer
