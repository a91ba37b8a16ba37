r"""CrossQuant: int8 activations whose step uses both the token's and the channel's maximum (arXiv 2410.07505).

step_ij = t_i^alpha * c_j^(1-alpha) / q, with t_i the token maximum, c_j the channel maximum, q = 2^(bits-1) - 1.
The channel part is known from calibration, so it moves into the weight: s_j = c_j^(1-alpha), x is divided by s,
W multiplied, and one integer product Z = Xq Wq^T is scaled by token and by output channel.
Cost: calibration O(T I); at run time one fused pass before and one after the integer product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_probability
from quernel.compress._method import Method, Scalar
from quernel.compress.quant._calibration import Calibration, output_error
from quernel.compress.quant._quantized_linears import Decision, QuantizedLinears, example_for
from quernel.nn import DynamicCrossQuantLinear
from quernel.nn.functional.activation_quant import quantization_kernel
from quernel.nn.linear.crossquant import channel_scale

ALPHAS = (0.15, 0.3, 0.5, 0.65, 0.8, 1.0)


def _example() -> dict[str, Any]:
    return example_for(CrossQuant())


@register("crossquant", pillar="compress", contract="method", paper="2410.07505", status="stable", example=_example)
@dataclass(frozen=True)
class CrossQuant(QuantizedLinears):
    """Run linear layers as int8 x int8 products, activation outliers moved into the weight.

    No retraining, one pass over a few batches. Prefer it on transformers whose activations have outlier
    channels and on any CPU with int8 dot products. With ``alpha="auto"`` each layer takes the exponent
    with the least output error on the calibration rows.

    Parameters
    ----------
    wbits, abits : int, default=8
        Bits of weights (4 or 8) and of activations (4 to 8; fewer than 8 are multiplied as int8 codes). Weights in
        4 bits have a scale for 32 inputs (128 from 1024 inputs on); prefer a large ``alpha`` or "auto" with them.
    mode : {"static", "fold", "dynamic"}, default="static"
        "static" divides by the calibrated channel scale inside the quantise pass; "fold" moves that
        division into the norm or linear before, where nothing else reads its output; "dynamic" takes the
        channel maxima from each batch in floating point: the paper's exact formula, for reference only,
        slow, and one sample's result depends on the others.
    percentile : float, default=100
        Of the calibrated channel magnitudes, in (0, 100].
    activations : {"bfloat16", "keep"}, default="bfloat16"
        Dtype between the int8 layers. "bfloat16" casts everything else, as ``Cast`` does; a third of an
        encoder's time goes there otherwise.
    fuse : bool, default=True
        Compute an activation that alone reads a layer's output inside that layer.
    alpha : float or "auto", default=0.15
        Exponent of the token maximum, in [0, 1]; 1 is per-token quantisation.
    row : {"tight", "bound"}, default="tight"
        Row step at run time: max_j |x_ij| / s_j, which never clips, or the paper's t_i^alpha, which must
        clip values beyond the calibrated range.

    Notes
    -----
    The exponent on the channel maximum (0.85 at the default) is more aggressive than SmoothQuant's, and has
    no weight term. Weights at 8 bits bear it. Linear layers that the data never reaches are left alone.

    References
    ----------
    "CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel", arXiv 2410.07505, 2024.

    Examples
    --------
    >>> import torch, quernel
    >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval(), torch.randn(8, 64)
    >>> result = quernel.compress.compress(model, quernel.compress.CrossQuant(), data=[x])
    >>> result.report.layers[0].relative_error < 0.03
    True
    """

    alpha: float | Literal["auto"] = 0.15
    row: Literal["tight", "bound"] = "tight"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha != "auto":
            if isinstance(self.alpha, str):
                raise QuernelError(f'alpha must be "auto" or a number in [0, 1]; got {self.alpha!r}')
            check_probability("alpha", self.alpha)
        check_choice("row", self.row, ("tight", "bound"))
        if self.row == "bound" and self.mode == "fold":
            raise QuernelError('row="bound" needs the token maximum before the division; use mode="static" with it')

    @classmethod
    def menu(cls) -> Sequence[Method]:
        """Return the tuned exponent; folding only changes where a division happens."""
        return (cls(alpha="auto"),)

    def choose(self, weight: Tensor, stats: Calibration) -> tuple[Tensor, Mapping[str, Scalar]]:
        """Return s = c ** (1 - alpha) and the alpha, tuned on the sample if "auto"."""
        absmax = stats.absmax.value.float()
        if self.alpha != "auto":
            return channel_scale(absmax, self.alpha), {"alpha": self.alpha, **self._kernels(stats, self.alpha)}
        errors = {
            a: output_error(stats.sample, weight.cpu(), channel_scale(absmax, a), abits=self.abits, wbits=self.wbits)
            for a in ALPHAS
        }
        best = min(errors, key=lambda a: errors[a])
        details = {"alpha": best, "calibration_error": errors[best], **self._kernels(stats, best)}
        return channel_scale(absmax, best), details

    def layer(self, linear: nn.Linear, decision: Decision, details: Mapping[str, Scalar]) -> nn.Module:
        """Return the int8 layer, or the floating-point reference of ``mode="dynamic"``."""
        if self.mode != "dynamic":
            return super().layer(linear, decision, details)
        return DynamicCrossQuantLinear.from_linear(
            linear, alpha=details["alpha"], wbits=self.wbits, abits=self.abits, activation=decision.activation
        )

    def row_step(self, details: Mapping[str, Scalar]) -> dict[str, Any]:
        """Return alpha, which ``row="bound"`` needs at run time."""
        return {"alpha": details["alpha"], "row": self.row}

    @property
    def simulated(self) -> bool:
        """Whether time is only said to be won: ``mode="dynamic"`` quantises activations in floating point."""
        return self.mode == "dynamic"

    def _kernels(self, stats: Calibration, alpha: float) -> dict[str, Scalar]:
        """Return the share of activations that round to zero, beside that of per-token steps."""
        return {
            "kernel": quantization_kernel(stats.sample, self.abits, "cross", alpha),
            "kernel_per_token": quantization_kernel(stats.sample, self.abits, "token"),
        }
