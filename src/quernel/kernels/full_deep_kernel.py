"""``FullDeepKernel``: the objective of a deep kernel machine over all points, for small n (arXiv 2108.13097).

    maximise   log P(Y | G_L) - sum_l nu_l KL(N(0, G_l) || N(0, K(G_{l-1})))   over G_1 .. G_L,  G_0 = X X^T / d

with log P(Y | G_L) = sum_c log N(y_c; 0, K(G_L) + s^2 I), or, for an output Gram matrix that is given,
-nu_{L+1} KL(N(0, G_{L+1}) || N(0, K(G_L))). For linear kernels the latter has one optimum: with equal nu the points at
even distances on the geodesic from G_0 to G_{L+1}, G_l = G_0 (G_0^-1 G_{L+1})^{l/(L+1)}; with unequal nu each layer,
given its neighbours, solves a quadratic equation, and cycling over the layers converges. Cost: L n^3 a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_finite, check_float, check_int
from quernel.kernels._deep_kernel_estimator import Weights, layer_weights
from quernel.kernels._random_features import Floats
from quernel.kernels.deep_kernel_layers import (
    Kernel,
    StructGram,
    apply_kernel,
    gram_kl,
    halves,
    input_gram,
    lower_factor,
    propagate,
)
from quernel.kernels.linalg import jittered_cholesky

_SOLVERS = ("auto", "gradient", "riccati", "geodesic")
# Updates that L-BFGS looks back on.
_HISTORY = 50


@register(
    "deep-kernel-machines",
    pillar="kernels",
    contract="diagnostic",
    paper="2108.13097",
    status="stable",
    headline=False,
)
class FullDeepKernel:
    """Gram matrices of all points, layer by layer, at the optimum of the exact objective.

    Parameters
    ----------
    n_layers : int, default=1
        Gram layers L, at least 1.
    kernel : {"arccos", "rbf", "linear"}, default="arccos"
    nu : float or array of L floats, default=1.0
        Weight of each layer's divergence, > 0 and finite; L + 1 of them with ``likelihood="gram"``.
    likelihood : {"gaussian", "gram"}, default="gaussian"
        Whether the targets are columns y ~ N(0, K(G_L) + noise I), or the Gram matrix of an output layer.
    noise : float, default=0.1
        Variance, for ``likelihood="gaussian"``.
    jitter : float, default=1e-6
        White noise in every kernel, see ``apply_kernel``.
    precomputed : bool, default=False
        Whether ``fit`` gets G_0 instead of rows.
    solver : {"auto", "gradient", "riccati", "geodesic"}, default="auto"
        L-BFGS on factors; or, for linear kernels without jitter and a Gram likelihood, cycling over the layers, or the
        closed form for equal nu. "auto" takes the last that applies.
    start : {"kernel", "random"}, default="kernel"
        Where L-BFGS starts: at the fixed kernel, or at random factors.
    max_iter : int, default=1000
        Steps of L-BFGS, or cycles.
    tol : float, default=1e-10
        Change, relative to what changes, below which it stops.
    random_state : int, Generator or None, default=None
        For ``start="random"``.

    Attributes
    ----------
    objective_ : float
        At the optimum.
    n_iter_ : int

    References
    ----------
    Yang et al., arXiv 2108.13097, 2021.

    Examples
    --------
    >>> model = FullDeepKernel(1, kernel="linear", likelihood="gram", jitter=0.0, precomputed=True)
    >>> model.fit(np.eye(2), 4 * np.eye(2)).gram_(1).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """

    def __init__(
        self,
        n_layers: int = 1,
        *,
        kernel: Kernel = "arccos",
        nu: Weights = 1.0,
        likelihood: Literal["gaussian", "gram"] = "gaussian",
        noise: float = 0.1,
        jitter: float = 1e-6,
        precomputed: bool = False,
        solver: Literal["auto", "gradient", "riccati", "geodesic"] = "auto",
        start: Literal["kernel", "random"] = "kernel",
        max_iter: int = 1000,
        tol: float = 1e-10,
        random_state: Seed = None,
    ) -> None:
        self.n_layers = check_int("n_layers", n_layers, low=1)
        self.kernel: Kernel = check_choice("kernel", kernel, ("arccos", "rbf", "linear"))
        self.likelihood = check_choice("likelihood", likelihood, ("gaussian", "gram"))
        self.nu = layer_weights(nu, n_layers + (likelihood == "gram"))
        if not all(map(math.isfinite, self.nu)):
            raise QuernelError(f"nu must be finite here; got {nu!r}. A very large one keeps the fixed kernel")
        self.noise = check_float("noise", noise, low=0.0, open_low=True)
        self.jitter = check_float("jitter", jitter, low=0.0)
        self.precomputed = check_bool("precomputed", precomputed)
        self.solver = self._chosen(check_choice("solver", solver, _SOLVERS))
        self.start = check_choice("start", start, ("kernel", "random"))
        self.max_iter = check_int("max_iter", max_iter, low=1)
        self.tol = check_float("tol", tol, low=0.0)
        self.random_state = random_state

    def fit(self, X: ArrayLike, Y: ArrayLike) -> Self:
        """Find the Gram matrices.

        Parameters
        ----------
        X : array, shape (n, d), or (n, n) with ``precomputed``
            Rows, or G_0.
        Y : array, shape (n,) or (n, q), or (n, n) with ``likelihood="gram"``
            Targets, or the Gram matrix of the output layer, positive definite.
        """
        x, y = _array("X", X), _array("Y", Y)
        y = y.reshape(len(y), -1)
        self._inputs = None if self.precomputed else x
        square = (len(x), len(x))
        if (self.precomputed and x.shape != square) or (self.likelihood == "gram" and y.shape != square):
            raise QuernelError(f"a Gram matrix of {len(x)} points must be square; got X {x.shape}, Y {y.shape}")
        if len(y) != len(x):
            raise QuernelError(f"Y must have the {len(x)} rows of X; got {len(y)}")
        self._first = _symmetric(x) if self.precomputed else input_gram(x[:0], x).ii
        self._targets = _symmetric(y) if self.likelihood == "gram" else y
        solve = {"gradient": self._by_gradient, "riccati": self._by_cycling, "geodesic": self._by_geodesic}
        try:
            self._grams, self.n_iter_ = solve[self.solver]()
        except QuernelError as error:
            raise QuernelError(
                f"the optimisation diverged ({error}). Likely causes: (a) Y is not standardised, (b) a noise or a nu "
                "too small for it, (c) a jitter too small for nearly equal rows"
            ) from error
        self.objective_ = float(self.objective(self._grams))
        return self

    def gram_(self, layer: int) -> Floats:
        """Return G_l, shape (n, n); layer 0 is that of the inputs."""
        grams = self._fitted()
        number = check_int("layer", layer, low=0, high=self.n_layers)
        result: Floats = (grams[number - 1] if number else self._first).numpy()
        return result

    def objective(self, grams: list[Tensor]) -> Tensor:
        """Return the objective at Gram matrices G_1 .. G_L, each (n, n)."""
        value = self._first.new_zeros(())
        below = self._first
        for nu, gram in zip(self.nu, grams, strict=False):
            value = value - nu * gram_kl(gram, self._kernel_of(below))
            below = gram
        return value + self._fit_of(self._kernel_of(below))

    def predict(self, X: ArrayLike, return_std: bool = False) -> Floats | tuple[Floats, Floats]:
        """Return the posterior mean of new rows, shape (m, q); with ``return_std`` the deviation of an observation too.

        Raises
        ------
        QuernelError
            With ``precomputed``, or with ``likelihood="gram"``, which has no targets; or for other columns than in fit.
        """
        grams = self._fitted()
        if self._inputs is None or self.likelihood == "gram":
            raise QuernelError("predict needs rows and targets: precomputed=False and likelihood='gaussian'")
        rows = _array("X", X)
        if rows.shape[1] != self._inputs.shape[1]:
            raise QuernelError(f"X must have {self._inputs.shape[1]} columns, as in fit; got {rows.shape[1]}")
        struct = input_gram(rows, self._inputs)
        for gram in grams:
            struct = propagate(struct, gram, self.kernel, self.jitter)
        k = apply_kernel(struct, self.kernel, self.jitter)
        chol = jittered_cholesky(k.ii + self.noise * torch.eye(len(k.ii), dtype=k.ii.dtype))
        half, rest = halves(k, chol)
        mean: Floats = (half.T @ torch.linalg.solve_triangular(chol, self._targets, upper=False)).numpy()
        return (mean, (rest + self.noise).sqrt().numpy()) if return_std else mean

    def _fitted(self) -> list[Tensor]:
        if not hasattr(self, "_grams"):
            raise QuernelError("FullDeepKernel is not fitted; call fit first")
        return self._grams

    def _chosen(self, solver: str) -> str:
        exact = self.kernel == "linear" and self.likelihood == "gram" and self.jitter == 0
        equal = len(set(self.nu)) == 1
        if solver == "auto":
            return "geodesic" if exact and equal else "riccati" if exact else "gradient"
        if solver != "gradient" and not exact:
            raise QuernelError(f"solver={solver!r} needs kernel='linear', likelihood='gram' and jitter=0")
        if solver == "geodesic" and not equal:
            raise QuernelError(f"solver='geodesic' needs equal nu; got {self.nu}. Take 'riccati'")
        return solver

    def _kernel_of(self, gram: Tensor) -> Tensor:
        none = StructGram(gram, gram[:0], gram[:0, 0])
        return apply_kernel(none, self.kernel, self.jitter).ii

    def _fit_of(self, k: Tensor) -> Tensor:
        """Return what the likelihood says of the top kernel."""
        if self.likelihood == "gram":
            return -self.nu[-1] * gram_kl(self._targets, k)
        n, q = self._targets.shape
        chol = jittered_cholesky(k + self.noise * torch.eye(n, dtype=k.dtype))
        white = torch.linalg.solve_triangular(chol, self._targets, upper=False)
        return -0.5 * (white.square().sum() + q * (2 * chol.diagonal().log().sum() + n * math.log(2 * math.pi)))

    def _by_gradient(self) -> tuple[list[Tensor], int]:
        n = len(self._first)
        free = torch.zeros(self.n_layers, n, n, dtype=self._first.dtype)
        if self.start == "random":
            free = torch.from_numpy(generator(self.random_state, "random_state").standard_normal(free.shape))
        free.requires_grad_()

        def grams() -> tuple[list[Tensor], Tensor]:
            """Return the Gram matrices and the objective; factors are relative to the kernel below."""
            below, found, value = self._first, [], free.new_zeros(())
            for nu, numbers in zip(self.nu, free, strict=False):
                chol, white = jittered_cholesky(self._kernel_of(below)), lower_factor(numbers)
                root = chol @ white
                value = value - 0.5 * nu * (white.square().sum() - 2 * numbers.diagonal().sum() - n)
                below = root @ root.T
                found.append(below)
            return found, value + self._fit_of(self._kernel_of(below))

        optimizer = torch.optim.LBFGS(
            [free],
            max_iter=self.max_iter,
            max_eval=2 * self.max_iter,
            tolerance_grad=self.tol,
            tolerance_change=self.tol * 1e-4,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -grams()[1]
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        with torch.no_grad():
            return grams()[0], int(optimizer.state[free]["n_iter"])

    def _by_cycling(self) -> tuple[list[Tensor], int]:
        """Return the optimum of linear kernels, layer after layer."""
        chain = [self._first, *_geodesic(self._first, self._targets, self.n_layers), self._targets]
        cycles = 0
        change = math.inf
        while change > self.tol and cycles < self.max_iter:
            cycles, change = cycles + 1, 0.0
            for layer in range(1, self.n_layers + 1):
                new = _between(chain[layer - 1], chain[layer + 1], self.nu[layer - 1], self.nu[layer])
                change = max(change, float((new - chain[layer]).norm() / new.norm()))
                chain[layer] = new
        return chain[1:-1], cycles

    def _by_geodesic(self) -> tuple[list[Tensor], int]:
        return _geodesic(self._first, self._targets, self.n_layers), 1


def _geodesic(first: Tensor, last: Tensor, inner: int) -> list[Tensor]:
    """Return first (first^-1 last)^{l/(inner+1)} for l = 1 .. inner."""
    return [_relative(first, last, partial(torch.pow, exponent=layer / (inner + 1))) for layer in range(1, inner + 1)]


def _between(below: Tensor, above: Tensor, nu: float, nu_above: float) -> Tensor:
    """Return the G that solves nu G below^-1 G + (nu_above - nu) G - nu_above above = 0."""
    half = 0.5 * (nu_above - nu) / nu
    # In coordinates where ``below`` is I the equation is one of numbers, for each eigenvalue of ``above``.
    return _relative(below, above, lambda x: (half**2 + nu_above / nu * x).sqrt() - half)


def _relative(below: Tensor, above: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return C f(C^-1 above C^-T) C^T for C C^T = below and a function of eigenvalues."""
    chol = jittered_cholesky(below)
    left = torch.linalg.solve_triangular(chol, above, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(chol, left.T, upper=False))
    if not bool((values > 0).all()):
        raise QuernelError(f"Gram matrices must be positive definite; an eigenvalue is {float(values.min()):.3g}")
    root = chol @ vectors
    return (root * function(values)) @ root.T


def _array(name: str, value: ArrayLike) -> Tensor:
    array = np.ascontiguousarray(value, dtype=np.float64)
    if array.ndim not in (1, 2) or not len(array) or (name == "X" and array.ndim != 2):
        raise QuernelError(f"{name} must be a matrix with at least one row; got shape {array.shape}")
    check_finite(name, array)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _symmetric(matrix: Tensor) -> Tensor:
    if not torch.allclose(matrix, matrix.T, rtol=1e-8, atol=1e-10 * float(matrix.abs().max())):
        raise QuernelError("a Gram matrix must be symmetric")
    return 0.5 * (matrix + matrix.T)
