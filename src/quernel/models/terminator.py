"""``Terminator``: an image classifier without attention and residuals, of generated kernels (arXiv 2401.17948).

``slow_neural_loss`` draws the global kernels of its blocks together: the mean squared difference between W_g of block i
and that of an earlier block j, its channels repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_float, check_int
from quernel.nn.conv.sfne import SFNEBlock, tiled
from quernel.nn.magnet import MAGNet

# The network for images of 32 x 32: channels in, growth, layers of the global slow nets, dropout, earlier blocks.
FACTORS, LAYERS, DROPOUT = (4, 3, 2, 2, 2), (3, 2, 2, 2, 2), (0.0, 0.05, 0.05, 0.05, 0.05)
EARLIER = ((), (), (0,), (1,), (2, 1))
# Of the norms of slow nets beside those of fast ones.
SLOW_SHARE = 1e-6


def _example() -> dict[str, Any]:
    @seeded
    def make() -> Terminator:
        return Terminator(size=4, factors=(4, 1, 1), layers=(1, 1, 1), dropout=(0, 0, 0), num_classes=3)

    return {"make": make, "input": lambda generator: (torch.randn(3, 3, 4, 4, generator=generator),)}


@register(
    "hyperzzw",
    pillar="models",
    contract="model",
    paper="2401.17948",
    status="experimental",
    headline=False,
    example=_example,
)
class Terminator(nn.Module):
    """The classifier, (B, channels, size, size) to logits; maps keep their size throughout.

    Parameters
    ----------
    size : int, default=32
        Side of the images.
    in_channels : int, default=3
    factors : sequence of int, default=(4, 3, 2, 2, 2)
        By how much each block multiplies the channels.
    layers : sequence of int, optional
        Of the global slow nets; (3, 2, 2, ...) by default.
    dropout : sequence of float, optional
        0 for the first block and 0.05 for the others by default.
    num_classes : int, default=10
    omega0 : float, default=1.0
        1 gives smooth kernels; public training code uses 2000.
    context, eval_stats
        As in ``HyperZZWLocal``; "batch" and "batch" are those of public code.
    modulated : bool, default=True
        Whether inputs modulate the global kernels.

    References
    ----------
    H. Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948, 2024.

    Examples
    --------
    >>> import torch
    >>> Terminator(size=8, factors=(4, 2))(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        size: int = 32,
        in_channels: int = 3,
        factors: Sequence[int] = FACTORS,
        *,
        layers: Sequence[int] | None = None,
        dropout: Sequence[float] | None = None,
        num_classes: int = 10,
        omega0: float = 1.0,
        context: Literal["sample", "batch", "none"] = "sample",
        eval_stats: Literal["running", "batch"] = "running",
        modulated: bool = True,
    ) -> None:
        super().__init__()
        blocks = len(factors)
        layers = LAYERS[:1] + (2,) * (blocks - 1) if layers is None else layers
        dropout = DROPOUT[:1] + (0.05,) * (blocks - 1) if dropout is None else dropout
        if not 1 <= blocks <= len(EARLIER) or len(layers) != blocks or len(dropout) != blocks:
            raise QuernelError(
                f"factors, layers and dropout must have one value for each of 1 to {len(EARLIER)} blocks; got "
                f"{list(factors)}, {list(layers)}, {list(dropout)}"
            )
        check_int("size", size, low=1), check_int("num_classes", num_classes, low=1)
        check_float("omega0", omega0, low=0.0, open_low=True)
        self._config: dict[str, Any] = {
            "size": size, "in_channels": in_channels, "factors": list(factors), "layers": list(layers),
            "dropout": list(dropout), "num_classes": num_classes, "omega0": omega0, "context": context,
            "eval_stats": eval_stats, "modulated": modulated,
        }  # fmt: skip
        channels = [check_int("in_channels", in_channels, low=1)]
        for factor in factors:
            channels.append(channels[-1] * check_int("factors", factor, low=1))
        self.factors = tuple(factors)
        self.blocks = nn.ModuleList(
            SFNEBlock(
                channels[i],
                size,
                factors[i],
                layers=layers[i],
                earlier=[channels[j + 1] for j in EARLIER[i]],
                dropout=dropout[i],
                omega0=omega0,
                context=context,
                eval_stats=eval_stats,
                modulated=modulated,
            )
            for i in range(blocks)
        )
        # Between two blocks stands a number that is added to all.
        self.biases = nn.Parameter(torch.zeros(blocks - 1))
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits."""
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x + self.biases[i - 1] if i else x, [outputs[j] for j in EARLIER[i]])
            outputs.append(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def slow_loss(self) -> Tensor:
        """Return ``slow_neural_loss`` of the global kernels of all blocks."""
        blocks: Any = self.blocks
        return slow_neural_loss([block.kernel() for block in blocks], self.factors)

    def norm_penalty(self, factor: float = 4e-5) -> Tensor:
        """Return a penalty on the size of the parameters, which published training adds to the loss.

        Parameters
        ----------
        factor : float, default=4e-5
            >= 0; 4e-5 to 5e-5 are published.

        Returns
        -------
        penalty : Tensor, shape ()
            factor (sum of ||p|| + 1e-6 sum of ||w||): p are the tensors outside of the slow nets, w the weights of the
            layers in these.  Norms are not squared; that of zeros has a gradient of zero.
        """
        check_float("factor", factor, low=0.0)
        nets = [module for module in self.modules() if isinstance(module, MAGNet)]
        inside = {id(p) for net in nets for p in net.parameters()}
        fast = [p for p in self.parameters() if id(p) not in inside]
        slow = [w for net in nets for w in net.layer_weights()]
        total = torch.stack([torch.linalg.vector_norm(p) for p in fast]).sum()
        return factor * (total + SLOW_SHARE * torch.stack([torch.linalg.vector_norm(w) for w in slow]).sum())

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)


def slow_neural_loss(kernels: Sequence[Tensor], factors: Sequence[int]) -> Tensor:
    """Return how far the global kernels of blocks are from each other.

    Parameters
    ----------
    kernels : sequence of Tensor, shape (1, C_i, H, W)
        Of the blocks in order, C_{i+1} = C_i * factors[i].
    factors : sequence of int

    Returns
    -------
    loss : Tensor, shape ()
        Sum over pairs j < i of the mean squared difference, the channels of the earlier one repeated.
    """
    total = kernels[0].new_zeros(())
    for i, kernel in enumerate(kernels):
        for j in range(i):
            times = 1
            for factor in factors[j:i]:
                times *= factor
            if kernels[j].shape[1] * times != kernel.shape[1]:
                raise QuernelError(
                    f"factors must lead from {kernels[j].shape[1]} channels of kernel {j} to {kernel.shape[1]} of "
                    f"kernel {i}; got {list(factors)}"
                )
            total = total + (kernel - tiled(kernels[j], kernel.shape[1])).square().mean()
    return total
