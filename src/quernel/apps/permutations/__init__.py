"""Permutations of bits learned from k examples and applied exactly to all 2^k - 1 inputs (arXiv 2502.16763).

``PermutationLearner`` trains on the k basis vectors only, as an infinite ensemble in closed form or as an average of
trained networks, and rounds. ``train_networks`` and ``average_outputs`` are its networks by themselves.
"""

from quernel._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Networks": ".networks",
        "PermutationLearner": ".learner",
        "average_outputs": ".networks",
        "draw_networks": ".networks",
        "network_outputs": ".networks",
        "train_networks": ".networks",
    },
)
