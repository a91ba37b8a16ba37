"""The ledger: exact fields, round trips of any text, sorted upserts, damage, and many writers at once."""

import math
import multiprocessing
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel import _claims
from quernel._claims import Claim, claims_path, keep_claims, read_claims, to_toml, upsert_claim, verdict_of
from quernel._errors import FormatError, QuernelError

FIELDS = {
    "slug": "toy",
    "paper": "2401.00001",
    "claim": "It is twice as fast",
    "scale": "one layer",
    "data": "digits",
    "metric": "ms",
    "ours": 1.5,
    "baseline": 3.0,
    "baseline_name": "dense",
    "threshold": "baseline / ours >= 2",
    "verdict": "reproduced",
    "seeds": [0, 1],
    "seconds": 2.5,
    "date": "2025-01-31",
    "command": "python reproductions/toy.py --only speed",
}
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(str.strip)


def test_the_fields_are_those_that_scripts_rely_on(tmp_path):
    upsert_claim(FIELDS, tmp_path / "claims.toml")
    (table,) = tomllib.loads((tmp_path / "claims.toml").read_text())["claim"]
    assert list(table) == list(FIELDS)
    assert table == FIELDS


@given(claim=ANY_TEXT, data=ANY_TEXT, ours=st.floats(), seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_value_survives(claim, data, ours, seeds):
    written = Claim.from_fields({**FIELDS, "claim": claim, "data": data, "ours": ours, "seeds": seeds})
    (read,) = (Claim.from_fields(table) for table in tomllib.loads(to_toml([written]))["claim"])
    if math.isnan(ours):
        assert math.isnan(read.ours)
    else:
        assert read == written


def test_values_by_seed_are_optional_and_survive(tmp_path):
    ledger = tmp_path / "claims.toml"
    by_seed = {"ours_by_seed": [1, math.nan], "baseline_by_seed": [3.0, math.inf]}
    written = upsert_claim({**FIELDS, **by_seed}, ledger)
    upsert_claim({**FIELDS, "claim": "An older one"}, ledger)
    older, read = read_claims(ledger)
    assert (older.ours_by_seed, older.baseline_by_seed) == ((), ())
    assert read.ours_by_seed[0] == 1.0
    assert math.isnan(read.ours_by_seed[1])
    assert read.baseline_by_seed == (3.0, math.inf)
    assert written.to_json() == {**FIELDS, "ours_by_seed": [1.0, None], "baseline_by_seed": [3.0, None]}
    tables = tomllib.loads(ledger.read_text())["claim"]
    assert [set(table) - set(FIELDS) for table in tables] == [set(), set(by_seed)]


def test_upsert_replaces_by_slug_and_claim_and_sorts(tmp_path):
    ledger = tmp_path / "claims.toml"
    for slug, claim, ours in [("b", "x", 1), ("a", "y", 2), ("a", "x", 3), ("b", "x", 4)]:
        upsert_claim({**FIELDS, "slug": slug, "claim": claim, "ours": ours}, ledger)
    assert [(c.slug, c.claim, c.ours) for c in read_claims(ledger)] == [
        ("a", "x", 3.0),
        ("a", "y", 2.0),
        ("b", "x", 4.0),
    ]
    text = ledger.read_text()
    assert text.index('slug = "a"') < text.index('slug = "b"')
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == ["claims.toml"]


def test_writing_the_same_again_changes_no_byte(tmp_path):
    ledger = tmp_path / "claims.toml"
    upsert_claim(FIELDS, ledger)
    before = ledger.read_bytes()
    upsert_claim(read_claims(ledger)[0], ledger)
    assert ledger.read_bytes() == before


def test_claims_that_are_no_longer_made_go(tmp_path):
    ledger = tmp_path / "claims.toml"
    for slug, claim in [("a", "x"), ("a", "y"), ("b", "z")]:
        upsert_claim({**FIELDS, "slug": slug, "claim": claim}, ledger)
    keep_claims("a", frozenset({"x"}), ledger)
    assert [(c.slug, c.claim) for c in read_claims(ledger)] == [("a", "x"), ("b", "z")]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], ""),
        (["reproduced"] * 2, "reproduced"),
        (["not reproduced"], "not reproduced"),
        (["partly"], "partly"),
        (["reproduced", "not reproduced"], "partly"),
        (["reproduced", "partly"], "partly"),
    ],
)
def test_verdict_of(tmp_path, verdicts, expected):
    ledger = tmp_path / "claims.toml"
    upsert_claim({**FIELDS, "slug": "other", "verdict": "not reproduced"}, ledger)
    for number, verdict in enumerate(verdicts):
        upsert_claim({**FIELDS, "claim": f"claim {number}", "verdict": verdict}, ledger)
    assert verdict_of("toy", ledger) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slug": "Toy"}, "'slug' must be lower-case"),
        ({"claim": " "}, "'claim' must not be empty"),
        ({"claim": "\ud800"}, "lone surrogate"),
        ({"ours": "1"}, "'ours' must be a number; got '1'"),
        ({"ours": True}, "'ours' must be a number"),
        ({"verdict": "yes"}, "'verdict' must be one of reproduced, partly, not reproduced; got 'yes'"),
        ({"seeds": []}, "'seeds' must be non-negative integers"),
        ({"seeds": [-1]}, "'seeds' must be non-negative integers"),
        ({"seeds": "01"}, "'seeds' must be a list"),
        ({"ours_by_seed": [1.5, 1.5]}, "'ours_by_seed' and 'baseline_by_seed' must be given both"),
        ({"ours_by_seed": [1.5], "baseline_by_seed": [3, 3]}, "'ours_by_seed' must hold one number a seed, 2"),
        ({"ours_by_seed": [1.5, 1.5], "baseline_by_seed": [3, True]}, "'baseline_by_seed' must be a list of numbers"),
        ({"ours_by_seed": 1.5, "baseline_by_seed": [3, 3]}, "'ours_by_seed' must be a list of numbers"),
        ({"seconds": math.inf}, "'seconds' must be finite"),
        ({"date": "31.1.2025"}, "'date' must read YYYY-MM-DD"),
        ({"extra": 1}, r"unknown \['extra'\]"),
    ],
)
def test_bad_fields(tmp_path, change, message):
    with pytest.raises(QuernelError, match=message):
        upsert_claim({**FIELDS, **change}, tmp_path / "claims.toml")
    assert not (tmp_path / "claims.toml").exists()


def test_missing_field():
    with pytest.raises(QuernelError, match=r"missing \['ours'\]"):
        Claim.from_fields({k: v for k, v in FIELDS.items() if k != "ours"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text + text.partition("[[claim]]")[1] + text.partition("[[claim]]")[2],
        lambda text: text.replace('verdict = "reproduced"', 'verdict = "fine"'),
        lambda text: text.replace("ours = 1.5\n", ""),
        lambda text: text + "[other]\nx = 1\n",
        lambda text: "claim = 1\n",
        lambda text: "claim = [1]\n",
        lambda text: text.replace("ours = 1.5", "ours = 1.5\nnew = 2"),
    ],
    ids=["cut", "twice", "verdict", "missing", "table", "scalar", "list", "unknown"],
)
def test_a_damaged_ledger_is_named_and_left_alone(tmp_path, damage):
    ledger = tmp_path / "claims.toml"
    upsert_claim(FIELDS, ledger)
    damaged = damage(ledger.read_text())
    ledger.write_text(damaged)
    with pytest.raises(FormatError, match=r"claims\.toml"):
        read_claims(ledger)
    with pytest.raises(FormatError, match=r"claims\.toml"):
        upsert_claim({**FIELDS, "slug": "new"}, ledger)
    assert ledger.read_text() == damaged


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "claims.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not valid TOML"):
        read_claims(tmp_path / "claims.toml")


def test_no_file_holds_no_claims(tmp_path):
    assert read_claims(tmp_path / "absent.toml") == ()


def test_json_has_no_nan():
    assert Claim.from_fields({**FIELDS, "ours": math.nan}).to_json() == {**FIELDS, "ours": None}


def test_a_crash_while_writing_keeps_the_old_ledger(tmp_path, monkeypatch):
    ledger = tmp_path / "claims.toml"
    upsert_claim(FIELDS, ledger)
    before = ledger.read_bytes()

    def fail(*_):
        raise OSError("disk gone")

    monkeypatch.setattr(_claims.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        upsert_claim({**FIELDS, "slug": "new"}, ledger)
    assert ledger.read_bytes() == before
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == ["claims.toml"]


def write_many(ledger, writer):
    for number in range(5):
        upsert_claim({**FIELDS, "claim": f"claim {writer}-{number}", "ours": float(number)}, ledger)


def test_many_processes_lose_nothing(tmp_path):
    ledger = tmp_path / "claims.toml"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(ledger, writer)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert {claim.claim for claim in read_claims(ledger)} == {f"claim {w}-{n}" for w in range(4) for n in range(5)}


def test_the_ledger_of_a_checkout_is_at_its_root():
    assert (claims_path().parent / "pyproject.toml").is_file()
    assert claims_path().name == "claims.toml"


def test_an_installed_package_reads_its_own_ledger(tmp_path):
    # Inside somebody's project, whose pyproject.toml and claims.toml are not ours.
    package = tmp_path / "project" / "env" / "site-packages" / "quernel"
    package.mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    for name in ("__init__.py", "_claims.py", "_errors.py"):
        source = Path(_claims.__file__).with_name(name)
        (package / name).write_text("" if name == "__init__.py" else source.read_text(encoding="utf-8"))
    (package / "claims.toml").write_text(to_toml([Claim.from_fields(FIELDS)]))
    script = "from quernel import _claims; print(_claims.claims_path()); print(_claims.verdict_of('toy'))"
    output = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert output == [str(package / "claims.toml"), "reproduced"]
