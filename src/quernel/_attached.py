"""Files that travel with a saved object (a tokenizer), in a folder of their own named after their contents.

Because the name is a digest, a save over an older one never touches the files that the old ``config.json``
refers to; they go away after the commit, like old tensors do.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quernel._errors import FormatError, QuernelError

OWN_FOLDER = re.compile(r"files-[0-9a-f]{16}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")

Write = Callable[[Path, bytes], None]


def copy_attached(folder: Path, files: Mapping[str, Path], write: Write) -> dict[str, Any]:
    """Copy ``files`` (plain name to source) below ``folder`` and return the entry that describes them."""
    held: dict[str, bytes] = {}
    for name, source in files.items():
        if not _NAME.fullmatch(name):
            raise QuernelError(f"an attached file needs a plain name; got {name!r}")
        try:
            held[name] = Path(source).read_bytes()
        except OSError as error:
            raise QuernelError(f"cannot copy {source} into {folder}: {error.strerror}") from error
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(held.items())}
    place = f"files-{hashlib.sha256(repr(sums).encode()).hexdigest()[:16]}"
    (folder / place).mkdir(exist_ok=True)
    for name, data in held.items():
        target = folder / place / name
        if not (target.is_file() and target.read_bytes() == data):
            write(target, data)
    return {"folder": place, "sha256": sums}


def check_attached(folder: Path, entry: Any, config: Path) -> Path:
    """Return the folder of attached files after every sha256 matched."""
    field = "quernel.files"
    place, sums = (entry.get("folder"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
    if not isinstance(place, str) or not OWN_FOLDER.fullmatch(place):
        raise FormatError(f"{config}: field '{field}.folder' must be files-<digest>; got {place!r}")
    if not isinstance(sums, dict) or not all(_NAME.fullmatch(name) for name in sums):
        raise FormatError(f"{config}: field '{field}.sha256' must map plain file names to digests; got {sums!r}")
    for name, wanted in sums.items():
        file = folder / place / name
        try:
            got = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise FormatError(f"{file}: named by {config} but not readable ({error.strerror})") from error
        if got != wanted:
            raise FormatError(f"{file}: its sha256 is not the one in field '{field}.sha256'; the file is damaged")
    return folder / place


def remove_attached(folder: Path, keep: str | None) -> None:
    """Delete the folders of attached files of earlier saves; nothing refers to them any more."""
    for old in folder.glob("files-*"):
        if OWN_FOLDER.fullmatch(old.name) and old.name != keep and old.is_dir() and not old.is_symlink():
            for file in old.iterdir():
                if file.is_file():
                    file.unlink()
            # Somebody else's subfolder in there stays.
            with contextlib.suppress(OSError):
                old.rmdir()
