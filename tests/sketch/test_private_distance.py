"""PrivateDistanceSum and its trees: least squares, exact sums, what one record can do, noise, releases, refusals."""

import math

import numpy as np
import pytest

import quernel
from quernel._errors import BudgetExceeded, PrivacyError, QuernelError
from quernel.sketch import PrivateDistanceSum, PublicDistanceSum, dp
from quernel.sketch._count_trees import consistent_leaves, l1_coefficients, range_sums, shell_sums, tree_nodes
from quernel.sketch._pair_kernels import projected
from quernel.sketch.dp.noise import NoiseSource
from quernel.testing import require_mean
from tests.reference import private_kde as oracle

SEEDED = {"insecure_noise_seed": 0}
METRICS = ["l1", "l2", "l2sq", "lp"]


def rows(n=300, d=2, seed=0):
    return np.random.default_rng(seed).random((n, d))


def make(metric="l1", **settings):
    return PrivateDistanceSum(metric, p=1.5 if metric == "lp" else None, **settings, **SEEDED)


def noiseless(sums):
    return sums._published(sums._sums() * sums.grain, {"epsilon": 0})


@pytest.mark.parametrize("m", [2, 8, 64])
def test_consistent_leaves_are_least_squares(m):
    nodes = 10 * np.random.default_rng(0).standard_normal((3, 2 * m - 1))
    leaves = consistent_leaves(nodes)
    for one, tree in zip(leaves, nodes, strict=True):
        np.testing.assert_allclose(one, oracle.least_squares_leaves(tree), atol=1e-9)
    again = tree_nodes(leaves)
    for parent in range(m - 1):
        children = again[:, 2 * parent + 1] + again[:, 2 * parent + 2]
        np.testing.assert_allclose(again[:, parent], children, atol=1e-9)
    counts = np.random.default_rng(1).integers(0, 99, (3, m))
    np.testing.assert_allclose(consistent_leaves(tree_nodes(counts).astype(float)), counts, atol=1e-9)
    np.testing.assert_array_equal(tree_nodes(counts), counts @ oracle.tree_matrix(m).T)


def test_opendp_finds_the_same_leaves():
    opendp = pytest.importorskip("opendp.prelude")
    opendp.enable_features("contrib")
    nodes = np.random.default_rng(0).integers(-50, 50, 31)
    peer = opendp.t.make_consistent_b_ary_tree(2, TIA="i32", TOA="f64")(nodes.tolist())
    np.testing.assert_allclose(consistent_leaves(nodes[None].astype(float))[0], peer, atol=1e-12)


def test_consistency_never_adds_variance():
    # Exactly: leaves are linear in the nodes, whose noise is white.
    m = 16
    linear = np.linalg.pinv(oracle.tree_matrix(m))
    np.testing.assert_allclose(consistent_leaves(np.eye(2 * m - 1)), linear.T, atol=1e-12)
    for start in range(m):
        for stop in range(start + 1, m + 1):
            ours = np.linalg.norm(linear[start:stop].sum(0)) ** 2
            raw = [range_sums(e, np.array([start]), np.array([stop]))[0] for e in np.eye(2 * m - 1)]
            assert ours <= np.square(raw).sum() + 1e-12


def test_ranges_add_up_from_few_nodes():
    leaves = np.random.default_rng(0).integers(0, 9, 32)
    nodes = tree_nodes(leaves[None])[0].astype(float)
    start, stop = (edge.ravel() for edge in np.meshgrid(np.arange(33), np.arange(33), indexing="ij"))
    wanted = [leaves[a:b].sum() for a, b in zip(start, stop, strict=True)]
    np.testing.assert_array_equal(range_sums(nodes, start, stop), wanted)


def test_prefix_sums_are_the_histogram_sum():
    leaves = np.random.default_rng(0).standard_normal((1, 16))
    low, width = np.array([-2.0]), np.array([0.25])
    slopes, intercepts = l1_coefficients(leaves, low, width)
    centres = -2.0 + (np.arange(16) + 0.5) * 0.25
    for i in range(17):
        y = -2.0 + i * 0.25
        exact = (leaves[0] * np.abs(centres - y)).sum()
        assert slopes[0, i] * y + intercepts[0, i] == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("neighbours", ["add_remove", "replace"])
def test_without_noise_it_is_the_sum_over_leaves(metric, neighbours):
    x, y = rows(), np.random.default_rng(1).random((20, 2)) * 1.6 - 0.3
    m, s = 32, 400
    sums = make(metric, leaves=m, n_projections=s, neighbours=neighbours).partial_fit(x)
    centres = (np.floor(x * m) + 0.5) / m
    public = noiseless(sums)
    got = public.query(y)
    assert public.n_rows == 300
    np.testing.assert_allclose(public.query(y, mean=True), got / 300)
    if metric == "l2sq":
        np.testing.assert_allclose(got, oracle.distances(metric, x, y).sum(1), atol=300 * 2**-18)
    elif metric == "l2":
        np.testing.assert_allclose(got, oracle.distances(metric, x, y).sum(1), rtol=0.15)
    else:
        np.testing.assert_allclose(got, oracle.distances(metric, centres, y, 1.5).sum(1), rtol=1e-10)


def test_boxes_of_any_shape():
    x = rows(200, 3) * [2.0, 5.0, 1.0] - [1.0, 0.0, 7.0]
    sums = PrivateDistanceSum(low=[-1.0, 0.0, -7.0], high=[1.0, 5.0, -6.0], leaves=1024, **SEEDED).partial_fit(x)
    y = x[:9] + 0.3
    np.testing.assert_allclose(noiseless(sums).query(y), oracle.distances("l1", x, y).sum(1), rtol=0.01)
    np.testing.assert_allclose(noiseless(sums).query(y.astype(np.float32)), noiseless(sums).query(y), rtol=1e-5)


@pytest.mark.parametrize("ratio", [1.1, 2.0])
def test_shells_are_the_papers_query(ratio):
    leaves = np.random.default_rng(0).integers(0, 9, 32)
    nodes = tree_nodes(leaves[None])[0].astype(float)
    y = np.random.default_rng(1).random(40) * 3.0
    got = shell_sums(nodes, y, 0.0, 3 / 32, ratio)
    np.testing.assert_allclose(got, [oracle.shells(leaves, 0.0, 3 / 32, one, ratio) for one in y], rtol=1e-10)
    exact = np.array([(leaves * np.abs((np.arange(32) + 0.5) * 3 / 32 - one)).sum() for one in y])
    # Too much by at most the ratio; leaves nearer than the last shell by at most a leaf each.
    assert (got >= exact - 1e-9).all() and (got <= ratio * exact + leaves.max() * 2 * 3 / 32).all()
    outside = shell_sums(nodes, np.array([-1.0, 4.0]), 0.0, 3 / 32, ratio)
    edges = shell_sums(nodes, np.array([0.0, 3.0]), 0.0, 3 / 32, ratio)
    np.testing.assert_allclose(outside, edges + leaves.sum())


def contribution(sums_of, x):
    return np.array([sums_of().partial_fit(row[None])._sums() for row in x])


@pytest.mark.parametrize("neighbours", ["add_remove", "replace"])
@pytest.mark.parametrize("metric", ["l1", "l2", "l2sq"])
def test_sensitivity_by_trying(metric, neighbours):
    draw = np.random.default_rng(0)
    corners = np.array([[a, b] for a in (0.0, 1.0) for b in (0.0, 1.0)])
    x = np.concatenate((rows(400), corners, corners, np.full((1, 2), 0.5)))

    def empty():
        return make(metric, leaves=16, n_projections=3, neighbours=neighbours, dim=2)

    held, q = empty().sensitivity(), contribution(empty, x)
    pairs = draw.integers(0, len(x), (2, 10_000))
    changes = q if neighbours == "add_remove" else q[pairs[0]] - q[pairs[1]]
    l1, l2 = np.abs(changes).sum(1).max(), np.linalg.norm(changes, axis=1).max()
    assert l1 <= held.l1 and l2 <= held.l2
    if neighbours == "add_remove":
        assert l1 >= 0.98 * held.l1 and l2 >= 0.98 * held.l2
    whole, without = (empty().partial_fit(part)._sums() for part in (x, x[1:]))
    np.testing.assert_array_equal(whole - without, q[0])
    assert not empty()._sums().any()


@pytest.mark.parametrize("metric", METRICS)
def test_shards_are_the_whole_bit_for_bit(metric):
    x = rows(1000).astype(np.float32)
    whole = make(metric).partial_fit(x)
    parts = [make(metric).update(p) for p in np.split(x, (3, 401, 900))]
    for other in parts[1:]:
        parts[0].merge(other)
    np.testing.assert_array_equal(parts[0]._sums(), whole._sums())
    np.testing.assert_array_equal(parts[0].release().values, whole.release().values)


@pytest.mark.parametrize("releases", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("metric", "method"),
    [*((metric, "consistent") for metric in METRICS), ("l1", "shells"), ("l2", "shells")],
)
def test_releases_are_unbiased(metric, method, releases):
    y = rows(4, seed=1)
    axes = {"n_projections": 4} if metric == "l2" else {}
    sums = make(metric, leaves=16, method=method, epsilon=5.0, **axes).partial_fit(rows(50))
    exact = noiseless(sums).query(y)
    ledger = dp.PrivacyLedger(5.0 * releases)
    answers = np.array([sums.release(ledger).query(y) for _ in range(releases)])
    require_mean(answers, exact)
    if releases == 2000:
        assert (np.abs(answers.mean(0) - exact) < 4 * answers.std(0, ddof=1) / math.sqrt(releases)).all()


@pytest.mark.slow
def test_consistent_trees_beat_shells_and_plain_histograms():
    # 20,000 points, 256 leaves, epsilon 1: errors of single releases vary, so many are taken.
    x, y, m = rows(20_000, 1), np.linspace(0.02, 0.98, 40)[:, None], 256
    exact = oracle.distances("l1", x, y).sum(1)
    sums = make(leaves=m).partial_fit(x)
    nodes, held = sums._sums(), sums.mechanism()
    noisy = held.randomise(np.broadcast_to(nodes, (200, nodes.size)).copy(), NoiseSource(1)) * sums.grain
    errors = {"consistent": [], "shells": []}
    for one in noisy:
        slopes, intercepts = l1_coefficients(consistent_leaves(one[None]), np.zeros(1), np.array([1 / m]))
        place = np.floor(y[:, 0] * m + 0.5).astype(int)
        errors["consistent"].append(slopes[0, place] * y[:, 0] + intercepts[0, place] - exact)
        errors["shells"].append(shell_sums(one, y[:, 0], 0.0, 1 / m, 1.1) - exact)
    rmse = {name: math.sqrt(np.square(e).mean()) / len(x) for name, e in errors.items()}
    assert rmse["shells"] >= 20 * rmse["consistent"], rmse
    assert rmse["consistent"] < 4e-4


def test_gaussian_noise_for_many_coordinates():
    assert make(epsilon=1.0, delta=1e-6, dim=20).mechanism().kind == "gaussian"
    assert make(epsilon=1.0, dim=1).mechanism().kind == "laplace"
    one, many = (make(epsilon=1.0, delta=1e-6, mechanism="gaussian", dim=d).mechanism() for d in (1, 100))
    # The counts are multiples of a fine grain, so that the lattice costs nothing.
    assert one.scale == pytest.approx(dp.gaussian_sigma(3 * 1024, 1.0, 1e-6), rel=1e-5)
    assert many.scale == pytest.approx(10 * one.scale, rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_release_survives_saving(metric, tmp_path):
    release = make(metric, leaves=16).partial_fit(rows()).release()
    twin = quernel.load(release.save(tmp_path))
    assert type(twin) is PublicDistanceSum and twin.config() == release.config()
    np.testing.assert_array_equal(twin.query(rows(9)), release.query(rows(9)))
    assert release.privacy["status"].startswith("INSECURE")


def test_releasing_twice_needs_a_fresh_budget():
    sums = make(leaves=4).partial_fit(rows())
    sums.release()
    with pytest.raises(BudgetExceeded):
        sums.release()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PrivateDistanceSum("cosine"), QuernelError, "metric must be one of"),
        (lambda: PrivateDistanceSum("lp"), QuernelError, "p must be"),
        (lambda: PrivateDistanceSum("l1", p=2.0), QuernelError, 'p belongs to metric="lp"'),
        (lambda: PrivateDistanceSum(leaves=100), QuernelError, "leaves must be a power of two"),
        (lambda: PrivateDistanceSum(low=1.0), QuernelError, "low must be below high"),
        (lambda: PrivateDistanceSum("l2sq", method="shells"), QuernelError, 'for metric="l1" and "l2"'),
        (lambda: PrivateDistanceSum(low=[0.0] * 2, dim=3), QuernelError, "has 2 coordinates, the rows have 3"),
        (lambda: PrivateDistanceSum().partial_fit([[1.5]]), QuernelError, "1 rows outside the declared Box"),
        (lambda: PrivateDistanceSum().partial_fit([1.0]), QuernelError, "X must hold numbers"),
        (lambda: PrivateDistanceSum().query([[0.5]]), PrivacyError, "answers nothing itself"),
        (lambda: PrivateDistanceSum().release(), QuernelError, "dim is unknown"),
        (lambda: make(leaves=8).merge(make(leaves=4)), QuernelError, "leaves=8 here and 4 there"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rows_outside_are_moved_to_the_edge():
    sums = make(leaves=4, clip=True).partial_fit([[-3.0, 0.5], [9.0, 0.5]])
    np.testing.assert_array_equal(sums._exact[0], [1, 0, 0, 1])


@pytest.mark.parametrize("dim", [2, 5, 50, 784])
@pytest.mark.parametrize("n_axes", [1, 2, 8, 32])
def test_a_row_is_projected_alike_in_any_company(dim, n_axes):
    draw = np.random.default_rng(dim)
    rows, axes = draw.uniform(size=(150, dim)), draw.standard_normal((n_axes, dim))
    whole = projected(rows, axes)
    np.testing.assert_allclose(whole, rows @ axes.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(whole, np.concatenate([projected(row[None], axes) for row in rows]))
    np.testing.assert_array_equal(whole[::-1], projected(rows[::-1], axes))
    np.testing.assert_array_equal(whole[3:40], projected(rows[3:40], axes))
    np.testing.assert_array_equal(whole, projected(np.asfortranarray(rows), axes))
