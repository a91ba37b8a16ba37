"""Determinantal designs against DPPy and deterministic pivoting, and the times that a design and its fit may take.

DPPy 0.3.3 samples the same projection kernel by its fastest exact sampler, Gram-Schmidt over all rows, in a process of
its own. Ours draws proposals from the leverage scores: about m (1 + 1/2 + .. + 1/m), whatever the population is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.linalg import qr

from benchmarks._runner import Case, Isolated, allowed
from quernel.kernels import EmpiricalSpace, LegendreSpace, ProjectionDPP, VolumeSampler, WeightedLeastSquares

ROWS, FEATURES = 100_000, 100
DPPY = ("dppy==0.3.3",)
# A core: float64 multiply-adds twice a second, and bytes from memory.
FLOPS, MEMORY_BYTES = 47e9, 34e9


def features(n: int, m: int) -> np.ndarray:
    """Return heavy-tailed rows, so that leverage differs from row to row."""
    return np.random.default_rng(0).standard_t(4, (n, m))


def orthonormal(n: int, m: int) -> np.ndarray:
    """Return the basis that both samplers get."""
    return np.linalg.qr(features(n, m))[0]


def population() -> SimpleNamespace:
    q = orthonormal(ROWS, FEATURES)
    phi = q * np.sqrt(ROWS)
    space = EmpiricalSpace(phi, orthonormal=True)
    return SimpleNamespace(
        a=features(ROWS, FEATURES),
        q=q,
        phi=phi,
        space=space,
        process=ProjectionDPP(space),
        rng=np.random.default_rng(1),
    )


def dppy_finite(n: int, m: int) -> Callable[[], object]:
    """Return DPPy's exact sampler of the same projection kernel."""
    from dppy.finite_dpps import FiniteDPP

    process = FiniteDPP("correlation", projection=True, K_eig_dec=(np.ones(m), orthonormal(n, m)))
    state = np.random.RandomState(0)

    def sample() -> object:
        process.flush_samples()
        return process.sample_exact(mode="GS", random_state=state)

    return sample


def dppy_continuous(m: int, dim: int) -> Callable[[], object]:
    """Return DPPy's sampler of the multivariate Jacobi ensemble for the uniform distribution."""
    from dppy.multivariate_jacobi_ope import MultivariateJacobiOPE

    process = MultivariateJacobiOPE(m, np.zeros((dim, 2)))
    state = np.random.RandomState(0)
    return lambda: process.sample(random_state=state)


def rows_are_a_basis(s: SimpleNamespace) -> None:
    for _ in range(3):
        rows = s.process.sample(s.rng)
        if len(set(rows.tolist())) != FEATURES or np.linalg.matrix_rank(s.q[rows]) != FEATURES:
            raise ValueError("rows repeat or depend on each other")
    np.testing.assert_allclose(s.space.leverage, (s.q**2).sum(1), rtol=1e-9)
    # Rows of high leverage must be met as often as they say.
    top = np.argsort(s.space.leverage)[-500:]
    met = np.mean([np.isin(top, s.process.sample(s.rng)).sum() for _ in range(300)])
    expected = s.space.leverage[top].sum()
    if abs(met - expected) > 6 * np.sqrt(expected / 300):
        raise ValueError(f"rows of high leverage are met {met:.2f} times instead of {expected:.2f}")


def from_basis(s: SimpleNamespace) -> Any:
    return ProjectionDPP(EmpiricalSpace(s.phi, orthonormal=True)).sample(s.rng)


def from_features(s: SimpleNamespace) -> Any:
    return ProjectionDPP(EmpiricalSpace(s.a)).sample(s.rng)


def sequential_updates(s: SimpleNamespace) -> list[int]:
    """Run the chain rule over all rows in NumPy: one projection of the population a point."""
    left, basis, taken = (s.q**2).sum(1), np.zeros((FEATURES, FEATURES)), []
    for j in range(FEATURES):
        cumulated = np.cumsum(left)
        i = int(np.searchsorted(cumulated, s.rng.random() * cumulated[-1], side="right"))
        direction = s.q[i] - basis[:j].T @ (basis[:j] @ s.q[i])
        basis[j] = direction / np.linalg.norm(direction)
        left = np.maximum(left - (s.q @ basis[j]) ** 2, 0.0)
        taken.append(i)
    return taken


def continuous(degree: int, dim: int) -> SimpleNamespace:
    space = LegendreSpace(degree, dim)
    return SimpleNamespace(space=space, process=ProjectionDPP(space), rng=np.random.default_rng(0))


def points_are_spread(s: SimpleNamespace) -> None:
    points = s.process.sample(s.rng)
    if np.linalg.matrix_rank(s.space.phi(points)) != s.space.n_features:
        raise ValueError("the points do not determine a function")
    # Every point has marginal nu, under which |phi|^2/m has a known mean.
    weights = [s.space.n_features / (s.space.phi(s.process.sample(s.rng)) ** 2).sum(1) for _ in range(200)]
    if abs(np.mean(weights) - 1) > 0.05:
        raise ValueError(f"the mean weight is {np.mean(weights):.3f} instead of 1")


def fitting() -> SimpleNamespace:
    space = EmpiricalSpace(features(5000, 200))
    design = VolumeSampler(space, "dpp_repeat", n=800).sample(0)
    y = np.random.default_rng(1).standard_normal(800)
    rows = space.phi(design.points) * np.sqrt(design.weights)[:, None]
    return SimpleNamespace(
        fit=WeightedLeastSquares(space), design=design, y=y, rows=rows, targets=y * np.sqrt(design.weights)
    )


def fit_is_the_solution(s: SimpleNamespace) -> None:
    wanted = np.linalg.lstsq(s.rows, s.targets, rcond=None)[0]
    np.testing.assert_allclose(s.fit.fit(s.design, s.y).coef_, wanted, atol=1e-10)


def chain_bound_ms(m: int) -> float:
    """Return the time of one Gram-Schmidt pass over the expected proposals, m of them for each m - j still to find."""
    work = sum(m / (m - j) * 4 * j * m for j in range(m))
    return 1e3 * work / FLOPS


CASES = [
    Case(
        name="process of 100 among 100,000 rows, basis given, leverage included",
        setup=population,
        ours=from_basis,
        peers={
            "DPPy 0.3.3, Gram-Schmidt": Isolated("dppy_finite", ROWS, FEATURES, requires=DPPY),
            "NumPy, sequential updates": sequential_updates,
            "scipy, pivoted QR (deterministic)": lambda s: qr(s.q.T, mode="r", pivoting=True, check_finite=False)[1][
                :FEATURES
            ],
        },
        gate=rows_are_a_basis,
        target={"DPPy 0.3.3, Gram-Schmidt": 10.0},
        bound_ms=1e3 * ROWS * FEATURES * 8 / MEMORY_BYTES,
        bound="the basis read once at 34 GB/s",
        threads=(1,),
    ),
    Case(
        name="a further process of 100 among the same 100,000 rows",
        setup=population,
        ours=lambda s: s.process.sample(s.rng),
        min_ms=40.0,  # chance decides how many proposals a call takes
        peers={
            "DPPy 0.3.3, Gram-Schmidt": Isolated("dppy_finite", ROWS, FEATURES, requires=DPPY),
        },
        gate=rows_are_a_basis,
        target={"DPPy 0.3.3, Gram-Schmidt": 10.0},
        bound_ms=chain_bound_ms(FEATURES),
        bound="one Gram-Schmidt pass over the expected proposals at 47 GFLOP/s",
        threads=(1,),
    ),
    Case(
        name="process of 100 among 100,000 rows of features, QR included",
        setup=population,
        ours=from_features,
        peers={"3 s": allowed(3.0), "LAPACK's QR alone": lambda s: np.linalg.qr(s.a)},
        gate=rows_are_a_basis,
        target={"3 s": 1.0},
        bound_ms=1e3 * 4 * ROWS * FEATURES**2 / FLOPS,
        bound="4 N m^2 operations of a QR factorisation with its basis at 47 GFLOP/s",
        threads=(1,),
    ),
    Case(
        name="process of 50 points for Legendre polynomials on [-1, 1]",
        setup=partial(continuous, 49, 1),
        ours=lambda s: s.process.sample(s.rng),
        min_ms=40.0,  # chance decides how many proposals a call takes
        peers={"50 ms": allowed(0.05)},
        gate=points_are_spread,
        target={"50 ms": 1.0},
        bound_ms=chain_bound_ms(50),
        bound="one Gram-Schmidt pass over the expected proposals at 47 GFLOP/s",
        threads=(1,),
    ),
    Case(
        name="process of 45 points for Legendre polynomials on the square",
        setup=partial(continuous, 8, 2),
        ours=lambda s: s.process.sample(s.rng),
        min_ms=40.0,  # chance decides how many proposals a call takes
        peers={"DPPy 0.3.3, Jacobi ensemble": Isolated("dppy_continuous", 45, 2, requires=DPPY)},
        gate=points_are_spread,
        bound_ms=chain_bound_ms(45),
        bound="one Gram-Schmidt pass over the expected proposals at 47 GFLOP/s",
        threads=(1,),
    ),
    Case(
        name="weighted fit of 200 functions to 800 values",
        setup=fitting,
        ours=lambda s: s.fit.fit(s.design, s.y),
        peers={
            "20 ms": allowed(0.02),
            "NumPy, lstsq of the weighted rows": lambda s: np.linalg.lstsq(s.rows, s.targets, rcond=None)[0],
        },
        gate=fit_is_the_solution,
        target={"20 ms": 1.0},
        bound_ms=1e3 * 2 * 800 * 200**2 * 2 / FLOPS,
        bound="4 n m^2 operations of a QR factorisation with its basis at 47 GFLOP/s",
    ),
]
