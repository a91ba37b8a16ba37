"""The reproduction harness: verdicts by declared rule, JSON on the last line, exit codes, the ledger."""

import json
import math

import pytest

from quernel._claims import read_claims, upsert_claim
from quernel._errors import DataError, MissingExtraError
from reproductions._harness import EXIT_MISSING, EXIT_VOID, Outcome, Reproduction, Void, at_least, at_most

DECLARED = {"scale": "tiny", "data": "none", "metric": "ms", "baseline": "dense"}


def book_of(*claims):
    """A reproduction whose claims ``(name, rule, outcomes a seed)`` give fixed outcomes."""
    book = Reproduction("toy-book", paper="2401.00001")
    for name, rule, outcomes in claims:

        def run(seed, outcomes=outcomes):
            if isinstance(outcomes[seed], Exception):
                raise outcomes[seed]
            return outcomes[seed]

        checks = tuple(getattr(outcomes[0], "checks", ()))
        book.claim(name=name, claim=f"claim {name}", rule=rule, checks=checks, seeds=range(len(outcomes)), **DECLARED)(
            run
        )
    return book


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("rule", "outcomes", "verdict"),
    [
        (at_least(2, of="baseline / ours"), [Outcome(1, 2)], "reproduced"),
        (at_least(2, of="baseline / ours"), [Outcome(1, 1.9)], "not reproduced"),
        (at_least(2, of="baseline / ours", partly=1.5), [Outcome(1, 1.9)], "partly"),
        (at_most(0.5, of="ours / baseline"), [Outcome(1, 2)], "reproduced"),
        (at_most(0.5, of="ours - baseline", partly=1), [Outcome(3, 2)], "partly"),
        (at_least(1, of="baseline - ours"), [Outcome(3, 2)], "not reproduced"),
        # The median seed decides.
        (at_least(1), [Outcome(0, 0), Outcome(2, 0), Outcome(3, 0)], "reproduced"),
        (at_least(1), [Outcome(0, 0), Outcome(0, 0), Outcome(3, 0)], "not reproduced"),
        # Or their mean, where the rule says so.
        (at_least(1, over="mean"), [Outcome(0, 0), Outcome(0, 0), Outcome(3, 0)], "reproduced"),
        (at_least(1, over="mean"), [Outcome(0, 0), Outcome(1, 0), Outcome(1, 0)], "not reproduced"),
        (at_most(1, over="mean"), [Outcome(math.nan, 0), Outcome(0, 0), Outcome(0, 0)], "not reproduced"),
        # A check counts on every seed.
        (at_least(1), [Outcome(2, 0, {"c": True}), Outcome(2, 0, {"c": True})], "reproduced"),
        (at_least(1), [Outcome(2, 0, {"c": True}), Outcome(2, 0, {"c": False})], "partly"),
        (at_least(1), [Outcome(0, 0, {"c": True})], "not reproduced"),
        # A run without a number counts against the claim, whichever way the rule points.
        (at_least(1), [Outcome(math.nan, 0)], "not reproduced"),
        (at_most(1), [Outcome(math.nan, 0), Outcome(math.nan, 0), Outcome(0, 0)], "not reproduced"),
        (at_most(1), [Outcome(math.nan, 0), Outcome(0, 0), Outcome(0, 0)], "reproduced"),
        (at_least(1, of="ours / baseline"), [Outcome(0, 0)], "not reproduced"),
        (at_least(1, of="ours / baseline"), [Outcome(1, 0)], "reproduced"),
    ],
)
def test_verdicts(rule, outcomes, verdict, capsys):
    assert book_of(("a", rule, outcomes)).main(["--json"]) == 0
    assert last_json(capsys)["verdict"] == verdict


def test_json_is_the_ledgers_row(tmp_path, capsys):
    book = book_of(("a", at_least(1), [Outcome(2.0000001, 1)] * 3))
    book.main(["--json", "--write", "--claims", str(tmp_path / "c.toml")])
    row = last_json(capsys)
    assert row == read_claims(tmp_path / "c.toml")[0].to_json()
    assert row["ours"] == 2.0
    assert row["seeds"] == [0, 1, 2]
    assert row["command"] == "python reproductions/toy-book.py --only a"
    assert row["threshold"] == "ours >= 1"


def test_a_mean_is_kept_and_named(tmp_path, capsys):
    outcomes = [Outcome(1, 0), Outcome(2, 0), Outcome(6, 3)]
    book_of(("a", at_least(1, over="mean"), outcomes)).main(["--json", "--write", "--claims", str(tmp_path / "c.toml")])
    row = last_json(capsys)
    assert (row["ours"], row["baseline"]) == (3.0, 1.0)
    assert row["threshold"] == "ours >= 1, mean of the seeds"
    with pytest.raises(ValueError, match="over= must be one of"):
        at_least(1, over="mode")


def test_the_ledger_keeps_every_seed(tmp_path, capsys):
    outcomes = [Outcome(2.0000001, 1), Outcome(4, 3), Outcome(math.nan, 2)]
    book_of(("a", at_least(1), outcomes)).main(["--json", "--write", "--claims", str(tmp_path / "c.toml")])
    row = last_json(capsys)
    assert row["ours_by_seed"] == [2.0, 4.0, None]
    assert row["baseline_by_seed"] == [1.0, 3.0, 2.0]
    assert read_claims(tmp_path / "c.toml")[0].ours_by_seed[:2] == (2.0, 4.0)


def test_several_rows_are_an_array_and_only_chooses(capsys):
    book = book_of(("a", at_least(1), [Outcome(2, 1)]), ("b", at_least(1), [Outcome(2, 1)]))
    assert book.main(["--json"]) == 0
    assert [row["claim"] for row in last_json(capsys)] == ["claim a", "claim b"]
    assert book.main(["--json", "--only", "b"]) == 0
    assert last_json(capsys)["claim"] == "claim b"
    with pytest.raises(SystemExit):
        book.main(["--only", "c"])
    assert "invalid choice: 'c'" in capsys.readouterr().err


def test_nothing_is_written_unasked(tmp_path, capsys):
    book_of(("a", at_least(1), [Outcome(2, 1)])).main(["--claims", str(tmp_path / "c.toml")])
    assert list(tmp_path.iterdir()) == []
    out = capsys.readouterr().out
    assert "REPRODUCED" in out
    assert "claim a" in out


@pytest.mark.parametrize("error", [DataError("stsb is absent"), MissingExtraError("minilm", "hf")])
def test_missing_data_is_named_and_the_rest_runs(error, tmp_path, capsys):
    book = book_of(("a", at_least(1), [error]), ("b", at_least(1), [Outcome(2, 1)]))
    assert book.main(["--json", "--write", "--claims", str(tmp_path / "c.toml")]) == EXIT_MISSING == 3
    captured = capsys.readouterr()
    assert f"[a] missing: {error}" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["claim"] == "claim b"
    assert [claim.claim for claim in read_claims(tmp_path / "c.toml")] == ["claim b"]


def test_a_void_measurement_is_not_recorded(tmp_path, capsys):
    book = book_of(("a", at_least(1), [Void("machine busy")]))
    assert book.main(["--json", "--write", "--claims", str(tmp_path / "c.toml")]) == EXIT_VOID
    captured = capsys.readouterr()
    assert "[a] void: machine busy" in captured.err
    assert json.loads(captured.out.splitlines()[-1]) == []
    assert read_claims(tmp_path / "c.toml") == ()


def test_bugs_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        book_of(("a", at_least(1), [ZeroDivisionError()])).main([])


def test_a_complete_run_drops_claims_that_are_no_longer_declared(tmp_path, capsys):
    ledger = tmp_path / "c.toml"
    one = ("a", at_least(1), [Outcome(2, 1)])
    book_of(one, ("old", at_least(1), [Outcome(2, 1)])).main(["--write", "--claims", str(ledger)])
    other = read_claims(ledger)[0].to_json() | {"slug": "other-book"}
    upsert_claim(other, ledger)
    # A partial run keeps what it did not measure.
    book_of(one, ("b", at_least(1), [Outcome(2, 1)])).main(["--write", "--only", "a", "--claims", str(ledger)])
    assert [claim.claim for claim in read_claims(ledger)] == ["claim a", "claim a", "claim old"]
    book_of(one).main(["--write", "--claims", str(ledger)])
    assert [(claim.slug, claim.claim) for claim in read_claims(ledger)] == [
        ("other-book", "claim a"),
        ("toy-book", "claim a"),
    ]


def test_list_runs_nothing(capsys):
    book = book_of(("a", at_least(1), [ZeroDivisionError()]))
    assert book.main(["--list"]) == 0
    assert capsys.readouterr().out == "a: claim a [ours >= 1]\n"


def test_table_and_notes_are_printed(capsys):
    outcome = Outcome(1, 2, rows=[{"layer": "q", "error": 0.123456789}, {"layer": "k", "bits": 8}], notes=["a note"])
    book_of(("a", at_most(1), [outcome])).main([])
    out = capsys.readouterr().out
    assert "note (seed 0): a note" in out
    assert "layer  error   bits" in out
    assert "q      0.1235" in out


def test_declarations_are_checked():
    book = book_of(("a", at_least(1), [Outcome(2, 1)]))
    with pytest.raises(ValueError, match="declared twice"):
        book.claim(name="a", claim="other", rule=at_least(1), **DECLARED)
    with pytest.raises(ValueError, match="at least one seed"):
        book.claim(name="b", claim="other", rule=at_least(1), seeds=(), **DECLARED)
    with pytest.raises(ValueError, match="of= must be one of"):
        at_least(1, of="speed")
    with pytest.raises(ValueError, match="partly= must be weaker"):
        at_least(1, partly=2)
    undeclared = book_of(("a", at_least(1), [Outcome(2, 1), Outcome(2, 1, {"surprise": True})]))
    with pytest.raises(ValueError, match="measured \\('surprise',\\)"):
        undeclared.main([])
