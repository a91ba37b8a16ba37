"""Random features: maps whose dot products estimate a kernel, and the random matrices they are made of."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "HadamardDirections": ".hadamard",
        "SHIFT_INVARIANT": ".spectral",
        "SPECTRA": ".universal",
        "ShiftInvariant": ".spectral",
        "Spectrum": ".universal",
        "arc_cosine_features": ".arc_cosine",
        "arc_cosine_kernel": ".arc_cosine",
        "best_damping": ".universal",
        "fourier_features": ".fourier",
        "gaussian_directions": ".orthogonal",
        "hadamard_directions": ".hadamard",
        "hadamard_projection": ".hadamard",
        "orthogonal_directions": ".orthogonal",
        "shift_invariant_kernel": ".spectral",
        "spectral_directions": ".spectral",
        "universal_features": ".universal",
        "universal_weight_features": ".universal",
        "walsh_hadamard": ".hadamard",
    },
)
