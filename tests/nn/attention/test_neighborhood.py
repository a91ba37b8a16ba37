"""Modules of neighborhood attention: their projections, masks, streams, counted operations, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn import (
    ChannelsFirst,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    SoftmaxAttention,
    make_mixer,
    replace_modules,
)
from quernel.nn.functional import neighborhood_mask
from tests.reference import neighborhood_attention as reference

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(batch: int) -> tuple[Tensor, Tensor]:
    return NeighborhoodAttention1d(8, 2, 3, is_causal=True).init_state(batch)


@pytest.mark.parametrize(
    ("cls", "shape", "options"),
    [
        (NeighborhoodAttention1d, (9,), {"kernel_size": 4, "stride": 2, "is_causal": True}),
        (NeighborhoodAttention2d, (6, 7), {"kernel_size": (3, 2), "dilation": (1, 3), "qk_scale": 0.7}),
        (NeighborhoodAttention3d, (3, 4, 5), {"kernel_size": (2, 3, 3), "is_causal": (True, False, False)}),
    ],
)
def test_it_is_the_definition_between_two_projections(
    cls: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    mixer, x = cls(12, 3, **options).double(), draw(2, *shape, 12).double()
    assert mixer.qkv.weight.shape == (36, 12) and mixer.proj.weight.shape == (12, 12)
    # Three blocks q, k, v of C channels, each of one head after another.
    q, k, v = (part.unflatten(-1, (3, 4)) for part in mixer.qkv(x).flatten(1, -2).split(12, -1))
    numbers = (mixer.kernel_size, mixer.stride, mixer.dilation, mixer.is_causal)
    out, _ = reference.attention(q, k, v, reference.mask(shape, *numbers), options.get("qk_scale"))
    torch.testing.assert_close(mixer(x), mixer.proj(out.flatten(-2)).view_as(x))


def test_with_the_largest_window_it_is_softmax_attention() -> None:
    full, near = SoftmaxAttention(8, 2), NeighborhoodAttention2d(8, 2, (5, 6))
    near.load_state_dict(full.state_dict())
    x = draw(2, 5, 6, 8)
    torch.testing.assert_close(near(x), full(x), **CLOSE)
    full, near = SoftmaxAttention(8, 2, causal=True), NeighborhoodAttention1d(8, 2, 40, is_causal=True)
    near.load_state_dict(full.state_dict())
    torch.testing.assert_close(near(x[0]), full(x[0]), **CLOSE)


def test_masked_tokens_are_left_out_of_every_softmax() -> None:
    mixer, x = NeighborhoodAttention2d(8, 2, 3).double(), draw(1, 4, 5, 8).double()
    mask = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    q, k, v = mixer.qkv(x).view(1, 20, 3, 2, 4).unbind(2)
    seen = neighborhood_mask((4, 5), 3) & mask.flatten()
    kept = mask.flatten().nonzero().flatten()
    out, _ = reference.attention(q[:, kept], k, v, seen[kept])
    x[~mask] = torch.nan
    torch.testing.assert_close(mixer(x, mask=mask).flatten(1, 2)[:, kept], mixer.proj(out.flatten(-2)))
    single = mixer.float()
    assert single(x.float(), mask=torch.zeros_like(mask)).isfinite().all()


# At the second, sums of exponentials of a masked window were rounded below its scores.
@pytest.mark.parametrize("scale", [1e-21, 0.23937644064426422, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_work_at_any_scale_and_leave_gradients_alone(scale: float, dtype: torch.dtype) -> None:
    # Whole windows are masked here, and a loss of all tokens reads what stands there.
    mixer, x = NeighborhoodAttention2d(12, 2, 3, qk_scale=scale).to(dtype), draw(1, 6, 12, 12).to(dtype)
    mask = torch.zeros(1, 6, 12, dtype=torch.bool)
    mask[:, :, :4] = True
    mixer(x, mask=mask).square().sum().backward()
    assert all(float(p.grad.abs().max()) < 1e3 for p in mixer.parameters())
    noise = torch.where(mask[..., None], x, 1e3 * draw(*x.shape, seed=1))
    got, wanted = mixer(noise, mask=mask), mixer(x, mask=mask)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    # Beside masked tokens, as if the windows held only what is kept.
    q, k, v = (part.unflatten(-1, (2, 6)) for part in mixer.qkv(x).flatten(1, 2).split(12, -1))
    kept = mask.flatten().nonzero().flatten()
    seen = (neighborhood_mask((6, 12), 3) & mask.flatten())[kept]
    out, _ = reference.attention(q[:, kept], k, v, seen, scale)
    torch.testing.assert_close(wanted.flatten(1, 2)[:, kept], mixer.proj(out.flatten(-2)), **CLOSE)


@pytest.mark.parametrize(("window", "dilation"), [(1, 1), (4, 1), (3, 2), (30, 1)])
@pytest.mark.parametrize("pieces", [[1] * 17, [5, 1, 8, 3], [17], [0, 3, 0, 14]])
def test_streams_equal_the_whole(window: int, dilation: int, pieces: list[int]) -> None:
    mixer, x = NeighborhoodAttention1d(8, 2, window, dilation=dilation, is_causal=True), draw(2, 17, 8)
    state, outs = mixer.init_state(2), []
    for piece in x.split(pieces, 1):
        y, state = mixer(piece, state=state)
        outs.append(y)
        assert state[0].shape[1] <= (window - 1) * dilation
        # No memory of the tokens before is held.
        assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in state)
    torch.testing.assert_close(torch.cat(outs, 1), mixer(x), **CLOSE)


def test_a_state_begins_where_the_parameters_are() -> None:
    mixer = NeighborhoodAttention1d(8, 2, 3, is_causal=True)
    assert mixer.to("meta").init_state(1)[0].device.type == "meta"
    assert mixer.init_state(1, device="cpu")[0].device.type == "cpu"


def test_which_are_causal() -> None:
    assert NeighborhoodAttention1d(8, 2, 3, is_causal=True).causal
    assert NeighborhoodAttention2d(8, 2, 3, is_causal=(True, True)).causal
    # Within its row a token sees later ones.
    assert not NeighborhoodAttention2d(8, 2, 3, is_causal=(True, False)).causal


def test_flops_count_the_pairs_that_see_each_other() -> None:
    mixer = NeighborhoodAttention2d(8, 2, (3, 4), (1, 2), (2, 1), (False, True))
    pairs = int(neighborhood_mask((7, 9), (3, 4), (1, 2), (2, 1), (False, True)).sum())
    assert mixer.flops((5, 7, 9, 8)) == 5 * (8 * 63 * 64 + 4 * pairs * 8)


def test_options_are_kept_one_an_axis() -> None:
    mixer = make_mixer("neighborhood-attention", 8, num_heads=2, kernel_size=[3, 5], stride=1)
    assert isinstance(mixer, NeighborhoodAttention2d)
    config = mixer.config()
    assert config["kernel_size"] == [3, 5] and config["stride"] == [1, 1] and config["is_causal"] == [False, False]
    twin = NeighborhoodAttention2d.from_config(config)
    assert twin.kernel_size == (3, 5) and twin.config() == config
    assert "kernel_size=(3, 5)" in repr(mixer)


def test_dropout_is_for_training() -> None:
    mixer, x = NeighborhoodAttention1d(8, 2, 3, proj_drop=0.5), draw(1, 200, 8)
    share = float((mixer(x) == 0).float().mean())
    assert 0.4 < share < 0.6  # 1600 fair coins: beyond is 8 deviations away
    assert (mixer.eval()(x) != 0).all()


def test_half_precision_modules() -> None:
    mixer, x = NeighborhoodAttention2d(16, 2, 3), draw(1, 6, 6, 16)
    wanted = mixer(x)
    for dtype in (torch.bfloat16, torch.float16):
        got = mixer.to(dtype)(x.to(dtype), mask=torch.ones(1, 6, 6, dtype=torch.bool))
        assert got.dtype is dtype
        torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.02)
        mixer.float()


def test_it_stands_in_for_a_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8))
    mixer = ChannelsFirst(NeighborhoodAttention2d(8, 2, 7))
    replace_modules(net, lambda name, m: isinstance(m, nn.Conv2d) and m.groups == 8, lambda old: mixer)
    assert net(draw(1, 3, 32, 32)).shape == (1, 8, 8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NeighborhoodAttention2d(8, 3, 3), "num_heads must divide dim=8; got 3"),
        (lambda: NeighborhoodAttention2d(8, 2, (3, 3, 3)), "2 of them"),
        (lambda: NeighborhoodAttention2d(8, 2, 0), "kernel_size of axis 0"),
        (lambda: NeighborhoodAttention2d(8, 2, 3, 4), "got 4 > 3 on axis 0"),
        (lambda: NeighborhoodAttention1d(8, 2, 3, dilation=0), "dilation"),
        (lambda: NeighborhoodAttention1d(8, 2, 3, is_causal="yes"), "is_causal"),
        (lambda: NeighborhoodAttention1d(8, 2, 3, qk_scale=0.0), "qk_scale"),
        (lambda: NeighborhoodAttention1d(8, 2, 3, proj_drop=1.0), "proj_drop"),
        (lambda: NeighborhoodAttention2d(8, 2, 7)(draw(1, 7, 6, 8)), "kernel_size 7 exceeds the 6 tokens of axis 1"),
        (lambda: NeighborhoodAttention2d(8, 2, 3)(draw(1, 7, 8)), "2 axes"),
        (lambda: NeighborhoodAttention1d(8, 2, 3).init_state(1), "only with is_causal=True and stride=1"),
        (lambda: NeighborhoodAttention1d(8, 2, 3, 2, is_causal=True).init_state(1), "depends on the length"),
        (lambda: NeighborhoodAttention1d(8, 2, 3)(draw(1, 4, 8), state=streams(1)), "only with is_causal=True"),
        (
            lambda: NeighborhoodAttention1d(8, 2, 3, is_causal=True)(draw(3, 4, 8), state=streams(2)),
            "state must be of the 3 streams of x; got one of 2",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
