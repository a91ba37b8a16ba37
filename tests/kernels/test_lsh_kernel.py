"""``LSHKernel``: closed forms against counted collisions, derivatives, Gram matrices, exact sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from quernel._errors import QuernelError
from quernel.hashing import debias
from quernel.kernels import LSHKernel
from quernel.kernels._collision import collision

# Of each test that counts: two-sided, shared by all its distances.
FALSE_ALARM = 1e-6
HASHES = 20_000
RATIOS = (0.1, 0.3, 1.0, 2.5, 5.0, 10.0)


def pairs_at(kernel: str, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Return one point, and points at distances ``RATIOS * width`` (or at angles) from it."""
    draw = np.random.default_rng(1)
    x, directions = draw.standard_normal(6), draw.standard_normal((len(RATIOS), 6))
    if kernel == "angular":
        e, f = np.linalg.qr(draw.standard_normal((6, 2)))[0].T
        angles = np.linspace(0.05, np.pi - 0.05, len(RATIOS))
        return e[None], np.cos(angles)[:, None] * e + np.sin(angles)[:, None] * f
    order = 1 if kernel == "l1" else 2
    steps = directions / np.linalg.norm(directions, order, axis=1, keepdims=True)
    return x[None], x + steps * width * np.array(RATIOS)[:, None]


def limits(probability: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts that a binomial of this probability leaves with ``FALSE_ALARM`` in all."""
    tail = FALSE_ALARM / (2 * probability.size)
    return stats.binom.ppf(tail, n, probability), stats.binom.isf(tail, n, probability)


@pytest.mark.parametrize("n_concat", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["l2", "l1", "angular"])
def test_collision_rates_are_the_closed_form(kernel: str, n_concat: int) -> None:
    form = LSHKernel(kernel, 4.0, n_concat)  # type: ignore[arg-type]
    x, y = pairs_at(kernel, form.width)
    family = form.family(6, HASHES, None if kernel == "angular" else 2**32)
    same = (family.codes(x) == family.codes(y)).sum(1)
    low, high = limits(form(x, y)[0], HASHES)
    assert (low <= same).all()
    assert (same <= high).all()


def test_collision_rates_of_sets_are_the_jaccard_similarity() -> None:
    form = LSHKernel("jaccard", n_concat=2)
    base = np.arange(400)
    others = [np.arange(start, start + 400) for start in (0, 20, 100, 200, 390)]
    family = form.family(None, HASHES // 40, None)
    # Bins of one permutation are not independent: 40 seeds of 500 tables, each with 400 items for 1,000 bins.
    same = np.zeros(len(others))
    for seed in range(40):
        family = form.family(None, HASHES // 40, None, seed=seed)
        same += (family.codes([base]) == family.codes(others)).mean(1)
    error = np.abs(same / 40 - form([base], others)[0])
    # A seed's mean has at most the spread of 400 independent items: 0.025 a seed, 0.004 over 40, six of them.
    assert (error < 0.024).all()


def test_numbers_checked_by_hand() -> None:
    form = LSHKernel("l2", 4.0, 2)
    got = form([[0.0]], [[0.5], [2.0], [5.0], [10.0], [40.0]])[0]
    np.testing.assert_allclose(got, [0.8105, 0.3715, 0.0919, 0.0248, 0.0016], atol=6e-5)


def test_rehashed_codes_collide_by_chance_and_no_more() -> None:
    form = LSHKernel("l2", 4.0, 2)
    x, y = pairs_at("l2", 4.0)
    family = form.family(6, HASHES, 32)
    same = (family.codes(x) == family.codes(y)).sum(1)
    k = form(x, y)[0]
    probability = k + (1 - k) / 32
    np.testing.assert_allclose(family.collision_probability(4.0 * np.array(RATIOS)), probability, atol=1e-6)
    low, high = limits(probability, HASHES)
    assert (low <= same).all()
    assert (same <= high).all()
    np.testing.assert_allclose(debias(probability, 1.0, 32), k)


@pytest.mark.parametrize("n_concat", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["l2", "l1", "angular"])
def test_gradients_also_of_coincident_points(kernel: str, n_concat: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    z = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    z[0] = x[0]
    x.requires_grad_()
    z.requires_grad_()
    for exact in (False, True):

        def k(x: torch.Tensor, z: torch.Tensor, exact: bool = exact) -> torch.Tensor:
            return collision(kernel, x, z, 4.0, n_concat, exact=exact)

        if kernel == "l1":
            # cdist's own gradient at a tie of coordinates is a choice; apart from it the form is smooth.
            assert torch.autograd.gradcheck(k, (x, z.detach()[1:].requires_grad_()), atol=1e-6)
            (grad,) = torch.autograd.grad(k(x, z)[0, 0], x)
            assert not grad.any()
        else:
            assert torch.autograd.gradcheck(k, (x, z), atol=1e-6)


@pytest.mark.parametrize("kernel", ["l2", "l1", "angular"])
def test_float32_stays_finite_from_touching_to_far(kernel: str) -> None:
    x = torch.zeros(1, 2) + torch.tensor([1.0, 0.0])
    z = x + torch.tensor([[0.0, 0.0], [1e-7, 0.0], [1e-3, 0.0], [0.0, 1.0], [1e6, 1e6]])
    x.requires_grad_()
    k = collision(kernel, x, z, 4.0, 2)
    (grad,) = torch.autograd.grad(k.sum(), x)
    assert grad.isfinite().all()
    assert ((k >= 0) & (k <= 1)).all()
    assert (k.diff(dim=1) <= 1e-6).all() or kernel == "angular"


@pytest.mark.parametrize("kernel", ["l2", "l1", "angular"])
def test_gram_matrices_are_positive_definite_and_of_the_input_s_precision(kernel: str) -> None:
    x = np.random.default_rng(0).standard_normal((60, 4))
    form = LSHKernel(kernel)  # type: ignore[arg-type]
    gram = form(x)
    np.testing.assert_allclose(gram, gram.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(gram), 1, atol=1e-3)
    assert np.linalg.eigvalsh(gram).min() > -1e-6
    assert form(x.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(form(torch.from_numpy(x)).numpy(), gram)


def test_sums_are_weighted_rows_of_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quernel.kernels.lsh_kernel._BLOCK", 30)
    draw = np.random.default_rng(0)
    x, q, w = draw.standard_normal((50, 3)), draw.standard_normal((4, 3)), draw.standard_normal((50, 2))
    form = LSHKernel()
    np.testing.assert_allclose(form.sums(q, x, w), form(q, x) @ w)
    np.testing.assert_allclose(form.sums(q, x), form(q, x).sum(1))
    sets = [[1, 2, 3], [2, 3, 4, 4]]
    np.testing.assert_allclose(LSHKernel("jaccard", n_concat=1)(sets), [[1, 0.5], [0.5, 1]])


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: LSHKernel(width=0.0), "width"),
        (lambda: LSHKernel("rbf"), "kernel"),
        (lambda: LSHKernel(n_concat=0), "n_concat"),
        (lambda: LSHKernel()([[np.nan]]), "X"),
        (lambda: LSHKernel()([[1.0]], [[1.0, 2.0]]), "Y"),
        (lambda: LSHKernel().sums([[1.0]], [[1.0], [2.0]], [1.0]), "weights"),
        (lambda: LSHKernel("jaccard").family(3, 2, 4), "dim"),
        (lambda: LSHKernel("l2").family(3, 2, None), "n_cells"),
        (lambda: LSHKernel("l1").family(3, 2, 4, directions="sparse"), "directions"),
    ],
)
def test_bad_input_is_named(call, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        call()
