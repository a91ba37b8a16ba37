"""The ledger of claims: what each paper promises, what was measured here, and the verdict.

``claims.toml`` holds one ``[[claim]]`` table per (slug, claim), sorted, so that a diff shows what changed.
It stands at the root of a checkout and travels inside the wheel. Reproductions write it through
``upsert_claim`` (file lock, atomic replacement); docs, README and ``quernel list`` read it.
A damaged ledger raises ``FormatError`` and is never overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quernel._errors import FormatError, QuernelError

REPRODUCED, PARTLY, NOT_REPRODUCED = VERDICTS = ("reproduced", "partly", "not reproduced")

_HEADER = "# Every published claim that was measured: written by reproductions/, read by docs and `quernel list`.\n"
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_TEXTS = (
    "slug",
    "paper",
    "claim",
    "scale",
    "data",
    "metric",
    "baseline_name",
    "threshold",
    "verdict",
    "date",
    "command",
)
_NUMBERS = ("ours", "baseline", "seconds")
# Entries from before these were kept lack them.
_BY_SEED = ("ours_by_seed", "baseline_by_seed")
_LOCK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One measured claim; the fields are the keys of its table in ``claims.toml``.

    Parameters
    ----------
    slug : str
        The system, as registered; with ``claim`` the key of the ledger.
    paper : str
        arXiv number.
    claim : str
        What the paper says, in one sentence.
    scale, data : str
        At which size and on which data it was tried here.
    metric : str
        What ``ours`` and ``baseline`` count, with its unit.
    ours, baseline : float
        Measured in the same run, median over the seeds; NaN where the run diverged.
    baseline_name : str
        What stood on the other side.
    threshold : str
        The rule that gave the verdict, declared before the run.
    verdict : {"reproduced", "partly", "not reproduced"}
        What the rule said.
    seeds : tuple of int
        Seeds of the runs.
    ours_by_seed, baseline_by_seed : tuple of float
        The values behind the medians, one a seed, in the order of ``seeds``.  Both or neither: empty, and left out of
        the file, where they were not kept.
    seconds : float
        Wall time of the measurement.
    date : str
        Day of the measurement, ``YYYY-MM-DD``.
    command : str
        What to type to see it again.
    """

    slug: str
    paper: str
    claim: str
    scale: str
    data: str
    metric: str
    ours: float
    baseline: float
    baseline_name: str
    threshold: str
    verdict: str
    seeds: tuple[int, ...]
    ours_by_seed: tuple[float, ...] = ()
    baseline_by_seed: tuple[float, ...] = ()
    seconds: float
    date: str
    command: str

    def __post_init__(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str):
                raise QuernelError(f"claim field {name!r} must be text; got {value!r}")
            if not value.strip() and name not in ("paper", "baseline_name"):
                raise QuernelError(f"claim field {name!r} must not be empty")
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise QuernelError(f"claim field {name!r} holds a lone surrogate, which is not text; got {value!r}")
        for name in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise QuernelError(f"claim field {name!r} must be a number; got {value!r}")
            object.__setattr__(self, name, float(value))
        if not _SLUG.fullmatch(self.slug):
            raise QuernelError(f"claim field 'slug' must be lower-case words joined by hyphens; got {self.slug!r}")
        if self.verdict not in VERDICTS:
            raise QuernelError(f"claim field 'verdict' must be one of {', '.join(VERDICTS)}; got {self.verdict!r}")
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise QuernelError(f"claim field 'seconds' must be finite and not negative; got {self.seconds!r}")
        if isinstance(self.seeds, str) or not isinstance(self.seeds, tuple | list):
            raise QuernelError(f"claim field 'seeds' must be a list of integers; got {self.seeds!r}")
        if not self.seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in self.seeds):
            raise QuernelError(f"claim field 'seeds' must be non-negative integers, at least one; got {self.seeds!r}")
        object.__setattr__(self, "seeds", tuple(self.seeds))
        for name in _BY_SEED:
            self._check_by_seed(name)
        if bool(self.ours_by_seed) != bool(self.baseline_by_seed):
            raise QuernelError(f"claim fields {' and '.join(map(repr, _BY_SEED))} must be given both or left out both")
        try:
            datetime.date.fromisoformat(self.date)
        except ValueError as error:
            raise QuernelError(f"claim field 'date' must read YYYY-MM-DD; got {self.date!r}") from error

    def _check_by_seed(self, name: str) -> None:
        values = getattr(self, name)
        if not isinstance(values, tuple | list) or any(
            isinstance(v, bool) or not isinstance(v, int | float) for v in values
        ):
            raise QuernelError(f"claim field {name!r} must be a list of numbers; got {values!r}")
        if values and len(values) != len(self.seeds):
            raise QuernelError(f"claim field {name!r} must hold one number a seed, {len(self.seeds)}; got {values!r}")
        object.__setattr__(self, name, tuple(map(float, values)))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Claim:
        """Build a claim from exactly the fields of the ledger; the values by seed may be left out."""
        missing, unknown = FIELDS - set(_BY_SEED) - fields.keys(), fields.keys() - FIELDS
        if missing or unknown:
            wrong = [f"missing {sorted(missing)}"] * bool(missing) + [f"unknown {sorted(unknown)}"] * bool(unknown)
            raise QuernelError(f"a claim has exactly the fields of the ledger; {' and '.join(wrong)}")
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the table as JSON values; what JSON cannot say (NaN, infinity) becomes None."""
        return {name: _json(value) for name, value in self._written().items()}

    def _written(self) -> dict[str, Any]:
        """Return the fields that its table in the ledger has."""
        fields = {field.name: getattr(self, field.name) for field in _ORDER}
        return {name: value for name, value in fields.items() if value or name not in _BY_SEED}


_ORDER = dataclasses.fields(Claim)
FIELDS = frozenset(field.name for field in _ORDER)


def claims_path() -> Path:
    """Return where the ledger is: the root of a checkout, else inside the installed package."""
    package = Path(__file__).resolve().parent
    for folder in package.parents:
        if folder.name in ("site-packages", "dist-packages"):
            break
        if (folder / "pyproject.toml").is_file():
            return folder / "claims.toml"
    return package / "claims.toml"


def read_claims(path: str | os.PathLike[str] | None = None) -> tuple[Claim, ...]:
    """Return every claim of the ledger, sorted by slug and claim.

    Parameters
    ----------
    path : path, optional
        Another ledger than the project's own. A file that does not exist holds no claims.

    Raises
    ------
    FormatError
        If the file is not TOML, or a table is not a claim; names the file and the field.
    """
    file = claims_path() if path is None else Path(path)
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        document = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FormatError(f"{file}: not valid TOML ({error}); restore it from version control") from error
    tables = document.pop("claim", [])
    if document or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise FormatError(f"{file}: holds something else than [[claim]] tables; restore it from version control")
    claims = [_parsed(table, number, file) for number, table in enumerate(tables, start=1)]
    keys = [_key(claim) for claim in claims]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise FormatError(f"{file}: field 'claim': {twice[0]!r} has the claim {twice[1]!r} twice")
    return tuple(sorted(claims, key=_key))


def verdict_of(slug: str, path: str | os.PathLike[str] | None = None) -> str:
    """Sum the verdicts of a system up: all alike give that verdict, a mixture ``"partly"``, no claims ``""``."""
    verdicts = {claim.verdict for claim in read_claims(path) if claim.slug == slug}
    if len(verdicts) <= 1:
        return next(iter(verdicts), "")
    return PARTLY


def upsert_claim(fields: Mapping[str, Any] | Claim, path: str | os.PathLike[str] | None = None) -> Claim:
    """Write one claim into the ledger, in place of the one with the same slug and claim.

    Parameters
    ----------
    fields : mapping or Claim
        Exactly the fields of ``Claim``.
    path : path, optional
        Another ledger than the project's own; created if absent.

    Returns
    -------
    claim : Claim
        What was written.

    Raises
    ------
    QuernelError
        If a field is missing, unknown or of the wrong kind.
    FormatError
        If the ledger on disk is damaged; it is left as it is.
    """
    claim = fields if isinstance(fields, Claim) else Claim.from_fields(fields)
    _rewrite(path, lambda claims: [*(c for c in claims if _key(c) != _key(claim)), claim])
    return claim


def keep_claims(slug: str, claims: frozenset[str], path: str | os.PathLike[str] | None = None) -> None:
    """Drop a system's claims that its reproduction no longer makes; ``claims`` are the texts that stay."""
    _rewrite(path, lambda all_claims: [c for c in all_claims if c.slug != slug or c.claim in claims])


def to_toml(claims: tuple[Claim, ...] | list[Claim]) -> str:
    """Return the text of a ledger."""
    tables = [
        "\n".join(["[[claim]]", *(f"{name} = {_value(value)}" for name, value in claim._written().items())])
        for claim in sorted(claims, key=_key)
    ]
    return "\n\n".join([_HEADER.rstrip("\n"), *tables]) + "\n"


def _key(claim: Claim) -> tuple[str, str]:
    return claim.slug, claim.claim


def _parsed(table: dict[str, Any], number: int, file: Path) -> Claim:
    try:
        return Claim.from_fields(table)
    except QuernelError as error:
        raise FormatError(f"{file}: [[claim]] number {number}: {error}") from error


def _rewrite(path: str | os.PathLike[str] | None, change: Callable[[tuple[Claim, ...]], list[Claim]]) -> None:
    file = claims_path() if path is None else Path(path)
    with _locked(file):
        text = to_toml(change(read_claims(file)))
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes private files; the ledger keeps the rights it had, or gets a reader's.
            os.chmod(name, file.stat().st_mode & 0o777 if file.exists() else 0o644)
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(file.with_name(f".{file.name}.lock"), timeout=_LOCK_SECONDS)
    try:
        with lock:
            yield
    except filelock.Timeout as error:
        raise QuernelError(
            f"{file}: another process has held the lock for {_LOCK_SECONDS:.0f} s; end it, or remove {lock.lock_file}"
        ) from error


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _value(value: str | float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(repr, value))}]"
    if isinstance(value, float):
        return repr(value)  # the shortest text that reads back to the same bits; nan and inf are TOML too
    return f'"{"".join(map(_escaped, value))}"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    short = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
    if character in short:
        return short[character]
    if character < " " or character == "\x7f":
        return f"\\u{ord(character):04x}"
    return character
