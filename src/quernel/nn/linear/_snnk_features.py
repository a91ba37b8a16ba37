"""The fixed half of an SNNK layer: random features of its input, as modules that hold their random numbers.

``ReLUFeatures``: m^-1/2 max(G (x - mean), c). ``UniversalFeatures``: real and imaginary parts of Phi in
``quernel.kernels.features.universal``. G is dense (Gaussian or block-orthogonal rows) or Hadamard-structured; it is
a buffer, so it is saved, follows ``.to()`` and takes no gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels.features.hadamard import hadamard_directions, hadamard_projection, padded_size
from quernel.kernels.features.orthogonal import PROJECTIONS, gaussian_directions, orthogonal_directions
from quernel.kernels.features.universal import (
    best_damping,
    check_damping,
    check_exponents,
    log_scales,
    slopes,
    spectrum_of,
    universal_features,
    universal_weight_features,
)

Floats = NDArray[np.float64]


class SNNKFeatures(nn.Module):
    """Base of both kinds: directions, and projecting on them.

    Parameters
    ----------
    in_features : int
        Size d of the input.
    n_features : int
        Size m of the output.
    projection : {"orthogonal", "gaussian", "hadamard"}
    dtype : torch.dtype
        Of the buffers.
    """

    kind: str
    signs: Tensor
    lengths: Tensor
    directions: Tensor

    def __init__(self, in_features: int, n_features: int, projection: str, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        self.in_features, self.n_features, self.rows = in_features, n_features, rows
        self.projection = check_choice("projection", projection, PROJECTIONS)
        self.structured = projection == "hadamard"
        if self.structured:
            size = padded_size(in_features)
            self.register_buffer("signs", torch.zeros(-(-rows // size), 3, size, dtype=torch.int8))
            self.register_buffer("lengths", torch.zeros(rows, dtype=dtype))
        else:
            self.register_buffer("directions", torch.zeros(rows, in_features, dtype=dtype))

    def project(self, x: Tensor) -> Tensor:  # (..., d) -> (..., rows)
        """Return the scaled projections in the dtype of ``x``."""
        if x.shape[-1] != self.in_features:
            raise QuernelError(f"x must have {self.in_features} features; got shape {tuple(x.shape)}")
        if self.structured:
            return hadamard_projection(x, self.signs, self.lengths)
        return F.linear(x, self.directions.to(x.dtype))

    def draw(self, generator: np.random.Generator) -> None:
        """Fill the buffers."""
        raise TypeError(f"{type(self).__name__} must define draw()")

    def of_weights(self, weight: Tensor, bias: Tensor | None) -> Tensor:  # (l, d), (l,) -> (l, m)
        """Return the weights' side of the dot product."""
        raise TypeError(f"{type(self).__name__} must define of_weights()")

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, n_features={self.n_features}, projection={self.projection}"

    def _directions(self, generator: np.random.Generator) -> tuple[Floats | None, Floats, int]:
        """Draw directions; return them (None if structured), their lengths, and the dimension they live in."""
        if self.structured:
            held = hadamard_directions(self.rows, self.in_features, generator)
            self.signs.copy_(torch.from_numpy(held.signs))
            return None, held.lengths, padded_size(self.in_features)
        maker = orthogonal_directions if self.projection == "orthogonal" else gaussian_directions
        rows = maker(self.rows, self.in_features, generator)
        return rows, np.sqrt(np.square(rows).sum(1)), self.in_features

    def _store(self, rows: Floats | None, lengths: Floats, scale: Floats | float) -> None:
        if rows is None:
            self.lengths.copy_(torch.from_numpy(lengths * scale))
        else:
            self.directions.copy_(torch.from_numpy(rows * np.reshape(scale, (-1, 1))))


class ReLUFeatures(SNNKFeatures):
    """m^-1/2 max(G (x - mean), threshold), shape (..., m)."""

    kind = "relu"
    offset: Tensor

    def __init__(
        self, in_features: int, n_features: int, projection: str, dtype: torch.dtype, threshold: float = 0.0
    ) -> None:
        super().__init__(in_features, n_features, projection, dtype, n_features)
        self.threshold = check_float("threshold", threshold)
        # -G mean: shifting the input costs nothing at run time.
        self.register_buffer("offset", torch.zeros(n_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., m)
        """Return the features in the dtype of ``x``."""
        return self._rectified(x, self.offset.to(x.dtype))

    def of_weights(self, weight: Tensor, bias: Tensor | None) -> Tensor:  # (l, d) -> (l, m)
        """Return the same map of the rows of a weight; the bias stays a bias."""
        return self._rectified(weight, None)

    @torch.no_grad()
    def set_center(self, mean: Tensor) -> None:
        """Take the features about ``mean``, shape (d,), from now on."""
        self.offset.copy_(-self.project(mean.to(self.offset.device, torch.promote_types(mean.dtype, torch.float32))))

    @torch.no_grad()
    def draw(self, generator: np.random.Generator) -> None:
        """Fill the buffers; the centre becomes the origin."""
        rows, lengths, _ = self._directions(generator)
        # max(G x, c) / sqrt(m) = max(G x / sqrt(m), c / sqrt(m)): the scale costs nothing at run time.
        self._store(rows, lengths, self.n_features**-0.5)
        self.offset.zero_()

    def _rectified(self, x: Tensor, offset: Tensor | None) -> Tensor:
        if self.structured or x.shape[-1] != self.in_features:
            y = self.project(x)
            y = y if offset is None else y + offset
        else:
            y = F.linear(x, self.directions.to(x.dtype), offset)
        return y.clamp_min(self.threshold * self.n_features**-0.5)


class UniversalFeatures(SNNKFeatures):
    """Real and imaginary parts of universal random features for one activation, shape (..., m), m even."""

    kind = "urf"
    frequencies: Tensor
    log_scale: Tensor

    def __init__(
        self, in_features: int, n_features: int, projection: str, dtype: torch.dtype, activation: str = "cos"
    ) -> None:
        if n_features % 2:
            raise QuernelError(f"kind='urf' needs an even n_features, for real and imaginary parts; got {n_features}")
        # float32 at least: they stand in exponents.
        wide = torch.promote_types(dtype, torch.float32)
        super().__init__(in_features, n_features, projection, wide, n_features // 2)
        spectrum_of(activation)
        self.activation = activation
        self.damping: float | None = None
        self.register_buffer("frequencies", torch.zeros(self.rows, dtype=wide))
        self.register_buffer("log_scale", torch.zeros(self.rows, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., m)
        """Return the features in the dtype of ``x``."""
        return universal_features(*self._terms(x, "x")).to(x.dtype)

    def of_weights(self, weight: Tensor, bias: Tensor | None) -> Tensor:  # (l, d), (l,) -> (l, m)
        """Return Psi, by which the features estimate the activation."""
        ratio = spectrum_of(self.activation).ratio(self.frequencies.double().cpu().numpy())
        terms = self._terms(weight, "weight")
        return universal_weight_features(*terms, ratio=ratio, bias=None if bias is None else bias.to(terms[0].dtype))

    @torch.no_grad()
    def draw(self, generator: np.random.Generator) -> None:
        """Fill the buffers; "auto" damping is best for inputs and weights of length 1."""
        xi = spectrum_of(self.activation).sample(generator, self.rows)
        rows, lengths, dim = self._directions(generator)
        m = best_damping(2 * np.pi * np.abs(xi), dim) if self.damping is None else self.damping
        self.frequencies.copy_(torch.from_numpy(xi))
        self.log_scale.copy_(torch.from_numpy(log_scales(lengths**2, dim, m)))
        self._store(rows, lengths, slopes(xi, m))

    def _terms(self, x: Tensor, what: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        if not torch.compiler.is_compiling():  # a graph cannot branch on values
            check_exponents(squares, self.frequencies, what)
        return self.project(wide), squares, self.frequencies.to(wide.dtype), self.log_scale.to(wide.dtype)


def make_features(
    kind: str,
    in_features: int,
    n_features: int,
    projection: str,
    dtype: torch.dtype,
    threshold: float = 0.0,
    activation: str | None = None,
    damping: Any = "auto",
) -> ReLUFeatures | UniversalFeatures:
    """Return an empty feature map of the kind, after checking every argument."""
    check_int("in_features", in_features, low=1)
    check_int("n_features", n_features, low=1)
    check_float("threshold", threshold)
    fixed = check_damping(damping)
    if check_choice("kind", kind, ("relu", "urf")) == "relu":
        return ReLUFeatures(in_features, n_features, projection, dtype, threshold)
    if threshold:
        raise QuernelError(f"threshold is for kind='relu'; got threshold={threshold} with kind='urf'")
    features = UniversalFeatures(in_features, n_features, projection, dtype, activation or "cos")
    features.damping = fixed
    return features
