"""``NTKernel``: NNGP kernel and neural tangent kernel of a fully connected network of infinite width.

    K_0 = sb^2 + sw^2 x.y / d                Th_0 = K_0
    K   = sb^2 + sw^2 E[f(u) f(v)]           Th   = K + sw^2 E[f'(u) f'(v)] Th_below        (u, v) ~ N(0, K_below)

once for each of ``depth`` hidden layers. Large matrices are computed in square blocks that stay in the cache, in
float64, on all of torch's threads; of K(X, X) only half. Cost: d multiply-adds an entry and, for ReLU, one arctangent
and two roots an entry and layer.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._progress import Progress, check_progress
from quernel._registry import register
from quernel._threads import parallel_ranges
from quernel._validate import check_choice, check_finite, check_float, check_int
from quernel.kernels.gaussian_averages import Function
from quernel.kernels.layer_maps import PairMap, layer_map, pair_map, variance_map
from quernel.kernels.linalg import Array, like
from quernel.kernels.theory.activations import as_activation

Parametrization = Literal["ntk", "standard"]
PARAMETRIZATIONS = ("ntk", "standard")
# Rows and columns of a block: 512 KB of float64, and a few of them at a time in a core's own cache.
_BLOCK = 256


@dataclass(frozen=True)
class Kernels:
    """Both kernels between the same points, each of shape (*batch, n, m)."""

    nngp: Any
    ntk: Any


@register(
    "ntk-permutations", pillar="kernels", contract="diagnostic", paper="2502.16763", status="stable", headline=False
)
class NTKernel(SavedEstimator, BaseEstimator):
    """The kernels of an infinitely wide fully connected network.

    Parameters
    ----------
    depth : int, default=1
        Hidden layers; 0 is a linear model.
    activation : str or callable, default="relu"
        A name that ``quernel.kernels.theory.as_activation`` knows, or an elementwise function of tensors. ReLU, leaky
        ReLU, the identity and erf are closed forms; everything else is quadrature, thousands of times slower: for some
        hundred points.
    sigma_w, sigma_b : float, default=1.0, 0.0
        Standard deviations of weights, > 0, and of biases, >= 0, of every layer.
    parametrization : {"ntk", "standard"}, default="ntk"
        "ntk": weights are drawn from N(0, 1) and scaled by sigma_w / sqrt(fan-in) in the forward pass. "standard": they
        are drawn with that standard deviation and not scaled, as layers of torch are; with one learning rate for all
        layers only the last layer's weights then move as the width grows, and ``ntk`` is theirs, sw^2 E[f(u) f(v)], in
        units of the width.

    Notes
    -----
    An estimator's parameter, not an estimator: there is nothing to fit. ``GridSearchCV`` reaches ``kernel__depth``
    where the estimator was given one, ``NTKRegressor(NTKernel())``.
    Tensors that ask for gradients are computed whole, with gradients.

    References
    ----------
    Jacot, Gabriel and Hongler, "Neural Tangent Kernel", arXiv 1806.07572, 2018.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> (2 * NTKernel().ntk(x)).round(4).tolist()
    [[1.0, 0.1592], [0.1592, 1.0]]
    """

    _state: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        depth: int = 1,
        activation: str | Function = "relu",
        sigma_w: float = 1.0,
        sigma_b: float = 0.0,
        parametrization: Parametrization = "ntk",
    ) -> None:
        self.depth = depth
        self.activation = activation
        self.sigma_w = sigma_w
        self.sigma_b = sigma_b
        self.parametrization = parametrization

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_int("depth", self.depth, low=0)
        as_activation(self.activation)
        check_float("sigma_w", self.sigma_w, low=0.0, open_low=True)
        check_float("sigma_b", self.sigma_b, low=0.0)
        check_choice("parametrization", self.parametrization, PARAMETRIZATIONS)
        if self.parametrization == "standard" and self.depth == 0:
            raise QuernelError(
                "parametrization='standard' needs a hidden layer, below the only one that moves; got depth=0"
            )

    def nngp(self, X: Array, Y: Array | None = None) -> Array:
        """Return the covariance of the untrained network's outputs.

        Parameters
        ----------
        X, Y : Tensor or array, shapes (*batch, n, d) and (*batch, m, d)
            Points; ``Y`` is ``X`` where it is not given, at half the cost.

        Returns
        -------
        kernel : same kind and dtype as ``X``, shape (*batch, n, m)

        Raises
        ------
        QuernelError
            If shapes do not fit, a value is not finite, or a parameter is no good.
        """
        return self._grams(X, Y, slopes=False).nngp

    def ntk(self, X: Array, Y: Array | None = None, *, progress: Progress | None = None) -> Array:
        """Return the neural tangent kernel: inner products of gradients of the output. Arguments as for ``nngp``.

        ``progress(message, fraction)`` is called after every block of 256 x 256 entries, from several threads, but one
        at a time.
        """
        return self._grams(X, Y, slopes=True, progress=progress).ntk

    def both(self, X: Array, Y: Array | None = None) -> Kernels:
        """Return both kernels for the price of the tangent kernel. Arguments as for ``nngp``."""
        return self._grams(X, Y, slopes=True)

    def nngp_diag(self, X: Array) -> Array:
        """Return the variances of the untrained network's outputs, shape (*batch, n)."""
        self.check_params()
        return like(self._variances(_points("X", X))[-1].to(_dtype(X)), X)

    def _grams(self, X: Array, Y: Array | None, *, slopes: bool, progress: Progress | None = None) -> Kernels:
        self.check_params()
        check_progress(progress)
        x = _points("X", X)
        y = x if Y is None or Y is X else _points("Y", Y)
        if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
            raise QuernelError(
                f"X and Y must have shapes (*batch, n, d) and (*batch, m, d); got {tuple(x.shape)}, {tuple(y.shape)}"
            )
        if x.requires_grad or y.requires_grad:
            found: list[Tensor] = list(
                self._layers(x, y, self._variances(x), self._variances(y), self._with_gradients())
            )
        else:
            found = self._blocked(x, y, _dtype(X), slopes, progress)
        nngp, *ntk = (like(part.to(_dtype(X)), X) for part in found)
        return Kernels(nngp, ntk[0] if slopes else None)

    def _variances(self, x: Tensor) -> list[Tensor]:
        """Return the kernel between each point and itself, below the first hidden layer and above each."""
        step = variance_map(self.activation)
        found = [self._affine(x.square().sum(-1) / x.shape[-1])]
        for _ in range(self.depth):
            found.append(self._affine(step(found[-1])))
        return found

    def _affine(self, kernel: Tensor) -> Tensor:
        """Return sb^2 + sw^2 kernel."""
        if self.sigma_w != 1:
            kernel = kernel * self.sigma_w**2
        return kernel + self.sigma_b**2 if self.sigma_b else kernel

    def _with_gradients(self) -> PairMap:
        value_map, slope_map = layer_map(self.activation)
        return lambda *gram: (value_map(*gram), slope_map(*gram))

    def _layers(
        self, x: Tensor, y: Tensor, left: list[Tensor], right: list[Tensor], pair: PairMap
    ) -> tuple[Tensor, Tensor]:
        """Return K and Th between x (*batch, n, d) and y (*batch, m, d); without slopes the second means nothing."""
        nngp = self._affine(x @ y.mT / x.shape[-1])
        ntk = nngp
        for a, b in zip(left[:-1], right[:-1], strict=True):
            value, slope = pair(nngp, a, b)
            nngp = self._affine(value)
            if slope is not None:
                ntk = torch.addcmul(nngp, slope, ntk, value=self.sigma_w**2)
        if self.parametrization == "standard":
            ntk = nngp - self.sigma_b**2
        return nngp, ntk

    def _blocked(
        self, x: Tensor, y: Tensor, dtype: torch.dtype, slopes: bool, progress: Progress | None
    ) -> list[Tensor]:
        """Return ``_layers`` without gradients, block by block, of K(X, X) half the blocks; Th where asked for."""
        symmetric = x is y
        batch, (n, d), m = x.shape[:-2], x.shape[-2:], y.shape[-2]
        count = math.prod(batch)
        rows, columns = x.reshape(count, n, d), y.reshape(count, m, d)
        lefts, rights = ([part.reshape(count, part.shape[-1]) for part in self._variances(p)] for p in (x, y))
        results = [torch.empty(count, n, m, dtype=dtype, device=x.device) for _ in range(1 + slopes)]
        pair = pair_map(self.activation, slopes=slopes and self.parametrization == "ntk")
        blocks = [
            (k, slice(i, i + _BLOCK), slice(j, j + _BLOCK))
            for k in range(count)
            for i in range(0, n, _BLOCK)
            for j in range(i if symmetric else 0, m, _BLOCK)
        ]

        done, told = itertools.count(1), threading.Lock()

        def work(start: int, stop: int) -> None:
            for k, i, j in blocks[start:stop]:
                left, right = [part[k, i] for part in lefts], [part[k, j] for part in rights]
                made = self._layers(rows[k, i], columns[k, j], left, right, pair)
                for result, block in zip(results, made, strict=False):
                    # Rounding depends on which factor comes first; a Gram is to be symmetric to the bit.
                    result[k, i, j] = (block + block.mT) / 2 if symmetric and i == j else block
                    if symmetric and i != j:
                        result[k, j, i] = block.mT
                if progress is not None:
                    with told:  # in order, and one at a time
                        number = next(done)
                        progress(f"kernel block {number} of {len(blocks)}", number / len(blocks))

        parallel_ranges(work, len(blocks))
        return [result.reshape(*batch, n, m) for result in results]


def _dtype(given: Any) -> torch.dtype:
    """Return the dtype of a result: that of the input, float64 where the input holds integers."""
    if isinstance(given, Tensor):
        return given.dtype if given.is_floating_point() else torch.float64
    return {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}.get(given.dtype, torch.float64)


def _points(name: str, given: Any) -> Tensor:
    """Return points as a float64 tensor: near coincident points an angle has half the digits of its cosine."""
    if not isinstance(given, Tensor | np.ndarray):
        raise QuernelError(f"{name} must be a torch.Tensor or a numpy.ndarray; got {type(given).__name__}")
    if isinstance(given, np.ndarray) and given.dtype.kind not in "biuf":
        raise QuernelError(f"{name} must hold real numbers; got {given.dtype}")
    points = given if isinstance(given, Tensor) else torch.from_numpy(given.astype(np.float64))
    if points.ndim < 2 or points.shape[-1] == 0 or points.is_complex():
        raise QuernelError(f"{name} must hold real numbers in shape (*batch, n, d), d > 0; got {tuple(points.shape)}")
    check_finite(name, points)
    return points.double()
