"""Tests of Triton kernels without a GPU: interpreted on the CPU, and compiled for one.

Triton decides when it is imported whether it interprets, so a process of its own runs the interpreted tests: those
marked ``interpreted``, of a file whose ``test_kernels_interpreted`` counts how many passed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (the extra gpu)"
)
interpreted = pytest.mark.skipif(not INTERPRETS, reason="runs in the process of test_kernels_interpreted")
outside = pytest.mark.skipif(INTERPRETS, reason="this is the process of its own")
# What a program may hold of a multiprocessor of compute capability 9.0, with what the runtime keeps taken off.
SHARED_BYTES = 227 * 1024

_COMPILES = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, cases = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for name, (constants, kinds, usual) in cases.items():
    kernel = getattr(module, f"_{name}_kernel")
    signature = {n: "constexpr" if n in constants else kinds.get(n, usual) for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items() if n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    found[name] = [len(made.asm["ptx"]), made.metadata.shared]
print(json.dumps(found))
"""


def passed_interpreted(file: str) -> int:
    """Run a test file's interpreted tests in a process of their own; return how many passed, and fail if one did."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])  # type: ignore[index]


def check_compiles(module: str, cases: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str], str]]) -> None:
    """Compile kernels for a GPU and check that they are code, and fit its shared memory.

    ``cases``: name -> (constants, kinds of arguments, kind of the other arguments); of ``_name_kernel`` in ``module``.
    """
    command = [sys.executable, "-c", _COMPILES, module, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(cases)
    for name, (code, shared) in found.items():
        assert code > 0, name
        assert shared <= SHARED_BYTES, f"{name}: {shared} bytes of shared memory"
