"""What factorised convolutions share, transposed or not: filters, initial values, ways to and from torch's layers.

Parameters: ``channel`` (out, rank, in) and one ``spatial`` tensor (out, rank, k) a direction; their products, summed
over the rank, are the kernel (``nn.functional.one_way_conv``).  Torch's own layer, empty on meta, checks the geometry.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._plain_layers import check_fields
from quernel._validate import check_choice, check_int, check_type
from quernel.nn.functional.one_way import one_way_kernel
from quernel.nn.functional.one_way_fit import fit_one_way
from quernel.nn.weights._base import dtype_name
from quernel.nn.weights.dense import DTYPES

Size = int | tuple[int, ...]
Init = Literal["dirac", "kaiming"]
# Deviation of the spatial filters around the unit impulse that "dirac" starts from.
IMPULSE_NOISE = 0.1
CONVS: tuple[type[Any], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OneWayLayer(nn.Module):
    """Base of the factorised layers; a subclass names torch's layer, its geometry, its flags, and convolves."""

    plain: ClassVar[type[Any]]
    geometry: ClassVar[tuple[str, ...]]
    flags: ClassVar[tuple[str, ...]]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    bias: nn.Parameter | None
    shared = False
    normalize = False
    memory_efficient = True

    def _build(
        self,
        channels: tuple[int, int],
        geometry: dict[str, Any],
        rank: int,
        bias: bool,
        init: str,
        flags: dict[str, bool],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Set up geometry and parameters; their values are left undefined."""
        nn.Module.__init__(self)
        self.in_channels = check_int("in_channels", channels[0], low=1)
        self.out_channels = check_int("out_channels", channels[1], low=1)
        self.rank = check_int("rank", rank, low=1)
        self.init = check_choice("init", init, ("dirac", "kaiming"))
        check_type("bias", bias, bool)
        for name in self.flags:
            setattr(self, name, check_type(name, flags[name], bool))
        self._take_geometry(geometry)
        filters = self.in_channels if self.shared else self.out_channels

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.channel = empty(self.out_channels, self.rank, self.in_channels)
        self.spatial = nn.ParameterList([empty(filters, self.rank, k) for k in self.kernel_size])
        self.register_parameter("bias", empty(self.out_channels) if bias else None)

    def _take_geometry(self, geometry: dict[str, Any]) -> None:
        for field, value in geometry.items():
            if isinstance(value, tuple | list) and len(value) != self._dims():
                raise QuernelError(f"{field} must be one number or {self._dims()}; got {value!r}")
        try:
            plain = self.plain(self.in_channels, self.out_channels, bias=False, device="meta", **geometry)
        except (TypeError, ValueError, RuntimeError) as error:
            raise QuernelError(str(error)) from error
        for field in self.geometry:
            value = getattr(plain, field)
            if not isinstance(value, str):
                value = tuple(check_int(field, number, low=0 if "padding" in field else 1) for number in value)
            setattr(self, field, value)

    @classmethod
    def _dims(cls) -> int:
        return int(cls.plain.__name__[-2])

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values: channel filters of variance 2 / (in rank), spatial filters as ``init`` says."""
        with torch.no_grad():
            self.channel.normal_(0, math.sqrt(2 / (self.in_channels * self.rank)), generator=generator)
            for filters in self.spatial:
                k = filters.shape[2]
                filters.normal_(0, IMPULSE_NOISE if self.init == "dirac" else k**-0.5, generator=generator)
                if self.init == "dirac":
                    filters[..., (k - 1) // 2] += 1
            if self.bias is not None:
                bound = (self.in_channels * math.prod(self.kernel_size)) ** -0.5
                self.bias.uniform_(-bound, bound, generator=generator)

    def filters(self, dtype: torch.dtype | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the channel filters and, of unit length if ``normalize``, the spatial ones."""
        spatial = tuple(self.spatial)
        if self.normalize:
            tiny = torch.finfo(self.channel.dtype).tiny
            spatial = tuple(s / s.norm(dim=2, keepdim=True).clamp_min(tiny) for s in spatial)
        dtype = self.channel.dtype if dtype is None else dtype
        return self.channel.to(dtype), tuple(s.to(dtype) for s in spatial)

    def kernel(self) -> Tensor:
        """Return the dense kernel in the layout of torch's layer; differentiable."""
        return self._layout(one_way_kernel(*self.filters(), shared=self.shared))

    def _layout(self, kernel: Tensor) -> Tensor:
        """Turn a kernel (out, in, *k) into the layout of torch's weight, or back."""
        return kernel

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return optimizer groups that decay the channel filters alone.

        Decay on all factors of a product would shrink the product several times over.
        """
        others = [*self.spatial, *([] if self.bias is None else [self.bias])]
        return [
            {"params": [self.channel], "lr": lr, "weight_decay": weight_decay},
            {"params": others, "lr": lr, "weight_decay": 0.0},
        ]

    @classmethod
    def from_conv(cls, conv: nn.Module, rank: int, iters: int = 30) -> Self:
        """Fit the one-way filters to a trained layer.

        Parameters
        ----------
        conv : nn.Module
            Torch's layer of the same kind, with ``groups=1``.  Left as it is; the bias is shared, not copied.
        rank : int
            Products a filter; with as many as the kernel has positions any kernel is represented exactly.
        iters : int, default=30
            Most sweeps of alternating least squares (``nn.functional.fit_one_way``).

        Raises
        ------
        QuernelError
            If ``conv`` is another kind of layer, has groups or weights that are not finite.
        """
        new = cls._shaped_like(conv, rank, "dirac")
        weight: Any = conv.weight
        fit = fit_one_way(new._layout(weight.detach()), new.rank, iters=iters)
        with torch.no_grad():
            for parameter, filters in zip((new.channel, *new.spatial), (fit.channel, *fit.spatial), strict=True):
                parameter.copy_(filters)
        return new

    @classmethod
    def like(
        cls, conv: nn.Module, rank: int, *, init: Init = "dirac", generator: torch.Generator | None = None
    ) -> Self:
        """Return an untrained layer with the geometry of torch's; the bias is shared, not copied."""
        new = cls._shaped_like(conv, rank, init)
        bias, new.bias = new.bias, None  # it has its values
        new.reset_parameters(generator)
        new.bias = bias
        return new

    @classmethod
    def _shaped_like(cls, conv: Any, rank: int, init: str) -> Self:
        check_type("conv", conv, cls.plain)
        if conv.groups != 1:
            raise QuernelError(f"conv must have groups=1; got {conv.groups}. The filters of a grouped layer are small")
        new = cls.__new__(cls)
        geometry = {field: getattr(conv, field) for field in cls.geometry}
        flags = {name: getattr(cls, name) for name in cls.flags}
        channels, weight = (conv.in_channels, conv.out_channels), conv.weight
        new._build(channels, geometry, rank, False, init, flags, weight.device, weight.dtype)
        new.requires_grad_(weight.requires_grad)
        new.register_parameter("bias", conv.bias)
        return new.train(conv.training)

    def to_conv(self) -> Any:
        """Return torch's dense layer that computes the same; the bias is shared."""
        conv = self._plain(self.kernel(), self.in_channels, self.out_channels, 1)
        conv.register_parameter("bias", self.bias)
        return conv

    def fuse(self) -> nn.Sequential:
        """Return two plain layers of torch: pointwise, then one filter of all taps for each (``shared``: reversed).

        They need nothing of this library, for ONNX and the like.  On a processor with AVX-512 this layer is faster.
        """
        channel, spatial = self.filters()
        letters, rank = "yxz"[: len(spatial)], self.rank
        taps = torch.einsum(f"{','.join('or' + c for c in letters)}->or{letters}", *spatial)
        mix = channel.transpose(1, 2).flatten(1) if self.shared else channel.flatten(0, 1)
        mix = mix.reshape(*mix.shape, *[1] * len(spatial))
        mixer = CONVS[self._dims() - 1](mix.shape[1], mix.shape[0], 1, bias=False, device="meta", dtype=mix.dtype)
        mixer.weight = self._parameter(mix)
        if self.shared:
            inner = self._plain(taps.flatten(0, 1).unsqueeze(1), self.in_channels, mix.shape[1], self.in_channels)
            layers = [inner, mixer]
        else:
            # A transposed layer of g groups and r channels in each has its weight as (g r, 1, *k).
            transposed = self.plain not in CONVS
            taps = taps.flatten(0, 1).unsqueeze(1) if transposed else taps
            layers = [mixer, self._plain(taps, self.out_channels * rank, self.out_channels, self.out_channels)]
        if self.bias is not None:
            layers[1].bias = self._parameter(self.bias)
        return nn.Sequential(*layers).train(self.training)

    def _plain(self, weight: Tensor, inputs: int, outputs: int, groups: int) -> Any:
        """Return torch's layer with this geometry and weight, without a bias."""
        geometry = {field: getattr(self, field) for field in self.geometry}
        layer = self.plain(inputs, outputs, groups=groups, bias=False, device="meta", dtype=weight.dtype, **geometry)
        layer.weight = self._parameter(weight)
        return layer.train(self.training)

    def _parameter(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.detach().clone(), requires_grad=self.channel.requires_grad)

    def config(self) -> dict[str, Any]:
        """Return channels, geometry, rank and options."""
        geometry = {f: list(v) if isinstance(v := getattr(self, f), tuple) else v for f in self.geometry}
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            **geometry,
            "rank": self.rank,
            "bias": None if self.bias is None else dtype_name(self.bias.dtype),
            "init": self.init,
            **{name: getattr(self, name) for name in self.flags},
            "dtype": dtype_name(self.channel.dtype),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a layer with undefined values from ``config()``."""
        geometry = {field: config[field] for field in cls.geometry}
        check_fields(f"Conv{cls._dims()}d", {f: v for f, v in geometry.items() if f != "output_padding"})
        geometry = {f: tuple(v) if isinstance(v, list) else v for f, v in geometry.items()}
        flags = {name: config[name] for name in cls.flags}
        channels, bias = (config["in_channels"], config["out_channels"]), config["bias"]
        new = cls.__new__(cls)
        new._build(channels, geometry, config["rank"], False, config["init"], flags, None, DTYPES[config["dtype"]])
        if bias is not None:
            new.bias = nn.Parameter(torch.empty(new.out_channels, dtype=DTYPES[bias]))
        return new

    def extra_repr(self) -> str:
        """Show channels, geometry and rank."""
        fields = [str(self.in_channels), str(self.out_channels)]
        fields += [f"{name}={getattr(self, name)}" for name in (*self.geometry, "rank")]
        fields += [f"{name}=True" for name in self.flags if getattr(self, name) and name != "memory_efficient"]
        return ", ".join([*fields, f"bias={self.bias is not None}"])
