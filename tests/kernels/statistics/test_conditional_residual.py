"""ConditionalResidual: what is removed, what is kept, its modes, its files and its errors."""

import numpy as np
import pytest
import torch

import quernel
from quernel._errors import FormatError, QuernelError
from quernel.kernels import ConditionalResidual
from tests.reference import schur_entropy as oracle
from tests.reference.schur_entropy import repeated_prompts as pairs


@pytest.mark.parametrize("eta", [0.0, 1e-3, 0.1])
def test_it_is_the_regression_s_residual(eta):
    t, x = pairs()
    model = ConditionalResidual(eta=eta)
    left = model.fit_transform(t, x)
    phi_t, phi_x = oracle.cosine_features(t), oracle.cosine_features(x)
    gamma = oracle.gamma(phi_t, phi_x, eta)
    np.testing.assert_allclose(left, phi_x - phi_t @ gamma.T, atol=1e-10)
    np.testing.assert_allclose(left.T @ phi_t / len(t), eta * gamma, atol=1e-10)
    np.testing.assert_allclose(model.transform(t, keep="explained"), phi_t @ gamma.T, atol=1e-10)
    np.testing.assert_allclose(left + model.transform(t, x, keep="explained"), phi_x, atol=1e-12)


def test_new_pairs_are_mapped_by_the_same_regression_and_the_same_frequencies():
    t, x = (np.concatenate([rows[i::6] for i in range(6)]) for rows in pairs())  # every prompt in the last ten rows too
    options = {"kernel": "gaussian", "bandwidth": (2.0, 3.0), "n_features": 40}
    model = ConditionalResidual(**options).fit(t[:50], x[:50])
    left = model.transform(t[50:], x[50:])
    maps = model.choice.maps((5, 8))
    phi = [side.features(torch.from_numpy(rows)).numpy() for side, rows in zip(maps, (t, x), strict=True)]
    gamma = oracle.gamma(phi[0][:50], phi[1][:50], 1e-3)
    np.testing.assert_allclose(left, (phi[1] - phi[0] @ gamma.T)[50:], atol=1e-9)
    # Frequencies that were drawn anew for the query would leave about all of it, or more.
    assert np.square(left).sum() < 0.6 * np.square(phi[1][50:]).sum()
    other = ConditionalResidual(**options, random_state=1).fit(t[:50], x[:50])
    model.weights_ = other.weights_
    assert np.square(model.transform(t[50:], x[50:])).sum() > np.square(phi[1][50:]).sum()


def test_one_hot_prompts_remove_the_means_of_classes():
    labels = np.arange(60) % 3
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, 6))[labels] + 0.3 * draw.standard_normal((60, 6))
    left = ConditionalResidual(eta=0.0).fit_transform(np.eye(3)[labels], x)
    rows = oracle.cosine_features(x)
    means = np.stack([rows[labels == label].mean(0) for label in range(3)])
    np.testing.assert_allclose(left, rows - means[labels], atol=1e-12)


def test_precision_and_kind_are_kept():
    t, x = pairs()
    model = ConditionalResidual().fit(t, x)
    assert model.transform(t, x.astype(np.float32)).dtype == np.float32
    assert model.transform(t, x).dtype == np.float64
    assert model.transform(t.astype(int) + 1, x.astype(int) + 1).dtype == np.float64
    there = model.transform(torch.from_numpy(t), torch.from_numpy(x).float())
    assert isinstance(there, torch.Tensor) and there.dtype is torch.float32
    np.testing.assert_allclose(there, model.transform(t, x), atol=1e-5)


def test_modes_are_the_largest_directions_and_their_pairs():
    draw = np.random.default_rng(0)
    prompts = np.eye(2)[np.arange(80) % 2]
    x = np.hstack((prompts * 3, np.zeros((80, 4))))
    x[:, 2] += np.where(np.arange(80) < 40, 1.0, -1.0) * 2
    x[:, 3] += 0.1 * draw.standard_normal(80)
    model = ConditionalResidual(eta=0.0).fit(prompts, x)
    first, second = model.modes(prompts, x, 2, n_pairs=40)
    assert abs(first.direction[2]) > 0.99 and first.weight > 10 * second.weight > 0
    # All on one side of the direction.
    assert len({bool(pair < 40) for pair in first.pairs}) == 1
    residual = oracle.by_features(*(oracle.cosine_features(a) for a in (prompts, x)), 0.0)[0]
    assert first.weight == pytest.approx(np.linalg.eigvalsh(residual)[-1])
    assert len(model.modes(prompts, x, 99)) == 6 and len(second.pairs) == 40


def test_the_ridge_can_be_chosen():
    t, x = pairs()
    assert 1e-8 <= ConditionalResidual(eta="loo").fit(t, x).eta_ <= 10


def test_saving_keeps_everything(tmp_path):
    t, x = pairs()
    for number, options in enumerate(({}, {"kernel": "gaussian", "bandwidth": 2.0, "n_features": 12, "eta": "loo"})):
        model = ConditionalResidual(**options).fit(t, x)
        loaded = quernel.load(model.save(tmp_path / str(number)))
        np.testing.assert_array_equal(loaded.transform(t, x), model.transform(t, x))
        assert loaded.eta_ == model.eta_ and repr(loaded) == repr(model)
        np.testing.assert_array_equal(loaded.modes(t, x, 1)[0].pairs, model.modes(t, x, 1)[0].pairs)
    model.weights_ = model.weights_[:, :-1]
    with pytest.raises(FormatError, match="array 'weights' must be float64 of shape"):
        quernel.load(model.save(tmp_path / "bad"))
    empty = quernel.load(ConditionalResidual().save(tmp_path / "empty"))
    with pytest.raises(QuernelError, match="not fitted"):
        empty.transform(t, x)


def test_errors_name_what_is_wrong():
    t, x = pairs()
    with pytest.raises(QuernelError, match="not fitted; call fit"):
        ConditionalResidual().transform(t, x)
    with pytest.raises(QuernelError, match="residuals need features"):
        ConditionalResidual("gaussian", bandwidth=1.0)
    with pytest.raises(QuernelError, match="at least 2 pairs; got 1"):
        ConditionalResidual().fit(t[:1], x[:1])
    model = ConditionalResidual().fit(t, x)
    with pytest.raises(QuernelError, match="X must have 8 columns as in fit; got 5"):
        model.transform(t, t)
    with pytest.raises(QuernelError, match="T must have 5 columns as in fit; got 8"):
        model.transform(x, x)
    with pytest.raises(QuernelError, match="X is what the residual is of"):
        model.transform(t)
    with pytest.raises(QuernelError, match="keep must be one of"):
        model.transform(t, x, keep="both")
    with pytest.raises(QuernelError, match="got 59 and 60 rows"):
        model.transform(t[1:], x)
