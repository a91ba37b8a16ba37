"""Random Fourier features of the Gaussian kernel, as pairs of cosine and sine (arXiv 1506.02785).

phi(x) = n^-1/2 [cos(G x), sin(G x)] with n rows G ~ N(0, 2 gamma I) gives phi(x) . phi(y) ~= exp(-gamma |x - y|^2).
Pairs have |phi(x)| = 1 exactly and, for this kernel, a lower variance than as many cosines with random offsets,
the form of ``sklearn.kernel_approximation.RBFSampler``.
"""

from __future__ import annotations

import torch

from quernel._errors import QuernelError
from quernel.kernels.linalg import Array, as_tensor, like


def fourier_features(projections: Array) -> Array:
    """Return cosines and sines of projections, scaled to unit length.

    Parameters
    ----------
    projections : Tensor or array, shape (..., n)
        ``x @ G.T``, for the Gaussian kernel with G = sqrt(2 gamma) times random directions.

    Returns
    -------
    features : same kind and dtype, shape (..., 2 n)

    Examples
    --------
    >>> features = fourier_features(torch.zeros(1, 2))
    >>> [round(value, 3) for value in features[0].tolist()]
    [0.707, 0.707, 0.0, 0.0]
    """
    angles = as_tensor("projections", projections)
    if not angles.is_floating_point() or angles.ndim == 0 or angles.shape[-1] == 0:
        raise QuernelError(
            f"projections must be floating point with shape (..., n); got {angles.dtype} of {tuple(angles.shape)}"
        )
    wide = angles.to(torch.promote_types(angles.dtype, torch.float32))
    pair = torch.cat((wide.cos(), wide.sin()), dim=-1) * angles.shape[-1] ** -0.5
    return like(pair.to(angles.dtype), projections)
