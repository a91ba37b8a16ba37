"""``SNNKAdapter``: fine-tune a frozen model through a few random features a layer (arXiv 2310.13225).

x + up(A Phi(x)), Phi fixed ReLU features: trained are A (r m numbers) and ``up``, a zero-initialised linear layer from
r to d or, with r = d, a zero-initialised vector. At step 0 the model computes exactly what it did before.
m = 8 to 32 at d = 768 are 6,000 to 25,000 trained numbers an adapter; a bottleneck of 64 has 99,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._module_tree import is_registered
from quernel._plain_layers import is_plain_layer
from quernel._registry import register
from quernel._validate import check_int, check_type
from quernel.kernels.features.orthogonal import Projection
from quernel.nn._described import layer_config, layer_from_config
from quernel.nn._replace import replace_module
from quernel.nn.linear.low_rank import LowRankLinear
from quernel.nn.linear.snnk import Kind, SNNKLinear
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES

# Their eval forward hands the children's raw weights to one fused call, past anything that stands in their place.
_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


def _example() -> dict[str, Any]:
    def make() -> SNNKAdapter:
        generator = torch.Generator().manual_seed(0)
        adapter = SNNKAdapter(6, n_features=8, down=3, ln_before=True, generator=generator)
        with torch.no_grad():
            for parameter in adapter.up.parameters():
                parameter.normal_(generator=generator)
        return adapter

    return {"make": make, "input": lambda generator: (torch.randn(4, 6, generator=generator),)}


@register("snnk", pillar="nn", contract="module", paper="2310.13225", status="stable", headline=False, example=_example)
class SNNKAdapter(nn.Module):
    """A residual adapter over fixed random features; the identity until trained.

    Parameters
    ----------
    dim : int
        Size d of input and output.
    n_features : int, default=16
        Random features m.
    down : int, optional
        Rows r of A; then ``up`` is a linear layer from r to d. Default: r = d, and ``up`` is a vector.
    ln_before : bool, default=False
        Normalise the features' input to mean 0 and variance 1 first, without trained numbers.
    kind, projection, device, dtype, generator
        As for ``SNNKLinear``.

    Notes
    -----
    Trained numbers: d m + d without ``down``, r m + r d + d with it. The directions are a buffer.

    References
    ----------
    Sehanobish et al., "Scalable Neural Network Kernels", arXiv 2310.13225, 2023.

    Examples
    --------
    >>> import torch
    >>> adapter, x = SNNKAdapter(64, n_features=8), torch.ones(2, 64)
    >>> torch.equal(adapter(x), x), sum(p.numel() for p in adapter.parameters())
    (True, 576)
    """

    def __init__(
        self,
        dim: int,
        n_features: int = 16,
        down: int | None = None,
        ln_before: bool = False,
        *,
        kind: Kind = "relu",
        projection: Projection = "orthogonal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_int("dim", dim, low=1)
        down = None if down is None else check_int("down", down, low=1)
        snnk = SNNKLinear(
            dim,
            down or dim,
            n_features,
            bias=False,
            kind=kind,
            projection=projection,
            device=device,
            dtype=dtype,
            generator=generator,
        )
        self._hold(snnk, down, ln_before)

    def _hold(self, snnk: SNNKLinear, down: int | None, ln_before: bool) -> None:
        super().__init__()
        self.dim, self.down, self.ln_before = snnk.in_features, down, check_type("ln_before", ln_before, bool)
        self.snnk = snnk
        options: dict[str, Any] = {"dtype": snnk.weight.dtype, "device": snnk.weight.device}
        if down is None:
            self.scale = nn.Parameter(torch.zeros(self.dim, **options))
        else:
            self.up = nn.Linear(down, self.dim, device="meta", dtype=snnk.weight.dtype)
            # Made here and not by nn.Linear, which would draw values only to have them zeroed.
            self.up.weight = nn.Parameter(torch.zeros(self.dim, down, **options))
            self.up.bias = nn.Parameter(torch.zeros(self.dim, **options))

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        """Return ``x + up(A Phi(x))``."""
        inner = self.snnk(F.layer_norm(x, (self.dim,)) if self.ln_before else x)
        if self.down is None:
            return x + inner * self.scale.to(x.dtype)
        return x + F.linear(inner, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))

    def config(self) -> dict[str, Any]:
        """Return sizes, kinds and dtype."""
        return {
            "dim": self.dim,
            "n_features": self.snnk.n_features,
            "down": self.down,
            "ln_before": self.ln_before,
            "kind": self.snnk.kind,
            "projection": self.snnk.phi.projection,
            "dtype": dtype_name(self.snnk.weight.dtype),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty adapter from ``config()``."""
        down = config["down"]
        shared = {name: config[name] for name in ("n_features", "kind", "projection", "dtype")}
        out = check_int("dim", config["dim"], low=1) if down is None else check_int("down", down, low=1)
        rest = {"in_features": config["dim"], "out_features": out, "bias": False, "threshold": 0.0, "activation": None}
        new = cls.__new__(cls)
        new._hold(SNNKLinear.from_config({**shared, **rest}), down, config["ln_before"])
        return new

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.dim}, n_features={self.snnk.n_features}, down={self.down}, ln_before={self.ln_before}"


def _adapted_example() -> dict[str, Any]:
    def make() -> AdaptedLinear:
        generator = torch.Generator().manual_seed(0)
        linear = LowRankLinear(7, 5, 3, generator=generator)
        adapter = SNNKAdapter(5, n_features=8, generator=generator)
        with torch.no_grad():
            adapter.scale.normal_(generator=generator)
        return AdaptedLinear(linear, adapter)

    return {"make": make, "input": lambda g: (torch.randn(4, 7, generator=g),)}


@register(
    "snnk",
    pillar="nn",
    contract="module",
    paper="2310.13225",
    status="stable",
    headline=False,
    example=_adapted_example,
)
class AdaptedLinear(nn.Module):
    """A layer with an adapter behind it, in the layer's place.

    Parameters
    ----------
    linear : nn.Module
        ``nn.Linear`` or a registered layer such as ``CrossQuantLinear``.
    adapter : SNNKAdapter
        Of the layer's output size.
    """

    # It has no ``weight``: what reads a layer's raw weight would leave the adapter out, and must fail instead.

    def __init__(self, linear: nn.Module, adapter: SNNKAdapter) -> None:
        super().__init__()
        if not (is_plain_layer(linear) or is_registered(linear)):
            raise QuernelError(f"linear must be nn.Linear or a registered layer; got {type(linear).__name__}")
        check_type("adapter", adapter, SNNKAdapter)
        if getattr(linear, "out_features", None) != adapter.dim:
            raise QuernelError(f"adapter has size {adapter.dim}, which does not fit the output of {linear}")
        self.linear, self.adapter = linear, adapter

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``adapter(linear(x))``."""
        y: Tensor = self.adapter(self.linear(x))
        return y

    def config(self) -> dict[str, Any]:
        """Return the configs of both parts."""
        return {"linear": layer_config(self.linear), "adapter": self.adapter.config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer and adapter from ``config()``."""
        return cls(layer_from_config(config["linear"]), SNNKAdapter.from_config(config["adapter"]))


def add_snnk_adapters(
    model: nn.Module,
    targets: Sequence[str] = ("output.dense",),
    *,
    n_features: int = 16,
    down: int | None = None,
    ln_before: bool = False,
    projection: Projection = "orthogonal",
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Freeze a model and put an adapter behind each of its layers whose name ends in one of ``targets``.

    Parameters
    ----------
    model : nn.Module
        Edited in place. Its outputs do not change until the adapters are trained.
    targets : sequence of str, default=("output.dense",)
        Ends of names of linear layers, whole parts only. The default adapts the attention output and the
        feed-forward output of BERT-like encoders, as Houlsby et al. do.
    n_features, down, ln_before, projection, generator
        As for ``SNNKAdapter``.

    Returns
    -------
    parameters : list of nn.Parameter
        What is left to train, without what the caller adds (a head).

    Raises
    ------
    QuernelError
        If no layer matches, one matches that is no linear layer, or torch's fused attention would bypass it; the
        model is unharmed then.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> parameters = add_snnk_adapters(model, targets=("0",), n_features=8)
    >>> type(model[0]).__name__, sum(p.numel() for p in parameters)
    ('AdaptedLinear', 72)
    """
    if isinstance(targets, str):
        raise QuernelError(f"targets must be a sequence of name endings; got one string, wrap it: ({targets!r},)")
    found = [
        (name, module)
        for name, module in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    if not found:
        raise QuernelError(f"no module of {type(model).__name__} has a name that ends in {', '.join(targets)}")
    for name, module in found:
        if type(module) is not nn.Linear and not (is_registered(module) and hasattr(module, "out_features")):
            raise QuernelError(f"{name!r} is a {type(module).__name__}; targets must name linear layers")
        parents = [model.get_submodule(name[:i]) for i, c in enumerate(name) if c == "."]
        if any(isinstance(parent, _FUSED) for parent in (model, *parents)):
            raise QuernelError(f"{name!r} stands in torch's fused attention, which reads its weight past an adapter")
    made = [
        AdaptedLinear(module, _adapter_for(module, generator, n_features, down, ln_before, projection))
        for _, module in found
    ]
    model.requires_grad_(False)
    # Gradients of before would be applied by the first step of an optimiser that holds every parameter.
    model.zero_grad(set_to_none=True)
    for (name, _), new in zip(found, made, strict=True):
        replace_module(model, name, new)
    return [parameter for new in made for parameter in new.adapter.parameters()]


def _adapter_for(
    module: nn.Module,
    generator: torch.Generator | None,
    n_features: int,
    down: int | None,
    ln_before: bool,
    projection: Projection,
) -> SNNKAdapter:
    first = next((p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()), None)
    return SNNKAdapter(
        int(module.out_features),  # type: ignore[arg-type]
        n_features,
        down,
        ln_before,
        projection=projection,
        device=None if first is None else first.device,
        dtype=first.dtype if first is not None and first.dtype in DTYPES.values() else None,
        generator=generator,
    )
