"""Inception mixers: against the taps one by one, as one depthwise convolution, layouts, conversion, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quernel._errors import QuernelError
from quernel.nn import ChannelsFirst, InceptionDWConv1d, InceptionDWConv2d, InceptionDWConv3d
from tests.reference import inceptionnext as reference

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branches_of(mixer: Any) -> list[tuple[Tensor, Tensor]]:
    convs = [getattr(mixer, f"dwconv_{name}") for name in mixer.branches]
    return [(conv.weight.detach()[:, 0], conv.bias.detach()) for conv in convs]


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (InceptionDWConv1d, (9,)),
        (InceptionDWConv1d, (2,)),
        (InceptionDWConv2d, (5, 7)),
        (InceptionDWConv2d, (1, 6)),
        (InceptionDWConv2d, (6, 1)),
        (InceptionDWConv3d, (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_every_branch_is_its_taps(cls: Any, shape: tuple[int, ...], grad: bool) -> None:
    mixer, x = cls(11, 3, 5, branch_ratio=0.2), draw(2, *shape, 11)
    with torch.set_grad_enabled(grad):
        y = mixer(x)
    torch.testing.assert_close(y, reference.inception(x, branches_of(mixer)).float(), **CLOSE)


@pytest.mark.parametrize(
    ("cls", "shape"), [(InceptionDWConv1d, (20,)), (InceptionDWConv2d, (9, 13)), (InceptionDWConv3d, (3, 4, 5))]
)
def test_one_depthwise_convolution_computes_the_same(cls: Any, shape: tuple[int, ...]) -> None:
    mixer, x = cls(24), draw(2, *shape, 24)
    single = mixer.to_depthwise()
    assert single.kernel_size == (11,) * len(shape)
    torch.testing.assert_close(ChannelsFirst(mixer)(x.movedim(-1, 1)), single(x.movedim(-1, 1)), rtol=0, atol=1e-6)


def test_identity_channels_are_the_input_bit_by_bit() -> None:
    mixer, x = InceptionDWConv2d(64), draw(2, 7, 9, 64)
    assert mixer.group == 8
    assert torch.equal(mixer(x)[..., :40], x[..., :40])
    with torch.no_grad():
        assert torch.equal(mixer(x)[..., :40], x[..., :40])


def test_bands_lie_along_their_axis() -> None:
    mixer = InceptionDWConv2d(8, 1, 5)
    x = torch.zeros(1, 9, 9, 8)
    x[0, 4, 4] = 1.0
    touched = (mixer(x) - mixer(torch.zeros_like(x))).ne(0)[0]
    wide, high = touched[..., 6].nonzero(), touched[..., 7].nonzero()
    assert wide[:, 0].unique().tolist() == [4] and wide[:, 1].tolist() == [2, 3, 4, 5, 6]
    assert high[:, 1].unique().tolist() == [4] and high[:, 0].tolist() == [2, 3, 4, 5, 6]


def test_gradients() -> None:
    mixer = InceptionDWConv2d(6, 3, 5, branch_ratio=0.2).double()
    x = draw(2, 3, 4, 6).double().requires_grad_()
    parameters = tuple(mixer.parameters())

    def call(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip([n for n, _ in mixer.named_parameters()], values, strict=True))
        return torch.func.functional_call(mixer, named, (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("shape", [(9, 12), (3, 1), (1, 5), (30, 33)])
@pytest.mark.parametrize("grad", [False, True])
def test_layouts_give_the_same_numbers(shape: tuple[int, int], grad: bool) -> None:
    mixer, x = InceptionDWConv2d(40, band_kernel_size=9, branch_ratio=0.25), draw(3, *shape, 40)
    first, adapted = x.permute(0, 3, 1, 2).contiguous(), ChannelsFirst(mixer)
    with torch.set_grad_enabled(grad):
        wanted = mixer(x)
        for image in (first, first.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(adapted(image).permute(0, 2, 3, 1), wanted, **CLOSE)


@pytest.mark.parametrize("branches", [(), ("hw",), ("w", "h"), ("h", "hw")])
@pytest.mark.parametrize("grad", [False, True])
def test_branches_can_be_left_out(branches: tuple[str, ...], grad: bool) -> None:
    mixer, x = InceptionDWConv2d(16, branches=branches), draw(1, 5, 6, 16)
    kept = 16 - 2 * len(branches)
    assert len(list(mixer.parameters())) == 2 * len(branches)
    with torch.set_grad_enabled(grad):
        y = mixer(x)
    assert torch.equal(y[..., :kept], x[..., :kept])
    torch.testing.assert_close(y, reference.inception(x, branches_of(mixer)).float(), **CLOSE)
    assert InceptionDWConv2d.from_config(mixer.config()).branches == mixer.branches
    torch.testing.assert_close(ChannelsFirst(mixer)(x.movedim(-1, 1)), mixer.to_depthwise()(x.movedim(-1, 1)), **CLOSE)


def test_parameters_and_operations_are_those_of_the_formula() -> None:
    mixer = InceptionDWConv2d(96)
    assert sum(p.numel() for p in mixer.parameters()) == 12 * (9 + 22) + 36
    assert mixer.flops((2, 5, 7, 96)) == 70 * (2 * 12 * 31 + 36)
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "dwconv_hw.weight": (12, 1, 3, 3),
        "dwconv_w.weight": (12, 1, 1, 11),
        "dwconv_h.weight": (12, 1, 11, 1),
    }


def test_half_precision_gives_half_precision() -> None:
    mixer, x = InceptionDWConv2d(16), draw(2, 5, 6, 16)
    assert mixer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(mixer(x.bfloat16()).float(), mixer(x), rtol=0.02, atol=0.05)


def test_layers_that_are_watched_or_replaced_are_called() -> None:
    mixer, x, seen = InceptionDWConv2d(16), draw(2, 5, 6, 16), []
    wanted = mixer(x)
    handle = mixer.dwconv_w.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(mixer(x), wanted, **CLOSE)
    assert len(seen) == 1 and seen[0].shape == (2, 2, 5, 6)
    handle.remove()
    mixer.dwconv_w = nn.Identity()
    assert torch.equal(mixer(x)[..., 12:14], x[..., 12:14])


@pytest.mark.parametrize("grad", [False, True])
def test_operations_are_counted_on_either_path(grad: bool) -> None:
    mixer, x = InceptionDWConv2d(16), draw(2, 5, 6, 16)
    for image in (x, x.movedim(-1, 1).contiguous().movedim(1, -1)):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            mixer(image)
        assert counter.get_total_flops() == 2 * 60 * 2 * 31


@pytest.mark.slow
def test_compilation_in_training_mode() -> None:
    mixer, x = InceptionDWConv2d(16).train(), draw(2, 5, 6, 16)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mixer(x), **CLOSE)
    torch.compiler.reset()


def mixed_up(size: int = 7) -> tuple[nn.Conv2d, Tensor]:
    """A depthwise convolution that is an inception mixer of 16 channels, shuffled and with scaled identities."""
    source = InceptionDWConv2d(16, 3, size).to_depthwise()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    conv = nn.Conv2d(16, 16, size, padding=size // 2, groups=16)
    with torch.no_grad():
        source.weight[:10] *= torch.linspace(-2.0, 3.0, 10)[:, None, None, None]
        source.bias.copy_(draw(16))
        conv.weight.copy_(source.weight[order]), conv.bias.copy_(source.bias[order])
    return conv, order


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_what_can_be_converted_exactly_is(dtype: torch.dtype, close: float) -> None:
    conv = mixed_up()[0].to(dtype)
    with torch.no_grad():
        conv.weight *= 1 + 1e-9  # numbers that float32 does not hold
    fit = InceptionDWConv2d.from_depthwise(conv)
    assert sorted(fit.permutation.tolist()) == list(range(16))
    assert fit.error < 1e-12
    x = draw(2, 9, 8, 16).to(dtype)
    got = fit.scale * fit.mixer(x[..., fit.permutation]) + fit.shift
    wanted = conv(x.movedim(-1, 1)).movedim(1, -1)[..., fit.permutation]
    torch.testing.assert_close(got, wanted, rtol=10 * close, atol=close)


def test_the_error_of_a_conversion_is_the_share_of_the_kernels_that_is_lost() -> None:
    conv = nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False)
    fit = InceptionDWConv2d.from_depthwise(conv, band_kernel_size=5)
    single = fit.mixer.to_depthwise().weight * fit.scale[:, None, None, None]
    kernels = conv.weight[fit.permutation]
    lost = ((single - kernels).square().sum() / kernels.square().sum()).detach()
    assert fit.error == pytest.approx(float(lost), rel=1e-4)
    # No exchange of two channels loses less.
    worse = InceptionDWConv2d(16, 3, 5).to_depthwise().weight.detach().ne(0).float()
    worse[:10] = 0.0
    worse[:10, :, 2, 2] = 1.0
    for seed in range(20):
        other = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        left = ((conv.weight[other] * (1 - worse)).square().sum() / kernels.square().sum()).detach()
        assert fit.error <= float(left) + 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InceptionDWConv2d(4), "branch_ratio must give each of 3 branches at least one"),
        (lambda: InceptionDWConv2d(16, branch_ratio=0.4), "branch_ratio must give each"),
        (lambda: InceptionDWConv2d(16, branch_ratio=0.0), "branch_ratio"),
        (lambda: InceptionDWConv2d(16, square_kernel_size=4), "square_kernel_size must be odd"),
        (lambda: InceptionDWConv2d(16, band_kernel_size=10), "band_kernel_size must be odd"),
        (lambda: InceptionDWConv2d(16, branches=("d",)), "branches must be a sequence of some of 'hw', 'w', 'h'"),
        (lambda: InceptionDWConv2d(16, branches="hw"), "branches"),
        (lambda: InceptionDWConv2d(16)(draw(1, 5, 5, 15)), r"x must have shape \(B, \*S, 16\)"),
        (lambda: InceptionDWConv2d.from_depthwise(nn.Conv2d(16, 16, 3, padding=1)), "conv must be depthwise"),
        (
            lambda: InceptionDWConv2d.from_depthwise(nn.Conv2d(16, 16, 4, padding=2, groups=16)),
            "conv must be depthwise",
        ),
        (lambda: InceptionDWConv2d.from_depthwise(nn.Conv1d(16, 16, 3, padding=1, groups=16)), "conv must be Conv2d"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert isinstance(caught.value, QuernelError)


def test_layers_of_another_geometry_are_not_read_as_the_constructors() -> None:
    mixer, x = InceptionDWConv2d(16), draw(2, 9, 8, 16)
    for other in (
        nn.Conv2d(2, 2, (1, 11), padding=(0, 10), dilation=(1, 2), groups=2),
        nn.Conv2d(2, 2, (1, 11), padding=(0, 5), padding_mode="circular", groups=2),
        nn.Conv2d(2, 2, (1, 7), padding=(0, 3), groups=2),
        nn.Conv2d(2, 2, (1, 11), padding=(0, 5)),
    ):
        mixer.dwconv_w = other
        wanted = other(x[..., 12:14].movedim(-1, 1)).movedim(1, -1)
        torch.testing.assert_close(mixer(x)[..., 12:14], wanted, **CLOSE)


def test_hooks_of_gradients_are_called() -> None:
    mixer, seen = InceptionDWConv2d(16), []
    mixer.dwconv_h.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    mixer(draw(2, 5, 6, 16).requires_grad_()).sum().backward()
    assert seen == [(2, 2, 5, 6)]


def test_no_channel_moves_without_need() -> None:
    fit = InceptionDWConv2d.from_depthwise(nn.Conv2d(48, 48, 7, padding=3, groups=48))
    for part in fit.permutation.split([30, 6, 6, 6]):
        assert part.tolist() == sorted(part.tolist())
    conv = nn.Conv2d(16, 16, 7, padding=3, groups=16)
    nn.init.constant_(conv.weight, float("nan"))
    with pytest.raises(QuernelError, match="finite weights"):
        InceptionDWConv2d.from_depthwise(conv)
