"""``RoastLinear`` and ``RoastConv2d``: layers whose weight is a hashed view of a ``SharedArray`` (arXiv 2207.10702).

    W[n, k] = scale * sign(n, k) * array[start(n div T_n, k div T_k) + (n mod T_n) T_k + k mod T_k]

The weight is cut into tiles, each copied whole from one hashed place, so reading it costs what copying costs. Any
number of layers share one array: its numbers, their gradients and the optimiser's state are all that training stores.
Cost: a forward product and N K numbers copied; a backward twice that, and N K additions.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._plain_layers import check_fields
from quernel._registry import register
from quernel._validate import check_int, check_type
from quernel.hashing import TileMap
from quernel.nn._shared_array import SharedArray, check_memory
from quernel.nn._stored import _CONV_FIELDS, StoredConv2d, StoredLinear
from quernel.nn._tile_ops import tile_conv2d
from quernel.nn.weights.hashed import HashedTileWeight, Mode

DEFAULT_TILE = (32, 32)


def new_tile_weight(
    memory: SharedArray,
    shape: tuple[int, ...],
    tile: tuple[int, int],
    *,
    signs: bool = True,
    scale: float | None = None,
    mode: Mode = "memory",
    seed: int | None = None,
    tile_map: TileMap | None = None,
) -> HashedTileWeight:
    """Return a view of an array with a map of its own, scaled as ``torch.nn.Linear`` would draw it.

    Parameters
    ----------
    memory : SharedArray
    shape : tuple of int
        (out, in, *kernel), positive.
    tile : (int, int)
        Rows and columns of a tile.
    signs, scale, mode, seed, tile_map
        As in ``RoastLinear``.
    """
    columns = math.prod(shape[1:])
    if tile_map is None:
        if not isinstance(tile, tuple | list) or len(tile) != 2:
            raise QuernelError(f"tile must be two integers, rows and columns; got {tile!r}")
        pair = check_int("tile", tile[0], low=1), check_int("tile", tile[1], low=1)
        check_memory(memory, pair[0] * pair[1], f"those of one tile {pair}; take a larger array or a smaller tile")
        seed = memory.next_seed() if seed is None else check_int("seed", seed)
        tile_map = TileMap(memory.size, (shape[0], columns), pair, seed, signs)
    else:
        check_memory(check_type("memory", memory, SharedArray), 1, "of which weights are made")
    if scale is None:
        # torch draws weights from U(-b, b) with b = columns^-1/2, whose standard deviation is b / sqrt(3).
        scale = (3 * columns) ** -0.5 / memory.std if memory.std > 0 else 1.0
    return HashedTileWeight(memory, tile_map, scale, mode, shape)


def new_bias(
    memory: SharedArray,
    outputs: int,
    columns: int,
    bias: bool,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> nn.Parameter | None:
    """Draw a bias as ``torch.nn.Linear`` does."""
    if not check_type("bias", bias, bool):
        return None
    values = memory.values
    drawn = torch.empty(outputs, device=device or values.device, dtype=dtype or values.dtype)
    if not drawn.is_meta:
        drawn.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
    return nn.Parameter(drawn)


def _kernel(kernel_size: Any) -> tuple[int, int]:
    pair = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size, kernel_size)
    if len(pair) != 2:
        raise QuernelError(f"kernel_size must be one or two integers; got {kernel_size!r}")
    return check_int("kernel_size", pair[0], low=1), check_int("kernel_size", pair[1], low=1)


def _linear_example() -> dict[str, Any]:
    def make() -> RoastLinear:
        generator = torch.Generator().manual_seed(0)
        memory = SharedArray(40, seed=3, generator=generator)
        return RoastLinear(7, 5, memory=memory, tile=(2, 4), generator=generator)

    return {"make": make, "input": lambda generator: (torch.randn(4, 7, generator=generator),)}


@register(
    "roast",
    pillar="nn",
    contract="module",
    paper="2207.10702",
    status="stable",
    headline=False,
    example=_linear_example,
)
class RoastLinear(StoredLinear):
    """A linear layer whose weight is read from a shared array in hashed tiles.

    Parameters
    ----------
    in_features, out_features : int
        As in ``torch.nn.Linear``.
    bias : bool, default=True
        Whether to add a vector of its own.
    memory : SharedArray
        What the weight is made of; give one object to as many layers as you like.
    tile : (int, int), default=(32, 32)
        Rows and columns of a tile; part of the model. ``memory`` must hold at least one tile.
    signs : bool, default=True
        Whether numbers are read with random signs. Without them, layers much larger than the array give all outputs
        a common direction.
    scale : float, optional
        Fixed factor of the weight. Default: what gives it the standard deviation that ``torch.nn.Linear`` draws.
    mode : {"memory", "speed"}, default="memory"
        "memory" keeps nothing but the array; "speed" keeps the dense weight in evaluation. The numbers are the same.
    seed : int, optional
        Of the map. Default: the next one of ``memory``, so that equal layers differ.
    tile_map : TileMap, optional
        A map that is given, instead of ``tile``, ``signs`` and ``seed``.
    device, dtype : optional
        Of the bias; default those of ``memory``.
    generator : torch.Generator, optional
        For the bias.

    Raises
    ------
    QuernelError
        If a size is out of range, or the array is smaller than a tile.

    Notes
    -----
    Learning rate: a step on the array moves weights by ``scale`` times as much. ``roast_param_groups`` makes up for it.
    Differs from the authors' code: signs, a hash of 64 bits, a seed for every layer, tiles that never depend on tuning.

    References
    ----------
    Desai et al., "Efficient model compression with Random Operation Access Specific Tile (ROAST) hashing",
    arXiv 2207.10702, 2022.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import RoastLinear, SharedArray
    >>> memory = SharedArray(10_000, seed=3)
    >>> net = torch.nn.Sequential(RoastLinear(512, 256, memory=memory), RoastLinear(256, 256, memory=memory))
    >>> net(torch.randn(2, 512)).shape, sum(p.numel() for p in net.parameters())
    (torch.Size([2, 256]), 10512)
    """

    weight: HashedTileWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        memory: SharedArray,
        tile: tuple[int, int] = DEFAULT_TILE,
        signs: bool = True,
        scale: float | None = None,
        mode: Mode = "memory",
        seed: int | None = None,
        tile_map: TileMap | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        shape = check_int("out_features", out_features, low=1), check_int("in_features", in_features, low=1)
        options: dict[str, Any] = {"signs": signs, "scale": scale, "mode": mode, "seed": seed, "tile_map": tile_map}
        weight = new_tile_weight(memory, shape, tile, **options)
        super().__init__(weight, new_bias(memory, *shape, bias, device, dtype, generator))

    @classmethod
    def over(cls, weight: HashedTileWeight, bias: Tensor | None = None) -> Self:
        """Return a layer around an existing view, which other layers may hold too."""
        new = cls.__new__(cls)  # __init__ would make another view
        StoredLinear.__init__(new, check_type("weight", weight, HashedTileWeight), bias)
        return new

    @property
    def memory(self) -> SharedArray:
        """The shared array."""
        return self.weight.memory

    def materialize(self) -> Tensor:
        """Return the dense weight (out_features, in_features), scaled."""
        return self.weight.dense()

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``x @ W.T + bias`` in the dtype of ``x``."""
        return self.weight.linear(x, self.bias)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        weight, bias = cls._parts(config)
        return cls.over(check_type("weight", weight, HashedTileWeight), bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Show the sizes; the view shows the rest."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _conv_example() -> dict[str, Any]:
    def make() -> RoastConv2d:
        generator = torch.Generator().manual_seed(0)
        memory = SharedArray(60, seed=3, generator=generator)
        return RoastConv2d(4, 6, 3, padding=1, memory=memory, tile=(2, 8), generator=generator)

    return {"make": make, "input": lambda generator: (torch.randn(2, 4, 8, 8, generator=generator),)}


@register(
    "roast",
    pillar="nn",
    contract="module",
    paper="2207.10702",
    status="stable",
    headline=False,
    example=_conv_example,
)
class RoastConv2d(StoredConv2d):
    """A 2-D convolution whose kernel is read from a shared array in hashed tiles.

    The kernel (out, in / groups, kh, kw) is seen as a matrix (out, in / groups * kh * kw). Its time is that of the
    dense convolution and a copy of the kernel; training keeps inputs alone.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As in ``torch.nn.Conv2d``.
    memory, tile, signs, scale, mode, seed, tile_map, device, dtype, generator
        As in ``RoastLinear``.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import RoastConv2d, SharedArray
    >>> conv = RoastConv2d(16, 32, 3, padding=1, memory=SharedArray(2048))
    >>> conv(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    weight: HashedTileWeight

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        memory: SharedArray,
        tile: tuple[int, int] = DEFAULT_TILE,
        signs: bool = True,
        scale: float | None = None,
        mode: Mode = "memory",
        seed: int | None = None,
        tile_map: TileMap | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        inputs, outputs = check_int("in_channels", in_channels, low=1), check_int("out_channels", out_channels, low=1)
        if inputs % check_int("groups", groups, low=1) or outputs % groups:
            raise QuernelError(f"groups must divide {inputs} and {outputs} channels; got {groups}")
        shape = (outputs, inputs // groups, *_kernel(kernel_size))
        options: dict[str, Any] = {"signs": signs, "scale": scale, "mode": mode, "seed": seed, "tile_map": tile_map}
        weight = new_tile_weight(memory, shape, tile, **options)
        drawn = new_bias(memory, outputs, weight.mapped.shape[1], bias, device, dtype, generator)
        geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        super().__init__(weight, drawn, padding_mode=padding_mode, **geometry)

    @classmethod
    def over(cls, weight: HashedTileWeight, bias: Tensor | None = None, **geometry: Any) -> Self:
        """Return a layer around an existing view; ``geometry`` as in ``StoredConv2d``."""
        new = cls.__new__(cls)  # __init__ would make another view
        StoredConv2d.__init__(new, check_type("weight", weight, HashedTileWeight), bias, **geometry)
        return new

    @classmethod
    def like(cls, conv: nn.Conv2d, weight: HashedTileWeight) -> Self:  # type: ignore[override]
        """Take stride, padding and bias of ``conv`` and read its kernel through ``weight``."""
        return cls.over(weight, conv.bias, **{field: getattr(conv, field) for field in _CONV_FIELDS})

    @property
    def memory(self) -> SharedArray:
        """The shared array."""
        return self.weight.memory

    def materialize(self) -> Tensor:
        """Return the dense kernel (out, in / groups, kh, kw), scaled."""
        return self.weight.dense()

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H', W')
        """Convolve, in the dtype of ``x``."""
        if self.weight.mode == "speed":
            return super().forward(x)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise QuernelError(f"x must have shape (N, {self.in_channels}, H, W); got {tuple(x.shape)}")
        plain, weight = self._plain[0], self.weight
        padding: Any = plain.padding
        if isinstance(padding, str) or plain.padding_mode != "zeros":
            how = "constant" if plain.padding_mode == "zeros" else plain.padding_mode
            x, padding = F.pad(x, plain._reversed_padding_repeated_twice, how), (0, 0)
        values, shape = weight.memory.values, weight.shape
        geometry: tuple[Any, ...] = (shape, plain.stride, padding, plain.dilation, plain.groups)
        return tile_conv2d(x, values, self.bias, weight.scale, weight.tiles, *geometry)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an empty layer from ``config()``."""
        check_fields("Conv2d", {f: config[f] for f in _CONV_FIELDS})
        fields: dict[str, Any] = {f: tuple(v) if isinstance(v := config[f], list) else v for f in _CONV_FIELDS}
        weight, bias = cls._parts(config)
        return cls.over(check_type("weight", weight, HashedTileWeight), bias, **fields)  # type: ignore[arg-type]
