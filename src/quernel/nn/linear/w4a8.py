"""``W4A8Linear``: 4-bit weights times int8 activations in one integer product (arXiv 2310.04836).

W[o,k] = s1[o] S2[o,G] (q[o,k] - z[o,G]) with small integers S2 and z, so a whole row sums up in int32 and one float
scale a row is left:  y = activation(step * s1 * sum_k S2 (q - z) round(x / step) + bias).
Few tokens read the packed codes, many expand them to int8 once a call.  Bytes about an eighth of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_int, check_type
from quernel.kernels.moments import Gram
from quernel.nn._int8_kernels import ACTIVATIONS
from quernel.nn._stored import StoredLinear
from quernel.nn.functional.activations import FUSIBLE
from quernel.nn.functional.compensated_rounding import compensate as feed_back
from quernel.nn.functional.dual_grained import LEVELS, auto_group_size, dgq_search
from quernel.nn.functional.int8 import MAX_FEATURES
from quernel.nn.weights.int4 import Int4GroupWeight
from quernel.nn.weights.int8 import keep_float32

ACTS = ("token", "static", None)
Act = Literal["token", "static"] | None


def _example() -> dict[str, Any]:
    linear = nn.Linear(40, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.linspace(-9, 9, 240).reshape(6, 40).sin())
        linear.bias.copy_(torch.linspace(-1, 1, 6))
    return {
        "make": lambda: W4A8Linear.from_linear(linear, activation="gelu"),
        "input": lambda generator: (torch.randn(4, 40, generator=generator),),
    }


@register("dgq", pillar="nn", contract="module", paper="2310.04836", status="stable", headline=False, example=_example)
class W4A8Linear(StoredLinear):
    """A linear layer with 4-bit weights that multiplies in integers; made by ``from_linear`` from a trained one.

    Parameters
    ----------
    in_features, out_features : int
        As in ``torch.nn.Linear``; the weight starts as zeros.
    bias : bool, default=True
    group_size : {32, 64, 128}, default=128
        Inputs of a row that share an integer scale.
    act : {"token", "static", None}, default="token"
        Step of the int8 activations: from each row as it comes, or one calibrated number, beyond which values are
        clipped.  None keeps activations in floating point and expands the weight at every call: fewer bytes, but no
        time won.
    activation : {None, "relu", "gelu", "gelu_tanh", "silu"}
        Applied to the output in the same pass.
    scaled : bool, default=False
        Whether the layer has an ``inverse``; it always has with ``act="static"``.

    Notes
    -----
    ``inverse``, shape (in_features,), is multiplied to the input; the weight holds the opposite.  Scales, ``inverse``
    and bias stay float32 when a module around them is cast; the output has the dtype of ``x``.  A row with NaN or
    infinity comes out as NaN.  Gradients are straight-through, to ``x`` and the bias only.

    References
    ----------
    Zhang et al., "Dual Grained Quantization: Efficient Fine-Grained Quantization for LLM", arXiv 2310.04836, 2023.

    Examples
    --------
    >>> import torch
    >>> linear, x = torch.nn.Linear(128, 32), torch.randn(256, 128)
    >>> small = W4A8Linear.from_linear(linear, x)
    >>> bool((small(x) - linear(x)).norm() < 0.1 * linear(x).norm()), small.weight.bits_per_weight < 6
    (True, True)
    """

    weight: Int4GroupWeight
    inverse: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int = 128,
        *,
        act: Act = "token",
        activation: str | None = None,
        scaled: bool = False,
    ) -> None:
        # From this many products of 127 * 127 on, an int32 sum could overflow.
        check_int("in_features", in_features, low=1, high=MAX_FEATURES)
        check_int("out_features", out_features, low=1)
        weight = Int4GroupWeight((out_features, in_features), group_size)
        super().__init__(weight, torch.zeros(out_features) if bias else None)
        self.act = check_choice("act", act, ACTS)
        self.activation = check_choice("activation", activation, tuple(ACTIVATIONS))
        # max|x|^0 is 1: with the row's own maximum out of the step, only ``inverse`` scales.
        self._exponent = 0.0 if act == "static" else None
        self.register_buffer("inverse", torch.ones(in_features) if scaled or act == "static" else None)

    @classmethod
    def from_weight(
        cls,
        weight: Int4GroupWeight,
        bias: Tensor | None = None,
        inverse: Tensor | None = None,
        *,
        act: Act = "token",
        activation: str | None = None,
    ) -> Self:
        """Build a layer around an existing weight, whose columns are already divided by ``inverse``."""
        check_type("weight", weight, Int4GroupWeight)
        if len(weight.shape) != 2:
            raise QuernelError(f"weight must be a matrix (out, in) for {cls.__name__}; got shape {weight.shape}")
        out_features, in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise QuernelError(f"bias must have shape ({out_features},); got {tuple(bias.shape)}")
        if act == "static" and inverse is None:
            raise QuernelError('act="static" needs inverse, one over the calibrated maximum; got None')
        if inverse is not None and tuple(inverse.shape) != (in_features,):
            raise QuernelError(f"inverse must have shape ({in_features},); got {tuple(inverse.shape)}")
        new = cls(
            in_features,
            out_features,
            bias is not None,
            weight.group_size,
            act=act,
            activation=activation,
            scaled=inverse is not None,
        )
        new.weight = weight
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=bias.requires_grad)
        if inverse is not None:
            new.inverse = inverse.detach().float()
        return new

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        X: Tensor | None = None,
        *,
        group_size: int | Literal["auto"] = "auto",
        grid: tuple[int, int] = (20, 80),
        compensate: bool = True,
        act: Act = "token",
        activation: str | None = None,
        strict: bool = False,
    ) -> Self:
        """Quantise a trained layer.

        Parameters
        ----------
        linear : nn.Linear
            Left as it is.
        X : Tensor, shape (..., in_features), optional
            Inputs that the layer will see, a few thousand rows; without them the error of the weight is minimised.
        group_size : {"auto", 32, 64, 128}, default="auto"
            "auto" is 32 below 1024 inputs, else 128.
        grid, strict
            As in ``dgq_search``.
        compensate : bool, default=True
            Round with error feedback where ``X`` is given; False is the paper's rounding to the nearest code.
        act, activation
            See the class; "static" takes its scale from ``X``.

        Raises
        ------
        QuernelError
            If an argument is out of range, or weight or ``X`` hold NaN or infinity.
        """
        check_type("linear", linear, nn.Linear)
        check_finite("linear.weight", linear.weight)
        if act == "static" and X is None:
            raise QuernelError('act="static" takes its scale from X; got None. Pass some inputs of the layer')
        gram = None
        if X is not None:
            seen = Gram(linear.in_features, device=linear.weight.device)
            seen.update(X)
            gram = seen.sum
        size = auto_group_size(linear.in_features) if group_size == "auto" else group_size
        found = dgq_search(linear.weight, gram, size, grid, strict=strict)
        if compensate and gram is not None:
            found = feed_back(linear.weight, gram, found)
        top = float(X.detach().abs().max()) if act == "static" and X is not None else 1.0
        top = top or 1.0  # inputs that are always zero
        inverse = torch.full((linear.in_features,), 1 / top, device=linear.weight.device) if act == "static" else None
        weight = Int4GroupWeight.from_search(replace(found, s1=found.s1 * top))
        new = cls.from_weight(weight, linear.bias, inverse, act=act, activation=activation)
        return new.train(linear.training)

    #: The name of the authors' code and of torch's own quantised layers.
    from_float = from_linear

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``activation(x @ W.T + bias)``."""
        if self.act is not None:
            return self.weight.linear(
                x, self.bias, inverse=self.inverse, levels=LEVELS, alpha=self._exponent, activation=self.activation
            )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.dequantize().to(x.dtype), bias)
        return y if self.activation is None else FUSIBLE[self.activation](y)

    def dequantize(self) -> Tensor:
        """Return the weight that stands for the original one, shape (out_features, in_features), float32."""
        weight = self.weight.dense()
        return weight if self.inverse is None else weight * self.inverse

    def unpack_int8(self) -> Tensor:
        """Return ``S2 * (q - z)``, shape (out_features, in_features), int8."""
        return self.weight.unpack_int8()

    def config(self) -> dict[str, Any]:
        """Return weight, bias and modes."""
        modes = {"act": self.act, "activation": self.activation, "scaled": self.inverse is not None}
        return super().config() | modes

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        weight, bias = cls._parts(config)
        inverse = torch.ones(weight.shape[1]) if config["scaled"] else None
        return cls.from_weight(weight, bias, inverse, act=config["act"], activation=config["activation"])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show features, groups, bits and modes."""
        weight = self.weight
        parts = [super().extra_repr(), f"group_size={weight.group_size}", f"bits/weight={weight.bits_per_weight:.2f}"]
        parts += [f"act={self.act!r}"]
        return ", ".join([*parts, f"activation={self.activation!r}"] if self.activation else parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_float32(fn), recurse)  # type: ignore[no-untyped-call]
