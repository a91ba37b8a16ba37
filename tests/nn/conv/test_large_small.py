"""``LSConv``: its formula layer by layer, folding, equivariance, masks, published names, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn import LargeKernelPerception, LSConv
from quernel.nn.functional import ska
from tests.reference import lsnet as reference

# float32 sums of some hundred terms, normalised.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stirred(dim: int = 16, **options: Any) -> LSConv:
    """A mixer in eval mode with statistics and gains that show."""
    torch.manual_seed(0)
    mixer = LSConv(dim, **options).eval()
    for module in mixer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
    return mixer


@pytest.mark.parametrize("options", [{}, {"large": 3, "small": 5}, {"large": 5, "group_size": 4}, {"group_size": 16}])
def test_it_is_its_formula(options: dict[str, int]) -> None:
    mixer, x = stirred(**options), draw(2, 5, 6, 16)
    z = x.movedim(-1, 1)
    w = reference.perception(mixer.lkp, z)
    torch.testing.assert_close(mixer.lkp(z), w, **CLOSE)
    norm = mixer.bn
    y = (reference.ska(z, w).float() - norm.running_mean[:, None, None]) / (
        norm.running_var[:, None, None] + 1e-5
    ).sqrt()
    wanted = y * norm.weight[:, None, None] + norm.bias[:, None, None] + z
    torch.testing.assert_close(mixer(x), wanted.movedim(1, -1), **CLOSE)


def test_folding_changes_nothing_and_keeps_the_outer_norm() -> None:
    mixer, x = stirred(32), draw(2, 7, 5, 32)
    fused = mixer.fuse()
    assert [name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["bn"]
    torch.testing.assert_close(fused(x), mixer(x), **CLOSE)
    assert fused.fuse() is fused
    twin = LSConv.from_config(fused.config()).eval()
    twin.load_state_dict(fused.state_dict())
    assert torch.equal(twin(x), fused(x))
    with pytest.raises(QuernelError, match="eval"):
        mixer.train().fuse()


def test_frozen_weights_commute_with_shifts_in_the_interior() -> None:
    x, w = draw(1, 8, 12, 12), draw(1, 2, 9, 12, 12, seed=1)
    shifted = ska(x.roll((2, 1), (2, 3)), w.roll((2, 1), (3, 4)))
    torch.testing.assert_close(shifted[..., 4:-2, 3:-2], ska(x, w).roll((2, 1), (2, 3))[..., 4:-2, 3:-2])


def test_outputs_depend_on_the_size_of_the_image_by_the_group_norm_alone() -> None:
    mixer, x = stirred(), draw(1, 20, 20, 16)
    far = x.clone()
    far[:, 15:] *= 3.0
    before, after = (mixer.lkp(t.movedim(-1, 1))[..., :5, :5] for t in (x, far))
    # Where no kernel reaches, weights differ by one factor and offset a set of weights.
    gain, shift = mixer.lkp.norm.weight.view(1, 2, 9, 1, 1), mixer.lkp.norm.bias.view(1, 2, 9, 1, 1)
    plain, other = ((t - shift) / gain for t in (before, after))
    slope = (other[:, :, 1] - other[:, :, 0]) / (plain[:, :, 1] - plain[:, :, 0])
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(slope, slope.mean((2, 3), keepdim=True).expand_as(slope), rtol=0.02, atol=0.02)


def test_batch_independence() -> None:
    mixer, x = stirred(), draw(3, 5, 6, 16)
    torch.testing.assert_close(mixer(x)[1:2], mixer(x[1:2]), **CLOSE)


def test_masked_images_are_as_if_cut() -> None:
    mixer, x = stirred(), draw(2, 6, 7, 16)
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[:, :4, :5] = True
    x[~mask] = float("nan")
    torch.testing.assert_close(mixer(x, mask=mask)[:, :4, :5], mixer(x[:, :4, :5]), **CLOSE)
    mask[0] = False
    assert mixer(x, mask=mask)[1, :4, :5].isfinite().all()


def test_it_trains_through_both_formats() -> None:
    x = draw(2, 6, 5, 16)
    found = []
    for image in (x, x.movedim(-1, 1).contiguous().movedim(1, -1)):
        mixer = stirred().train()
        mixer(image).square().sum().backward()
        found.append([p.grad for p in mixer.parameters()])
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def test_gradients_in_float64() -> None:
    mixer = stirred(4, large=3, group_size=2).double()
    x = draw(1, 2, 3, 4).double().requires_grad_()
    # A step of the differences must not cross the corner of a ReLU: it does not with this seed.
    assert torch.autograd.gradcheck(mixer, (x,))


def test_autocast() -> None:
    mixer, x = stirred(), draw(1, 5, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    torch.testing.assert_close(y.float(), mixer(x), rtol=0.1, atol=0.3)


def test_published_names_and_operations() -> None:
    mixer = LSConv(64)
    names = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert names["lkp.cv1.c.weight"] == (32, 64, 1, 1) and names["lkp.cv2.c.weight"] == (32, 1, 7, 7)
    assert names["lkp.cv3.bn.weight"] == (32,) and names["lkp.cv4.bias"] == (72,) and names["lkp.norm.weight"] == (72,)
    assert {"bn.running_mean", "lkp.cv1.bn.running_var"} <= set(mixer.state_dict())
    per_place = 64 * 32 + 32 * 32 + 32 * 72 + 32 * 49 + 64 * 9
    assert mixer.flops((2, 3, 4, 64)) == 2 * 24 * per_place


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LSConv(20), "group_size must divide dim=20; got 8"),
        (lambda: LSConv(16, large=6), "large must be odd"),
        (lambda: LSConv(16, small=2), "small must be odd"),
        (lambda: LargeKernelPerception(1, group_size=1), "dim"),
        (lambda: LSConv(16)(draw(1, 5, 16)), "2 axes"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
