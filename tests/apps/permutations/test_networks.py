"""Networks trained together: each as if it were alone, gradients by hand, and what theory says of many of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from quernel._errors import QuernelError
from quernel.apps.permutations import average_outputs, draw_networks, network_outputs, networks, train_networks
from quernel.kernels.ntk import permutation_moments
from tests.reference import ntk_permutations as reference

EYE = torch.eye(3, dtype=torch.float64)
CYCLE = EYE[[1, 2, 0]]


def test_together_is_each_alone_with_gradients_by_hand(monkeypatch):
    drawn = draw_networks(5, 64, 3, 3, seed=0)
    start = drawn.hidden.clone()
    monkeypatch.setattr(networks, "_TOGETHER", 2 * 64 * 6)  # groups of two, the last of one
    with pytest.warns(ConvergenceWarning, match="take more steps"):
        trained, losses = train_networks(drawn, EYE, CYCLE, n_steps=25, tol=1e-30)
    assert torch.equal(drawn.hidden, start)
    for i in range(5):
        hidden, output = reference.trained(drawn.hidden[i].numpy(), drawn.output[i].numpy(), CYCLE.numpy(), 1.0, 25)
        np.testing.assert_allclose(trained.hidden[i], hidden, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(trained.output[i], output, rtol=1e-10, atol=1e-12)
        error = network_outputs(trained.hidden[i], trained.output[i], EYE) - CYCLE
        assert float(losses[i]) == pytest.approx(0.5 * float(error.square().sum()), rel=1e-9)


def test_training_ends_where_the_loss_is_small():
    trained, losses = train_networks(draw_networks(3, 256, 3, 3, seed=1), EYE, CYCLE, tol=1e-8)
    assert float(losses.max()) <= 1e-8
    np.testing.assert_allclose(average_outputs(trained, EYE), CYCLE, atol=2e-4)
    by_hand = sum(network_outputs(*weights, EYE) for weights in zip(trained.hidden, trained.output, strict=True)) / 3
    np.testing.assert_allclose(average_outputs(trained, EYE), by_hand, rtol=1e-12)


def test_many_rows_are_averaged_in_parts(monkeypatch):
    drawn = draw_networks(2, 32, 3, 3, seed=0)
    x = torch.rand(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = average_outputs(drawn, x)
    monkeypatch.setattr(networks, "_TOGETHER", 7 * 32)
    torch.testing.assert_close(average_outputs(drawn, x), whole, rtol=1e-13, atol=0)


def test_bad_input_is_refused():
    drawn = draw_networks(2, 16, 3, 3, seed=0)
    with pytest.raises(QuernelError, match=r"lr must be below 2 / \(largest eigenvalue"):
        train_networks(drawn, EYE, CYCLE, lr=10.0)
    with pytest.raises(QuernelError, match=r"rows must have shapes \(m, 3\) and \(m, 3\)"):
        train_networks(drawn, EYE, CYCLE[:2])
    with pytest.raises(QuernelError, match="rows must have shapes"):
        average_outputs(drawn, EYE[:, :2])
    for sizes in ((0, 16, 3, 3), (2, 0, 3, 3), (2, 16, 0, 3), (2, 16, 3, 0)):
        with pytest.raises(QuernelError, match="must be an integer in"):
            draw_networks(*sizes)
    for options in ({"n_steps": 0}, {"tol": 0.0}, {"lr": 0.0}):
        with pytest.raises(QuernelError, match="must be"):
            train_networks(drawn, EYE, CYCLE, **options)


def test_numbers_that_overflow_are_no_networks(monkeypatch):
    monkeypatch.setattr(networks, "check_rate", lambda lr, x: None)
    with pytest.raises(QuernelError, match=r"training diverged at lr=1e\+100: .* need a lower rate"):
        train_networks(draw_networks(4, 16, 3, 3, seed=0), EYE, CYCLE, lr=1e100)


@pytest.mark.slow
def test_trained_networks_are_what_theory_says():
    k, count = 5, 100
    eye = torch.eye(k, dtype=torch.float64)
    trained, losses = train_networks(draw_networks(count, 2048, k, k, seed=0), eye, eye, n_steps=300)
    assert float(losses.max()) < 1e-10
    pairs = np.zeros((10, k))
    for row, places in zip(pairs, itertools.combinations(range(k), 2), strict=True):
        row[list(places)] = 1
    x = torch.from_numpy(pairs / math.sqrt(2))
    outputs = torch.stack([network_outputs(*w, x) for w in zip(trained.hidden, trained.output, strict=True)]).numpy()
    on = pairs == 1
    moments = permutation_moments(k, 2)
    assert outputs[:, on].mean() == pytest.approx(0.5606, abs=0.02)
    assert outputs[:, ~on].mean() == pytest.approx(-0.0146, abs=0.005)
    assert outputs.var(0, ddof=1).mean() == pytest.approx(0.01323, rel=0.15)
    middle = float(moments.mean_on + moments.mean_off) / 2
    midpoint, sign = (((outputs > cut) == on).all(2).mean() for cut in (middle, 0.0))
    assert midpoint >= 0.93
    assert 0.10 <= sign <= 0.25
