"""SchurEntropy: its scores, bounds, limits, invariances, shards, intervals, memory, files and errors."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quernel
from quernel._errors import FormatError, QuernelError
from quernel.kernels import DegenerateConditioningWarning, SchurEntropy, vendi_score
from tests.reference import schur_entropy as oracle
from tests.reference.schur_entropy import repeated_prompts as pairs

GAUSSIAN = {"kernel": "gaussian", "bandwidth": (2.0, 3.0)}
KERNELS = [{}, GAUSSIAN, GAUSSIAN | {"n_features": 24}]


def score(t, x, **options):
    return SchurEntropy(**options).update(t, x).compute()


@pytest.mark.parametrize("eta", [1e-3, 0.2])
@pytest.mark.parametrize("order", [1.0, 2.0, 0.5])
def test_cosine_scores_are_the_formula_s(eta, order):
    t, x = pairs()
    report = score(t, x, eta=eta, order=order)
    residual, explained = oracle.by_features(oracle.cosine_features(t), oracle.cosine_features(x), eta)
    assert report.sce_image == pytest.approx(oracle.entropy(residual, order), abs=1e-10)
    assert report.sce_text == pytest.approx(oracle.entropy(explained, order), abs=1e-10)
    assert report.entropy_total == pytest.approx(oracle.entropy(residual + explained, order), abs=1e-10)
    assert report.tau == pytest.approx(np.trace(residual), abs=1e-12)
    assert report.score == math.exp(report.sce_image) and report.vendi == math.exp(report.entropy_total)
    assert report.entropy_image == pytest.approx(report.sce_image / report.tau)
    assert report.entropy_text == pytest.approx(report.sce_text / (1 - report.tau))
    assert (report.n_pairs, report.eta, report.order, report.n_features) == (60, eta, order, (5, 8))
    c_tt = oracle.covariance(*[oracle.cosine_features(t)] * 2)
    assert report.dof == pytest.approx(np.trace(c_tt @ np.linalg.inv(c_tt + eta * np.eye(5))) / 60, abs=1e-12)


def test_exact_gaussian_scores_are_the_formula_s():
    t, x = pairs()
    report = score(t, x, **GAUSSIAN, eta=0.01)
    residual, explained = oracle.by_pairs(oracle.gaussian_matrix(t, 2.0), oracle.gaussian_matrix(x, 3.0), 0.01)
    assert report.sce_image == pytest.approx(oracle.entropy(residual), abs=1e-9)
    assert report.sce_text == pytest.approx(oracle.entropy(explained), abs=1e-9)
    assert report.form == "pairs" and report.n_features is None
    same = score(t, x, kernel=lambda a, b: oracle.gaussian_matrix(a, 2.0), eta=0.01)
    other = score(t, x, kernel="gaussian", bandwidth=2.0, eta=0.01)
    assert same.sce_image == pytest.approx(other.sce_image, abs=1e-10)


def test_random_features_approach_the_exact_kernel():
    t, x = pairs(each=12)
    exact = score(t, x, **GAUSSIAN, eta=0.05)
    few, many = (abs(score(t, x, **GAUSSIAN, eta=0.05, n_features=n).sce_image - exact.sce_image) for n in (16, 8192))
    # The error falls like the root of their number: 23 times from 16 to 8,192; both are one draw of a fixed seed.
    assert many < 0.02 and many < few


@pytest.mark.parametrize("options", KERNELS)
@pytest.mark.parametrize("eta", [0.0, 1e-3, 1.0])
def test_the_parts_bracket_the_whole(options, eta):
    t, x = pairs()
    report = score(t, x, **options, eta=eta)
    parts = report.sce_image + report.sce_text
    mixed = -sum(share * math.log(share) for share in (report.tau, 1 - report.tau) if share > 0)
    assert parts - 1e-10 <= report.entropy_total <= parts + mixed + 1e-10
    alone = options | ({"bandwidth": 3.0} if options else {})
    assert report.vendi == pytest.approx(vendi_score(x, **alone), rel=1e-10)


def test_repeated_prompts_leave_the_covariance_within_groups():
    t, x = pairs(groups=8, each=5)
    group = np.arange(40) // 5
    report = score(t, x, **GAUSSIAN, eta=0.0)
    k_x = oracle.gaussian_matrix(x, 3.0)
    centred = np.eye(40) - (group[:, None] == group) / 5
    within = oracle.entropy(centred @ k_x @ centred / 40)
    assert report.sce_image == pytest.approx(within, abs=1e-8)
    assert report.tau == pytest.approx(np.trace(centred @ k_x @ centred) / 40, abs=1e-8)
    assert report.dof == pytest.approx(8 / 40)
    # A small ridge comes close to it.
    assert score(t, x, **GAUSSIAN, eta=1e-9).sce_image == pytest.approx(within, abs=1e-4)


def test_distinct_prompts_explain_whatever_they_are_given():
    draw = np.random.default_rng(0)
    t, x = draw.standard_normal((40, 30)), draw.standard_normal((40, 8))
    with pytest.warns(DegenerateConditioningWarning, match=r"1\.00 degrees of freedom a pair \(40 pairs, eta=1e-10\)"):
        report = score(t, x, kernel="gaussian", bandwidth=1.0, eta=1e-10)
    assert report.sce_image < 1e-7 and report.score == pytest.approx(1.0, abs=1e-7)
    assert report.vendi > 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(*pairs()).dof < 0.5


def test_a_large_ridge_leaves_the_plain_diversity():
    t, x = pairs()
    assert score(t, x, eta=1e10).score == pytest.approx(vendi_score(x), abs=1e-7)


@pytest.mark.parametrize("options", KERNELS)
def test_order_duplicates_and_shards_change_nothing(options):
    t, x = pairs()
    whole = score(t, x, **options)
    order = np.random.default_rng(1).permutation(len(t))
    shuffled, doubled = score(t[order], x[order], **options), score(np.tile(t, (2, 1)), np.tile(x, (2, 1)), **options)
    merged = SchurEntropy(**options).update(t[:7], x[:7]).merge(SchurEntropy(**options))
    merged = SchurEntropy(**options).merge(merged).update(t[7:20], x[7:20])
    merged.merge(SchurEntropy(**options).update(t[20:], x[20:]))
    for name in ("sce_image", "sce_text", "entropy_total", "tau"):
        assert getattr(shuffled, name) == pytest.approx(getattr(whole, name), abs=1e-9)
        assert getattr(doubled, name) == pytest.approx(getattr(whole, name), abs=1e-9)
        assert getattr(merged.compute(), name) == pytest.approx(getattr(whole, name), abs=1e-12)


@pytest.mark.parametrize("options", [{}, GAUSSIAN])
def test_turning_either_space_changes_nothing(options):
    t, x = pairs()
    draw = np.random.default_rng(2)
    turns = [np.linalg.qr(draw.standard_normal((d, d)))[0] for d in (5, 8)]
    whole, turned = score(t, x, **options), score(t @ turns[0], x @ turns[1], **options)
    assert turned.sce_image == pytest.approx(whole.sce_image, abs=1e-9)
    assert turned.sce_text == pytest.approx(whole.sce_text, abs=1e-9)
    moved = score(t + 5, x - 7, **options)
    if options:
        assert moved.sce_image == pytest.approx(whole.sce_image, abs=1e-9)


def test_pairs_are_kept_until_there_are_more_than_features():
    t, x = pairs(each=10)
    metric = SchurEntropy()
    metric.update(t[:8], x[:8])
    assert metric.compute().n_pairs == 8 and metric._sums is None
    metric.update(t[8:], x[8:])
    assert metric._sums is not None and not metric._pairs
    assert metric.compute().sce_image == pytest.approx(score(t, x, keep_pairs=True).sce_image, abs=1e-12)
    assert score(t[:4], x[:4], eta=1.0).form == "pairs"
    assert score(t, x).form == "features"


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("options", [{}, GAUSSIAN | {"n_features": 16}, {"keep_pairs": True}])
def test_nothing_of_size_n_by_n_is_formed(options):
    n = 3000
    draw = np.random.default_rng(0)
    t, x = draw.standard_normal((n, 5)), draw.standard_normal((n, 8))
    with Largest() as seen:
        score(t, x, **options)
    assert 8 * n <= seen.elements <= 32 * n < n * n


def test_intervals_hold_the_estimate_and_shrink():
    t, x = pairs(groups=5, each=20)
    widths = []
    for repeat in (1, 4):
        metric = SchurEntropy(keep_pairs=True, order=2.0).update(np.tile(t, (repeat, 1)), np.tile(x, (repeat, 1)))
        report = metric.compute(resamples=60)
        assert report.ci.low < report.sce_image < report.ci.high and report.ci.estimate == report.sce_image
        assert report.ci_text.low < report.sce_text < report.ci_text.high
        assert metric.compute(resamples=60) == report
        widths.append(report.ci.high - report.ci.low)
    # Four times the pairs: half the width, by chance a little off.
    assert 0.3 < widths[1] / widths[0] < 0.75


def test_cross_fitting_counts_what_a_regression_on_few_pairs_misses():
    t, x = pairs(groups=30, each=2, d_t=12)
    report = SchurEntropy(eta=1e-6, keep_pairs=True).update(t, x).compute(folds=5)
    assert report.cross_fitted > report.sce_image
    assert SchurEntropy(eta=1e-6, keep_pairs=True).update(t, x).compute().cross_fitted is None


def test_the_ridge_can_be_chosen():
    t, x = pairs()
    report = score(t, x, eta="loo")
    assert report.eta == pytest.approx(score(t, x, eta="loo").eta)
    errors = [
        oracle.leave_one_out(oracle.cosine_features(t), oracle.cosine_features(x), report.eta * s) for s in (1, 3)
    ]
    assert errors[0] < errors[1] and 1e-8 <= report.eta <= 10


def test_kinds_of_input_agree():
    t, x = pairs()
    half = t.astype(np.float32), x.astype(np.float32)
    wanted = score(*(a.astype(np.float64) for a in half)).sce_image
    assert score(*half).sce_image == wanted
    assert score(*map(torch.from_numpy, half)).sce_image == wanted
    assert score(half[0].tolist(), half[1].tolist()).sce_image == pytest.approx(wanted, abs=1e-12)
    assert math.isfinite(score(torch.tensor(t).half(), np.sign(x).astype(int)).sce_image)


def test_rows_that_are_changed_later_are_not_those_that_were_given():
    t, x = pairs(groups=2, each=2)
    metric = SchurEntropy(eta=1.0).update(t, x)
    before = metric.compute()
    x[:] = 7.0
    assert metric.compute() == before


@pytest.mark.parametrize("options", [{}, GAUSSIAN, GAUSSIAN | {"n_features": 24, "eta": "loo"}])
@pytest.mark.parametrize("n", [0, 4, 60])
def test_what_was_seen_is_saved(options, n, tmp_path):
    t, x = pairs()
    metric = SchurEntropy(**options)
    metric = metric.update(t[:n], x[:n]) if n else metric
    loaded = quernel.load(metric.save(tmp_path / "shard"))
    assert repr(loaded) == repr(metric) and loaded.n_pairs == n
    whole = SchurEntropy(**options).update(t, x).compute()
    assert loaded.update(t[n:], x[n:]).compute().sce_image == pytest.approx(whole.sce_image, abs=1e-10)


def test_a_file_with_other_sizes_is_refused(tmp_path):
    metric = SchurEntropy().update(*pairs())
    metric._widths = (6, 8)
    with pytest.raises(FormatError, match="array 'sums' must be float64 of shape"):
        SchurEntropy.load(metric.save(tmp_path / "shard"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -1e-3}, "eta must be a finite number"),
        ({"eta": "gcv"}, 'eta must be a number >= 0 or "loo"'),
        ({"kernel": "linear"}, 'kernel must be "cosine", "gaussian" or a function'),
        ({"kernel": "gaussian"}, "needs bandwidth="),
        ({"kernel": "gaussian", "bandwidth": 0.0}, "bandwidth must be a finite number"),
        ({"kernel": "gaussian", "bandwidth": (1.0, 2.0, 3.0)}, "one number or a pair"),
        ({"kernel": "gaussian", "bandwidth": 1.0, "n_features": 7}, "n_features must be even"),
        ({"kernel": "gaussian", "bandwidth": (1.0, 2.0), "shared_space": True}, "a shared space has one bandwidth"),
        ({"bandwidth": 2.0}, "belong to kernel="),
        ({"order": 0.0}, "order must be"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(QuernelError, match=message):
        SchurEntropy(**options)


def test_bad_pairs_are_named_and_leave_no_trace():
    t, x = pairs()
    metric = SchurEntropy().update(t, x)
    before = metric.compute()
    zero, missing = t.copy(), x.copy()
    zero[3], missing[2, 1] = 0.0, np.nan
    for bad, message in (
        ((t[1:], x), "got 59 and 60 rows"),
        ((zero, x), "T must have no zero rows for the cosine kernel; row 3"),
        ((t, missing), "X holds NaN"),
        ((t[:, 1:], x), r"T and X must have \(5, 8\) columns as before; got \(4, 8\)"),
        ((t[0], x), r"T must be real numbers of shape \(n, d\)"),
        ((t > 0, x), "T must be real numbers"),
    ):
        with pytest.raises(QuernelError, match=message):
            metric.update(*bad)
    assert metric.compute() == before
    for other in (SchurEntropy(eta=0.1), SchurEntropy(order=2.0)):
        with pytest.raises(QuernelError, match="other must have the same settings"):
            metric.merge(other)
    with pytest.raises(QuernelError, match="other must have rows of"):
        metric.merge(SchurEntropy().update(x, t))
    with pytest.raises(QuernelError, match="other must be SchurEntropy"):
        metric.merge(None)
    assert metric.compute() == before


def test_scores_that_cannot_be_are_refused():
    t, x = pairs()
    with pytest.raises(QuernelError, match="at least 2 pairs; got 0"):
        SchurEntropy().compute()
    with pytest.raises(QuernelError, match="at least 2 pairs; got 1"):
        score(t[:1], x[:1])
    with pytest.raises(QuernelError, match="build with keep_pairs=True"):
        SchurEntropy().update(t, x).compute(resamples=10)
    with pytest.raises(QuernelError, match="resamples must be 0, or some 20"):
        SchurEntropy(keep_pairs=True).update(t, x).compute(resamples=1)
    with pytest.raises(QuernelError, match="folds must be 0 or in"):
        SchurEntropy(keep_pairs=True).update(t, x).compute(folds=1)
    with pytest.raises(QuernelError, match=r"ones on its diagonal; it is 59 off"):
        score(t, x, kernel=lambda a, b: np.full((len(a), len(b)), 60.0))
    with pytest.raises(QuernelError, match="must be symmetric"):
        score(t, x, kernel=lambda a, b: np.triu(np.ones((len(a), len(b)))))
    with pytest.raises(QuernelError, match=r"must have shape \(n, n\), n = 60"):
        score(t, x, kernel=lambda a, b: np.ones((2, 2)))
    with pytest.raises(QuernelError, match="share no space"):
        score(t, x, kernel="gaussian", bandwidth=1.0, n_features=8, shared_space=True)


def test_one_space_has_the_same_features_on_both_sides():
    t, _ = pairs()
    # The same rows on both sides: shared features are explained exactly, others only nearly.
    options = {"kernel": "gaussian", "bandwidth": 2.0, "n_features": 8, "eta": 0.0}
    shared, apart = (score(t, t, **options, shared_space=flag).sce_image for flag in (True, False))
    assert shared < 1e-10
    assert apart > 1e-3


def test_a_function_stays_in_memory(tmp_path):
    metric = SchurEntropy(kernel=lambda a, b: oracle.gaussian_matrix(a, 2.0)).update(*pairs())
    with pytest.raises(QuernelError, match="a kernel that is a function cannot be saved"):
        metric.save(tmp_path / "shard")


def test_arrays_in_any_order_of_memory_are_taken():
    t, x = pairs()
    t.flags.writeable = False
    assert score(t[::-1], np.asfortranarray(x)[::-1]).sce_image == pytest.approx(score(t, x).sce_image, abs=1e-12)


def test_pairs_are_not_merged_with_themselves():
    metric = SchurEntropy().update(np.eye(3), np.eye(3))
    with pytest.raises(QuernelError, match="pairs that count twice"):
        metric.merge(metric)
    assert metric.n_pairs == 3
