"""Networks of infinite width in closed form: their kernels, their training at any time, how many models to average.

``NTKernel`` gives the NNGP kernel and the NTK of a fully connected network, ``ntk_dynamics`` the mean and covariance of
an infinite ensemble of such networks at any time of training, ``NTKRegressor`` the same as an estimator.
``EnsemblePlan`` says how many networks an average needs to learn a permutation of bits exactly (arXiv 2502.16763).
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Dynamics": ".dynamics",
        "EnsemblePlan": ".plan",
        "Kernels": ".kernel",
        "NTKRegressor": ".regressor",
        "NTKernel": ".kernel",
        "PermutationMoments": ".moments",
        "ntk_dynamics": ".dynamics",
        "permutation_moments": ".moments",
    },
)
