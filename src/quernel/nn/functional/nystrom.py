"""``nystrom_apply``: a Gaussian kernel matrix of n tokens times values, through m landmarks (arXiv 2207.03341).

With P = k(q, l), A = k(l, l):  S ~ P A^+ P^T and  Y = P (A^+ (P^T V)), multiplied from right to left.
Cost O(n m d + m^3), memory O(n m).  ``newton_pinv`` is the inverse by Newton-Raphson, which needs products only:

    M = A + eps I,   X_0 = alpha M,   X_{t+1} = 2 X_t - X_t M X_t,   0 < alpha < 2 / ||M||_2^2

Its gradient is that of an inverse, -X^T G X^T, and not that of the loop.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_choice, check_finite, check_float, check_int, check_type
from quernel.kernels.gaussian import gaussian_kernel
from quernel.kernels.linalg import jittered_cholesky

Inverse = Literal["cholesky", "newton", "pinv"]
Norm = Literal["bottleneck", "token"] | None
INVERSES: tuple[Inverse, ...] = ("cholesky", "newton", "pinv")
NORMS: tuple[Norm, ...] = (None, "bottleneck", "token")
# ||A||_1 >= 1 for a kernel matrix; up to this eps the bound from A alone is safe, and is what published models use.
SAFE_EPS = 0.05
SHARE = 0.9
# ||I - M X||_F beyond which an inverse is said not to have converged: no direction is then more than 1 % off.
CONVERGED = 1e-2


def newton_pinv(
    a: Tensor, iters: int = 20, eps: float = 1e-2, alpha: float | None = None, *, tol: float | None = None
) -> Tensor:
    """Return the inverse of A + eps I, or for eps = 0 the pseudo-inverse of A, by Newton-Raphson.

    Parameters
    ----------
    a : Tensor, shape (*batch, m, m)
        Symmetric, positive semi-definite, with nonnegative entries.
    iters : int, default=20
        Enough for a condition of about 100 with eps = 0.01; each doubling of the condition costs two more.
    eps : float, default=0.01
        >= 0.
    alpha : float, optional
        Of the start, times M; by default 1.8 over the squared largest row sum of each matrix.
    tol : float, optional
        Stop once ||I - M X||_F is below this for all matrices.

    Returns
    -------
    x : Tensor, shape (*batch, m, m)

    Warns
    -----
    UserWarning
        If the loop diverged; the inverse then comes from a Cholesky factor.  If eps > 0 and the steps were too few for
        the condition: ||I - M X||_F is above 0.01 (and above ``tol``).

    Examples
    --------
    >>> a = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> newton_pinv(a, eps=0.0).round(decimals=4)
    tensor([[ 1.3333, -0.6667],
            [-0.6667,  1.3333]])
    """
    check_int("iters", iters, low=1)
    check_float("eps", eps, low=0.0)
    if alpha is not None:
        check_float("alpha", alpha, low=0.0, open_low=True)
    if tol is not None:
        check_float("tol", tol, low=0.0, open_low=True)
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise QuernelError(f"a must be square matrices (*batch, m, m); got {tuple(a.shape)}")
    found: Tensor = _newton(a, iters, eps, alpha or 0.0, tol or 0.0)
    return found


@torch.library.custom_op("quernel::newton_inverse", mutates_args=())
def _newton(a: Tensor, iters: int, eps: float, alpha: float, tol: float) -> Tensor:
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    m = a + eps * eye
    if alpha > 0:
        start = torch.full((*a.shape[:-2], 1, 1), alpha, dtype=a.dtype, device=a.device)
    else:
        size = a.abs().sum(-1).amax(-1) if a.shape[-1] else a.new_ones(a.shape[:-2])
        # A matrix that is the identity has ||A||_1 = 1: beyond the safe eps the bound must hold for A + eps I.
        size = size if eps <= SAFE_EPS else size + eps
        start = (2 * SHARE / size.square())[..., None, None]
    x = start * m
    for _ in range(iters):
        mx = m @ x
        if tol > 0 and bool((torch.linalg.matrix_norm(eye - mx) < tol).all()):
            break
        x = 2 * x - x @ mx
    if not bool(x.isfinite().all()):
        check_finite("a", a)
        warnings.warn(
            f"Newton's iteration diverged after {iters} steps: (a) alpha={alpha or 'by default'} is too large, (b) a "
            "is not positive semi-definite. A Cholesky factor is used instead",
            UserWarning,
            stacklevel=2,
        )
        return torch.cholesky_inverse(jittered_cholesky(m))
    # Of a pseudo-inverse, eps = 0, the product is a projection and not I.
    bound = max(tol, CONVERGED)
    if eps > 0 and bool((torch.linalg.matrix_norm(eye - m @ x) > bound).any()):
        # No number that changes from step to step: Python shows the same words once.
        warnings.warn(
            f"Newton's iteration has not converged: ||I - M X|| is above {bound:g} after {iters} steps. Landmarks are "
            f"close to each other: raise iters or eps={eps:g}, or use a Cholesky factor (inverse='cholesky')",
            UserWarning,
            stacklevel=2,
        )
    return x


@_newton.register_fake
def _(a: Tensor, iters: int, eps: float, alpha: float, tol: float) -> Tensor:
    return torch.empty_like(a)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return -x.mT @ grad @ x.mT, None, None, None, None


_newton.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("quernel::cholesky_factor", mutates_args=())
def _factor(a: Tensor) -> Tensor:
    """Return the library's Cholesky factor, whose tries depend on values, in graphs too."""
    check_finite("the kernel matrix of the landmarks l", a)
    return jittered_cholesky(a).contiguous()


@_factor.register_fake
def _(a: Tensor) -> Tensor:
    return torch.empty_like(a)


def _factor_backward(ctx: Any, grad: Tensor) -> Tensor:
    # With S = L^T G: the gradient is L^-T sym(S) L^-1, sym(S) being half the lower triangle of S and half its mirror.
    (lower,) = ctx.saved_tensors
    s = lower.mT @ grad
    s = 0.5 * (s.tril() + s.tril(-1).mT)
    s = torch.linalg.solve_triangular(lower.mT, s, upper=True)
    return torch.linalg.solve_triangular(lower, s, upper=False, left=False)


_factor.register_autograd(_factor_backward, setup_context=_keep)


def nystrom_apply(
    q: Tensor,
    l: Tensor,  # noqa: E741 - the letter of the paper
    v: Tensor,
    *,
    inverse: Inverse = "cholesky",
    eps: float = 1e-2,
    norm: Norm = "bottleneck",
    iters: int = 20,
    mask: Tensor | None = None,
    landmark_mask: Tensor | None = None,
) -> Tensor:
    """Return the Nystrom approximation of k(q, q) v, k(a, b) = exp(-||a - b||^2 / 2).

    Parameters
    ----------
    q : Tensor, shape (*batch, n, d)
        Tokens, scaled already.
    l : Tensor, shape (*batch, m, d)
        Landmarks, scaled alike.
    v : Tensor, shape (*batch, n, e)
        Values.
    inverse : {"cholesky", "newton", "pinv"}, default="cholesky"
        How A^+ is applied: exact and fastest on a CPU; by products only; by eigenvalues, without eps, whose gradients
        are unstable where eigenvalues repeat.
    eps : float, default=0.01
        Added to the diagonal of A, > 0.
    norm : {"bottleneck", "token", None}, default="bottleneck"
        "bottleneck" scales A^+ by the row sums of A, as published models do; "token" scales by the row sums of the
        approximated matrix itself, at least 1, so that its spectral norm is about 1 for any n; None scales nothing.
    iters : int, default=20
        Of Newton's iteration.
    mask : Tensor, shape (*batch, n), optional
        True where a token counts.
    landmark_mask : Tensor, shape (*batch, m), optional
        True where a landmark counts.

    Returns
    -------
    y : Tensor, shape (*batch, n, e)
        In the widest dtype of q, l and v; half precision is computed in float32.

    Raises
    ------
    QuernelError
        If shapes or dtypes do not fit, an option is unknown, or landmarks hold NaN or infinity.

    Warns
    -----
    JitterWarning
        If landmarks repeat and eps is too small to part them: the diagonal was raised.
    UserWarning
        As ``newton_pinv``.
    """
    check_choice("inverse", inverse, INVERSES)
    check_choice("norm", norm, NORMS)
    check_float("eps", eps, low=0.0, open_low=True)
    check_int("iters", iters, low=1)
    _check_inputs(q, l, v)
    for name, held, of in (("mask", mask, q), ("landmark_mask", landmark_mask, l)):
        if held is not None and (held.dtype != torch.bool or held.shape != of.shape[:-1]):
            raise QuernelError(
                f"{name} must be boolean of shape {tuple(of.shape[:-1])}; got {held.dtype} of {tuple(held.shape)}"
            )
    given = torch.promote_types(torch.promote_types(q.dtype, l.dtype), v.dtype)
    p, a = gaussian_kernel(q, l), gaussian_kernel(l, l)
    v = v.to(p.dtype)
    if landmark_mask is not None:
        p = p * landmark_mask[..., None, :]
        both = landmark_mask[..., None, :] & landmark_mask[..., :, None]
        # Landmarks that do not count stand alone: ones on the diagonal.
        a = torch.where(both, a, torch.eye(a.shape[-1], dtype=a.dtype, device=a.device))
    if mask is not None:
        v = v * mask[..., None]
    solve = _Inverse(a, inverse, eps, iters)
    scale = a.sum(-1, keepdim=True).rsqrt() if norm == "bottleneck" else None  # (*batch, m, 1)
    if norm == "token":
        ones = q.new_ones(*q.shape[:-1], 1).to(p.dtype) if mask is None else mask[..., None].to(p.dtype)
        # A token far from all landmarks may get a negative sum; that of the exact matrix is never below 1.
        d = (p @ solve(p.mT @ ones)).clamp_min(1.0).rsqrt()
        return (d * (p @ solve(p.mT @ (d * v)))).to(given)
    inner = p.mT @ v
    inner = solve(inner) if scale is None else scale * solve(scale * inner)
    return (p @ inner).to(given)


def _check_inputs(q: Tensor, l: Tensor, v: Tensor) -> None:  # noqa: E741
    for name, t in (("q", q), ("l", l), ("v", v)):
        if not check_type(name, t, Tensor).is_floating_point():
            raise QuernelError(f"{name} must hold real floating-point numbers; got {t.dtype}")
    if q.ndim < 2 or q.shape[:-2] != l.shape[:-2] or q.shape[-1] != l.shape[-1] or q.ndim != l.ndim:
        raise QuernelError(
            f"q and l must be (*batch, n, d) and (*batch, m, d); got {tuple(q.shape)} and {tuple(l.shape)}"
        )
    if v.shape[:-1] != q.shape[:-1]:
        raise QuernelError(f"v must have a row for each of q {tuple(q.shape)}; got {tuple(v.shape)}")
    # Decompositions would only say that they failed.
    if not torch.compiler.is_compiling():
        check_finite("l", l)


class _Inverse:
    """Apply (A + eps I)^-1 to columns."""

    def __init__(self, a: Tensor, kind: str, eps: float, iters: int) -> None:
        self.kind = kind
        if kind == "cholesky":
            eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
            self.matrix: Tensor = _factor(a + eps * eye)
        elif kind == "newton":
            self.matrix = newton_pinv(a, iters, eps)
        else:
            self.matrix = torch.linalg.pinv(a, hermitian=True)

    def __call__(self, columns: Tensor) -> Tensor:
        return torch.cholesky_solve(columns, self.matrix) if self.kind == "cholesky" else self.matrix @ columns
