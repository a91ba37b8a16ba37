"""``CascadeClassifier``: predictions sample by sample, thresholds against all there are, what must not happen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import MatryoshkaHead
from quernel.train import CascadeClassifier, MatryoshkaLoss
from tests.reference import matryoshka as oracle

DIMS = (2, 4, 8)


def probabilities(head, z):
    with torch.no_grad():
        return np.stack([head(z, dim=m).softmax(-1).numpy() for m in head.dims])


def small(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    head = MatryoshkaHead(8, 3, DIMS, generator=g)
    z = 3 * torch.randn(n, 8, generator=g)
    # Classes that the whole head mostly knows.
    y = head(z, dim=8).argmax(1)
    y[:2] = (y[:2] + 1) % 3
    return head, z, y


@pytest.mark.parametrize("thresholds", [(0.6, 0.5), (0.0, 0.0), (2.0, 0.4), (0.9, 2.0)])
def test_predictions_are_those_of_a_loop(thresholds):
    head, z, _ = small(50)
    labels, dims = CascadeClassifier(head, thresholds).predict(z, return_dims=True)
    wanted = oracle.cascade(probabilities(head, z), DIMS, thresholds)
    assert (labels.tolist(), dims.tolist()) == wanted


def test_thresholds_above_one_are_the_whole_head():
    head, z, _ = small(50)
    for cascade in (CascadeClassifier(head), CascadeClassifier(head, (1.01, 1.5))):
        labels, dims = cascade.predict(z, return_dims=True)
        assert torch.equal(labels, head(z, dim=8).argmax(1)) and set(dims.tolist()) == {8}


@pytest.mark.parametrize("seed", range(5))
def test_calibration_keeps_the_accuracy_and_is_near_the_best_there_is(seed):
    head, z, y = small(seed=seed)
    drop = 1 / 12 + 1e-9
    cascade = CascadeClassifier(head).calibrate(z, y, max_drop=drop)
    labels, dims = cascade.predict(z, return_dims=True)
    assert float(dims.float().mean()) == pytest.approx(cascade.expected_dim_)
    assert float((labels == y).float().mean()) == pytest.approx(cascade.accuracy_)
    whole = float((head(z, dim=8).argmax(1) == y).float().mean())
    assert cascade.accuracy_ >= whole - drop - 1e-9
    best = oracle.cheapest_cascade(probabilities(head, z), y.numpy(), DIMS, 1 - whole + drop)
    # One threshold at a time may stop short of what two together would reach.
    assert best - 1e-9 <= cascade.expected_dim_ <= best + 0.35 * (8 - best) + 1e-9


def test_easy_digits_take_few_dimensions():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    axes = torch.linalg.svd(x[:900] - x[:900].mean(0))[2].T
    z = (x - x[:900].mean(0)) @ axes[:, :32]
    head = MatryoshkaHead(32, 10, (4, 8, 16, 32), generator=torch.Generator().manual_seed(0))
    loss, adam = MatryoshkaLoss(F.cross_entropy), torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(150):
        adam.zero_grad()
        loss(head(z[:900]), y[:900]).backward()
        adam.step()
    cascade = CascadeClassifier(head).calibrate(z[900:1300].numpy(), y[900:1300].numpy(), max_drop=0.005)
    labels, dims = cascade.predict(z[1300:].numpy(), return_dims=True)
    whole = float((head(z[1300:], dim=32).argmax(1) == y[1300:]).float().mean())
    assert dims.mean() < 16
    # 497 samples: an accuracy drop of 0.02 beyond the allowed one is three standard errors of a paired difference.
    assert float((labels == y[1300:].numpy()).mean()) >= whole - 0.025


def test_no_drop_allowed_and_one_stage():
    head, z, y = small(40)
    cascade = CascadeClassifier(head).calibrate(z, y, max_drop=0.0)
    assert cascade.accuracy_ >= float((head(z, dim=8).argmax(1) == y).float().mean()) - 1e-9
    single = CascadeClassifier(MatryoshkaHead(8, 3, (8,))).calibrate(z, y)
    assert single.thresholds_ == () and single.expected_dim_ == 8.0
    assert single.predict(z[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, z, y: CascadeClassifier(torch.nn.Linear(8, 3)), "head must be MatryoshkaHead; got Linear"),
        (
            lambda h, z, y: CascadeClassifier(h, (0.5,)),
            "thresholds must be 2 numbers, one for each of dims but the last",
        ),
        (lambda h, z, y: CascadeClassifier(h, (0.5, -1.0)), "thresholds must be a finite number"),
        (lambda h, z, y: CascadeClassifier(h).calibrate(z, y[:3]), "y must be 12 integers"),
        (lambda h, z, y: CascadeClassifier(h).calibrate(z, y.float()), "y must be 12 integers"),
        (lambda h, z, y: CascadeClassifier(h).calibrate(z[:0], y[:0]), "n > 0"),
        (lambda h, z, y: CascadeClassifier(h).calibrate(z, y, max_drop=-0.1), "max_drop must be a finite number"),
        (lambda h, z, y: CascadeClassifier(h).predict(z[:, :4]), r"X must have shape \(n, 8\); got \(12, 4\)"),
        (lambda h, z, y: CascadeClassifier(h).predict(z * np.nan), "X holds NaN"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call(*small())
