"""``kernel_geometry``: what two kernel matrices of the same rows say before any model is fitted.

Concentration (are all overlaps 2^-n?), effective dimension exp(entropy of the spectrum), centred alignment with the
labels, and the geometric difference g = |sqrt(K_q) (K_c + a I)^-1 sqrt(K_q)|^(1/2): no labels exist for which the error
bound of the classical kernel is more than g times that of the quantum one (Huang et al., 2021). g near 1 rules an
advantage out; one needs g of the order of the root of N. Cost: eigendecompositions of N x N matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from quernel._errors import QuernelError
from quernel._validate import check_finite, check_float, check_int
from quernel.kernels.linalg import jittered_cholesky
from quernel.kernels.psd import psd_eigenvalues, spectral_entropy

Matrix = NDArray[np.float64]
# Share of sqrt(N) below which g leaves no room: the bound of the classical kernel is then below a third of the trivial
# one whenever the quantum kernel's is at its best.
_ROOM = 1 / 3  # "a third" in words below
# Variance of the off-diagonal that a thousand shots, of variance up to 0.25 / 1000, cannot resolve.
_FLAT = 2.5e-4


@dataclass(frozen=True)
class KernelGeometry:
    """What ``kernel_geometry`` found; ``message`` says it in words.

    Attributes
    ----------
    n_rows : int
    off_diagonal_mean, off_diagonal_variance : float
        Of the quantum kernel. The mean tends to 2^-n where it concentrates.
    haar_mean : float or None
        2^-n.
    effective_dimension, classical_dimension : float
        exp of the entropy of the normalised eigenvalues, 1 to N.
    alignment, classical_alignment : float or None
        Centred alignment with the labels, in [-1, 1].
    geometric_difference : float
        g of the classical against the quantum kernel.
    complexity, classical_complexity : float or None
        s = sum over one-hot labels of y^T (K + a I)^-1 y, divided by N: the smaller is the simpler.
    message : str
    """

    n_rows: int
    off_diagonal_mean: float
    off_diagonal_variance: float
    haar_mean: float | None
    effective_dimension: float
    classical_dimension: float
    alignment: float | None
    classical_alignment: float | None
    geometric_difference: float
    complexity: float | None
    classical_complexity: float | None
    message: str = ""

    @property
    def advantage_possible(self) -> bool:
        """Whether the geometric difference leaves room for labels that the quantum kernel learns much better."""
        return self.geometric_difference > _ROOM * self.n_rows**0.5


def kernel_geometry(
    quantum: ArrayLike,
    classical: ArrayLike,
    y: ArrayLike | None = None,
    *,
    n_qubits: int | None = None,
    alpha: float = 1e-3,
) -> KernelGeometry:
    """Compare a quantum kernel with a classical one on the same rows.

    Parameters
    ----------
    quantum, classical : array, shape (N, N)
        Symmetric positive semi-definite, N >= 2; both are scaled to a mean diagonal of 1.
    y : array, shape (N,), optional
        Labels, for alignments and complexities.
    n_qubits : int, optional
        For the comparison with 2^-n.
    alpha : float, default=1e-3
        Ridge a, relative to the mean diagonal.

    Returns
    -------
    KernelGeometry

    References
    ----------
    Huang et al., "Power of data in quantum machine learning", arXiv 2011.01938, 2021.
    Thanasilp et al., "Exponential concentration in quantum kernel methods", arXiv 2208.11060, 2022.

    Examples
    --------
    >>> found = kernel_geometry(np.eye(100), np.ones((100, 100)) + np.eye(100))
    >>> round(found.geometric_difference, 2), found.advantage_possible
    (1.41, False)
    """
    kq, kc = _checked("quantum", quantum), _checked("classical", classical)
    if kq.shape != kc.shape:
        raise QuernelError(f"quantum and classical must be of the same rows; got shapes {kq.shape} and {kc.shape}")
    check_float("alpha", alpha, low=0.0, open_low=True)
    if n_qubits is not None:
        check_int("n_qubits", n_qubits, low=1)
    n = len(kq)
    off = kq[~np.eye(n, dtype=bool)]
    targets = None if y is None else _one_hot(y, n)
    factors = [jittered_cholesky(k + alpha * np.eye(n)) for k in (kq, kc)]
    alignments = [None if targets is None else _alignment(k, targets) for k in (kq, kc)]
    complexities = [None if targets is None else _complexity(factor, targets) for factor in factors]
    found = KernelGeometry(
        n_rows=n,
        off_diagonal_mean=float(off.mean()),
        off_diagonal_variance=float(off.var()),
        haar_mean=None if n_qubits is None else 2.0**-n_qubits,
        effective_dimension=_dimension(kq),
        classical_dimension=_dimension(kc),
        alignment=alignments[0],
        classical_alignment=alignments[1],
        geometric_difference=_difference(kq, factors[1]),
        complexity=complexities[0],
        classical_complexity=complexities[1],
    )
    return replace(found, message=_message(found))


def _checked(name: str, k: ArrayLike) -> Matrix:
    matrix = np.array(k, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise QuernelError(f"{name} must have shape (N, N) with N >= 2; got {matrix.shape}")
    check_finite(name, matrix)
    scale = matrix.diagonal().mean()
    if not scale > 0 or np.abs(matrix - matrix.T).max() > 1e-4 * scale:
        raise QuernelError(f"{name} must be a symmetric kernel matrix with a positive diagonal")
    return np.asarray((matrix + matrix.T) / (2 * scale))


def _one_hot(y: ArrayLike, n: int) -> Matrix:
    labels = np.asarray(y)
    if labels.shape != (n,):
        raise QuernelError(f"y must have shape ({n},), a label a row; got {labels.shape}")
    return np.equal(labels[:, None], np.unique(labels)).astype(np.float64)


def _difference(kq: Matrix, factor: Matrix) -> float:
    # |sqrt(K_q) C^-1 sqrt(K_q)| = |L^-1 K_q L^-T| with C = L L^T.
    lower = torch.from_numpy(factor)
    half = torch.linalg.solve_triangular(lower, torch.from_numpy(kq), upper=False)
    whole = torch.linalg.solve_triangular(lower, half.mT.contiguous(), upper=False)
    return float(torch.linalg.eigvalsh((whole + whole.mT) / 2)[-1].clamp_min(0.0).sqrt())


def _dimension(k: Matrix) -> float:
    eigenvalues = psd_eigenvalues(torch.from_numpy(k / len(k)))
    return float(spectral_entropy(eigenvalues).exp())


def _alignment(k: Matrix, targets: Matrix) -> float:
    centred, wanted = (m - m.mean(0) - m.mean(1)[:, None] + m.mean() for m in (k, targets @ targets.T))
    lengths = np.linalg.norm(centred) * np.linalg.norm(wanted)
    return float((centred * wanted).sum() / lengths) if lengths > 0 else 0.0


def _complexity(factor: Matrix, targets: Matrix) -> float:
    half = torch.linalg.solve_triangular(torch.from_numpy(factor), torch.from_numpy(targets), upper=False)
    return float(half.square().sum()) / len(targets)


def _message(found: KernelGeometry) -> str:
    g, root = found.geometric_difference, found.n_rows**0.5
    if found.advantage_possible:
        verdict = (
            f"The geometric difference is {g:.2f}, more than a third of sqrt(N) = {root:.1f} for the N = "
            f"{found.n_rows} rows compared: labels exist that only the quantum kernel learns. These need not be such."
        )
    else:
        verdict = (
            f"No large advantage can exist: the geometric difference is {g:.2f}, at most a third of sqrt(N) = "
            f"{root:.1f} for the N = {found.n_rows} rows compared, so the classical kernel is nearly as good on every "
            "labelling of these rows."
        )
    lines = [verdict]
    simple, classical = found.complexity, found.classical_complexity
    if simple is not None and classical is not None and classical <= simple:
        lines.append(
            f"On these labels the classical kernel is the simpler one ({classical:.3g} against {simple:.3g}): expect "
            "it to predict at least as well."
        )
    if found.off_diagonal_variance < _FLAT:
        what = "" if found.haar_mean is None else f", where random states give {found.haar_mean:.2g}"
        lines.append(
            f"The kernel is concentrated: overlaps are {found.off_diagonal_mean:.2g} on average{what}, nearly all "
            "alike. Use a smaller scale or fewer qubits."
        )
    return " ".join(lines)
