"""SignProjection: collisions by the law of the angle, margins, bits."""

import numpy as np
import pytest
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing import SignProjection, angle_between

FALSE_ALARM = 1e-6  # of each statistical test below; seeds are fixed


def pair_at(angle, dim=6):
    """Return two vectors of different lengths at an angle."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, 2)))[0]
    return np.stack([3 * basis[:, 0], 0.2 * (np.cos(angle) * basis[:, 0] + np.sin(angle) * basis[:, 1])])


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.8, 0.98])
@pytest.mark.parametrize("n_concat", [1, 3])
def test_collisions_follow_the_law(share, n_concat):
    angle = share * np.pi
    family = SignProjection(6, 20_000, n_concat, seed=1)
    codes = family.codes(pair_at(angle))
    wanted = float(family.collision_probability(angle))
    assert wanted == pytest.approx((1 - share) ** n_concat)
    assert stats.binomtest(int((codes[0] == codes[1]).sum()), 20_000, wanted).pvalue > FALSE_ALARM / 12


@pytest.mark.parametrize("directions", ["rademacher", "sparse"])
def test_other_directions_are_close_in_many_dimensions(directions):
    # Two dense vectors in 200 dimensions; a third of them is still 67 terms. 0.02 is twenty times what the central
    # limit leaves and 5 standard errors of 20 000 hashes (0.0035 each).
    x = pair_at(np.pi / 3, dim=200)
    codes = SignProjection(200, 20_000, 1, directions=directions, seed=2).codes(x)
    assert abs((codes[0] == codes[1]).mean() - 2 / 3) < 0.02


def test_bits_are_the_signs_of_margins():
    x = np.random.default_rng(0).standard_normal((70, 9))
    family = SignProjection(9, 7, 5, seed=4)
    margins = family.margins(x)
    assert margins.shape == (70, 7, 5) and margins.dtype == np.float32
    np.testing.assert_array_equal(family.raw(x), margins >= 0)
    exact = (x @ family.projections.dense().T.astype(float)).reshape(70, 7, 5)
    np.testing.assert_allclose(margins, exact, atol=1e-5)
    assert family.codes(np.zeros((1, 9))).tolist() == [[31] * 7]  # zero counts as positive


def test_lengths_do_not_matter():
    x = np.random.default_rng(0).standard_normal((20, 9)).astype(np.float32)
    family = SignProjection(9, 7, 5)
    np.testing.assert_array_equal(family.codes(x), family.codes(x * 2.0**-20))


def test_angles():
    x, y = pair_at(1.0)
    assert float(angle_between(x, y)) == pytest.approx(1.0)
    assert angle_between(np.eye(3), np.ones(3)).tolist() == pytest.approx([np.arccos(3**-0.5)] * 3)
    with pytest.raises(QuernelError, match="no zero vector"):
        angle_between(np.zeros(2), np.ones(2))


@pytest.mark.parametrize("angle", [-0.1, 3.2, np.nan])
def test_impossible_angles(angle):
    with pytest.raises(QuernelError, match=r"angle must lie in \[0, pi\]"):
        SignProjection(4, 1, 1).hash_probability(angle)


def test_cauchy_directions_are_refused():
    with pytest.raises(QuernelError, match="directions must be one of 'gaussian', 'rademacher', 'sparse'"):
        SignProjection(4, 1, 1, directions="cauchy")
