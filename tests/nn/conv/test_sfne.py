"""The block of Terminator: gates, scores, the standardisation in groups, the order of the branches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import GIBS, RGU, HyperChannelInteraction, HyperInteraction, SFNEBlock
from quernel.nn.conv.sfne import tiled


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_gate() -> None:
    torch.manual_seed(0)
    gate, x = RGU(4, 5), draw(2, 4, 5, 5)
    gate.map.data.copy_(draw(1, 1, 5, 5, seed=1))
    product = gate.key(x) * gate.query(gate.value(x))
    mean, var = product.mean((2, 3), keepdim=True), product.var((2, 3), unbiased=False, keepdim=True)
    wanted = gate.out(F.gelu((product - mean) / (var + 1e-5).sqrt()) + gate.map)
    torch.testing.assert_close(gate(x), wanted, rtol=1e-4, atol=1e-5)


def test_scores_of_channels_and_places() -> None:
    torch.manual_seed(0)
    channels, both = HyperChannelInteraction(4), HyperInteraction(4, 5)
    x, y = draw(2, 4, 5, 5), draw(2, 4, 5, 5, seed=1)
    w, z = channels.slow()[0, 0], x.mean((2, 3))
    torch.testing.assert_close(channels(x), x * torch.sigmoid(z * w * z)[..., None, None])
    w_s, w_c = both.places()[0, 0], both.channels.slow()[0, 0]
    mean, pooled = y.mean(1, keepdim=True), y.mean((2, 3))
    score = (mean * w_s * mean) * (pooled * w_c * pooled)[..., None, None]
    torch.testing.assert_close(both(y, x), x * score.sigmoid())


def test_groups_are_standardised_in_turn() -> None:
    norm, x = GIBS(24), 3 * draw(8, 24, 4, 4) + 1
    y = norm(x)
    assert y.shape == x.shape
    for channel in range(24):
        ours, theirs = y[:, channel], x[:, channel]
        if channel // 2 % 2 == 0:
            wanted = (theirs - theirs.mean()) / (theirs.var(unbiased=False) + 1e-5).sqrt()
            assert abs(float(ours.mean())) < 1e-5
        else:
            mean, var = theirs.mean((1, 2), keepdim=True), theirs.var((1, 2), unbiased=False, keepdim=True)
            wanted = (theirs - mean) / (var + 1e-5).sqrt()
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    norm.eval()
    torch.testing.assert_close(norm(x[:1]), norm(x)[:1])
    with pytest.raises(QuernelError, match="multiple of 12"):
        GIBS(20)


def test_channels_repeat_in_turn() -> None:
    x = draw(1, 3, 2, 2)
    assert torch.equal(tiled(x, 8)[0, 7], x[0, 1]) and tiled(x, 8).shape == (1, 8, 2, 2)


def test_branches_stand_in_their_order() -> None:
    torch.manual_seed(0)
    block = SFNEBlock(6, 4, 2, earlier=[12, 3], dropout=0.0).eval()
    x, first, second = draw(2, 6, 4, 4), draw(2, 12, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)
    seen: list[Tensor] = []
    block.join.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block(x, [first, second])
    parts = seen[0].split(6, 1)
    assert len(parts) == 12
    weights = x * block.kernel()
    fast = F.instance_norm(block.weights_gate(weights) + block.input_gate(x), eps=1e-5)
    mix, channels = (F.instance_norm(t, eps=1e-5) for t in (block.mix(x), block.channels(x)))
    o = weights @ fast
    local = block.local
    wanted = {
        0: o, 1: local[1].from_source(x, channels), 2: tiled(first, 6), 3: fast, 4: weights @ mix,
        5: local[0].from_source(channels, x), 6: o.sigmoid() * o, 7: local[2].from_source(x, mix),
        8: weights @ channels, 9: local[3].from_source(mix, x), 10: tiled(second, 6), 11: block.interaction(o, x),
    }  # fmt: skip
    for i, part in wanted.items():
        torch.testing.assert_close(parts[i], part)
    assert [net.kernel_size for net in local] == [3, 9, 5, 7]


def test_without_modulation_the_kernel_stands_alone() -> None:
    torch.manual_seed(0)
    block = SFNEBlock(6, 4, 2, modulated=False).eval()
    seen: list[Tensor] = []
    block.weights_gate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block(draw(2, 6, 4, 4))
    torch.testing.assert_close(seen[0], block.kernel().expand(2, -1, -1, -1))
    with pytest.raises(QuernelError, match="at most two"):
        SFNEBlock(6, 4, 2, earlier=[1, 2, 3])
