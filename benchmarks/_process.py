"""Run a function of a benchmark file in a fresh process with a chosen number of threads.

A peer that cannot share a process with torch (faiss), and everything whose speed depends on what the
process did before, runs here. ``in_fresh_process(file, function, *args, threads=1)`` returns the JSON
result of one call. ``IsolatedSubject`` keeps the process: the named function prepares and returns a
callable, which the child times on request, so that samples still interleave with those of the parent.
The child is ``python -m benchmarks._process``; what a benchmark prints there goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Thread counts are read when these libraries load, so they must stand in the environment of the child.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class ProcessFailed(RuntimeError):
    """The function in the other process raised; carries the type and the message of its exception."""

    def __init__(self, where: str, kind: str, message: str) -> None:
        super().__init__(f"{where}: {kind}: {message}")
        self.kind = kind


def load_file(file: str | os.PathLike[str]) -> ModuleType:
    """Import a benchmark file by its path; its name may hold hyphens."""
    path = Path(file).resolve()
    if path.parent == Path(__file__).resolve().parent:
        return importlib.import_module(f"benchmarks.{path.stem}")  # a second copy would have other classes
    name = "benchmarks_file_" + path.stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def in_fresh_process(
    file: str | os.PathLike[str],
    function: str,
    *args: Any,
    threads: int = 1,
    env: Mapping[str, str] | None = None,
    python: str | None = None,
) -> Any:
    """Call ``function(*args)`` of a file in a new process and return its result.

    Parameters
    ----------
    file : path
        The file that defines the function at module level.
    function : str
        Its name; arguments and result must be JSON values.
    threads : int, default=1
        For OpenMP, MKL, OpenBLAS, Numba and torch.
    env : mapping, optional
        More environment variables, e.g. ``{"QUERNEL_PORTABLE": "1"}``.
    python : str, optional
        Another interpreter, e.g. of ``benchmarks._peers.peer_python``.

    Raises
    ------
    ProcessFailed
        If the function raises or its process dies.
    """
    with _Child(file, function, args, threads, env, keep=False, python=python) as child:
        return child.read()["result"]


def resident_bytes(field: str = "VmRSS") -> int:
    """Return the resident memory of this process, or with ``"VmHWM"`` the most that it ever was."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def settled_bytes() -> int:
    """Return the resident memory of this process without what is free but still held by the allocator."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # only the GNU library's allocator has it
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


class IsolatedSubject:
    """A callable that lives in another process and is timed there; a subject of ``quernel._timing``.

    ``function(*args)`` of the file prepares and returns the callable to be timed.
    """

    def __init__(
        self, file: str | os.PathLike[str], function: str, *args: Any, threads: int = 1, python: str | None = None
    ) -> None:
        self._child = _Child(file, function, args, threads, None, keep=True, python=python)
        self._cpu = 0.0
        try:
            self._cpu_at_start = float(self._child.read()["cpu"])
        except BaseException:
            self._child.close()
            raise

    def sample(self, calls: int) -> float:
        """Return the seconds of ``calls`` calls, measured inside the other process."""
        answer = self._child.ask({"calls": calls})
        self._cpu = float(answer["cpu"]) - self._cpu_at_start
        return float(answer["seconds"])

    def cpu_seconds(self) -> float:
        """Return the processor seconds that the other process spent on samples."""
        return self._cpu

    def close(self) -> None:
        """End the other process."""
        self._child.close()

    def __enter__(self) -> IsolatedSubject:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Child:
    def __init__(
        self,
        file: str | os.PathLike[str],
        function: str,
        args: tuple[Any, ...],
        threads: int,
        env: Mapping[str, str] | None,
        *,
        keep: bool,
        python: str | None = None,
    ) -> None:
        self._where = f"{Path(file).name}:{function}"
        command = [
            python or sys.executable,
            "-m",
            "benchmarks._process",
            str(Path(file).resolve()),
            function,
            json.dumps(args),
        ]
        settings = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(threads)), **(env or {})}
        path = [str(ROOT), str(ROOT / "src"), settings.get("PYTHONPATH", "")]
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        self._process = subprocess.Popen(
            command + ["--keep"] * keep, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ProcessFailed(self._where, "died", f"exit status {self._process.wait()}") from error
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ProcessFailed(self._where, "died", f"exit status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ProcessFailed(self._where, answer["error"], answer["message"])
        return answer

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _serve(file: str, function: str, args: list[Any], keep: bool) -> int:
    # Answers go out on a copy of standard output; prints of the benchmark must not mix with them.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        result = getattr(load_file(file), function)(*args)
        if not keep:
            answers.write(json.dumps({"result": result}) + "\n")
            return 0
        result()  # a callable that cannot run is found before any timing
        answers.write(json.dumps({"cpu": time.process_time()}) + "\n")
        for line in sys.stdin:
            calls = itertools.repeat(None, json.loads(line)["calls"])
            start = time.perf_counter()
            for _ in calls:
                result()
            seconds = time.perf_counter() - start
            answers.write(json.dumps({"seconds": seconds, "cpu": time.process_time()}) + "\n")
    except Exception as error:
        kind = "Unavailable" if isinstance(error, ImportError) else type(error).__name__
        answers.write(json.dumps({"error": kind, "message": str(error)}) + "\n")
        return 1
    return 0


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks._process")
    parser.add_argument("file")
    parser.add_argument("function")
    parser.add_argument("args", type=json.loads)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    return _serve(options.file, options.function, options.args, options.keep)


if __name__ == "__main__":
    raise SystemExit(_main())
