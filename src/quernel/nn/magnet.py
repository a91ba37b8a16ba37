"""``MAGNet``: a small network from coordinates to the values of a large kernel (arXiv 2401.17948).

On a grid of coordinates c in [-1, 1], rows first, with pointwise layers of ``hidden`` channels,

    g_i = sin(U_i c + b_i),   z_0 = g_0,   z_i = g_i (V_i z_{i-1} + a_i) + P,   W = O z_l + b

P is a learned map over the grid.  Its parameters do not grow with the kernel but for P.  The scale of U decides how
smooth W is: neighbours agree for ``omega0`` up to 1, and are noise from about 10 on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.nn._mixer import widened

# Beyond it the arguments of the sine are so large that float32 would lose digits, each device others.
EXACT_OMEGA = 30.0
GAMMA_SHAPE, GAMMA_RATE = 6.0, 1.0
TINY = 1e-12


class MAGNet(nn.Module):
    """Generate a kernel from coordinates.

    Parameters
    ----------
    out_channels : int
        Channels of the kernel.
    ndim : int
        Axes of the grid.
    size : int or sequence of int
        Points of an axis, both ends included.
    hidden : int, default=64
    layers : int, default=2
        Multiplications by sines after the first.
    omega0 : float, default=1.0
        Scale of the frequencies; 2000 is what public training code uses.
    context_dim : int, optional
        Channels of an image whose pooled content modulates every layer; None for a kernel of its own.

    Examples
    --------
    >>> MAGNet(8, ndim=2, size=(14, 14))().shape
    torch.Size([1, 8, 14, 14])
    """

    #: What ``Cast`` leaves in float32: angles of thousands of radians have no fraction in half precision.
    keeps_float32: ClassVar[tuple[str, ...]] = ("frequencies", "phases")

    def __init__(
        self,
        out_channels: int,
        ndim: int,
        size: int | Sequence[int],
        hidden: int = 64,
        layers: int = 2,
        omega0: float = 1.0,
        context_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.out_channels, self.ndim = (
            check_int("out_channels", out_channels, low=1),
            check_int("ndim", ndim, low=1, high=3),
        )
        sizes = [size] * ndim if isinstance(size, int) else list(size)
        if len(sizes) != ndim:
            raise QuernelError(f"size must be an integer or {ndim} of them; got {size!r}")
        self.size = tuple(check_int("size", s, low=1) for s in sizes)
        self.hidden, self.layers = check_int("hidden", hidden, low=1), check_int("layers", layers, low=1)
        self.omega0 = check_float("omega0", omega0, low=0.0, open_low=True)
        self.context_dim = context_dim
        self.frequencies = nn.Parameter(torch.empty(layers + 1, hidden, ndim))
        self.phases = nn.Parameter(torch.zeros(layers + 1, hidden))
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.map = nn.Parameter(torch.zeros(1, 1, *self.size))
        self.out = nn.Linear(hidden, out_channels)
        if context_dim is not None:
            check_int("context_dim", context_dim, low=1)
            self.reduce, self.context = nn.Linear(context_dim, hidden), nn.Linear(hidden, hidden)
            self.modulate = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
            self.keep = nn.Parameter(torch.ones(layers, hidden))
            self.renew = nn.Parameter(torch.full((layers, hidden), 0.1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as published: Gamma-distributed frequencies, smaller ones in later layers."""
        device = self.frequencies.device
        with torch.no_grad():
            for i in range(self.layers + 1):
                shape = torch.full((self.hidden, self.ndim), GAMMA_SHAPE / (i + 1), device=device)
                scale = torch._standard_gamma(shape) / GAMMA_RATE
                bound = self.ndim**-0.5
                uniform = torch.empty_like(shape).uniform_(-bound, bound)
                self.frequencies[i] = 2 * math.pi * self.omega0 * scale * uniform
        for layer in (*self.inner, *(() if self.context_dim is None else self.modulate)):
            nn.init.kaiming_uniform_(layer.get_parameter("weight"), nonlinearity="linear")
            nn.init.ones_(layer.get_parameter("bias"))
        nn.init.kaiming_uniform_(self.out.weight, nonlinearity="linear")
        with torch.no_grad():
            self.out.weight.mul_(math.prod(self.size) ** -0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, content: Tensor | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Return the kernel.

        Parameters
        ----------
        content : Tensor, shape (B, context_dim, *S), optional
            What the kernel depends on, of nets with ``context_dim``.
        size : sequence of int, optional
            Another grid: coordinates are continuous, and P is interpolated.

        Returns
        -------
        w : Tensor, shape (B or 1, out_channels, *grid)
            In the precision of the parameters, within autocast too.
        """
        # Phases lose their fraction in half precision, and a kernel may outlive the region that asked for it.
        kind = self.frequencies.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return self._generated(None if content is None else widened(content, self), size)

    def _generated(self, content: Tensor | None, size: Sequence[int] | None) -> Tensor:
        grid = self.size if size is None else tuple(size)
        waves = self._waves(grid)  # (layers + 1, *grid, hidden)
        bias = self.map if grid == self.size else self._resized(grid)
        bias = bias.movedim(1, -1)  # (1, *grid, 1)
        inner = None if content is None else self._content(content, grid)
        z = waves[0][None]
        for i, layer in enumerate(self.inner):
            z = waves[i + 1] * layer(z) + bias
            if inner is not None:
                z = renormalised(z, self.keep[i], self.renew[i]) * self.modulate[i](inner)
        w: Tensor = self.out(z)
        return w.movedim(-1, 1)

    def layer_weights(self) -> list[Tensor]:
        """Return the matrices of the layers, those of the sines included; no biases, maps and factors."""
        return [*self.frequencies, *(m.weight for m in self.modules() if isinstance(m, nn.Linear))]

    def extra_repr(self) -> str:
        """Show the sizes."""
        return (
            f"{self.out_channels}, size={self.size}, hidden={self.hidden}, layers={self.layers}, omega0={self.omega0}"
        )

    def _waves(self, grid: tuple[int, ...]) -> Tensor:
        exact = self.omega0 > EXACT_OMEGA
        dtype = torch.float64 if exact else self.frequencies.dtype
        axes = [torch.linspace(-1, 1, n, dtype=dtype, device=self.frequencies.device) for n in grid]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (N, ndim)
        angles = points @ self.frequencies.to(dtype).mT + self.phases.to(dtype)[:, None]  # (layers + 1, N, hidden)
        return angles.sin().to(self.frequencies.dtype).unflatten(1, grid)

    def _resized(self, grid: tuple[int, ...]) -> Tensor:
        mode = ("linear", "bilinear", "trilinear")[self.ndim - 1]
        return F.interpolate(self.map, grid, mode=mode, align_corners=True)

    def _content(self, content: Tensor, grid: tuple[int, ...]) -> Tensor:  # -> (B, *grid, hidden)
        if self.context_dim is None or content.shape[1] != self.context_dim:
            raise QuernelError(f"content must have {self.context_dim} channels; got {tuple(content.shape)}")
        pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.ndim - 1]
        pooled: Tensor = pool(content, grid)
        return F.gelu(self.context(self.reduce(pooled.movedim(1, -1))))


def renormalised(z: Tensor, keep: Tensor, renew: Tensor) -> Tensor:
    """Return ``keep`` z, through which no gradient flows, plus ``renew`` z over its norm on the grid.

    Parameters
    ----------
    z : Tensor, shape (B, *grid, h)
    keep, renew : Tensor, shape (h,)
    """
    axes = tuple(range(1, z.ndim - 1))
    norm = torch.linalg.vector_norm(z, dim=axes, keepdim=True).clamp_min(TINY)
    return keep * z.detach() + renew * z / norm
