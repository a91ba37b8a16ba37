"""Applications: whole tasks solved with the library, from data to a report."""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "PermutationLearner": ".permutations.learner",
        "permutations": ".permutations",
        "text_index": ".text_index",
        "wave_surrogate": ".wave_surrogate",
    },
)
