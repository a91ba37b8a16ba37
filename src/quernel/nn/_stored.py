"""Layers over a ``StoredWeight``: the same attributes and calls as torch's, whatever the storage.

``StoredLinear`` is ``weight.matmul(x) + bias``, ``StoredEmbedding`` is ``weight.rows(ids)``, ``StoredConv2d``
convolves with ``weight.dense()``: its bytes are saved at rest, its time is that of the dense convolution.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._plain_layers import check_fields
from quernel._registry import register, resolve_class
from quernel.nn.weights._base import StoredWeight, dtype_name
from quernel.nn.weights.dense import DTYPES, DenseWeight


def weight_config(weight: StoredWeight) -> dict[str, Any]:
    """Return ``{"class", "config"}`` of a stored weight, as layers keep it in their own config."""
    return {"class": type(weight).__name__, "config": weight.config()}


def weight_from_config(config: dict[str, Any]) -> StoredWeight:
    """Build an empty stored weight from ``weight_config``; only registered classes are built."""
    cls: Any = resolve_class(config["class"], file="stored weight", field="class")
    weight: StoredWeight = cls.from_config(config["config"])
    return weight


class _StoredLayer(nn.Module):
    """What the three layers share: a stored weight, a bias, and how both are written down."""

    weight: StoredWeight
    bias: nn.Parameter | None

    def __init__(self, weight: StoredWeight, bias: Tensor | None, dims: int) -> None:
        super().__init__()
        if not isinstance(weight, StoredWeight) or len(weight.shape) != dims:
            raise QuernelError(
                f"weight must be a StoredWeight of {dims} dimensions for {type(self).__name__}; got {weight!r}"
            )
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise QuernelError(f"bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
        self.weight = weight
        self.bias = None if bias is None else bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())

    def _base_config(self) -> dict[str, Any]:
        bias = None if self.bias is None else dtype_name(self.bias.dtype)
        return {"weight": weight_config(self.weight), "bias": bias}

    @staticmethod
    def _parts(config: dict[str, Any]) -> tuple[StoredWeight, Tensor | None]:
        weight = weight_from_config(config["weight"])
        bias = config["bias"]
        return weight, None if bias is None else torch.zeros(weight.shape[0], dtype=DTYPES[bias])


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def _linear_example() -> dict[str, Any]:
    return {
        "make": lambda: StoredLinear(DenseWeight((5, 7), "float32"), torch.zeros(5)),
        "input": lambda generator: (torch.randn(4, 7, generator=generator),),
    }


@register(
    "stored-layers",
    pillar="nn",
    contract="module",
    paper=None,
    status="stable",
    headline=False,
    example=_linear_example,
)
class StoredLinear(_StoredLayer):
    """A linear layer whose weight lives in a ``StoredWeight``.

    Parameters
    ----------
    weight : StoredWeight, shape (out_features, in_features)
    bias : Tensor, shape (out_features,), optional
    """

    def __init__(self, weight: StoredWeight, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias, dims=2)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``x @ W.T + bias``."""
        return _add_bias(self.weight.matmul(x), self.bias)

    def config(self) -> dict[str, Any]:
        """Return weight and bias configuration."""
        return self._base_config()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        return cls(*cls._parts(config))

    def extra_repr(self) -> str:
        """Show the features."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


_CONV_FIELDS = ("stride", "padding", "dilation", "groups", "padding_mode")


def _conv_example() -> dict[str, Any]:
    return {
        "make": lambda: StoredConv2d(DenseWeight((6, 4, 3, 3), "float32"), torch.zeros(6), padding=1),
        "input": lambda generator: (torch.randn(2, 4, 8, 8, generator=generator),),
    }


@register(
    "stored-layers", pillar="nn", contract="module", paper=None, status="stable", headline=False, example=_conv_example
)
class StoredConv2d(_StoredLayer):
    """A 2-D convolution whose weight lives in a ``StoredWeight``.

    Parameters
    ----------
    weight : StoredWeight, shape (out_channels, in_channels / groups, kh, kw)
    bias : Tensor, shape (out_channels,), optional
    stride, padding, dilation, groups, padding_mode
        As in ``torch.nn.Conv2d``.
    """

    def __init__(
        self,
        weight: StoredWeight,
        bias: Tensor | None = None,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> None:
        super().__init__(weight, bias, dims=4)
        self.out_channels, per_group, *kernel = weight.shape
        self.in_channels, self.kernel_size = per_group * groups, tuple(kernel)
        # torch's own layer, empty and on meta, knows how every padding mode pads.
        self._plain = (
            nn.Conv2d(
                self.in_channels,
                self.out_channels,
                self.kernel_size,  # type: ignore[arg-type]
                stride,
                padding,
                dilation,
                groups,
                bias=False,
                padding_mode=padding_mode,
                device="meta",
            ),
        )
        for field in _CONV_FIELDS:
            setattr(self, field, getattr(self._plain[0], field))

    @classmethod
    def like(cls, conv: nn.Conv2d, weight: StoredWeight) -> Self:
        """Take stride, padding and bias of ``conv`` and store its weight as ``weight``."""
        return cls(weight, conv.bias, **{field: getattr(conv, field) for field in _CONV_FIELDS})

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H', W')
        """Convolve; the result has the dtype in which the weight computes."""
        weight = self.weight.dense()
        # Integer formats decode to float32 and follow the input; dense formats are what the user chose.
        dtype = weight.dtype if isinstance(self.weight, DenseWeight) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._plain[0]._conv_forward(x.to(dtype), weight.to(dtype), bias)

    def config(self) -> dict[str, Any]:
        """Return weight, bias and geometry."""
        fields = {f: list(v) if isinstance(v := getattr(self, f), tuple) else v for f in _CONV_FIELDS}
        return self._base_config() | fields

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        check_fields("Conv2d", {f: config[f] for f in _CONV_FIELDS})
        fields: dict[str, Any] = {f: tuple(v) if isinstance(v := config[f], list) else v for f in _CONV_FIELDS}
        return cls(*cls._parts(config), **fields)

    def extra_repr(self) -> str:
        """Show the geometry."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


def _embedding_example() -> dict[str, Any]:
    return {
        "make": lambda: StoredEmbedding(DenseWeight((11, 6), "float32")),
        "input": lambda generator: (torch.randint(0, 11, (2, 5), generator=generator),),
    }


@register(
    "stored-layers",
    pillar="nn",
    contract="module",
    paper=None,
    status="stable",
    headline=False,
    example=_embedding_example,
)
class StoredEmbedding(_StoredLayer):
    """An embedding table whose weight lives in a ``StoredWeight``.

    Parameters
    ----------
    weight : StoredWeight, shape (num_embeddings, embedding_dim)
    padding_idx : int, optional
        Kept for its users; the row's values are the stored ones.
    """

    def __init__(self, weight: StoredWeight, padding_idx: int | None = None) -> None:
        super().__init__(weight, None, dims=2)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:  # any shape -> (*ids.shape, embedding_dim)
        """Return the rows of ``ids``."""
        return self.weight.rows(ids)

    def config(self) -> dict[str, Any]:
        """Return weight configuration and padding index."""
        return self._base_config() | {"padding_idx": self.padding_idx}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty table from ``config()``."""
        return cls(cls._parts(config)[0], config["padding_idx"])

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


def applied(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a projection in the dtype of its weight; layers over stored weights take any."""
    weight = getattr(layer, "weight", None)
    y: Tensor = layer(x.to(weight.dtype) if isinstance(weight, Tensor) else x)
    return y
