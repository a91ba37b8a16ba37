"""FrankWolfe: the textbook's iterates, the certified gap, the bound under a degraded oracle, variants and errors."""

import numpy as np
import pytest
from scipy import sparse

from quernel._errors import QuernelError
from quernel.kernels import FrankWolfe
from quernel.kernels._frank_wolfe_steps import ActiveSet, Atoms, Given, open_loop_step
from quernel.search import FlatIndex, MaxIPIndex
from tests.reference import frank_wolfe as oracle

SAME = 1e-8  # float64 sums in another order over some hundred steps
RULES = {
    "linesearch": oracle.line_search,
    "2/(t+2)": lambda t, *_: 2 / (t + 2),
}


def problem(n=300, d=8, inside=True, seed=0):
    """Return atoms, and a target in their hull or far outside."""
    draw = np.random.default_rng(seed)
    atoms = draw.standard_normal((n, d)) + 3
    target = draw.dirichlet(np.ones(n)) @ atoms if inside else 10 * draw.standard_normal(d)
    return atoms, target


def value(w, target):
    return 0.5 * float((w - target) @ (w - target))


def gap(atoms, w, target):
    return float(((w - atoms) @ (w - target)).max())


def least(atoms, target):
    return FrankWolfe(variant="pairwise", tol=1e-12, max_iter=20_000).fit(atoms, target).objective_


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("step", list(RULES))
@pytest.mark.parametrize("lmo", ["exact", "index"])
def test_iterates_are_the_textbooks(inside, step, lmo):
    atoms, target = problem(inside=inside)
    points = oracle.frank_wolfe(atoms, target, 7, 60, RULES[step])
    for t in (1, 2, 17, 60):
        # An exact index with kappa beyond all measure: every answer is taken, no scan steps in.
        index = "exact" if lmo == "exact" else oracle.Lookup()
        model = FrankWolfe(lmo=index, step=step, start=7, tol=1e-15, max_iter=t, kappa=1e12).fit(atoms, target)
        np.testing.assert_allclose(model.point_, points[t], atol=SAME)
        assert model.history_["objective"][-1] == pytest.approx(value(points[t - 1], target), abs=SAME)


def test_the_default_start_is_the_best_atom_at_the_mean():
    atoms, target = problem()
    wanted = int(np.argmin(atoms @ (atoms.mean(0) - target)))
    assert FrankWolfe(max_iter=1, tol=1e-15).fit(atoms, target).history_["objective"][0] == pytest.approx(
        value(atoms[wanted], target)
    )


@pytest.mark.parametrize("variant", ["vanilla", "away", "pairwise"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_certificate(variant, inside):
    atoms, target = problem(inside=inside)
    model = FrankWolfe(variant=variant, tol=1e-3, max_iter=20_000).fit(atoms, target)
    assert model.converged_ and model.duality_gap_ <= 1e-3
    assert model.duality_gap_ == pytest.approx(gap(atoms, model.point_, target), abs=1e-10)
    assert -1e-10 <= model.objective_ - least(atoms, target) <= 1e-3
    assert (model.weights_ > 0).all() and model.weights_.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(model.weights_ @ atoms[model.support_], model.point_, atol=1e-12)
    np.testing.assert_allclose(model.coef_.toarray() @ atoms, model.point_, atol=1e-12)
    assert len(np.unique(model.support_)) == len(model.support_) <= model.n_iter_ + 1
    assert model.objective_ == pytest.approx(value(model.point_, target), abs=1e-12)


@pytest.mark.parametrize("variant", ["away", "pairwise"])
def test_a_known_projection(variant):
    y = np.random.default_rng(3).standard_normal(30)
    model = FrankWolfe(variant=variant, tol=1e-12).fit(np.eye(30), y)
    np.testing.assert_allclose(model.coef_.toarray(), oracle.project_to_simplex(y), atol=1e-6)


def broken(kind):
    """Return an index that is of no use."""
    draw = np.random.default_rng(0)
    choices = {
        "random": lambda products: int(draw.integers(len(products))),
        "worst": lambda products: int(np.argmin(products)),
        "silent": lambda products: -1,
        "stuck": lambda products: 0,
    }
    return oracle.Lookup(choices[kind])


@pytest.mark.parametrize("kind", ["random", "worst", "silent", "stuck"])
@pytest.mark.parametrize("variant", ["vanilla", "away", "pairwise"])
def test_a_broken_index_costs_scans_and_nothing_else(kind, variant):
    atoms, target = problem()
    model = FrankWolfe(lmo=broken(kind), variant=variant, tol=1e-2, max_iter=20_000).fit(atoms, target)
    assert model.converged_ and gap(atoms, model.point_, target) <= 1e-2 + 1e-10
    assert model.duality_gap_ == pytest.approx(gap(atoms, model.point_, target), abs=1e-10)
    assert model.n_exact_scans_ > 1 and 0 <= model.success_rate_ < 1
    assert model.history_["exact"].sum() + 2 >= model.n_exact_scans_ > model.history_["exact"].sum()


@pytest.mark.parametrize("step", ["linesearch", "2/(t+2)", "2/(ct+2)"])
def test_the_bound_on_what_is_left_holds_under_any_step(step):
    # Phi must never fall below g(w) - min g, also where an open-loop step makes g grow.
    from quernel.kernels import _lazy_oracle

    atoms, target = problem()
    best = least(atoms, target)
    seen = []

    class Watched(_lazy_oracle.LazyOracle):
        def answer(self, grad, along, value, active):
            found = super().answer(grad, along, value, active)
            seen.append((value - self.floor, value - best))
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quernel.kernels.frank_wolfe.LazyOracle", Watched)
        # A callable promises no floor, so every bound comes from scans.
        model = FrankWolfe(
            objective=quadratic(np.eye(8), target), lmo=broken("random"), step=step, tol=1e-4, max_iter=300, kappa=4.0
        )
        model.fit(atoms)
    bounds, left = np.array(seen).T
    assert len(seen) > 30 and np.isfinite(bounds).all() and (bounds >= left - 1e-9).all()


def test_a_good_index_needs_few_scans():
    atoms, target = problem(n=2000, d=16)
    exact = FrankWolfe(tol=1e-4, max_iter=5000).fit(atoms, target)
    model = FrankWolfe(lmo=FlatIndex(16, "ip"), tol=1e-4, max_iter=5000).fit(atoms, target)
    assert model.converged_ and model.success_rate_ > 0.9
    assert model.n_exact_scans_ < 0.1 * exact.n_exact_scans_
    assert model.n_iter_ <= 1.1 * exact.n_iter_ + 5


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("rule", ["linesearch", "2/(ct+2)"])
@pytest.mark.parametrize("far", [False, True])
def test_the_bound_under_a_degraded_oracle(ratio, rule, far):
    # h_t <= 2 (beta D^2 / c + h_0) / (ct + 2) for all t, beta = 1; and every iterate is in the hull.
    for seed in range(5):
        draw = np.random.default_rng(seed)
        atoms = draw.standard_normal((40, 6)) if seed else np.array([[0.0] * 6, [1.0] + [0.0] * 5])  # a segment
        target = 500 * draw.standard_normal(6) if far else draw.dirichlet(np.ones(len(atoms))) @ atoms
        diameter = max(float(((atoms - a) ** 2).sum(1).max()) for a in atoms)
        best = least(atoms, target)
        w, weights = atoms[0].copy(), np.eye(len(atoms))[0]
        start = value(w, target) - best
        for t in range(400):
            left = value(w, target) - best
            assert left <= 2 * (diameter / ratio + start) / (ratio * t + 2) + 1e-7 * start
            gaps = (w - atoms) @ (w - target)
            if gaps.max() <= 1e-12 * start:
                break  # at the solution, where w is an atom
            allowed = np.flatnonzero(gaps >= ratio * gaps.max())
            i = int(allowed[np.argmin(gaps[allowed])])
            direction = atoms[i] - w
            if rule == "linesearch":
                step = oracle.line_search(t, w, direction, w - target) if direction.any() else 0.0
            else:
                step = open_loop_step(t, ratio)
            assert 0 <= step <= 1
            w, weights = w + step * direction, (1 - step) * weights + step * np.eye(len(atoms))[i]
            assert (weights >= 0).all() and weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(weights @ atoms, w, atol=1e-9 * np.abs(target).max())


@pytest.mark.parametrize("kappa", [1.2, 2.0, 3.0])
@pytest.mark.parametrize("rule", ["linesearch", "2/(ct+2)"])
@pytest.mark.parametrize("inside", [True, False])
def test_the_solver_keeps_the_bound_with_a_degraded_index(rule, kappa, inside):
    # The index answers with the worst atom whose gap is at least the largest over kappa:
    # h_t <= 2 (beta D^2 / c + h_0) / (c t + 2) with c = 1 / kappa, beta = 1.
    others = []
    for seed in range(3):
        atoms, target = problem(n=100, inside=inside, seed=seed)
        best = least(atoms, target)
        diameter = max(float(((atoms - a) ** 2).sum(1).max()) for a in atoms)

        class Worst(oracle.Lookup):
            def search(self, q, k, atoms=atoms, target=target):
                # The query is minus the gradient w - target of the iterate: it says where w is.
                gradient = -np.asarray(q[0], float)
                gaps = (target + gradient - atoms) @ gradient
                # Rounding of a query far away may leave no gap: the best atom then.
                allowed = np.flatnonzero(gaps >= min(gaps.max() / kappa, gaps.max()))
                others.append(len(allowed) > 1)
                self.choose = lambda products: int(allowed[np.argmin(gaps[allowed])])
                return super().search(q, k)

        model = FrankWolfe(lmo=Worst(), step=rule, kappa=1.001 * kappa, tol=1e-7, max_iter=300).fit(atoms, target)
        left, c = model.history_["objective"] - best, 1 / (1.001 * kappa)
        if not len(left):
            continue  # the best atom is the solution, and the start
        t = np.arange(len(left))
        assert (left <= 2 * (diameter / c + left[0]) / (c * t + 2) + 1e-9).all()
        # Every iterate is a mean of atoms.
        assert model.weights_.min() >= 0 and model.weights_.sum() == pytest.approx(1)
        np.testing.assert_allclose(
            model.weights_ @ atoms[model.support_], model.point_, atol=1e-9 * np.abs(atoms).max()
        )
    # Far outside one atom often stands alone.
    assert any(others) or not inside


def quadratic(matrix, target):
    return lambda w: (0.5 * float((w - target) @ matrix @ (w - target)), matrix @ (w - target))


def test_callables_and_least_squares_agree():
    atoms, target = problem(inside=False)
    one = FrankWolfe(max_iter=50, tol=1e-12).fit(atoms, target)
    other = FrankWolfe(objective=quadratic(np.eye(8), target), max_iter=50, tol=1e-12).fit(atoms)
    np.testing.assert_allclose(other.point_, one.point_, atol=SAME)


def test_a_smooth_function_that_is_no_quadratic():
    draw = np.random.default_rng(1)
    atoms, x, y = draw.standard_normal((200, 5)), draw.standard_normal((100, 5)), draw.integers(0, 2, 100) * 2 - 1

    def logistic(w):
        margins = y * (x @ w)
        return float(np.logaddexp(0, -margins).mean()), -(x * (y / (1 + np.exp(margins)))[:, None]).mean(0)

    model = FrankWolfe(objective=logistic, variant="away", tol=1e-6).fit(atoms)
    assert model.converged_
    assert float(((model.point_ - atoms) @ logistic(model.point_)[1]).max()) == pytest.approx(
        model.duality_gap_, abs=1e-12
    )
    assert (np.diff(model.history_["objective"]) <= 1e-12).all()


@pytest.mark.parametrize("limit", [0.3, 1.0, 50.0])
def test_line_search_of_a_general_function(limit):
    function = Given(lambda w: (float(np.exp(w - 2).sum() - w.sum()), np.exp(w - 2) - 1), 1)
    w, direction = np.zeros(1), np.ones(1)  # the least value is at w = 2
    slope = float(function(w)[1] @ direction)
    assert function.best_step(w, direction, slope, limit) == pytest.approx(min(2.0, limit), abs=1e-8)


def test_sparse_atoms():
    atoms = sparse.random(200, 30, density=0.2, random_state=0, format="csr")
    target = np.asarray(atoms.mean(0)).reshape(-1)
    dense = FrankWolfe(tol=1e-15, max_iter=20, start=0).fit(atoms.toarray(), target)
    for form in (atoms, atoms.tocsc()):
        model = FrankWolfe(tol=1e-15, max_iter=20, start=0).fit(form, target)
        np.testing.assert_allclose(model.point_, dense.point_, atol=SAME)
        assert model.duality_gap_ == pytest.approx(gap(atoms.toarray(), model.point_, target), abs=1e-12)
    index = FlatIndex(30, "ip").add(atoms.toarray())
    assert FrankWolfe(lmo=index, tol=1e-5).fit(atoms, target).converged_
    with pytest.raises(QuernelError, match='sparse atoms cannot be added to an index; take lmo="exact"'):
        FrankWolfe(lmo=FlatIndex(30, "ip")).fit(atoms, target)


def test_float32_atoms_give_the_true_gap():
    # Far from the origin float32 products lose most of their digits; the scan must not.
    draw = np.random.default_rng(2)
    atoms = (draw.standard_normal((5000, 20)) * 1e-3 + 1).astype(np.float32)
    target = atoms.astype(float).mean(0)
    model = FrankWolfe(tol=1e-9, max_iter=50).fit(atoms, target)
    exact = float(((model.point_ - atoms.astype(float)) @ (model.point_ - target)).max())
    assert model.duality_gap_ == pytest.approx(exact, rel=1e-9)
    assert model._atoms.matrix.dtype == np.float32
    grad = draw.standard_normal(20)
    assert Atoms(atoms).scan(grad)[0] == int(np.argmin(atoms.astype(float) @ grad))


@pytest.mark.parametrize("lmo", ["exact", "index"])
def test_equal_atoms_end_at_once(lmo):
    atoms = np.ones((6, 3)) * 0.3
    index = "exact" if lmo == "exact" else MaxIPIndex(3)
    model = FrankWolfe(lmo=index).fit(atoms, [5.0, 1.0, 0.0])
    assert model.converged_ and model.n_iter_ == 0 and abs(model.duality_gap_) < 1e-12
    assert model.coef_.toarray().sum() == 1


def test_one_atom():
    model = FrankWolfe(variant="pairwise").fit(np.ones((1, 2)), [0.0, 0.0])
    assert model.support_.tolist() == [0] and model.duality_gap_ == 0


def test_an_index_is_built_once_and_left_alone():
    atoms, target = problem(n=500, d=10)
    empty = MaxIPIndex(10)
    model = FrankWolfe(lmo=empty, tol=1e-2).fit(atoms, target)
    assert len(empty) == 0 and len(model.index_) == 500
    held, first = model.index_, model.point_
    other = model.solve(target + 1)
    assert other is model and model.index_ is held and not np.allclose(first, model.point_)
    again = FrankWolfe(lmo=held, tol=1e-2).fit(atoms, target)
    assert again.index_ is held
    np.testing.assert_array_equal(again.point_, first)


def test_an_index_of_something_else_only_costs_scans():
    atoms, target = problem(n=100)
    index = MaxIPIndex(8).add(np.random.default_rng(9).standard_normal((100, 8)))
    model = FrankWolfe(lmo=index, tol=1e-2, max_iter=20_000).fit(atoms, target)
    assert model.converged_ and gap(atoms, model.point_, target) <= 1e-2 + 1e-9


def test_the_active_set():
    draw = np.random.default_rng(0)
    atoms = draw.standard_normal((50, 3))
    active, w = ActiveSet(0, atoms[0]), atoms[0].copy()
    for _ in range(400):
        i, step = int(draw.integers(50)), float(draw.random())
        kind = draw.integers(3)
        if kind == 0:
            active.toward(i, atoms[i], step)
            w = (1 - step) * w + step * atoms[i]
        elif kind == 1 and len(active) > 1:
            place = int(draw.integers(len(active)))
            weight, row = float(active.weights[place]), active.rows[place].copy()
            limit = weight / (1 - weight)
            size = limit if step > 0.7 else step * limit
            active.away(place, size, limit)
            w = w + size * (w - row)
        elif i not in active.ids:
            place = int(draw.integers(len(active)))
            weight, row = float(active.weights[place]), active.rows[place].copy()
            size = weight if step > 0.7 else step * weight
            active.exchange(place, i, atoms[i], size)
            w = w + size * (atoms[i] - row)
        assert (active.weights > 0).all() and active.weights.sum() == pytest.approx(1)
        np.testing.assert_array_equal(active.rows, atoms[active.ids])
        np.testing.assert_allclose(active.point(), w, atol=1e-9)
        w = active.point()
    active.toward(7, atoms[7], 1.0)
    assert active.ids.tolist() == [7] and active.weights.tolist() == [1.0]


def nan_gradient(w):
    return 1.0, np.full(8, np.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: FrankWolfe(tol=0), "tol must be a finite number in"),
        (lambda a, b: FrankWolfe(tol=-1.0), "tol must be"),
        (lambda a, b: FrankWolfe(kappa=0.5), "kappa must be"),
        (lambda a, b: FrankWolfe(max_iter=0), "max_iter must be"),
        (lambda a, b: FrankWolfe(step="armijo"), "step must be one of"),
        (lambda a, b: FrankWolfe(variant="blended"), "variant must be one of"),
        (lambda a, b: FrankWolfe(variant="away", step="2/(t+2)"), "variant='away' needs step=\"linesearch\""),
        (lambda a, b: FrankWolfe(objective="lasso"), "objective must be \"lstsq\" or a callable; got 'lasso'"),
        (lambda a, b: FrankWolfe(lmo="lsh"), "lmo must be one of 'exact'; got 'lsh'"),
        (lambda a, b: FrankWolfe(lmo=3), 'lmo must be "exact" or an index with add, search and len; got int. Take'),
        (lambda a, b: FrankWolfe().fit(np.zeros((0, 3)), np.zeros(3)), "atoms must hold at least one atom"),
        (lambda a, b: FrankWolfe().fit(np.zeros(3), 0), r"atoms must be real numbers of shape \(n, d\)"),
        (lambda a, b: FrankWolfe().fit(a * np.nan, b), "atoms holds NaN or infinity"),
        (lambda a, b: FrankWolfe().fit(a), "target must be given for objective='lstsq'"),
        (lambda a, b: FrankWolfe().fit(a, b[:3]), r"target must have shape \(8,\), like an atom; got \(3,\)"),
        (lambda a, b: FrankWolfe().fit(a, b * np.inf), "target holds NaN or infinity"),
        (lambda a, b: FrankWolfe(start=300).fit(a, b), "start must be the number of an atom, below 300; got 300"),
        (lambda a, b: FrankWolfe().solve(b), "solve needs atoms; call fit"),
        (lambda a, b: FrankWolfe(objective=nan_gradient).fit(a), "objective returned NaN or infinity; likely causes"),
        (lambda a, b: FrankWolfe(objective=nan_gradient).fit(a, b), "target belongs to objective='lstsq'"),
        (lambda a, b: FrankWolfe(objective=lambda w: (1.0, w[:2])).fit(a), r"gradient of shape \(8,\); got \(2,\)"),
        (lambda a, b: FrankWolfe(objective=lambda w: 1.0).fit(a), r"objective must return \(value, gradient\)"),
        (
            lambda a, b: FrankWolfe(lmo=FlatIndex(8, "ip").add(a[:5])).fit(a, b),
            "lmo holds 5 items, but there are 300 atoms; give it these, or none",
        ),
        (
            lambda a, b: FrankWolfe(lmo=FlatIndex(8, "ip").add(a, ids=np.arange(300) + 1000)).fit(a, b),
            "lmo answered with id 1.*; ids must be row numbers of the 300 atoms",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call(*problem())
