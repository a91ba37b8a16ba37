"""Training of the tinyshakespeare models: a few CPU minutes once, then from the cache.

Muon for the matrices (1.60 against 1.83 nats with AdamW after a million tokens), AdamW for embedding
and norms, linear warm-up and decay, bfloat16 products where the processor has them. Most crops are short
because they are cheap; every fourth step sees full contexts, so that all positions are trained.

A second model goes on from there and learns to copy: see ``models._lm_copying``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel import data
from quernel._progress import Progress
from quernel._validate import check_choice, check_int
from quernel.models import _lm_copying
from quernel.models._cached import measured, seeded, trained
from quernel.models._lm_tasks import NegativeCrossEntropy, logits_of
from quernel.models.decoder import TinyLM

STEPS = 1500
TEXTS = ("plain", "repeated")
_ARCHITECTURE = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 344, "context": 1024}
_TOKENS_A_STEP = 4096
_SHORT, _LONG, _LONG_EVERY = 256, 1024, 4
_LEARNING_RATE, _WARM_UP, _LAST = 1.5e-2, 30, 0.02
_WEIGHT_DECAY, _CLIP = 0.1, 1.0


def recipe(steps: int | None = None, text: str = "plain") -> dict[str, Any]:
    """Return everything that decides the weights; its digest names the cache folder."""
    if text == "repeated":
        return {"text": text, "from": recipe()} | _lm_copying.settings(_lm_copying.STEPS if steps is None else steps)
    return {
        "version": 1,
        "data": "tinyshakespeare/train",
        "seed": 0,
        "steps": STEPS if steps is None else steps,
        "tokens_a_step": _TOKENS_A_STEP,
        "crops": [_SHORT, _LONG, _LONG_EVERY],
        "learning_rate": [_LEARNING_RATE, _WARM_UP, _LAST],
        "weight_decay": _WEIGHT_DECAY,
        "clip": _CLIP,
        "architecture": _ARCHITECTURE,
    }


def tiny_lm(*, text: str = "plain", steps: int | None = None, progress: Progress | None = None) -> TinyLM:
    """Return a character model of tinyshakespeare, trained on first use and cached.

    Parameters
    ----------
    text : {"plain", "repeated"}
        ``"repeated"`` is trained further on passages that follow themselves, until it copies what is far back.
    steps : int, optional
        Fewer training steps give another, worse model with a cache folder of its own; for tests.
    progress : callable, optional
        ``progress(message, fraction)``, called while training.

    Returns
    -------
    TinyLM
        In eval mode. Context 1024 bytes, tied head.

    Raises
    ------
    DataError
        If the model is not cached and tinyshakespeare is absent.

    Notes
    -----
    No global generator is touched. Weights differ in the last bits between processors and thread counts.
    """
    check_choice("text", text, TEXTS)
    chosen = recipe(None if steps is None else check_int("steps", steps, low=1), text)
    return cast(TinyLM, trained(_folder(text), chosen, lambda: _train(chosen, progress)))


def tiny_lm_measured(*, text: str = "plain", steps: int | None = None) -> dict[str, float]:
    """Return what was measured when the cached model was trained: losses in nats a character, and seconds."""
    return measured(_folder(text), recipe(steps, text))


def _folder(text: str) -> str:
    return "tiny-lm" if text == "plain" else f"tiny-lm-{text}"


def _train(chosen: Mapping[str, Any], progress: Progress | None) -> tuple[TinyLM, dict[str, float]]:
    again = "from" in chosen
    model = tiny_lm(progress=progress) if again else seeded(chosen["seed"], lambda: TinyLM(**chosen["architecture"]))
    model = cast(TinyLM, model).train()
    splits = ("train", "validation", "test")
    ids = {split: model.encode(data.load("tinyshakespeare", split=split).text) for split in splits}
    learn = _lm_copying.learn_to_copy if again else _learn_text
    learn(model, ids["train"], chosen["steps"], chosen["seed"], progress)
    model.eval()
    found = {}
    for split in ("validation", "test"):
        found[f"{split}_loss"] = -NegativeCrossEntropy.of(ids[split], model.context)(model)
        passages = _lm_copying.second_copies(ids[split], model.context)
        found[f"{split}_loss_of_a_second_copy"] = _lm_copying.second_copy_loss(model, passages)
    return model, found


def _learn_text(model: TinyLM, ids: Tensor, steps: int, seed: int, progress: Progress | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0),
    )
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min((step + 1) / _WARM_UP, max(1 - step / steps, _LAST))
            optimizer.zero_grad()
        crops = _crops(ids, _LONG if step % _LONG_EVERY == 0 else _SHORT, generator)
        logits = logits_of(model, crops[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        for optimizer in optimizers:
            optimizer.step()
        if progress is not None and step % 10 == 0:
            progress(f"training tiny-lm, {loss.item():.2f} nats a character", step / steps)


def _crops(ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(ids) - length - 1, (_TOKENS_A_STEP // length,), generator=generator)
    return torch.stack([ids[start : start + length + 1] for start in starts.tolist()])  # (B, length + 1)
