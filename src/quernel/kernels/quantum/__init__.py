"""Quantum-enhanced feature spaces, simulated exactly: state features, kernels, two classifiers, diagnostics."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AngleRangeWarning": ".feature_map",
        "KernelGeometry": ".geometry",
        "QuantumFeatureMap": ".feature_map",
        "QuantumKernel": ".kernel",
        "QuantumKernelClassifier": ".kernel_classifier",
        "VariationalQuantumClassifier": ".variational",
        "kernel_geometry": ".geometry",
        "make_adhoc": ".adhoc",
    },
)
