"""Training of the tinyshakespeare models: a few CPU minutes once, then from the cache.

Muon for the matrices (1.60 against 1.83 nats with AdamW after a million tokens), AdamW for embedding
and norms, linear warm-up and decay, bfloat16 products where the processor has them. Most crops are short
because they are cheap; every fourth step sees full contexts, so that all positions are trained.

A second model goes on from there on passages that are repeated until the crop is full, so that what comes next is
written far back in the context. Whether it looks there is measured (``test_loss_of_a_second_copy``): with this recipe
it does not yet, 1.60 nats a character against 1.59 of plain text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from quernel import data
from quernel._validate import check_choice, check_int
from quernel.models._cached import Progress, measured, seeded, trained
from quernel.models._lm_tasks import NegativeCrossEntropy, windows_of
from quernel.models.decoder import TinyLM

STEPS = 1500
REPEATED_STEPS = 600
TEXTS = ("plain", "repeated")
_ARCHITECTURE = {"dim": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 344, "context": 1024}
_TOKENS_A_STEP = 4096
_SHORT, _LONG, _LONG_EVERY = 256, 1024, 4
_LEARNING_RATE, _WARM_UP, _LAST = 1.5e-2, 30, 0.02
_WEIGHT_DECAY, _CLIP = 0.1, 1.0
# A passage that is repeated has between so many tokens and half of the crop.
_SHORTEST = 16


def recipe(steps: int | None = None, text: str = "plain") -> dict[str, Any]:
    """Return everything that decides the weights; its digest names the cache folder."""
    steps = (STEPS if text == "plain" else REPEATED_STEPS) if steps is None else steps
    more = {} if text == "plain" else {"text": text, "from": recipe(), "shortest": _SHORTEST}
    return more | {
        "version": 1,
        "data": "tinyshakespeare/train",
        "seed": 0,
        "steps": steps,
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
        ``"repeated"`` is trained further on passages that follow themselves again and again; see the module about what
        it has learned of that.
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


def repeated(passages: Tensor, length: int) -> Tensor:
    """Return passages, shape (B, n), followed by themselves until there are ``length`` tokens, shape (B, length)."""
    return passages.repeat(1, -(-length // passages.shape[1]))[:, :length]


def _folder(text: str) -> str:
    return "tiny-lm" if text == "plain" else f"tiny-lm-{text}"


def _train(chosen: Mapping[str, Any], progress: Progress | None) -> tuple[TinyLM, dict[str, float]]:
    again = "from" in chosen
    model = tiny_lm(progress=progress) if again else seeded(chosen["seed"], lambda: TinyLM(**chosen["architecture"]))
    model = cast(TinyLM, model).train()
    splits = ("train", "validation", "test")
    ids = {split: model.encode(data.load("tinyshakespeare", split=split).text) for split in splits}
    generator = torch.Generator().manual_seed(chosen["seed"])
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0),
    )
    steps, loss = chosen["steps"], torch.tensor(float("nan"))
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min((step + 1) / _WARM_UP, max(1 - step / steps, _LAST))
            optimizer.zero_grad()
        crops = _crops(ids["train"], _LONG if step % _LONG_EVERY == 0 else _SHORT, generator)
        loss = _loss(model, _with_repeats(crops, generator) if again else crops)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        for optimizer in optimizers:
            optimizer.step()
        if progress is not None and step % 10 == 0:
            progress(f"training tiny-lm, {loss.item():.2f} nats a character", step / steps)
    model.eval()
    found = {}
    for split in ("validation", "test"):
        found[f"{split}_loss"] = -NegativeCrossEntropy.of(ids[split], model.context)(model)
        passages = windows_of(ids[split], model.context // 2)[:, :-1]
        found[f"{split}_loss_of_a_second_copy"] = _second_copy_loss(model, passages)
    return model, found


def _crops(ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(ids) - length - 1, (_TOKENS_A_STEP // length,), generator=generator)
    return torch.stack([ids[start : start + length + 1] for start in starts.tolist()])  # (B, length + 1)


def _with_repeats(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Return crops of which every second holds a passage of its text again and again."""
    length = crops.shape[1]
    size = int(torch.randint(_SHORTEST, length // 2 + 1, (), generator=generator))
    crops[::2] = repeated(crops[::2, :size], length)
    return crops


@torch.no_grad()
def _second_copy_loss(model: TinyLM, passages: Tensor) -> float:
    """Return the mean loss of the second copy of each passage, shape (n, L), in nats a token."""
    length, total = passages.shape[1], 0.0
    for part in passages.split(8):
        logits = model(repeated(part, 2 * length - 1))[:, length - 1 :]
        total += float(F.cross_entropy(logits.flatten(0, 1), part.flatten(), reduction="sum"))
    return total / passages.numel()


def _loss(model: TinyLM, crops: Tensor) -> Tensor:
    # Older torch cannot tell and trains in float32: emulated bfloat16 would be slower.
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        logits = model(crops[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), crops[:, 1:].flatten())
