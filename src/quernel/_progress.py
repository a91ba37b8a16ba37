"""``Progress``: what long work calls with a message and the share of it that is done, in [0, 1], never falling.

Calls come one at a time, but from whatever thread did the work.
"""

from collections.abc import Callable
from typing import Any

from quernel._errors import QuernelError

Progress = Callable[[str, float], None]


def check_progress(progress: Any) -> None:
    """Raise unless ``progress`` can be called, or is None."""
    if progress is not None and not callable(progress):
        raise QuernelError(f"progress must be a function of a message and a fraction, or None; got {progress!r}")
