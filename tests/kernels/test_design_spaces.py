"""Spaces: orthonormal bases, exact draws from nu, index sets, and the moment test of spaces from elsewhere."""

import numpy as np
import pytest
from numpy.polynomial import legendre
from scipy.special import eval_legendre

from quernel._errors import QuernelError
from quernel._random import generator
from quernel.kernels import LegendreSpace, ProjectionDPP, TrigonometricSpace
from quernel.testing import require_distribution, require_mean
from tests.reference.volume_sampling import legendre_marginal

SPACES = [LegendreSpace(6), LegendreSpace(4, 2), LegendreSpace(5, 3, index_set="hyperbolic"), TrigonometricSpace(3),
          TrigonometricSpace(3, 2), TrigonometricSpace(4, 2, index_set="hyperbolic")]  # fmt: skip


def grid(space, nodes=24):
    """Return points and masses of a product rule that is exact for products of two functions of the space."""
    if isinstance(space, LegendreSpace):
        x, w = legendre.leggauss(nodes)
        w = w / 2
    else:
        x, w = np.arange(nodes) / nodes, np.full(nodes, 1 / nodes)
    axes = np.meshgrid(*[x] * space.dim, indexing="ij")
    masses = np.meshgrid(*[w] * space.dim, indexing="ij")
    return np.stack([a.ravel() for a in axes], 1), np.prod(masses, 0).ravel()


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_functions_are_orthonormal(space):
    x, masses = grid(space)
    phi = space.phi(x)
    assert phi.shape == (len(x), space.n_features)
    np.testing.assert_allclose(phi.T @ (masses[:, None] * phi), np.eye(space.n_features), atol=1e-12)


def test_legendre_functions_are_scaled_legendre_polynomials():
    x = np.linspace(-1, 1, 33)
    wanted = np.stack([np.sqrt(2 * j + 1) * eval_legendre(j, x) for j in range(31)], 1)
    np.testing.assert_allclose(LegendreSpace(30).phi(x), wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("degree", "dim", "total", "hyperbolic"), [(8, 2, 45, 23), (3, 3, 20, 13), (0, 4, 1, 1)])
def test_index_sets_have_their_sizes_and_no_repeats(degree, dim, total, hyperbolic):
    for index_set, size in (("total", total), ("hyperbolic", hyperbolic)):
        space = LegendreSpace(degree, dim, index_set=index_set)
        assert space.n_features == len(set(map(tuple, space.indices.tolist()))) == size
        orders = space.indices
        assert ((orders.sum(1) <= degree) if index_set == "total" else ((orders + 1).prod(1) <= degree + 1)).all()
    waves = TrigonometricSpace(degree, dim).indices
    assert len(set(map(tuple, waves.tolist()))) == len(waves)
    assert (((waves + 1) // 2).sum(1) <= degree).all()


def test_legendre_draws_follow_nu():
    space = LegendreSpace(11)
    require_distribution(space.sample_nu(20_000, 0)[:, 0], legendre_marginal(space))
    require_distribution(space.sample_mu(20_000, 1)[:, 0], lambda x: (x + 1) / 2)


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_weighted_moments_of_draws_are_those_of_mu(space):
    x = space.sample_nu(6000, 3)
    phi = space.phi(x)
    lengths = (phi**2).sum(1)
    weights = space.n_features / lengths
    require_mean(weights, 1.0)
    require_mean(np.einsum("n,ni,nj->nij", weights, phi, phi), np.eye(space.n_features))


def test_a_rejected_proposal_is_every_second():
    # The bound (2j + 1) P_j^2 (1 - x^2)^(1/2) <= 4/pi is what makes the rejection exact.
    x = np.cos(np.linspace(0.001, np.pi - 0.001, 5001))
    for j in (0, 1, 2, 7, 50, 400):
        assert ((2 * j + 1) * eval_legendre(j, x) ** 2 * np.sqrt(1 - x**2)).max() <= 4 / np.pi


class Given:
    """A space from elsewhere: functions, and draws from nu of the Legendre space they come from."""

    def __init__(self, space, turn=None):
        self._space, self._turn = space, np.eye(space.n_features) if turn is None else turn
        self.n_features = self._turn.shape[1]

    def phi(self, x):
        return self._space.phi(x) @ self._turn

    def sample_mu(self, n, random_state=None):
        return self._space.sample_mu(n, random_state)

    def sample_nu(self, n, random_state=None):
        return self._space.sample_nu(n, random_state)


def test_own_spaces_are_taken_if_their_moments_are_right():
    turn = np.linalg.qr(generator(0).standard_normal((6, 6)))[0]
    assert ProjectionDPP(Given(LegendreSpace(5), turn)).sample(0).shape == (6, 1)


@pytest.mark.parametrize(
    "turn",
    [np.diag([1, 1, 1, 1, 1, 1.3]), 2 * np.eye(6), np.eye(6) + 0.1 * np.eye(6, k=1), np.eye(6)[:, [0, 1, 2, 3, 4, 4]]],
    ids=["one longer", "all longer", "not at right angles", "one twice"],
)
def test_functions_that_are_not_orthonormal_are_refused(turn):
    class Own(Given):
        def sample_nu(self, n, random_state=None):
            # From its own |phi|^2, by picking among many draws of the uniform distribution.
            rng = generator(random_state)
            x = self.sample_mu(50 * n, rng)
            p = (self.phi(x) ** 2).sum(1)
            return x[rng.choice(len(x), n, p=p / p.sum())]

    with pytest.raises(ValueError, match="not orthonormal"):
        ProjectionDPP(Own(LegendreSpace(5), turn))


def test_bad_arguments_are_named():
    for make, message in (
        (lambda: LegendreSpace(-1), "degree must be an integer"),
        (lambda: LegendreSpace(3, 0), "dim must be an integer"),
        (lambda: TrigonometricSpace(3, index_set="full"), "index_set must be one of"),
        (lambda: LegendreSpace(3).phi([[0.1, 0.2]]), r"x must have shape \(n, 1\)"),
        (lambda: LegendreSpace(3).phi([0.1, 1.5]), r"Map each variable to \[-1, 1\]"),
        (lambda: LegendreSpace(3).phi([np.nan]), "NaN"),
        (lambda: ProjectionDPP(object()), "space must be Space"),
    ):
        with pytest.raises(QuernelError, match=message):
            make()


def test_more_functions_than_can_be_fitted_are_refused_at_once():
    with pytest.raises(QuernelError, match="degree=50 in dim=6 gives more than 100,000 functions"):
        LegendreSpace(50, 6)
