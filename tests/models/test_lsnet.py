"""LSNet: published sizes and names, blocks by their formulas, reparameterisation, grids of attention, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quernel.models
from quernel._errors import QuernelError
from quernel.models import LSNet, reparameterize
from quernel.models.lsnet import GridAttention
from quernel.nn import InceptionDWConv2d, LSConv

# float32 sums of some hundred terms, through some layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES = {"t": (11.41, 0.316), "s": (16.15, 0.538), "b": (23.3, 1.245)}


def stirred(net: nn.Module) -> nn.Module:
    """Give norms and biases values that show: the initial ones of the last norms are zero and hide errors."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
        if isinstance(module, GridAttention):
            nn.init.normal_(module.attention_biases)
    return net.eval()


def small(**options: Any) -> LSNet:
    return LSNet(32, (8, 8, 16, 24), (1, 2, 2, 2), (1, 1, 1, 3), **{"num_classes": 5, "stem_stride": 2, **options})


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(name: str) -> None:
    parameters, operations = SIZES[name]
    with torch.device("meta"):
        net = getattr(quernel.models, f"lsnet_{name}")().eval()
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, rel=0.005)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(operations, rel=0.01)


def test_published_names() -> None:
    names = {name: tuple(t.shape) for name, t in small(distillation=True).state_dict().items()}
    wanted = {
        "patch_embed.0.c.weight": (2, 3, 3, 3),
        "patch_embed.4.bn.running_var": (8,),
        "blocks1.0.mixer.conv.c.weight": (8, 1, 3, 3),
        "blocks1.0.mixer.conv1.bn.weight": (8,),
        "blocks1.0.se.conv_reduce.bias": (8,),
        "blocks1.0.se.conv_expand.weight": (8, 8, 1, 1),
        "blocks1.0.ffn.m.pw1.c.weight": (16, 8, 1, 1),
        "blocks1.0.ffn.m.pw2.bn.bias": (8,),
        "blocks2.0.c.weight": (8, 1, 3, 3),
        "blocks2.1.c.weight": (8, 8, 1, 1),
        "blocks2.3.mixer.lkp.cv4.weight": (9, 4, 1, 1),
        "blocks2.3.mixer.bn.running_mean": (8,),
        "blocks4.3.mixer.m.qkv.c.weight": (120, 24, 1, 1),
        "blocks4.3.mixer.m.dw.c.weight": (48, 1, 3, 3),
        "blocks4.3.mixer.m.proj.1.bn.weight": (24,),
        "blocks4.3.mixer.m.attention_biases": (3, 4),
        "blocks4.3.mixer.m.attention_bias_idxs": (4, 4),
        "head.bn.running_mean": (24,),
        "head.l.weight": (5, 24),
        "head_dist.l.bias": (5,),
    }
    assert wanted.items() <= names.items()


def test_variants_alternate_their_mixers() -> None:
    with torch.device("meta"):
        net = quernel.models.lsnet_t()
    kinds = [[type(b.mixer).__name__ for b in stage if hasattr(b, "mixer")] for stage in net._stages()]
    assert kinds == [[], ["RepDepthwise", "LSConv"], ["RepDepthwise", "LSConv"] * 4, ["RepDepthwise", "Residual"] * 5]
    assert net.blocks4[3].mixer.m.side == 4 and tuple(net.blocks4[3].mixer.m.attention_biases.shape) == (4, 16)
    assert net.blocks4[2].se.conv_reduce.out_channels == 96


@pytest.mark.parametrize("distillation", [False, True])
def test_reparameterisation_changes_nothing_but_the_norms(distillation: bool) -> None:
    net, x = stirred(small(distillation=distillation)), torch.randn(2, 3, 32, 32)
    folded = reparameterize(net)
    left = [name for name, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert left == ["blocks2.3.mixer.bn", "blocks3.3.mixer.bn"]  # of the two LSConv
    assert isinstance(folded.blocks1[0].mixer, nn.Conv2d) and isinstance(folded.head, nn.Linear)
    torch.testing.assert_close(folded(x), net(x), **CLOSE)
    twin = LSNet.from_config(folded.config()).eval()
    twin.load_state_dict(folded.state_dict())
    assert torch.equal(twin(x), folded(x)) and torch.equal(folded.reparameterize()(x), folded(x))
    with pytest.raises(QuernelError, match="eval"):
        net.train().reparameterize()


def test_blocks_are_their_formulas() -> None:
    net = stirred(small())
    x = torch.randn(2, 8, 6, 5)
    block = net.blocks1[0]
    mixed = block.mixer.conv(x) + block.mixer.conv1(x) + x
    se = block.se
    scale = torch.sigmoid(se.conv_expand(se.conv_reduce(mixed.mean((2, 3), keepdim=True)).relu()))
    mixed = mixed * scale
    torch.testing.assert_close(block(x), mixed + block.ffn.m.pw2(block.ffn.m.pw1(mixed).relu()), **CLOSE)
    block = net.blocks2[3]
    mixed = block.mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), mixed + block.ffn.m.pw2(block.ffn.m.pw1(mixed).relu()), **CLOSE)


def test_attention_is_its_formula() -> None:
    attention = stirred(GridAttention(24, 3, 3))
    x = torch.randn(2, 24, 3, 3)
    qkv = attention.qkv(x)
    q, k, v = attention.dw(qkv[:, :48]), qkv[:, 48:96], qkv[:, 96:]
    y = torch.zeros(2, 24, 3, 3)
    places = [(i, j) for i in range(3) for j in range(3)]
    for b in range(2):
        for h in range(3):
            for i, j in places:
                logits = torch.stack([
                    q[b, 16 * h : 16 * h + 16, i, j] @ k[b, 16 * h : 16 * h + 16, r, c] / 4
                    + attention.attention_biases[h, abs(i - r) * 3 + abs(j - c)]
                    for r, c in places
                ])  # fmt: skip
                weights = logits.softmax(0)
                y[b, 8 * h : 8 * h + 8, i, j] = sum(
                    p * v[b, 8 * h : 8 * h + 8, r, c] for p, (r, c) in zip(weights, places, strict=True)
                )
    torch.testing.assert_close(attention(x), attention.proj[1](y.relu()), **CLOSE)


def test_batch_independence_and_memory_formats() -> None:
    net, x = stirred(small()), torch.randn(3, 3, 32, 32)
    wanted = net(x)
    torch.testing.assert_close(net(x[1:2]), wanted[1:2], **CLOSE)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, wanted, rtol=1e-3, atol=1e-3)


def test_other_sizes_and_strides() -> None:
    for size, stride in ((40, 8), (33, 4), (24, 1)):
        net = LSNet(size, (8, 8, 8, 16), (1, 2, 1, 2), (1, 1, 1, 1), num_classes=2, stem_stride=stride).eval()
        assert net(torch.randn(1, 3, size, size)).shape == (1, 2)
    with pytest.raises(QuernelError, match="img_size"):
        net(torch.randn(1, 3, 48, 48))
    three = LSNet(16, (8, 8, 16), (2, 2, 2), (1, 1, 1), num_classes=2, stem_stride=2, in_channels=1).eval()
    assert three(torch.randn(1, 1, 28, 20)).shape == (1, 2)  # without attention any size will do


def test_another_mixer_in_the_place_of_lsconv() -> None:
    net = stirred(small(mixer=lambda dim: InceptionDWConv2d(dim, 3, 5)))
    assert [type(stage[3].mixer) for stage in net._stages()[1:3]] == [InceptionDWConv2d] * 2
    x = torch.randn(1, 3, 32, 32)
    twin = LSNet.from_config(net.config()).eval()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))
    torch.testing.assert_close(net.reparameterize()(x), net(x), **CLOSE)
    assert not any(isinstance(m, LSConv) for m in net.modules())


def test_it_trains_and_distillation_gives_two_heads() -> None:
    net = small(distillation=True).train()
    first, second = net(torch.randn(4, 3, 32, 32))
    (first.square().sum() + second.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    x = torch.randn(2, 3, 32, 32)
    net = stirred(net)
    pooled = net.forward_features(x).mean((2, 3))
    torch.testing.assert_close(net(x), (net.head(pooled) + net.head_dist(pooled)) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LSNet(32, (8, 8), (1,), (1, 1)), "one value for each of 1 to 4 stages"),
        (lambda: LSNet(32, (8,) * 5, (1,) * 5, (1,) * 5), "one value for each of 1 to 4 stages"),
        (lambda: LSNet(32, (8,), (1,), (1,), stem_stride=3), "stem_stride must be one of 8, 4, 2 and 1"),
        (lambda: LSNet(32, (8,), (1,), (1,), mixer="soft-attention"), "mixer must be a callable dim -> module"),
        (lambda: LSNet(32, (12,), (2,), (1,)), "group_size must divide dim=12"),
        (lambda: LSNet(32, (8, 8, 8, 8), (1,) * 4, (1, 1, 1, 3)), "heads must divide the channels of the fourth stage"),
        (lambda: LSNet.from_config(small().config() | {"mixers": []}), "mixers must be one for every second block, 2"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
