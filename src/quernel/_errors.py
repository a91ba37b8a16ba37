"""The exceptions of the library: one root, a few named kinds.

Messages follow one pattern: what was expected, what arrived, what to do.
"""

from __future__ import annotations


class QuernelError(ValueError):
    """Root of every error that Quernel raises on purpose."""


class FormatError(QuernelError):
    """A saved file is damaged, foreign or of an unknown version; names the file and the field."""


class PrivacyError(QuernelError):
    """Something private would be revealed, or released without the noise that it needs."""


class BudgetExceeded(PrivacyError):
    """A private release would spend more than its ledger allows."""


class DataError(QuernelError):
    """A data set is absent, or its bytes are not the ones its checksum promises."""


class MissingExtraError(QuernelError, ImportError):
    """An optional dependency is missing; names the extra that installs it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs an optional dependency. Install it with: pip install "quernel[{extra}]"')
        self.extra = extra
