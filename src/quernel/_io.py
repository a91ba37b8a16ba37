"""The folder format: tensors in safetensors, everything else as JSON under one key, committed in order.

``config.json`` holds our keys under ``"quernel"`` (other keys are left alone, so a transformers folder
stays one) with a digest over that subtree and the name and sha256 of the tensor file. A save writes and
syncs the new tensor file, then replaces ``config.json``, then deletes the old tensors: whatever moment it
is interrupted at, the folder holds either the old object or the new one. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quernel._attached import check_attached, copy_attached, remove_attached
from quernel._errors import FormatError, QuernelError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
CONFIG = "config.json"
KEY = "quernel"
PLAIN = "model.safetensors"
OWN_FILE = re.compile(r"model(-[0-9a-f]{16})?\.safetensors")
SCRATCH = re.compile(r"\.(model(-[0-9a-f]{16})?\.safetensors|config\.json)\.\d+\.tmp")
_STALE_SECONDS = 3600.0
# In the header of our tensor files: tells what a killed save left from somebody else's weights.
MARK = {"format": "pt", "writer": "quernel"}
# What makes a folder somebody's model; saving over it would mix two models or delete one.
FOREIGN_MODEL = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "modules.json",
)


@dataclass(frozen=True)
class Folder:
    """What ``read_folder`` found: the object's own JSON, its tensors, foreign keys beside them, attached files."""

    path: Path
    content: dict[str, Any]
    tensors: dict[str, Tensor]
    foreign: dict[str, Any]
    files: Path | None = None


def digest_of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, also after a power cut."""
    # The process id keeps two writers apart; the last replace wins with a whole file.
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _remove_scratch(folder: Path) -> None:
    """Delete what killed saves left half written; nobody has been writing it for an hour."""
    for file in folder.glob(".*.tmp"):
        if SCRATCH.fullmatch(file.name) and time.time() - file.stat().st_mtime > _STALE_SECONDS:
            file.unlink(missing_ok=True)


def is_quernel_folder(path: Path) -> bool:
    """Say whether ``path/config.json`` has our key."""
    try:
        return KEY in json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _kind_in(config: Mapping[str, Any]) -> Any:
    """Return what kind of thing a ``config.json`` of ours says that its folder holds, None where it does not say."""
    ours = config.get(KEY)
    content = ours.get("content") if isinstance(ours, Mapping) else None
    return content.get("kind") if isinstance(content, Mapping) else None


def check_target(folder: Path, kind: str | None) -> dict[str, Any]:
    """Refuse a folder into which this kind of thing cannot be saved; returns the ``config.json`` that it holds, or {}.

    Raises
    ------
    QuernelError
        If the folder holds a model that Quernel did not save, or something of another kind that it did.
    """
    before = _existing_config(folder)
    theirs = [] if KEY in before else _foreign_weights(folder)
    if theirs:
        raise QuernelError(
            f"path: {folder} holds a model that Quernel did not save ({', '.join(theirs[:3])}); choose another folder"
        )
    held = _kind_in(before)
    if held is not None and kind is not None and held != kind:
        raise QuernelError(f"path: {folder} holds a saved {held}; choose another folder for the {kind}")
    return before


def write_folder(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    foreign: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
) -> Path:
    """Commit an object to a folder.

    Parameters
    ----------
    path : path
        Created if missing. Tensor files of an earlier save are deleted last.
    content : mapping
        JSON-able description: class, configs, seed.
    tensors : mapping of str to Tensor
        Tensors that are the same view of the same storage are stored once.
    foreign : mapping, optional
        Top-level keys of ``config.json`` for other libraries; default keeps those already there.
    files : mapping of str to Path, optional
        Files to copy into the folder under these names (a tokenizer's).

    Returns
    -------
    path : Path

    Raises
    ------
    QuernelError
        If the folder holds a model that Quernel did not save, or something of another kind that it did, or
        ``content`` is not JSON.
    """
    import safetensors.torch

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    before = check_target(folder, content.get("kind"))
    described = _as_json(content, "content")
    rest = {k: v for k, v in before.items() if k != KEY} if foreign is None else _as_json(foreign, "foreign")
    kept, aliases = _without_aliases(tensors)
    data = safetensors.torch.save(kept, metadata=MARK)
    sha = hashlib.sha256(data).hexdigest()
    # Without our key a plain file is at most what a save that was killed before its commit left.
    name = f"model-{sha[:16]}.safetensors" if KEY in before else PLAIN
    if not ((folder / name).exists() and file_sha256(folder / name) == sha):
        write_atomically(folder / name, data)
    subtree: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "content": described,
        "tensors": {"file": name, "sha256": sha, "aliases": aliases},
    }
    if files:
        subtree["files"] = copy_attached(folder, files, write_atomically)
    subtree["digest"] = digest_of(subtree)
    document = json.dumps(rest | {KEY: subtree}, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG, document.encode())
    # Ours are the plain file and digest names, also those of a save that was killed before its commit.
    ours = [file for file in folder.glob("model*.safetensors") if OWN_FILE.fullmatch(file.name)]
    for file in ours if before else []:
        if file.name != name:
            file.unlink()
    _remove_scratch(folder)
    remove_attached(folder, keep=subtree["files"]["folder"] if files else None)
    return folder


def read_folder(path: str | os.PathLike[str], *, check_tensors: bool = True) -> Folder:
    """Read a folder written by ``write_folder`` and check every byte of it.

    With ``check_tensors=False`` the bytes of the tensor file are not read: its tensors stay in the file, mapped, and
    only its header and its size are checked.

    Raises
    ------
    FormatError
        Naming the file and the field that is missing, damaged or of another version.
    """
    folder = Path(path)
    config = folder / CONFIG
    if folder.is_dir() and not config.exists():
        raise FormatError(
            f"{config}: the file is missing; nothing was saved in this folder, or its first save was interrupted"
        )
    document = _read_json(config)
    subtree = document.get(KEY)
    if not isinstance(subtree, dict):
        raise FormatError(f"{config}: field {KEY!r} is missing; this folder was not saved by Quernel")
    if subtree.get("format") != FORMAT_VERSION:
        raise FormatError(
            f"{config}: field 'quernel.format' is {subtree.get('format')!r}; this version reads {FORMAT_VERSION}. "
            "Install the Quernel that wrote it, or save the object again"
        )
    if subtree.get("digest") != digest_of({k: v for k, v in subtree.items() if k != "digest"}):
        raise FormatError(
            f"{config}: field 'quernel.digest' does not match its contents; the file was edited or damaged"
        )
    for field, kind in (("content", dict), ("tensors", dict)):
        if not isinstance(subtree.get(field), kind):
            raise FormatError(f"{config}: field 'quernel.{field}' must be an object; got {subtree.get(field)!r}")
    tensors = _read_tensors(folder, config, subtree["tensors"], checked=check_tensors)
    files = check_attached(folder, subtree["files"], config) if "files" in subtree else None
    foreign = {k: v for k, v in document.items() if k != KEY}
    return Folder(folder, subtree["content"], tensors, foreign, files)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; damage becomes a ``FormatError`` that names it."""
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: the file is missing") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: not a whole safetensors file ({error}); it may be truncated") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: the file is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: must hold a JSON object; got {type(document).__name__}")
    return document


def _read_tensors(folder: Path, config: Path, entry: dict[str, Any], *, checked: bool) -> dict[str, Tensor]:
    name, sha, aliases = entry.get("file"), entry.get("sha256"), entry.get("aliases")
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise FormatError(f"{config}: field 'quernel.tensors.file' must be a plain file name; got {name!r}")
    file = folder / name
    if not file.is_file():
        raise FormatError(f"{file}: named by {config} but missing")
    if checked and file_sha256(file) != sha:
        raise FormatError(f"{file}: its sha256 is not the one in field 'quernel.tensors.sha256'; the file is damaged")
    tensors = read_safetensors(file)
    if not isinstance(aliases, dict):
        raise FormatError(f"{config}: field 'quernel.tensors.aliases' must be an object; got {aliases!r}")
    stored = dict(tensors)
    for alias, target in aliases.items():
        if alias in stored:
            raise FormatError(f"{config}: field 'quernel.tensors.aliases.{alias}' names a tensor that is stored itself")
        if not isinstance(target, str) or target not in stored:
            raise FormatError(f"{config}: field 'quernel.tensors.aliases.{alias}' names an absent tensor {target!r}")
        tensors[alias] = stored[target]
    return tensors


def _without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta:
            raise QuernelError(f"tensor {name!r} is on the meta device and has no values to save")
        # Empty tensors all share the null pointer, so they are never aliases.
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.numel() and place in places:
            aliases[name] = places[place]
        else:
            places[place] = name
            # clone() where storage is shared: safetensors refuses overlapping tensors.
            kept[name] = tensor.cpu().contiguous().clone()
    return kept, aliases


def _as_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    # What a reader will see: an integer key becomes a string, and that changes the order the digest sorts in.
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise QuernelError(f"{what} must be JSON: mappings, lists, strings, numbers, None; {error}") from error
    return plain


def _foreign_weights(folder: Path) -> list[str]:
    found = sorted({file.name for pattern in FOREIGN_MODEL for file in folder.glob(pattern)})
    return [name for name in found if not (OWN_FILE.fullmatch(name) and _is_marked(folder / name))]


def _is_marked(file: Path) -> bool:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {}) == MARK
    except (safetensors.SafetensorError, OSError):
        return False


def _existing_config(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders; there the replace itself is the commit.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
