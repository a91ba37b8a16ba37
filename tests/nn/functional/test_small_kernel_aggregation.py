"""``ska``: both paths and memory formats against seven loops and unfolding, gradients, special weights, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.nn.functional import ska
from quernel.nn.functional import small_kernel_aggregation as module
from tests.reference import lsnet as reference

# float32 sums of up to 25 products, or of a group of channels.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FORMATS = (torch.contiguous_format, torch.channels_last)
# (B, C, G, H, W): group sizes 1, 4, 8 and all channels; one row, one column, more than one vector of pixels or sets.
SHAPES = [
    (2, 8, 8, 5, 7), (1, 16, 4, 3, 6), (2, 16, 2, 1, 9), (3, 12, 1, 7, 1), (1, 40, 5, 4, 17), (1, 136, 17, 2, 3),
]  # fmt: skip
BACKENDS = ["torch", "compiled"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(shape: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    batch, channels, sets, height, width = shape
    return draw(batch, channels, height, width), draw(batch, sets, size * size, height, width, seed=1)


@pytest.fixture(params=BACKENDS)
def backend(request: Any) -> Any:
    if request.param == "compiled" and module.portable():
        pytest.skip("no AVX-512 here")
    return request.param


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_definition(shape: tuple[int, ...], size: int, backend: Any, poisoned_memory: None) -> None:
    x, w = operands(shape, size)
    for fmt in FORMATS:
        image = x.contiguous(memory_format=fmt)
        y = ska(image, w, backend)
        assert y.stride() == image.stride()
        torch.testing.assert_close(y, reference.unfolded(x, w), **CLOSE)


@pytest.mark.parametrize(("shape", "size"), [((1, 4, 2, 5, 6), 3), ((2, 4, 1, 3, 4), 5), ((1, 3, 3, 2, 7), 5)])
def test_seven_loops_agree(shape: tuple[int, ...], size: int, backend: Any) -> None:
    x, w = operands(shape, size)
    torch.testing.assert_close(ska(x, w, backend), reference.ska(x, w).float(), **CLOSE)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_unfolding(
    shape: tuple[int, ...], size: int, backend: Any, poisoned_memory: None
) -> None:
    x, w = operands(shape, size)
    g = draw(*x.shape, seed=2)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    wanted = torch.autograd.grad(reference.unfolded(*leaves), leaves, g)
    for fmt in FORMATS:
        image = x.contiguous(memory_format=fmt).requires_grad_()
        got = torch.autograd.grad(ska(image, leaves[1], backend), (image, leaves[1]), g)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("fmt", FORMATS)
def test_first_and_second_derivatives_in_float64(fmt: Any) -> None:
    x = draw(1, 4, 2, 3).double().contiguous(memory_format=fmt).requires_grad_()
    w = draw(1, 2, 9, 2, 3).double().requires_grad_()
    assert ska(x, w).dtype == torch.float64
    assert torch.autograd.gradcheck(ska, (x, w))
    assert torch.autograd.gradgradcheck(ska, (x, w))


def test_the_ops_keep_their_promises(backend: Any) -> None:
    x, w = operands((2, 8, 2, 4, 5), 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for fmt in FORMATS:
        image = x.contiguous(memory_format=fmt).requires_grad_()
        torch.library.opcheck(torch.ops.quernel.ska, (image, w.requires_grad_(), backend), test_utils=tests)
        g = image.detach()
        torch.library.opcheck(torch.ops.quernel.ska_input_gradient, (g, w, backend), test_utils=tests)
        torch.library.opcheck(torch.ops.quernel.ska_weight_gradient, (g, image, 2, 9, backend), test_utils=tests)


@pytest.mark.parametrize("size", [3, 5, 7])
def test_weights_that_are_alike_everywhere_are_a_depthwise_convolution(size: int) -> None:
    x, taps = draw(2, 12, 9, 8), draw(3, size * size, seed=1)
    w = taps[None, :, :, None, None].expand(2, -1, -1, 9, 8)
    kernel = taps.view(3, 1, size, size).repeat(4, 1, 1, 1)  # channel c takes set c mod 3
    torch.testing.assert_close(ska(x, w), F.conv2d(x, kernel, padding=size // 2, groups=12), rtol=1e-4, atol=1e-4)


def test_the_centre_tap_is_the_identity(backend: Any) -> None:
    x, w = draw(2, 8, 5, 6), torch.zeros(2, 4, 25, 5, 6)
    w[:, :, 12] = 1.0
    assert torch.equal(ska(x, w, backend), x)


def test_one_set_is_shared_and_as_many_as_channels_are_their_own(backend: Any) -> None:
    x, w = draw(1, 4, 5, 6), draw(1, 1, 9, 5, 6, seed=1)
    torch.testing.assert_close(ska(x, w, backend), ska(x, w.repeat(1, 4, 1, 1, 1), backend))
    own = draw(1, 4, 9, 5, 6, seed=2)
    apart = torch.cat([ska(x[:, c : c + 1], own[:, c : c + 1], backend) for c in range(4)], 1)
    torch.testing.assert_close(ska(x, own, backend), apart)


def test_groups_are_strided(backend: Any) -> None:
    x = draw(1, 12, 4, 5).abs() + 0.1
    for g in range(3):
        w = torch.zeros(1, 3, 9, 4, 5)
        w[:, g, 4] = 1.0
        y = ska(x, w, backend)
        assert [c for c in range(12) if bool(y[:, c].any())] == [g, g + 3, g + 6, g + 9]
    w, blocked = draw(1, 3, 9, 4, 5), torch.arange(12).view(4, 3).T.flatten()
    assert not torch.allclose(ska(x, w, backend)[:, blocked], ska(x[:, blocked], w, backend))


def test_what_lies_beyond_the_border_is_not_read(backend: Any) -> None:
    room = torch.full((1, 8, 7, 8), float("nan"))
    room[:, :, 1:6, 1:7] = draw(1, 8, 5, 6)
    w = torch.full((1, 2, 9, 7, 8), float("nan"))
    w[..., 1:6, 1:7] = draw(1, 2, 9, 5, 6)
    for fmt in FORMATS:
        x = room[:, :, 1:6, 1:7].contiguous(memory_format=fmt)
        assert ska(x, w[..., 1:6, 1:7], backend).isfinite().all()
    assert ska(room[:, :, 1:6, 1:7], w[..., 1:6, 1:7], backend).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, backend: Any) -> None:
    x, w = (t.to(dtype) for t in operands((1, 8, 2, 5, 6), 5))
    y = ska(x, w, backend)
    assert y.dtype == dtype
    assert torch.equal(y, ska(x.float(), w.float(), backend).to(dtype))


def test_empty_batches_and_two_threads(backend: Any) -> None:
    assert ska(draw(0, 8, 5, 6), draw(0, 2, 9, 5, 6), backend).shape == (0, 8, 5, 6)
    x, w = operands((3, 64, 8, 20, 23), 3)
    with threads(1):
        alone = [ska(x.contiguous(memory_format=fmt), w, backend) for fmt in FORMATS]
    with threads(2):
        assert all(
            torch.equal(ska(x.contiguous(memory_format=fmt), w, backend), alone[i]) for i, fmt in enumerate(FORMATS)
        )


def test_no_unfolded_copy_is_made() -> None:
    x, w = operands((4, 64, 8, 28, 28), 3)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        ska(x, w)
    # Activations that are allocated, the output among them; unfolding takes nine for the copy alone.
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) / (4 * x.numel())
    assert allocated <= (2.5 if not module.portable() else 4.0)


def test_operations_are_counted_in_both_directions(backend: Any) -> None:
    x, w = (t.requires_grad_() for t in operands((2, 8, 2, 4, 5), 3))
    with FlopCounterMode(display=False) as counter:
        y = ska(x, w, backend)
        assert counter.get_total_flops() == 2 * 2 * 8 * 20 * 9
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 8 * 20 * 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ska(x[0], w), r"x must have shape \(B, C, H, W\)"),
        (lambda x, w: ska(x, w[..., :-1]), "weights for every place"),
        (lambda x, w: ska(x, w[:1]), "weights for every place"),
        (lambda x, w: ska(x, w[:, :, :8]), "k odd, such as 9 or 25; got 8"),
        (lambda x, w: ska(x, w[:, :, :4]), "k odd"),
        (lambda x, w: ska(x, w.repeat(1, 3, 1, 1, 1)[:, :5]), "divides the 8 channels of x; got 5"),
        (lambda x, w: ska(x, w.double()), "one floating dtype"),
        (lambda x, w: ska(x.long(), w.long()), "one floating dtype"),
        (lambda x, w: ska(x, w, "cuda"), "backend must be one of 'auto'"),
        (lambda x, w: ska(x, w, "triton"), "backend='triton' is for tensors on a GPU; these are on the CPU"),
        (lambda x, w: ska(x.double(), w.double(), "compiled"), "backend='compiled' needs AVX-512"),
        (lambda x, w: ska(x, w.repeat(1, 1, 6, 1, 1)[:, :, :49], "compiled"), "backend='compiled' needs AVX-512"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(*operands((2, 8, 2, 5, 6), 3))
