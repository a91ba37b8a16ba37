"""Merging of attention over sets of keys: equal to attention over all, gradients too; sets a query does not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn.functional import merge_attentions

INF = float("inf")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k)
    return torch.einsum("bnhm,bmhe->bnhe", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("cuts", [(4, 6), (1, 3, 6), (10,)])
def test_parts_merge_to_the_whole_with_its_gradients(cuts: tuple[int, ...]) -> None:
    leaves = [x.requires_grad_() for x in (draw(2, 5, 3, 4), draw(2, 10, 3, 4, seed=1), draw(2, 10, 3, 6, seed=2))]
    q, k, v = leaves
    parts = [attend(q, a, b) for a, b in zip(k.split(cuts, 1), v.split(cuts, 1), strict=True)]
    got, wanted = merge_attentions(*zip(*parts, strict=True)), attend(q, k, v)
    weights = [draw(*x.shape, seed=3) for x in wanted]

    def gradients(outputs: Any) -> Any:
        return torch.autograd.grad(sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)), leaves)

    torch.testing.assert_close((*got, *gradients(got)), (*wanted, *gradients(wanted)))


@pytest.mark.parametrize("empty", [0, 1])
def test_a_set_without_keys_gives_the_other_side(empty: int) -> None:
    outs = [draw(3, 4, seed=i).requires_grad_() for i in range(2)]
    lses = [draw(3, seed=2 + i).requires_grad_() for i in range(2)]
    with torch.no_grad():
        lses[empty][1], outs[empty][1] = -INF, torch.nan
    out, lse = merge_attentions(outs, lses)
    torch.testing.assert_close(out[1], outs[1 - empty][1])
    torch.testing.assert_close(lse[1], lses[1 - empty][1])
    gradients = torch.autograd.grad(out.sum() + lse.sum(), [*outs, *lses])
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[empty][1].abs().sum() == gradients[2 + empty][1] == 0
    assert gradients[3 - empty][1] == 1 and (gradients[1 - empty][1] == 1).all()


def test_no_keys_on_either_side_is_nothing() -> None:
    outs = [torch.full((2, 3), torch.nan, requires_grad=True) for _ in range(2)]
    lses = [torch.full((2,), -INF, requires_grad=True) for _ in range(2)]
    out, lse = merge_attentions(outs, lses)
    assert (out == 0).all() and (lse == -INF).all()
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), [*outs, *lses]):
        assert (gradient == 0).all()
    assert (merge_attentions(outs[:1], lses[:1])[0] == 0).all()


def test_gradients_by_differences() -> None:
    arguments = [draw(2, 3, seed=i).requires_grad_() for i in range(3)]
    arguments += [draw(2, seed=3 + i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda *a: merge_attentions(a[:3], a[3:]), arguments)


def test_half_precision_is_merged_in_float32() -> None:
    outs, lses = [draw(40, 8, seed=i) for i in range(3)], [draw(40, seed=3 + i) for i in range(3)]
    out, lse = merge_attentions([o.bfloat16() for o in outs], [x.bfloat16() for x in lses])
    assert out.dtype is torch.bfloat16 and lse.dtype is torch.float32
    wanted = merge_attentions([o.bfloat16().double() for o in outs], [x.bfloat16().double() for x in lses])
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.double(), wanted[0], rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "at least one; got 0 and 0"),
        ([torch.ones(2, 3)], [], "got 1 and 0"),
        ([torch.ones(2, 3), torch.ones(2, 4)], [torch.ones(2)] * 2, r"the first, \(2, 3\)"),
        ([torch.ones(2, 3)], [torch.ones(2, 1)], r"got \(2, 3\) and \(2, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(outs: Any, lses: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        merge_attentions(outs, lses)
