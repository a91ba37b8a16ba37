"""Activation quantisers against their definition: the ends of alpha, no clipping, dominance, true zeros."""

import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional.activation_quant import (
    activation_step,
    fake_quantize,
    quantization_kernel,
    quantize_activations,
)

GENERATOR = torch.Generator().manual_seed(0)
NORMAL = torch.randn(64, 48, generator=GENERATOR)
HEAVY = NORMAL / (torch.randn(64, 48, generator=GENERATOR) ** 2 + torch.randn(64, 48, generator=GENERATOR) ** 2).sqrt()
OUTLIER = NORMAL.clone()
OUTLIER[3, 7] = 1e4
INPUTS = {"normal": NORMAL, "student t": HEAVY, "one-hot outlier": OUTLIER}


def per_token(x, bits):
    q = 2 ** (bits - 1) - 1
    step = x.abs().amax(1, keepdim=True) / q
    return (x / step).round().clamp(-q, q) * step


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_alpha_1_is_per_token_bit_for_bit(x, bits):
    assert torch.equal(fake_quantize(x, bits=bits, alpha=1.0), per_token(x, bits))
    assert torch.equal(fake_quantize(x, bits=bits, scheme="token"), per_token(x, bits))


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_alpha_0_is_per_channel(x):
    assert torch.equal(fake_quantize(x, alpha=0.0), per_token(x.T, 8).T)


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_nothing_is_ever_clipped(x, alpha):
    # pow rounds, so a maximum may lie a hair beyond q.
    assert (x / activation_step(x, alpha=alpha)).abs().max() <= 127 + 1e-3


def test_zero_rows_and_columns_are_finite():
    x = NORMAL.clone()
    x[4], x[:, 9] = 0, 0
    for alpha in (0.0, 0.15, 1.0):
        y = fake_quantize(x, alpha=alpha)
        assert y.isfinite().all() and (y[4] == 0).all() and (y[:, 9] == 0).all()
    assert (fake_quantize(torch.zeros(3, 4)) == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_what_survives_per_token_survives_crossquant_where_the_channel_is_smaller(x, alpha):
    token = x.abs().amax(1, keepdim=True).expand_as(x)
    channel = x.abs().amax(0).expand_as(x)
    step = activation_step(x, scheme="token")
    tie = ((x / step).abs() - 0.5).abs() < 1e-4
    nonzero = quantize_activations(x, step) != 0
    kept = quantize_activations(x, activation_step(x, alpha=alpha)) != 0
    assert kept[(channel <= token) & nonzero & ~tie].all()


def test_kernel_shrinks_on_the_outlier_construction():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator)
    x[:, torch.randperm(1024, generator=generator)[:5]] *= 100
    # Measured: 45 % per token, 1.8 % for CrossQuant.
    assert 0.4 < quantization_kernel(x, scheme="token") < 0.5
    assert 0.01 < quantization_kernel(x, scheme="cross") < 0.03


def test_true_zeros_are_counted_apart():
    x = torch.relu(NORMAL)
    zeros = float((x == 0).float().mean())
    assert quantization_kernel(x) >= zeros
    assert quantization_kernel(x, ignore_zeros=True) < quantization_kernel(x) - zeros / 2
    assert quantization_kernel(torch.zeros(2, 2), ignore_zeros=True) == 0.0
    assert quantization_kernel(torch.zeros(2, 2)) == 1.0


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: fake_quantize(NORMAL, alpha=1.1), "alpha"),
        (lambda: fake_quantize(NORMAL, bits=9), "bits"),
        (lambda: fake_quantize(NORMAL, scheme="row"), "scheme"),
        (lambda: fake_quantize(NORMAL / 0), "NaN or inf"),
        (lambda: quantization_kernel(torch.arange(3)), "floating"),
        (lambda: quantization_kernel(torch.empty(0, 3)), "non-empty"),
    ],
)
def test_bad_input_is_refused(call, word):
    with pytest.raises(QuernelError, match=word):
        call()


def test_dtypes_pass_through():
    assert fake_quantize(NORMAL.bfloat16()).dtype == torch.bfloat16
    assert fake_quantize(NORMAL.double()).dtype == torch.float64
