"""Long convolutions by FFT: sums over lags, causality, sides, gradients, sizes, kept spectra, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn._fft_conv_op import fft_conv_op, fft_size, least_size
from quernel.nn.functional import fft_conv, kernel_spectrum, smooth, squash
from tests.reference import long_conv as reference

LENGTHS = (1, 2, 7, 64, 100)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_sum_over_lags(length: int, bidirectional: bool) -> None:
    u, skip = draw(2, 3, length), draw(2, 3, seed=2)
    for taps in {1, max(1, length // 2), length, length + 5}:
        k = draw(2, 2, 3, taps, seed=1)
        given, later = (k, k[1]) if bidirectional else (k[0], None)
        wanted = reference.convolved(u, k[0], skip, later)
        torch.testing.assert_close(
            fft_conv(u, given, skip=skip, bidirectional=bidirectional), wanted, rtol=0, atol=1e-10 * (1 + taps)
        )
        single = fft_conv(u.float(), given.float(), skip=skip.float(), bidirectional=bidirectional)
        sums = k.abs().sum(-1).max() * len(k) + skip.abs().max()
        assert float((single - wanted).abs().max()) <= 2e-6 * float(sums * u.abs().max())


def test_a_prime_length_is_the_product_with_a_toeplitz_matrix() -> None:
    u, k = draw(2, 3, 1021), draw(3, 1021, seed=1)
    wanted = (reference.toeplitz(k, 1021) @ u[..., None])[..., 0]
    torch.testing.assert_close(fft_conv(u, k), wanted, rtol=0, atol=1e-10)
    error = float((fft_conv(u.float(), k.float()) - wanted).abs().max())
    assert error <= 2e-6 * float(k.abs().sum(-1).max() * u.abs().max())


@pytest.mark.parametrize("length", [70, 128, 201])
def test_blocks_and_sizes_change_nothing(length: int) -> None:
    u, k = draw(3, 5, length), draw(5, length, seed=1)
    wanted = fft_conv(u, k)
    for options in ({"block": 1}, {"block": 4}, {"block": 1000}, {"n": 512}, {"n": 2 * length}, {"n": 3 * 2**7 + 100}):
        torch.testing.assert_close(fft_conv(u, k, **options), wanted, rtol=0, atol=1e-12 * length)
    spread = u.transpose(1, 2).contiguous().transpose(1, 2)
    got = fft_conv(spread, k)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12 * length)
    assert got.stride() == spread.stride()


@pytest.mark.parametrize(("dtype", "leak"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_no_gradient_comes_from_later_steps(dtype: torch.dtype, leak: float) -> None:
    u, k = draw(1, 1, 80, dtype=dtype).requires_grad_(), draw(1, 90, seed=1, dtype=dtype)
    jacobian = torch.autograd.functional.jacobian(lambda x: fft_conv(x, k), u)[0, 0, :, 0, 0]  # (t, s)
    assert float(jacobian.triu(1).abs().max()) <= leak * float(jacobian.abs().max())
    torch.testing.assert_close(jacobian.tril(), reference.toeplitz(k, 80)[0], rtol=0, atol=leak * 100)


def test_the_first_tap_backwards_is_that_of_lag_minus_one() -> None:
    u = torch.zeros(1, 1, 5, dtype=torch.float64)
    u[..., 2] = 1
    k = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]]], dtype=torch.float64)
    wanted = torch.tensor([20.0, 10.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(fft_conv(u, k, bidirectional=True)[0, 0], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", ["auto", 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients(bidirectional: bool, block: Any) -> None:
    u, skip = draw(2, 2, 4).requires_grad_(), draw(2, 2, seed=2).requires_grad_()
    for taps in (2, 5):
        k = draw(*((2, 2, 2) if bidirectional else (2, 2)), taps, seed=1).requires_grad_()

        def call(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
            return fft_conv(u, k, skip=skip, bidirectional=bidirectional, block=block)

        assert torch.autograd.gradcheck(call, (u, k, skip))
        assert torch.autograd.gradgradcheck(call, (u, k, skip))


def test_gradients_of_plain_products_are_those_of_the_transform() -> None:
    u, k = draw(2, 3, 50, dtype=torch.float32), draw(3, 20, seed=1, dtype=torch.float32)

    def gradients(**options: int) -> list[Tensor]:
        leaves = u.clone().requires_grad_(), k.clone().requires_grad_()
        (fft_conv(*leaves, **options) ** 2).sum().backward()
        return [leaf.grad for leaf in leaves]

    for got, wanted in zip(gradients(), gradients(n=128), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_operation_keeps_the_promises_of_torch(bidirectional: bool) -> None:
    u, k = draw(2, 3, 9).requires_grad_(), draw(1 + bidirectional, 2, 3, 5, seed=1).requires_grad_()
    torch.library.opcheck(fft_conv_op, (u, k, draw(2, 3, seed=2).requires_grad_(), 0, 0))


def test_it_is_linear_and_moves_with_its_input() -> None:
    u, v, k = draw(1, 2, 70), draw(1, 2, 70, seed=1), draw(2, 30, seed=2)
    torch.testing.assert_close(fft_conv(2 * u - 3 * v, k), 2 * fft_conv(u, k) - 3 * fft_conv(v, k), rtol=0, atol=1e-11)
    moved = torch.nn.functional.pad(u, (9, 0))[..., :70]
    torch.testing.assert_close(fft_conv(moved, k)[..., 9:], fft_conv(u, k)[..., :61], rtol=0, atol=1e-11)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_kept_spectrum_gives_the_same(bidirectional: bool) -> None:
    u, k, skip = draw(3, 4, 90), draw(*((2,) * bidirectional), 2, 4, 90, seed=1), draw(2, 4, seed=2)
    spectrum = kernel_spectrum(k, 90, skip=skip, bidirectional=bidirectional)
    wanted = fft_conv(u, k, skip=skip, bidirectional=bidirectional)
    torch.testing.assert_close(fft_conv(u, spectrum), wanted, rtol=0, atol=1e-11)
    assert fft_conv(u[:0], spectrum).shape == (0, 2, 4, 90)
    with pytest.raises(QuernelError, match="is for inference"):
        fft_conv(u.clone().requires_grad_(), spectrum)
    with pytest.raises(QuernelError, match="that of the spectrum"):
        fft_conv(u[..., :80], spectrum)


def test_half_precision_is_computed_in_float32() -> None:
    u, k = draw(2, 3, 90, dtype=torch.float32), draw(3, 90, seed=1, dtype=torch.float32)
    for half in (torch.float16, torch.bfloat16):
        got = fft_conv(u.to(half), k)
        assert got.dtype == half
        assert torch.equal(got, fft_conv(u.to(half).float(), k).to(half))


@pytest.mark.parametrize("least", [1, 2, 63, 64, 127, 1000, 8185, 9000, 100_000])
def test_sizes_are_large_enough_and_no_larger_than_a_power_of_two(least: int) -> None:
    n = fft_size(least)
    assert least <= n <= 1 << (least - 1).bit_length()
    for factor in (2, 3, 5):
        while n % factor == 0:
            n //= factor
    assert n == 1


def test_the_least_size_is_the_least_that_does_not_wrap() -> None:
    for length, taps, sides in ((7, 7, 1), (7, 3, 1), (7, 9, 1), (7, 7, 2), (7, 3, 2), (1, 4, 2)):
        u, k = draw(1, 1, length), draw(sides, 1, 1, taps, seed=1)
        least = least_size(length, taps, sides)
        wanted = reference.convolved(u, k[0], None, k[1] if sides == 2 else None)
        torch.testing.assert_close(fft_conv_op(u, k, None, least, 0), wanted, rtol=0, atol=1e-11)
        with pytest.raises(QuernelError, match=f"at least {least}"):
            fft_conv_op(u, k, None, least - 1 or -1, 0)


def test_squash_shrinks_and_keeps_signs() -> None:
    k = torch.tensor([-1.0, -0.3, -0.2, 0.0, 0.1, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    y = squash(k, 0.25)
    wanted = torch.tensor([reference.squashed(v, 0.25) for v in k.tolist()], dtype=torch.float64)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert k.grad.tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert torch.equal(squash(k, 0.0), k)


@pytest.mark.parametrize("window", [1, 3, 7])
def test_smooth_averages_with_zeros_beyond_the_ends(window: int) -> None:
    k = draw(2, 3, 9)
    wanted = torch.tensor([[reference.smoothed(row.tolist(), window) for row in head] for head in k], dtype=k.dtype)
    torch.testing.assert_close(smooth(k, window), wanted)
    assert torch.autograd.gradcheck(lambda t: smooth(t, window), (k.requires_grad_(),))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fft_conv(torch.zeros(1, 2, 3, dtype=torch.complex64), torch.zeros(2, 3)), "u must hold real"),
        (lambda: fft_conv(torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(2, 3)), "u must hold real"),
        (lambda: fft_conv(torch.zeros(1, 2, 3), torch.zeros(2, 3, dtype=torch.complex64)), "k must hold real"),
        (lambda: fft_conv(torch.zeros(2, 3), torch.zeros(2, 3)), r"u must have shape \(B, H, L\)"),
        (lambda: fft_conv(torch.zeros(1, 2, 0), torch.zeros(2, 3)), "at least one channel and step"),
        (lambda: fft_conv(torch.zeros(1, 2, 3), torch.zeros(3, 3)), "one kernel for each of the 2 channels"),
        (lambda: fft_conv(torch.zeros(1, 2, 3), torch.zeros(2, 3), bidirectional=True), r"\(2, H, taps\)"),
        (lambda: fft_conv(torch.zeros(1, 2, 3), torch.zeros(2, 0)), "at least one tap"),
        (lambda: fft_conv(torch.zeros(1, 2, 3), torch.zeros(2, 3), n=4), "n must be at least 5"),
        (lambda: fft_conv(torch.zeros(1, 2, 3), torch.zeros(2, 3), block=0), "block"),
        (lambda: fft_conv(torch.zeros(1, 2, 3), torch.zeros(2, 3), skip=torch.zeros(3)), "skip must have"),
        (lambda: kernel_spectrum(torch.zeros(2, 3), 0), "length"),
        (lambda: squash(torch.zeros(2), -0.1), "lam must be at least 0"),
        (lambda: smooth(torch.zeros(2, 5), 4), "window must be odd"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
