"""Timing that can be trusted on a shared machine: interleaved samples, paired ratios, an A/A check.

One sample is a loop of calls that lasts at least a millisecond. Every round times all subjects in a
fresh random order, ours twice; the ratio of a round pairs samples of that round only, so slow drift
cancels, and the median over rounds decides. The ratio of ours to itself tells the resolution: where
its median leaves [0.95, 1.05], or other processes were busy meanwhile, the result is not ``valid``.
With ``slope=True`` a sample is (T(3n) - T(n)) / 2n, which removes what a loop costs besides the calls.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from quernel import _random
from quernel._errors import QuernelError
from quernel._validate import check_float, check_int

# Ours against itself may look this much slower or faster before a comparison is void.
AA_LIMITS = (0.95, 1.05)
# Share of the machine's processor time that others may take.
LOAD_LIMIT = 0.10


class Subject(Protocol):
    """Something to time that is not a plain callable, e.g. a function in another process."""

    def sample(self, calls: int) -> float:
        """Return the seconds that ``calls`` calls in a row took."""

    def cpu_seconds(self) -> float:
        """Return the processor seconds spent so far outside this process."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, smallest, quartiles over the samples."""

    median_ms: float
    min_ms: float
    q1_ms: float
    q3_ms: float
    samples: int
    load: float

    @property
    def valid(self) -> bool:
        """Whether the machine was quiet."""
        return not self.load > LOAD_LIMIT


@dataclass(frozen=True)
class PairedRatio:
    """How many times faster ours is than a peer: ``peer / ours``, paired round by round.

    ``ratio`` is the median over rounds, ``q1`` and ``q3`` its quartiles, ``lowest`` the worst round.
    ``aa`` is the median of ours against itself, ``aa_spread`` its interquartile range, ``load`` the
    share of the machine that other processes took. ``void`` says why the ratio must not be used.
    """

    ours_ms: float
    peer_ms: float
    ours_min_ms: float
    peer_min_ms: float
    ratio: float
    q1: float
    q3: float
    lowest: float
    rounds: int
    aa: float
    aa_spread: float
    load: float
    void: str = ""

    @property
    def valid(self) -> bool:
        """Whether the ratio may be reported."""
        return not self.void


def paired_ratio(
    ours: Callable[[], Any] | Subject,
    peer: Callable[[], Any] | Subject,
    *,
    rounds: int = 15,
    min_ms: float = 1.0,
    slope: bool = False,
    max_seconds: float | None = None,
    seed: int = 0,
) -> PairedRatio:
    """Time two functions interleaved and return their ratio; see ``paired_ratios``.

    Examples
    --------
    >>> result = paired_ratio(lambda: sum(range(1000)), lambda: sum(range(9000)), rounds=5)
    >>> result.ratio > 1
    True
    """
    options: dict[str, Any] = {"min_ms": min_ms, "slope": slope, "max_seconds": max_seconds, "seed": seed}
    return paired_ratios(ours, {"peer": peer}, rounds=rounds, **options)["peer"]


def paired_ratios(
    ours: Callable[[], Any] | Subject,
    peers: Mapping[str, Callable[[], Any] | Subject],
    *,
    rounds: int = 15,
    min_ms: float = 1.0,
    slope: bool = False,
    max_seconds: float | None = None,
    seed: int = 0,
) -> dict[str, PairedRatio]:
    """Time ours and all peers interleaved and return one ratio a peer.

    Parameters
    ----------
    ours, peers : callable or Subject
        Called without arguments; results are dropped. Each is warmed up first.
    rounds : int, default=15
        Paired ratios a peer; at least 3.
    min_ms : float, default=1.0
        A sample repeats its function until it lasts this long.
    slope : bool, default=False
        Whether to take the slope over two batch counts (three times the work).
    max_seconds : float, optional
        Stop early, after 3 rounds or more, when this much time went by.
    seed : int, default=0
        Of the order of subjects inside the rounds.

    Returns
    -------
    ratios : dict of str to PairedRatio
        One a peer, in the given order.
    """
    check_int("rounds", rounds, low=3)
    if not peers:
        raise QuernelError("peers must hold at least one function to compare with; got none")
    subjects = [_subject(ours), *map(_subject, peers.values())]
    with _quiet_gc():
        calls = [_calibrated(subject, min_ms) for subject in subjects]
        order = [0, *range(len(subjects))]  # ours stands twice: once as itself, once as the A/A control
        shuffle = _random.generator(seed)
        times: list[list[float]] = [[] for _ in order]
        watch = LoadWatch(subjects)
        for _ in _rounds(rounds, max_seconds):
            for position in shuffle.permutation(len(order)):
                times[position].append(_sample(subjects[order[position]], calls[order[position]], slope))
        load = watch.others()
    return {
        name: _paired(times[1], peer_times, times[0], load) for name, peer_times in zip(peers, times[2:], strict=True)
    }


def latency_ms(
    function: Callable[[], Any] | Subject,
    *,
    samples: int = 9,
    min_ms: float = 1.0,
    slope: bool = False,
    max_seconds: float | None = None,
) -> Latency:
    """Time one function; to compare two, use ``paired_ratio``, which times them interleaved.

    Parameters
    ----------
    function : callable or Subject
        Called without arguments, warmed up first.
    samples : int, default=9
        Number of samples; at least 3.
    min_ms, slope, max_seconds
        As in ``paired_ratios``.

    Returns
    -------
    latency : Latency
        In milliseconds a call.

    Examples
    --------
    >>> latency_ms(lambda: sum(range(1000)), samples=3).median_ms > 0
    True
    """
    check_int("samples", samples, low=3)
    subject = _subject(function)
    with _quiet_gc():
        calls = _calibrated(subject, min_ms)
        watch = LoadWatch([subject])
        times = [_sample(subject, calls, slope) * 1e3 for _ in _rounds(samples, max_seconds)]
        load = watch.others()
    q1, median, q3 = _quartiles(times)
    return Latency(median, min(times), q1, q3, len(times), load)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Let torch use ``n`` threads inside the block; its former setting comes back after it."""
    check_int("n", n, low=1)
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loaded(window_s: float = 0.25, limit: float = LOAD_LIMIT) -> bool:
    """Whether other processes take more than ``limit`` of the machine right now."""
    watch = LoadWatch()
    time.sleep(check_float("window_s", window_s, low=0.0))
    return watch.others() > limit


class LoadWatch:
    """Measures the share of the machine's processor time that other processes took since it was made."""

    def __init__(self, subjects: Sequence[Subject] = ()) -> None:
        self._subjects = subjects
        self._start = self._clocks()

    def others(self) -> float:
        """Return the busy share of others, 0 to 1; NaN where the system does not tell."""
        wall, mine, machine = (now - then for now, then in zip(self._clocks(), self._start, strict=True))
        if math.isnan(machine):
            return _load_average_of_others()
        processors = os.cpu_count() or 1
        # Below some ticks of 10 ms the counters say nothing; one tick of grace keeps rounding out.
        grace = 1.0 / _TICKS
        return min(1.0, max(0.0, machine - mine - grace) / max(wall * processors, grace))

    def _clocks(self) -> tuple[float, float, float]:
        outside = sum(subject.cpu_seconds() for subject in self._subjects)
        return time.perf_counter(), time.process_time() + outside, _machine_busy_seconds()


class _Local:
    """A callable of this process."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function

    def sample(self, calls: int) -> float:
        function = self._function
        start = time.perf_counter()
        for _ in itertools.repeat(None, calls):
            function()
        return time.perf_counter() - start

    def cpu_seconds(self) -> float:
        return 0.0


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _subject(function: Callable[[], Any] | Subject) -> Subject:
    if hasattr(function, "sample"):
        return cast(Subject, function)
    if not callable(function):
        raise QuernelError(f"expected a function without arguments to time; got {function!r}")
    return _Local(function)


def _calibrated(subject: Subject, min_ms: float) -> int:
    """Warm up and return how many calls last ``min_ms``."""
    seconds = check_float("min_ms", min_ms, low=0.0) / 1e3
    subject.sample(1)  # compiles, fills caches
    calls = 1
    while (taken := subject.sample(calls)) < seconds:
        # Aim 20 % over the mark; grow tenfold at most, since short samples are mostly noise.
        calls = max(calls + 1, min(10 * calls, math.ceil(calls * 1.2 * seconds / max(taken, 1e-9))))
    return calls


def _sample(subject: Subject, calls: int, slope: bool) -> float:
    """Return the seconds of one call."""
    once = subject.sample(calls)
    if not slope:
        return once / calls
    # Noise can bend the slope to zero or below; the floor keeps ratios finite, the median drops it.
    return max(subject.sample(3 * calls) - once, once * 1e-3) / (2 * calls)


def _rounds(rounds: int, max_seconds: float | None) -> Iterator[int]:
    start = time.perf_counter()
    for index in range(rounds):
        if index >= 3 and max_seconds is not None and time.perf_counter() - start > max_seconds:
            return
        yield index


def _paired(ours: list[float], peer: list[float], control: list[float], load: float) -> PairedRatio:
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    q1, median, q3 = _quartiles(ratios)
    aa_q1, aa, aa_q3 = _quartiles([c / a for a, c in zip(ours, control, strict=True)])
    void = ""
    if load > LOAD_LIMIT:
        void = f"other processes took {load:.0%} of the machine"
    elif not AA_LIMITS[0] <= aa <= AA_LIMITS[1]:
        void = f"ours against itself measured {aa:.3f}, outside {list(AA_LIMITS)}"
    return PairedRatio(
        ours_ms=statistics.median(ours) * 1e3,
        peer_ms=statistics.median(peer) * 1e3,
        ours_min_ms=min(ours) * 1e3,
        peer_min_ms=min(peer) * 1e3,
        ratio=median,
        q1=q1,
        q3=q3,
        lowest=min(ratios),
        rounds=len(ratios),
        aa=aa,
        aa_spread=aa_q3 - aa_q1,
        load=load,
        void=void,
    )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


@contextlib.contextmanager
def _quiet_gc() -> Iterator[None]:
    # No gc.collect() first: walking a large process's objects takes longer than most samples.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _machine_busy_seconds() -> float:
    """Return the processor seconds that all processes have used since boot; NaN where unknown."""
    try:
        with open("/proc/stat", encoding="ascii") as stream:
            fields = stream.readline().split()
    except OSError:
        return math.nan
    # cpu user nice system idle iowait irq softirq steal ...; stolen time is taken by other guests.
    counts = [int(field) for field in fields[1:9]]
    return (sum(counts) - counts[3] - counts[4]) / _TICKS


def _load_average_of_others() -> float:
    if not hasattr(os, "getloadavg"):
        return math.nan
    # This process is the one runnable task that is not somebody else's.
    return min(1.0, max(0.0, os.getloadavg()[0] - 1.0) / (os.cpu_count() or 1))
