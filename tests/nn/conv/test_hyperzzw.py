"""HyperZ.Z.W mixers: the operators by their definitions, independence of images, kept kernels, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import HyperZZWGlobal, HyperZZWLocal
from quernel.nn.conv.hyperzzw import two_elementwise
from tests.reference import hyperzzw as reference

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(cls: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(*args, **options).eval()


def test_the_global_product_is_a_sum_over_the_rows() -> None:
    mixer, x = made(HyperZZWGlobal, 3, 4, hidden=5), draw(2, 4, 4, 3)
    z = x.movedim(-1, 1)
    wanted = reference.product(z * mixer.kernel(), z)
    torch.testing.assert_close(mixer(x).movedim(-1, 1), wanted, **CLOSE)
    torch.testing.assert_close(wanted, torch.einsum("bcit,bctj->bcij", z * mixer.kernel(), z), **CLOSE)


def test_the_elementwise_forms() -> None:
    mixer, x = made(HyperZZWGlobal, 3, 4, "hadamard", hidden=5), draw(2, 4, 4, 3)
    z = x.movedim(-1, 1)
    torch.testing.assert_close(mixer(x).movedim(-1, 1), z * mixer.kernel() * z)
    assert torch.equal(two_elementwise(z, x.movedim(-1, 1)), z * z * z)


def test_the_local_convolution_is_its_formula() -> None:
    mixer, x = made(HyperZZWLocal, 4, 3, hidden=5), draw(2, 5, 6, 4)
    z = x.movedim(-1, 1)
    mixer.norm.running_mean.copy_(draw(4))
    mixer.bias.data.fill_(0.3)
    for b in range(2):
        w = mixer.slow(z[b : b + 1])[0]  # (C, 3, 3)
        y = torch.zeros(4, 5, 6)
        padded = F.pad(z[b], (1, 1, 1, 1))
        for i in range(3):
            for j in range(3):
                y += w[:, i, j, None, None] * padded[:, i : i + 5, j : j + 6]
        y = torch.einsum("oc,chw->ohw", mixer.mix.weight[:, :, 0, 0], y) + mixer.mix.bias[:, None, None]
        y = (y - mixer.norm.running_mean[:, None, None]) / (mixer.norm.running_var[:, None, None] + 1e-5).sqrt()
        torch.testing.assert_close(mixer(x)[b].movedim(-1, 0), F.gelu(y) + 0.3, **CLOSE)


def test_an_image_by_itself_is_as_beside_others() -> None:
    mixer, x = made(HyperZZWLocal, 4, 3, hidden=5), draw(3, 5, 5, 4)
    torch.testing.assert_close(mixer(x)[1:2], mixer(x[1:2]), **CLOSE)


def test_context_of_the_batch_is_that_of_the_sample_among_equals() -> None:
    one = made(HyperZZWLocal, 4, 3, hidden=5)
    other = HyperZZWLocal(4, 3, "batch", hidden=5).eval()
    other.load_state_dict(one.state_dict())
    x = draw(1, 5, 5, 4).expand(3, -1, -1, -1)
    torch.testing.assert_close(one(x), other(x), **CLOSE)
    mixed = torch.cat([x[:1], 3 * draw(2, 5, 5, 4, seed=1)])
    assert float((other(mixed)[0] - other(x)[0]).abs().max()) > 1e-3


def test_statistics_in_eval_mode() -> None:
    x = draw(4, 5, 5, 4)
    running, batch = (made(HyperZZWLocal, 4, 3, hidden=5, eval_stats=s) for s in ("running", "batch"))
    assert batch.norm.running_mean is None
    torch.testing.assert_close(running(x)[:1], running(x[:1]), **CLOSE)
    assert float((batch(x)[:1] - batch(x[:1])).abs().max()) > 1e-3


@pytest.mark.parametrize("context", ["sample", "batch", "none"])
def test_gradients(context: Any) -> None:
    mixer = made(HyperZZWLocal, 2, 3, context, hidden=3, layers=1).double()
    if context != "none":
        mixer.slow.keep.data.zero_()
    assert torch.autograd.gradcheck(mixer, (draw(2, 3, 4, 2).double().requires_grad_(),))


@pytest.mark.parametrize("mode", ["matmul", "hadamard"])
def test_gradients_of_the_global_form(mode: Any) -> None:
    mixer = made(HyperZZWGlobal, 2, 3, mode, hidden=3, layers=1).double()
    assert torch.autograd.gradcheck(mixer, (draw(2, 3, 3, 2).double().requires_grad_(),))


@pytest.mark.parametrize("context", ["sample", "batch", "none"])
def test_masked_places_are_left_out_of_the_content(context: Any) -> None:
    mixer, x = made(HyperZZWLocal, 4, 1, context, hidden=6), draw(2, 5, 6, 4)
    mask = torch.ones(2, 5, 6, dtype=torch.bool)
    mask[:, 3:], mask[:, :, 4:] = False, False
    # With one cell the content is the mean, that of the smaller image.
    torch.testing.assert_close(mixer(x, mask=mask)[:, :3, :4], mixer(x[:, :3, :4]), **CLOSE)
    wide = made(HyperZZWLocal, 4, 3, context, hidden=6)
    torch.testing.assert_close(wide(x, mask=torch.ones_like(mask)), wide(x), **CLOSE)
    assert wide(x, mask=torch.zeros_like(mask)).isfinite().all()


@pytest.mark.parametrize("cls", [HyperZZWGlobal, HyperZZWLocal])
def test_autocast_leaves_the_kernel_in_full_precision(cls: Any) -> None:
    """A kernel kept within autocast is the one that plain calls meet afterwards."""
    mixer, plain = made(cls, 4, 5, hidden=6), made(cls, 4, 5, hidden=6)
    x = draw(2, 5, 5, 4)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            cast = mixer(x)
            assert mixer.slow(None if cls is HyperZZWGlobal else x.movedim(-1, 1)).dtype == torch.float32
            # Content made narrow by the layers before.
            assert mixer.slow(None if cls is HyperZZWGlobal else x.movedim(-1, 1).bfloat16()).dtype == torch.float32
        assert torch.equal(mixer(x), plain(x))
    torch.testing.assert_close(cast, plain(x), rtol=0.05, atol=0.05)


def test_the_kernel_is_kept_until_a_parameter_changes() -> None:
    mixer = made(HyperZZWGlobal, 3, 4, hidden=5)
    calls = []
    mixer.slow.register_forward_hook(lambda *_: calls.append(1))
    x = draw(1, 4, 4, 3)
    with torch.no_grad():
        first = mixer(x)
        mixer(x)
        assert len(calls) == 1
        mixer.slow.out.weight.mul_(2)
        torch.testing.assert_close(mixer(x), 2 * first, **CLOSE)
        assert len(calls) == 2
        mixer.load_state_dict({k: 0 * v for k, v in mixer.state_dict().items()})
        assert float(mixer(x).abs().max()) == 0 and len(calls) == 3
        mixer.train()
        mixer(x)
    assert len(calls) == 4


def test_maps_of_other_sizes_only_on_demand() -> None:
    x = draw(1, 6, 6, 3)
    with pytest.raises(QuernelError, match=r"spatial shape \(4, 4\)"):
        made(HyperZZWGlobal, 3, 4)(x)
    mixer = made(HyperZZWGlobal, 3, 4, resample=True)
    assert mixer(x).shape == x.shape
    with pytest.raises(QuernelError, match="square maps"):
        mixer(draw(1, 6, 4, 3))


def test_flops() -> None:
    assert made(HyperZZWGlobal, 3, 4).flops((2, 4, 4, 3)) == 2 * 16 * 3 * (1 + 8)
    assert made(HyperZZWLocal, 3, 5).flops((2, 4, 6, 3)) == 2 * 2 * 24 * 3 * (25 + 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HyperZZWGlobal(3, 0), "size"),
        (lambda: HyperZZWGlobal(3, 4, "outer"), "mode"),
        (lambda: HyperZZWLocal(3, 4), "kernel_size must be odd"),
        (lambda: HyperZZWLocal(3, 3, "image"), "context"),
        (lambda: HyperZZWLocal(3, 3, eval_stats="none"), "eval_stats"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()


def test_made_from_another_source_it_takes_half_precision() -> None:
    torch.manual_seed(0)
    mixer = HyperZZWLocal(6, 3, hidden=8).eval()
    z, source = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 5, 5)
    wanted = mixer.from_source(z, source)
    got = mixer.from_source(z.bfloat16(), source.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)
