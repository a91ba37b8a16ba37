"""NaLaFormer: the published sizes, its blocks and stages, images of any size, refusals."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.models import NaLaFormer
from quernel.nn import GatedSoftmaxAttention, NormAwareLinearAttention


def small() -> NaLaFormer:
    torch.manual_seed(0)
    return NaLaFormer((8, 8, 8, 16), (1, 1, 1, 1), (1, 2, 1, 2), num_classes=3).eval()


@pytest.mark.parametrize(("name", "millions"), [("XT", 6.1), ("T", 15.9), ("S", 25.7), ("B", 52.0), ("L", 95.4)])
def test_variants_have_their_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = NaLaFormer.variant(name)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "depths", "scales", "last_drop"),
    [
        ("XT", (2, 2, 2, 2), (1.0, 1.0, 1.0, 1.0), 0.1),
        ("T", (2, 2, 6, 2), (1.0, 1.0, 1.0, 1.0), 0.1),
        ("S", (3, 5, 9, 3), (1.0, 1.0, 1.0, 1.0), 0.15),
        ("B", (4, 6, 12, 6), (1.0, 1.0, 1e-6, 1e-6), 0.4),
        ("L", (4, 7, 19, 8), (1e-6, 1e-6, 1e-6, 1e-6), 0.55),
    ],
)
def test_variants_train_as_published(
    name: str, depths: tuple[int, ...], scales: tuple[float, ...], last_drop: float
) -> None:
    with torch.device("meta"):
        net = NaLaFormer.variant(name)
    assert tuple(len(stage) for stage in net.stages) == depths
    assert tuple(net.config()["scales"]) == scales
    assert net.stages[0][0].drop.p == 0.0 and net.stages[-1][-1].drop.p == pytest.approx(last_drop)


def test_scales_begin_as_published() -> None:
    net = NaLaFormer((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1), scales=(1.0, 1.0, 1e-6, 1e-6))
    assert [float(stage[0].scale2.detach().mean()) for stage in net.stages] == pytest.approx([1.0, 1.0, 1e-6, 1e-6])


def test_large_grids_attend_linearly_and_small_ones_by_softmax() -> None:
    kinds = [type(stage[0].attn) for stage in small().stages]
    assert kinds == [NormAwareLinearAttention] * 2 + [GatedSoftmaxAttention] * 2
    assert all(
        stage[0].attn.rope == "2d" and stage[0].attn.gate and stage[0].attn.lepe == 5 for stage in small().stages
    )


def test_a_block_is_its_formula() -> None:
    block, x = small().stages[1][0], torch.randn(1, 4, 5, 8)

    def local(conv, t):
        return t + torch.nn.Conv2d.forward(conv, t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    with torch.no_grad():
        y = local(block.local1, x)
        y = y + block.scale1 * block.attn(block.norm1(y))
        y = local(block.local2, y)
        hidden = torch.nn.functional.gelu(block.ffn[0](block.norm2(y)))
        wanted = y + block.scale2 * block.ffn[3](local(block.ffn[2], hidden))
        torch.testing.assert_close(block(x), wanted)
    assert block.norm1.eps == 1e-6


def test_stages_halve_the_grid_after_a_stem_of_stride_4() -> None:
    net = small()
    with torch.no_grad():
        assert net.stem(torch.randn(1, 3, 64, 96)).shape == (1, 8, 16, 24)
        assert net.forward_features(torch.randn(1, 3, 64, 96)).shape == (1, 2, 3, 16)
        assert net(torch.randn(2, 3, 50, 70)).shape == (2, 3)


def test_it_trains() -> None:
    net = small().train()
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_drop_path_grows_over_the_blocks() -> None:
    net = NaLaFormer((8, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1), drop_path=0.3)
    assert [round(stage[0].drop.p, 3) for stage in net.stages] == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NaLaFormer.variant("XXL"), "name must be one of XT"),
        (lambda: NaLaFormer((8, 8, 8), (1, 1, 1), (1, 1, 1)), "dims must be four"),
        (lambda: NaLaFormer((7, 8, 8, 8), (1, 1, 1, 1), (1, 1, 1, 1)), "dims must begin with an even"),
        (lambda: NaLaFormer((8, 8, 8, 6), (1, 1, 1, 1), (1, 1, 1, 1)), "multiple of 4"),
        (lambda: NaLaFormer((8, 8, 8, 8), (1, 1, 1, 0), (1, 1, 1, 1)), "depths"),
        (lambda: small()(torch.zeros(1, 1, 64, 64)), "x must be images"),
    ],
)
def test_what_cannot_be_right_is_refused(call, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
