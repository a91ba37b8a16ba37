"""The sparse deep kernel machine as one torch module, and what its outputs are judged by.

Order: input Gram, kernel, then (Gram layer, scale, kernel) for each layer, then outputs. The values at the inducing
points have q(u_c) = N(L m_c, L S S^T L^T) with L L^T = K_ii of the top kernel and one S for all outputs c:

    mean = K_ti L^-T m_c      var = K_t - diag(K_ti K_ii^-1 K_it) + |S^T L^-1 K_it|^2

Given everything below, the best (m, S) for Gaussian noise is known: ``OutputSums`` finds it in one pass over the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel.kernels.deep_kernel_layers import (
    JITTER,
    Divergence,
    GramLayer,
    GramNoise,
    GramScale,
    Kernel,
    StructGram,
    apply_kernel,
    free_numbers,
    halves,
    input_gram,
    lower_factor,
)
from quernel.kernels.linalg import jittered_cholesky

# Noise that is learned stays above this, in units of standardised targets.
_LEAST_NOISE = 1e-6
_LEAST_VARIANCE = 1e-12
# Rows whose class probabilities are averaged together: 512 draws of 10 outputs for them are 10 MB.
_PROBABILITY_ROWS = 256
_PROBABILITY_DRAWS = 512


class Pass(NamedTuple):
    """What a batch gives on its way up."""

    mean: Tensor  # (B, q), of the outputs
    variance: Tensor  # (B,), the same for all outputs
    penalty: Tensor  # (), nu KL summed over the layers
    output_kl: Tensor  # (), summed over the outputs
    half: Tensor  # (P, B), L^-1 K_it of the top kernel
    rest: Tensor  # (B,), variance that the inducing points leave
    grams: tuple[StructGram, ...]  # one a layer, before its scale


class DeepKernelNetwork(nn.Module):
    """A deep kernel machine over P inducing inputs.

    Parameters
    ----------
    inducing : Tensor, shape (P, c)
        Initial inducing inputs; its dtype is the network's.
    n_outputs : int
    nus : sequence of float
        Weight of each layer's divergence; infinity leaves the Gram layer out, so that the kernel stays as it is.
    """

    def __init__(
        self,
        inducing: Tensor,
        n_outputs: int,
        nus: Sequence[float],
        *,
        kernel: Kernel = "arccos",
        kl: Divergence = "exact",
        gram_noise: GramNoise | None = None,
        jitter: float = JITTER,
        tempered: bool = False,
    ) -> None:
        super().__init__()
        size, dtype = len(inducing), inducing.dtype
        self.kernel: Kernel = kernel
        self.jitter = jitter
        self.tempered = tempered
        self.inducing = nn.Parameter(inducing.clone())
        self.layers = nn.ModuleList(
            nn.Identity() if math.isinf(nu) else GramLayer(size, nu=nu, kl=kl, noise=gram_noise, dtype=dtype)
            for nu in nus
        )
        self.norms = nn.ModuleList(GramScale(dtype) for _ in nus)
        # Of the Gram matrix that enters each kernel, and of the top kernel.
        self.log_scales = nn.Parameter(torch.zeros(len(nus) + 2, dtype=dtype))
        self.weights = nn.Parameter(torch.zeros(size, n_outputs, dtype=dtype))
        self.root = nn.Parameter(torch.zeros(size, size, dtype=dtype))

    @property
    def gram_layers(self) -> list[GramLayer]:
        """The layers that learn."""
        return [layer for layer in self.layers if isinstance(layer, GramLayer)]

    @property
    def gram_scales(self) -> list[GramScale]:
        """The scale layers."""
        return [norm for norm in self.norms if isinstance(norm, GramScale)]

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Pass:
        """Return the outputs' distribution for rows x, shape (B, c), and the penalties."""
        penalty = self.inducing.new_zeros(())
        grams: list[StructGram] = []
        scales = self.log_scales.exp()
        k = self._kernel_of(scaled(input_gram(x, self.inducing), scales[0]))
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True), start=1):
            gram = k
            if isinstance(layer, GramLayer):
                gram, cost = layer(k, generator)
                penalty = penalty + cost
            grams.append(gram)
            k = self._kernel_of(norm(gram, scales[number]))
        k = scaled(k, scales[-1])
        half, rest = halves(k, jittered_cholesky(k.ii))
        root = lower_factor(self.root)
        variance = rest + (root.T @ half).square().sum(0)
        return Pass(half.T @ self.weights, variance, penalty, self._output_kl(root), half, rest, tuple(grams))

    @torch.no_grad()
    def grams(self) -> list[Tensor]:
        """Return G_ii of every layer."""
        return [gram.ii for gram in self(self.inducing[:0]).grams]

    def _kernel_of(self, gram: StructGram) -> StructGram:
        return apply_kernel(gram, self.kernel, self.jitter)

    def _output_kl(self, root: Tensor) -> Tensor:
        outputs = self.weights.shape[1]
        shared = root.square().sum() - 2 * self.root.diagonal().sum() - len(root)
        kl = 0.5 * (self.weights.square().sum() + outputs * shared)
        return kl / outputs if self.tempered else kl


def scaled(gram: StructGram, scale: Tensor) -> StructGram:
    """Return a multiple of a Gram matrix."""
    return StructGram(gram.ii * scale, gram.ti * scale, gram.t * scale)


class GaussianLikelihood(nn.Module):
    """Targets are outputs plus noise, one variance an output.

    Parameters
    ----------
    noise : Tensor, shape (q,)
        Variances.
    learned : bool
    """

    def __init__(self, noise: Tensor, learned: bool) -> None:
        super().__init__()
        self.least = _LEAST_NOISE if learned else 0.0
        self.log_noise = nn.Parameter((noise - self.least).log(), requires_grad=learned)

    @property
    def noise(self) -> Tensor:
        """The variances, shape (q,)."""
        return self.log_noise.exp() + self.least

    @torch.no_grad()
    def set_noise(self, noise: Tensor) -> None:
        """Set the variances, shape (q,)."""
        self.log_noise.copy_((noise - self.least).clamp_min(self.least).log())

    def forward(self, found: Pass, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the expected log-density of targets y, shape (B, q), for every row."""
        noise = self.noise
        error = (y - found.mean).square() + found.variance[:, None]
        return -0.5 * ((2 * math.pi * noise).log() + error / noise).sum(1)


class CategoricalLikelihood(nn.Module):
    """Classes have the softmax of the outputs; expectations are means over pairs of draws f and -f around the mean."""

    def __init__(self, n_samples: int) -> None:
        super().__init__()
        self.pairs = -(-n_samples // 2)

    def forward(self, found: Pass, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the expected log-probability of class numbers y, shape (B,), for every row."""
        drawn = torch.randn(self.pairs, *found.mean.shape, dtype=found.mean.dtype, generator=generator)
        f = _around(found.mean, found.variance, drawn)
        chosen = f.gather(2, y.expand(len(f), -1)[..., None])[..., 0]
        result: Tensor = (chosen - f.logsumexp(2)).mean(0)
        return result


def class_probabilities(mean: Tensor, variance: Tensor) -> Tensor:
    """Return the mean softmax over 512 draws of the outputs, shape (B, q); the same draws for every row and call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_PROBABILITY_DRAWS // 2, 1, mean.shape[1], dtype=mean.dtype, generator=generator)
    parts = zip(mean.split(_PROBABILITY_ROWS), variance.split(_PROBABILITY_ROWS), strict=True)
    return torch.cat([F.softmax(_around(m, v, drawn), 2).mean(0) for m, v in parts])


def _around(mean: Tensor, variance: Tensor, drawn: Tensor) -> Tensor:
    """Return draws (2 S, B, q) of the outputs from standard normal ones (S, B or 1, q) and their negatives."""
    # The root has an infinite slope at 0.
    spread = variance.clamp_min(_LEAST_VARIANCE).sqrt()[:, None] * drawn
    return torch.cat((mean + spread, mean - spread))


class OutputSums:
    """Sums over rows that decide the best q(u), and the best noise for it, under Gaussian noise."""

    def __init__(self, network: DeepKernelNetwork) -> None:
        self.network = network
        self.products = torch.zeros_like(network.root.data)
        self.targets = torch.zeros_like(network.weights.data)
        self.squares = torch.zeros_like(network.weights.data[0])
        self.rest, self.count = 0.0, 0

    def update(self, found: Pass, y: Tensor) -> None:
        """Take in what rows gave, and their targets, shape (B, q)."""
        self.products += found.half @ found.half.T
        self.targets += found.half @ y
        self.squares += y.square().sum(0)
        self.rest, self.count = self.rest + float(found.rest.sum()), self.count + len(y)

    @torch.no_grad()
    def solve(self, noise: Tensor) -> Tensor:
        """Put the best weights and root for noise variances (q,) into the network; return the best noise for these."""
        eye = torch.eye(len(self.products), dtype=self.products.dtype)
        for output, variance in enumerate(noise):
            chol = jittered_cholesky(eye + self.products / variance)
            column = self.targets[:, output : output + 1] / variance
            self.network.weights[:, output : output + 1] = torch.cholesky_solve(column, chol)
        # One covariance for all outputs: their mean precision.
        chol = jittered_cholesky(eye + self.products * (1 / noise).mean())
        root = jittered_cholesky(torch.cholesky_inverse(chol))
        self.network.root.copy_(free_numbers(root))
        weights = self.network.weights
        errors = self.squares - 2 * (weights * self.targets).sum(0) + (weights * (self.products @ weights)).sum(0)
        return (errors + self.rest + (root * (self.products @ root)).sum()) / self.count
