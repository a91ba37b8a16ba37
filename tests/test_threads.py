"""parallel_ranges: exact cover, errors, nesting, many callers, forked children, both the OpenMP and the pool path."""

import math
import multiprocessing
import os
import queue
import threading

import numpy as np
import pytest
import threadpoolctl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from quernel import _threads
from quernel._threads import num_threads, one_blas_thread, parallel_ranges, workspace

PARTS = 3  # more than the two cores, so that ranges really queue


@pytest.fixture(params=["openmp", "pool"])
def path(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(_threads, "_openmp", lambda: None)
    elif _threads._openmp() is None:
        pytest.skip("torch does not bring libgomp here")
    return request.param


def covered(n, **options):
    """The ranges that were asked for, sorted."""
    ranges = queue.SimpleQueue()
    parallel_ranges(lambda start, stop: ranges.put((start, stop)), n, **options)
    return sorted(ranges.get() for _ in range(ranges.qsize()))


@given(n=st.integers(0, 500), grain=st.integers(0, 600), threads=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("openmp", [True, False])
def test_ranges_cover_exactly(openmp, n, grain, threads):
    with pytest.MonkeyPatch.context() as patch:
        if not openmp:
            patch.setattr(_threads, "_openmp", lambda: None)
        ranges = covered(n, grain=grain, threads=threads)
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
    assert (ranges[-1][1] if ranges else 0) == max(n, 0)
    assert all(stop > start for start, stop in ranges)
    assert len(ranges) <= threads
    if len(ranges) > 1:
        assert min(stop - start for start, stop in ranges) >= grain


def test_empty_and_negative_do_nothing(path):
    assert covered(0) == covered(-3) == []


def test_default_is_torchs_number_of_threads(path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert num_threads() == 2
        assert len(covered(100)) == 2
        torch.set_num_threads(1)
        assert covered(100) == [(0, 100)]
    finally:
        torch.set_num_threads(before)


def test_errors_come_back_after_all_ranges_ended(path):
    finished = []

    def work(start, stop):
        if start == 0:
            raise KeyError("first")
        finished.append(start)

    with pytest.raises(KeyError, match="first"):
        parallel_ranges(work, 30, threads=PARTS)
    assert sorted(finished) == [10, 20]
    assert covered(30, threads=PARTS) == [(0, 10), (10, 20), (20, 30)]  # nothing is left broken


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_come_back_too(path, kind):
    def work(start, stop):
        if start:
            raise kind

    with pytest.raises(kind):
        parallel_ranges(work, 30, threads=PARTS)


def test_nested_calls_run_on_their_thread(path):
    inner = queue.SimpleQueue()

    def work(start, stop):
        assert num_threads() == 1
        here = threading.get_native_id()
        parallel_ranges(lambda a, b: inner.put((start, a, b, threading.get_native_id() == here)), 7, threads=PARTS)

    parallel_ranges(work, 30, threads=PARTS)
    assert sorted(inner.get() for _ in range(inner.qsize())) == [(s, 0, 7, True) for s in (0, 10, 20)]
    assert num_threads() == torch.get_num_threads()


def test_torch_inside_a_pool_range_has_one_thread_and_nobody_else_is_touched(monkeypatch):
    monkeypatch.setattr(_threads, "_openmp", lambda: None)
    before = torch.get_num_threads()
    a = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    expected = a @ a
    settings = queue.SimpleQueue()

    def work(start, stop):
        torch.testing.assert_close(a @ a, expected)
        settings.put(torch.get_num_threads())

    try:
        torch.set_num_threads(2)
        parallel_ranges(work, PARTS, threads=PARTS)
        assert {settings.get() for _ in range(PARTS)} == {1}
        # Neither this thread nor one yet to come is left with one thread.
        assert torch.get_num_threads() == 2
        later = threading.Thread(target=lambda: settings.put(torch.get_num_threads()))
        later.start()
        later.join()
        assert settings.get() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's list of threads")
def test_torch_inside_an_openmp_range_starts_no_team_of_its_own():
    if _threads._openmp() is None:
        pytest.skip("torch does not bring libgomp here")
    before = torch.get_num_threads()
    a = torch.ones(300, 300)
    x = torch.ones(200_000)

    def work(start, stop):
        torch.testing.assert_close((a @ a)[0, 0], torch.tensor(300.0))
        torch.testing.assert_close(x.exp().sum(), x.sum() * math.e)

    try:
        torch.set_num_threads(2)
        parallel_ranges(lambda start, stop: None, 2, threads=2)
        tasks = set(os.listdir("/proc/self/task"))
        parallel_ranges(work, 2, threads=2)
        assert set(os.listdir("/proc/self/task")) <= tasks
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's counters")
def test_a_product_inside_a_pool_range_uses_one_core(monkeypatch):
    # MKL has a setting of its own, which OpenMP's does not change.
    monkeypatch.setattr(_threads, "_openmp", lambda: None)
    a = torch.ones(600, 600)
    used = queue.SimpleQueue()

    def busy():
        return {task: cpu_milliseconds(task) for task in os.listdir("/proc/self/task")}

    def work(start, stop):
        if start == 0:
            earlier = busy()
            # A third of a second: workers of earlier operations may spin for milliseconds before they sleep.
            for _ in range(60):
                a @ a
            used.put([now - earlier.get(task, 0) for task, now in busy().items()])

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        parallel_ranges(work, 2, threads=2)
    finally:
        torch.set_num_threads(before)
    spent = sorted(used.get())
    assert spent[-1] > 0
    assert sum(spent[:-1]) < 0.3 * spent[-1]


def cpu_milliseconds(task):
    try:
        with open(f"/proc/self/task/{task}/schedstat", encoding="ascii") as stream:
            return int(stream.read().split()[0]) / 1e6
    except FileNotFoundError:  # a thread that ended meanwhile
        return 0.0


@njit(nogil=True)
def squares(x, out, start, stop):
    for i in range(start, stop):
        out[i] = x[i] * x[i] + 1.0 / (1.0 + x[i])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(path, threads):
    x = np.random.default_rng(0).random(1001)
    out, alone = np.full(1001, np.nan), np.full(1001, np.nan)
    squares(x, alone, 0, 1001)
    parallel_ranges(lambda start, stop: squares(x, out, start, stop), 1001, threads=threads)
    np.testing.assert_array_equal(out, alone)


def test_eight_threads_at_once(path):
    wrong = []

    def caller(number):
        for repeat in range(20):
            out = np.zeros(97)

            def work(start, stop, out=out):
                out[start:stop] += np.arange(start, stop) + number

            parallel_ranges(work, 97, threads=2)
            if not np.array_equal(out, np.arange(97.0) + number):
                wrong.append((number, repeat))

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert not any(thread.is_alive() for thread in callers)
    assert wrong == []


def compute(_=None):
    """A parallel sum of squares, with torch inside the ranges; for children."""
    out = torch.zeros(6)

    def work(start, stop):
        for i in range(start, stop):
            out[i] = (torch.full((50, 50), float(i)) @ torch.eye(50)).mean()

    parallel_ranges(work, 6, threads=3)
    return out.tolist()


EXPECTED = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def in_child(method, function):
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=report, args=(send, function))
    child.start()
    send.close()  # so that a child that dies ends the wait
    try:
        assert receive.poll(60), "the child hangs"
        return receive.recv()
    finally:
        child.kill()
        child.join()


def report(send, function):
    send.send((function(), _threads._process.forked))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes(path):
    assert compute() == EXPECTED  # the parent's team and pool are in use before the fork
    assert in_child("fork", compute) == (EXPECTED, True)
    assert compute() == EXPECTED


def grandchild():
    return in_child("fork", compute)[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_childs_child_computes():
    compute()
    assert in_child("fork", grandchild) == (EXPECTED, True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_bare_fork():
    compute()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        try:
            os.write(writable, b"right" if compute() == EXPECTED else b"wrong")
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as answer:
        assert answer.read() == b"right"
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.slow
def test_a_spawned_child_computes():
    assert in_child("spawn", compute) == (EXPECTED, False)


def test_workspaces_are_kept_by_thread(path):
    def places():
        found = queue.SimpleQueue()

        def work(start, stop):
            found.put((threading.get_native_id(), workspace("test", 1000, torch.float32).data_ptr()))

        parallel_ranges(work, 2, threads=2)
        return {found.get() for _ in range(2)}

    seen = set().union(*(places() for _ in range(10)))
    assert len({place for _, place in seen}) == len({thread for thread, _ in seen}) == len(seen)


def test_workspaces_grow_and_differ_by_key_and_dtype():
    small = workspace("grow", 10, torch.float32)
    assert small.shape == (10,)
    assert workspace("grow", 5, torch.float32).data_ptr() == small.data_ptr()
    assert workspace("grow", 5, torch.float64).dtype is torch.float64
    assert workspace("other", 5, torch.float32).data_ptr() != small.data_ptr()
    assert workspace("grow", 1000, torch.float32).shape == (1000,)


def test_zeroed_workspaces_begin_as_zeros_and_keep_what_is_left_in_them():
    held = workspace("zeroed", 1000, torch.int32, zeroed=True)
    assert not held.any()
    held[3] = 7
    assert workspace("zeroed", 10, torch.int32, zeroed=True)[3] == 7
    held[3] = 0
    assert not workspace("zeroed", 100_000, torch.int32, zeroed=True).any()


def test_workspaces_of_ended_teams_are_dropped():
    if _threads._openmp() is None:
        pytest.skip("torch does not bring libgomp here")

    def caller():
        parallel_ranges(lambda start, stop: workspace("ended", 10, torch.float32), 2, threads=2)

    for _ in range(10):
        thread = threading.Thread(target=caller)
        thread.start()
        thread.join()
    # Each caller had a worker of its own; libgomp ends them with it, give or take the last ones.
    assert len(_threads._process.team_workspaces) < 8


def test_workspaces_are_counted() -> None:
    before = _threads.workspace_bytes()
    _threads.workspace("test of counting", 1000, torch.float32)
    assert _threads.workspace_bytes() == before + 4000


def test_one_blas_thread_is_given_back_by_the_last_one_out():
    def counts():
        return [lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]

    before = counts()
    with one_blas_thread:
        with one_blas_thread:
            assert set(counts()) <= {1}
        assert set(counts()) <= {1}
    assert counts() == before
