"""SOFT: the published sizes, block formulas, positions for other grids, refusals."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.models import SOFT
from quernel.models.soft import VARIANTS


def small() -> SOFT:
    torch.manual_seed(0)
    return SOFT((1, 1, 1, 1), (8, 8, 8, 16), (1, 2, 2, 2), num_classes=3, side=64).eval()


def test_the_tiny_network_has_its_published_size() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in SOFT.variant(name).parameters()) / 1e6 for name in VARIANTS}
    assert round(sizes["tiny"]) == 13
    # More than the 24 M printed for it elsewhere, which its own depths and widths do not give.
    assert round(sizes["small"], 1) == 38.9


def test_stages_have_49_landmarks_for_images_of_224() -> None:
    with torch.device("meta"):
        net = SOFT.variant("tiny")
    for grid, stage in zip((56, 28, 14), net.stages, strict=False):
        assert stage[0].attn._reduced((grid, grid)) == [7, 7]


def test_blocks_have_their_norms_behind() -> None:
    block = small().stages[0][0]
    x = torch.randn(1, 16, 16, 8)
    y = block.norm1(x + block.attn(x))
    torch.testing.assert_close(block(x), block.norm2(y + block.ffn(y)))


def test_the_last_stage_has_its_norms_in_front() -> None:
    net, x = small(), 1e-3 * torch.randn(2, 5, 16)
    block, head = net.stages[3][0], net.norm
    assert {norm.eps for norm in (*block.norms, head)} == {1e-6}
    y = x + block.mixer(block.norms[0](x))
    torch.testing.assert_close(block(x), y + block.mlp(block.norms[1](y)))


def test_other_image_sizes_work_and_their_positions_are_resized() -> None:
    net = small()
    x = torch.randn(2, 3, 64, 96)
    assert net(x).shape == (2, 3)
    torch.testing.assert_close(net(x[:1]), net(x)[:1], rtol=1e-4, atol=1e-5)


def test_it_trains() -> None:
    net = small().train()
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_drop_path_grows_over_the_blocks() -> None:
    net = SOFT((1, 1, 1, 1), (8, 8, 8, 16), (1, 2, 2, 2), side=32, drop_path=0.3)
    assert [round(stage[0].drop.p, 3) for stage in net.stages] == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SOFT.variant("huge"), "name must be one of tiny"),
        (lambda: SOFT((1, 1, 1), (8, 8, 8), (1, 1, 1)), "depths must be four"),
        (lambda: SOFT((1, 1, 1, 1), (8, 8, 8, 0), (1, 1, 1, 1)), "dims"),
        (lambda: SOFT((1, 1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), side=100), "side must be a multiple"),
        (lambda: small()(torch.zeros(1, 3, 50, 64)), "sides that 32 divides"),
    ],
)
def test_what_cannot_be_right_is_refused(call, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
