"""``Progress``: what long work calls with a message and the share of it that is done, in [0, 1], never falling.

Calls come one at a time, but from whatever thread did the work.
"""

from collections.abc import Callable

Progress = Callable[[str, float], None]
