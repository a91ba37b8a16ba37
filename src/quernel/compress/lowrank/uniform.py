"""UniformLowRank: truncated SVD with the same fraction for every matrix, the baseline of all rank choices.

With ``whiten=True`` this is the one-shot form of SVD-LLM (arXiv 2403.07378), the strongest peer of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quernel._registry import register
from quernel.compress._example_models import two_layer_example
from quernel.compress.lowrank._layers import Layer
from quernel.compress.lowrank._low_rank import LowRankMethod
from quernel.compress.lowrank._ranks import RankChoice, Shape, uniform_ranks


def _example() -> dict[str, Any]:
    return two_layer_example(UniformLowRank(target=0.3, budget="params", whiten=True))


@register("uniform-low-rank", pillar="compress", contract="method", paper=None, status="stable", example=_example)
@dataclass(frozen=True)
class UniformLowRank(LowRankMethod):
    """Factor linear layers, all to the same fraction of their rank or of their parameters.

    The fields are those of ``WeLore``; ``target`` is the fraction that every matrix loses.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> method = quernel.compress.UniformLowRank(0.5, budget="params")
    >>> quernel.compress.compress(model, method).model[0].rank
    16
    """

    def choose(self, layers: Sequence[Layer], shapes: Sequence[Shape]) -> RankChoice:
        """Give every matrix the same fraction."""
        return uniform_ranks(shapes, self.target, self.budget)
