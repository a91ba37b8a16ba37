"""Neighborhood attention of every backend against its definition, with gradients; limits, additional keys, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn.functional import merge_attentions, na1d, na2d, na3d, neighborhood_mask
from tests.reference import neighborhood_attention as reference

# Sums of some hundred products in float32, in another order; their gradients.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-4}
NA: dict[int, Any] = {1: na1d, 2: na2d, 3: na3d}
BACKENDS = ("auto", "dense", "tiled")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def operands(
    shape: tuple[int, ...], batch: int = 2, heads: int = 4, groups: int = 2, d: int = 5, e: int = 3
) -> list[Tensor]:
    sizes = ((heads, d), (groups, d), (groups, e))
    return [draw(batch, *shape, *size, seed=i, dtype=torch.float64) for i, size in enumerate(sizes)]


def sequences(length: int) -> Iterator[Any]:
    """Yield odd and even windows, strides, dilations, causal and not."""
    for d, causal in itertools.product((1, 2, 3), (False, True)):
        for w in {1, 2, length // d // 2 * 2, (length // d - 1) | 1} - {0}:
            w = min(w, length // d)
            for s in {1, (w + 1) // 2, w}:
                yield (length,), w, s, d, causal


def grids() -> Iterator[Any]:
    """Yield shapes that neither tiles nor dilations divide."""
    for w, s, d in itertools.product(((3, 4), (2, 1), (3, 3)), (1, (2, 1)), (1, (1, 2))):
        yield (7, 9), w, s if w != (2, 1) else 1, d, (False, True) if w == (3, 3) else False
    yield (3, 5, 4), (2, 3, 3), (1, 2, 3), (1, 1, 1), (True, False, False)
    yield (4, 4, 6), (2, 1, 3), 1, (2, 3, 2), False
    yield (2, 9, 5), (2, 4, 5), (2, 3, 1), 1, (False, True, True)


def expected(leaves: list[Tensor], mask: Tensor, more: list[Tensor]) -> tuple[Tensor, Tensor]:
    shape = leaves[0].shape[1:-2]
    q, k, v = (x.flatten(1, len(shape)) for x in leaves)
    if more:
        k, v = torch.cat([k, more[0]], 1), torch.cat([v, more[1]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), more[0].shape[1])], 1)
    out, lse = reference.attention(q, k, v, mask)
    return out.unflatten(1, shape), lse.unflatten(1, shape)


def with_gradients(outputs: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    weights = [draw(*x.shape, seed=9, dtype=torch.float64).to(x.dtype) for x in outputs]
    total = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("length", [6, 19, 33, None])
def test_it_is_its_definition_with_gradients(backend: str, extra: int, length: int | None) -> None:
    for case, (shape, *numbers) in enumerate(grids() if length is None else sequences(length)):
        leaves = operands(shape, batch=1 + case % 2)
        more = [x.flatten(1, -3)[:, :extra] * 0.7 for x in leaves[1:]] if extra else []
        mask = neighborhood_mask(shape, *numbers)
        wide = [x.requires_grad_() for x in (*leaves, *(x.contiguous() for x in more))]
        wanted = with_gradients(expected(wide[:3], mask, wide[3:]), wide)
        for dtype in (torch.float32, torch.float64):
            held = [x.detach().to(dtype).requires_grad_() for x in wide]
            names = dict(zip(("additional_keys", "additional_values"), held[3:], strict=False))
            outputs = NA[len(shape)](*held[:3], *numbers, backend=backend, return_lse=True, **names)
            got = with_gradients(outputs, held)
            exact = dtype is torch.float64
            for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
                tolerance = {} if exact else CLOSE if i < 2 else GRADIENTS
                torch.testing.assert_close(a.double(), b, **tolerance, msg=lambda m, n=(shape, *numbers): f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_differences(backend: str) -> None:
    arguments = [x.requires_grad_() for x in operands((5, 4), 1, 2, 1, 3, 2)]
    more = [draw(1, 2, 1, size, dtype=torch.float64).requires_grad_() for size in (3, 2)]

    def run(*a: Tensor) -> Any:
        return na2d(*a[:3], (3, 2), (2, 1), (1, 2), (False, True), None, *a[3:], backend=backend, return_lse=True)

    assert torch.autograd.gradcheck(run, [*arguments, *more])


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend: str) -> None:
    q, k, v = (x.float() for x in operands((24,), heads=2))
    whole = [x.transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(na1d(q, k, v, 1, backend=backend), v, **CLOSE)
    torch.testing.assert_close(
        na1d(q, k, v, 24, backend=backend), F.scaled_dot_product_attention(*whole).mT.mT.transpose(1, 2), **CLOSE
    )
    blocks = [x.unflatten(1, (4, 6)).transpose(2, 3) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*blocks).transpose(2, 3).flatten(1, 2)
    torch.testing.assert_close(na1d(q, k, v, 6, 6, backend=backend), wanted, **CLOSE)
    causal = F.scaled_dot_product_attention(*whole, is_causal=True).transpose(1, 2)
    for window, stride in ((24, 1), (24, 5), (24, 24), (30, 1)):
        torch.testing.assert_close(na1d(q, k, v, window, stride, is_causal=True, backend=backend), causal, **CLOSE)


def test_interior_tokens_move_with_their_input() -> None:
    q, k, v = (x.float() for x in operands((20, 20), 1))
    out = na2d(q, k, v, (5, 4))
    rolled = na2d(*(x.roll((3, 2), (1, 2)) for x in (q, k, v)), (5, 4))
    torch.testing.assert_close(rolled[:, 5:-5, 4:-4], out.roll((3, 2), (1, 2))[:, 5:-5, 4:-4], **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_input_gives_the_same_bits(backend: str) -> None:
    leaves = [x.float().requires_grad_() for x in operands((9, 11))]

    def run() -> list[Tensor]:
        return with_gradients(na2d(*leaves, 3, backend=backend, return_lse=True), leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_merging_with_additional_keys_is_one_softmax() -> None:
    q, k, v = operands((6, 5), groups=4)
    more = [x.flatten(1, 2)[:, :7] * 0.5 for x in (k, v)]
    wanted = na2d(q, k, v, 3, additional_keys=more[0], additional_values=more[1], return_lse=True)
    scores = torch.einsum("bxyhd,bmhd->bxyhm", q, more[0]) * q.shape[-1] ** -0.5
    beside = torch.einsum("bxyhm,bmhe->bxyhe", scores.softmax(-1), more[1]), scores.logsumexp(-1)
    got = merge_attentions(*zip(na2d(q, k, v, 3, return_lse=True), beside, strict=True))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(backend: str, dtype: torch.dtype) -> None:
    leaves = [x.to(dtype).requires_grad_() for x in operands((40,), d=16, e=16)]
    out, lse = na1d(*leaves, 31, backend=backend, return_lse=True)
    assert out.dtype is dtype and lse.dtype is torch.float32
    wanted = expected([x.double() for x in leaves], neighborhood_mask((40,), 31), [])
    torch.testing.assert_close(lse.double(), wanted[1], **CLOSE)
    # One rounding of the output; torch's own attention rounds its weights too.
    torch.testing.assert_close(out.double(), wanted[0], rtol=2**-8, atol=2**-7 if backend == "dense" else 2**-9)
    assert all(g.dtype is dtype for g in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_scales_and_nothing(backend: str) -> None:
    qkv = draw(2, 6, 7, 3, 2, 8)
    q, k, v = qkv.unbind(3)
    wanted = na2d(q.contiguous() * 0.5, k.contiguous(), v.contiguous(), 3, backend=backend)
    torch.testing.assert_close(na2d(q, k, v, 3, scale=0.5 * 8**-0.5, backend=backend), wanted, **CLOSE)
    apart = [x.movedim(-1, 1).contiguous().movedim(1, -1) for x in (q, k, v)]
    torch.testing.assert_close(na2d(*apart, 3, scale=0.5 * 8**-0.5, backend=backend), wanted, **CLOSE)
    assert na2d(*(x[:0] for x in (q, k, v)), 3, backend=backend).shape == (0, 6, 7, 2, 8)
    leaves = [x[:0].clone().requires_grad_() for x in (q, k, v)]
    na2d(*leaves, 3, backend=backend).sum().backward()
    assert all(x.grad.shape == x.shape for x in leaves)
    none = torch.empty(2, 0, 2, 8)
    torch.testing.assert_close(
        na2d(q, k, v, 3, 1, 1, False, 0.5 * 8**-0.5, none, none, backend=backend), wanted, **CLOSE
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_and_nan(backend: str) -> None:
    q, k, v = (x.float() for x in operands((12,), 1, 2, 2))
    out, lse = na1d(q * 1e3, k * 1e3, v, 5, backend=backend, return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()
    # Far below what any other score may be.
    out, lse = na1d(q * 0 + 1e17, k * 0 - 1e17, v, 5, backend=backend, return_lse=True)
    torch.testing.assert_close(out, na1d(q * 0, k, v, 5, backend=backend), **CLOSE)
    assert (lse < -1e30).all() and lse.isfinite().all()
    k[0, 0] = torch.nan  # seen by the first three
    assert na1d(q, k, v, 5, backend=backend)[0, :3].isnan().all()


def test_rounding_of_large_sums_makes_no_weight_above_one() -> None:
    # Logarithms of sums this large are rounded by more than the scores are apart, either way.
    x = torch.ones(1, 12, 1, 1)
    for scale in (0.095, 0.19, 0.38, 0.41):
        q, k, v = (t.clone().requires_grad_() for t in (x, -1e20 * x, x))
        na1d(q, k, v, 5, scale=scale).sum().backward()  # type: ignore[union-attr]
        # A value is seen by eight queries at most.
        assert float(v.grad.abs().max()) <= 8
    for seed in range(5):
        q, k, v = (draw(1, 70, 2, 16, seed=seed + i).requires_grad_() for i in range(3))
        na1d(1e4 * q, 1e4 * k, v, 5).sum().backward()  # type: ignore[union-attr]
        assert float(v.grad.abs().max()) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_are_refused(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in operands((8,), 1, 2, 2))
    (g,) = torch.autograd.grad(na1d(q, k, v, 3, backend="tiled").square().sum(), q, create_graph=True)  # type: ignore[union-attr]
    with pytest.raises(QuernelError, match=r'no second derivative; .* na2d or na3d with backend="dense"'):
        g.sum().backward()
    (g,) = torch.autograd.grad(
        na1d(q, k, v, 3, backend="dense", return_lse=True)[0].square().sum(), q, create_graph=True
    )
    g.sum().backward()
    assert v.grad is not None and v.grad.isfinite().all()


X = torch.ones(1, 6, 5, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: na2d(X, X, X, 6), "kernel_size 6 exceeds the 5 tokens of axis 1"),
        (lambda: na2d(X, X, X, 3, dilation=(2, 3)), "kernel_size 3 times dilation 3 exceeds the 5 tokens of axis 1"),
        (lambda: na2d(X, X, X, 3, (1, 4)), "got 4 > 3 on axis 1"),
        (lambda: na2d(X, X, X, (3, 0)), "kernel_size of axis 1"),
        (lambda: na2d(X, X, X, (3, 3, 3)), "2 of them"),
        (lambda: na1d(X, X, X, 3), r"q must have shape \(batch, X, heads, head size\) for na1d"),
        (lambda: na3d(X, X, X, 3), r"\(batch, X, Y, Z, heads, head size\)"),
        (lambda: na2d(X, X[:, :5], X, 3), "the batch and the grid of q"),
        (lambda: na2d(X, X[..., :3], X, 3), "head size of q, 4; got 3"),
        (lambda: na2d(X, X[..., :1, :], X, 3), "same number of heads"),
        (lambda: na2d(X, torch.ones(1, 6, 5, 3, 4), torch.ones(1, 6, 5, 3, 4), 3), "divides that of q, 2; got 3 and 3"),
        (lambda: na2d(X, X.double(), X, 3), "k must be of the dtype.*torch.float64"),
        (lambda: na2d(X.int(), X.int(), X.int(), 3), "which must be floating"),
        (lambda: na2d(X, X.to("meta"), X, 3), "on meta"),
        (lambda: na2d(X, X, X, 3, backend="flex"), "backend must be one of"),
        (lambda: na2d(X, X, X, 3, scale=float("nan")), "scale"),
        (lambda: na2d(X, X, X, 3, additional_keys=X[:, 0]), "given together"),
        (lambda: na2d(X, X, X, 3, additional_keys=X, additional_values=X), "additional_keys must have shape"),
        (lambda: na2d(X, X, X, 3, additional_keys=X[:, 0], additional_values=X[:, 0, :4]), "additional_values must"),
        (lambda: na2d(X, X, X, 3, additional_keys=X[:, 0].half(), additional_values=X[:, 0]), "must be of the dtype"),
        (lambda: na2d(None, X, X, 3), "q must be Tensor"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert isinstance(raised.value, QuernelError)
