"""``CrossQuantLinear``: int8 or 4-bit weights times int8 activations in one integer product (arXiv 2410.07505).

The paper's step t_i^alpha c_j^(1-alpha) / q depends on the summed axis j, so its column part s_j = c_j^(1-alpha),
known from calibration, is folded into the weight before that is rounded:

    Y_ik = step_i v_k (sum_j Xq_ij Wq_kj) + b_k,   Xq = round(x_ij / s_j / step_i),   v_k Wq_kj ~= s_j W_kj.

Cost: one int8 GEMM, one pass over x and one over y; bytes a quarter (or an eighth) of float32 plus 4 (in + 2 out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int, check_probability, check_type
from quernel.nn._int8_kernels import ACTIVATIONS
from quernel.nn._stored import StoredLinear
from quernel.nn.functional.int8 import MAX_FEATURES, apply_int8_linear, levels_of
from quernel.nn.weights.int4 import Int4GroupWeight
from quernel.nn.weights.int8 import Int8Weight, keep_float32

# Smallest maximum, as a share of the median one, that a channel's scale is made from.
FAINT = 1e-5


def channel_scale(absmax: Tensor, alpha: float) -> Tensor:
    """Return ``s = absmax ** (1 - alpha)``, shape (in_features,), float32; dead channels get a typical one.

    Raises
    ------
    QuernelError
        If ``absmax`` is not a finite, non-negative vector or ``alpha`` lies outside [0, 1].
    """
    check_probability("alpha", alpha)
    check_type("absmax", absmax, Tensor)
    check_finite("absmax", absmax)
    if absmax.ndim != 1 or bool((absmax < 0).any()):
        raise QuernelError(
            "absmax must be a vector of largest magnitudes, one an input channel, none negative; "
            f"got shape {tuple(absmax.shape)}. Take x.abs() before the maximum"
        )
    alive = absmax > 0
    if not bool(alive.any()):
        return torch.ones_like(absmax, dtype=torch.float32)
    maxima = absmax.float()
    typical = maxima[alive].median()
    # Calibration knows nothing about a channel that never moved. A tiny scale would erase its weights, and were it to
    # move after all, the division would let it drown its whole row; so it counts as a typical one.
    scale = torch.where(alive, maxima.clamp_min(FAINT * typical), typical) ** (1 - alpha)
    return scale.clamp_min(torch.finfo(torch.float32).tiny)  # its reciprocal must be finite


def _example() -> dict[str, Any]:
    linear = nn.Linear(24, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-1, 1, 144).reshape(6, 24).sin())
        linear.bias.copy_(torch.linspace(-1, 1, 6))
    return {
        "make": lambda: CrossQuantLinear.from_linear(linear, torch.linspace(0.5, 4, 24), activation="gelu"),
        "input": lambda generator: (torch.randn(4, 24, generator=generator),),
    }


@register(
    "crossquant",
    pillar="nn",
    contract="module",
    paper="2410.07505",
    status="stable",
    headline=False,
    example=_example,
)
class CrossQuantLinear(StoredLinear):
    """A linear layer that multiplies in int8; made by ``from_linear`` from a trained one.

    Parameters
    ----------
    weight : Int8Weight or Int4GroupWeight, shape (out_features, in_features)
        The rounded weight, its columns already multiplied by ``s``.
    bias : Tensor, shape (out_features,), optional
    inverse : Tensor, shape (in_features,), optional
        ``1 / s``; None where the producer of ``x`` divides already, or ``s`` is 1.
    alpha : float, default=0.15
        Exponent of the row maximum; used at run time by ``row="bound"`` only.
    abits : int, default=8
        Bits of the activation codes, 4 to 8 (stored in int8 in any case).
    row : {"tight", "bound"}, default="tight"
        Row step from the largest entry of ``x / s``, which never clips; or the paper's ``max|x|^alpha / q``, which
        clips where a value exceeds what calibration saw.
    activation : {None, "relu", "gelu", "gelu_tanh", "silu"}
        Applied to the output in the same pass.

    Notes
    -----
    Scales, ``inverse`` and bias stay float32 when a module around them is cast; the output has the dtype of ``x``.
    A row with NaN or infinity comes out as NaN.  Gradients are straight-through, to ``x`` and the bias only.

    References
    ----------
    "CrossQuant: A Post-Training Quantization Method with Smaller Quantization Kernel for Precise Large Language Model
    Compression", arXiv 2410.07505, 2024.  The integer factorisation is ours: the paper quantises in floating point.

    Examples
    --------
    >>> import torch
    >>> linear, x = torch.nn.Linear(64, 32), torch.randn(8, 64)
    >>> quantised = CrossQuantLinear.from_linear(linear, x.abs().amax(0))
    >>> bool((quantised(x) - linear(x)).norm() < 0.02 * linear(x).norm())
    True
    """

    weight: Int8Weight | Int4GroupWeight
    inverse: Tensor | None

    def __init__(
        self,
        weight: Int8Weight | Int4GroupWeight,
        bias: Tensor | None = None,
        inverse: Tensor | None = None,
        *,
        alpha: float = 0.15,
        abits: int = 8,
        row: Literal["tight", "bound"] = "tight",
        activation: str | None = None,
    ) -> None:
        check_type("weight", weight, (Int8Weight, Int4GroupWeight))
        super().__init__(weight, bias)
        if self.in_features > MAX_FEATURES:
            raise QuernelError(
                f"in_features must be at most {MAX_FEATURES} for exact int32 sums; got {self.in_features}"
            )
        if inverse is not None and tuple(inverse.shape) != (self.in_features,):
            raise QuernelError(f"inverse must have shape ({self.in_features},); got {tuple(inverse.shape)}")
        self.alpha = check_probability("alpha", alpha)
        self.abits = check_int("abits", abits)
        self.row = check_choice("row", row, ("tight", "bound"))
        self.activation = check_choice("activation", activation, tuple(ACTIVATIONS))
        self._levels = levels_of(abits)
        self._exponent = self.alpha if row == "bound" else None
        self.register_buffer("inverse", None if inverse is None else inverse.detach().float())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        absmax: Tensor,
        alpha: float = 0.15,
        wbits: int = 8,
        abits: int = 8,
        bias: bool = True,
        *,
        row: Literal["tight", "bound"] = "tight",
        activation: str | None = None,
    ) -> Self:
        """Quantise a trained layer.

        Parameters
        ----------
        linear : nn.Linear
            Left as it is.
        absmax : Tensor, shape (in_features,)
            Largest magnitude of each input channel on calibration data.  Ones where the producer of the input
            divides by the scale already.
        alpha : float, default=0.15
            In [0, 1]: 1 quantises rows only, less moves more of the channels' range into the weight.
        wbits : {4, 8}, default=8
            Bits of the stored weight; 4 has a scale for 32 inputs (128 from 1024 inputs on), 8 one a row.
        abits : int, default=8
            4 to 8.
        bias : bool, default=True
            Whether to keep the layer's bias.
        row, activation
            See the class.

        Raises
        ------
        QuernelError
            If an argument is out of range, or weight or ``absmax`` hold NaN or infinity.
        """
        check_type("linear", linear, nn.Linear)
        if linear.weight.ndim != 2:
            raise QuernelError(f"linear.weight must have two dimensions; got shape {tuple(linear.weight.shape)}")
        scale = channel_scale(absmax, alpha)
        if tuple(scale.shape) != (linear.in_features,):
            raise QuernelError(
                f"absmax must have shape ({linear.in_features},), one entry an input channel; got {tuple(scale.shape)}"
            )
        options: dict[str, Any] = {"wbits": wbits, "abits": abits, "bias": bias, "row": row, "activation": activation}
        return cls.from_scale(linear, scale, alpha=alpha, **options)

    @classmethod
    def from_scale(
        cls,
        linear: nn.Linear,
        scale: Tensor,
        *,
        alpha: float = 1.0,
        wbits: int = 8,
        abits: int = 8,
        bias: bool = True,
        row: Literal["tight", "bound"] = "tight",
        activation: str | None = None,
    ) -> Self:
        """Quantise a trained layer with channel scales chosen by any rule.

        Parameters
        ----------
        linear : nn.Linear
            Left as it is.
        scale : Tensor, shape (in_features,)
            Positive; the input is divided by it and the weight multiplied.
        alpha : float, default=1.0
            Exponent of the row maximum for ``row="bound"``, in [0, 1].
        wbits, abits, bias, row, activation
            As in ``from_linear``.
        """
        check_choice("wbits", wbits, (4, 8))
        check_finite("scale", scale)
        if tuple(scale.shape) != (linear.in_features,) or bool((scale <= 0).any()):
            raise QuernelError(
                f"scale must be positive with shape ({linear.in_features},); got shape {tuple(scale.shape)}"
            )
        scale = scale.detach().float().to(linear.weight.device)
        kind: type[Int8Weight | Int4GroupWeight] = Int8Weight if wbits == 8 else Int4GroupWeight
        weight = kind.from_dense(linear.weight.detach().float() * scale)
        kept = linear.bias if bias else None
        if kept is not None:
            kept = nn.Parameter(kept.detach().float().clone(), requires_grad=kept.requires_grad)
        inverse = None if bool((scale == 1).all()) else scale.reciprocal()
        new = cls(weight, kept, inverse, alpha=alpha, abits=abits, row=row, activation=activation)
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``activation(x @ W.T + bias)``."""
        weight, levels, exponent = self.weight, self._levels, self._exponent
        if isinstance(weight, Int4GroupWeight):
            return weight.linear(
                x, self.bias, inverse=self.inverse, levels=levels, alpha=exponent, activation=self.activation
            )
        return apply_int8_linear(
            x, weight.codes, weight.scale, self.bias, self.inverse, levels, exponent, self.activation
        )

    def config(self) -> dict[str, Any]:
        """Return weight, bias, bits and modes."""
        return super().config() | {
            "smooth": self.inverse is not None,
            "alpha": self.alpha,
            "abits": self.abits,
            "row": self.row,
            "activation": self.activation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        options = {name: config[name] for name in ("alpha", "abits", "row", "activation")}
        weight, bias = cls._parts(config)
        inverse = torch.ones(weight.shape[1]) if config["smooth"] else None
        return cls(weight, bias, inverse, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show features, bits and modes."""
        parts = [super().extra_repr(), f"abits={self.abits}", f"row={self.row!r}"]
        return ", ".join([*parts, f"activation={self.activation!r}"] if self.activation else parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]
