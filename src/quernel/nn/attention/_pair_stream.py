"""``PairStream``: decoding by pairs without a call of torch's dispatcher, whose few operations cost more than the sums.

State, operands and kernel are prepared once; a step hands over one address of ids and one of outputs. Before anything
is read or moved, ids are checked and the operands are looked at again: addresses outlive what lies there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn import _pair_kernels
from quernel.nn._addresses import I64, make_caller, pointer
from quernel.nn._block_plain import wide_dtype
from quernel.nn._pair_ops import address_of_sums
from quernel.nn._pair_plain import STORED, bad_id
from quernel.nn._stored import applied

if TYPE_CHECKING:
    from quernel.nn.attention.pair_connect import PairConnect

_OUT = _pair_kernels.FIELDS.index("out")
_IDS = _pair_kernels.FIELDS.index("ids")
_BATCH = _pair_kernels.FIELDS.index("batch")
_LENGTH = _pair_kernels.FIELDS.index("length")
_VOCAB = _pair_kernels.FIELDS.index("vocab")
_GAP = np.int64(_pair_kernels.GAP)
_work = make_caller(I64, I64, I64, I64, returns=ir.VoidType())


@njit(nogil=True, cache=True, fastmath=False)
def _step(work: Any, table: Any, ids: Any, out: Any) -> Any:
    """Shift one id into each window and sum its pairs.

    Returns
    -------
    wrong : int
        i + 1 if new id i is out of range, -(i + 1) if id i of the state is; then nothing has moved. Else 0.
    """
    fields = carray(pointer(table), (len(_pair_kernels.FIELDS) + 1,), np.int64)
    batch, window, limit = fields[_BATCH], fields[_LENGTH], fields[_VOCAB]
    new, held = carray(pointer(ids), (batch,), np.int64), carray(pointer(fields[_IDS]), (batch * window,), np.int32)
    for i in range(batch):
        if new[i] < 0 or new[i] >= limit:
            return i + 1
    for i in range(batch * window):
        if held[i] >= limit or (held[i] < 0 and held[i] != _GAP):
            return -(i + 1)
    for b in range(batch):
        for j in range(b * window, (b + 1) * window - 1):
            held[j] = held[j + 1]
        held[(b + 1) * window - 1] = new[b]
    fields[_OUT], fields[len(_pair_kernels.FIELDS)] = out, 0
    _work(work, (table, 0, batch, 0))
    return 0


def why_not_streamed(layer: PairConnect) -> str:
    """Return what keeps a layer from being streamed, or nothing."""
    table, (rows, *others) = layer.table, _operands(layer)
    if not layer.causal or layer.window is None or table.vocab is None:
        return "a stream needs causal=True, a window and a vocab"
    if rows is None or table.combine == "sum" or any(t is not None and not t.is_cpu for t in (rows, *others)):
        return "a stream needs rows of its own on a CPU, combine='concat'"
    if rows.dtype not in STORED or not rows.is_contiguous():
        return f"a stream needs contiguous rows in float32, float64 or bfloat16; they are {rows.dtype}"
    wide = wide_dtype(rows.dtype)
    if any(t is not None and (not t.is_contiguous() or t.dtype is not wide) for t in others):
        return f"scores, gain and bias must be {wide} for a stream"
    return ""


def _operands(layer: PairConnect) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return rows, scores and weights of distances as they are now.

    By the dictionaries: to find them as attributes of modules would take a good part of a step.
    """
    own, table = layer._parameters, cast(nn.Module, layer._modules["table"])
    return table._parameters.get("weight"), own.get("scores"), own.get("gain", own.get("bias"))


class PairStream:
    """Streams of tokens through one ``PairConnect`` on a CPU, for decoding; made by ``PairConnect.stream``.

    Parameters
    ----------
    layer : PairConnect
        Causal, with a window and a vocabulary, over rows of its own. It may be trained or cast between steps.
    batch : int
        Number of streams.
    """

    def __init__(self, layer: PairConnect, batch: int) -> None:
        self.layer, self._batch = layer, batch
        self._state = layer.start(batch, "cpu")
        self._prepare()

    @property
    def state(self) -> Tensor:
        """The last W ids of each stream, int32 (batch, W); a step changes them in place, and so may you."""
        return self._state

    def step(self, ids: Tensor) -> Tensor:  # (B,) -> (B, dim)
        """Take one token a stream, int64; return the mixed tokens. The state is changed in place.

        Raises
        ------
        QuernelError
            If an id is out of range; the state is as it was before.
        """
        if ids.shape != self._shape[:1] or ids.dtype is not torch.int64 or not (ids.is_cpu and ids.is_contiguous()):
            raise QuernelError(
                f"ids must be int64 of shape ({self._batch},), contiguous, on the CPU; got {ids.dtype} "
                f"{tuple(ids.shape)} on {ids.device}"
            )
        if self._places() != self._known:
            self._prepare()
        out = torch.empty(self._shape, dtype=self._wide)
        wrong = _step(self._work, self._table, ids.data_ptr(), out.data_ptr())
        if wrong:
            raise bad_id(ids[wrong - 1] if wrong > 0 else self._state.flatten()[-wrong - 1], self.layer.layout)
        if self._dtype is not self._wide:
            out = out.to(self._dtype)
        project = self.layer.out_proj
        if project is None:
            return out
        with torch.no_grad():
            return applied(project, out)

    def _prepare(self) -> None:
        """Take the addresses of what the kernel reads."""
        layer, reason = self.layer, why_not_streamed(self.layer)
        if reason:
            raise QuernelError(f"{reason}; decode with step(state, ids)")
        operands, rows = _operands(layer), layer.table.weight
        self._known = self._places()
        addresses = [0 if t is None else t.data_ptr() for t in (*operands, self._state)]
        sizes = (self._batch, layer.window, 1, *layer.layout)
        # One number more than there are fields: where the kernel reports an id that is out of range.
        self._fields = np.array([*addresses, 0, *sizes, 0])
        self._table = self._fields.ctypes.data
        self._work = address_of_sums(rows.dtype, torch.int32)
        self._shape, self._wide = (self._batch, layer.dim), wide_dtype(rows.dtype)
        self._dtype = layer.table.dtype_of_sums

    def _places(self) -> tuple[int | torch.dtype, ...]:
        """Return where the operands are, and the dtype: a cast may put other numbers at a known address."""
        rows, scores, relative = _operands(self.layer)
        if rows is None:
            return ()
        first, second = 0 if scores is None else scores.data_ptr(), 0 if relative is None else relative.data_ptr()
        return rows.data_ptr(), rows.dtype, first, second

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy look for the addresses of its own operands."""
        return {**self.__dict__, "_known": None}
