"""The estimator suite finds what it is there to find: each broken class fails the check that is meant for it."""

from typing import Any

import numpy as np
import pytest

from quernel._errors import FormatError
from quernel.kernels import ArcCosineFeatures, BundledRegressor
from quernel.testing import ConformanceError, check_estimator, checks_for


def registered(cls: type, **example: Any) -> type:
    """Give a class what the suite asks for."""
    example = {"make": lambda: cls(16, random_state=0), **example}
    cls._quernel_example = staticmethod(lambda: example)  # type: ignore[attr-defined]
    return cls


class Widened(ArcCosineFeatures):
    def transform(self, X):
        return super().transform(X).astype(np.float64)


class Unseeded(ArcCosineFeatures):
    def _finish(self, x):
        self.directions_ = self.directions_ + np.random.default_rng().standard_normal() * 1e-3


class Global(ArcCosineFeatures):
    def _finish(self, x):
        np.random.random()  # noqa: NPY002


class Forgetful(BundledRegressor):
    def partial_fit(self, X, y):
        return self.fit(X, y)


class Restless(ArcCosineFeatures):
    def fit(self, X, y=None):
        self.threshold = 0.5
        return super().fit(X)


class Careless(ArcCosineFeatures):
    @classmethod
    def from_folder(cls, content, tensors):
        """Answer something whatever the file says."""
        try:
            return super().from_folder(content, tensors)
        except Exception:
            return cls(16, random_state=1).fit(np.zeros((2, 6)))


class Fine(ArcCosineFeatures):
    pass


@pytest.mark.parametrize(
    ("cls", "check", "message"),
    [
        (Widened, "precision", "transform is float64 for an input of float32"),
        (Unseeded, "determinism", "transform differs in a second run"),
        (Global, "determinism", "fitting draws from a global random generator"),
        (Forgetful, "streaming", "predict after partial_fit over shards: differs"),
        (Restless, "params", "fit changes a parameter"),
        (Restless, "scikit_learn", "fails:"),
    ],
)
def test_broken_estimators_are_found(cls: type, check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        checks_for("estimator")[check](registered(cls))


def test_lying_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(name: object, *, file: str, field: str) -> type:
        if name != "Careless":
            raise FormatError(f"{file}: field {field!r} names {name!r}")
        return Careless

    monkeypatch.setattr("quernel._load.resolve_class", resolve)
    with pytest.raises(ConformanceError, match="loads silently, is not bit-equal"):
        checks_for("estimator")["damaged_files"](registered(Careless))


def test_an_expected_failure_that_passes_is_found() -> None:
    with pytest.raises(ConformanceError, match="these expected failures do not fail: check_fit1d"):
        checks_for("estimator")["scikit_learn"](registered(Fine, expected_failures={"check_fit1d": "no reason"}))


def test_the_public_name_runs_all() -> None:
    check_estimator(ArcCosineFeatures)
