"""``NormAwareLinearAttention``: attention linear in the number of tokens that keeps the norm of a query and all signs.

    [q | k | v | g] = W x + b,    y = out(LN(attend(q, k, v) + lepe(v)) * SiLU(g))

per head attend = ``nala_attention`` (arXiv 2506.21137), lepe a depthwise convolution of the values on their grid, LN
over all channels.  ``GatedSoftmaxAttention`` is the same layer around softmax, for few tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_choice, check_float, check_int, check_type
from quernel.nn._mixer import Mixer
from quernel.nn.functional.feature_attention import LinearAttentionState
from quernel.nn.functional.nala import LEAST_POWER, VARIANTS, Variant, nala_attention
from quernel.nn.functional.rope import rope1d, rope2d, rotate

Rope = Literal["1d", "2d"] | None
ROPES: tuple[Rope, ...] = (None, "1d", "2d")


class NormAwareState(NamedTuple):
    """What a causal mixer carries from token to token: sums, the last values of the convolution, and the position."""

    sums: LinearAttentionState
    recent: Tensor
    position: Tensor


class GatedAttention(Mixer):
    """The layer around an attention: projections, rotary positions, convolution of the values, norm and gate."""

    def __init__(
        self, dim: int, num_heads: int, rope: Rope, gate: bool, lepe: int | None, ndim: int | None, causal: bool = False
    ) -> None:
        super().__init__(dim)
        self.num_heads = check_int("num_heads", num_heads, low=1)
        if dim % num_heads:
            raise QuernelError(f"num_heads must divide dim={dim}; got {num_heads}")
        self.rope = check_choice("rope", rope, ROPES)
        self.gate, self.causal = check_bool("gate", gate), check_bool("causal", causal)
        pairs = {None: 1, "1d": 2, "2d": 4}[rope]
        if dim // num_heads % pairs:
            raise QuernelError(
                f"dim / num_heads must be a multiple of {pairs} for rope={rope!r}; got {dim // num_heads}"
            )
        self.lepe = None if lepe is None else check_int("lepe", lepe, low=1)
        if lepe is not None and lepe % 2 == 0:
            raise QuernelError(f"lepe must be odd, so that it is centred on its token; got {lepe}")
        if ndim is None:
            given = 1 if rope == "1d" or (causal and rope is None) else 2
        else:
            given = check_choice("ndim", ndim, (1, 2))
        if rope == "2d" and given == 1:
            raise QuernelError('rope="2d" needs a grid; give ndim=2')
        if causal and lepe is not None and given == 2:
            raise QuernelError("a causal mixer convolves along its tokens only; give ndim=1 or lepe=None")
        self.ndim = given
        if lepe is not None or rope == "2d":
            self.spatial_ndim = (given,)  # type: ignore[misc]
        self.project = nn.Linear(dim, (4 if gate else 3) * dim)
        if lepe is not None:
            conv = (nn.Conv1d, nn.Conv2d)[given - 1]
            self.conv = conv(dim, dim, lepe, padding=lepe // 2, groups=dim)
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, dim)

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        """Mix the values of each head; (B, H, N, D) each, mask (B, N), rope (N, D / 2, 2)."""

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        sizes = x.shape[1:-1]
        q, k, v, gate = self._projected(x.flatten(1, -2))  # (B, N, C)
        if mask is not None:
            mask = mask.flatten(1)
            v = v * mask[..., None]
        q, k, values = (self._split(t) for t in (q, k, v))
        y = self._attend(q, k, values, mask, self._turns(sizes, x, 0))
        return self._finished(y, self._convolved(v, sizes), gate).view_as(x)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, *gate = self.project(x).chunk(4 if self.gate else 3, dim=-1)
        return q, k, v, gate[0] if gate else None

    def _split(self, t: Tensor) -> Tensor:  # (B, N, C) -> (B, H, N, D)
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _turns(self, sizes: Sequence[int], x: Tensor, start: int | Tensor) -> Tensor | None:
        if self.rope is None:
            return None
        dtype, size = torch.promote_types(x.dtype, torch.float32), self.dim // self.num_heads
        if self.rope == "2d":
            return rope2d(sizes[0], sizes[1], size, device=x.device, dtype=dtype)
        return rope1d(torch.Size(sizes).numel(), size, start=start, device=x.device, dtype=dtype)

    def _convolved(self, v: Tensor, sizes: Sequence[int], before: Tensor | None = None) -> Tensor | None:
        """Convolve the values on their grid, zeros or what was ``before`` beyond it; (B, N, C)."""
        if self.lepe is None or v.shape[1] == 0:
            return None
        weight, pad = self.conv.weight, self.lepe // 2
        if self.ndim == 1:
            weight = weight[:, :, None]
            if self.causal:
                past = v.new_zeros(v.shape[0], self.lepe - 1, self.dim) if before is None else before
                v = torch.cat([past, v], dim=1)
        # A row is a grid of height one; channels last is the layout that depthwise convolutions want.
        grid = v.unflatten(1, (1, -1) if self.ndim == 1 else tuple(sizes)).permute(0, 3, 1, 2)
        padding = (pad, pad) if self.ndim == 2 else (0, 0 if self.causal else pad)
        y = F.conv2d(
            grid.contiguous(memory_format=torch.channels_last), weight, self.conv.bias, 1, padding, 1, self.dim
        )
        return y.permute(0, 2, 3, 1).flatten(1, 2)

    def _finished(self, y: Tensor, lepe: Tensor | None, gate: Tensor | None) -> Tensor:  # (B, H, N, D) -> (B, N, C)
        y = y.transpose(1, 2).flatten(2)
        y = self.norm(y if lepe is None else y + lepe)
        out: Tensor = self.out(y if gate is None else y * F.silu(gate))
        return out

    def _layer_flops(self, tokens: int) -> int:
        conv = 0 if self.lepe is None else 2 * tokens * self.dim * self.lepe**self.ndim
        return 2 * tokens * self.dim * self.dim * (5 if self.gate else 4) + conv


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return NormAwareLinearAttention(16, 2, causal=True, rope="1d", lepe=3, decay=0.9, norm_scale="learn", chunk=4)

    return {"make": make, "input": lambda generator: (torch.randn(3, 9, 16, generator=generator),)}


def _softmax_example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return GatedSoftmaxAttention(16, 2, rope="2d")

    return {"make": make, "input": lambda generator: (torch.randn(2, 4, 5, 16, generator=generator),)}


@register("nalaformer", pillar="nn", contract="mixer", paper="2506.21137", status="experimental", example=_example)
class NormAwareLinearAttention(GatedAttention):
    """Linear attention whose weights get sharper with the norm of the query.

    Parameters
    ----------
    dim : int
        Channels.
    num_heads : int
        Divides ``dim``.
    power : float, default=3.0
        Of the features, at least 2.
    causal : bool, default=False
        Tokens of several axes count row by row.
    rope : {None, "1d", "2d"}, default=None
        Rotary positions along the tokens or on their grid, in the numerator only.
    gate : bool, default=True
    lepe : int or None, default=5
        Odd width of the depthwise convolution of the values; None leaves it out.
    norm_scale : float or "learn", default=1.0
        Norms of queries far beyond it are not told apart.  1 is the published form; try sqrt(dim / num_heads).  "learn"
        learns one a head, from 1 on.
    variant : {"split", "cosine"}, default="split"
    ndim : {1, 2}, optional
        Axes of the grid that ``lepe`` sees; by default those of ``rope``, without it 1 if ``causal``, else 2.
    decay : float or sequence of float, optional
        Factor in (0, 1] a token, of all heads or of each; causal only.
    chunk : int, default=128
        Tokens of a chunk, causal only.
    eps : float, default=1e-6
        Added to the mean weight.

    Raises
    ------
    QuernelError
        If an option is out of range; in ``forward`` if shapes do not fit.

    Notes
    -----
    The state of ``step`` has a fixed size: H (2 D^2 + 2 D + 1) numbers and ``lepe - 1`` values.  Keys near zero shrink
    the output towards zero.  In float32 on a CPU ``variant="split"`` has no second derivatives.

    Departs from the authors' code, which divides by the norm of a query even if it is zero.

    References
    ----------
    Meng et al., "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137, 2025.

    Examples
    --------
    >>> import torch
    >>> NormAwareLinearAttention(64, num_heads=4, rope="2d")(torch.randn(2, 14, 14, 64)).shape
    torch.Size([2, 14, 14, 64])
    """

    options = (
        "num_heads", "power", "causal", "rope", "gate", "lepe", "norm_scale", "variant", "ndim", "decay", "chunk",
        "eps",
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        num_heads: int,
        power: float = 3.0,
        causal: bool = False,
        rope: Rope = None,
        gate: bool = True,
        lepe: int | None = 5,
        norm_scale: float | str = 1.0,
        variant: Variant = "split",
        *,
        ndim: int | None = None,
        decay: float | Sequence[float] | None = None,
        chunk: int = 128,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim, num_heads, rope, gate, lepe, ndim, causal)
        self.power = check_float("power", power, low=LEAST_POWER)
        self.variant: Variant = check_choice("variant", variant, VARIANTS)
        self.chunk, self.eps = check_int("chunk", chunk, low=1), check_float("eps", eps, low=0.0)
        if isinstance(norm_scale, str):
            self.norm_scale: float | str = check_choice("norm_scale", norm_scale, ("learn",))
        else:
            self.norm_scale = check_float("norm_scale", norm_scale, low=0.0, open_low=True)
        if norm_scale == "learn":
            self.log_norm_scale = nn.Parameter(torch.zeros(num_heads))
        self.decay = None if decay is None else self._checked_decay(decay)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C), projections included and powers counted as one."""
        batch, *sizes, _ = shape
        tokens, size = torch.Size(sizes).numel(), self.dim // self.num_heads
        sums = 8 * tokens * self.dim * size
        # Inside a chunk: products of features, and those with the values.
        inside = 6 * tokens * min(self.chunk, tokens) * self.dim if self.causal else 0
        return batch * (self._layer_flops(tokens) + sums + inside + 8 * tokens * self.dim)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NormAwareState:
        """Return the state before the first token."""
        self._check_recurrent()
        like = self.project.weight
        device, size = self._state_device(device), self.dim // self.num_heads
        wide = torch.promote_types(like.dtype if dtype is None else dtype, torch.float32)
        sums = LinearAttentionState.empty(batch, self.num_heads, 2 * size, size, device=device, dtype=wide)
        recent = torch.zeros(batch, (self.lepe or 1) - 1, self.dim, device=device, dtype=dtype or like.dtype)
        return NormAwareState(sums, recent, torch.zeros((), dtype=torch.int64, device=device))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        out: Tensor = nala_attention(q, k, v, mask=mask, rope=rope, **self._told(v))
        return out

    def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        check_type("state", state, NormAwareState)
        q, k, v, gate = self._projected(x)
        rope = self._turns(x.shape[1:2], x, state.position)
        y, sums = nala_attention(*(self._split(t) for t in (q, k, v)), rope=rope, state=state.sums, **self._told(v))
        recent = state.recent.to(v.dtype)
        lepe = self._convolved(v, x.shape[1:2], recent)
        kept = torch.cat([recent, v], dim=1)
        # A copy: a slice would keep all tokens of x in memory.
        recent = kept[:, kept.shape[1] - recent.shape[1] :].clone()
        return self._finished(y, lepe, gate), NormAwareState(sums, recent, state.position + x.shape[1])

    def _check_recurrent(self) -> None:
        if not self.causal or self.rope == "2d":
            raise QuernelError('NormAwareLinearAttention has a recurrent form only with causal=True, and not rope="2d"')

    def _told(self, v: Tensor) -> dict[str, Any]:
        wide = torch.promote_types(v.dtype, torch.float32)
        return {
            "power": self.power,
            "norm_scale": self.log_norm_scale.exp() if self.norm_scale == "learn" else self.norm_scale,
            "variant": self.variant,
            "causal": self.causal,
            "chunk": self.chunk,
            "decay": None if self.decay is None else torch.tensor(self.decay, dtype=wide, device=v.device),
            "eps": self.eps,
        }

    def _checked_decay(self, decay: float | Sequence[float]) -> tuple[float, ...]:
        if not self.causal:
            raise QuernelError(f"decay needs causal=True: it follows an order of tokens; got {decay!r}")
        each = tuple(decay) if isinstance(decay, Sequence) and not isinstance(decay, str) else (decay,) * self.num_heads
        if len(each) != self.num_heads:
            raise QuernelError(f"decay must be a number or one for each of {self.num_heads} heads; got {decay!r}")
        return tuple(check_float("decay", g, low=0.0, high=1.0, open_low=True) for g in each)


@register(
    "nalaformer",
    pillar="nn",
    contract="mixer",
    paper="2506.21137",
    status="experimental",
    headline=False,
    example=_softmax_example,
)
class GatedSoftmaxAttention(GatedAttention):
    """Softmax attention in the layer of ``NormAwareLinearAttention``: what NaLaFormer's last stages use.

    Parameters
    ----------
    dim, num_heads, rope, gate, lepe, ndim
        As in ``NormAwareLinearAttention``.

    References
    ----------
    Meng et al., "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137, 2025.
    """

    options = ("num_heads", "rope", "gate", "lepe", "ndim")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rope: Rope = None,
        gate: bool = True,
        lepe: int | None = 5,
        *,
        ndim: int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, rope, gate, lepe, ndim)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C), projections included."""
        batch, *sizes, _ = shape
        tokens = torch.Size(sizes).numel()
        return batch * (self._layer_flops(tokens) + 4 * tokens * tokens * self.dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        if rope is not None:
            q, k = (rotate(t.to(rope.dtype), rope).to(v.dtype) for t in (q, k))
        seen = None if mask is None else mask[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        # Without any key a row is NaN in some of torch's kernels and zero in others.
        return y if seen is None else y.masked_fill(~seen.any(-1, keepdim=True), 0.0)
