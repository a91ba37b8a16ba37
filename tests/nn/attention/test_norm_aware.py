"""The layer of norm-aware attention: against its formula, states, masks on grids, rotations, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import GatedSoftmaxAttention, NormAwareLinearAttention, make_mixer
from tests.reference import nalaformer as reference

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(*args: Any, **options: Any) -> NormAwareLinearAttention:
    torch.manual_seed(0)
    return NormAwareLinearAttention(*args, **options)


def by_formula(layer: Any, x: Tensor, angles: Tensor | None) -> Tensor:
    """One image (H, W, C) in float64, by the reference for every head."""
    height, width, channels = x.shape
    q, k, v, g = layer.project(x.flatten(0, 1)).split(channels, dim=-1)
    size, y = channels // layer.num_heads, torch.zeros(height * width, channels, dtype=x.dtype)
    for h in range(layer.num_heads):
        part = slice(h * size, (h + 1) * size)
        if isinstance(layer, GatedSoftmaxAttention):
            a, b = (reference.turned(torch.cat([t[:, part]] * 2, -1), angles)[:, :size] for t in (q, k))
            y[:, part] = torch.softmax(a @ b.T / size**0.5, -1) @ v[:, part]
        else:
            phi_q, phi_k = reference.features(q[:, part], 3.0, 1.0), reference.features(k[:, part], 3.0, None)
            y[:, part] = reference.attention(phi_q, phi_k, v[:, part], angles=angles)
    grid = v.T.reshape(1, channels, height, width)
    lepe = F.conv2d(grid, layer.conv.weight, layer.conv.bias, padding=layer.lepe // 2, groups=channels)
    y = layer.norm(y + lepe[0].flatten(1).T) * F.silu(g)
    return layer.out(y).view(height, width, channels)


@pytest.mark.parametrize("kind", [NormAwareLinearAttention, GatedSoftmaxAttention])
def test_the_layer_is_its_formula(kind: Any) -> None:
    torch.manual_seed(0)
    layer, x = kind(8, 2, rope="2d", lepe=3).double(), draw(1, 3, 5, 8).double()
    with torch.no_grad():
        wanted = by_formula(layer, x[0], reference.grid_angles(3, 5, 4))
        torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.float()(x.float())[0].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"rope": "2d"}, {"lepe": None, "gate": False}, {"variant": "cosine"}, {"ndim": 1}]
)
def test_training_and_inference_agree(options: dict[str, Any]) -> None:
    # Inference holds no features, training does.
    layer = made(16, 2, norm_scale="learn", **options)
    x = draw(2, *((12,) if "ndim" in options else (3, 4)), 16)
    with torch.no_grad():
        wanted = layer(x)
    got = layer(x.requires_grad_())
    torch.testing.assert_close(got, wanted, **CLOSE)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


CAUSAL = [
    {},
    {"rope": "1d"},
    {"lepe": None, "gate": False},
    {"lepe": 1},
    {"decay": (0.5, 1.0)},
    {"norm_scale": 4.0, "variant": "cosine", "rope": "1d", "lepe": 3},
]


@pytest.mark.parametrize("options", CAUSAL)
def test_steps_are_the_forward_pass(options: dict[str, Any]) -> None:
    layer, x = made(16, 2, causal=True, chunk=4, **options), draw(2, 10, 16)
    with torch.no_grad():
        wanted = layer(x)
        for sizes in ([1] * 10, [3, 1, 6], [9, 1], [0, 4, 0, 6]):
            state, parts = layer.init_state(2), []
            for part in x.split(sizes, dim=1):
                y, state = layer(part, state=state)
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, 1), wanted, **CLOSE)
    assert state.position == 10


def test_the_state_does_not_grow() -> None:
    layer = made(16, 2, causal=True, rope="1d")
    state = layer.init_state(1)
    sizes = [t.numel() for t in (*state.sums, state.recent)]
    with torch.no_grad():
        for t in range(20):
            _, state = layer.step(draw(1, 16, seed=t), state)
    assert [t.numel() for t in (*state.sums, state.recent)] == sizes
    assert sum(sizes[:3]) == 2 * (2 * 8 * 8 + 2 * 8 + 1)
    # Nor does it hold the memory of a long beginning.
    _, state = layer(draw(1, 300, 16), state=layer.init_state(1))
    assert state.recent.untyped_storage().nbytes() == 4 * state.recent.numel() == 4 * 4 * 16


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    layer, x = made(16, 2, rope="2d"), draw(*shape, 16)
    with torch.no_grad():
        assert layer(x).shape == x.shape
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"rope": "2d", "norm_scale": "learn"}, {"rope": "1d", "causal": True, "chunk": 4}])
def test_it_compiles_whole(options: dict[str, Any]) -> None:
    # Inference and training take different operations.
    layer = made(16, 2, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    shapes = ((9,), (13,)) if "causal" in options else ((4, 5), (6, 3))
    for shape in shapes:
        x = draw(2, *shape, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x), **CLOSE)
        got, wanted = (
            torch.autograd.grad(f(a).square().sum(), a)[0]
            for f in (compiled, layer)
            for a in [x.clone().requires_grad_()]
        )
        torch.testing.assert_close(got, wanted, **CLOSE)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", [NormAwareLinearAttention, GatedSoftmaxAttention])
def test_tokens_that_do_not_count_may_hold_anything(kind: Any) -> None:
    torch.manual_seed(0)
    layer, x = kind(8, 2), draw(2, 5, 6, 8)
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[:, :4, :5] = True
    held = x.masked_fill(~mask[..., None], float("nan"))
    with torch.no_grad():
        torch.testing.assert_close(layer(held, mask=mask)[:, :4, :5], layer(x[:, :4, :5]), **CLOSE)
        assert layer(x, mask=torch.zeros_like(mask)).isfinite().all()


def test_a_fresh_layer_makes_convex_combinations() -> None:
    layer, x = made(64, 4, lepe=None), draw(2, 8, 8, 64)
    q, k, *_ = layer._projected(F.layer_norm(x, (64,)).flatten(1, 2))
    from quernel.nn.functional import linear_attention, nala_feature_map

    phi_q, phi_k = nala_feature_map(layer._split(q), layer._split(k))
    sums = linear_attention(phi_q, phi_k, torch.ones_like(phi_k[..., :1]))
    assert float(sums.detach().min()) > 0.999 and float(sums.detach().max()) <= 1 + 1e-5


def test_gradients() -> None:
    layer = made(8, 2, rope="2d", lepe=3, norm_scale="learn").double()
    assert torch.autograd.gradcheck(layer, (draw(1, 2, 3, 8).double().requires_grad_(),))


def test_ranks_follow_what_looks_at_the_grid() -> None:
    assert made(8, 2).spatial_ndim == made(8, 2, rope="2d", lepe=None).spatial_ndim == (2,)
    assert made(8, 2, causal=True).spatial_ndim == made(8, 2, rope="1d").spatial_ndim == made(8, 2, ndim=1).spatial_ndim
    assert made(8, 2, lepe=None).spatial_ndim == (1, 2, 3)
    layer, x = made(8, 2, lepe=None, causal=True, rope="2d"), draw(1, 3, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch.cat([x[:, :2], 0 * x[:, 2:]], 1))[:, :2], layer(x)[:, :2])


def test_halves_of_parameters_are_computed_in_float32() -> None:
    layer, x = made(16, 2).bfloat16(), draw(1, 4, 4, 16).bfloat16()
    with torch.no_grad():
        got = layer(x)
        assert got.dtype is torch.bfloat16
        wanted = layer.float()(x.float())
    torch.testing.assert_close(got.float(), wanted, rtol=0.1, atol=0.05)


def test_make_mixer_knows_it() -> None:
    assert isinstance(make_mixer("nalaformer", 8, num_heads=2), NormAwareLinearAttention)


def test_flops_count_what_grows() -> None:
    layer, causal = made(64, 4), made(64, 4, causal=True)
    assert 1.99 < layer.flops((1, 64, 64, 64)) / layer.flops((1, 32, 64, 64)) < 2.01
    assert causal.flops((1, 4096, 64)) > made(64, 4, ndim=1).flops((1, 4096, 64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(8, 3), "num_heads must divide dim=8"),
        (lambda: made(12, 2, rope="2d"), "multiple of 4"),
        (lambda: made(6, 2, rope="1d"), "multiple of 2"),
        (lambda: made(8, 2, lepe=4), "lepe must be odd"),
        (lambda: made(8, 2, ndim=3), "ndim"),
        (lambda: made(8, 2, rope="2d", ndim=1), "needs a grid"),
        (lambda: made(8, 2, causal=True, ndim=2), "convolves along its tokens"),
        (lambda: made(8, 2, rope="3d"), "rope"),
        (lambda: made(8, 2, power=1.0), "power"),
        (lambda: made(8, 2, norm_scale="learnt"), "norm_scale"),
        (lambda: made(8, 2, norm_scale=-1.0), "norm_scale"),
        (lambda: made(8, 2, variant="sine"), "variant"),
        (lambda: made(8, 2, decay=0.9), "decay needs causal=True"),
        (lambda: made(8, 2, causal=True, decay=(0.9,)), "one for each of 2 heads"),
        (lambda: made(8, 2, causal=True, decay=0.0), "decay"),
        (lambda: made(8, 2, causal=True, decay="a"), "decay"),
        (lambda: made(8, 2).init_state(1), "only with causal=True"),
        (lambda: made(8, 2, causal=True, rope="2d", lepe=None, ndim=2).init_state(1), "only with causal=True"),
        (
            lambda: made(8, 2, causal=True, rope="2d", lepe=None)(
                draw(1, 2, 2, 8), state=made(8, 2, causal=True).init_state(1)
            ),
            "only with causal=True",
        ),
        (lambda: made(8, 2, causal=True).step(draw(1, 8), (draw(1),) * 3), "state must be NormAwareState; got tuple"),
        (
            lambda: made(8, 2, causal=True)(draw(3, 2, 8), state=made(8, 2, causal=True).init_state(1)),
            "state must hold tensors of shapes",
        ),
        (lambda: made(8, 2)(draw(1, 4, 8)), r"x must have shape \(B, \*S, 8\)"),
        (lambda: made(8, 2)(draw(1, 4, 4, 8), mask=torch.ones(1, 4, 5, dtype=torch.bool)), "mask must have shape"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call()
