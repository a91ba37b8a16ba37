"""``EncoderMixer``: every form of padding reaches the mixer as its mask, and what no mixer can do is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn import EncoderMixer, InceptionDWConv2d, SoftmaxAttention

KEPT = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])


def padding(dtype: torch.dtype) -> Tensor:
    """Return ``KEPT`` as a mask of pairs, (2, 1, 9, 9)."""
    seen = KEPT[:, None, None, :].expand(-1, 1, 9, -1)
    return (
        seen if dtype is torch.bool else torch.zeros(2, 1, 9, 9, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_every_form_of_padding_is_the_mask_of_the_mixer(dtype: torch.dtype) -> None:
    mixer, x = SoftmaxAttention(8, 2), torch.randn(2, 9, 8)
    layer, mask = EncoderMixer(mixer), KEPT
    wanted = mixer(x, mask=mask)
    for given in (padding(dtype), padding(dtype)[:, :, :1], KEPT.long()):
        y, weights = layer(hidden_states=x, attention_mask=given, past_key_values=None)
        assert weights is None
        torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(layer(x)[0], mixer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x, torch.ones(1, 1, 4, 4).tril().bool()), "the same for every query"),
        (lambda m, x: m(x, torch.ones(4, 4, 4)), r"attention_mask must have shape \(B, T\) or \(B, 1, T, T\)"),
        (lambda m, x: m(x, [1, 1]), "attention_mask"),
        (lambda m, x: m(x, past_key_values=()), "past_key_values cannot be given"),
        (lambda m, x: m(x, encoder_hidden_states=x), "encoder_hidden_states cannot be given"),
        (lambda m, x: EncoderMixer(InceptionDWConv2d(8)), "mixer must take sequences"),
        (lambda m, x: EncoderMixer(nn.Linear(8, 8)), "mixer"),
    ],
)
def test_what_no_mixer_can_do_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(EncoderMixer(SoftmaxAttention(8, 2)), torch.randn(1, 4, 8))


def test_it_compiles_to_one_graph_and_fuses_its_mixer() -> None:
    layer, x = EncoderMixer(SoftmaxAttention(8, 2)), torch.randn(2, 9, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, padding(torch.bool))[0], layer(x, padding(torch.bool))[0])
    torch.compiler.reset()
    assert layer.fuse().mixer is layer.mixer.fuse()
