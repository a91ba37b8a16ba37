"""``SoftmaxFreeAttention``: attention by a Gaussian kernel and its Nystrom approximation, O(N m) (arXiv 2207.03341).

Queries are the keys: S_ij = exp(-||q_i - q_j||^2 / (2 sqrt(D))) is symmetric and positive semi-definite, Y = S V.
Landmarks l are a convolution of the scaled queries with kernel = stride = ``ratio``, a norm and a GELU; then
Y = P (A^+ (P^T V)) with P = k(q, l), A = k(l, l), and a depthwise convolution of V is added.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_float, check_int
from quernel.kernels.gaussian import gaussian_kernel
from quernel.nn._mixer import Mixer
from quernel.nn.functional.nystrom import INVERSES, NORMS, Inverse, Norm, nystrom_apply

LANDMARKS = ("conv", "pool", "random")


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        mixer = SoftmaxFreeAttention(8, 2, ratio=2)
        # Fresh landmarks are so far from everything that only the convolution would be seen.
        mixer.query.weight.data.mul_(0.3)
        return mixer

    return {"make": make, "input": lambda generator: (torch.randn(2, 5, 6, 8, generator=generator),)}


def _exact_example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return GaussianAttention(8, 2)

    return {"make": make, "input": lambda generator: (torch.randn(2, 6, 8, generator=generator),)}


class _SharedQueries(Mixer):
    """Projections of attention whose queries are its keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim)
        self.num_heads = check_int("num_heads", num_heads, low=1)
        if dim % num_heads:
            raise QuernelError(f"num_heads must divide dim={dim}; got {num_heads}")
        self.query, self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, N, C) -> two (B, H, N, D)
        """Return queries over the fourth root of D, and values."""
        q, v = (layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.value))
        return q * q.shape[-1] ** -0.25, v

    def _merged(self, y: Tensor, x: Tensor) -> Tensor:  # (B, H, N, D) -> as x
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2)).view_as(x)
        return out


@register(
    "soft-attention",
    pillar="nn",
    contract="mixer",
    paper="2207.03341",
    status="experimental",
    headline=False,
    example=_exact_example,
)
class GaussianAttention(_SharedQueries):
    """Attention by the exact Gaussian kernel matrix, without softmax: O(N^2), for comparison.

    Parameters
    ----------
    dim : int
        Channels.
    num_heads : int
        Divides ``dim``.

    References
    ----------
    Lu et al., "Softmax-free Linear Transformers", arXiv 2207.03341, 2024.
    """

    options = ("num_heads",)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C), projections included."""
        batch, *sizes, channels = shape
        tokens = torch.Size(sizes).numel()
        return batch * (6 * tokens * channels * channels + 4 * tokens * tokens * channels)

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, v = self._heads(x.flatten(1, -2))
        if mask is not None:
            v = v * mask.flatten(1)[:, None, :, None]
        return self._merged(gaussian_kernel(q, q).to(v.dtype) @ v, x)


@register("soft-attention", pillar="nn", contract="mixer", paper="2207.03341", status="experimental", example=_example)
class SoftmaxFreeAttention(_SharedQueries):
    """Attention by a Gaussian kernel through a few landmarks, linear in the number of tokens.

    Parameters
    ----------
    dim : int
        Channels.
    num_heads : int
        Divides ``dim``.
    ratio : int, default=2
        Tokens of an axis a landmark stands for: m = ceil(H / ratio) ceil(W / ratio).  A grid that it does not divide is
        filled up with zeros.
    landmarks : {"conv", "pool", "random"} or int, default="conv"
        A learned convolution with norm and GELU; means of ratio x ratio queries; as many queries, in training mode
        drawn anew for every call and the same for all samples, in eval mode evenly spaced; or that many, evenly spaced.
    conv_size : int or None, default=3
        Odd width of the depthwise convolution of the values, one kernel a head; None leaves it out.
    inverse : {"cholesky", "newton", "pinv"}, default="cholesky"
    norm : {"bottleneck", "token", None}, default="bottleneck"
        As in ``quernel.nn.functional.nystrom_apply``.  "token" bounds the matrix for any number of tokens; accuracy on
        larger images than in training was lost with every norm.
    eps : float, default=0.01
        Added to the diagonal of the landmarks' kernel.
    iters : int, default=20
        Of Newton's iteration.
    ndim : {1, 2}, default=2
        Axes of the token grid.
    causal : bool, default=False
        Refused: a kernel matrix of all tokens has no causal form.

    Raises
    ------
    QuernelError
        If an option is out of range; in ``forward`` if shapes do not fit.

    Notes
    -----
    At initialisation the landmarks, which pass a norm, are far from the queries: the kernel part begins near zero, and
    the convolution carries the signal.  Departs from the authors' code: every matrix has a start of its own in Newton's
    iteration, so that samples do not depend on each other.

    References
    ----------
    Lu et al., "Softmax-free Linear Transformers", arXiv 2207.03341, 2024.

    Examples
    --------
    >>> import torch
    >>> SoftmaxFreeAttention(64, num_heads=2, ratio=4)(torch.randn(2, 28, 28, 64)).shape
    torch.Size([2, 28, 28, 64])
    """

    options = ("num_heads", "ratio", "landmarks", "conv_size", "inverse", "norm", "eps", "iters", "ndim")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ratio: int = 2,
        *,
        landmarks: Literal["conv", "pool", "random"] | int = "conv",
        conv_size: int | None = 3,
        inverse: Inverse = "cholesky",
        norm: Norm = "bottleneck",
        eps: float = 1e-2,
        iters: int = 20,
        ndim: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, num_heads)
        if check_bool("causal", causal):
            raise QuernelError("causal=True is not possible: a kernel matrix among all tokens has no causal form")
        self.ratio, self.iters = check_int("ratio", ratio, low=1), check_int("iters", iters, low=1)
        self.ndim = check_choice("ndim", ndim, (1, 2))
        self.spatial_ndim = (ndim,)  # type: ignore[misc]
        self.landmarks = (
            check_choice("landmarks", landmarks, LANDMARKS)
            if isinstance(landmarks, str)
            else check_int("landmarks", landmarks, low=1)
        )
        self.inverse: Inverse = check_choice("inverse", inverse, INVERSES)
        self.norm: Norm = check_choice("norm", norm, NORMS)
        self.eps = check_float("eps", eps, low=0.0, open_low=True)
        if conv_size is not None and check_int("conv_size", conv_size, low=1) % 2 == 0:
            raise QuernelError(f"conv_size must be odd, so that it is centred on its token; got {conv_size}")
        self.conv_size = conv_size
        head = dim // num_heads
        if landmarks == "conv":
            conv: Any = (nn.Conv1d, nn.Conv2d)[ndim - 1]
            self.reduce: nn.Module = conv(head, head, ratio, ratio, bias=False)
            self.reduce_norm = nn.LayerNorm(head)
        if conv_size is not None:
            self.skip = nn.Parameter(torch.empty(num_heads, 1, *[conv_size] * ndim))
            bound = conv_size ** (-ndim / 2)
            nn.init.uniform_(self.skip, -bound, bound)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C), projections included."""
        batch, *sizes, channels = shape
        tokens, head = torch.Size(sizes).numel(), channels // self.num_heads
        m = self.landmarks if isinstance(self.landmarks, int) else torch.Size(self._reduced(sizes)).numel()
        kernel = self.num_heads * (6 * tokens * m * head + 2 * m * m * head + m**3 // 3 + 2 * m * m * head)
        reduce = 2 * tokens * channels * head if self.landmarks == "conv" else 0
        skip = 0 if self.conv_size is None else 2 * tokens * channels * self.conv_size**self.ndim
        return int(batch * (6 * tokens * channels * channels + kernel + reduce + skip))

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        sizes = x.shape[1:-1]
        q, v = self._heads(x.flatten(1, -2))  # (B, H, N, D)
        kept = None if mask is None else mask.flatten(1)[:, None].expand(q.shape[:-1])  # (B, H, N)
        if kept is not None:
            q, v = q * kept[..., None], v * kept[..., None]
        marks, mark_mask = self._landmarks(q, kept, sizes)
        y = nystrom_apply(
            q,
            marks,
            v,
            inverse=self.inverse,
            eps=self.eps,
            norm=self.norm,
            iters=self.iters,
            mask=kept,
            landmark_mask=mark_mask,
        ).to(v.dtype)
        if self.conv_size is not None:
            y = y + self._skipped(v, sizes)
        return self._merged(y, x)

    def _reduced(self, sizes: Any) -> list[int]:
        return [-(-size // self.ratio) for size in sizes]

    def _grid(self, t: Tensor, sizes: Any) -> Tensor:  # (B, H, N, D) -> (B H, D, *S), S filled up to the ratio
        grid = t.mT.reshape(-1, t.shape[-1], *sizes)
        room = [(-size) % self.ratio for size in sizes]
        return F.pad(grid, [n for size in reversed(room) for n in (0, size)]) if any(room) else grid

    def _landmarks(self, q: Tensor, kept: Tensor | None, sizes: Any) -> tuple[Tensor, Tensor | None]:
        """Return landmarks (B, H, m, D) and, with a mask, which of them hold a token that counts, (B, H, m)."""
        tokens = q.shape[2]
        if isinstance(self.landmarks, int) or self.landmarks == "random":
            chosen = self._chosen(tokens, sizes, q.device)
            return q[:, :, chosen], None if kept is None else kept[:, :, chosen]
        count = None
        if kept is not None or self.landmarks == "pool":
            ones = (q.new_ones(q.shape[:-1]) if kept is None else kept.to(q.dtype))[..., None]
            count = self._pooled(self._grid(ones, sizes)).flatten(2).mT.unflatten(0, q.shape[:2])  # (B, H, m, 1)
        grid = self._grid(q, sizes)
        if self.landmarks == "conv":
            marks = self.reduce(grid).flatten(2).mT
            marks = F.gelu(self.reduce_norm(marks)).unflatten(0, q.shape[:2])
        else:
            marks = self._pooled(grid).flatten(2).mT.unflatten(0, q.shape[:2]) / count.clamp_min(1)  # type: ignore[union-attr]
        return marks, None if kept is None else count[..., 0] > 0  # type: ignore[index]

    def _chosen(self, tokens: int, sizes: Any, device: torch.device) -> Tensor:
        """Return which tokens are landmarks, (m,)."""
        count = self.landmarks if isinstance(self.landmarks, int) else torch.Size(self._reduced(sizes)).numel()
        if count > tokens:
            raise QuernelError(f"landmarks={count} must be at most the number of tokens; got {tokens}")
        if self.landmarks == "random" and self.training:
            return torch.randperm(tokens, device=device)[:count]
        return (torch.arange(count, device=device) * tokens + tokens // 2) // count

    def _pooled(self, grid: Tensor) -> Tensor:
        """Return sums over the cells of ``ratio`` tokens an axis."""
        pool = (F.avg_pool1d, F.avg_pool2d)[self.ndim - 1]
        mean: Tensor = pool(grid, self.ratio)
        return mean * self.ratio**self.ndim

    def _skipped(self, v: Tensor, sizes: Any) -> Tensor:  # (B, H, N, D) -> the same
        """Convolve the values on their grid, zeros beyond it, one kernel a head."""
        batch, heads, tokens, head = v.shape
        # Channels last in memory, the layout that depthwise convolutions want.
        grid = v.transpose(1, 2).reshape(batch, *sizes, heads * head).movedim(-1, 1)
        conv = (F.conv1d, F.conv2d)[self.ndim - 1]
        weight = self.skip.repeat_interleave(head, dim=0)
        y: Tensor = conv(grid, weight, padding=weight.shape[-1] // 2, groups=heads * head)
        return y.movedim(1, -1).reshape(batch, tokens, heads, head).transpose(1, 2)
