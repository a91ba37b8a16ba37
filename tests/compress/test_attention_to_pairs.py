"""AttentionToPairs: exact at real positions, also after saving; refusals that say why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel._load import save_model
from quernel.compress import AttentionToPairs, compress
from quernel.nn import PairConnect, TokenAttention

# The promise: float64, whatever the heads and distances.
EXACT = {"rtol": 0.0, "atol": 1e-10}
VOCAB, DIM, T = 40, 16, 15


def layers(heads: int = 4, vocab: int = VOCAB, **options: Any) -> tuple[nn.MultiheadAttention, nn.Embedding]:
    attention = nn.MultiheadAttention(DIM, heads, batch_first=True, **options).double()
    with torch.no_grad():  # torch starts with biases of zero
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return attention.eval(), nn.Embedding(vocab, DIM).double()


def inputs(vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(0, vocab, (4, T)), torch.ones(4, T, dtype=torch.bool)
    mask[1, 9:], mask[2, :4] = False, False
    return ids, mask


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@torch.no_grad()
def test_equal_to_attention(heads: int, causal: bool, biased: bool, normed: bool, tmp_path: Any) -> None:
    attention, embedding = layers(heads)
    norm = nn.LayerNorm(DIM).double() if normed else None
    bias = torch.randn(heads, 6 if causal else 11).double() if biased else None
    layer = AttentionToPairs().compress(attention, embedding, bias, norm=norm, causal=causal)
    ids, mask = inputs()
    wanted = TokenAttention(embedding, attention, norm, bias, causal=causal)(ids, mask)
    torch.testing.assert_close(layer(ids, mask), wanted, **EXACT)
    folder = save_model(nn.Sequential(layer), tmp_path)
    loaded = quernel.load(folder, model=lambda: nn.Sequential(nn.Identity()))[0]
    torch.testing.assert_close(loaded(ids, mask)[mask], wanted[mask], **EXACT)


@torch.no_grad()
def test_the_largest_promised_vocabulary_and_alibi() -> None:
    attention, embedding = layers(vocab=200)
    slopes = 2.0 ** -torch.arange(1.0, 5.0, dtype=torch.float64)
    alibi = -slopes[:, None] * torch.arange(T, dtype=torch.float64)
    layer = AttentionToPairs().compress(attention, embedding, alibi)
    ids, mask = inputs(200)
    wanted = TokenAttention(embedding, attention, rel_bias=alibi)(ids, mask)
    torch.testing.assert_close(layer(ids, mask), wanted, **EXACT)
    y, _ = layer.step(layer.start(4), ids[:, 0])
    torch.testing.assert_close(y, layer(ids)[:, 0], **EXACT)


@pytest.mark.parametrize("options", [{"bias": False}, {}])
@torch.no_grad()
def test_attention_of_a_window(options: dict[str, Any]) -> None:
    attention, embedding = nn.MultiheadAttention(DIM, 2, **options).double().eval(), nn.Embedding(VOCAB, DIM).double()
    layer = AttentionToPairs().compress(attention, embedding, window=3)
    ids, _ = inputs()
    # Distances from 3 on are as good as hidden by a bias.
    bias = torch.tensor([[0.0, 0.0, 0.0, -1e9]] * 2).double()
    torch.testing.assert_close(layer(ids), TokenAttention(embedding, attention, rel_bias=bias)(ids), **EXACT)


@torch.no_grad()
def test_in_a_model() -> None:
    attention, embedding = layers(2)
    model = nn.Sequential(TokenAttention(embedding, attention), nn.Linear(DIM, 3).double()).eval()
    ids, _ = inputs()
    result = compress(model, AttentionToPairs(), data=[ids])
    assert isinstance(result.model[0], PairConnect)
    torch.testing.assert_close(result.model(ids), model(ids), **EXACT)
    assert result.report.layers[0].details == {"pairs": VOCAB**2, "table bytes": VOCAB**2 * (DIM + 2) * 8}
    small = compress(model, AttentionToPairs(budget_bytes=1000), data=[ids])
    assert isinstance(small.model[0], TokenAttention)
    assert "230400 bytes, more than budget_bytes=1000" in small.report.layers[0].reason


def test_refusals_say_why() -> None:
    attention, embedding = layers()
    method = AttentionToPairs()
    with pytest.raises(
        QuernelError, match=r"absolute positions make the attention a function of t and j.*got Embedding"
    ):
        method.compress(attention, embedding, positions=nn.Embedding(64, DIM))
    with pytest.raises(QuernelError, match=r"absolute positions.*got Sequential"):
        method.compress(attention, nn.Sequential(embedding))  # type: ignore[arg-type]
    with pytest.raises(
        QuernelError, match=r"vocabulary of 40 makes 1600 pairs of 16 numbers and 4 scores, 256000 bytes"
    ):
        AttentionToPairs(budget_bytes=255_999).compress(attention, embedding)
    with pytest.raises(QuernelError, match="attention must be MultiheadAttention"):
        method.compress(nn.Linear(2, 2), embedding)  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="rel_bias must have shape"):
        method.compress(attention, embedding, torch.zeros(3, 4))
    with pytest.raises(QuernelError, match="budget_bytes must be"):
        AttentionToPairs(budget_bytes=0)
