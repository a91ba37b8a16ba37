"""WeLore: every matrix its own rank, from its own spectrum under one global threshold (arXiv 2407.11239).

s~_j = (s_j - s_min) / (s_max - s_min) per matrix; kept rank = #{ j : s~_j >= tau }; tau is where the target is met.
Matrices that lose more than ``min_ratio`` of their ranks are low-rank components and become two factors, the
others stay dense.  Afterwards ``quernel.train.low_rank_only`` fine-tunes the factors alone.
Cost: one singular value decomposition a matrix, O(m n min(m, n)); the values are cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice
from quernel.compress._example_models import two_layer_example
from quernel.compress._method import Method
from quernel.compress.lowrank._layers import Layer
from quernel.compress.lowrank._low_rank import LowRankMethod
from quernel.compress.lowrank._ranks import (
    RankChoice,
    Shape,
    normalised,
    threshold_for_parameters,
    threshold_for_ranks,
)
from quernel.compress.lowrank._spectra import spectrum_of, whitened_spectrum


def _example() -> dict[str, Any]:
    return two_layer_example(WeLore(target=0.3, budget="params"))


@register("welore", pillar="compress", contract="method", paper="2407.11239", status="stable", example=_example)
@dataclass(frozen=True)
class WeLore(LowRankMethod):
    """Factor linear layers, each to the rank that its own singular values ask for.

    Large language models lose little; on small encoders the data-free gain over uniform ranks is small and fades
    when much is removed.  With calibration data use ``whiten=True``: it keeps what matters for the layers' outputs
    and wins far more than the choice of ranks.  For fewest bytes at a given quality, int8 beats any low-rank form.

    Parameters
    ----------
    target : float, default=0.5
        Fraction to remove, in [0, 1), counted over all matrices looked at, also those that stay dense.
    budget : {"rank", "params"}, default="rank"
        Whether ``target`` counts singular values (as the paper does) or stored weights.  Half the ranks of a square
        matrix save nothing; the report gives both numbers, and attempted apart from achieved ranks.
    min_ratio : float or "auto", default="auto"
        A matrix that would lose no more than this fraction of its ranks stays dense.  "auto" is break-even: it
        stays dense unless two factors are smaller.  The paper's text uses about 0.5, its code 0.
    exclude : tuple of str, default=("lm_head", "embed")
        Layers whose name holds one of these stay as they are; ``compress`` has include and exclude globs besides.
    whiten : bool, default=False
        Factor W L instead of W, with L L^T the second moment of the layer's inputs (SVD-LLM); needs data.
    split : mapping of str to int, default={"qkv": 3}
        Layers of this name hold so many matrices on top of each other; each gets a rank of its own.
    spectrum : {"weight", "whitened"}, default="weight"
        Which singular values choose the ranks; "whitened" needs ``whiten=True``.

    Raises
    ------
    QuernelError
        If an argument is out of range; in ``plan`` if nothing can be factored, a weight is not finite, or the
        parameter target is out of reach.

    Notes
    -----
    Differs from the authors' code: tau is found for any model instead of read from a table, biases are kept, dtypes
    are kept, a constant spectrum is kept whole, ties at tau go in layer order until the target is met exactly.

    References
    ----------
    Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    arXiv 2407.11239, 2024.

    Examples
    --------
    >>> import torch, quernel
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    >>> result = quernel.compress.compress(model, quernel.compress.WeLore(0.2, budget="params"))
    >>> sum(p.numel() for p in result.model.parameters()) <= 0.81 * sum(p.numel() for p in model.parameters())
    True
    """

    spectrum: Literal["weight", "whitened"] = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("spectrum", self.spectrum, ("weight", "whitened"))
        if self.spectrum == "whitened" and not self.whiten:
            raise QuernelError('spectrum="whitened" needs whiten=True, which observes the inputs on the data')

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Mild to strong, whitened; and what can be tried without data."""
        return (*(cls(target, budget="params", whiten=True) for target in (0.1, 0.2, 0.3)), cls(0.1, budget="params"))

    def choose(self, layers: Sequence[Layer], shapes: Sequence[Shape]) -> RankChoice:
        """Find the threshold that meets the target."""
        values = [
            spectrum_of(block)
            if self.spectrum == "weight" or layer.gram is None
            else whitened_spectrum(block, layer.gram)
            for layer in layers
            for block in layer.blocks
        ]
        spectra = [normalised(spectrum, shape) for spectrum, shape in zip(values, shapes, strict=True)]
        if self.budget == "rank":
            return threshold_for_ranks(spectra, self.target)
        return threshold_for_parameters(spectra, shapes, self.target, self.min_ratio)
