"""What surrounds a mixer refuses by name: blocks, adapters of layouts, configs, and modules put in place of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn import (
    ChannelsFirst,
    EncoderMixer,
    MetaBlock,
    SoftmaxAttention,
    make_mixer,
    replace_module,
    replace_modules,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: MetaBlock(m, drop_path=1.5), r"^drop_path must be a finite number in \[0.0, 1.0\)"),
        (lambda m: MetaBlock(m)(torch.ones(2, 3, 8, dtype=torch.int64)), "^x must hold real floating-point"),
        (lambda m: MetaBlock(m)(draw(2, 3, 7)), r"^x must have shape \(B, \*S, 8\)"),
        (lambda m: MetaBlock(m).step(draw(2, 8), None), "^state must come from init_state"),
        (lambda m: MetaBlock(m).step(draw(2, 1, 8), (0,)), r"^x must have shape \(B, C\)"),
        (lambda m: MetaBlock(m).init_state(2), "has a recurrent form only with causal=True"),
        (lambda m: ChannelsFirst(m)(draw(2, 7, 4, 5)), r"^x must have shape \(B, 8, \*S\), .* \(2, 7, 4, 5\)$"),
        (lambda m: ChannelsFirst(m)(draw(2, 4, 5, 8)), "channels first, .* Use the mixer itself"),
        (lambda m: ChannelsFirst(m)(draw(2, 8)), r"^x must have shape \(B, 8, \*S\)"),
        (lambda m: ChannelsFirst(m)([1.0]), "^x must be Tensor"),
        (lambda m: SoftmaxAttention.from_config({"dim": 16}), "it lacks num_heads, causal, qkv_bias, replaced$"),
        (lambda m: SoftmaxAttention.from_config(m.config() | {"gate": 1}), "SoftmaxAttention has no 'gate'$"),
        (lambda m: SoftmaxAttention.from_config([8]), "^config must be dict"),
        (lambda m: MetaBlock.from_config({"style": "lsnet"}), "^config .* it lacks mixer, mlp_ratio"),
        (lambda m: ChannelsFirst.from_config({}), "^config .* it lacks mixer$"),
        (lambda m: EncoderMixer.from_config({"mixer": {}, "x": 1}), "^config .* EncoderMixer has no 'x'$"),
        (
            lambda m: make_mixer("LongConvBlock", 8, l_max=4, depth=1),
            "no option 'depth'; it takes l_max, norm='layer', ",
        ),
        (
            lambda m: replace_modules(nn.Sequential(nn.ReLU()), nn.ReLU, lambda old: None),
            "^factory must return a module for '0'; got NoneType",
        ),
        (lambda m: replace_module(nn.Sequential(nn.ReLU()), "0", None), "^new must be Module; got NoneType"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(SoftmaxAttention(8, 2))


def test_a_factory_makes_one_module_for_each_place() -> None:
    net, shared = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), nn.Linear(2, 2)
    with pytest.raises(QuernelError, match=r"the same for '0' and '1\.0', whose weights would be tied"):
        replace_modules(net, nn.ReLU, lambda old: shared)
    assert isinstance(net[0], nn.ReLU)  # as it was
    for name in ("0", "1.0"):
        replace_module(net, name, shared)
    assert net[0] is net[1][0] is shared
