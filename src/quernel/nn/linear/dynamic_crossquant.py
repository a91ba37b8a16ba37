"""DynamicCrossQuantLinear: CrossQuant with the channel maxima of the batch at hand, the paper's literal formula.

Weights are stored in int8; activations are quantised and dequantised in floating point, because a step that
varies along the summed axis cannot leave an integer product. A reference: slow, and batch dependent.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._registry import register
from quernel._validate import check_choice, check_int, check_probability
from quernel.nn._stored import StoredLinear
from quernel.nn.functional.activation_quant import fake_quantize
from quernel.nn.functional.activations import FUSIBLE
from quernel.nn.weights._base import StoredWeight
from quernel.nn.weights.int8 import Int8Weight


def _example() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(6, 8, generator=generator))
    return {
        "make": lambda: DynamicCrossQuantLinear.from_linear(linear),
        "input": lambda generator: (torch.randn(4, 8, generator=generator),),
        # The step of a sample depends on the others, and its finiteness check on the data.
        "batch_independent": False,
        "compile": False,
        "export": False,
    }


@register(
    "crossquant",
    pillar="nn",
    contract="module",
    paper="2410.07505",
    status="experimental",
    headline=False,
    example=_example,
)
class DynamicCrossQuantLinear(StoredLinear):
    """A linear layer with int8 weights whose activations are fake-quantised with the batch's own maxima.

    Parameters
    ----------
    weight : StoredWeight, shape (out_features, in_features)
    bias : Tensor, shape (out_features,), optional
    alpha : float, default=0.15
        Exponent of the token maximum; 1 is per token, 0 per channel.
    abits : int, default=8
        Bits of the activations.
    activation : str, optional
        Applied to the output: "gelu", "gelu_tanh", "relu" or "silu".
    """

    #: Activations are quantised in floating point: no time is won.
    simulated = True

    def __init__(
        self,
        weight: StoredWeight,
        bias: Tensor | None = None,
        *,
        alpha: float = 0.15,
        abits: int = 8,
        activation: str | None = None,
    ) -> None:
        super().__init__(weight, bias)
        self.alpha = check_probability("alpha", alpha)
        self.abits = check_int("abits", abits, low=2, high=8)
        self.activation = check_choice("activation", activation, (None, *FUSIBLE))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, alpha: float = 0.15, wbits: int = 8, abits: int = 8, activation: str | None = None
    ) -> Self:
        """Quantise the weight of ``linear`` (``wbits`` must be 8) and keep its bias."""
        check_choice("wbits", wbits, (8,))
        weight = Int8Weight.from_dense(linear.weight)
        return cls(weight, linear.bias, alpha=alpha, abits=abits, activation=activation)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Quantise the batch, multiply in floating point."""
        y = super().forward(fake_quantize(x, bits=self.abits, alpha=self.alpha))
        return y if self.activation is None else FUSIBLE[self.activation](y)

    def config(self) -> dict[str, Any]:
        """Return weight, bias, alpha, bits and activation."""
        return super().config() | {"alpha": self.alpha, "abits": self.abits, "activation": self.activation}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        return cls(*cls._parts(config), alpha=config["alpha"], abits=config["abits"], activation=config["activation"])
