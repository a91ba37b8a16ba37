"""``BinaryMultiheadAttention``: the call of torch's layer, its orders of axes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.nn import BinaryLinearAttention, BinaryMultiheadAttention


def _pair(batch_first: bool) -> tuple[BinaryMultiheadAttention, BinaryLinearAttention]:
    attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
    ours = BinaryMultiheadAttention.from_attention(attention, tau="row").eval()
    return ours, BinaryLinearAttention.from_attention(attention, tau="row").eval()


@pytest.mark.parametrize("batch_first", [True, False])
def test_axes_are_those_of_the_replaced_layer(batch_first: bool) -> None:
    ours, mixer = _pair(batch_first)
    x = torch.randn(3, 5, 16)
    y, weights = ours(x, x, x, need_weights=False)
    assert weights is None
    assert torch.equal(y, mixer(x) if batch_first else mixer(x.transpose(0, 1)).transpose(0, 1))
    single = x[0]
    assert torch.equal(ours(single, single, single)[0], mixer(single[None])[0])
    assert BinaryMultiheadAttention.from_config(ours.config()).batch_first is batch_first


def test_padding_mask_marks_what_does_not_count() -> None:
    ours, mixer = _pair(True)
    x = torch.randn(1, 6, 16)
    y, _ = ours(x, x, x, key_padding_mask=torch.arange(6)[None] >= 4)
    torch.testing.assert_close(y[:, :4], mixer(x[:, :4]))


def test_it_works_inside_a_block_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    layer.self_attn = BinaryMultiheadAttention.from_attention(layer.self_attn)  # type: ignore[assignment]
    assert layer.train()(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_what_linear_attention_cannot_do_is_refused() -> None:
    ours, _ = _pair(True)
    x = torch.randn(1, 6, 16)
    with pytest.raises(QuernelError, match="must be one tensor"):
        ours(x, x.clone(), x)
    with pytest.raises(QuernelError, match="attn_mask must be None"):
        ours(x, x, x, attn_mask=torch.zeros(6, 6))
    with pytest.raises(QuernelError, match="is_causal False"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(QuernelError, match="key_padding_mask must be boolean"):
        ours(x, x, x, key_padding_mask=torch.zeros(1, 6))
