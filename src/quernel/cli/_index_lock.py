"""One ``quernel index`` command at a time writes to a folder: of two, the later save would undo the earlier one.

The lock is the operating system's, on a hidden file beside the folder, which stays. It goes with the process that holds
it, however that ends; reading needs none, as a save replaces a folder's contents in one step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quernel._errors import QuernelError
from quernel.cli._output import note

if TYPE_CHECKING:
    import filelock

# How long another command is waited for: some texts, not a library of them.
SECONDS = 60.0


@contextlib.contextmanager
def writing(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Hold the lock of an index's folder, from before it is read until it is saved.

    Parameters
    ----------
    folder : Path
    new : bool, default=False
        Whether a folder that is not there yet is locked too. Without, there is nothing that could be lost.

    Raises
    ------
    QuernelError
        If another command holds the lock and does not let it go within ``SECONDS``.
    """
    import filelock

    # A folder has one lock, whatever name it is called by.
    whole = folder.resolve()
    lock = filelock.FileLock(whole.with_name(f".{whole.name}.lock"))
    if new or folder.is_dir():
        _acquire(lock, folder)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: filelock.BaseFileLock, folder: Path) -> None:
    import filelock

    file = Path(lock.lock_file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            note(f"waiting for another command that writes to {folder}")
            lock.acquire(timeout=SECONDS)
    except filelock.Timeout as error:
        raise QuernelError(
            f"{folder}: another command has been writing to it for more than {SECONDS:g} s; nothing was changed. Run "
            "this one again when that has ended"
        ) from error
    except (OSError, NotImplementedError) as error:
        # A folder may be writable where what is beside it is not, and some file systems know no locks.
        note(f"{file} cannot be locked ({error}): let no other command write to {folder} meanwhile")
