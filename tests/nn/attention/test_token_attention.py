"""TokenAttention: torch's attention over an embedding, with a bias of distances, causality and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn import TokenAttention

VOCAB, DIM, HEADS, T = 12, 8, 2, 7
SAME = {"rtol": 1e-10, "atol": 1e-10}


def made(**options: object) -> TokenAttention:
    embedding = nn.Embedding(VOCAB, DIM)
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=bool(options.pop("batch_first", True)))
    return TokenAttention(embedding, attention, **options).double()  # type: ignore[arg-type]


def by_hand(layer: TokenAttention, ids: Tensor, t: int, near: list[int], bias: Tensor) -> Tensor:
    """Return the output at t of one sequence from the tokens ``near``; bias: (heads, len(near))."""
    a = layer.attention
    x = layer.embedding(ids) if layer.norm is None else layer.norm(layer.embedding(ids))
    q, k, v = (x @ w.T + b for w, b in zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), strict=True))
    parts = []
    for h in range(HEADS):
        columns = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        scores = k[near, columns] @ q[t, columns] / (DIM / HEADS) ** 0.5 + bias[h]
        parts.append(scores.softmax(0) @ v[near, columns])
    return torch.cat(parts) @ a.out_proj.weight.T + a.out_proj.bias


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_every_token_by_hand(causal: bool, batch_first: bool) -> None:
    rel = torch.randn(HEADS, 3 if causal else 5)
    layer = made(rel_bias=rel, causal=causal, norm=nn.LayerNorm(DIM), batch_first=batch_first)
    ids = torch.randint(0, VOCAB, (1, T))
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, 2] = False
    got = layer(ids, mask)[0]
    for t in range(T):
        near = [j for j in range(T) if mask[0, j] and (j <= t or not causal)]
        places = [min(t - j, 2) if causal else max(-2, min(t - j, 2)) + 2 for j in near]
        wanted = by_hand(layer, ids[0], t, near, rel[:, places].double()) if mask[0, t] else torch.zeros(DIM).double()
        torch.testing.assert_close(got[t], wanted, **SAME)


def test_without_mask_and_bias() -> None:
    layer, ids = made(), torch.randint(0, VOCAB, (3, T))
    torch.testing.assert_close(layer(ids), layer(ids, torch.ones(3, T, dtype=torch.bool)), **SAME)


def test_bad_layers_are_named() -> None:
    embedding, attention = nn.Embedding(VOCAB, DIM), nn.MultiheadAttention(DIM, HEADS)
    for arguments, message in (
        (
            (nn.Embedding(VOCAB, 6), attention),
            "attention must read queries, keys and values of the embedding's width 6",
        ),
        ((embedding, nn.MultiheadAttention(DIM, HEADS, kdim=4)), "it reads 8, 4 and 8"),
        ((embedding, nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True)), "must not add keys of its own"),
        ((nn.Embedding(VOCAB, DIM, max_norm=1.0), attention), "max_norm"),
        ((embedding, attention, None, torch.zeros(3, 4)), r"rel_bias must have shape \(2, D\)"),
    ):
        with pytest.raises(QuernelError, match=message):
            TokenAttention(*arguments)  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match=r"\(2, 2 D - 1\)"):
        TokenAttention(embedding, attention, rel_bias=torch.zeros(2, 4), causal=False)
