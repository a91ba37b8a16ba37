"""``quernel doctor``: what this machine and this installation can do, and what is missing for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from typing import Any

from quernel._machine import processor_name
from quernel.cli._output import Json, console, emit, table

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)")
_EXTRA = re.compile(r"extra\s*==\s*[\"']([a-z]+)[\"']")
# Extras that only collect others.
_COLLECTIONS = {"all", "dev"}


def doctor(json: Json = False) -> None:
    """Show versions, processor features, threads, extras, data sets and folders."""
    found = diagnose()
    if json:
        emit(found)
        return
    for title, facts in found.items():
        console().print(f"\n[bold]{title}")
        table(("what", "found"), list(facts.items()))


def diagnose() -> dict[str, dict[str, Any]]:
    """Return the facts by section; all values are JSON scalars."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "processor": _processor(),
        "extras": _extras(),
        "data": _data(),
        "folders": _folders(),
    }


def _versions() -> dict[str, str]:
    return {name: _installed(name) or "missing" for name in ("quernel", *_required(None))}


def _processor() -> dict[str, Any]:
    import torch

    from quernel import _intrinsics, _threads

    forced = os.environ.get("QUERNEL_PORTABLE") == "1"
    missing = sorted(_intrinsics.VECTOR_FEATURES - _intrinsics.target_features())
    why = "QUERNEL_PORTABLE=1" if forced else f"no {', '.join(missing)}"
    return {
        "name": processor_name(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "native" if _has_bfloat16() else "emulated: smaller, not faster",
        "kernels": f"portable ({why})" if _intrinsics.portable() else "AVX-512 with VNNI",
        "parallel ranges": "torch's OpenMP team" if _threads._openmp() is not None else "thread pool",
    }


def _extras() -> dict[str, str]:
    found = {}
    for extra in importlib.metadata.metadata("quernel").get_all("Provides-Extra") or []:
        if extra not in _COLLECTIONS:
            missing = [name for name in _required(extra) if _installed(name) is None]
            found[extra] = f"missing {', '.join(missing)}" if missing else "installed"
    return found


def _data() -> dict[str, str]:
    from quernel.data import info, names

    return {name: ", ".join(info(name).present) or "absent" for name in names()}


def _folders() -> dict[str, str]:
    from quernel.data import cache_folder

    return {"cache": str(cache_folder()), "QUERNEL_DATA": os.environ.get("QUERNEL_DATA", "not set")}


def _required(extra: str | None) -> list[str]:
    """Return the distributions that the package asks for, in the core or in one extra."""
    names = []
    for requirement in importlib.metadata.requires("quernel") or []:
        asked = _EXTRA.search(requirement)
        name = _REQUIREMENT.match(requirement)
        if name and (asked[1] if asked else None) == extra:
            names.append(name[1])
    return names


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_bfloat16() -> bool:
    import torch

    # Emulated bfloat16 is slower than float32; AVX-512 BF16 and AMX are the units that oneDNN uses on x86.
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))
