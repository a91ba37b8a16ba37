"""Numbers as people read them: bytes in decimal units, milliseconds, ratios, metrics and their differences.

1 KB is 1000 bytes, as file systems and papers count. Three significant digits suffice for a size or a ratio;
a metric shows four decimals (two from 10 on), because drops of 0.001 decide. ``None`` reads "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NOT_MEASURED = "not measured"
BYTE_UNITS = ("B", "KB", "MB", "GB", "TB", "PB", "EB")


def format_bytes(count: int | None) -> str:
    """Return e.g. ``"22.7 MB"``."""
    if count is None:
        return NOT_MEASURED
    unit = byte_unit(count)
    if unit == 0:
        return f"{count} B"
    return f"{_three_digits(count / 1000**unit)} {BYTE_UNITS[unit]}"


def byte_unit(count: float) -> int:
    """Return the index in ``BYTE_UNITS`` that shows ``count`` as 1 to 999."""
    unit = 0
    # 999.5 would print as 1000, hence the next unit from there on.
    while count >= 999.5 and unit < len(BYTE_UNITS) - 1:
        count /= 1000
        unit += 1
    return unit


def format_ms(value: float | None) -> str:
    """Return e.g. ``"98.3 ms"``."""
    return NOT_MEASURED if value is None else f"{_three_digits(value)} ms"


def format_factor(value: float) -> str:
    """Return e.g. ``"3.93"``, to stand before an x or a times sign."""
    return "inf" if math.isinf(value) else _three_digits(value)


def in_words(factor: float, more: str, less: str) -> tuple[str, str]:
    """Return a factor of at least 1 and the word for its direction: ``("3.93", "smaller")``."""
    word = more if factor >= 1 else less
    if 0 < factor < 1:
        factor = 1 / factor
    text = format_factor(factor)
    return (text, "unchanged") if text == "1.00" else (text, word)


def format_percent(part: float, whole: float) -> str:
    """Return ``part`` as a share of ``whole``."""
    if whole == 0:
        return "100 %" if part == 0 else "inf %"
    share = 100 * part / whole
    return f"{share:.1f} %" if share < 99.95 else f"{share:.0f} %"


def format_metric(value: float | None, *, signed: bool = False, scale: float | None = None) -> str:
    """Return a metric; ``scale`` is the size of its fellows, so that a difference gets their decimals."""
    if value is None:
        return NOT_MEASURED
    size = max(abs(value), abs(scale or 0.0))
    spec = "+" if signed else ""
    if size >= 1e6:
        return format(value, f"{spec}.4g")
    text = format(value, f"{spec}.{2 if size >= 10 else 4}f")
    # A difference that would round to zero keeps one digit: "no change" must mean no change.
    return format(value, f"{spec}.1g") if value != 0 and float(text) == 0 else text


def format_error(value: float | None) -> str:
    """Return a relative error with four decimals, or one digit where that would read zero."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.4f}" if value >= 5e-5 or value == 0 else f"{value:.0e}"


def format_seconds(value: float) -> str:
    """Return e.g. ``"41.2 s"`` or ``"3 min 20 s"``."""
    if value < 60:
        return f"{_three_digits(value)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def format_scalar(value: Any) -> str:
    """Return a value of a free mapping; nested mappings read ``key value, key value``."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_scalar(item)}" for key, item in value.items())
    return str(value)


def format_budget(budget: Mapping[str, Any]) -> str:
    """Return e.g. ``"size at most 30 % of before, metric drop at most 0.01"``."""
    limits = []
    for name, value in budget.items():
        if value is None:
            continue
        if name == "bytes" and isinstance(value, float):
            limits.append(f"size at most {100 * value:.3g} % of before")
        elif name == "bytes" and isinstance(value, int):
            limits.append(f"size at most {format_bytes(value)}")
        elif name == "drop":
            limits.append(f"metric drop at most {format_scalar(value)}")
        elif name == "latency_ms":
            limits.append(f"latency at most {format_scalar(value)} ms")
        else:
            limits.append(f"{name} {format_scalar(value)}")
    return ", ".join(limits) or "no limit"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    if value < 0.01:
        return f"{value:.2g}"
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"
