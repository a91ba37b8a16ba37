"""``EncoderMixer``: a token mixer in the place of the self-attention of a transformers encoder, such as MiniLM's.

There the layer is called with hidden states (B, T, C) and a mask of pairs, and answers with a tuple; padding is what
the mask says, the same for every query.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_type
from quernel.nn._described import check_config, layer_config, layer_from_config
from quernel.nn._mixer import Mixer


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        from quernel.nn.attention.softmax import SoftmaxAttention

        return EncoderMixer(SoftmaxAttention(16, 2))

    def inputs(generator: torch.Generator) -> tuple[Tensor, ...]:
        mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
        return torch.randn(2, 6, 16, generator=generator), mask

    return {"make": make, "input": inputs}


@register(
    "softmax-attention", pillar="nn", contract="module", paper=None, status="stable", headline=False, example=_example
)
class EncoderMixer(nn.Module):
    """Give a token mixer the call of ``BertSelfAttention`` and its like.

    Parameters
    ----------
    mixer : Mixer
        Over sequences.  A projection behind it stays the encoder's own.

    Raises
    ------
    QuernelError
        If the mixer takes no sequences; on a call, if the mask is causal or a cache or another sequence is given.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import make_mixer
    >>> layer = EncoderMixer(make_mixer("softmax-attention", 8, num_heads=2))
    >>> y, weights = layer(torch.randn(2, 5, 8), attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
    >>> y.shape, weights
    (torch.Size([2, 5, 8]), None)
    """

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = check_type("mixer", mixer, Mixer)
        if 1 not in mixer.spatial_ndim:
            raise QuernelError(f"mixer must take sequences, (B, T, C); {type(mixer).__name__} does not")

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, None]:  # (B, T, C) -> (B, T, C)
        """Mix the tokens that count; there are no attention weights to return.

        ``attention_mask`` is (B, T) with True or 1 where a token counts, or (B, 1, T, T) with True or 0.0 where a query
        sees a key, False or a very negative number elsewhere.
        """
        for name in ("past_key_values", "encoder_hidden_states"):
            if others.get(name) is not None:
                raise QuernelError(f"{name} cannot be given: a token mixer sees the tokens of its own input only")
        mask = None if attention_mask is None else _kept(check_type("attention_mask", attention_mask, Tensor))
        return self.mixer(hidden_states, mask=mask), None

    def fuse(self) -> Self:
        """Return the same around the fused mixer."""
        return type(self)(self.mixer.fuse()).train(self.training)

    def config(self) -> dict[str, Any]:
        """Return the class and config of the mixer."""
        return {"mixer": layer_config(self.mixer)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build the layer around an untrained mixer."""
        check_config(cls.__name__, config, ("mixer",))
        return cls(layer_from_config(config["mixer"]))  # type: ignore[arg-type]


def _kept(mask: Tensor) -> Tensor:  # (B, T) or (B, 1, Q, T) -> (B, T)
    """Return which tokens count."""
    if mask.ndim == 2:
        return mask.bool()
    if mask.ndim != 4:
        raise QuernelError(f"attention_mask must have shape (B, T) or (B, 1, T, T); got {tuple(mask.shape)}")
    # Additive ones hold the most negative number of their dtype, or minus infinity.
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    kept = seen[:, 0, 0]
    # A graph cannot branch on values; outside of one, a causal mask must not be taken for padding.
    if not torch.compiler.is_compiling() and not torch.equal(seen, kept[:, None, None].expand_as(seen)):
        raise QuernelError(
            "attention_mask must be the same for every query, as padding is; this one is causal or local"
        )
    return kept
