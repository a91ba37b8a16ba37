"""Saving of estimators: every kind of state, and files that lie about it."""

import json
from typing import ClassVar

import numpy as np
import pytest
from sklearn.base import BaseEstimator

import quernel
from quernel import _estimators, _load
from quernel._errors import FormatError, QuernelError
from quernel._estimators import SavedEstimator
from quernel._io import CONFIG, digest_of


class Inner(SavedEstimator, BaseEstimator):
    _state: ClassVar = {"values_": "m"}

    def __init__(self, size=2):
        self.size = size

    def check_params(self):
        if type(self.size) is not int:
            raise QuernelError(f"size must be an integer; got {self.size!r}")

    def fit(self, n):
        self.n_features_in_, self.values_ = 1, np.arange(n, dtype=np.float32)
        return self


class Outer(SavedEstimator, BaseEstimator):
    _state: ClassVar = {
        "grid_": "m d",
        "names_": "labels m",
        "inner_": "estimator",
        "count_": "int",
        "rate_": "float",
        "flag_": "flag",
        "word_": "text",
        "extra_": "m ?",
    }

    def __init__(self, shift=None, seed=None):
        self.shift = shift
        self.seed = seed

    def fit(self):
        self.n_features_in_ = 3
        self.grid_ = np.arange(6.0).reshape(2, 3)
        self.names_ = np.array(["a", "bc"], dtype=object)
        self.inner_ = Inner(5).fit(4)
        self.count_, self.rate_, self.flag_, self.word_ = np.int64(7), 0.5, True, "x"
        return self


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    def resolve(name, *, file, field):
        try:
            return {"Inner": Inner, "Outer": Outer, "Plain": BaseEstimator}[name]
        except (KeyError, TypeError):
            raise FormatError(f"{file}: field {field!r} names {name!r}") from None

    monkeypatch.setattr(_estimators, "resolve_class", resolve)
    monkeypatch.setattr(_load, "resolve_class", resolve)


def forge(folder, change):
    file = folder / CONFIG
    document = json.loads(file.read_text())
    subtree = document["quernel"]
    change(subtree["content"])
    subtree["digest"] = digest_of({k: v for k, v in subtree.items() if k != "digest"})
    file.write_text(json.dumps(document))


def test_every_kind_of_state_comes_back(tmp_path):
    twin = quernel.load(Outer(shift=np.array([1.5, 2.5]), seed=3).fit().save(tmp_path))
    assert type(twin) is Outer
    np.testing.assert_array_equal(twin.shift, [1.5, 2.5])
    np.testing.assert_array_equal(twin.grid_, np.arange(6.0).reshape(2, 3))
    assert twin.names_.tolist() == ["a", "bc"] and twin.names_.dtype == object
    assert (twin.seed, twin.count_, twin.rate_, twin.flag_, twin.word_) == (3, 7, 0.5, True, "x")
    assert twin.inner_.size == 5 and twin.inner_.values_.dtype == np.float32
    assert not hasattr(twin, "extra_")


def test_an_unfitted_one_stays_unfitted(tmp_path):
    twin = quernel.load(Outer(seed=1).save(tmp_path))
    assert (twin.seed, vars(twin)) == (1, {"shift": None, "seed": 1})


def test_what_json_cannot_hold_is_refused_by_name(tmp_path):
    for value in (np.random.default_rng(0), [1, 2], object(), np.array([object()])):
        with pytest.raises(QuernelError, match=r"params\.seed is a \w+, which a file cannot hold"):
            Outer(seed=value).save(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["config"]["fitted"].pop("grid_"), "grid_ must be an array of 2 axes; got NoneType|unexpected"),
        (lambda c: c["config"]["fitted"].update(n_features_in_=4), "n_features_in_ must be the integer 3; got 4"),
        (lambda c: c["config"]["fitted"].update(count_=True), "count_ must be int; got True"),
        (lambda c: c["config"]["fitted"].update(rate_="fast"), "rate_ must be float; got 'fast'"),
        (lambda c: c["config"]["fitted"].update(flag_=1), "flag_ must be flag; got 1"),
        (lambda c: c["config"]["fitted"].update(other_=1), "has no fitted other_"),
        (lambda c: c["config"]["fitted"].update(count_=[1]), "a number, a string or an object was expected"),
        (lambda c: c["config"]["fitted"].update(count_={"x": 1}), "is not understood"),
        (lambda c: c["config"]["fitted"].update(extra_={"array": "fitted.grid_"}), "used twice|unexpected|axes"),
        (lambda c: c["config"]["fitted"]["names_"].update(strings=["a"]), "another array has 2|has 2 for 'm'"),
        (lambda c: c["config"]["fitted"]["names_"].update(strings=[1, 2]), "strings must be a list of strings"),
        (lambda c: c["config"]["fitted"]["inner_"]["config"]["params"].update(size="x"), "size must be an integer"),
        (lambda c: c["config"]["fitted"]["inner_"].update({"class": "Plain"}), "BaseEstimator is not an estimator"),
        (lambda c: c["config"]["fitted"]["inner_"].update({"class": "os"}), "names 'os'"),
        (lambda c: c["config"]["params"].update(more=1), "params of Outer must be"),
        (lambda c: c["config"].pop("params"), "KeyError"),
        (lambda c: c.update(version=2), "version of Outer is 2"),
        (lambda c: c.update(version=True), "version of Outer is True"),
    ],
)
def test_files_that_lie_are_refused_with_their_name(tmp_path, change, message):
    Outer(shift=np.ones(2)).fit().save(tmp_path)
    forge(tmp_path, change)
    with pytest.raises(FormatError, match=message) as caught:
        quernel.load(tmp_path)
    assert str(tmp_path / CONFIG) in str(caught.value)


def test_leftover_arrays_are_refused(tmp_path):
    Outer(shift=np.ones(2)).fit().save(tmp_path)
    forge(tmp_path, lambda c: c["config"]["params"].update(shift=None))
    with pytest.raises(FormatError, match=r"params\.shift: unexpected arrays"):
        quernel.load(tmp_path)
