"""``HashedLinear``: a weight whose every number is hashed on its own (HashedNets, arXiv 1504.04788).

ROAST with tiles of one number. Each number of W costs a hash and a read at a random place, where ``RoastLinear`` copies
whole runs; it is here to be compared with. No index is stored: published code keeps one integer, and often a sign, for
each number of W, which is more than the dense weight.
"""

from __future__ import annotations

from typing import Any

import torch

from quernel._registry import register
from quernel.nn._shared_array import SharedArray
from quernel.nn.hashed.roast import RoastLinear
from quernel.nn.weights.hashed import Mode


def _example() -> dict[str, Any]:
    def make() -> HashedLinear:
        generator = torch.Generator().manual_seed(0)
        return HashedLinear(7, 5, memory=SharedArray(11, seed=3, generator=generator), generator=generator)

    return {"make": make, "input": lambda generator: (torch.randn(4, 7, generator=generator),)}


@register(
    "roast", pillar="nn", contract="module", paper="2207.10702", status="stable", headline=False, example=_example
)
class HashedLinear(RoastLinear):
    """A linear layer that reads every number of its weight from a hashed slot of its own: the baseline of ROAST.

    Parameters
    ----------
    in_features, out_features, bias, memory, signs, scale, mode, seed, device, dtype, generator
        As in ``RoastLinear``. HashedNets have one array a layer; one for all is as valid.

    References
    ----------
    Chen et al., "Compressing neural networks with the hashing trick", arXiv 1504.04788, 2015.

    Examples
    --------
    >>> from quernel.nn import HashedLinear, SharedArray
    >>> HashedLinear(64, 32, memory=SharedArray(100)).materialize().shape
    torch.Size([32, 64])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        memory: SharedArray,
        signs: bool = True,
        scale: float | None = None,
        mode: Mode = "memory",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            memory=memory,
            tile=(1, 1),
            signs=signs,
            scale=scale,
            mode=mode,
            seed=seed,
            device=device,
            dtype=dtype,
            generator=generator,
        )
