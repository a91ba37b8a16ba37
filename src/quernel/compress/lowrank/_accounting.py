"""What a low-rank plan saves and costs: ranks and parameters, apart, and the errors of each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quernel.compress._method import Scalar
from quernel.compress.lowrank._layers import Layer
from quernel.nn.weights import StoredWeight


@dataclass
class Totals:
    """Sums over all matrices, dense ones included."""

    matrices: int = 0
    low_rank: int = 0
    ranks: int = 0
    ranks_cut: int = 0  # under the threshold
    ranks_gone: int = 0  # of these, in matrices that were really factored
    weights: int = 0
    weights_stored: int = 0

    @property
    def weight_reduction(self) -> float:
        """Fraction of the looked-at weights that is no longer stored; biases not counted."""
        return 1 - self.weights_stored / self.weights

    def count(
        self, layer: Layer, ranks: list[int], flags: list[bool], weight: StoredWeight | None
    ) -> dict[str, Scalar]:
        """Add one layer and return what the report says about it."""
        m, n = sum(block.shape[0] for block in layer.blocks), layer.blocks[0].shape[1]
        full = [min(block.shape) for block in layer.blocks]
        stored = m * n if weight is None else sum(p.numel() for p in weight.parameters())
        self.matrices += len(full)
        self.low_rank += sum(flags)
        self.ranks += sum(full)
        self.ranks_cut += sum(full) - sum(ranks)
        self.ranks_gone += sum(f - k for f, k, flag in zip(full, ranks, flags, strict=True) if flag)
        self.weights += m * n
        self.weights_stored += stored
        bias = 0 if layer.modules[0].bias is None else m
        details: dict[str, Scalar] = {
            "m": m,
            "n": n,
            "rank": ranks[0] if len(ranks) == 1 else " + ".join(map(str, ranks)),
            "full_rank": full[0] if len(full) == 1 else " + ".join(map(str, full)),
            "low_rank": any(flags),
            "parameters_before": m * n + bias,
            "parameters_after": stored + bias,
        }
        return details | _errors(layer, weight)


def _errors(layer: Layer, weight: StoredWeight | None) -> dict[str, Scalar]:
    before = torch.cat([block.detach().double() for block in layer.blocks])
    lost = torch.zeros_like(before) if weight is None else before - weight.dense().detach().double()
    size = float(before.norm())
    errors: dict[str, Scalar] = {"relative_frobenius_error": float(lost.norm()) / size if size else 0.0}
    if layer.gram is not None:
        gram = layer.gram.to(before)
        output = float(((before @ gram) * before).sum())
        # Rounding can push the tiny error of a nearly exact factorisation below zero.
        error = max(0.0, float(((lost @ gram) * lost).sum()))
        errors["relative_output_error"] = math.sqrt(error / output) if output > 0 else 0.0
    return errors
