"""What activation quantisers learn from data: channel maxima, and a few input rows to compare settings on."""

from __future__ import annotations

import torch
from torch import Tensor

from quernel.kernels.moments import AbsMax
from quernel.nn.functional.activation_quant import quantize_activations
from quernel.nn.weights import Int4GroupWeight, Int8Weight

SAMPLE_ROWS = 512
ROWS_PER_BATCH = 64


class Calibration:
    """Observer of one layer's input: channel maxima over all rows, and the first rows of each batch.

    Parameters
    ----------
    channels : int
        Size of the last axis.
    percentile : float
        100 takes the maximum; less ignores the rarest outliers.
    """

    def __init__(self, channels: int, percentile: float) -> None:
        self.absmax = AbsMax(channels, percentile=percentile)
        self._rows: list[Tensor] = []
        self._count = 0

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take one batch of inputs, (..., C), without the rows that the mask leaves out."""
        x = x.detach().cpu()
        self.absmax.update(x, None if mask is None else mask.cpu())
        if self._count < SAMPLE_ROWS:
            rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask.cpu()]
            # Evenly over the batch: its first rows may all be the same special token.
            picked = rows[:: max(1, len(rows) // ROWS_PER_BATCH)][: SAMPLE_ROWS - self._count].float()
            self._rows.append(picked)
            self._count += len(picked)

    @property
    def seen(self) -> bool:
        """Whether any row arrived."""
        return self.absmax.count > 0

    @property
    def sample(self) -> Tensor:
        """Some input rows, shape (at most 512, C), float32."""
        return torch.cat(self._rows)


def output_error(x: Tensor, weight: Tensor, scale: Tensor, *, abits: int, wbits: int = 8) -> float:
    """Return ``||x W^T - y|| / ||x W^T||`` for y from int-quantised ``x / scale`` (rows) and ``scale * W``.

    With 4 bits the weight has the groups in which it is stored, else one step a channel.

    x: (T, I)  weight: (O, I)  scale: (I,)
    """
    wanted = x @ weight.T
    scaled = x / scale
    row = scaled.abs().amax(dim=1, keepdim=True) / (2 ** (abits - 1) - 1)
    folded = weight * scale
    stored = (Int4GroupWeight if wbits == 4 else Int8Weight).from_dense(folded)
    codes = quantize_activations(scaled, row.expand_as(scaled), bits=abits)
    got = (codes * row) @ stored.dense().T
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
