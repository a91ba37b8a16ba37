"""``HOCLoss``: the double loop, the authors' mask, batches of one class, order, gradients, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.train import HOCLoss
from tests.reference import stationary_representations as oracle


def batch(n=12, d=5, classes=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    new, old = (torch.randn(n, d, dtype=dtype, generator=g) for _ in range(2))
    return torch.randn(n, d + 1, dtype=dtype, generator=g), torch.arange(n) % classes, new, old


@pytest.mark.parametrize("reference_mask", [False, True])
@pytest.mark.parametrize(
    ("n", "classes", "mu", "lam"), [(12, 4, 10.0, 0.1), (5, 5, 3.0, 0.5), (5, 2, 10.0, 0.0), (1, 1, 10.0, 0.3)]
)
def test_it_is_the_double_loop(n, classes, mu, lam, reference_mask):
    logits, y, new, old = batch(n, classes=classes)
    got = float(HOCLoss(mu, lam, reference_mask=reference_mask)(logits, y, new, old))
    cross, constraint = oracle.cross_entropy(logits, y), oracle.hoc(y, new, old, mu, reference_mask=reference_mask)
    assert got == pytest.approx(lam * cross + (1 - lam) * constraint, abs=1e-12)


def test_a_batch_of_one_class_keeps_the_attraction_alone():
    logits, _, new, old = batch()
    y = torch.zeros(len(new), dtype=torch.int64)
    attraction = 10 * float(F.cosine_similarity(new, old).mean())
    new.requires_grad_()
    loss = HOCLoss(lam=0.0)(logits, y, new, old)
    assert float(loss.detach()) == pytest.approx(-attraction, abs=1e-12)
    loss.backward()
    assert bool(new.grad.isfinite().all()) and bool(new.grad.abs().sum() > 0)
    theirs = float(HOCLoss(lam=0.0, reference_mask=True)(logits, y, new.detach(), old))
    assert theirs == pytest.approx(-attraction + math.log(len(y)), abs=1e-12)


def test_the_authors_mask_differs_as_much_as_it_was_seen_to():
    # 64 samples of 8 classes near random directions: each row has 8 terms of 1 among 64.
    logits, y, new, old = batch(64, 63, 8)
    ours, theirs = (float(HOCLoss(lam=0.0, reference_mask=m)(logits, y, new, old)) for m in (False, True))
    assert 0.01 < theirs - ours < 0.15


def test_the_order_of_samples_does_not_matter():
    logits, y, new, old = batch()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    loss = HOCLoss()
    assert float(loss(logits[order], y[order], new[order], old[order])) == pytest.approx(
        float(loss(logits, y, new, old)), abs=1e-12
    )


def test_labels_may_be_named_otherwise_in_the_constraint():
    _, y, new, old = batch()
    assert torch.equal(HOCLoss().constraint(y, new, old), HOCLoss().constraint(7 - y, new, old))


def test_gradients_reach_the_new_features_only():
    logits, y, new, old = batch(6)
    logits, new, old = (t.requires_grad_() for t in (logits, new, old))
    HOCLoss()(logits, y, new, old).backward()
    assert old.grad is None
    assert bool(new.grad.abs().sum() > 0) and bool(logits.grad.abs().sum() > 0)
    frozen = old.detach()
    for mask in (False, True):
        assert torch.autograd.gradcheck(lambda a, b, m=mask: HOCLoss(reference_mask=m)(a, y, b, frozen), (logits, new))


def test_identical_features_are_better_than_turned_ones():
    logits, y, new, _ = batch()
    loss = HOCLoss(lam=0.0)
    assert float(loss(logits, y, new, new)) < float(loss(logits, y, new.roll(1, 1), new))


def test_half_precision_is_summed_in_float32():
    logits, y, new, old = batch(dtype=torch.bfloat16)
    got = HOCLoss()(logits, y, new, old)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(
        float(HOCLoss()(*(t.double() if t.is_floating_point() else t for t in (logits, y, new, old)))), abs=1e-4
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda a: (a[0], a[1], a[2], a[3][:, :-1]),
        lambda a: (a[0], a[1][:-1], a[2], a[3]),
        lambda a: (a[0][:-1], a[1], a[2], a[3]),
        lambda a: tuple(t[:0] for t in a),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change):
    with pytest.raises(QuernelError, match=r"same shape|same N >= 1"):
        HOCLoss()(*change(batch()))


@pytest.mark.parametrize("options", [{"mu": 0.0}, {"lam": 1.5}, {"lam": -0.1}, {"reference_mask": 1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(QuernelError, match=next(iter(options))):
        HOCLoss(**options)
