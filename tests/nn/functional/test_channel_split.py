"""``split_depthwise``: both paths against the taps one by one, gradients, borders, threads, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.nn.functional import channel_split as module
from quernel.nn.functional import split_depthwise
from tests.reference import inceptionnext as reference

# float32 sums of some tens of products, or of all pixels.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# (B, H, W, C), group, windows: narrower than a window, one pixel, groups beyond a vector, nothing copied, one window.
CASES = [
    ((2, 5, 7, 9), 2, [(3, 3), (1, 5), (5, 1)]),
    ((1, 1, 1, 16), 5, [(3, 3), (1, 11), (11, 1)]),
    ((2, 3, 20, 60), 20, [(3, 3), (1, 11), (11, 1)]),
    ((1, 13, 2, 6), 2, [(1, 3), (7, 1), (3, 5)]),
    ((3, 4, 4, 35), 33, [(5, 3)]),
    ((1, 6, 9, 16), 16, [(1, 1)]),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(shape: tuple[int, ...], group: int, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    taps = sum(high * wide for high, wide in sizes)
    return draw(*shape), draw(taps, group, seed=1), draw(len(sizes) * group, seed=2)


def windows(taps: Tensor, bias: Tensor, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
    """The windows as (g, high, wide) and their biases."""
    parts = taps.split([high * wide for high, wide in sizes])
    return [(p.mT.reshape(-1, *s), b) for p, s, b in zip(parts, sizes, bias.split(taps.shape[1]), strict=True)]


@pytest.fixture(params=["compiled", "torch"])
def path(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(module, "portable", lambda: True)
    elif module.portable():
        pytest.skip("no AVX-512 here")
    return str(request.param)


@pytest.mark.parametrize(("shape", "group", "sizes"), CASES, ids=str)
def test_values_and_gradients_are_those_of_the_taps(
    shape: Any, group: int, sizes: Any, path: str, poisoned_memory: None
) -> None:
    leaves = [t.requires_grad_() for t in operands(shape, group, sizes)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = split_depthwise(*leaves, sizes)
    wanted = reference.inception(wide[0], windows(*wide[1:], sizes))
    torch.testing.assert_close(y, wanted.float(), **CLOSE)
    g = draw(*shape, seed=3)
    got = torch.autograd.grad(y, leaves, g)
    for a, b in zip(got, torch.autograd.grad(wanted, wide, g.double()), strict=True):
        torch.testing.assert_close(a, b.float(), **CLOSE)


def test_float64_passes_through_and_its_gradients_are_right() -> None:
    leaves = [t.double().requires_grad_() for t in operands((1, 3, 4, 5), 1, [(3, 3), (1, 5)])]
    assert torch.autograd.gradcheck(lambda *t: split_depthwise(*t, [(3, 3), (1, 5)]), leaves)


def test_the_ops_keep_their_promises(path: str) -> None:
    sizes = [(3, 3), (1, 5)]
    x, taps, bias = (t.requires_grad_() for t in operands((2, 4, 5, 8), 3, sizes))
    flat = [3, 3, 1, 5]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.quernel.split_depthwise, (x, taps, bias, flat), test_utils=tests)
    for by_x, by_taps in ((True, True), (True, False), (False, True)):
        inputs = (x.detach(), x.detach(), taps.detach(), flat, by_x, by_taps)
        torch.library.opcheck(torch.ops.quernel.split_depthwise_backward, inputs, test_utils=tests)


def test_what_lies_beside_the_image_is_not_read(path: str) -> None:
    room = torch.full((3, 5, 6, 9), float("nan"))
    room[1] = draw(5, 6, 9)
    _, taps, bias = operands((1, 5, 6, 9), 3, [(5, 5), (1, 11)])
    assert split_depthwise(room[1:2], taps, bias, [(5, 5), (1, 11)]).isfinite().all()


def test_threads_and_empty_batches(path: str) -> None:
    sizes = [(3, 3), (1, 11), (11, 1)]
    x, taps, bias = operands((3, 24, 25, 48), 6, sizes)
    taps.requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        y = split_depthwise(x, taps, bias, sizes)
        return y, torch.autograd.grad(y.square().sum(), taps)[0]

    with threads(1):
        alone = both()
    with threads(2):
        y, by_taps = both()
    torch.testing.assert_close(y, alone[0], **CLOSE)
    torch.testing.assert_close(by_taps, alone[1], rtol=1e-3, atol=1e-1)
    assert split_depthwise(x[:0], taps, bias, sizes).shape == (0, 24, 25, 48)


def test_both_directions_are_for_cpus_and_gpus_and_counted(path: str) -> None:
    x, taps, bias = (t.requires_grad_() for t in operands((2, 4, 5, 8), 3, [(3, 3), (1, 5)]))
    with FlopCounterMode(display=False) as counter:
        y = split_depthwise(x, taps, bias, [(3, 3), (1, 5)])
        assert counter.get_total_flops() == 2 * 40 * 14 * 3
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 14 * 3
    for name in ("split_depthwise", "split_depthwise_backward"):
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quernel::{name}", device)


def test_second_derivatives_are_refused() -> None:
    x, taps, bias = (t.requires_grad_() for t in operands((1, 3, 4, 5), 1, [(3, 3)]))
    (g,) = torch.autograd.grad(split_depthwise(x, taps, bias, [(3, 3)]).square().sum(), x, create_graph=True)
    with pytest.raises(QuernelError, match="no second derivative"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, t, b: split_depthwise(x[0], t, b, [(3, 3)]), r"x must have shape \(B, H, W, C\)"),
        (lambda x, t, b: split_depthwise(x, t, b, [(3, 4)]), "sizes must be odd"),
        (lambda x, t, b: split_depthwise(x, t, b, [(3, 5)]), "sizes must be odd and hold the 9 taps"),
        (lambda x, t, b: split_depthwise(x, t, b[:2], [(3, 3)]), "bias must hold one value for each of 1 x 3 channels"),
        (lambda x, t, b: split_depthwise(x[..., :2], t, b, [(3, 3)]), "at most the 2 of x"),
        (lambda x, t, b: split_depthwise(x, t.double(), b, [(3, 3)]), "one floating dtype"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(*operands((1, 4, 5, 8), 3, [(3, 3)]))
