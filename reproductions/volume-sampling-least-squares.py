"""Reproduce determinantal designs for weighted least squares (arXiv 2312.14057): polynomials, and labels of real data.

What the paper measures is the error of the fit against that of the best approximation, by kind of design and number of
points. Errors are exact here: by quadrature for functions, over all rows for data. A mean over draws is taken over the
squared errors, as in the paper's bounds, so that one bad design is seen.

Why a bound is missed where it is. In two dimensions the process repels less than on an interval: two repetitions do not
beat twice as many independent points there, and 4m points are seldom stable. For real labels the error comes from what
the features do not explain. With a residual variance s^2 volume sampling adds s^2 m/(n - m + 1) on average, and
independent rows of light tails little more than s^2 m/(n - m - 1): designs differ by a multiple where rows of high
leverage exist (concrete), and by a tenth where all rows are alike (angles drawn evenly, principal components of
sentences), most of it close to m labels. Of the 927 rows of concrete 800 draws meet fewer different ones than a choice
without replacement does, which is better there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from _harness import Outcome, Reproduction, at_most
from numpy.polynomial.legendre import leggauss

from quernel import data
from quernel.kernels import (
    EmpiricalSpace,
    IllConditionedDesignWarning,
    LegendreSpace,
    RandomFourierFeatures,
    TrigonometricSpace,
    VolumeSampler,
    WeightedLeastSquares,
)

volume = Reproduction("volume-sampling-least-squares", paper="2312.14057")

Array = np.ndarray
DRAWS = 150
DESIGNS = {
    "iid 2m": ("iid", 2),
    "iid 4m": ("iid", 4),
    "volume 2m": ("volume", 2),
    "volume 4m": ("volume", 4),
    "DPP x1": ("dpp_repeat", 1),
    "DPP x2": ("dpp_repeat", 2),
    "DPP x4": ("dpp_repeat", 4),
}
STABLE = 0.5  # lambda_min(G) above which a design counts as stable


def cube_rule(dim: int) -> tuple[Array, Array]:
    """Return nodes and masses of a Gauss-Legendre product rule for the uniform distribution on [-1, 1]^dim."""
    x, w = leggauss(400 if dim == 1 else 120)
    axes, masses = np.meshgrid(*[x] * dim), np.meshgrid(*[w / 2] * dim)
    return np.stack([a.ravel() for a in axes], 1), np.prod(masses, 0).ravel()


def circle_rule() -> tuple[Array, Array]:
    """Return nodes and masses of the rectangle rule on [0, 1), which has no node at the kink of the function below."""
    n = 2**14
    return ((np.arange(n) + 0.5) / n)[:, None], np.full(n, 1 / n)


def compared(space: Any, f: Callable[[Array], Array], rule: tuple[Array, Array], seed: int) -> Outcome:
    """Draw every kind of design many times; report errors over the best, and how often they are stable."""
    nodes, masses = rule
    phi = space.phi(nodes)
    best = phi.T @ (masses * f(nodes))
    floor = float(masses @ (f(nodes) - phi @ best) ** 2)
    rng = np.random.default_rng(seed)
    fit = WeightedLeastSquares(space)
    rows, rms, stable = [], {}, {}
    for name, (method, factor) in DESIGNS.items():
        sampler = VolumeSampler(space, method, n=factor * space.n_features)
        errors, least = [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IllConditionedDesignWarning)  # what is counted here
            for _ in range(DRAWS):
                design = sampler.sample(rng)
                coef = fit.fit(design, f(design.points)).coef_
                # Pythagoras: what the fit misses besides the part that no function of the space has.
                errors.append(1 + float(((coef - best) ** 2).sum()) / floor)
                least.append(design.gram_min)
        rms[name], stable[name] = float(np.sqrt(np.mean(errors))), float(np.mean(np.array(least) > STABLE))
        median = float(np.sqrt(np.median(errors)))
        rows.append({"design": name, "rms error / best": rms[name], "median": median, "share stable": stable[name]})
    checks = {
        "two processes better than twice as many independent points": rms["DPP x2"] < rms["iid 4m"],
        "four processes stable in at least 35 % of draws": stable["DPP x4"] >= 0.35,
        "4m independent points stable in at most 2 % of draws": stable["iid 4m"] <= 0.02,
    }
    return Outcome(rms["DPP x4"], rms["iid 4m"], checks, rows, [f"best approximation error {np.sqrt(floor):.3e}"])


ORDER = "two processes better than twice as many independent points"
STABILITY = (
    ORDER,
    "four processes stable in at least 35 % of draws",
    "4m independent points stable in at most 2 % of draws",
)
COMMON: dict[str, Any] = {
    "data": "generated",
    "metric": "root mean squared error over that of the best approximation, 4m points",
    "baseline": "4m independent points of the same measure",
    "rule": at_most(1.15, partly=1.25),
    "checks": STABILITY,
    "seeds": (0, 1, 2),
}


@volume.claim(
    name="legendre",
    claim="Repeated determinantal designs come closer to the best approximation than as many independent points",
    scale="Legendre polynomials, m=20, 1/(1 + 25 x^2), 150 draws",
    **COMMON,
)
def legendre(seed: int) -> Outcome:
    return compared(LegendreSpace(19), lambda x: 1 / (1 + 25 * x[:, 0] ** 2), cube_rule(1), seed)


@volume.claim(
    name="square",
    claim="The same in two dimensions",
    scale="Legendre polynomials of total degree 8 in two variables, m=45, 1/(1 + 5 |x|^2), 150 draws",
    **COMMON,
)
def square(seed: int) -> Outcome:
    return compared(LegendreSpace(8, 2), lambda x: 1 / (1 + 5 * (x**2).sum(1)), cube_rule(2), seed)


@volume.claim(
    name="trigonometric",
    claim="The same for trigonometric polynomials",
    scale="frequencies to 10, m=21, |sin(pi x)|, 150 draws",
    **COMMON,
)
def trigonometric(seed: int) -> Outcome:
    return compared(TrigonometricSpace(10), lambda x: np.abs(np.sin(np.pi * x[:, 0])), circle_rule(), seed)


LABEL_DRAWS = 30
FACTORS = (1.0, 1.25, 2.0, 4.0)
LABEL_CHECKS = (
    "at most 0.9 of independent leverage sampling at 2m",
    "at most 0.6 of uniform sampling at 1.25m",
    "at 4m within 5 % of all labels",
)


def label_errors(
    space: EmpiricalSpace, y: Array, test: tuple[Array, Array], method: str, n: int, rng: Any
) -> list[float]:
    """Return mean squared test errors of fits to ``n`` points of a kind of design."""
    kind, reference = ("iid", "mu") if method == "uniform" else (method, "nu")
    sampler, fit = VolumeSampler(space, kind, n=n, reference=reference), WeightedLeastSquares(space)
    errors = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IllConditionedDesignWarning)
        for _ in range(LABEL_DRAWS):
            if method == "uniform":
                # What a user does: different rows, equal weights.
                rows = rng.choice(len(y), n, replace=False)
                coef = np.linalg.lstsq(space.phi(rows), y[rows], rcond=None)[0]
            else:
                design = sampler.sample(rng)
                coef = fit.fit(design, y[design.indices]).coef_
            errors.append(float(np.mean((test[0] @ coef - test[1]) ** 2)))
    return errors


def labelled(pool: Array, y: Array, held: Array, held_y: Array, seed: int) -> Outcome:
    """Compare label budgets: test errors of designs against independent and uniform choice, and all labels."""
    space = EmpiricalSpace(pool)
    m = space.n_features
    test = (space.phi(held), held_y)
    whole = np.linalg.lstsq(space.phi(np.arange(len(y))), y, rcond=None)[0]
    best = float(np.mean((test[0] @ whole - held_y) ** 2))
    noise = float(np.mean((space.phi(np.arange(len(y))) @ whole - y) ** 2)) * len(y) / (len(y) - m)
    rng = np.random.default_rng(seed)
    mean: dict[tuple[str, float], float] = {}
    rows = []
    for factor in FACTORS:
        n = round(factor * m)
        row: dict[str, Any] = {"labels": n}
        for method in ("uniform", "iid", "volume", "dpp_repeat"):
            errors = label_errors(space, y, test, method, n, rng)
            mean[method, factor] = float(np.mean(errors))
            row |= {method: mean[method, factor], f"{method}, median": float(np.median(errors))}
        rows.append(row)
    # Chosen beforehand: repetition wherever n is a multiple of m.
    ours = {factor: mean["dpp_repeat" if factor == int(factor) else "volume", factor] for factor in FACTORS}
    # With noise of this variance in the labels no design of n labels has less than about m/n of it on top: where the
    # last check fails, the note says whether any could pass it.
    floor = best + noise * m / round(4 * m)
    checks = {
        LABEL_CHECKS[0]: ours[2.0] <= 0.9 * mean["iid", 2.0],
        LABEL_CHECKS[1]: ours[1.25] <= 0.6 * mean["uniform", 1.25],
        LABEL_CHECKS[2]: ours[4.0] <= 1.05 * best,
    }
    note = (
        f"m = {m}; all {len(y)} labels: {best:.4f}; residual variance {noise:.4f}, so that {round(4 * m)} noisy labels "
    )
    note += f"leave about {floor:.4f}; ours {ours[4.0]:.4f}"
    return Outcome(ours[1.25], mean["iid", 1.25], checks, rows, [note])


@functools.cache
def table(name: str) -> tuple[Array, Array, Array, Array]:
    """Return 200 random Fourier features and standardised targets of the first split of a table: pool, then test."""
    held = data.load(name)
    test = held.test_rows[:, 0]
    x = (held.x - held.x[~test].mean(0)) / np.maximum(held.x[~test].std(0), 1e-12)
    y = (held.y - held.y[~test].mean()) / held.y[~test].std()
    z = RandomFourierFeatures(200, gamma=0.3 / x.shape[1], random_state=0).fit_transform(x)
    return z[~test], y[~test], z[test], y[test]


def label_claim(name: str, claim: str, scale: str, source: str) -> Callable[[Any], Any]:
    return volume.claim(
        name=name,
        claim=claim,
        scale=scale,
        data=source,
        metric="mean squared test error at 1.25 m labels, mean of 30 draws",
        baseline="independent draws by leverage",
        rule=at_most(0.9, of="ours / baseline", partly=1.0),
        checks=LABEL_CHECKS,
        seeds=(0, 1, 2),
    )


@label_claim(
    "kin40k",
    "Fewer labels for the same error: the pose of a robot arm",
    "200 random Fourier features, 36,000 rows to choose from",
    "kin40k (UCI), first split",
)
def kin40k(seed: int) -> Outcome:
    return labelled(*table("uci-kin40k"), seed)


@label_claim(
    "concrete",
    "Fewer labels for the same error: the strength of concrete",
    "200 random Fourier features, 927 rows to choose from",
    "concrete (UCI), first split",
)
def concrete(seed: int) -> Outcome:
    return labelled(*table("uci-concrete"), seed)


@functools.cache
def sentence_pairs() -> tuple[Array, Array, Array, Array]:
    """Return 64 principal components and a constant of products of MiniLM vectors, and scores of similarity."""
    from _sentence_vectors import principal, stsb

    def products(split: str) -> tuple[Array, Array]:
        vectors, pairs, score = stsb(split)
        return vectors[pairs[:, 0]] * vectors[pairs[:, 1]], score.astype(np.float64)

    (pool, y), (held, held_y) = products("train"), products("test")
    mean, axes = principal(pool, 64, centred=True)
    z, held_z = ((rows - mean).astype(np.float64) @ axes for rows in (pool, held))
    z, held_z = (np.column_stack((rows, np.ones(len(rows)))) for rows in (z, held_z))
    return z, (y - y.mean()) / y.std(), held_z, (held_y - y.mean()) / y.std()


@label_claim(
    "sentences",
    "Fewer labels for the same error: how alike two sentences are",
    "64 principal components of products of MiniLM vectors, 5,749 pairs to choose from",
    "STS-B train, judged on test",
)
def sentences(seed: int) -> Outcome:
    return labelled(*sentence_pairs(), seed)


if __name__ == "__main__":
    raise SystemExit(volume.main())
