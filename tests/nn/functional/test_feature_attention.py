"""Linear attention: the sums against the whole matrix of weights, chunks, states, decay, masks, rotations, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn.functional import LinearAttentionState, linear_attention, rope1d, rope2d
from quernel.nn.functional.feature_attention import GROUP
from tests.reference import nalaformer as reference

# Sums of float32 in another order; those of float64.
CLOSE, EXACT = {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-10, "atol": 1e-10}
STATE = LinearAttentionState.empty(2, 2, 8, 5)


def drawn(tokens: int = 11, keys: int | None = None, batch: int = 2, heads: int = 2, size: int = 4) -> Any:
    """Return features of width 2 ``size`` with zeros among them, and values, float64."""
    g = torch.Generator().manual_seed(tokens)
    keys = tokens if keys is None else keys
    phi_q, phi_k = (torch.rand(batch, heads, n, 2 * size, generator=g, dtype=torch.float64) for n in (tokens, keys))
    v = torch.randn(batch, heads, keys, 5, generator=g, dtype=torch.float64)
    return phi_q * (phi_q > 0.3), phi_k * (phi_k > 0.3), v


def whole(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, decay: Tensor | None = None, mask: Any = None, **options: Any
) -> Tensor:
    """Every head by the reference."""
    out = torch.empty(*phi_q.shape[:3], v.shape[3], dtype=v.dtype)
    for b in range(len(v)):
        for h in range(v.shape[1]):
            given = options | ({} if decay is None else {"decay": float(decay[h])})
            kept = None if mask is None else mask[b]
            out[b, h] = reference.attention(phi_q[b, h], phi_k[b, h], v[b, h], kept=kept, **given)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rope", [None, "1d", "2d"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, EXACT), (torch.float32, CLOSE)])
def test_sums_are_the_matrix_of_weights(causal: bool, rope: str | None, dtype: torch.dtype, close: Any) -> None:
    given = drawn(12)
    turns = {None: None, "1d": rope1d(12, 4, dtype=torch.float64), "2d": rope2d(3, 4, 4, dtype=torch.float64)}[rope]
    angles = {None: None, "1d": reference.line_angles(12, 4), "2d": reference.grid_angles(3, 4, 4)}[rope]
    wanted = whole(*given, causal=causal, angles=angles)
    got = linear_attention(*(t.to(dtype) for t in given), causal=causal, chunk=5, rope=turns)
    assert got.dtype is dtype
    torch.testing.assert_close(got.double(), wanted, **close)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 31])
@pytest.mark.parametrize("chunk", [1, 4, 8, 100])
@pytest.mark.parametrize("decay", [None, (0.9, 1.0)])
def test_chunks_steps_and_the_matrix_agree(tokens: int, chunk: int, decay: Any) -> None:
    phi_q, phi_k, v = drawn(tokens)
    gamma = None if decay is None else torch.tensor(decay, dtype=torch.float64)
    wanted = whole(phi_q, phi_k, v, gamma, causal=True)
    got = linear_attention(phi_q, phi_k, v, causal=True, chunk=chunk, decay=gamma)
    torch.testing.assert_close(got, wanted, **EXACT)
    each = (1.0, 1.0) if decay is None else decay
    by_steps = [
        [reference.recurrent(q, k, x, g) for q, k, x, g in zip(*h, each, strict=True)]
        for h in zip(phi_q, phi_k, v, strict=True)
    ]
    torch.testing.assert_close(got, torch.stack([torch.stack(row) for row in by_steps]), **EXACT)


@pytest.mark.parametrize("decay", [None, (0.5, 0.999)])
@pytest.mark.parametrize("pieces", [(1, 1, 9), (5, 6), (3, 0, 8), (10, 1)])
def test_a_sequence_goes_on_from_a_state(decay: Any, pieces: tuple[int, ...]) -> None:
    given = drawn(11)
    gamma = None if decay is None else torch.tensor(decay, dtype=torch.float64)
    wanted = linear_attention(*given, causal=True, chunk=4, decay=gamma)
    state, out, at = LinearAttentionState.empty(2, 2, 8, 5, dtype=torch.float64), [], 0
    for n in pieces:
        part = [t[:, :, at : at + n] for t in given]
        y, state = linear_attention(*part, causal=True, chunk=4, decay=gamma, state=state)
        out.append(y)
        at += n
    torch.testing.assert_close(torch.cat(out, 2), wanted, **EXACT)


def test_a_strong_decay_over_many_chunks_neither_grows_nor_vanishes() -> None:
    tokens = 2 * GROUP * 3 + 5  # more chunks than are added at once
    phi_q, phi_k, v = (t.float() for t in drawn(tokens, batch=1))
    gamma = torch.tensor([0.01, 0.999])
    got, state = linear_attention(
        phi_q, phi_k, v, causal=True, chunk=2, decay=gamma, state=LinearAttentionState.empty(1, 2, 8, 5)
    )
    wanted = torch.stack(
        [reference.recurrent(*(t[0, h].double() for t in (phi_q, phi_k, v)), float(gamma[h])) for h in range(2)]
    )
    torch.testing.assert_close(got[0].double(), wanted, rtol=1e-4, atol=1e-4)
    assert all(t.isfinite().all() for t in state)
    left = gamma.double()
    torch.testing.assert_close(state.n_keys[0].double(), (1 - left**tokens) / (1 - left), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [7, 8, 19])
@pytest.mark.parametrize("decay", [None, (0.5, 0.9)])
def test_inference_takes_long_sequences_piece_by_piece(
    tokens: int, decay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quernel.nn.functional.feature_attention.SEGMENT", 4)
    given, rope = drawn(tokens), rope1d(tokens, 4, dtype=torch.float64)
    mask = torch.arange(tokens).expand(2, -1) != 3
    options: dict[str, Any] = {"causal": True, "chunk": 2, "mask": mask, "rope": rope}
    options["decay"] = None if decay is None else torch.tensor(decay, dtype=torch.float64)
    state = LinearAttentionState(*(torch.rand(t.shape, dtype=torch.float64) for t in STATE))
    for held in (None, state):
        got = linear_attention(*given, state=held, **options)
        wanted = linear_attention(*(t.clone().requires_grad_() for t in given), state=held, **options)
        flat = ((t,) if held is None else (t[0], *t[1]) for t in (got, wanted))
        for a, b in zip(*flat, strict=True):
            torch.testing.assert_close(a, b.detach(), **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_are_as_if_they_were_not_there(causal: bool) -> None:
    phi_q, phi_k, v = drawn(9)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[:, 0] = True
    got = linear_attention(phi_q, phi_k, v, causal=causal, chunk=4, mask=mask)
    torch.testing.assert_close(got, whole(phi_q, phi_k, v, mask=mask, causal=causal), **EXACT)
    shorter = linear_attention(*(t[:, :, :6] for t in (phi_q, phi_k, v)), causal=causal)
    longer = linear_attention(phi_q, phi_k, v, causal=causal, chunk=4, mask=torch.arange(9).expand(2, -1) < 6)
    torch.testing.assert_close(longer[:, :, :6], shorter, **EXACT)
    assert linear_attention(phi_q, phi_k, v, causal=causal, mask=torch.zeros_like(mask)).abs().max() == 0


@pytest.mark.parametrize("steps", [False, True])
def test_behind_a_long_gap_of_masked_keys_the_decay_cancels(steps: bool) -> None:
    # The decayed count falls with the sums: the mean weight stays what it was, far above eps.
    phi_q, phi_k, v = drawn(60)
    mask, gamma = (torch.arange(60) < 5).expand(2, -1), torch.tensor([0.6, 0.9], dtype=torch.float64)
    if steps:
        state, out = LinearAttentionState.empty(2, 2, 8, 5, dtype=torch.float64), []
        for t in range(60):
            part = [x[:, :, t : t + 1] for x in (phi_q, phi_k, v)]
            y, state = linear_attention(*part, causal=True, decay=gamma, mask=mask[:, t : t + 1], state=state)
            out.append(y)
        got = torch.cat(out, 2)
    else:
        got = linear_attention(phi_q, phi_k, v, causal=True, chunk=8, decay=gamma, mask=mask)
    torch.testing.assert_close(got, whole(phi_q, phi_k, v, gamma, mask, causal=True), **EXACT)
    # The same query right behind the kept keys.
    near = [
        torch.cat([t[:, :, :5], x], 2)
        for t, x in zip((phi_q, phi_k, v), (phi_q[:, :, -1:], 0 * phi_k[:, :, :1], 0 * v[:, :, :1]), strict=True)
    ]
    wanted = linear_attention(*near, causal=True, decay=gamma, mask=mask[:, :6])
    torch.testing.assert_close(got[:, :, -1], wanted[:, :, -1], **EXACT)


def test_the_last_row_of_a_prefix_is_that_of_all_its_keys() -> None:
    phi_q, phi_k, v = drawn(10)
    causal = linear_attention(phi_q, phi_k, v, causal=True, chunk=3)
    for n in (1, 4, 10):
        both = linear_attention(*(t[:, :, :n] for t in (phi_q, phi_k, v)))
        torch.testing.assert_close(causal[:, :, n - 1], both[:, :, -1], **EXACT)


def test_keys_may_come_in_any_order_and_number() -> None:
    phi_q, phi_k, v = drawn(5, keys=9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    wanted = linear_attention(phi_q, phi_k, v)
    torch.testing.assert_close(wanted, whole(phi_q, phi_k, v), **EXACT)
    torch.testing.assert_close(linear_attention(phi_q, phi_k[:, :, order], v[:, :, order]), wanted, **EXACT)


@pytest.mark.parametrize("options", [{}, {"causal": True, "chunk": 3}])
def test_without_normalisation_it_is_the_plain_sum(options: dict[str, Any]) -> None:
    phi_q, phi_k, v = drawn(7)
    weights = phi_q @ phi_k.mT
    weights = weights.tril() if options else weights
    torch.testing.assert_close(linear_attention(phi_q, phi_k, v, normalize=False, **options), weights @ v, **EXACT)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients(rope: bool, decay: bool, causal: bool) -> None:
    if decay and not causal:
        return
    # Weights away from zero: where their sum is near eps, differences are too coarse.
    phi_q, phi_k, v = (
        (t + shift).requires_grad_() for t, shift in zip(drawn(5, batch=1, size=2), (1, 1, 0), strict=True)
    )
    turns = rope1d(5, 2, dtype=torch.float64) if rope else None
    gamma = torch.tensor([0.7, 0.9], dtype=torch.float64, requires_grad=True) if decay else None

    def call(*t: Any) -> Any:
        return linear_attention(*t[:3], causal=causal, chunk=2, rope=turns, decay=t[3])

    assert torch.autograd.gradcheck(call, (phi_q, phi_k, v, gamma))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    given = [t.to(dtype) for t in drawn(12)]
    for causal in (False, True):
        got = linear_attention(*given, causal=causal)
        assert got.dtype is dtype
        torch.testing.assert_close(
            got, linear_attention(*(t.float() for t in given), causal=causal).to(dtype), rtol=0, atol=0
        )


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_gives_nothing(causal: bool) -> None:
    phi_q, phi_k, v = drawn(4)
    assert linear_attention(phi_q[:, :, :0], phi_k[:, :, :0], v[:, :, :0], causal=causal).shape == (2, 2, 0, 5)
    assert linear_attention(phi_q[:0], phi_k[:0], v[:0], causal=causal).shape == (0, 2, 4, 5)
    if not causal:
        assert linear_attention(phi_q, phi_k[:, :, :0], v[:, :, :0]).abs().max() == 0


@pytest.mark.slow
def test_it_compiles_whole() -> None:
    phi_q, phi_k, v = (t.float() for t in drawn(9))
    call = torch.compile(linear_attention, backend="aot_eager", fullgraph=True)
    for options in ({}, {"causal": True, "chunk": 4, "decay": torch.tensor([0.5, 1.0]), "rope": rope1d(9, 4)}):
        torch.testing.assert_close(
            call(phi_q, phi_k, v, **options), linear_attention(phi_q, phi_k, v, **options), **CLOSE
        )
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phi_q": torch.zeros(2, 4, 8)}, "must have shapes"),
        ({"phi_q": torch.zeros(2, 1, 4, 8)}, "agree in batch and heads"),
        ({"v": torch.zeros(2, 2, 3, 5)}, "agree in batch and heads"),
        ({"phi_q": torch.zeros(2, 2, 3, 8), "causal": True}, "as many queries as keys"),
        ({"rope": rope1d(3, 4)}, r"rope must have shape \(4, dim / 2, 2\)"),
        ({"rope": rope1d(4, 6)}, "rope must have shape"),
        ({"decay": torch.ones(2)}, "decay needs causal=True"),
        ({"state": STATE}, "state needs causal=True"),
        ({"decay": 2.0, "causal": True}, "^decay must be Tensor"),
        ({"decay": torch.ones(3), "causal": True}, r"decay must have shape \(2,\)"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"mask must be bool of shape \(2, 4\)"),
        ({"mask": torch.ones(2, 4)}, "mask must be bool"),
        ({"state": STATE._replace(keys=torch.zeros(2, 2, 4)), "causal": True}, "state must hold"),
        ({"eps": -1.0}, "eps"),
        ({"chunk": 0, "causal": True}, "chunk"),
    ],
)
def test_what_cannot_be_right_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "phi_q": torch.zeros(2, 2, 4, 8),
        "phi_k": torch.zeros(2, 2, 4, 8),
        "v": torch.zeros(2, 2, 4, 5),
    }
    given |= change
    with pytest.raises(QuernelError, match=message):
        linear_attention(given.pop("phi_q"), given.pop("phi_k"), given.pop("v"), **given)


@pytest.mark.parametrize("tokens", [1, 6], ids=["recurrent", "chunked"])
def test_tokens_before_the_first_key_have_finite_gradients(tokens: int) -> None:
    phi = (1e3 * torch.rand(1, 1, tokens, 4)).requires_grad_()
    v = torch.randn(1, 1, tokens, 2, requires_grad=True)
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    out = linear_attention(phi, phi, v, causal=True, chunk=4, mask=mask, decay=torch.tensor([0.5]))
    assert not out.any()
    (1e6 * out).sum().backward()
    assert phi.grad.isfinite().all()
    assert v.grad.isfinite().all()
