"""Cached spectra: decomposed once a weight, afresh after an edit, bounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quernel.compress.lowrank import _spectra
from quernel.compress.lowrank._spectra import spectrum_of, weight_digest, whitened_spectrum

CLOSE = 1e-5


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Start with an empty cache and list the weights that were really decomposed."""
    calls: list[Tensor] = []
    real = _spectra.singular_values

    def counting(weight: Tensor) -> Tensor:
        calls.append(weight)
        return real(weight)

    monkeypatch.setattr(_spectra, "singular_values", counting)
    _spectra.forget()
    return calls


def test_a_weight_is_decomposed_once(decomposed: list[Tensor]) -> None:
    weight = torch.randn(12, 8)
    first, second = spectrum_of(weight), spectrum_of(weight.clone())
    assert len(decomposed) == 1
    assert np.array_equal(first, second)
    np.testing.assert_allclose(first, torch.linalg.svdvals(weight).numpy(), rtol=CLOSE)


def test_an_edited_weight_is_decomposed_afresh(decomposed: list[Tensor]) -> None:
    weight = torch.randn(12, 8)
    spectrum_of(weight)
    weight[3, 4] += 1e-3
    spectrum_of(weight)
    assert len(decomposed) == 2


def test_oldest_spectra_leave_first(decomposed: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_spectra, "CAPACITY", 2)
    a, b, c = (torch.randn(4, 4) for _ in range(3))
    for weight in (a, b, a, c, a):  # b is the one not used for longest
        spectrum_of(weight)
    assert len(decomposed) == 3
    spectrum_of(b)
    assert len(decomposed) == 4


def test_nobody_can_change_a_cached_spectrum() -> None:
    with pytest.raises(ValueError, match="read-only"):
        spectrum_of(torch.randn(4, 4))[0] = 0.0


def test_digest_sees_dtype_and_shape() -> None:
    zeros = torch.zeros(4, 6)
    digests = {weight_digest(z) for z in (zeros, zeros.T, zeros.reshape(2, 12), zeros.bfloat16(), zeros.double())}
    assert len(digests) == 5
    assert weight_digest(zeros) == weight_digest(zeros.T.contiguous().T)


def test_whitened_spectrum_of_white_inputs_is_the_plain_one() -> None:
    weight = torch.randn(12, 8)
    ratio = whitened_spectrum(weight, 5.0 * torch.eye(8)) / spectrum_of(weight)
    np.testing.assert_allclose(ratio, ratio[0], rtol=CLOSE)
