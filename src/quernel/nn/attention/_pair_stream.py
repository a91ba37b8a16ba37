"""``PairStream``: decoding by pairs without a call of torch's dispatcher, whose few operations cost more than the sums.

State, operands and kernel are prepared once; a step hands over one address of ids and one of outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit
from torch import Tensor

from quernel._errors import QuernelError
from quernel.nn import _pair_kernels
from quernel.nn._addresses import I64, make_caller, pointer
from quernel.nn._block_plain import wide_dtype
from quernel.nn._pair_ops import address_of_sums
from quernel.nn._pair_plain import refuse

if TYPE_CHECKING:
    from quernel.nn.attention.pair_connect import PairConnect

_OUT = _pair_kernels.FIELDS.index("out")
_MOST = np.int64(2**31 - 1)
_work = make_caller(I64, I64, I64, I64, returns=ir.VoidType())


@njit(nogil=True, cache=True, fastmath=False)
def _step(work: Any, table: Any, ids: Any, state: Any, out: Any, batch: Any, window: Any) -> Any:
    """Shift one id into each window and sum its pairs; return whether an id is out of range."""
    fields = carray(pointer(table), (len(_pair_kernels.FIELDS) + 1,), np.int64)
    new, held = carray(pointer(ids), (batch,), np.int64), carray(pointer(state), (batch, window), np.int32)
    for b in range(batch):
        for j in range(window - 1):
            held[b, j] = held[b, j + 1]
        # An id beyond 32 bits must not become a small one.
        held[b, window - 1] = max(-_MOST, min(_MOST, new[b]))
    fields[_OUT], fields[len(_pair_kernels.FIELDS)] = out, 0
    _work(work, (table, 0, batch, 0))
    return fields[len(_pair_kernels.FIELDS)]


class PairStream:
    """Streams of tokens through one ``PairConnect`` on a CPU, for decoding; made by ``PairConnect.stream``.

    Parameters
    ----------
    layer : PairConnect
        Causal, with a window and a vocabulary, over rows of its own. Its values may change meanwhile, not its place.
    batch : int
        Number of streams.
    """

    def __init__(self, layer: PairConnect, batch: int) -> None:
        table, relative = layer.table, layer.distance_weights
        if not layer.causal or layer.window is None or table.vocab is None:
            raise QuernelError("a stream needs causal=True, a window and a vocab; decode with step(state, ids)")
        if table.storage == "robe" or table.combine == "sum" or table.weight.device.type != "cpu":
            raise QuernelError(
                "a stream needs rows of its own on a CPU, combine='concat'; decode with step(state, ids)"
            )
        self.layer, self.state = layer, layer.start(batch, "cpu")
        wide = wide_dtype(table.weight.dtype)
        scores = layer.scores if layer.normalise == "softmax" else None
        self._held = (table.weight, scores, relative)
        if any(t is not None and (not t.is_contiguous() or t.dtype is not wide) for t in self._held[1:]):
            raise QuernelError(f"scores, gain and bias must be {wide} for a stream; decode with step(state, ids)")
        addresses = [0 if t is None else t.data_ptr() for t in self._held]
        sizes = (batch, layer.window, 1, *layer.layout)
        self._fields = np.array([*addresses, self.state.data_ptr(), 0, *sizes, 0])
        self._shape, self._dtype = (batch, table.dim), wide
        self._work = address_of_sums(table.weight.dtype, torch.int32)
        self._numbers = (self._fields.ctypes.data, self.state.data_ptr(), batch, layer.window)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:  # (B,) -> (B, dim)
        """Take one token a stream, int64; return the mixed tokens. The state is changed in place."""
        if ids.shape != self._shape[:1] or ids.dtype is not torch.int64 or not ids.is_contiguous():
            raise QuernelError(
                f"ids must be int64 of shape ({self._shape[0]},), contiguous; got {ids.dtype} {tuple(ids.shape)}"
            )
        out = torch.empty(self._shape, dtype=self._dtype)
        table, state, batch, window = self._numbers
        if _step(self._work, table, ids.data_ptr(), state, out.data_ptr(), batch, window):
            refuse(ids, self.layer.layout)
        project = self.layer.out_proj
        return out if project is None else project(out)
