"""The norm-aware feature map and attention: definition, weights, norm awareness, zeros, kernels and gradients."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import _nala_kernels as kernels
from quernel.nn._nala_ops import BLOCK, nala_attention_op, power_features, power_features_backward
from quernel.nn.functional import (
    LinearAttentionState,
    linear_attention,
    nala_attention,
    nala_feature_map,
    rope1d,
    rope2d,
)
from quernel.nn.functional.nala import composed
from tests.reference import nalaformer as reference

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# Powers of float32: p itself is rounded to 6e-8, times the logarithm.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def drawn(tokens: int = 7, size: int = 6, heads: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return queries, keys and values with coordinates and rows of zeros among them."""
    g = torch.Generator().manual_seed(size)
    q, k, v = (torch.randn(2, heads, tokens, size, generator=g, dtype=dtype) for _ in range(3))
    q[0, 0, 0, ::2] = 0.0
    k[0, 0, 1, 1::2] = 0.0
    k[1, 0, 2] = 0.0
    return q, k, v


@pytest.mark.parametrize("variant", ["split", "cosine"])
@pytest.mark.parametrize(("power", "scale"), [(3.0, 1.0), (2.5, 2.0)])
def test_features_are_their_definition(variant: Any, power: float, scale: float) -> None:
    q, k, _ = drawn()
    phi_q, phi_k = nala_feature_map(q, k, power=power, norm_scale=scale, variant=variant)
    torch.testing.assert_close(phi_q, reference.features(q, power, scale, variant), **EXACT)
    torch.testing.assert_close(phi_k, reference.features(k, power, None, variant), **EXACT)
    # Products that are never negative are what makes weights.
    assert float((phi_q @ phi_k.mT).min()) >= -1e-15


def test_scales_belong_to_heads() -> None:
    q, k, _ = drawn()
    phi, _ = nala_feature_map(q, k, norm_scale=torch.tensor([1.0, 3.0], dtype=torch.float64))
    for h, scale in enumerate((1.0, 3.0)):
        torch.testing.assert_close(phi[:, h], reference.features(q[:, h], 3.0, scale), **EXACT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_the_matrix_of_weights(causal: bool, rope: bool, dtype: torch.dtype) -> None:
    q, k, v = drawn(tokens=6, size=8)
    turns, angles = (rope2d(2, 3, 8, dtype=dtype), reference.grid_angles(2, 3, 8)) if rope else (None, None)
    got = nala_attention(*(t.to(dtype) for t in (q, k, v)), causal=causal, chunk=4, rope=turns)
    phi_q, phi_k = reference.features(q, 3.0, 1.0), reference.features(k, 3.0, None)
    for b in range(2):
        for h in range(2):
            wanted = reference.attention(phi_q[b, h], phi_k[b, h], v[b, h], causal=causal, angles=angles)
            close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else EXACT
            torch.testing.assert_close(got[b, h].double(), wanted, **close)


def test_rows_sum_to_nearly_one() -> None:
    q, k, _ = (torch.randn(1, 2, 50, 16, dtype=torch.float64) for _ in range(3))
    for shrink in (1.0, 0.1):
        phi_q, phi_k = nala_feature_map(q, shrink * k)
        weights = linear_attention(phi_q, phi_k, torch.eye(50, dtype=torch.float64).expand(1, 2, -1, -1))
        mean = (phi_q @ phi_k.mT).mean(-1)
        assert float(weights.min()) >= 0
        torch.testing.assert_close(weights.sum(-1), mean / (mean + 1e-6), **EXACT)
        assert (float(weights.sum(-1).min()) > 0.999) == (shrink == 1.0)


def test_keys_may_come_in_any_order() -> None:
    q, k, v = drawn()
    order = torch.randperm(7)
    torch.testing.assert_close(nala_attention(q, k[:, :, order], v[:, :, order]), nala_attention(q, k, v), **EXACT)


def entropies(rows: Any, lengths: tuple[float, ...]) -> list[float]:
    """Mean entropy of rows of weights over queries of given lengths, 256 keys drawn from N(0, I) in 32 dimensions."""
    g = torch.Generator().manual_seed(0)
    unit, k = (
        F.normalize(torch.randn(256, 32, generator=g, dtype=torch.float64), dim=-1),
        torch.randn(256, 32, generator=g),
    )
    found = []
    for c in lengths:
        weights = rows(c * unit, k.double())
        weights = weights / weights.sum(-1, keepdim=True)
        found.append(float(-(weights * weights.clamp_min(1e-300).log()).sum(-1).mean()))
    return found


def weights_of(scale: float) -> Any:
    def rows(q: Tensor, k: Tensor) -> Tensor:
        phi_q, phi_k = nala_feature_map(q[None, None], k[None, None], norm_scale=scale)
        return (phi_q @ phi_k.mT)[0, 0]

    return rows


LENGTHS = (0.05, 0.25, 0.5, 1.0, 2.0, 8.0)


def test_longer_queries_have_sharper_weights() -> None:
    found = entropies(weights_of(1.0), LENGTHS)
    assert all(a > b for a, b in pairwise(found))
    np.testing.assert_allclose(found, [5.26, 5.18, 5.08, 4.95, 4.86, 4.84], atol=0.02)
    relu = entropies(lambda q, k: q.relu() @ k.relu().T, LENGTHS)
    np.testing.assert_allclose(relu, [relu[0]] * 6)
    assert relu[0] == pytest.approx(5.44, abs=0.02)
    elu = entropies(lambda q, k: (F.elu(q) + 1) @ (F.elu(k) + 1).T, LENGTHS)
    assert elu[0] == pytest.approx(5.54, abs=0.02)
    softmax = entropies(lambda q, k: torch.softmax(q @ k.T, -1), LENGTHS)
    assert softmax[0] == pytest.approx(5.54, abs=0.02) and softmax[-1] < 1.0


def test_a_scale_of_the_usual_norm_keeps_the_map_sensitive_there() -> None:
    usual = math.sqrt(32)
    published, scaled = (entropies(weights_of(s), (0.7 * usual, 1.4 * usual)) for s in (1.0, usual))
    assert published[0] - published[1] < 1e-3
    assert scaled[0] - scaled[1] > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", ["split", "cosine"])
def test_zeros_are_finite(dtype: torch.dtype, causal: bool, variant: Any) -> None:
    q, k, v = drawn(dtype=dtype)
    zeros = torch.zeros_like(q)
    for a, b in ((zeros, k), (q, zeros), (zeros, zeros)):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        scale = torch.ones(2, dtype=dtype, requires_grad=True)
        out = nala_attention(a, b, v, causal=causal, variant=variant, norm_scale=scale)
        assert float(out.detach().abs().max()) == 0
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in (a, b, scale))
        with torch.no_grad():
            assert float(nala_attention(a, b, v, causal=causal, variant=variant).abs().max()) == 0


@pytest.mark.parametrize("variant", ["split", "cosine"])
def test_gradients(variant: Any) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    q[0, 0, 0, 1], k[0, 1, 2, 3] = 0.0, 0.0
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    given = [t.requires_grad_() for t in (q, k, scale)]

    def call(q: Tensor, k: Tensor, scale: Tensor) -> Any:
        return nala_feature_map(q, k, norm_scale=scale, variant=variant)

    # Angles of keys have a kink at zero, where their size is zero too.
    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in drawn(dtype=torch.float32))
    k = 60 * k  # the cube is beyond the largest float16
    phi_q, phi_k = nala_feature_map(q, k)
    assert phi_q.dtype is phi_k.dtype is torch.float32 and phi_k.isfinite().all()
    got = nala_attention(q, k, v)
    assert got.dtype is dtype
    torch.testing.assert_close(got, nala_attention(q.float(), k.float(), v.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("power", [3.0, 2.0, 3.7])
@pytest.mark.usefixtures("poisoned_memory")
def test_kernels_are_the_composed_features(size: int, power: float) -> None:
    q, k, _ = drawn(tokens=5, size=size, heads=3, dtype=torch.float32)
    q[0, 1, 3] *= 1e-15
    rates = torch.tensor([1.0, 0.2, 3.0])
    wanted = composed(q.double(), k.double(), power, rates.double(), "split")
    grads = [torch.randn(w.shape) for w in wanted]
    for layout in ("dense", "heads last", "part"):
        a, b = (_laid_out(t, layout).requires_grad_() for t in (q, k))
        r = rates.clone().requires_grad_()
        got = power_features(a, r, power), power_features(b, None, power)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x.double(), y, **CLOSE)
        torch.autograd.backward(got, grads)
        c, d, s = (t.double().requires_grad_() for t in (q, k, rates))
        torch.autograd.backward(composed(c, d, power, s, "split"), [g.double() for g in grads])
        for x, y in ((a, c), (b, d), (r, s)):
            # One coordinate is its own direction: nothing but rounding is left.
            bound = max(float(y.grad.abs().max()), 0.1)
            torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5 * bound)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2).detach()
    if layout == "part":
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]].detach()
    return x.clone()


@pytest.mark.parametrize("portable", [False, True])
def test_both_paths_of_the_kernels_are_powers(portable: bool) -> None:
    from numba import njit

    features = kernels.make_features(False, portable)

    @njit(fastmath=False)
    def run(x: Any, out: Any, p: Any) -> None:
        features(x.ctypes.data, out.ctypes.data, x.size, p, np.float32(1.0))

    draw = np.random.default_rng(0)
    x = np.float32(draw.choice([-1.0, 1.0], 4099) * 2.0 ** draw.uniform(-28, 6, 4099))
    x[:6] = 0.0, -0.0, 1.0, -1.0, 2.0**-28, 1e30
    out = np.full(2 * x.size, np.nan, np.float32)
    run(x, out, np.float32(4.5))
    wanted = np.abs(x.astype(np.float64)) ** 4.5
    with np.errstate(over="ignore", under="ignore"):
        wanted = np.where(wanted > np.finfo(np.float32).max, np.inf, wanted)
    wanted[wanted < np.finfo(np.float32).tiny] = 0.0
    np.testing.assert_allclose(out[: x.size], np.where(x > 0, wanted, 0), rtol=1e-6)
    np.testing.assert_allclose(out[x.size :], np.where(x < 0, wanted, 0), rtol=1e-6)


def test_small_powers_stay_and_nan_stays() -> None:
    q = torch.full((1, 1, 1, 20), 1e-5)
    q[..., 0] = 1.0
    phi, _ = nala_feature_map(q, q)
    p = 3 * (0.5 + math.tanh(float(q.norm())))
    assert float(phi[..., 1]) == pytest.approx(1e-5**p, rel=1e-5)  # 2e-19
    q[..., 5] = float("nan")
    phi_q, phi_k = nala_feature_map(q, q)
    assert phi_q.isnan().any() and phi_k[..., 5].isnan().all()


@pytest.mark.slow
def test_the_registered_ops_keep_the_rules_of_torch() -> None:
    q, k, v = drawn(dtype=torch.float32)
    rates = torch.tensor([1.0, 0.5])
    for args in ((q.requires_grad_(), rates.requires_grad_(), 3.0), (k.requires_grad_(), None, 2.5)):
        torch.library.opcheck(power_features, args)
    grad = torch.ones(2, 2, 7, 12)
    torch.library.opcheck(power_features_backward, (grad, grad, q.detach(), rates.detach(), 3.0))
    for rope, mask in ((None, None), (rope1d(7, 6), torch.ones(2, 7, dtype=torch.bool))):
        args = (q.detach(), k.detach(), v, rates.detach(), 3.0, rope, mask, 1e-6)
        torch.library.opcheck(nala_attention_op, args)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "keys", "size"), [(3, 2, 9, 4, 5), (1, 1, 5, 700, 20), (70, 1, 3, 3, 4)]
)
@pytest.mark.parametrize("options", ["", "mask", "rope"])
@pytest.mark.usefixtures("poisoned_memory")
def test_attention_in_pieces_is_that_of_whole_features(
    batch: int, heads: int, tokens: int, keys: int, size: int, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quernel.nn._nala_ops.BLOCK", BLOCK // 2**8)
    if options == "rope":
        keys, size = tokens, 2 * size
    q, k, v = (torch.randn(batch, heads, n, size) for n in (tokens, keys, keys))
    mask = torch.rand(batch, keys) > 0.3 if options == "mask" else None
    rope = rope1d(tokens, size) if options == "rope" else None
    got = nala_attention(q, k, v, mask=mask, rope=rope, norm_scale=2.0)
    wanted = linear_attention(
        *nala_feature_map(q.double(), k.double(), norm_scale=2.0), v.double(), mask=mask, rope=rope
    )
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", ["split", "cosine"])
def test_keys_that_do_not_count_may_hold_anything(causal: bool, dtype: torch.dtype, variant: Any) -> None:
    q, k, v = drawn(dtype=dtype)
    mask = torch.arange(7).expand(2, -1) < 5
    held = [torch.where(mask[:, None, :, None], t, bad) for t, bad in ((k, torch.nan), (v, torch.inf))]
    options: dict[str, Any] = {"causal": causal, "variant": variant}
    wanted = nala_attention(q[:, :, :5], k[:, :, :5], v[:, :, :5], **options)
    given = [t.clone().requires_grad_() for t in (q, *held)]
    with torch.no_grad():
        torch.testing.assert_close(nala_attention(q, *held, mask=mask, **options)[:, :, :5], wanted)
    got = nala_attention(*given, mask=mask, **options)[:, :, :5]
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert all(t.grad.isfinite().all() for t in given)


def test_second_derivatives_are_refused_where_kernels_are_compiled() -> None:
    q, k, _ = (t.requires_grad_() for t in drawn(dtype=torch.float32))
    phi_q, phi_k = nala_feature_map(q, k)
    (g,) = torch.autograd.grad(phi_q.square().sum() + phi_k.sum(), q, create_graph=True)
    with pytest.raises(QuernelError, match="no second derivative"):
        g.sum().backward()


@pytest.mark.slow
def test_it_compiles_with_sizes_that_change() -> None:
    def attend(x: Tensor) -> Any:
        return nala_attention(x, x, x) + linear_attention(*nala_feature_map(x, x), x)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (9, 14):
        x = torch.randn(2, 2, tokens, 4)
        torch.testing.assert_close(compiled(x), attend(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("going_on", [False, True])
def test_long_causal_sequences_are_taken_piece_by_piece(going_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quernel.nn.functional.feature_attention.SEGMENT", 8)
    q, k, v = drawn(tokens=37, size=8)
    mask = torch.arange(37).expand(2, -1) != 5
    options: dict[str, Any] = {"causal": True, "chunk": 4, "rope": rope1d(37, 8), "mask": mask}
    if going_on:
        options["state"] = LinearAttentionState(
            *(torch.rand(s, dtype=q.dtype) for s in ((2, 2, 16, 8), (2, 2, 16), (2, 2)))
        )
    got = nala_attention(q, k, v, **options)
    wanted = nala_attention(q.requires_grad_(), k, v, **options)
    if going_on:
        for a, b in zip(got[1], wanted[1], strict=True):
            torch.testing.assert_close(a, b.detach(), **EXACT)
        got, wanted = got[0], wanted[0]
    torch.testing.assert_close(got, wanted.detach(), **EXACT)


def test_results_do_not_depend_on_threads() -> None:
    q, k, v = (torch.randn(2, 4, 700, 16) for _ in range(3))
    found = []
    for n in (1, 2):
        torch.set_num_threads(n)
        found.append((power_features(q, torch.ones(4), 3.0), nala_attention(q, k, v)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: nala_feature_map(q, q[:, :1]), "alike in batch, heads and head size"),
        (lambda q: nala_feature_map(q, q[..., :2]), "alike in batch, heads and head size"),
        (lambda q: nala_feature_map(q[0], q[0]), "must have shapes"),
        (lambda q: nala_feature_map([0.0], q), "q must be Tensor; got list"),
        (lambda q: nala_feature_map(q, q.int()), r"k must be floating; got torch.int32. Convert it by k.float\(\)"),
        (lambda q: nala_attention(q, q, q.long()), "v must be floating; got torch.int64"),
        (lambda q: nala_feature_map(q, q, power=1.5), "power"),
        (lambda q: nala_feature_map(q, q, norm_scale=0.0), "norm_scale"),
        (lambda q: nala_feature_map(q, q, norm_scale=torch.ones(3)), r"norm_scale must have shape \(2,\)"),
        (lambda q: nala_feature_map(q, q, variant="sine"), "variant"),
        (lambda q: nala_attention(q, q, q[:, :, :2]), "agree in batch and heads"),
        (lambda q: nala_attention(q, q, q, mask=torch.ones(2, 5, dtype=torch.bool)), "mask must be bool"),
        (lambda q: nala_attention(q, q, q, mask=torch.ones(4, dtype=torch.bool), causal=True), "mask must be bool"),
        (lambda q: nala_attention(q, q, q, decay=torch.ones(2)), "decay needs causal=True"),
        (lambda q: nala_attention(q, q, q, state=LinearAttentionState.empty(2, 2, 8, 4)), "state needs causal=True"),
        (
            lambda q: nala_attention(q, q, q, state=LinearAttentionState.empty(2, 2, 4, 4), causal=True),
            "state must hold",
        ),
        (lambda q: nala_attention(q, q, q, chunk=0, causal=True), "chunk"),
        (lambda q: nala_attention(q, q, q, eps=-1.0), "eps"),
        (lambda q: nala_attention(q, q, q, rope=rope1d(4, 8)), "rope must have shape"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(torch.zeros(2, 2, 4, 4))
