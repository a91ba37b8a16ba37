"""The effective theory of deep networks at initialisation: which variances keep signals, how far seeds will differ.

Recursions over layers of a fully connected network of width n, all for any activation: the kernel K of preactivations
and the tangent kernel at infinite width, the four-point vertex V and the mean correction at order 1 / n.
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ACTIVATIONS": ".activations",
        "Activation": ".activations",
        "Criticality": ".critical_points",
        "FourVertex": ".vertex",
        "LayerRate": ".scaling",
        "TangentKernel": ".recursions",
        "Universality": ".critical_points",
        "as_activation": ".activations",
        "best_aspect_ratio": ".scaling",
        "criticality": ".critical_points",
        "four_vertex": ".vertex",
        "kernel_recursion": ".recursions",
        "layer_rates": ".scaling",
        "ntk_recursion": ".recursions",
        "susceptibilities": ".recursions",
    },
)
