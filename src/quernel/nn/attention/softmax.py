"""``SoftmaxAttention``: multi-head attention by softmax, through torch's fused operation; what other mixers replace.

y_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j per head of size D.  Cost 4 N^2 C beside the projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_bool, check_int
from quernel.nn._mixer import Mixer


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return SoftmaxAttention(16, 2, causal=True)

    return {"make": make, "input": lambda generator: (torch.randn(3, 6, 16, generator=generator),)}


@register("softmax-attention", pillar="nn", contract="mixer", paper=None, status="stable", example=_example)
class SoftmaxAttention(Mixer):
    """Softmax attention among all tokens, or of each token to those before it.

    Parameters
    ----------
    dim : int
        Channels.
    num_heads : int
        Divides ``dim``.
    causal : bool, default=False
        Tokens of several axes count row by row.
    qkv_bias : bool, default=True
        Whether queries, keys and values have a bias.

    Notes
    -----
    The state of ``step`` holds the keys and values of all tokens so far: it grows by 2 C numbers a token.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, 2017.

    Examples
    --------
    >>> import torch
    >>> SoftmaxAttention(64, num_heads=4)(torch.randn(2, 14, 14, 64)).shape
    torch.Size([2, 14, 14, 64])
    """

    options = ("num_heads", "causal", "qkv_bias")

    def __init__(self, dim: int, num_heads: int, causal: bool = False, qkv_bias: bool = True) -> None:
        super().__init__(dim)
        self.num_heads = check_int("num_heads", num_heads, low=1)
        if dim % num_heads:
            raise QuernelError(f"num_heads must divide dim={dim}; got {num_heads}")
        self.causal, self.qkv_bias = check_bool("causal", causal), check_bool("qkv_bias", qkv_bias)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the operations over (B, *S, C), projections included."""
        batch, *sizes, channels = shape
        tokens = torch.Size(sizes).numel()
        pairs = tokens * (tokens + 1) // 2 if self.causal else tokens * tokens
        return batch * (8 * tokens * channels * channels + 4 * pairs * channels)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return empty keys and values, (B, heads, 0, D) each."""
        self._check_recurrent()
        device, size = self._state_device(device), self.dim // self.num_heads
        empty = torch.empty(batch, self.num_heads, 0, size, device=device, dtype=dtype)
        return empty, empty

    def _check_recurrent(self) -> None:
        if not self.causal:
            raise QuernelError("SoftmaxAttention has a recurrent form only with causal=True")

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:  # (B, N, C) -> three (B, H, N, D)
        parts: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return parts.unbind(0)

    def _merged(self, y: Tensor) -> Tensor:  # (B, H, N, D) -> (B, N, C)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self._heads(x.flatten(1, -2))
        seen = None if mask is None else mask.flatten(1)[:, None, None, :]
        if seen is not None and self.causal:
            seen = seen & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal and seen is None)
        if mask is not None:
            # A row that sees no key is NaN in some of torch's kernels and zero in others.
            y = y.masked_fill(~seen.any(-1, keepdim=True), 0.0)  # type: ignore[union-attr]
        return self._merged(y).view_as(x)

    def _continue(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        q, k, v = self._heads(x)
        before = state[0].shape[2]
        k, v = torch.cat([state[0].to(k.dtype), k], 2), torch.cat([state[1].to(v.dtype), v], 2)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(before)
        return self._merged(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)), (k, v)
