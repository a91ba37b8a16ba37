"""SmoothQuant: the best-known scale migration, on the same int8 layers; the peer that CrossQuant is judged by.

s_j = c_j^m / max_k |W_kj|^(1-m) with m = 0.5 (arXiv 2211.10438, eq. 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quernel._registry import register
from quernel._validate import check_choice, check_probability
from quernel.compress._method import Scalar
from quernel.compress.quant._calibration import Calibration
from quernel.compress.quant._quantized_linears import QuantizedLinears, example_for
from quernel.nn.linear.crossquant import channel_scale


def _example() -> dict[str, Any]:
    return example_for(SmoothQuant())


@register("smoothquant", pillar="compress", contract="method", paper="2211.10438", status="stable", example=_example)
@dataclass(frozen=True)
class SmoothQuant(QuantizedLinears):
    """The same int8 layers with SmoothQuant's scale, s = c^m / max_k |W_kj|^(1-m): the peer to compare with.

    Parameters
    ----------
    wbits, abits, mode, percentile, activations, fuse
        As in ``CrossQuant``; ``mode`` is "static" or "fold".
    migration : float, default=0.5
        Share of the difficulty that moves to the weight, in [0, 1].

    References
    ----------
    Xiao et al., "SmoothQuant", arXiv 2211.10438, 2022, eq. (4).
    """

    migration: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("migration", self.migration)
        check_choice("mode", self.mode, ("static", "fold"))

    def choose(self, weight: Tensor, stats: Calibration) -> tuple[Tensor, Mapping[str, Scalar]]:
        """Return s from channel maxima of activations and of the weight's columns."""
        columns = weight.cpu().abs().amax(dim=0)
        # channel_scale(c, alpha) is c ** (1 - alpha) with dead channels taken care of.
        scale = channel_scale(stats.absmax.value, 1 - self.migration) / channel_scale(columns, self.migration)
        return scale, {"migration": self.migration}
