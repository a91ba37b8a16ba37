"""MetaNeXt: published sizes and names, block formula, fusion, timm's numbers, other mixers, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quernel.models
from quernel._errors import QuernelError
from quernel.models import MetaNeXt
from quernel.nn import ChannelsFirst, InceptionDWConv2d, LSConv

# float32 sums of some hundred terms, through some layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SIZES = {"atto": (4.157, 0.51), "tiny": (28.056, 4.2), "small": (49.374, 8.4), "base": (86.672, 14.9)}


def stirred(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give statistics, gains and gamma values that show: their initial ones hide errors."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if name.endswith(("running_mean", "gamma")):
                t.copy_(torch.randn(t.shape, generator=draw))
            elif name.endswith("running_var") or (name.endswith("weight") and t.ndim == 1):  # of norms alone
                t.copy_(0.5 + torch.rand(t.shape, generator=draw))
            elif name.endswith("bias"):
                t.copy_(0.1 * torch.randn(t.shape, generator=draw))
    return net.eval()


def small(**options: Any) -> MetaNeXt:
    torch.manual_seed(0)
    return MetaNeXt((1, 2), (16, 24), num_classes=5, **options)


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(name: str) -> None:
    parameters, operations = SIZES[name]
    with torch.device("meta"):
        net = getattr(quernel.models, f"inceptionnext_{name}")().eval()
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, abs=0.01)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(operations, rel=0.02)


def test_published_names() -> None:
    names = set(small().state_dict())
    block = "stages.1.blocks.1."
    parts = ["dwconv_hw", "dwconv_w", "dwconv_h"]
    wanted = {f"{block}token_mixer.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    wanted |= {f"{block}{part}" for part in ("norm.running_var", "mlp.fc1.weight", "mlp.fc2.bias", "gamma")}
    wanted |= {f"stem.{part}" for part in ("0.weight", "0.bias", "1.running_mean")}
    wanted |= {f"stages.1.downsample.{part}" for part in ("0.running_mean", "1.weight")}
    wanted |= {f"head.{part}.{kind}" for part in ("fc1", "norm", "fc2") for kind in ("weight", "bias")}
    assert wanted <= names and not any(name.startswith("stages.0.downsample") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["atto", "tiny"])
def test_timm_computes_the_same_from_the_same_weights(name: str) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # timm needs a torchvision that fits this torch
        pytest.skip(f"timm cannot be imported: {error}")
    theirs = stirred(timm.create_model(f"inception_next_{name}"))
    ours = getattr(quernel.models, f"inceptionnext_{name}")().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
    from timm.models.inception_next import InceptionDWConv2d as Theirs

    mixer, other = InceptionDWConv2d(40, 3, 9, 0.25), Theirs(40, 3, 9, branch_ratio=0.25)
    mixer.load_state_dict(other.state_dict())
    x = torch.randn(2, 40, 7, 13)
    torch.testing.assert_close(mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), other(x), **CLOSE)


def test_a_block_is_its_formula() -> None:
    block = stirred(small()).stages[1].blocks[0]
    x = torch.randn(2, 24, 6, 5)
    mixed = block.token_mixer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    norm = nn.functional.batch_norm(
        mixed, block.norm.running_mean, block.norm.running_var, block.norm.weight, block.norm.bias, eps=1e-5
    )
    wanted = x + block.gamma[:, None, None] * block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(norm)))
    torch.testing.assert_close(block(x), wanted, **CLOSE)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_fusion_changes_nothing_but_the_norms(stride: int) -> None:
    net = stirred(small(stem_stride=stride, ls_init=1.0))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    fused, x = net.fuse(), torch.randn(2, 3, 32, 40)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not any("gamma" in name for name in fused.state_dict())
    wanted = net(x).detach()
    assert float((fused(x).detach() - wanted).norm() / wanted.norm()) < 1e-4
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    torch.testing.assert_close(fused.fuse()(x), fused(x))


def test_fused_models_come_back_from_their_config() -> None:
    fused = stirred(small()).fuse()
    twin = MetaNeXt.from_config(fused.config()).eval()
    twin.load_state_dict(fused.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(twin(x), fused(x))
    with pytest.raises(QuernelError, match="mixers must be one a block, 3"):
        MetaNeXt.from_config(fused.config() | {"mixers": []})


def test_mixers_behind_an_adapter_are_fused_too() -> None:
    net = stirred(small(mixers=lambda dim: ChannelsFirst(LSConv(dim))))
    fused, x = net.fuse(), torch.randn(1, 3, 32, 32)
    assert all(m.fused for m in fused.modules() if isinstance(m, LSConv))
    torch.testing.assert_close(fused(x), net(x), **CLOSE)
    twin = MetaNeXt.from_config(fused.config()).eval()
    twin.load_state_dict(fused.state_dict())
    assert torch.equal(twin(x), fused(x))


def test_training_mode_cannot_be_fused() -> None:
    with pytest.raises(QuernelError, match="eval"):
        small().train().fuse()


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_memory_formats_give_the_same(size: tuple[int, int]) -> None:
    net = stirred(small())
    x = torch.randn(2, 3, *size)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, net.to(memory_format=torch.contiguous_format)(x), **CLOSE)


def test_other_mixers_one_a_stage() -> None:
    def depthwise(dim: int) -> nn.Module:
        return nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    net = stirred(small(mixers=[depthwise, "InceptionDWConv2d"]))
    kinds = [type(block.token_mixer) for stage in net.stages for block in stage.blocks]
    assert kinds == [nn.Conv2d, InceptionDWConv2d, InceptionDWConv2d]
    twin = MetaNeXt.from_config(net.config()).eval()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(twin(x), net(x))
    torch.testing.assert_close(net.fuse()(x), net(x), **CLOSE)


def test_it_trains_and_drops_paths_linearly() -> None:
    net = small(drop_path=0.3, ls_init=0.1).train()
    assert [round(block.drop_path.p, 3) for stage in net.stages for block in stage.blocks] == [0.0, 0.15, 0.3]
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MetaNeXt((1, 1), (16,)), "must have one value a stage"),
        (lambda: MetaNeXt((1,), (16,), mixers=["inception"] * 2), "must have one value a stage"),
        (lambda: MetaNeXt((1, 1, 1, 1, 1), (16,) * 5), "must have one value a stage"),
        (lambda: MetaNeXt((0,), (16,)), "depths"),
        (lambda: MetaNeXt((1,), (16,), stem_stride=3), "stem_stride must be one of 4, 2 and 1"),
        (lambda: MetaNeXt((1,), (16,), mixers="nothing"), "name must be one of"),
        (lambda: MetaNeXt((1,), (16,), drop_path=1.0), "drop_path"),
        (lambda: MetaNeXt((1,), (16,), ls_init=float("nan")), "ls_init"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
