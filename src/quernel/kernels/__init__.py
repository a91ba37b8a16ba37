"""Mathematics on matrices of samples: mergeable sums, ridge regression, factorisations, statistics."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AbsMax": ".moments",
        "ArcCosineFeatures": ".random_features",
        "BundledClassifier": ".bundled",
        "BundledRegressor": ".bundled",
        "Clusters": ".clustering",
        "FrankWolfe": ".frank_wolfe",
        "Gram": ".moments",
        "JitterWarning": ".linalg",
        "KernelHerding": ".kernel_herding",
        "LSHKernel": ".lsh_kernel",
        "LSHKernelClassifier": ".lsh_kernel_machine",
        "LSHKernelMachine": ".lsh_kernel_machine",
        "Moments": ".moments",
        "NormalEquations": ".normal_equations",
        "RandomFourierFeatures": ".random_features",
        "UniversalRandomFeatures": ".universal_random_features",
        "cluster_means": ".clustering",
        "features": ".features",
        "gaussian_kernel": ".gaussian",
        "jittered_cholesky": ".linalg",
        "kmeans": ".clustering",
        "solve_kernel_ridge": ".ridge",
        "solve_ridge": ".ridge",
        "statistics": ".statistics",
    },
)
