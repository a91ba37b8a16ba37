"""LongConv, its block and H3Conv: the formulas, regularised kernels, both sides, streams, transforms, refusals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import H3Conv, LearnedButterfly, LongConv, LongConvBlock, LongKernel, MonarchFFT, make_mixer
from quernel.nn.conv._online import BLOCK
from quernel.nn.functional import fft_conv
from tests.reference import long_conv as reference

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(cls: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(*args, **options).eval()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_layer_is_its_formula(bidirectional: bool) -> None:
    mixer, x = made(LongConv, 4, 12, heads=2, init="double_exp", bidirectional=bidirectional).double(), draw(3, 9, 4)
    x = x.double()
    k = mixer.kernel(9)
    first, later = k.unbind(0) if bidirectional else (k, None)
    y = reference.convolved(x.transpose(1, 2), first, mixer.skip, later)  # (B, c, C, N)
    y = F.gelu(y.flatten(1, 2).transpose(1, 2))
    a, b = (y @ mixer.out.weight.T + mixer.out.bias).chunk(2, -1)
    torch.testing.assert_close(mixer(x), a * torch.sigmoid(b))
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), a * torch.sigmoid(b))
    assert mixer.causal != bidirectional


@pytest.mark.parametrize("window", [None, 3])
def test_kernels_are_smoothed_then_squashed_then_dropped(window: int | None) -> None:
    kernel = made(LongKernel, 3, 20, lam=0.0007, smooth_window=window, kernel_dropout=0.5)
    with torch.no_grad():
        rows = [reference.smoothed(row, window or 1) for row in kernel.taps[0].tolist()]
        wanted = torch.tensor([[reference.squashed(v, 0.0007) for v in row] for row in rows])
        torch.testing.assert_close(kernel()[0], wanted, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(kernel(5), kernel()[..., :5])
        kernel.train()
        first, second = kernel()[0], kernel()[0]
    kept = first != 0
    assert 0.2 < float(kept.double().mean()) / float((wanted != 0).double().mean()) < 0.8
    torch.testing.assert_close(first[kept], 2 * wanted[kept], rtol=1e-4, atol=1e-8)
    assert not torch.equal(first, second)


def test_automatic_lambda_is_half_of_what_taps_start_with() -> None:
    assert LongKernel(8, 100).lam == pytest.approx(0.001)
    assert LongKernel(8, 100, smooth_window=9).lam == pytest.approx(0.001 / 3)
    torch.manual_seed(0)
    for options in ({}, {"init": "double_exp"}, {"smooth_window": 5}, {"kernel_type": "multiscale"}):
        kernel = LongKernel(32, 512, kernel_dropout=0.0, lam=0.0, **options)
        std = float(kernel().detach().double().square().mean().sqrt())
        assert LongKernel(32, 512, **options).lam == pytest.approx(std / 2, rel=0.05), options


def test_the_exponential_start_decays_at_a_speed_a_channel() -> None:
    torch.manual_seed(0)
    kernel = LongKernel(8, 4000, heads=50, lam=0.0, kernel_dropout=0.0, init="double_exp")
    with torch.no_grad():
        rms = kernel().square().mean(0).sqrt().unflatten(-1, (40, 100)).square().mean(-1).sqrt()  # (8, 40)
    places = (torch.arange(40) + 0.5) / 40
    wanted = 0.02 * torch.exp(-places * (4 ** (torch.arange(8) / 8))[:, None])
    torch.testing.assert_close(rms, wanted, rtol=0.06, atol=0)


def test_lambda_can_rise() -> None:
    mixer = made(LongConv, 4, 30)
    with torch.no_grad():
        mixer.warm_up(0.0)
        assert torch.equal(mixer.kernel(), mixer.filters.taps)
        mixer.warm_up(0.5)
        torch.testing.assert_close(mixer.kernel().count_nonzero(), (mixer.filters.taps.abs() > 5e-4).sum())
        y = mixer(draw(1, 30, 4))
        mixer.warm_up(1.0)
        # The kept spectrum knows.
        assert not torch.equal(mixer(draw(1, 30, 4)), y)
    with pytest.raises(QuernelError, match="share"):
        mixer.warm_up(1.5)


def test_a_dead_start_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"lam=0\.1 sets 100\.0% of the taps to zero"):
        LongConv(4, 50, lam=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, {"lam": 0.003}, {"init": "double_exp"}, {"smooth_window": 7}):
            LongConv(4, 50, **options)


def test_dead_taps_get_no_gradient_and_training_reaches_the_others() -> None:
    mixer = made(LongConv, 4, 30, kernel_dropout=0.0).train()
    mixer(draw(2, 30, 4)).square().sum().backward()
    alive = mixer.filters.taps.abs() > mixer.filters.lam
    assert 0 < int(alive.sum()) < alive.numel()
    assert torch.equal(mixer.filters.taps.grad != 0, alive)


def test_spectra_follow_the_parameters_the_length_and_the_mode() -> None:
    mixer, x = made(LongConv, 4, 40), draw(2, 30, 4)
    with torch.no_grad():
        before = mixer(x)
        assert torch.equal(mixer(x), before)
        torch.testing.assert_close(mixer(x[:, :17]), before[:, :17], **CLOSE)
        mixer.filters.taps.mul_(3)
        mixer.skip.add_(1)
        after = mixer(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, mixer(x).detach(), **CLOSE)
    with torch.inference_mode():
        torch.testing.assert_close(mixer(x), after, **CLOSE)
    mixer.train()
    assert not torch.equal(mixer(x), mixer(x))


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 4)])
def test_tokens_of_several_axes_count_row_by_row(shape: tuple[int, ...]) -> None:
    mixer, x = made(LongConv, 4, 40), draw(2, *shape, 4)
    torch.testing.assert_close(mixer(x).flatten(1, -2), mixer(x.flatten(1, -2)), **CLOSE)


@pytest.mark.parametrize(("taps", "prefix"), [(5 * BLOCK, 0), (5 * BLOCK, 1), (5 * BLOCK, BLOCK + 5), (BLOCK // 2, 7)])
def test_worked_ahead_streams_give_the_same(taps: int, prefix: int) -> None:
    mixer = made(LongConv, 3, 5 * BLOCK, heads=2, init="double_exp")
    mixer.filters.taps.data[..., taps:] = 0
    x = draw(2, 5 * BLOCK, 3)
    with torch.no_grad():
        wanted, state, steps = mixer(x), mixer.init_state(2, online=True), []
        if prefix:
            y, state = mixer(x[:, :prefix], state=state)
            steps += list(y.unbind(1))
        for t in range(prefix, x.shape[1]):
            y, state = mixer.step(x[:, t], state)
            steps.append(y)
        torch.testing.assert_close(torch.stack(steps, 1), wanted, **CLOSE)
        with pytest.raises(QuernelError, match=f"room for {5 * BLOCK} tokens"):
            mixer.step(x[:, 0], state)


def test_a_window_moves_on_beyond_the_longest_input() -> None:
    mixer, x = made(LongConv, 3, 8, init="double_exp").double(), draw(1, 20, 3).double()
    state, steps = mixer.init_state(1, dtype=torch.float64), []
    with torch.no_grad():
        for t in range(20):
            y, state = mixer.step(x[:, t], state)
            steps.append(y)
        y = mixer._finished(fft_conv(x.transpose(1, 2), mixer.kernel(), skip=mixer.skip))
    torch.testing.assert_close(torch.stack(steps, 1), y)
    assert state.shape == (1, 3, 7)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("butterfly", ["monarch", "learned"])
def test_other_transforms_start_as_the_same_layer(butterfly: Any, bidirectional: bool) -> None:
    options = {"heads": 2, "init": "double_exp", "bidirectional": bidirectional}
    mixer, x = made(LongConv, 3, 24, butterfly=butterfly, **options), draw(2, 19, 3)
    plain = made(LongConv, 3, 24, **options)
    torch.testing.assert_close(mixer(x), plain(x), **CLOSE)
    assert mixer.causal == (butterfly == "monarch" and not bidirectional)
    groups = mixer.param_groups(0.01)
    assert [group["lr"] for group in groups] == [1e-3, 0.01] if butterfly == "monarch" else [1e-3, 1e-3, 0.01]
    assert all(group["weight_decay"] == 0 for group in groups[:-1])


@pytest.mark.parametrize("init", ["exact", "additive"])
@pytest.mark.parametrize("n", [1 << power for power in range(1, 13)])
def test_learned_transforms_start_as_the_convolution(n: int, init: Any) -> None:
    layer = made(LearnedButterfly, n, mats=3, init=init)
    if init == "additive":
        for p in layer.parameters():
            p.data.zero_()
    u, k = draw(2, 3, max(n // 2, 1)), draw(2, 3, max(n // 2, 1), seed=1) / n**0.5
    wanted = fft_conv(u.double(), k.double())
    assert float((layer(u, k).detach() - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_trained_transforms_are_their_matrices() -> None:
    layer = made(LearnedButterfly, 64, init="additive").double()
    u, k = draw(1, 1, 30).double(), draw(1, 1, 20, seed=1).double()
    spectra = []
    for x, of in ((u, "inputs"), (k, "kernels")):
        matrices = {size: layer.matrix(size, of)[0].tolist() for size in (16, 4)}
        padded = F.pad(x, (0, 64 - x.shape[-1]))[0, 0]
        spectra.append(torch.tensor(reference.butterfly(padded.tolist(), matrices), dtype=torch.complex128))
    wanted = torch.fft.ifft(spectra[0] * spectra[1]).real[:30]
    torch.testing.assert_close(layer(u, k)[0, 0, 0], wanted)
    assert float((wanted - fft_conv(u, k[0])[0, 0]).abs().max()) > 1e-3
    curved = made(LearnedButterfly, 64, nonlinearity="relu").double()
    assert not torch.allclose(curved(u, k), curved(2 * u, k) / 3)


def test_learned_transforms_train() -> None:
    layer = made(LearnedButterfly, 8).double()
    u, k = draw(1, 1, 4).double().requires_grad_(), draw(1, 1, 4, seed=1).double().requires_grad_()
    held = tuple(layer.parameters())

    def call(u: Tensor, k: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in layer.named_parameters()), values, strict=True))
        result: Tensor = torch.func.functional_call(layer, named, (u, k))
        return result

    assert torch.autograd.gradcheck(call, (u, k, *held))


def test_the_monarch_module_names_its_frequencies() -> None:
    x = draw(2, 64)
    for order in (1, 2, 3):
        transform = MonarchFFT(64, order)
        torch.testing.assert_close(transform(x), torch.fft.fft(x)[..., transform.frequencies()], **CLOSE)
        torch.testing.assert_close(transform.inverse(transform(x)).real, x, **CLOSE)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("prenorm", [True, False])
def test_blocks_are_their_formulas(norm: Any, prenorm: bool) -> None:
    block, x = made(LongConvBlock, 4, 12, norm=norm, prenorm=prenorm), draw(2, 9, 4)
    plain = LongConv(4, 12).eval()
    plain.load_state_dict({n: v for n, v in block.state_dict().items() if not n.startswith("standard")})
    if norm == "batch":
        block.standard.running_mean.copy_(draw(4, seed=3))

    def standardised(x: Tensor) -> Tensor:
        return block.standard(x.transpose(1, 2)).transpose(1, 2) if norm == "batch" else block.standard(x)

    wanted = x + plain(standardised(x)) if prenorm else standardised(x + plain(x))
    torch.testing.assert_close(block(x), wanted, **CLOSE)


@pytest.mark.parametrize("prenorm", [True, False])
def test_masked_tokens_do_not_reach_earlier_ones_through_a_bias(prenorm: bool) -> None:
    block, x = made(LongConvBlock, 4, 12, prenorm=prenorm, bidirectional=True, init="double_exp"), draw(2, 9, 4)
    block.standard.bias.data.fill_(1.0)
    mask = torch.arange(9).expand(2, 9) < 6
    torch.testing.assert_close(block(x, mask=mask)[:, :6], block(x[:, :6]), **CLOSE)


def test_dropout_leaves_out_whole_channels() -> None:
    mixer = made(LongConv, 6, 12, dropout=0.5, kernel_dropout=0.0).train()
    mixer.out.weight.data.zero_()
    mixer.out.weight.data[:6] = torch.eye(6)
    mixer.out.bias.data.fill_(0.0)
    y = 2 * mixer(draw(4, 9, 6))  # the gate is 1 / 2
    gone = (y == 0).all(1)
    assert 0 < int(gone.sum()) < gone.numel()
    assert torch.equal((y == 0).any(1), gone)


def test_h3_is_its_formula() -> None:
    mixer, x = made(H3Conv, 4, 12, init="double_exp").double(), draw(2, 9, 4).double()
    q, k, v = (x @ mixer.qkv.weight.T + mixer.qkv.bias).transpose(1, 2).chunk(3, 1)
    first, second = (f().detach() for f in mixer.filters)
    s = reference.convolved(k, first, mixer.skips[0])[:, 0]
    z = reference.convolved(s * v, second, mixer.skips[1])[:, 0]
    wanted = (q * z).transpose(1, 2) @ mixer.out.weight.T + mixer.out.bias
    torch.testing.assert_close(mixer(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), wanted)
    groups = mixer.param_groups(0.01)
    assert groups[0] == {"params": list(mixer.filters.parameters()), "lr": 1e-3, "weight_decay": 0.0}


def test_h3_takes_structured_kernels_and_masks() -> None:
    mixer, x = made(H3Conv, 4, 100, kernel_type="multiscale"), draw(2, 70, 4)
    assert sum(p.numel() for p in mixer.filters.parameters()) == 2 * 2 * 4 * 64
    mask = torch.arange(70).expand(2, 70) >= 5
    late = x.masked_fill(~mask[..., None], 7.0)
    with torch.no_grad():
        torch.testing.assert_close(mixer(late, mask=mask)[:, 5:], mixer(x[:, 5:]), **CLOSE)
    mixer.warm_up(0.0)
    assert all(float(f.strength) == 0 for f in mixer.filters)


def started() -> LongConv:
    return made(LongConv, 4, 8)


def online(mixer: LongConv, batch: int) -> Any:
    """Return a state of so many streams after one token."""
    return mixer.step(draw(batch, 4), mixer.init_state(batch, online=True))[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LongConv(4, 8)(draw(1, 9, 4)), "at most 8 tokens"),
        (lambda: H3Conv(4, 8)(draw(1, 9, 4)), "at most 8 tokens"),
        (lambda: LongConv(4, 0), "l_max"),
        (lambda: LongConv(4, 8, lam=-1.0), "lam"),
        (lambda: LongConv(4, 8, heads=0), "heads"),
        (lambda: LongConv(4, 8, init="s4"), "init"),
        (lambda: LongConv(4, 8, smooth_window=4), "smooth_window must be odd"),
        (lambda: LongConv(4, 8, kernel_dropout=1.0), "kernel_dropout"),
        (lambda: LongConv(4, 8, butterfly="fast"), "butterfly"),
        (lambda: LongConv(4, 8, kernel_type="dense"), "kernel_type"),
        (lambda: LongConv(4, 8, bidirectional=True).init_state(1), "bidirectional=False"),
        (lambda: LongConv(4, 8, butterfly="learned").init_state(1), "recurrent form"),
        (lambda: LongConv(4, 8)(torch.zeros(1, 8, 4, dtype=torch.complex64)), "x must hold real floating-point"),
        (lambda: LongConv(4, 8)(torch.zeros(1, 8, 4, dtype=torch.int64)), "x must hold real floating-point"),
        (lambda: H3Conv(4, 8)(torch.zeros(1, 8, 4, dtype=torch.complex64)), "x must hold real floating-point"),
        (lambda: H3Conv(4, 8)(torch.zeros(1, 8, 4, dtype=torch.int64)), "x must hold real floating-point"),
        (lambda: LongConv(4, 8).step(draw(2, 4), LongConv(4, 8).init_state(3)), "state must hold .* of 2 streams"),
        (lambda: LongConv(4, 8).step(draw(2, 4), (draw(2, 4, 1),)), "state must hold .*; got tuple"),
        (lambda: LongConv(4, 8).step(draw(2, 4), 5), "state must hold .*; got int"),
        (lambda: LongConv(4, 8).step(draw(2, 4), None), "state must come from init_state"),
        (lambda: started().step(draw(2, 4), online(started(), 3)), "state must hold .* of 2 streams"),
        (lambda: H3Conv(4, 8).step(draw(2, 4), H3Conv(4, 8).init_state(3)), "state must hold .* of 2 streams"),
        (lambda: H3Conv(4, 8).step(draw(2, 4), (draw(2, 4, 0), 1)), "state must hold .*; got int"),
        (lambda: H3Conv(4, 8).step(draw(2, 4), 3), "two windows of init_state; got int"),
        (lambda: LongConvBlock(4, 8, norm="group"), "norm"),
        (lambda: LearnedButterfly(24), "power of two"),
        (lambda: LearnedButterfly(8)(draw(1, 1, 9), draw(1, 1, 8)), "at most n=8"),
        (lambda: LearnedButterfly(8, mats=2)(draw(1, 3, 8), draw(1, 3, 8)), "mats"),
        (lambda: H3Conv(4, 8).step(draw(1, 4), (draw(1, 4, 0),)), "two windows"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()


@pytest.mark.parametrize("system", ["long-conv", "sgconv"])
def test_what_comes_later_shows_in_rounding_only_but_a_nan_everywhere(system: str) -> None:
    torch.manual_seed(0)
    mixer = make_mixer(system, 8, l_max=256).eval()
    x = torch.randn(1, 256, 8)
    loud, lost = x.clone(), x.clone()
    loud[0, 128] *= 1e5
    lost[0, 128] = float("nan")
    with torch.no_grad():
        before, after, nothing = mixer(x)[:, :128], mixer(loud)[:, :128], mixer(lost)
    # The transform rounds every output by the largest value of the sequence.
    assert (after - before).abs().max() <= 1e-6 * loud.abs().max()
    assert nothing.isnan().all()
