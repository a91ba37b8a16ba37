"""The benchmark runner on a toy benchmark: gate first, JSON, targets, refusal, isolated peers, results files."""

import contextlib
import json
import os
import sys
import textwrap

import pytest

from benchmarks import __main__ as cli
from benchmarks import _runner
from benchmarks._peers import PeerUnavailable
from benchmarks._process import IsolatedSubject, ProcessFailed, in_fresh_process, resident_bytes
from benchmarks._runner import Case, Isolated, Unavailable
from quernel import _timing

TOY = """
    import os
    from benchmarks._runner import Case, Isolated, Unavailable

    def ours(state): return sum(range(state))
    def slow(state): return sum(range(20 * state))
    def absent(state): raise Unavailable("not installed")
    def gate(state): return ours(state) == 499500
    def prepare(n): return lambda: sum(range(n))
    def broken(): import no_such_package
    def environment(name): print("noise on standard output"); return os.environ[name]
    def fails(): raise KeyError("gone")
    def dies(): os._exit(7)

    COMMON = dict(setup=lambda: 1000, ours=ours, gate=gate, min_ms=0.05, threads=(1,))
    CASES = [
        Case(name="fast", peers={"slow": slow, "same": ours}, target={"slow": 2.0},
             bound_ms=lambda s, n: s * n / 1e6, facts=lambda s: f"{s} numbers", **COMMON),
        Case(name="missed", peers={"same": ours}, target={"same": 50.0}, **COMMON),
        Case(name="wrong", peers={"slow": slow}, **{**COMMON, "gate": lambda state: False}),
        Case(name="raises", peers={"slow": slow}, **{**COMMON, "gate": lambda state: 1 / 0}),
        Case(name="absent", peers={"absent": absent, "broken": Isolated("broken"), "slow": slow},
             target={"absent": 1}, **COMMON),
    ]
    SLOW_CASES = [
        Case(name="isolated", peers={"elsewhere": Isolated("prepare", 20_000)}, target={"elsewhere": 2.0}, **COMMON),
        Case(name="fresh", fresh=True, peers={"slow": slow}, **COMMON),
    ]
    CASES += SLOW_CASES
    CASES.append(Case(name="used", setup=lambda: [], ours=lambda used: used.append(1), gate=lambda used: not used,
                      peers={"same": lambda used: used.append(1)}, min_ms=0.05, threads=(1, 2)))
"""
FIELDS = ["name", "ours_ms", "peer", "peer_ms", "ratio", "target", "bound_ms", "threads", "ok"]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks" / "pillar"
    folder.mkdir(parents=True)
    (folder / "toy-sum.py").write_text(textwrap.dedent(TOY))
    (folder / "_private.py").write_text("raise RuntimeError")
    monkeypatch.setattr(_runner, "HERE", folder.parent)
    monkeypatch.setattr(_timing, "loaded", lambda: False)
    monkeypatch.setattr(_timing.LoadWatch, "others", lambda self: 0.0)
    # Noise of a busy test machine must not void a toy result.
    monkeypatch.setattr(_timing, "AA_LIMITS", (0.0, 1e9))
    return folder / "toy-sum.py"


def run(capsys, *arguments):
    status = cli.main(["toy-sum", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_rows_and_targets(toy, capsys):
    status, document = run(capsys, "--case", "fast")
    assert status == 0
    assert document["slug"] == "toy-sum"
    slow, same = document["rows"]
    assert list(slow) == list(same) == FIELDS
    assert slow["ratio"] > 2
    assert slow["ok"] is same["ok"] is True
    assert (slow["target"], same["target"]) == (2.0, None)
    assert (slow["threads"], slow["bound_ms"]) == (1, 0.001)
    assert slow["peer_ms"] > slow["ours_ms"] > 0


def test_facts_are_printed_once_and_kept(toy, capsys, tmp_path):
    assert cli.main(["toy-sum", "--case", "fast"]) == 0
    assert capsys.readouterr().out.count("1000 numbers") == 1
    rows = list(_runner.run_cases(toy, lambda case: case.name in ("fast", "wrong"), _runner.Settings()))
    kept = json.loads(cli.write_results("toy-sum", rows, tmp_path).read_text())["rows"]
    assert [row["facts"] for row in kept] == ["1000 numbers", "1000 numbers", ""]


def test_resident_memory_is_read_in_bytes():
    now, most = resident_bytes(), resident_bytes("VmHWM")
    held = bytearray(os.urandom(2**25))
    assert 2**24 < resident_bytes() - now < 2**26
    assert most <= resident_bytes("VmHWM") and len(held) == 2**25


def test_a_missed_target_fails(toy, capsys):
    status, document = run(capsys, "--case", "missed")
    assert status == 1
    assert document["rows"][0]["ok"] is False
    assert document["rows"][0]["ratio"] > 0


@pytest.mark.parametrize("case", ["wrong", "raises"])
def test_nothing_is_timed_behind_a_failed_gate(toy, capsys, monkeypatch, case):
    monkeypatch.setattr(_timing, "paired_ratios", lambda *_, **__: pytest.fail("timed"))
    status, document = run(capsys, "--case", case)
    assert status == 1
    (row,) = document["rows"]
    assert row["ratio"] is row["ours_ms"] is None
    assert row["ok"] is False


@pytest.mark.slow
def test_every_thread_count_begins_with_a_state_that_nothing_has_used(toy, capsys):
    rows = run(capsys, "--case", "used")[1]["rows"]
    assert [row["threads"] for row in rows] == [1, 2]
    assert all(row["ratio"] for row in rows)


@pytest.mark.slow
def test_absent_peers_are_said_and_the_rest_runs(toy, capsys):
    status, document = run(capsys, "--case", "absent")
    rows = {row["peer"]: row for row in document["rows"]}
    assert status == 1
    assert rows["absent"]["ratio"] is None
    assert rows["absent"]["ok"] is False  # it had a target, which is not shown to hold
    assert rows["broken"]["ok"] is True
    assert rows["slow"]["ratio"] > 2


@pytest.mark.slow
def test_isolated_peers_and_fresh_processes(toy, capsys):
    status, document = run(capsys, "--case", "isolated")
    assert status == 0
    assert document["rows"][0]["ratio"] > 2
    # The fresh process does not have this test's patches, so its row may be void on a busy machine.
    status, document = run(capsys, "--case", "fresh", "--force")
    assert document["rows"][0]["ratio"] > 2
    assert status == (4 if document["rows"][0].get("void") else 0)


def test_a_busy_machine_gets_no_ratio(toy, capsys, monkeypatch):
    monkeypatch.setattr(_timing, "loaded", lambda: True)
    status, document = run(capsys, "--case", "fast", "--wait", "0")
    assert status == 4
    assert [row["ratio"] for row in document["rows"]] == [None, None]
    assert all(row["void"] and not row["ok"] for row in document["rows"])


def test_load_during_the_measurement_withholds_the_ratio(toy, capsys, monkeypatch):
    monkeypatch.setattr(_timing.LoadWatch, "others", lambda self: 0.5)
    status, document = run(capsys, "--case", "fast")
    assert status == 4
    assert document["rows"][0]["ratio"] is None


def test_force_shows_void_rows(toy, capsys, monkeypatch):
    monkeypatch.setattr(_timing.LoadWatch, "others", lambda self: 0.5)
    status, document = run(capsys, "--case", "fast", "--force")
    assert status == 4
    row = document["rows"][0]
    assert row["ratio"] > 2
    assert row["void"] is True
    assert row["ok"] is False


def test_a_disturbed_measurement_is_repeated(toy, capsys, monkeypatch):
    loads = iter([0.5, 0.0])
    monkeypatch.setattr(_timing.LoadWatch, "others", lambda self: next(loads))
    status, document = run(capsys, "--case", "fast")
    assert status == 0
    assert document["rows"][0]["ok"] is True


def test_write_keeps_full_rows(toy, capsys, tmp_path):
    results = tmp_path / "results"
    toy.write_text(toy.read_text().replace("CASES += SLOW_CASES", "CASES = CASES[:2]"))
    status, document = run(capsys, "--write", "--results", str(results))
    assert status == 1  # the missed target is kept, too: results are not chosen
    kept = json.loads((results / "toy-sum.json").read_text())
    assert [row["name"] for row in kept["rows"]] == [row["name"] for row in document["rows"]]
    assert {"q1", "q3", "lowest", "rounds", "aa", "load", "bound"} <= kept["rows"][0].keys()
    assert {"processor", "cores", "torch"} <= kept["machine"].keys()
    assert os.listdir(results) == ["toy-sum.json"]


def test_void_results_are_not_written(toy, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(_timing.LoadWatch, "others", lambda self: 0.5)
    toy.write_text(toy.read_text().replace("CASES += SLOW_CASES", "CASES = CASES[:1]"))
    assert run(capsys, "--write", "--results", str(tmp_path / "results"))[0] == 4
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unknown"], "no benchmark is called 'unknown'; known: toy-sum"),
        ([], "which system"),
        (["toy-sum", "--write", "--force"], "--write keeps whole, valid results"),
    ],
)
def test_bad_arguments(toy, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_list(toy, capsys):
    assert cli.main(["--list"]) == 0
    assert capsys.readouterr().out == "toy-sum\n"


def test_a_fresh_process_has_its_threads_and_clean_output(toy):
    assert in_fresh_process(toy, "environment", "OMP_NUM_THREADS", threads=2) == "2"
    assert in_fresh_process(toy, "environment", "EXTRA", env={"EXTRA": "x"}) == "x"


@pytest.mark.parametrize(("function", "message"), [("fails", "KeyError: 'gone'"), ("dies", "died: exit status 7")])
def test_failures_elsewhere_are_named(toy, function, message):
    with pytest.raises(ProcessFailed, match=f"toy-sum.py:{function}: {message}"):
        in_fresh_process(toy, function)


def test_an_isolated_subject_times_there(toy):
    with IsolatedSubject(toy, "prepare", 1000) as subject:
        assert subject.sample(10) > 0
        assert subject.sample(2000) > subject.sample(10)
        assert subject.cpu_seconds() > 0


def test_an_isolated_peer_gets_the_python_that_has_what_it_requires(toy, monkeypatch):
    asked = []

    def layered(*requirements):
        asked.extend(requirements)
        if "missing==1" in requirements:
            raise PeerUnavailable("missing==1 cannot be installed")
        return sys.executable

    monkeypatch.setattr(_runner, "peer_python", layered)
    with contextlib.ExitStack() as stack:
        subject = _runner._prepared(toy, Isolated("prepare", 10, requires=("some==1", "other==2")), None, 1, stack)
        assert subject.sample(3) > 0
        assert asked == ["some==1", "other==2"]
        _runner._prepared(toy, Isolated("prepare", 10), None, 1, stack)
        assert len(asked) == 2
        with pytest.raises(ImportError, match="cannot be installed"):
            _runner._prepared(toy, Isolated("prepare", 10, requires=("missing==1",)), None, 1, stack)


def test_cold_start(toy):
    assert _runner.first_call_ms(str(toy), "fast") > 0


def case(**changes):
    return Case(**{"name": "c", "ours": len, "peers": {"p": len}, "gate": len, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 5}, "rounds must be at least 15"),
        ({"peers": {}}, "at least one alternative"),
        ({"target": {"q": 1.0}}, "not among the peers"),
    ],
)
def test_cases_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        case(**changes)


def test_names_are_unique(toy):
    toy.write_text(toy.read_text() + "CASES += CASES\n")
    with pytest.raises(ValueError, match="share a name"):
        _runner.cases_of(toy)
    assert isinstance(Isolated("f"), Isolated)
    assert issubclass(Unavailable, Exception)
