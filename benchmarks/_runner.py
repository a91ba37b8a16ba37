"""The benchmark runner: correctness gate, interleaved timing, a verdict a row.

A file ``benchmarks/<pillar>/<slug>.py`` exposes ``CASES``::

    from benchmarks._runner import Case, Isolated, Unavailable

    def setup(m):                        # once a case; builds inputs and prepared layers of ours and all peers
        return SimpleNamespace(x=..., layer=..., fp32=..., bf16=...)

    def gate(s):                         # raises, or returns False, when ours is wrong: then nothing is timed
        torch.testing.assert_close(s.layer(s.x), s.expected, **TOLERANCE)

    CASES = [
        Case(
            name=f"linear 1024x1024, M={m}",
            setup=partial(setup, m),
            ours=lambda s: s.layer(s.x),                     # timed; gets what setup returned
            peers={
                "fp32": lambda s: s.fp32(s.x),
                "bf16": lambda s: s.bf16(s.x),
                "torchao": torchao_peer,                     # may raise Unavailable("torchao is not installed")
                "faiss": Isolated("faiss_peer", m),          # function of this file that returns a callable,
            },                                               # run and timed in a process of its own
            gate=gate,
            target={"fp32": 4.0, "bf16": 1.2},               # least ratio peer / ours; others are only shown
            bound_ms=lambda s, threads: s.nbytes / (34e9 * threads) * 1e3,   # or a number, or None
            bound="weight bytes / 34 GB/s a core",
            facts=lambda s: f"{s.layer.nbytes} bytes",       # after timing: what else is to be known of this run
        )
        for m in (1, 512)
    ]

Rows: one a case, thread count (1, then 2) and peer. ``ratio`` is the median of >= 15 paired ratios peer / ours
(larger is better for us); quartiles and the lowest are printed beside it. ``ok`` says whether the target holds.
Everything goes through ``quernel._timing``: on a busy machine, or when ours against itself does not measure 1,
no ratio is printed and the exit status is 4; ``--force`` prints it, marked void. Exit status 1: a target was
missed or a gate failed. ``Case(fresh=True)`` runs each thread count of the case in a new process.
Files that have ``Isolated`` peers import torch inside functions if the peer cannot live beside it.

``python -m benchmarks <slug> [--json] [--write] [--force] [--case TEXT] [--threads N] [--cold] [--wait SECONDS]``;
``--json`` prints ``{"slug", "rows": [{"name", "ours_ms", "peer", "peer_ms", "ratio", "target", "bound_ms",
"threads", "ok"}]}`` on the last line, ``--write`` puts full rows into ``benchmarks/results/<slug>.json``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks._peers import peer_python
from benchmarks._process import IsolatedSubject, ProcessFailed, in_fresh_process, load_file
from quernel import _timing

HERE = Path(__file__).resolve().parent
MIN_ROUNDS = 15
ATTEMPTS = 6


class Unavailable(Exception):
    """A peer cannot run here, e.g. its package is not installed."""


class Isolated:
    """A peer in a process of its own: ``function(*args)`` of the benchmark file returns the callable to time.

    Parameters
    ----------
    function : str
        Name of a module-level function.
    *args : JSON values
        What it is called with.
    file : str, optional
        Another file, relative to the benchmark's folder.
    requires : tuple of str
        What pip shall put over the running environment for it; see ``benchmarks._peers``.
    """

    def __init__(self, function: str, *args: Any, file: str | None = None, requires: tuple[str, ...] = ()) -> None:
        self.function = function
        self.args = args
        self.file = file
        self.requires = requires


Peer = Callable[[Any], Any] | Isolated


def allowed(seconds: float) -> Peer:
    """Return a peer that spins for the time that a call may take: with a target of 1.0 an absolute limit is a ratio."""

    def spin(_: Any) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return spin


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison: ours against named peers on the same prepared state."""

    name: str
    ours: Callable[[Any], Any]
    peers: Mapping[str, Peer]
    gate: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    target: Mapping[str, float] = field(default_factory=dict)
    bound_ms: Callable[[Any, int], float] | float | None = None
    bound: str = ""
    threads: tuple[int, ...] = (1, 2)
    rounds: int = MIN_ROUNDS
    min_ms: float = 1.0
    slope: bool = False
    fresh: bool = False
    facts: Callable[[Any], str] | None = None

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"{self.name}: rounds must be at least {MIN_ROUNDS}; got {self.rounds}")
        if not self.peers:
            raise ValueError(f"{self.name}: peers must name at least one alternative")
        unknown = self.target.keys() - self.peers.keys()
        if unknown:
            raise ValueError(f"{self.name}: target names {sorted(unknown)}, which are not among the peers")


@dataclass(frozen=True)
class Row:
    """One line of the result; the fields up to ``ok`` are those of ``--json``."""

    name: str
    ours_ms: float | None
    peer: str
    peer_ms: float | None
    ratio: float | None
    target: float | None
    bound_ms: float | None
    threads: int
    ok: bool
    # Why there is no ratio, or why it is void.
    note: str = ""
    void: bool = False
    q1: float | None = None
    q3: float | None = None
    lowest: float | None = None
    ours_min_ms: float | None = None
    peer_min_ms: float | None = None
    rounds: int | None = None
    aa: float | None = None
    aa_spread: float | None = None
    load: float | None = None
    bound: str = ""
    cold_ms: float | None = None
    # What a case measures besides.
    facts: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the row that scripts rely on; ``void`` is added where it is true."""
        names = ("name", "ours_ms", "peer", "peer_ms", "ratio", "target", "bound_ms", "threads", "ok")
        row = {name: getattr(self, name) for name in names}
        return row | {"void": True} if self.void else row


@dataclass(frozen=True)
class Settings:
    """How to run: ``force`` keeps void ratios, ``wait_s`` is how long to wait for a quiet machine."""

    force: bool = False
    wait_s: float = 30.0
    threads: tuple[int, ...] | None = None
    cold: bool = False
    attempts: int = ATTEMPTS


def find(slug: str) -> Path:
    """Return the benchmark file of a slug."""
    files = {path.stem: path for path in benchmark_files()}
    if slug not in files:
        raise LookupError(f"no benchmark is called {slug!r}; known: {', '.join(sorted(files))}")
    return files[slug]


def benchmark_files() -> list[Path]:
    """Return every ``benchmarks/<pillar>/<slug>.py``."""
    return sorted(path for path in HERE.glob("*/*.py") if not path.stem.startswith("_"))


def cases_of(file: Path) -> list[Case]:
    """Import a benchmark file and return its ``CASES``."""
    cases = list(load_file(file).CASES)
    if len({case.name for case in cases}) != len(cases):
        raise ValueError(f"{file}: two cases share a name")
    return cases


def run_cases(file: Path, chosen: Callable[[Case], bool], settings: Settings) -> Iterator[Row]:
    """Yield the rows of the chosen cases of a file."""
    for case in cases_of(file):
        if not chosen(case):
            continue
        counts = case.threads if settings.threads is None else settings.threads
        cold = in_fresh_process(__file__, "first_call_ms", str(file), case.name) if settings.cold else None
        if not case.fresh:
            yield from _run_here(file, case, counts, settings, cold)
            continue
        for n in counts:
            args = (str(file), case.name, n, asdict(settings), cold)
            yield from (Row(**row) for row in in_fresh_process(__file__, "rows_in_process", *args, threads=n))


def rows_in_process(file: str, name: str, n: int, settings: dict[str, Any], cold: float | None) -> list[dict[str, Any]]:
    """Run one case at one thread count in this process; called in a fresh one."""
    case = _named(file, name)
    options = Settings(**{**settings, "threads": None})
    return [asdict(row) for row in _run_here(Path(file), case, (n,), options, cold)]


def first_call_ms(file: str, name: str) -> float:
    """Return what the first call of ours costs in a process that has set up and computed nothing else."""
    case = _named(file, name)
    state = case.setup()
    start = time.perf_counter()
    case.ours(state)
    return (time.perf_counter() - start) * 1e3


def _named(file: str, name: str) -> Case:
    return next(case for case in cases_of(Path(file)) if case.name == name)


def _run_here(file: Path, case: Case, counts: Sequence[int], settings: Settings, cold: float | None) -> Iterator[Row]:
    for n in counts:
        # Anew: calls that were timed have left gradients and running means behind, which a gate would take for errors.
        state = case.setup()
        with _timing.threads(n):
            bound = case.bound_ms(state, n) if callable(case.bound_ms) else case.bound_ms
            failure = _gate(case, state)
            if failure:
                for peer in case.peers:
                    yield Row(case.name, None, peer, None, None, case.target.get(peer), bound, n, False, failure)
                continue
            facts = ""
            for row in _time(file, case, state, n, bound, settings, cold):
                if case.facts is not None and row.ratio is not None:
                    facts = facts or case.facts(state)
                yield replace(row, facts=facts)


def _gate(case: Case, state: Any) -> str:
    try:
        verdict = case.gate(state)
    except Exception as error:  # whatever it is, ours is not shown to be right; the reason goes into the row
        return f"gate failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return "gate failed: returned False" if verdict is False else ""


def _time(
    file: Path, case: Case, state: Any, n: int, bound: float | None, settings: Settings, cold: float | None
) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        peers: dict[str, Any] = {}
        for name, peer in case.peers.items():
            try:
                peers[name] = _prepared(file, peer, state, n, stack)
            except (Unavailable, ImportError) as error:
                target = case.target.get(name)
                yield Row(case.name, None, name, None, None, target, bound, n, target is None, f"unavailable: {error}")
        if not peers:
            return
        results = _measure(case, state, peers, settings)
    if isinstance(results, str):
        for name in peers:
            yield Row(case.name, None, name, None, None, case.target.get(name), bound, n, False, results, void=True)
        return
    for name, result in results.items():
        yield _row(case, name, result, n, bound, settings, cold)


def _prepared(file: Path, peer: Peer, state: Any, n: int, stack: contextlib.ExitStack) -> Any:
    if not isinstance(peer, Isolated):
        peer(state)  # a peer that cannot run is found before any timing
        return lambda: peer(state)
    try:
        other = file if peer.file is None else file.parent / peer.file
        python = peer_python(*peer.requires) if peer.requires else None
        return stack.enter_context(IsolatedSubject(other, peer.function, *peer.args, threads=n, python=python))
    except ProcessFailed as error:
        if error.kind == "Unavailable":
            raise Unavailable(str(error)) from error
        raise


def _measure(case: Case, state: Any, peers: dict[str, Any], settings: Settings) -> dict[str, _timing.PairedRatio] | str:
    """Time until the result is valid, at most ``attempts`` times, each longer; a text says why it was refused.

    Short calls scatter: where ours against itself does not measure 1, more rounds tell chance from a busy machine.
    """
    results: dict[str, _timing.PairedRatio] = {}
    for attempt in range(1 if settings.force else settings.attempts):
        if not settings.force and not _quiet(settings.wait_s):
            return f"refused: other processes have been busy for {settings.wait_s:.0f} s"
        results = _timing.paired_ratios(
            lambda: case.ours(state), peers, rounds=case.rounds * (1 + attempt), min_ms=case.min_ms, slope=case.slope
        )
        if all(result.valid for result in results.values()):
            return results
    return results


def _quiet(wait_s: float) -> bool:
    start = time.perf_counter()
    while _timing.loaded():
        if time.perf_counter() - start > wait_s:
            return False
        time.sleep(min(1.0, wait_s))
    return True


def _row(
    case: Case,
    peer: str,
    result: _timing.PairedRatio,
    n: int,
    bound: float | None,
    settings: Settings,
    cold: float | None,
) -> Row:
    target = case.target.get(peer)
    shown = result.valid or settings.force
    return Row(
        name=case.name,
        ours_ms=result.ours_ms if shown else None,
        peer=peer,
        peer_ms=result.peer_ms if shown else None,
        ratio=result.ratio if shown else None,
        target=target,
        bound_ms=bound,
        threads=n,
        ok=result.valid and (target is None or result.ratio >= target),
        note=result.void,
        void=not result.valid,
        q1=result.q1 if shown else None,
        q3=result.q3 if shown else None,
        lowest=result.lowest if shown else None,
        ours_min_ms=result.ours_min_ms if shown else None,
        peer_min_ms=result.peer_min_ms if shown else None,
        rounds=result.rounds,
        aa=result.aa,
        aa_spread=result.aa_spread,
        load=result.load,
        bound=case.bound,
        cold_ms=cold,
    )
