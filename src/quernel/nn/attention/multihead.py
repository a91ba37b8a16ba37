"""``BinaryMultiheadAttention``: binary linear attention behind the call of ``torch.nn.MultiheadAttention``.

Models written against torch's layer call it with query, key and value; here they must be one tensor.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel.nn.attention.shift_add import BinaryLinearAttention


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        return BinaryMultiheadAttention.from_attention(attention, conv_kernel=3)

    return {"make": make, "input": lambda generator: (torch.randn(3, 5, 8, generator=generator),)}


@register(
    "shiftaddvit", pillar="nn", contract="module", paper="2306.06446", status="stable", headline=False, example=_example
)
class BinaryMultiheadAttention(BinaryLinearAttention):
    """``BinaryLinearAttention`` in the place of an ``nn.MultiheadAttention`` that attends to its own input.

    Parameters
    ----------
    dim, num_heads, qkv_bias
        As in ``BinaryLinearAttention``, like all keyword options.

    Notes
    -----
    There are no attention weights to return: the second output is None.  Masks between tokens cannot be expressed.

    Examples
    --------
    >>> import torch
    >>> attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    >>> x = torch.randn(2, 10, 32)
    >>> y, weights = BinaryMultiheadAttention.from_attention(attention)(x, x, x)
    >>> y.shape, weights
    (torch.Size([2, 10, 32]), None)
    """

    #: Whether tokens are the second axis of inputs, or the first.
    batch_first: bool = True

    @classmethod
    def from_attention(cls, attention: nn.Module, **options: Any) -> Self:
        """Take over the projections and the order of axes of an ``nn.MultiheadAttention``."""
        new = super().from_attention(attention, **options)
        new.batch_first = bool(getattr(attention, "batch_first", True))
        return new

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Return the mixed tokens and None; arguments as in ``nn.MultiheadAttention``.

        Raises
        ------
        QuernelError
            If key or value is another tensor than the query, tokens are masked from each other, or the padding mask
            is not boolean.
        """
        if any(x is not None and x is not query for x in (key, value)):
            raise QuernelError("query, key and value must be one tensor: binary linear attention is self-attention")
        if attn_mask is not None or is_causal:
            raise QuernelError("attn_mask must be None and is_causal False: linear attention sees all tokens")
        if key_padding_mask is not None and key_padding_mask.dtype is not torch.bool:
            raise QuernelError(f"key_padding_mask must be boolean; got {key_padding_mask.dtype}")
        mask = None if key_padding_mask is None else ~key_padding_mask
        x = query.unsqueeze(0) if query.ndim == 2 else query if self.batch_first else query.transpose(0, 1)
        y = super().forward(x, mask=mask)
        return (y.squeeze(0) if query.ndim == 2 else y if self.batch_first else y.transpose(0, 1)), None

    def config(self) -> dict[str, Any]:
        """Return the options, the classes of the projections and the order of axes."""
        return super().config() | {"batch_first": self.batch_first}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained layer from ``config()``."""
        new = super().from_config(config)
        new.batch_first = config["batch_first"]
        return new
