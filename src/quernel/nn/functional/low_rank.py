"""Truncated singular value decompositions of a weight, plain and whitened by its inputs.

Plain:     W ~= A B minimises ||W - A B||_F            (Eckart-Young).
Whitened:  W ~= A B minimises ||X (W - A B)^T||_F      (SVD-LLM, arXiv 2403.07378): with H = X^T X + ridge = L L^T,
           the SVD of W L is truncated and L divided out again by a triangular solve.
Both give balanced factors, ||A[:, j]|| == ||B[j, :]||, so that neither factor's gradient dwarfs the other's.
Cost O(m n min(m, n)); never below float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float, check_int
from quernel.kernels.linalg import jittered_cholesky

# Below this share of the mean diagonal, float32 spectra of W L lose their small end to the solve.
MIN_RIDGE = 1e-4


def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of ``weight``, shape (min(m, n),), descending, in float32 or float64."""
    return torch.linalg.svdvals(_working(weight))


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return balanced factors of the best approximation of a given rank.

    Parameters
    ----------
    weight : Tensor, shape (m, n)
        Any floating dtype; decomposed in float32, or float64 if it is float64.
    rank : int
        In [1, min(m, n)].

    Returns
    -------
    a, b : Tensor, shapes (m, rank) and (rank, n)
        ``a @ b`` approximates ``weight``; ``||a[:, j]|| == ||b[j, :]|| == sqrt(s_j)``; dtype of ``weight``.

    Raises
    ------
    QuernelError
        If ``weight`` is not a finite floating matrix or ``rank`` is out of range.

    Examples
    --------
    >>> import torch
    >>> w = torch.arange(12.0).reshape(4, 3)  # of rank 2
    >>> a, b = truncated_svd(w, 2)
    >>> torch.allclose(a @ b, w, atol=1e-4)
    True
    """
    work = _working(weight)
    u, s, vh = _leading(work, rank)
    root = s.sqrt()
    return (u * root).to(weight.dtype), (root[:, None] * vh).to(weight.dtype)


def whitening_factor(gram: Tensor, *, eps: float = MIN_RIDGE) -> Tensor:
    """Return the lower Cholesky factor L of ``gram + eps * mean(diag(gram)) * I``.

    Parameters
    ----------
    gram : Tensor, shape (n, n)
        ``X^T X`` of the layer's inputs, any positive scale.
    eps : float, default=1e-4
        Ridge as a share of the mean diagonal; at least 1e-4.

    Returns
    -------
    lower : Tensor, shape (n, n), float64
        The identity if ``gram`` is zero: inputs that are always zero prefer no direction.
    """
    check_float("eps", eps, low=MIN_RIDGE)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise QuernelError(f"gram must be a square matrix X^T X; got shape {tuple(gram.shape)}")
    check_finite("gram", gram)
    h = gram.detach().to(torch.float64)
    mean = h.diagonal().mean()
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return eye if mean <= 0 else jittered_cholesky(h + eps * mean * eye)


def whitened_svd(weight: Tensor, gram: Tensor, rank: int, *, eps: float = MIN_RIDGE) -> tuple[Tensor, Tensor]:
    """Return balanced factors of the approximation whose *outputs* are closest on the given inputs.

    Parameters
    ----------
    weight : Tensor, shape (m, n)
        Any floating dtype.
    gram : Tensor, shape (n, n)
        ``X^T X`` of the inputs of the layer ``x -> x @ weight.T``, any positive scale.
    rank : int
        In [1, min(m, n)].
    eps : float, default=1e-4
        Ridge on ``gram`` as a share of its mean diagonal; at least 1e-4.

    Returns
    -------
    a, b : Tensor, shapes (m, rank) and (rank, n)
        Dtype of ``weight``.

    Raises
    ------
    QuernelError
        If shapes do not fit, values are not finite, or ``rank`` or ``eps`` is out of range.

    Notes
    -----
    On these inputs the error never exceeds that of ``truncated_svd``: the result minimises
    ``||X D^T||^2 + r ||D||^2`` (r the ridge) and the plain one minimises ``||D||^2``, so the first term cannot
    be larger too.  With ``gram`` proportional to the identity both are the same.

    References
    ----------
    Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    arXiv 2403.07378, 2024.
    """
    work = _working(weight)
    if gram.shape[-1] != weight.shape[1]:
        raise QuernelError(
            f"gram must be ({weight.shape[1]}, {weight.shape[1]}) for a weight of shape {tuple(weight.shape)}; "
            f"got {tuple(gram.shape)}. Observe the inputs of this very layer"
        )
    lower = whitening_factor(gram, eps=eps).to(weight.device)
    # float64 throughout: the solve multiplies rounding errors by the condition number of L.
    u, s, vh = _leading(work.to(torch.float64) @ lower, rank)
    root = s.sqrt()
    b = torch.linalg.solve_triangular(lower, root[:, None] * vh, upper=False, left=False)  # b @ lower == sqrt(S) V^T
    # The solve changed the length of b's rows; share each rank-one term evenly again.
    tiny = torch.finfo(b.dtype).tiny
    scale = (root / b.norm(dim=1).clamp_min(tiny)).sqrt()
    # ||u[:, j] * root[j]|| == root[j], so a shrinks by what b grows and both end at the geometric mean.
    a = u * root / scale.clamp_min(tiny)
    return a.to(weight.dtype), (scale[:, None] * b).to(weight.dtype)


def _working(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise QuernelError(
            f"weight must be a non-empty floating matrix; got {weight.dtype} of shape {tuple(weight.shape)}. "
            "Flatten a convolution's weight to (out, in * kh * kw) first"
        )
    check_finite("weight", weight)
    # Half precision would lose the small end of the spectrum.
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    check_int("rank", rank, low=1, high=min(matrix.shape))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]
