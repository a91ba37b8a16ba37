"""Fourier transforms by small matrices: definitions, inverses, convolutions, learned ones, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn.functional import (
    butterfly_dft,
    dft_matrix,
    fft_conv,
    monarch_conv,
    monarch_dft,
    monarch_factors,
    monarch_idft,
)
from tests.reference import long_conv as reference

SIZES = [1 << power for power in range(4, 13)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_matrix_is_its_definition() -> None:
    wanted = reference.spectrum(torch.eye(16))
    torch.testing.assert_close(dft_matrix(16, dtype=torch.complex128), wanted)


@pytest.mark.parametrize("factors", [(8,), (2, 4), (4, 2), (2, 2, 2), (3, 5), (5, 2, 3)])
def test_places_hold_their_frequencies(factors: tuple[int, ...]) -> None:
    n = torch.Size(factors).numel()
    x, wanted = draw(3, n), reference.spectrum(draw(3, n))
    z = monarch_dft(x, factors).view(3, *factors)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in factors)).view(-1, len(factors)).tolist():
        frequency, step = 0, 1
        for at, size in zip(place, factors, strict=True):
            frequency, step = frequency + step * at, step * size
        torch.testing.assert_close(z[(slice(None), *place)], wanted[:, frequency])
    torch.testing.assert_close(monarch_idft(z.flatten(1), factors).real, x)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("n", SIZES)
def test_convolutions_are_those_by_fft(n: int, order: int) -> None:
    u, k = draw(2, 3, n // 2, dtype=torch.float32), draw(3, n // 2, seed=1, dtype=torch.float32) / n**0.5
    wanted = fft_conv(u.double(), k.double())
    for got in (monarch_conv(u, k, order=order), monarch_conv(u, k, three_pass=True)):
        assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_both_sides_and_heads() -> None:
    u, k = draw(2, 3, 11), draw(2, 2, 3, 11, seed=1)
    for three_pass in (False, True):
        got = monarch_conv(u, k, bidirectional=True, three_pass=three_pass)
        torch.testing.assert_close(got, fft_conv(u, k, bidirectional=True))


@pytest.mark.parametrize("n", [8, 16, 32, 64])
def test_given_matrices_are_used_as_they_stand(n: int) -> None:
    sizes = {min(n, 16), n // 16 if n > 16 else n}
    matrices = {size: torch.complex(draw(size, size, seed=size), draw(size, size, seed=size + 1)) for size in sizes}
    x = torch.complex(draw(1, n), draw(1, n, seed=1))
    wanted = reference.butterfly(x[0].tolist(), {size: m.tolist() for size, m in matrices.items()})
    torch.testing.assert_close(butterfly_dft(x, matrices)[0], torch.tensor(wanted, dtype=torch.complex128))


def test_matrices_a_channel_meet_their_own() -> None:
    matrices = {s: torch.complex(draw(3, s, s, seed=s), draw(3, s, s, seed=s + 1)) for s in (16, 4)}
    x = torch.complex(draw(2, 3, 64), draw(2, 3, 64, seed=1))
    got = butterfly_dft(x, matrices)
    for h in range(3):
        torch.testing.assert_close(got[:, h], butterfly_dft(x[:, h], {s: m[h] for s, m in matrices.items()}))


def test_gradients() -> None:
    u, k = draw(1, 2, 5).requires_grad_(), draw(2, 5, seed=1).requires_grad_()
    for order in (2, 3):
        assert torch.autograd.gradcheck(lambda u, k, order=order: monarch_conv(u, k, order=order), (u, k))
    assert torch.autograd.gradcheck(lambda u, k: monarch_conv(u, k, three_pass=True), (u, k))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: monarch_factors(24), "n must be a power of two"),
        (lambda: monarch_factors(8, order=4), r"at least 2\^order"),
        (lambda: monarch_dft(torch.zeros(8), (2, 2)), "product 8"),
        (lambda: monarch_idft(torch.zeros(8, dtype=torch.complex64), ()), "product 8"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
