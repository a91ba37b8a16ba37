"""Tasks of ``TinyLM``: next-token loss over full contexts of text, and the logits that trainings take it of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data
from quernel._errors import DataError
from quernel.data import Sentences
from quernel.models._task import Task, run
from quernel.models.decoder import TinyLM

_CALIBRATION_TOKENS, _CALIBRATION_WINDOWS, _BATCH = 256, 32, 8


@dataclass(frozen=True)
class NegativeCrossEntropy:
    """Minus the mean next-token loss in nats over windows that do not overlap: larger is better."""

    inputs: tuple[Tensor, ...]  # (B, T)
    targets: tuple[Tensor, ...]  # (B, T)

    @classmethod
    def of(cls, ids: Tensor, length: int, limit: int | None = None) -> NegativeCrossEntropy:
        """Cut token ids, shape (n,), into full windows of ``length`` tokens; ``limit`` keeps the first windows."""
        windows = windows_of(ids, length)[:limit]
        return cls(torch.split(windows[:, :-1], _BATCH), torch.split(windows[:, 1:], _BATCH))

    def __call__(self, model: nn.Module) -> float:
        loss, count = 0.0, 0
        for inputs, targets in zip(self.inputs, self.targets, strict=True):
            logits = run(model, (inputs,))[0]
            loss += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
        return -loss / count


def windows_of(ids: Tensor, length: int) -> Tensor:
    """Return all full windows with the token after them, shape (n, length + 1)."""
    starts = range(0, len(ids) - length, length)
    return torch.stack([ids[start : start + length + 1] for start in starts])


def lm_task(model: TinyLM, limit: int | None) -> Task:
    """Join a language model and tinyshakespeare: calibrate on train, choose on validation, judge on test."""
    fitting, choosing, judging = (
        model.encode(data.load("tinyshakespeare", split=split).text) for split in ("train", "validation", "test")
    )
    return _task("tinyshakespeare", model, fitting, choosing, judging, limit)


def own_text_lm_task(model: TinyLM, held: Sentences, path: str, limit: int | None) -> Task:
    """Join a language model and a user's text: first half to calibrate and choose, second half to judge."""
    ids = model.encode("\n".join(held.text))
    if len(ids) < 4:
        raise DataError(f"{path} must hold at least 4 tokens, half to choose on and half to judge on; got {len(ids)}")
    middle = len(ids) // 2
    return _task(path, model, ids[:middle], ids[:middle], ids[middle:], limit)


def _task(name: str, model: TinyLM, fitting: Tensor, choosing: Tensor, judging: Tensor, limit: int | None) -> Task:
    short = min(_CALIBRATION_TOKENS, model.context, len(fitting) - 1)
    windows = windows_of(fitting, short)
    # Evenly spaced over the text, and without the last token, which is only a target.
    chosen = windows[:: max(1, len(windows) // _CALIBRATION_WINDOWS)][:_CALIBRATION_WINDOWS, :-1]
    calibration = torch.split(chosen, _BATCH)
    select, judge = (
        NegativeCrossEntropy.of(ids, min(model.context, len(ids) - 1), limit) for ids in (choosing, judging)
    )
    return Task(name, "neg_cross_entropy", calibration, select, judge, calibration[0])


def logits_of(model: TinyLM, tokens: Tensor) -> Tensor:
    """Return logits in float32, computed in bfloat16 where the processor has it; emulated it would be slower."""
    # Older torch cannot tell and trains in float32.
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        logits: Tensor = model(tokens)
    return logits.float()
