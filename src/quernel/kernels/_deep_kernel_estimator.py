"""What deep kernel regressors and classifiers share: parameters, training, and the network that comes out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from quernel._errors import QuernelError
from quernel._estimators import SavedEstimator
from quernel._progress import Progress
from quernel._random import Seed, generator
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.kernels._deep_kernel_network import DeepKernelNetwork
from quernel.kernels._deep_kernel_training import Likelihood, Plan, Trainer, chosen_inducing, judged, passes
from quernel.kernels._random_features import FLOATS, Floats
from quernel.kernels.deep_kernel_layers import DIVERGENCES, GRAM_NOISES, Divergence, GramNoise

Weights = float | Sequence[float] | NDArray[Any]

_KERNELS = ("arccos", "rbf")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
_MOST_INDUCING = 256


class DeepKernel(SavedEstimator, BaseEstimator):
    """Parameters, training and outputs: what both kinds of target share."""

    _state: ClassVar[Mapping[str, str]] = {
        "center_": "d",
        "scale_": "float",
        "inducing_": "m c",
        "factors_": "l m m",
        "running_": "s",
        "log_scales_": "r",
        "weights_": "m q",
        "root_": "m m",
        "elbo_": "float",
        "history_": "e",
        "alignment_": "a",
    }

    def __init__(
        self,
        n_layers: int = 2,
        *,
        n_inducing: int | None = None,
        kernel: Literal["arccos", "rbf"] = "arccos",
        nu: Weights = 1.0,
        learn_inducing: bool = True,
        learn_scales: bool = True,
        fit_intercept: bool = True,
        max_epochs: int = 200,
        batch_size: int = 512,
        lr: float = 1e-2,
        kl: Divergence = "exact",
        gram_noise: GramNoise | None = None,
        jitter: float = 1e-4,
        random_state: Seed = None,
        dtype: Literal["float64", "float32"] = "float64",
    ) -> None:
        self.n_layers = n_layers
        self.n_inducing = n_inducing
        self.kernel = kernel
        self.nu = nu
        self.learn_inducing = learn_inducing
        self.learn_scales = learn_scales
        self.fit_intercept = fit_intercept
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.kl = kl
        self.gram_noise = gram_noise
        self.jitter = jitter
        self.random_state = random_state
        self.dtype = dtype

    @property
    def grams_(self) -> Floats:
        """G_ii of every layer, shape (L, m, m)."""
        check_is_fitted(self)
        found = self._network().grams()
        return cast(Floats, torch.stack(found).numpy() if found else np.zeros((0, *self.root_.shape)))

    def check_params(self) -> None:
        """Raise a ``QuernelError`` that names a parameter which is no good."""
        check_int("n_layers", self.n_layers, low=0)
        if self.n_inducing is not None:
            check_int("n_inducing", self.n_inducing, low=1)
        check_choice("kernel", self.kernel, _KERNELS)
        layer_weights(self.nu, self.n_layers)
        for name in ("learn_inducing", "learn_scales", "fit_intercept"):
            check_bool(name, getattr(self, name))
        check_int("max_epochs", self.max_epochs, low=0)
        check_int("batch_size", self.batch_size, low=1)
        check_float("lr", self.lr, low=0.0, open_low=True)
        check_choice("kl", self.kl, DIVERGENCES)
        check_choice("gram_noise", self.gram_noise, GRAM_NOISES)
        check_float("jitter", self.jitter, low=0.0)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        generator(self.random_state, "random_state")

    def check_state(self) -> None:
        """Raise unless the fitted attributes fit each other and the parameters."""
        super().check_state()
        learned = sum(not math.isinf(nu) for nu in layer_weights(self.nu, self.n_layers))
        held = (len(self.factors_), len(self.running_), len(self.log_scales_), self.inducing_.shape[1])
        wanted = (learned, self.n_layers, self.n_layers + 2, len(self.center_) + self.fit_intercept)
        if held != wanted or not self.scale_ > 0:
            raise QuernelError(f"factors_, running_, log_scales_ and inducing_ must have sizes {wanted}; got {held}")

    def _train(
        self, x: Floats, y: Tensor, indicators: Tensor, likelihood: Likelihood, progress: Progress | None
    ) -> None:
        draw = generator(self.random_state, "random_state")
        most = max(1, min(_MOST_INDUCING, len(x) // 4))
        number = most if self.n_inducing is None else self.n_inducing
        if number > len(x):
            raise QuernelError(f"n_inducing must be at most the {len(x)} rows of X; got {number}")
        wide = x.astype(np.float64)
        self.center_ = wide.mean(0)
        # One scale for all columns: their lengths relative to each other are the kernel's business.
        self.scale_ = float(np.sqrt(np.square(wide - self.center_).mean())) or 1.0
        rows = self._scaled(x)
        network = self._built(chosen_inducing(rows, number, draw), indicators.shape[1])
        network.inducing.requires_grad_(self.learn_inducing)
        network.log_scales.requires_grad_(self.learn_scales)
        plan = Plan(self.max_epochs, self.batch_size, self.lr)
        trainer = Trainer(network, likelihood, rows, y, plan, draw)
        history = trainer.run(progress)
        trainer.solve_outputs()
        bound, alignment = judged(network, likelihood, rows, y, indicators)
        self.elbo_, self.history_, self.alignment_ = bound, np.array(history), np.array(alignment)
        self._take_network(network)

    def _built(self, inducing: Tensor, n_outputs: int) -> DeepKernelNetwork:
        return DeepKernelNetwork(
            inducing,
            n_outputs,
            layer_weights(self.nu, self.n_layers),
            kernel=self.kernel,
            kl=self.kl,
            gram_noise=self.gram_noise,
            jitter=self.jitter,
            tempered=getattr(self, "tempered", False),
        )

    def _take_network(self, network: DeepKernelNetwork) -> None:
        size = len(network.inducing)
        with torch.no_grad():
            factors = [layer.free.detach() for layer in network.gram_layers]
            self.factors_ = torch.stack(factors).numpy() if factors else np.zeros((0, size, size))
            self.running_ = np.array([float(norm.running) for norm in network.gram_scales])
            for name in ("inducing", "log_scales", "weights", "root"):
                setattr(self, f"{name}_", getattr(network, name).detach().numpy())

    def _network(self) -> DeepKernelNetwork:
        """Return the fitted network, ready for rows."""
        network = self._built(torch.from_numpy(self.inducing_), self.weights_.shape[1]).eval().requires_grad_(False)
        for layer, free in zip(network.gram_layers, self.factors_, strict=True):
            layer.free.copy_(torch.from_numpy(free))
        for norm, running in zip(network.gram_scales, self.running_, strict=True):
            norm.running.fill_(float(running))
        for name in ("log_scales", "weights", "root"):
            getattr(network, name).copy_(torch.from_numpy(getattr(self, f"{name}_")))
        return network

    def _scaled(self, x: Floats) -> Tensor:
        rows = torch.from_numpy((x - self.center_) / self.scale_)
        if self.fit_intercept:
            rows = torch.cat((rows, rows.new_ones(len(rows), 1)), 1)
        return rows.to(DTYPES[self.dtype])

    def _outputs(self, x: Floats) -> tuple[Tensor, Tensor]:
        """Return mean (n, q) and variance (n,) of the outputs."""
        with torch.no_grad():
            found = [(p.mean, p.variance) for _, p in passes(self._network(), self._scaled(x))]
        mean, variance = zip(*found, strict=True)
        return torch.cat(mean), torch.cat(variance)

    def _rows(self, X: ArrayLike) -> Floats:
        check_is_fitted(self)
        return cast(Floats, validate_data(self, X, dtype=FLOATS, reset=False))


def layer_weights(nu: Weights, n_layers: int, name: str = "nu") -> tuple[float, ...]:
    """Return one weight a layer, checked; infinity is allowed."""
    given = tuple(nu) if isinstance(nu, list | tuple | np.ndarray) else (nu,) * n_layers
    if len(given) != n_layers:
        raise QuernelError(f"{name} must be a number or {n_layers} of them, one a layer; got {len(given)}")
    for value in given if given else (nu,):
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or not float(cast(float, value)) > 0:
            raise QuernelError(f"{name} must be > 0 (0 leaves the Gram matrices without regularisation); got {value!r}")
    return tuple(float(cast(float, value)) for value in given)
