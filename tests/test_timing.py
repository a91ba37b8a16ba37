"""Paired timing: known ratios, the A/A control, load of other processes, settings given back."""

import gc
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from quernel import _timing
from quernel._errors import QuernelError
from quernel._timing import LoadWatch, latency_ms, loaded, paired_ratio, paired_ratios, threads

# Simulated clocks have no noise; what remains is rounding.
EXACT = 1e-9


class Clockwork:
    """A subject that takes ``overhead + calls * seconds``, without running anything."""

    def __init__(self, seconds, overhead=0.0, drift=0.0):
        self.seconds, self.overhead, self.drift = seconds, overhead, drift
        self.asked = []

    def sample(self, calls):
        self.asked.append(calls)
        return (self.overhead + calls * self.seconds) * (1 + self.drift * len(self.asked))

    def cpu_seconds(self):
        return 0.0


def quiet(monkeypatch, load=0.0):
    monkeypatch.setattr(LoadWatch, "others", lambda self: load)


def test_a_known_ratio(monkeypatch):
    quiet(monkeypatch)
    result = paired_ratio(Clockwork(1e-4), Clockwork(3e-4))
    assert result.valid
    assert result.rounds == 15
    for value in (result.ratio, result.q1, result.q3, result.lowest):
        assert value == pytest.approx(3, rel=EXACT)
    assert result.ours_ms == pytest.approx(0.1)
    assert result.peer_ms == result.peer_min_ms == pytest.approx(0.3)
    assert result.aa == pytest.approx(1, rel=EXACT)
    assert result.aa_spread == pytest.approx(0, abs=EXACT)


def test_slope_removes_a_constant_cost(monkeypatch):
    quiet(monkeypatch)
    ours, peer = Clockwork(1e-4, overhead=5e-4), Clockwork(2e-4, overhead=5e-4)
    assert paired_ratio(ours, peer, min_ms=0.0).ratio < 1.9
    assert paired_ratio(ours, peer, min_ms=0.0, slope=True).ratio == pytest.approx(2, rel=1e-6)


def test_slow_drift_cancels(monkeypatch):
    # Both slow down to half speed over the run; the ratio of far apart samples would be off by 2.
    quiet(monkeypatch)
    result = paired_ratio(Clockwork(1e-4, drift=0.02), Clockwork(2e-4, drift=0.04), rounds=25)
    assert result.ratio == pytest.approx(2, rel=0.05)
    assert 0.95 < result.aa < 1.05


def test_samples_last_as_long_as_asked(monkeypatch):
    quiet(monkeypatch)
    fast, slow = Clockwork(1e-6), Clockwork(0.5)
    paired_ratio(fast, slow, rounds=3, min_ms=2.0)
    assert fast.asked[-1] * 1e-6 >= 2e-3
    assert slow.asked[-1] == 1


def test_subjects_interleave_in_changing_order(monkeypatch):
    quiet(monkeypatch)
    calls = []
    peers = {name: lambda name=name: calls.append(name) for name in "bc"}
    paired_ratios(lambda: calls.append("a"), peers, rounds=8, min_ms=0.0)
    rounds = ["".join(calls[-32:][i : i + 4]) for i in range(0, 32, 4)]
    assert {"".join(sorted(one)) for one in rounds} == {"aabc"}  # ours stands twice, as its own control
    assert len(set(rounds)) > 3


def test_a_failed_control_voids_the_ratio(monkeypatch):
    quiet(monkeypatch)

    class Alternating(Clockwork):
        def sample(self, calls):
            return super().sample(calls) * (1 + len(self.asked) % 2)

    # Ours is asked twice a round; in a fixed order the same one of the two is always slow.
    monkeypatch.setattr(_timing._random, "generator", lambda seed: _Fixed())
    result = paired_ratio(Alternating(1e-3), Clockwork(2e-3))
    assert not result.valid
    assert "ours against itself measured" in result.void


class _Fixed:
    def permutation(self, n):
        return range(n)


def test_load_voids_the_ratio(monkeypatch):
    quiet(monkeypatch, load=0.5)
    result = paired_ratio(Clockwork(1e-3), Clockwork(2e-3))
    assert result.void == "other processes took 50% of the machine"
    assert not latency_ms(Clockwork(1e-3)).valid


def test_unknown_load_does_not_void(monkeypatch):
    quiet(monkeypatch, load=math.nan)
    assert paired_ratio(Clockwork(1e-3), Clockwork(2e-3)).valid
    assert latency_ms(Clockwork(1e-3)).valid


def test_a_time_limit_stops_early_but_not_before_three_rounds(monkeypatch):
    quiet(monkeypatch)
    assert paired_ratio(lambda: time.sleep(1e-3), lambda: None, min_ms=0.0, max_seconds=0.0).rounds == 3
    assert latency_ms(lambda: None, samples=9, max_seconds=0.0).samples == 3


def test_latency(monkeypatch):
    quiet(monkeypatch)
    result = latency_ms(Clockwork(2e-3), samples=5)
    assert result.median_ms == result.min_ms == result.q1_ms == result.q3_ms == pytest.approx(2)
    assert result.samples == 5


def test_real_functions_rank_right():
    result = paired_ratio(lambda: sum(range(2_000)), lambda: sum(range(20_000)), rounds=5, min_ms=0.2)
    assert result.ratio > 3  # ten times the work


def test_the_collector_is_off_inside_and_back_on_after():
    states = []
    paired_ratio(lambda: states.append(gc.isenabled()), lambda: None, rounds=3, min_ms=0.0)
    assert not any(states)
    assert gc.isenabled()
    gc.disable()
    try:
        latency_ms(lambda: None, samples=3, min_ms=0.0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        latency_ms(lambda: 1 / 0)
    assert gc.isenabled()


def test_threads_restores_the_setting():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), threads(before + 1):
        {}["absent"]
    assert torch.get_num_threads() == before
    with pytest.raises(QuernelError, match="n must be an integer"), threads(0):
        pass


def clocks(monkeypatch, *readings):
    """Let the watch read (wall, mine, machine) in turn."""
    remaining = list(readings)
    monkeypatch.setattr(LoadWatch, "_clocks", lambda self: remaining.pop(0))
    monkeypatch.setattr(_timing.os, "cpu_count", lambda: 2)


@pytest.mark.parametrize(
    ("mine", "machine", "others"),
    [(1.0, 1.0, 0.0), (1.0, 2.01, 0.5), (0.0, 2.01, 1.0), (1.0, 0.9, 0.0), (0.0, 0.005, 0.0)],
)
def test_others_are_the_machine_without_us(monkeypatch, mine, machine, others):
    clocks(monkeypatch, (10.0, 5.0, 100.0), (11.0, 5.0 + mine, 100.0 + machine))
    assert LoadWatch().others() == pytest.approx(others, abs=1e-6)


def test_without_counters_the_load_average_stands_in(monkeypatch):
    clocks(monkeypatch, (0.0, 0.0, math.nan), (1.0, 0.0, math.nan))
    monkeypatch.setattr(_timing.os, "getloadavg", lambda: (2.0, 0.0, 0.0), raising=False)
    assert LoadWatch().others() == 0.5


def test_without_any_source_the_load_is_unknown(monkeypatch):
    clocks(monkeypatch, (0.0, 0.0, math.nan), (1.0, 0.0, math.nan))
    monkeypatch.delattr(_timing.os, "getloadavg", raising=False)
    assert math.isnan(LoadWatch().others())


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="needs Linux's counters")
def test_a_busy_neighbour_is_seen():
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        assert loaded(window_s=0.4)
    finally:
        neighbour.kill()
        neighbour.wait()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_ratio(1, len), "function without arguments"),
        (lambda: paired_ratios(len, {}), "at least one function"),
        (lambda: paired_ratio(len, len, rounds=2), "rounds must be"),
        (lambda: latency_ms(len, samples=2), "samples must be"),
        (lambda: latency_ms(lambda: 0, min_ms=-1), "min_ms must be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
