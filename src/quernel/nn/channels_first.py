"""``ChannelsFirst``: a token mixer in the place of a layer over (B, C, *S), such as a depthwise convolution.

Both layouts are views of each other: a channels_last image (B, C, H, W) reaches the mixer contiguous and uncopied.
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

        return ChannelsFirst(SoftmaxAttention(8, 2))

    return {"make": make, "input": lambda generator: (torch.randn(2, 8, 3, 5, generator=generator),)}


@register(
    "softmax-attention", pillar="nn", contract="module", paper=None, status="stable", headline=False, example=_example
)
class ChannelsFirst(nn.Module):
    """Give a token mixer the layout (B, C, *S).

    Parameters
    ----------
    mixer : Mixer

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import make_mixer
    >>> layer = ChannelsFirst(make_mixer("softmax-attention", 8, num_heads=2))
    >>> layer(torch.randn(2, 8, 7, 7)).shape
    torch.Size([2, 8, 7, 7])
    """

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = check_type("mixer", mixer, Mixer)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, *S) -> (B, C, *S)
        """Mix and move the channels back."""
        ranks, dim = self.mixer.spatial_ndim, self.mixer.dim
        if check_type("x", x, Tensor).ndim - 2 not in ranks or x.shape[1] != dim:
            last = ". Use the mixer itself for (B, *S, C)" if x.ndim - 2 in ranks and x.shape[-1] == dim else ""
            axes = " or ".join(map(str, ranks))
            raise QuernelError(
                f"x must have shape (B, {dim}, *S), channels first, with {axes} axes in S; got {tuple(x.shape)}{last}"
            )
        y: Tensor = self.mixer(x.movedim(1, -1)).movedim(-1, 1)
        return y

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
