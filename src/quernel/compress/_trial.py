"""One trial of a search, and the folder that remembers finished ones.

A trial is keyed by the digest of the weights, the methods with their settings, the data and the metric's
name, so a resumed search finds exactly what it may reuse. Each trial is one JSON file, replaced atomically.
Only what would come out the same again is stored: a full disk or an evaluation that failed is not.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quernel._errors import FormatError, QuernelError
from quernel._io import digest_of, write_atomically
from quernel._load import save_model
from quernel._timing import latency_ms
from quernel.compress._compress import check_needs, run_methods, train_and_finish
from quernel.compress._context import Context
from quernel.compress._measure import Evaluate, check_runs, checked_metric, run_timing, timing_batch
from quernel.compress._method import Method
from quernel.nn._running import evaluating

TRIAL_VERSION = 1
LATENCY_SECONDS = 1.5


@dataclass(frozen=True)
class Trial:
    """What a candidate came to; ``metric`` is that of the selecting split.

    ``lasting`` says that the outcome is the candidate's own, so that it may be stored and reused.
    """

    candidate: tuple[Method, ...]
    file_bytes: int
    metric: float | None = None
    latency_ms: float | None = None
    reason: str = ""
    key: str = ""
    lasting: bool = True

    @property
    def ok(self) -> bool:
        """Whether the candidate could be run."""
        return not self.reason

    @property
    def label(self) -> str:
        """Names of the methods, joined."""
        return " + ".join(m.label for m in self.candidate) or "uncompressed"


class TrialStore:
    """Finished trials of one setting; with no folder it only computes keys.

    Parameters
    ----------
    folder : Path, optional
        Trials live in its subfolder ``trials``.
    identity : mapping
        JSON-able: everything besides the methods that a trial's outcome depends on.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = {"version": TRIAL_VERSION, **identity}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def key(self, candidate: tuple[Method, ...]) -> str:
        """Return the digest under which a candidate is stored."""
        return digest_of(self.identity | {"methods": [m.describe() for m in candidate]})[:32]

    def get(self, candidate: tuple[Method, ...]) -> Trial | None:
        """Return a finished trial, or None."""
        key = self.key(candidate)
        if self.folder is None or not (self.folder / f"{key}.json").exists():
            return None
        file = self.folder / f"{key}.json"
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            return Trial(candidate, fields["file_bytes"], fields["metric"], fields["latency_ms"], fields["reason"], key)
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{file}: not a finished trial ({error}); delete it to run the trial again") from error

    def put(self, trial: Trial) -> None:
        """Write a trial down, if its outcome lasts; a reader sees all of it or nothing."""
        if self.folder is None or not trial.lasting:
            return
        key = self.key(trial.candidate)
        fields: dict[str, Any] = {
            "file_bytes": trial.file_bytes,
            "metric": trial.metric,
            "latency_ms": trial.latency_ms,
            "reason": trial.reason,
            "methods": [m.describe() for m in trial.candidate],
        }
        write_atomically(self.folder / f"{key}.json", (json.dumps(fields, indent=1) + "\n").encode())


def run_trial(
    model: nn.Module, candidate: tuple[Method, ...], select: Evaluate, options: Mapping[str, Any], timed: bool = False
) -> Trial:
    """Compress a copy with ``candidate``, count its file bytes, judge it, and time it alone if asked.

    No candidate ends a search: whatever is raised becomes the reason of a failed trial.
    """
    options = dict(options)
    finetune = options.pop("finetune", None)
    context = Context(**options, finetune=finetune)
    if any(m.simulated for m in candidate):
        return Trial(candidate, 0, reason="simulated: no time is won")
    try:
        work = copy.deepcopy(model)
        check_needs(work, candidate, context, finetune)
        made = run_methods(work, candidate, context)
        if made.idle:
            return Trial(candidate, 0, reason=f"{', '.join(made.idle)} changes nothing here")
        check_runs(work, context, " + ".join(m.label for m in candidate))
    except QuernelError as error:
        return Trial(candidate, 0, reason=str(error))
    except Exception as error:
        return failed(candidate, error)
    try:
        train_and_finish(work, made, finetune)
        metric = checked_metric(select, work, "this candidate")
        return Trial(candidate, stored_bytes(work), metric, alone_ms(work, context) if timed else None)
    except Exception as error:
        return failed(candidate, error)


def failed(candidate: tuple[Method, ...], error: Exception) -> Trial:
    """Return a failed trial that another run may find in order."""
    kind = "" if isinstance(error, QuernelError) else f"{type(error).__name__}: "
    return Trial(candidate, 0, reason=f"{kind}{error}", lasting=False)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of the files that saving the model writes, without those of a tokenizer."""
    with tempfile.TemporaryDirectory(prefix="quernel-") as folder:
        save_model(model, folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())


def weights_digest(model: nn.Module) -> str:
    """Return a digest of names, dtypes, shapes and values of all stored tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def data_digest(data: Iterable[Any] | None) -> str:
    """Return a digest of all tensors, arrays and plain values in the batches.

    Anything else counts by its ``repr``; the usual one, with its address, finds no stored trial again.
    """
    digest = hashlib.sha256()
    for batch in data or ():
        _feed(digest, batch)
    return digest.hexdigest()


def name_of(function: Any) -> str | None:
    """Return the qualified name of a function, or of an object's class; None for None."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + _bytes_of(value))
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        digest.update(f"{value.dtype.descr} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, np.ndarray):
        _feed(digest, value.tolist())  # its bytes would be addresses
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}".encode())
        for key in value:
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)}".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def alone_ms(model: nn.Module, context: Context) -> float | None:
    """Time one batch with nothing else running; None without a batch or on a busy machine."""
    batch = timing_batch(context)
    if batch is None:
        return None
    with evaluating(model), torch.inference_mode():
        taken = latency_ms(lambda: run_timing(model, batch, context), samples=5, max_seconds=LATENCY_SECONDS)
    # A number from a busy machine would stand beside honest ones in the table.
    return taken.median_ms if taken.valid else None
