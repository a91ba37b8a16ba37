"""Models that are trained once and kept: a folder in the user cache, named by a digest of its recipe.

Another recipe, another folder; a folder appears whole or not at all. What was measured after training
(loss, accuracy, seconds) is kept beside the weights.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quernel._errors import FormatError, QuernelError
from quernel._io import digest_of, read_folder
from quernel._load import load, save_model
from quernel.data import cache_folder

Train = Callable[[], tuple[nn.Module, Mapping[str, float]]]

_log = logging.getLogger(__name__)


def trained(name: str, recipe: Mapping[str, Any], train: Train) -> nn.Module:
    """Return the model of this recipe from the cache, training it first where it is absent.

    Parameters
    ----------
    name : str
        Bundled name of the model.
    recipe : mapping
        JSON-able; everything that decides the weights.
    train : callable
        Gives the model and what was measured on it.
    """
    folder = folder_of(name, recipe)
    if not folder.is_dir():
        start, cpu = time.perf_counter(), time.process_time()
        model, figures = train()
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        _log.info("trained %s in %.0f s: %s", name, seconds["seconds"], dict(figures))
        _keep(model, folder, {"recipe": dict(recipe), "measured": {**figures, **seconds}})
    try:
        held = load(folder)
    except FormatError as error:
        raise FormatError(f"cached model {name!r} is damaged ({error}). Delete {folder} to train it again") from error
    return held


def measured(name: str, recipe: Mapping[str, Any]) -> dict[str, float]:
    """Return what was measured when the model of this recipe was trained."""
    folder = folder_of(name, recipe)
    if not folder.is_dir():
        raise QuernelError(f"model {name!r} with this recipe is not in the cache yet ({folder}); load it first")
    return dict(read_folder(folder).content["extra"]["measured"])


def folder_of(name: str, recipe: Mapping[str, Any]) -> Path:
    """Return the cache folder of a recipe."""
    return cache_folder() / "models" / f"{name}-{digest_of(dict(recipe))[:16]}"


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module whose initial weights follow from ``seed``; the default generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def _keep(model: nn.Module, folder: Path, notes: Mapping[str, Any]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise QuernelError(
            f"cannot write the model cache {folder.parent} ({error.strerror}); set QUERNEL_CACHE to a writable folder"
        ) from error
    try:
        save_model(model, scratch, extra=notes)
        try:
            os.rename(scratch, folder)
        except OSError:
            # Another process finished first: theirs is as good as ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
