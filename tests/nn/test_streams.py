"""Streams: blocks and mixers token by token and in pieces, past the length of kernels, and what takes no state."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn import (
    H3Conv,
    LongConv,
    MetaBlock,
    NeighborhoodAttention1d,
    NormAwareLinearAttention,
    SGConv,
    SoftmaxAttention,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
RECURRENT: list[tuple[Any, dict[str, Any]]] = [
    (SoftmaxAttention, {"num_heads": 2, "causal": True}),
    (NormAwareLinearAttention, {"num_heads": 2, "causal": True}),
    (NeighborhoodAttention1d, {"num_heads": 2, "kernel_size": 3, "is_causal": True}),
    (LongConv, {"l_max": 9}),
    (SGConv, {"l_max": 9}),
    (H3Conv, {"l_max": 9}),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streamed(block: Any, x: Tensor, **options: Any) -> Tensor:
    state, steps = block.init_state(len(x), **options), []
    for token in x.unbind(1):
        y, state = block.step(token, state)
        steps.append(y)
    return torch.stack(steps, 1)


@pytest.mark.parametrize("style", ["metaformer", "metanext", "lsnet"])
@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=lambda value: getattr(value, "__name__", ""))
def test_blocks_go_on_token_by_token_and_in_pieces(style: Any, kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block, x = MetaBlock(kind(8, **options), style, ls_init=0.5), draw(2, 9, 8)
    block(x)  # batch statistics that are not 0 and 1
    block.eval()
    with torch.no_grad():
        wanted = block(x)
        torch.testing.assert_close(streamed(block, x), wanted, **CLOSE)
        first, state = block(x[:, :4], state=block.init_state(2))
        second, _ = block(x[:, 4:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), wanted, **CLOSE)


def test_blocks_hand_options_of_a_state_to_the_mixer() -> None:
    block, x = MetaBlock(LongConv(8, 9)).eval(), draw(2, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(streamed(block, x, online=True), block(x), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"style": "metanext"}, "batch norm then looks at all tokens"), ({"drop_path": 0.1}, "drop_path takes no state")],
)
def test_what_mixes_tokens_in_training_takes_no_state(options: dict[str, Any], message: str) -> None:
    block = MetaBlock(SoftmaxAttention(8, 2, causal=True), **options)
    state = block.eval().init_state(2)
    assert block.step(draw(2, 8), state)[0].shape == (2, 8)
    block.train()
    for call in (lambda: block.init_state(2), lambda: block.step(draw(2, 8), state)):
        with pytest.raises(QuernelError, match=message):
            call()


def test_a_block_in_training_goes_on_where_nothing_else_mixes_tokens() -> None:
    block, x = MetaBlock(SoftmaxAttention(8, 2, causal=True)).train(), draw(2, 5, 8)
    torch.testing.assert_close(streamed(block, x), block(x), **CLOSE)


@pytest.mark.parametrize("make", [lambda: LongConv(4, 6), lambda: SGConv(4, 6, kernel_dim=6), lambda: H3Conv(4, 6)])
def test_a_stream_may_be_longer_than_the_kernels(make: Any) -> None:
    torch.manual_seed(0)
    mixer, x = make().eval(), draw(2, 15, 4)
    # Convolutions one after another reach farther together.
    back = 11 if isinstance(mixer, H3Conv) else 6
    with torch.no_grad():
        wanted, other, near = streamed(mixer, x)[:, -1], x.clone(), x.clone()
        other[:, : 15 - back] = 1e3
        near[:, 15 - back] = 1e3
        torch.testing.assert_close(streamed(mixer, other)[:, -1], wanted, **CLOSE)
        assert not torch.allclose(streamed(mixer, near)[:, -1], wanted, **CLOSE)
        with pytest.raises(QuernelError, match="at most 6 tokens") if mixer.max_len else nullcontext():
            mixer(x[:, : 7 if mixer.max_len else 6])
