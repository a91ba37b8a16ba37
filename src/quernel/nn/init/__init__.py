"""Initialisation by the theory of deep networks, and advice on depth, width and learning rates."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Advice": ".advisor",
        "ArchitectureAdvisor": ".advisor",
        "InitReport": ".critical",
        "LayerInit": ".critical",
        "Network": ".network",
        "SkippedLayer": ".network",
        "WeightLayer": ".network",
        "critical_init_": ".critical",
        "read_network": ".network",
    },
)
