"""``HyperZZWGlobal`` and ``HyperZZWLocal``: large kernels from coordinates, modulated by the input itself.

A slow net (``MAGNet``) makes W from coordinates; Z.W are weights that depend on the content, and they act on Z again
(arXiv 2401.17948):

    global   Y = (Z * W_g) @ Z         the product of H x W maps, channel by channel ("hadamard": elementwise)
    local    Y = GELU(BS(conv1x1(depthwise(Z, W_l(Z))))) + bias,   W_l from coordinates and pooled content

BS is batch standardisation without affine parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_int
from quernel.nn._mixer import Mixer, widened
from quernel.nn.conv._spectra import CachingMixer
from quernel.nn.magnet import MAGNet

CONTEXTS, MODES, STATS = ("sample", "batch", "none"), ("matmul", "hadamard"), ("running", "batch")
EPS = 1e-5


def _global_example() -> dict[str, Any]:
    make = seeded(lambda: HyperZZWGlobal(6, 5, hidden=8))
    return {"make": make, "input": lambda generator: (torch.randn(2, 5, 5, 6, generator=generator),)}


def _local_example() -> dict[str, Any]:
    make = seeded(lambda: HyperZZWLocal(6, 3, hidden=8))
    return {
        "make": make,
        "input": lambda generator: (torch.randn(3, 5, 6, 6, generator=generator),),
        # Content is pooled to cells whose borders depend on the size of the image.
        "masks": False,
    }


def two_elementwise(w: Tensor, z: Tensor) -> Tensor:
    """Return z * w * z, the elementwise form that scores channels and places."""
    return z * w * z


@register("hyperzzw", pillar="nn", contract="mixer", paper="2401.17948", status="experimental", example=_global_example)
class HyperZZWGlobal(CachingMixer):
    """Global mixing of square maps by weights Z * W, W generated from coordinates.

    Parameters
    ----------
    dim : int
        Channels.
    size : int
        Side of the maps, H = W.
    mode : {"matmul", "hadamard"}, default="matmul"
        Matrix products of the maps, channel by channel, as in public code: every row mixes the rows of its column.
        "hadamard" multiplies elementwise, linear in the pixels, and mixes nothing.
    hidden, layers, omega0
        Of the slow net, see ``MAGNet``.
    resample : bool, default=False
        Take square maps of other sizes and generate W on their grid.

    Notes
    -----
    2 C H^3 operations an image by "matmul".  In eval mode W is kept until a parameter changes; after a
    write through ``parameter.data``, which torch does not count as a change, call ``eval()`` again.

    References
    ----------
    H. Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948, 2024.

    Examples
    --------
    >>> import torch
    >>> HyperZZWGlobal(16, size=14)(torch.randn(2, 14, 14, 16)).shape
    torch.Size([2, 14, 14, 16])
    """

    spatial_ndim = (2,)
    options = ("size", "mode", "hidden", "layers", "omega0", "resample")

    def __init__(
        self,
        dim: int,
        size: int,
        mode: Literal["matmul", "hadamard"] = "matmul",
        *,
        hidden: int = 64,
        layers: int = 2,
        omega0: float = 1.0,
        resample: bool = False,
    ) -> None:
        super().__init__(dim)
        self.size, self.mode = check_int("size", size, low=1), check_choice("mode", mode, MODES)
        self.hidden, self.layers, self.omega0 = hidden, layers, omega0
        self.resample = check_bool("resample", resample)
        self.fixed_shape = None if resample else (size, size)
        self.slow = MAGNet(dim, 2, size, hidden, layers, omega0)

    def kernel(self, size: int | None = None) -> Tensor:
        """Return W_g, (1, C, H, H), generated or, in eval mode without gradients, kept from before."""
        side = self.size if size is None else size
        w: Tensor = self._cache.get(self, "kernel", side, lambda: self.slow(size=(side, side)))
        return w

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, H, W, C), without those of generating W."""
        batch, height, width, channels = shape
        pixels = batch * height * width * channels
        return pixels * (1 + 2 * width) if self.mode == "matmul" else 2 * pixels

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if x.shape[1] != x.shape[2]:
            raise QuernelError(f"x must hold square maps, side by side products have no other; got {tuple(x.shape)}")
        z = x.movedim(-1, 1)
        weights = z * self.kernel(x.shape[1]).to(z.dtype)
        y = weights @ z if self.mode == "matmul" else weights * z
        return y.movedim(1, -1)


@register(
    "hyperzzw",
    pillar="nn",
    contract="mixer",
    paper="2401.17948",
    status="experimental",
    headline=False,
    example=_local_example,
)
class HyperZZWLocal(Mixer):
    """A depthwise convolution whose kernels come from coordinates and from the content of the image.

    Parameters
    ----------
    dim : int
        Channels.
    kernel_size : int
        Odd.
    context : {"sample", "batch", "none"}, default="sample"
        Kernels for each image from its own content; one set from the mean of the batch, as in public code, which makes
        an image depend on the others beside it; or from coordinates alone.
    hidden, layers, omega0
        Of the slow net, see ``MAGNet``.
    eval_stats : {"running", "batch"}, default="running"
        What standardises outputs in eval mode: running estimates, or the batch itself as in public code.

    Notes
    -----
    Masked places are left out of the pooled content.  Batch statistics, those of training, count them.

    References
    ----------
    H. Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948, 2024.

    Examples
    --------
    >>> import torch
    >>> HyperZZWLocal(16, kernel_size=7)(torch.randn(2, 14, 14, 16)).shape
    torch.Size([2, 14, 14, 16])
    """

    spatial_ndim = (2,)
    options = ("kernel_size", "context", "hidden", "layers", "omega0", "eval_stats")

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        context: Literal["sample", "batch", "none"] = "sample",
        *,
        hidden: int = 32,
        layers: int = 2,
        omega0: float = 1.0,
        eval_stats: Literal["running", "batch"] = "running",
    ) -> None:
        super().__init__(dim)
        if check_int("kernel_size", kernel_size, low=1) % 2 == 0:
            raise QuernelError(f"kernel_size must be odd, so that it is centred on its place; got {kernel_size}")
        self.kernel_size, self.context = kernel_size, check_choice("context", context, CONTEXTS)
        self.hidden, self.layers, self.omega0 = hidden, layers, omega0
        self.eval_stats = check_choice("eval_stats", eval_stats, STATS)
        self.slow = MAGNet(dim, 2, kernel_size, hidden, layers, omega0, None if context == "none" else dim)
        self.mix = nn.Conv2d(dim, dim, 1)
        nn.init.kaiming_normal_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(dim, eps=EPS, affine=False, track_running_stats=eval_stats == "running")
        self.bias = nn.Parameter(torch.zeros(()))

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, H, W, C), without those of generating kernels."""
        batch, height, width, channels = shape
        return 2 * batch * height * width * channels * (self.kernel_size**2 + channels)

    def from_source(self, z: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve ``z`` by kernels made from ``source``, two (B, C, H, W), zeros where ``mask`` (B, H, W) is False."""
        given = z.dtype
        z, source = widened(z, self), widened(source, self)
        w = self.slow(self._content(source, mask))  # (B or 1, C, k, k)
        batch, channels, *sizes = z.shape
        if batch == 0:
            return z.to(given)
        pad = self.kernel_size // 2
        if len(w) == 1 and self.context != "sample":
            y = F.conv2d(z, w.movedim(0, 1).to(z.dtype), padding=pad, groups=channels)
        else:
            kernels = w.reshape(batch * channels, 1, *w.shape[2:]).to(z.dtype)
            y = F.conv2d(z.reshape(1, batch * channels, *sizes), kernels, padding=pad, groups=batch * channels)
            y = y.view(batch, channels, *sizes)
        out: Tensor = F.gelu(self.norm(self.mix(y))) + self.bias
        return out.to(given)

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        z = x.movedim(-1, 1)
        return self.from_source(z, z, mask).movedim(1, -1)

    def _content(self, source: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return what the kernels depend on, a map of each image or one of the batch; the slow net pools it."""
        if self.context == "none" or (self.context == "sample" and mask is None):
            return None if self.context == "none" else source
        pooled = F.adaptive_avg_pool2d(source, self.kernel_size)  # (B, C, k, k)
        shares = None if mask is None else F.adaptive_avg_pool2d(mask[:, None].to(source.dtype), self.kernel_size)
        if self.context == "batch":
            pooled = pooled.mean(0, keepdim=True)
            shares = None if shares is None else shares.mean(0, keepdim=True)
        # A cell without a place that counts stays zero.
        return pooled if shares is None else pooled / shares.masked_fill(shares == 0, 1.0)
