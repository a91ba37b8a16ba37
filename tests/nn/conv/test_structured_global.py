"""SGConv and its kernels: the formula, norms, decay, sizes, both sides, streams, extension, refusals."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import MultiScaleKernel, SGConv
from tests.reference import long_conv, sgconv

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(cls: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(*args, **options).eval()


@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("upsample", ["linear", "nearest"])
@pytest.mark.parametrize("scales", range(1, 7))
def test_kernels_are_their_formula(scales: int, upsample: Any, combine: Any) -> None:
    length = 8 * 2 ** (scales - 1)
    kernel = made(MultiScaleKernel, 2, length, 2, 8, (2.0, 3.0), upsample, combine)
    assert (len(kernel.weights), kernel.length) == (scales, length)
    with torch.no_grad():
        for c in range(2):
            for h, decay in enumerate((2.0, 3.0)):
                raw = torch.tensor(sgconv.kernel([w[c, h].tolist() for w in kernel.weights], decay, upsample, combine))
                torch.testing.assert_close(kernel()[c, h], raw / raw.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("l_max", "scales"), [(64, 1), (65, 2), (1000, 5), (1024, 5), (4096, 7), (1, 1), (1025, 6)])
def test_there_are_as_many_scales_as_the_length_needs(l_max: int, scales: int) -> None:
    kernel = MultiScaleKernel(2, l_max)
    assert len(kernel.weights) == scales
    assert kernel.length == 64 * 2 ** (scales - 1) >= l_max


def test_parameters_grow_with_the_logarithm() -> None:
    counts = []
    for power in range(10, 21):
        with torch.device("meta"):
            kernel = MultiScaleKernel(3, 1 << power, heads=2)
        counts.append(sum(p.numel() for p in kernel.parameters()))
        assert counts[-1] == 2 * 3 * 64 * (1 + power - 6)
    assert counts[-1] <= 3 * counts[0]  # for 1024 times the length


@pytest.mark.parametrize("options", [{}, {"combine": "sum"}, {"learnable_decay": True}, {"init": "cos"}])
def test_kernels_start_as_unit_vectors_and_the_norm_stays(options: dict[str, Any]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        kernel = made(MultiScaleKernel, 3, 100, 2, 8, **options)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        torch.testing.assert_close(kernel().norm(dim=-1), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-12)
        first = kernel()
        for w in kernel.weights:
            w.mul_(3)
        torch.testing.assert_close(kernel(), 3 * first)


def test_a_saved_state_gives_the_same_bit_for_bit() -> None:
    mixer, other, x = made(SGConv, 4, 100, kernel_dim=8), SGConv(4, 100, kernel_dim=8).eval(), draw(2, 50, 4)
    other.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), mixer(x))


def test_segments_decay() -> None:
    kernel = made(MultiScaleKernel, 4000, 64 * 16)
    with torch.no_grad():
        rms = [float(part.square().mean().sqrt()) for part in kernel().split([64, 64, 128, 256, 512], -1)]
    for got, wanted in zip(rms, (1, 0.5, 0.20, 0.10, 0.05), strict=True):
        assert got / rms[0] == pytest.approx(wanted, rel=0.1)


def test_decay_differs_from_channel_to_channel() -> None:
    kernel = made(MultiScaleKernel, 3, 32, heads=2000, kernel_dim=8, decay=(1.0, 4.0), upsample="nearest")
    with torch.no_grad():
        k = kernel() * kernel.norm
        rms = torch.stack([part.square().mean(-1).mean(0).sqrt() for part in k.split([8, 8, 16], -1)])
    wanted = torch.tensor([1.0, 2.5, 4.0]) ** -torch.arange(3.0)[:, None]
    torch.testing.assert_close(rms / rms[0], wanted, rtol=0.1, atol=0)


def test_learned_decay_is_a_power_of_the_lag() -> None:
    kernel = made(MultiScaleKernel, 3, 60, 1, 8, (0.5, 1.5), learnable_decay=True)
    assert bool(((kernel.gamma >= 0.5) & (kernel.gamma <= 1.5)).all())
    with torch.no_grad():
        rows = [sgconv.kernel([w[0, h].tolist() for w in kernel.weights], 1.0, "linear") for h in range(3)]
        wanted = torch.tensor(rows) * torch.arange(1, 65) ** -kernel.gamma[:, None]
        torch.testing.assert_close(kernel()[0], wanted / wanted.norm(dim=-1, keepdim=True), **CLOSE)


def test_cosines_have_a_frequency_a_channel() -> None:
    kernel = made(MultiScaleKernel, 5, 64, 2, 16, init="cos")
    for w in kernel.weights:
        assert torch.equal(w[0], w[1])
        waves = torch.cos(2 * torch.pi * torch.arange(5.0)[:, None] * torch.linspace(0, 1, 16))
        found = {next(f for f in range(5) if torch.allclose(row, waves[f], atol=1e-5)) for row in w[0]}
        assert found == set(range(5))


@pytest.mark.parametrize("options", [{}, {"combine": "sum"}, {"learnable_decay": True}])
def test_kernels_are_cut_or_followed_by_zeros(options: dict[str, Any]) -> None:
    kernel = made(MultiScaleKernel, 3, 64, 1, 8, **options)
    with torch.no_grad():
        whole = kernel()
        for length in (1, 7, 8, 9, 30, 64):
            torch.testing.assert_close(kernel(length), whole[..., :length], rtol=1e-6, atol=0)
        assert torch.equal(kernel(80), F.pad(whole, (0, 16)))


@pytest.mark.parametrize("options", [{}, {"upsample": "nearest"}, {"combine": "sum"}, {"learnable_decay": True}])
def test_gradients(options: dict[str, Any]) -> None:
    mixer, x = made(SGConv, 2, 9, kernel_dim=3, **options).double(), draw(1, 9, 2).double().requires_grad_()
    names = [name for name, _ in mixer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))
        return result

    assert torch.autograd.gradcheck(call, (x, *mixer.parameters()))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("glu", [False, True])
def test_the_layer_is_its_formula(bidirectional: bool, glu: bool) -> None:
    options = {"heads": 2, "bidirectional": bidirectional, "glu": glu, "kernel_dim": 4, "norm": True}
    mixer, x = made(SGConv, 3, 12, **options).double(), draw(2, 11, 3).double()
    k = mixer.kernel(11)
    first, later = k.unbind(0) if bidirectional else (k, None)
    y = F.gelu(long_conv.convolved(x.transpose(1, 2), first, mixer.skip, later).flatten(1, 2).transpose(1, 2))
    y = mixer.out(F.layer_norm(y, (6,)))
    wanted = y[..., :3] * torch.sigmoid(y[..., 3:]) if glu else y
    torch.testing.assert_close(mixer(x), wanted)
    assert mixer.skip.shape == (2, 3)
    assert len(mixer.filters.weights[0]) == (4 if bidirectional else 2)


def test_the_convolution_is_a_toeplitz_matrix() -> None:
    mixer, x = made(SGConv, 3, 33, kernel_dim=8, activation="identity").double(), draw(2, 33, 3).double()
    matrix = long_conv.toeplitz(mixer.kernel()[0], 33) + torch.diag_embed(mixer.skip.T.expand(3, 33))
    torch.testing.assert_close(mixer(x), mixer.out(torch.einsum("hts,bsh->bth", matrix, x)))


def test_no_gradient_comes_from_later_tokens() -> None:
    mixer, x = made(SGConv, 3, 64, kernel_dim=8), draw(1, 50, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[:, 20].sum(), x)
    size = gradient.abs().amax((0, 2))
    assert float(size[21:].max()) <= 1e-6 * float(size.max())
    assert float(size[:21].min()) > 0


@pytest.mark.parametrize("online", [False, True])
def test_streams_give_the_same(online: bool) -> None:
    mixer, x = made(SGConv, 3, 100, heads=2, kernel_dim=8), draw(2, 100, 3)
    with torch.no_grad():
        state, steps = mixer.init_state(2, online=online), []
        for t in range(100):
            y, state = mixer.step(x[:, t], state)
            steps.append(y)
        torch.testing.assert_close(torch.stack(steps, 1), mixer(x), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"combine": "sum"}, {"learnable_decay": True}, {"bidirectional": True}])
def test_an_extended_mixer_gives_the_same_on_old_lengths(options: dict[str, Any]) -> None:
    mixer, x = made(SGConv, 3, 30, kernel_dim=8, **options), draw(2, 64, 3)
    before = copy.deepcopy(mixer.state_dict())
    longer = mixer.extended()
    assert (longer.l_max, longer.filters.length, len(longer.filters.weights)) == (64, 64, 4)
    with torch.no_grad():
        torch.testing.assert_close(longer(x[:, :32]), mixer(x[:, :32]), rtol=1e-5, atol=1e-6)
    longer(x).sum().backward()
    assert float(longer.filters.weights[-1].grad.abs().max()) > 0
    assert all(torch.equal(before[n], v) for n, v in mixer.state_dict().items())
    again = SGConv.from_config(longer.config())
    again.load_state_dict(longer.state_dict())


def test_longer_inputs_are_convolved_with_one_warning() -> None:
    mixer, x = made(SGConv, 3, 16, kernel_dim=8, activation="identity"), draw(2, 40, 3)
    with pytest.warns(UserWarning, match="40 tokens, more than the 16 taps"):
        y = mixer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer(x)
        mixer(x[:, :16])
    u = long_conv.convolved(x.transpose(1, 2), mixer.kernel().detach(), mixer.skip.detach())[:, 0]
    torch.testing.assert_close(y, mixer.out(u.transpose(1, 2)), **CLOSE)


def test_kernels_train_slowly_and_do_not_decay() -> None:
    mixer = SGConv(3, 30, kernel_dim=8, learnable_decay=True)
    kernels, rest = mixer.param_groups(0.01)
    assert (kernels["lr"], kernels["weight_decay"], rest["lr"]) == (1e-3, 0.0, 0.01)
    assert {id(p) for p in kernels["params"]} == {id(p) for p in (*mixer.filters.weights, mixer.filters.gamma)}
    assert mixer.param_groups(1e-4)[0]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SGConv(3, 0), "l_max"),
        (lambda: SGConv(3, 8, kernel_dim=0), "kernel_dim"),
        (lambda: SGConv(3, 8, decay=(0.0, 2.0)), "decay"),
        (lambda: SGConv(3, 8, decay=(2.0, -1.0)), "decay"),
        (lambda: SGConv(3, 8, decay=2.0), "decay must be two numbers"),
        (lambda: SGConv(3, 8, decay=(1.0, 2.0, 3.0)), "decay must be two numbers"),
        (lambda: SGConv(3, 8, upsample="cubic"), "upsample"),
        (lambda: SGConv(3, 8, combine="mean"), "combine"),
        (lambda: SGConv(3, 8, init="zeros"), "init"),
        (lambda: SGConv(3, 8, activation="tanh"), "activation"),
        (lambda: SGConv(3, 8, bidirectional=True).init_state(1), "bidirectional=False"),
        (lambda: SGConv(3, 8)(torch.zeros(1, 8, 3, dtype=torch.int64)), "x must hold real floating-point"),
        (lambda: SGConv(3, 8).step(torch.zeros(2, 3), torch.zeros(1, 3, 0)), "state must hold .* of 2 streams"),
        (lambda: SGConv(3, 8).step(torch.zeros(2, 3), "start"), "state must hold .*; got str"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
    assert issubclass(QuernelError, ValueError)
