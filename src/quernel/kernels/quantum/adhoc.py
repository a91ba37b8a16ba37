"""``make_adhoc``: data that a quantum kernel separates by construction (arXiv 1804.11326).

label(x) = sign <Phi(x)| V^+ f V |Phi(x)>, V random in SU(2^n), f the parity of all qubits; rows whose expectation is
smaller than the gap are left out. The expectation has a standard deviation near 2^(-n/2), so a gap of 0.3 is rare from
seven qubits on.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from quernel._errors import QuernelError
from quernel._random import Seed, generator
from quernel._validate import check_float, check_int, check_type
from quernel.kernels.quantum._states import parity_signs
from quernel.kernels.quantum.feature_map import QuantumFeatureMap

# A dense random unitary of 10 qubits is 16 MB.
_MOST_QUBITS = 10
_ROWS = 1024
_BATCHES = 500


def make_adhoc(
    n_per_class: int = 20,
    n_qubits: int = 2,
    *,
    gap: float = 0.3,
    feature_map: QuantumFeatureMap | None = None,
    random_state: Seed = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Draw rows that are uniform in (0, 2 pi]^n where the label is certain, as many of each class.

    Parameters
    ----------
    n_per_class : int, default=20
        Rows of each class. For training and test rows of one problem, draw them together and split.
    n_qubits : int, default=2
        Columns, at most 10.
    gap : float, default=0.3
        Least absolute expectation, in [0, 1).
    feature_map : QuantumFeatureMap, optional
        Default is ``QuantumFeatureMap(dtype="complex128")``.
    random_state : int, Generator or None, default=None

    Returns
    -------
    X : array, shape (2 n_per_class, n_qubits)
    y : array, shape (2 n_per_class,)
        -1 and 1, in random order.

    Raises
    ------
    QuernelError
        If a parameter is no good, or rows of that gap are too rare to be found.

    References
    ----------
    Havlicek et al., "Supervised learning with quantum enhanced feature spaces", arXiv 1804.11326, 2018.

    Examples
    --------
    >>> x, y = make_adhoc(5, n_qubits=2, random_state=0)
    >>> x.shape, int(y.sum())
    ((10, 2), 0)
    """
    check_int("n_per_class", n_per_class, low=1)
    check_int("n_qubits", n_qubits, low=1, high=_MOST_QUBITS)
    check_float("gap", gap, low=0.0, high=1.0, open_high=True)
    maps = QuantumFeatureMap(dtype="complex128") if feature_map is None else feature_map
    check_type("feature_map", maps, QuantumFeatureMap)
    draw = generator(random_state, "random_state")
    unitary = random_unitary(2**n_qubits, draw)
    parity = parity_signs(n_qubits, [range(n_qubits)])[0]
    found: dict[int, list[NDArray[np.float64]]] = {-1: [], 1: []}
    for batch in range(1, _BATCHES + 1):
        x = 2 * math.pi * (1.0 - draw.random((_ROWS, n_qubits)))
        expectation = np.abs(maps.transform(x) @ unitary.T) ** 2 @ parity
        for label, rows in found.items():
            rows.append(x[label * expectation >= max(gap, np.finfo(float).tiny)])
        count = min(sum(map(len, rows)) for rows in found.values())
        if count >= n_per_class:
            break
        # Where even four standard deviations more would not do in all batches, the rest is not waited for.
        if batch == _BATCHES or (count + 4 * math.sqrt(count) + 8) * _BATCHES / batch < n_per_class:
            raise QuernelError(
                f"only {count} of n_per_class={n_per_class} rows with gap={gap} were found among {_ROWS * batch:,}: "
                f"expectations of n_qubits={n_qubits} are near {2 ** (-n_qubits / 2):.2g}. Ask for a smaller gap"
            )
    order = draw.permutation(2 * n_per_class)
    x = np.concatenate([np.concatenate(rows)[:n_per_class] for rows in found.values()])
    return x[order], np.repeat(np.array(list(found), np.int64), n_per_class)[order]


def random_unitary(size: int, draw: np.random.Generator) -> NDArray[np.complex128]:
    """Return a matrix of SU(size), uniformly distributed (Haar)."""
    z = draw.standard_normal((size, size)) + 1j * draw.standard_normal((size, size))
    q, r = np.linalg.qr(z)
    # The phases that a QR decomposition leaves open are not uniform by themselves.
    phases = r.diagonal() / np.abs(r.diagonal())
    unitary = q * phases
    return np.asarray(unitary * np.exp(-1j * np.angle(np.linalg.det(unitary)) / size))
