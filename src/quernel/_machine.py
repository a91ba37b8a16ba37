"""The name of the processor, as reports, ``quernel doctor`` and the benchmarks state it.

Numbers are worth little without the machine they were measured on, and "x86_64" names none.
"""

from __future__ import annotations

import platform


def processor_name(cpuinfo: str = "/proc/cpuinfo") -> str:
    """Return the model name of the CPU where the system tells it (Linux), else what Python knows of it."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            found = next(names, "")
    except OSError:
        found = ""
    return found or platform.processor() or platform.machine()
