"""The layers of a deep kernel machine: Gram matrices of inducing points that carry those of a batch along (2108.13097).

No features appear after the input: a layer knows G_ii of the P inducing points, G_ti of the batch with them, and the
diagonal g_t of the batch. From the kernel K of the layer below, with L L^T = K_ii and A = K_ti K_ii^-1,

    G_ii free, positive definite      G_ti = A G_ii      g_t = K_t - diag(A K_it) + diag(A G_ii A^T)
    penalty  nu KL(N(0, G_ii) || N(0, K_ii)),  KL = (tr(K^-1 G) - log det(K^-1 G) - P) / 2

Cost: P^3 + B P^2 a layer; memory P^2 + B P.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_float, check_int
from quernel.kernels.grams import arc_cosine_gram, squared_exponential_gram
from quernel.kernels.linalg import jittered_cholesky

Kernel = Literal["arccos", "rbf", "linear"]
Divergence = Literal["exact", "taylor", "taylor_frobenius"]
GramNoise = Literal["wishart"]

KERNELS = ("arccos", "rbf", "linear")
DIVERGENCES = ("exact", "taylor", "taylor_frobenius")
GRAM_NOISES = (None, "wishart")
JITTER = 1e-4
# Of stochastic kernel regularisation: columns of the Wishart draw as a share of P, and what is added to its diagonal.
_WISHART_SHARE, _WISHART_SHIFT = 0.25, 0.1
# How much a batch moves the mean that a trained scale layer divides by.
_MOMENTUM = 0.1


class StructGram(NamedTuple):
    """A Gram matrix of inducing points and a batch, without what only batch points have with each other."""

    ii: Tensor  # (P, P)
    ti: Tensor  # (B, P)
    t: Tensor  # (B,), squared lengths


def input_gram(x: Tensor, inducing: Tensor) -> StructGram:
    """Return inner products of rows (B, d) and inducing inputs (P, d), divided by d."""
    d = x.shape[1]
    return StructGram(inducing @ inducing.T / d, x @ inducing.T / d, x.square().sum(1) / d)


def apply_kernel(gram: StructGram, kernel: Kernel, jitter: float = JITTER) -> StructGram:
    """Return the kernel of a Gram matrix; its diagonal a becomes (1 + jitter) a + jitter, in the batch as well.

    The same inflation on both keeps K_t - diag(K_ti K_ii^-1 K_it) from going below 0: it is a kernel plus white noise.
    """
    own = gram.ii.diagonal()
    if kernel == "linear":
        ii, ti, t = gram.ii, gram.ti, gram.t
    elif kernel == "rbf":
        ii, ti = squared_exponential_gram(gram.ii, own, own), squared_exponential_gram(gram.ti, gram.t, own)
        own, t = torch.ones_like(own), torch.ones_like(gram.t)
    else:
        ii, ti, t = arc_cosine_gram(gram.ii, own, own), arc_cosine_gram(gram.ti, gram.t, own), gram.t
    # The diagonal is known; computed, it would be off by a rounding and its gradient by more.
    ii = ii + torch.diag_embed(own * (1 + jitter) + jitter - ii.diagonal())
    return StructGram(ii, ti, t * (1 + jitter) + jitter)


def gram_kl(gram: Tensor, kernel: Tensor, form: Divergence = "exact") -> Tensor:
    """Return KL(N(0, gram) || N(0, kernel)), or an expansion of it around gram = kernel.

    Parameters
    ----------
    gram, kernel : Tensor, shape (P, P)
        Symmetric positive definite, float32 or float64.
    form : {"exact", "taylor", "taylor_frobenius"}, default="exact"
        "taylor" is ``|C^-1 K C^-T - I|^2 / 4`` with ``C C^T = gram``, which agrees to second order;
        "taylor_frobenius" is ``|gram^-1 K - I|^2 / 4``, never smaller, which agrees only where the two commute.

    Returns
    -------
    kl : Tensor, shape ()
        >= 0, and 0 where the two are equal; with gradients.

    Raises
    ------
    QuernelError
        If the shapes differ, a matrix is indefinite, or ``form`` is another.

    References
    ----------
    Yang et al., "A Theory of Representation Learning Gives a Deep Generalisation of Kernel Methods", arXiv 2108.13097.

    Examples
    --------
    >>> round(float(gram_kl(2 * torch.eye(3), torch.eye(3))), 4)
    0.4603
    """
    check_choice("form", form, DIVERGENCES)
    if gram.ndim != 2 or gram.shape != kernel.shape:
        raise QuernelError(
            f"gram and kernel must be square of one size; got {tuple(gram.shape)}, {tuple(kernel.shape)}"
        )
    chol = jittered_cholesky(kernel)
    return _divergence(_solve(chol, jittered_cholesky(gram)), chol, form)


def propagate(gram: StructGram, layer: Tensor, kernel: Kernel = "arccos", jitter: float = JITTER) -> StructGram:
    """Return the Gram matrix above ``gram``, given that of the inducing points there.

    Parameters
    ----------
    gram : StructGram
        Of the layer below.
    layer : Tensor, shape (P, P)
        G_ii of the layer above, positive definite.
    kernel : {"arccos", "rbf", "linear"}, default="arccos"
        Applied to ``gram`` first.
    jitter : float, default=1e-4
        Of the kernel, see ``apply_kernel``.

    Returns
    -------
    StructGram
        With ``ii = layer``.

    Examples
    --------
    >>> below = StructGram(torch.eye(2), torch.ones(1, 2), torch.ones(1) * 2)
    >>> above = propagate(below, 3 * torch.eye(2), "linear", jitter=0.0)
    >>> above.ti.tolist(), above.t.tolist()
    ([[3.0, 3.0]], [6.0])
    """
    check_choice("kernel", kernel, KERNELS)
    k = apply_kernel(gram, kernel, check_float("jitter", jitter, low=0.0))
    if layer.shape != k.ii.shape:
        raise QuernelError(f"layer must have shape {tuple(k.ii.shape)} like ii; got {tuple(layer.shape)}")
    chol, root = jittered_cholesky(k.ii), jittered_cholesky(layer)
    return carried(k, chol, root, _solve(chol, root))._replace(ii=layer)


def carried(kernel: StructGram, chol: Tensor, root: Tensor, white: Tensor, shift: float = 0.0) -> StructGram:
    """Return the layer whose G_ii is ``root root^T + shift I``.

    Parameters
    ----------
    kernel : StructGram
    chol : Tensor, shape (P, P)
        L with L L^T = K_ii.
    root, white : Tensor, shapes (P, r)
        A root of G_ii, and L^-1 of it.
    shift : float, default=0.0
    """
    half, rest = halves(kernel, chol)
    reduced = half.T @ white  # (B, r) = A root
    ii, ti, t = root @ root.T, reduced @ root.T, rest + reduced.square().sum(1)
    if shift:
        a = torch.linalg.solve_triangular(chol.T, half, upper=True).T
        ii = ii + shift * torch.eye(len(ii), dtype=ii.dtype, device=ii.device)
        ti, t = ti + shift * a, t + shift * a.square().sum(1)
    return StructGram(ii, ti, t)


def halves(kernel: StructGram, chol: Tensor) -> tuple[Tensor, Tensor]:
    """Return L^-1 K_it, shape (P, B), and what it leaves of the variance of the batch, shape (B,)."""
    half = _solve(chol, kernel.ti.T)
    # Not below 0 in exact arithmetic; without jitter rounding goes there.
    return half, (kernel.t - half.square().sum(0)).clamp_min(0.0)


class GramLayer(nn.Module):
    """A layer that owns the Gram matrix of its inducing points; it starts at the kernel below.

    ``G_ii = L V V^T L^T``, ``L L^T = K_ii``, V lower triangular with diagonal ``exp(.)``, its other entries in units
    of 1 / sqrt(P): steps of one size suit every P, and a kernel that moves takes its Gram matrix along.

    Parameters
    ----------
    n_inducing : int
        P.
    nu : float, default=1.0
        Weight of the divergence, > 0.
    kl : {"exact", "taylor", "taylor_frobenius"}, default="exact"
        See ``gram_kl``.
    noise : {"wishart", None}, default=None
        Stochastic kernel regularisation: in training a Wishart draw of ceil(P / 4) degrees of freedom around G_ii in
        place of G_ii; 0.1 I is added in training and after. The divergence is that of G_ii itself.
    dtype : torch.dtype, default=torch.float64

    Notes
    -----
    Differs from the paper's follow-ups: they learn the factor of G_ii itself and not V. The objective is the same; V
    makes divergence and gradient independent of a learned kernel below.

    References
    ----------
    Yang et al., arXiv 2108.13097; the noise: Milsom et al., "Stochastic Kernel Regularisation Improves Generalisation
    in Deep Kernel Machines", 2024.

    Examples
    --------
    >>> layer = GramLayer(2)
    >>> kernel = StructGram(torch.eye(2).double(), torch.ones(1, 2).double(), torch.full((1,), 3.0).double())
    >>> gram, penalty = layer(kernel)
    >>> torch.allclose(gram.ti, kernel.ti), penalty.item()
    (True, 0.0)
    """

    def __init__(
        self,
        n_inducing: int,
        *,
        nu: float = 1.0,
        kl: Divergence = "exact",
        noise: GramNoise | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.n_inducing = check_int("n_inducing", n_inducing, low=1)
        self.nu = check_float("nu", nu, low=0.0, open_low=True)
        self.kl = check_choice("kl", kl, DIVERGENCES)
        self.noise = check_choice("noise", noise, GRAM_NOISES)
        self.free = nn.Parameter(torch.zeros(n_inducing, n_inducing, dtype=dtype))

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"n_inducing={self.n_inducing}, nu={self.nu:g}, kl={self.kl!r}, noise={self.noise!r}"

    def forward(self, kernel: StructGram, generator: torch.Generator | None = None) -> tuple[StructGram, Tensor]:
        """Return the layer's Gram matrix over that batch, and nu times its divergence from the kernel."""
        chol = jittered_cholesky(kernel.ii)
        white = lower_factor(self.free)
        penalty = self.nu * _divergence(white, chol, self.kl)
        if self.noise is None:
            return carried(kernel, chol, chol @ white, white), penalty
        if self.training:
            columns = math.ceil(_WISHART_SHARE * self.n_inducing)
            drawn = torch.randn(self.n_inducing, columns, dtype=white.dtype, device=white.device, generator=generator)
            white = white @ drawn / columns**0.5
        return carried(kernel, chol, chol @ white, white, _WISHART_SHIFT), penalty


class GramScale(nn.Module):
    """Divide a Gram matrix by its mean squared lengths: those of the inducing points, and those of the batch.

    In training the batch's own mean counts, afterwards a running one, so that an answer depends on its row alone;
    before any batch it is the inducing points'.
    Without it the lengths drift over more than three layers.
    """

    running: Tensor

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        # 0 before the first batch: squared lengths are never that small, thanks to the jitter.
        self.register_buffer("running", torch.zeros((), dtype=dtype))

    def forward(self, gram: StructGram, scale: Tensor | float = 1.0) -> StructGram:
        """Return the Gram matrix with mean squared lengths ``scale``."""
        inner = gram.ii.diagonal().mean()
        outer = self.running if bool(self.running > 0) else inner
        if self.training:
            outer = gram.t.mean()
            with torch.no_grad():
                self.running.copy_(self.running.lerp(outer, _MOMENTUM if bool(self.running > 0) else 1.0))
        # One factor for each part: passes over (B, P) numbers cost as much as products.
        return StructGram(
            gram.ii * (scale / inner), gram.ti * (scale / (inner * outer).sqrt()), gram.t * (scale / outer)
        )


def lower_factor(free: Tensor) -> Tensor:
    """Return a lower triangular matrix with a positive diagonal from free numbers, shape (P, P); zeros give I."""
    return free.tril(-1) / len(free) ** 0.5 + torch.diag_embed(free.diagonal().exp())


def free_numbers(factor: Tensor) -> Tensor:
    """Return what ``lower_factor`` makes ``factor`` from."""
    return factor.tril(-1) * len(factor) ** 0.5 + torch.diag_embed(factor.diagonal().log())


def _divergence(white: Tensor, chol: Tensor, form: Any) -> Tensor:
    """Return KL(N(0, G) || N(0, L L^T)) or an expansion; white is L^-1 C with C C^T = G, all lower triangular."""
    if form == "exact":
        return 0.5 * (white.square().sum() - 2 * white.diagonal().log().sum() - len(white))
    eye = torch.eye(len(white), dtype=white.dtype, device=white.device)
    inverse = _solve(white, eye)  # C^-1 L
    if form == "taylor":
        return 0.25 * (inverse @ inverse.T - eye).square().sum()
    # G^-1 K = L^-T (V^-T V^-1) L^T
    product = torch.linalg.solve_triangular(chol.T, inverse.T @ inverse @ chol.T, upper=True)
    return 0.25 * (product - eye).square().sum()


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(lower, right, upper=False)
