r"""CrossQuantLinear: an int8 x int8 linear layer whose activation outliers live in the weight (arXiv 2410.07505).

With s_j = c_j^(1 - alpha) from calibration, W' = s W in int8 per output channel (scale v_k), and at run time
xq = round(x / s / step_i), step_i = max_j |x_ij| / s_j / q ("tight") or t_i^alpha / q ("bound", clamped):
y_ik = (sum_j xq_ij W'q_kj) step_i v_k + b_k, one fused pass before and one after the integer product.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_probability
from quernel.nn._int8_kernels import ACTIVATIONS
from quernel.nn._stored import StoredLinear
from quernel.nn.functional.int8 import apply_int8_linear, levels_of
from quernel.nn.weights.int8 import Int8Weight

# A channel that calibration never saw alive gets this share of the median scale, so that its weight survives.
DEAD_SHARE = 1e-5


def _example() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 12)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(12, 32, generator=generator))
    return {
        "make": lambda: CrossQuantLinear.from_linear(linear, torch.linspace(1, 9, 32), activation="gelu"),
        "input": lambda generator: (torch.randn(5, 32, generator=generator),),
    }


@register(
    "crossquant", pillar="nn", contract="module", paper="2410.07505", status="stable", headline=False, example=_example
)
class CrossQuantLinear(StoredLinear):
    """A linear layer computed in int8, with calibrated channel scales folded into its weight.

    Build it with ``from_linear``.

    Parameters
    ----------
    weight : Int8Weight, shape (out_features, in_features)
        The weight, already multiplied by the channel scales.
    bias : Tensor, shape (out_features,), optional
        Kept in float32.
    smooth : bool, default=True
        Whether activations are divided by channel scales (buffer ``inverse``, shape (in_features,)).
    abits : int, default=8
        Bits of the activation codes, 4 to 8.
    row : {"tight", "bound"}, default="tight"
        Step of a token: the largest scaled entry, which never clips, or t^alpha, which may.
    alpha : float, default=0.15
        Exponent of the token maximum in [0, 1]; used by ``row="bound"``.
    activation : {None, "relu", "gelu", "gelu_tanh", "silu"}
        Computed in the pass that scales the products back.

    Notes
    -----
    float32 and bfloat16 inputs come out in their own dtype; between layers bfloat16 is faster. A token with
    NaN or infinity comes out as NaN.

    References
    ----------
    "CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel", arXiv 2410.07505, 2024.
    """

    weight: Int8Weight
    inverse: Tensor | None

    def __init__(
        self,
        weight: Int8Weight,
        bias: Tensor | None = None,
        *,
        smooth: bool = True,
        abits: int = 8,
        row: str = "tight",
        alpha: float = 0.15,
        activation: str | None = None,
    ) -> None:
        bias = None if bias is None else nn.Parameter(bias.detach().float())
        super().__init__(weight, bias)
        self.levels = levels_of(abits)
        self.abits = abits
        self.row = check_choice("row", row, ("tight", "bound"))
        self.alpha = check_probability("alpha", alpha)
        self.activation = check_choice("activation", activation, tuple(ACTIVATIONS))
        self.register_buffer("inverse", torch.ones(self.in_features) if smooth else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        absmax: Tensor,
        alpha: float = 0.15,
        *,
        wbits: int = 8,
        abits: int = 8,
        bias: bool = True,
        row: str = "tight",
        activation: str | None = None,
    ) -> Self:
        """Fold the channel scales ``absmax ** (1 - alpha)`` into the weight and quantise it.

        Parameters
        ----------
        linear : nn.Linear
            Left untouched.
        absmax : Tensor, shape (in_features,)
            Largest magnitude of each input channel over the calibration data.
        alpha : float, default=0.15
            Exponent of the token maximum; 1 leaves the channels alone.
        wbits, abits : int, default=8
            Bits of weights (8) and activations (4 to 8).
        bias : bool, default=True
            Keep the bias of ``linear``.
        row, activation
            As in the class.

        Raises
        ------
        QuernelError
            If the weight is not 2-D or not finite, or a setting is out of range.
        """
        check_choice("wbits", wbits, (8,))
        check_probability("alpha", alpha)
        matrix = linear.weight.detach().float()
        if matrix.ndim != 2:
            raise QuernelError(f"linear must have a 2-D weight; got shape {tuple(matrix.shape)}")
        if not isinstance(absmax, Tensor) or tuple(absmax.shape) != (matrix.shape[1],):
            raise QuernelError(f"absmax must be a tensor of shape ({matrix.shape[1]},), one value a channel; got {absmax!r:.60}")
        check_finite("absmax", absmax)
        scale = channel_scale(absmax.detach().to(matrix), alpha)
        smooth = bool((scale != 1).any())
        new = cls(
            Int8Weight.from_dense(matrix * scale),
            linear.bias if bias else None,
            smooth=smooth,
            abits=abits,
            row=row,
            alpha=alpha,
            activation=activation,
        )
        if smooth:
            new.inverse = 1.0 / scale
        return new.to(matrix.device)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Quantise, multiply in int8, scale back, add the bias, activate."""
        return apply_int8_linear(
            x,
            self.weight.codes,
            self.weight.scale,
            self.bias,
            self.inverse,
            self.levels,
            None if self.row == "tight" else self.alpha,
            self.activation,
        )

    def config(self) -> dict[str, Any]:
        """Return weight, bias and settings."""
        return super().config() | {
            "smooth": self.inverse is not None,
            "abits": self.abits,
            "row": self.row,
            "alpha": self.alpha,
            "activation": self.activation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        weight, bias = cls._parts(config)
        settings = {name: config[name] for name in ("smooth", "abits", "row", "alpha", "activation")}
        return cls(weight, bias, **settings)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show features, bits and the fused activation."""
        return f"{super().extra_repr()}, abits={self.abits}, row={self.row!r}, activation={self.activation!r}"


def channel_scale(absmax: Tensor, alpha: float) -> Tensor:
    """Return ``absmax ** (1 - alpha)`` with dead channels lifted to a small share of the median."""
    alive = absmax[absmax > 0]
    floor = float(alive.median()) * DEAD_SHARE if alive.numel() else 1.0
    scale = absmax.clamp_min(floor) ** (1 - alpha)
    return torch.where(scale > 0, scale, torch.ones_like(scale))
