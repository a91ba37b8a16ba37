"""``SNNKLinear``: a layer y = A Phi(x) + b over fixed random features, in place of f(W x + b) (arXiv 2310.13225).

ReLU features Phi(x) = m^-1/2 max(G (x - mean), c), G fixed; or universal random features, whose A = Psi(W, b) makes
A Phi(x) an estimate of f(W x + b) itself. Trained or fitted in closed form is A alone: l m numbers instead of l d.
A linear layer behind it multiplies into A (``bundle``), so linear -> activation -> linear becomes one product.
Cost a row: m d + l m multiply-adds, less than l d for m < l d / (l + d); with Hadamard directions m d becomes m log d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int, check_type
from quernel.kernels.features.orthogonal import Projection
from quernel.kernels.features.universal import spectrum_of
from quernel.kernels.moments import Moments
from quernel.kernels.normal_equations import LinearSolution, NormalEquations
from quernel.nn.functional.activations import FUSIBLE
from quernel.nn.linear._snnk_features import ReLUFeatures, UniversalFeatures, make_features
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES

Kind = Literal["relu", "urf"]
Activation = str | Callable[[Tensor], Tensor] | None


def _example() -> dict[str, Any]:
    return {
        "make": lambda: SNNKLinear(7, 5, 12, generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(4, 7, generator=generator),),
    }


@register("snnk", pillar="nn", contract="module", paper="2310.13225", status="stable", headline=False, example=_example)
class SNNKLinear(nn.Module):
    """A trainable linear map over fixed random features of the input.

    Parameters
    ----------
    in_features, out_features : int
        Sizes d and l, as in ``torch.nn.Linear``.
    n_features : int
        Columns m of the trainable matrix; even for ``kind="urf"``.
    bias : bool, default=True
        Whether to add a trained vector.
    kind : {"relu", "urf"}, default="relu"
        ReLU features: robust, for any activation once trained or fitted. "urf" estimates the activation itself, for
        inputs and weights of length near 1.
    projection : {"orthogonal", "gaussian", "hadamard"}, default="orthogonal"
        How the fixed directions are drawn; "hadamard" stores 3 signs a feature instead of d numbers.
    threshold : float, default=0.0
        c of max(G x, c), for ``kind="relu"``.
    activation : str, optional
        For "urf": "cos" (default), "sin" or "gauss". For "relu": what ``from_linear`` took over, kept for reports.
    damping : float or "auto", default="auto"
        For "urf": the paper's M; "auto" is best for inputs and weights of length 1.
    device, dtype : optional
        As in ``torch.nn.Linear``.
    generator : torch.Generator, optional
        For directions and initial values; default is torch's own.

    Raises
    ------
    QuernelError
        If a size is out of range, or the activation has no integrable Fourier transform while ``kind="urf"``.

    Notes
    -----
    Initial values: A = Phi(W0) or Psi(W0, b0), with W0 and b0 drawn as ``torch.nn.Linear`` draws them. The ReLU form
    does *not* approximate relu(W x): its kernel is half the order-1 arc-cosine one, and A must be trained or fitted.

    References
    ----------
    Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, 2023.

    Examples
    --------
    >>> import torch
    >>> linear, x = torch.nn.Linear(16, 32), torch.linspace(-1, 1, 4096).reshape(256, 16)
    >>> layer = SNNKLinear.from_linear(linear, "gelu", n_features=64, data=x)
    >>> wanted = torch.nn.functional.gelu(linear(x))
    >>> layer(x).shape, bool((layer(x) - wanted).norm() < 0.1 * wanted.norm())
    (torch.Size([256, 32]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_features: int,
        bias: bool = True,
        *,
        kind: Kind = "relu",
        projection: Projection = "orthogonal",
        threshold: float = 0.0,
        activation: str | None = None,
        damping: float | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_choice("dtype", dtype, tuple(DTYPES.values()))
        phi = make_features(kind, in_features, n_features, projection, dtype, threshold, activation, damping)
        self._hold(phi, out_features, bias, activation, dtype)
        where = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=where))
        phi.draw(np.random.default_rng(seed))
        self.reset_parameters(generator)
        self.to(device)

    def _hold(
        self,
        phi: ReLUFeatures | UniversalFeatures,
        out_features: int,
        bias: bool,
        activation: str | None,
        dtype: torch.dtype,
    ) -> None:
        """Make the layer around a feature map, weights zero."""
        super().__init__()
        self.phi = phi
        self.in_features, self.n_features = phi.in_features, phi.n_features
        self.out_features = check_int("out_features", out_features, low=1)
        if isinstance(phi, UniversalFeatures):
            self.activation: str | None = phi.activation
        else:
            self.activation = check_choice("activation", activation, (None, *FUSIBLE))
        options: dict[str, Any] = {"dtype": dtype, "device": next(phi.buffers()).device}
        self.weight = nn.Parameter(torch.zeros(out_features, phi.n_features, **options))
        self.bias = nn.Parameter(torch.zeros(out_features, **options)) if check_type("bias", bias, bool) else None

    @property
    def kind(self) -> str:
        """Kind of the features: "relu" or "urf"."""
        return self.phi.kind

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values of the trainable tensors; the directions stay."""
        bound = self.in_features**-0.5
        where = "cpu" if generator is None else generator.device
        w = torch.empty(self.out_features, self.in_features, device=where).uniform_(-bound, bound, generator=generator)
        b = torch.empty(self.out_features, device=where).uniform_(-bound, bound, generator=generator)
        self._estimate(w.to(self.weight.device), None if self.bias is None else b.to(self.weight.device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        activation: Activation,
        n_features: int,
        *,
        data: Tensor | Iterable[Tensor] | None = None,
        kind: Kind = "relu",
        projection: Projection = "orthogonal",
        threshold: float = 0.0,
        alpha: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Return a layer in place of ``activation(linear(x))``.

        Parameters
        ----------
        linear : nn.Linear
            Left as it is.
        activation : str, callable or None
            "gelu", "gelu_tanh", "relu", "silu"; "cos", "sin", "gauss"; any function of a tensor; None for none.
        n_features : int
            Columns m.
        data : Tensor (..., d), or re-iterable of them, optional
            Inputs to fit on in closed form. Without it A is Psi(W, b): an estimate of the activation with
            ``kind="urf"``, and a mere starting point, useless untrained, with "relu".
        kind, projection, threshold, generator
            As in the constructor.
        alpha : float, default=1e-3
            Regularisation of the fit, relative to the mean variance of the features.
        """
        check_type("linear", linear, nn.Linear)
        if data is not None and not isinstance(data, Tensor) and iter(data) is data:
            raise QuernelError(f"data must be readable more than once; got a {type(data).__name__}. Pass a list")
        function = activation_function(activation)
        if kind == "urf":
            spectrum_of(activation if isinstance(activation, str) else repr(activation))
        layer = cls(
            linear.in_features,
            linear.out_features,
            n_features,
            kind=kind,
            projection=projection,
            threshold=threshold,
            activation=activation if isinstance(activation, str) and (kind == "urf" or activation in FUSIBLE) else None,
            dtype=linear.weight.dtype,
            generator=generator,
        ).to(linear.weight.device)
        with torch.no_grad():
            if data is None:
                layer._estimate(linear.weight, linear.bias)
            else:
                batches = [data] if isinstance(data, Tensor) else data
                layer.set_center(batches)
                layer.fit(((x, function(linear(x))) for x in batches), alpha=alpha)
        return layer.train(linear.training)

    @torch.no_grad()
    def set_center(self, inputs: Iterable[Tensor]) -> None:
        """Take ReLU features about the mean of ``inputs`` (..., d) from now on; "urf" has no centre to set."""
        if isinstance(self.phi, ReLUFeatures):
            seen = Moments(self.in_features, device=self.weight.device)
            for x in inputs:
                seen.update(x)
            self.phi.set_center(seen.mean)

    @torch.no_grad()
    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]], *, alpha: float = 1e-3) -> LinearSolution:
        """Set weight and bias to the ridge regression of targets on the features, in one pass.

        Parameters
        ----------
        pairs : iterable of (Tensor (..., d), Tensor (..., l))
            Inputs, and what the layer should answer.
        alpha : float, default=1e-3
            Regularisation relative to the mean variance of the features.

        Returns
        -------
        solution : LinearSolution
            With the relative error on the pairs.
        """
        sums = NormalEquations(self.n_features, self.out_features, device=self.weight.device)
        for x, y in pairs:
            sums.update(self.phi(x), y)
        solution = sums.solve(alpha, intercept=self.bias is not None)
        self.set_solution(solution.weight, solution.intercept)
        return solution

    @torch.no_grad()
    def set_solution(self, weight: Tensor, bias: Tensor) -> None:
        """Copy weight (l, m) and, if the layer has one, bias (l,)."""
        self.weight.copy_(weight)
        if self.bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def bundle(self, following: nn.Linear) -> SNNKLinear:
        """Return one layer that computes ``following(self(x))``: V (A Phi + b) + c = (V A) Phi + (V b + c).

        Parameters
        ----------
        following : nn.Linear
            Reads this layer's output, with nothing in between.

        Returns
        -------
        layer : SNNKLinear
            Shares the fixed features with this one.
        """
        check_type("following", following, nn.Linear)
        if following.in_features != self.out_features:
            raise QuernelError(f"following must read {self.out_features} features; it reads {following.in_features}")
        v = following.weight.double()
        shift = v.new_zeros(len(v)) if self.bias is None else v @ self.bias.double()
        shift = shift if following.bias is None else shift + following.bias.double()
        biased = self.bias is not None or following.bias is not None
        new = SNNKLinear.over(self.phi, following.out_features, biased, dtype=self.weight.dtype)
        new.set_solution(v @ self.weight.double(), shift)
        return new.train(self.training)

    @classmethod
    def over(
        cls,
        phi: ReLUFeatures | UniversalFeatures,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build a layer of zeros around existing features, shared with whoever else holds them."""
        new = cls.__new__(cls)  # __init__ would draw features only to drop them
        new._hold(phi, out_features, bias, activation, torch.get_default_dtype() if dtype is None else dtype)
        return new

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``Phi(x) @ weight.T + bias`` in the dtype of ``x``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.phi(x), self.weight.to(x.dtype), bias)

    def config(self) -> dict[str, Any]:
        """Return sizes, kinds and dtypes."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "n_features": self.n_features,
            "bias": self.bias is not None,
            "kind": self.kind,
            "projection": self.phi.projection,
            "threshold": getattr(self.phi, "threshold", 0.0),
            "activation": self.activation,
            "dtype": dtype_name(self.weight.dtype),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        dtype = DTYPES[check_choice("dtype", config["dtype"], tuple(DTYPES))]
        phi = make_features(
            config["kind"],
            config["in_features"],
            config["n_features"],
            config["projection"],
            dtype,
            config["threshold"],
            config["activation"],
        )
        return cls.over(phi, config["out_features"], config["bias"], config["activation"], dtype=dtype)

    def extra_repr(self) -> str:
        """Show sizes and kind."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_features={self.n_features}, "
            f"bias={self.bias is not None}, kind={self.kind}"
        )

    @torch.no_grad()
    def _estimate(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set A to the weights' side of the features: Psi(W, b), which holds the bias, or Phi(W) beside it."""
        universal = isinstance(self.phi, UniversalFeatures)
        psi = self.phi.of_weights(weight, bias)
        rest = self.weight.new_zeros(self.out_features) if universal or bias is None else bias
        self.set_solution(psi, rest)


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Return what an activation computes, from its name or as it is."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        **FUSIBLE,
        "cos": torch.cos,
        "sin": torch.sin,
        "gauss": lambda z: (-0.5 * z.square()).exp(),
    }
    if activation is None:
        return lambda z: z
    if callable(activation):
        return activation
    return known[check_choice("activation", activation, tuple(known))]
