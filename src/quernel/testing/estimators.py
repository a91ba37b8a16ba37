"""Conformance of estimators: scikit-learn's own checks, and what it does not ask for.

Precision is kept, the same seed gives the same numbers on any number of threads, nothing global is drawn from,
rows in shards give what rows at once give, and a saved estimator comes back bit for bit or not at all.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.utils.estimator_checks import estimator_checks_generator

from quernel._errors import FormatError
from quernel._load import load
from quernel._registry import example_of
from quernel._timing import threads
from quernel.testing._modules_shared import FORGED_FIELDS, damages
from quernel.testing._suite import ConformanceError, global_generators_untouched, require, run_all

ROWS, COLUMNS = 60, 6
METHODS = ("transform", "predict", "decision_function", "predict_proba")
# float64 sums taken in another order or in shards.
SAME = 1e-9
# float32 against float64: seven digits through a solve with a condition number of about a thousand.
SINGLE = 1e-2

Array = NDArray[Any]


def check_estimator(cls: type) -> None:
    """Run every check of the ``estimator`` contract.

    The registered ``example()`` returns ``{"make": () -> small unfitted estimator with a fixed random_state}``, and
    optionally ``"expected_failures": {name of a scikit-learn check: reason}``, ``"scale"``: what standard normal data
    is multiplied by, and ``"streaming": (columns) -> estimator`` whose ``partial_fit`` over shards equals ``fit``
    (default is ``make``).
    """
    run_all(cls, "estimator")


def check_scikit_learn(cls: type) -> None:
    """scikit-learn's checks pass, but for those listed with a reason; a listed one that passes must be unlisted."""
    example = example_of(cls)
    expected = dict(example.get("expected_failures", {}))
    broken = set()
    for estimator, check in estimator_checks_generator(example["make"]()):
        name = getattr(check, "func", check).__name__
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            failure = _failure(check, estimator)
        if failure is None:
            continue
        broken.add(name)
        if name not in expected:
            raise ConformanceError(f"{cls.__name__}: scikit-learn's {name} fails: {failure}") from failure
    idle = sorted(set(expected) - broken)
    require(not idle, cls, f"these expected failures do not fail: {', '.join(idle)}")


def check_precision(cls: type) -> None:
    """float32 in gives float32 out, float64 gives float64, and both about the same numbers."""
    results = {}
    for dtype in (np.float32, np.float64):
        x, y = _data(cls, dtype)
        results[dtype] = outputs(_made(cls).fit(x, y), x)
        for name, value in results[dtype].items():
            if name != "predict" or value.dtype.kind == "f":
                require(value.dtype == dtype, cls, f"{name} is {value.dtype} for an input of {np.dtype(dtype)}")
                require(bool(np.isfinite(value).all()), cls, f"{name} is not finite")
    for name, single in results[np.float32].items():
        if single.dtype.kind == "f":
            _require_close(cls, f"{name} in float32", single, results[np.float64][name], SINGLE)


def check_params(cls: type) -> None:
    """A clone has the same parameters, and neither fitting nor predicting changes one."""
    estimator = _made(cls)
    before = json.dumps(estimator.config()["params"], sort_keys=True)
    twin = clone(estimator)
    require(json.dumps(twin.config()["params"], sort_keys=True) == before, cls, "a clone has other parameters")
    x, y = _data(cls)
    outputs(twin.fit(x, y), x)
    require(json.dumps(twin.config()["params"], sort_keys=True) == before, cls, "fit changes a parameter")


def check_determinism(cls: type) -> None:
    """The same random_state gives the same bits, one thread nearly the same, and nothing global is drawn from."""
    x, y = _data(cls)
    with global_generators_untouched(cls, "fitting"):
        wanted = outputs(_made(cls).fit(x, y), x)
    for name, value in outputs(_made(cls).fit(x, y), x).items():
        require(np.array_equal(value, wanted[name]), cls, f"{name} differs in a second run")
    with threads(1):
        for name, value in outputs(_made(cls).fit(x, y), x).items():
            _require_close(cls, f"{name} on one thread", value, wanted[name], SAME)


def check_streaming(cls: type) -> None:
    """Where there is a ``partial_fit``, shards of rows give what ``fit`` gives; ``merge`` joins two halves."""
    example = example_of(cls)
    if not hasattr(cls, "partial_fit"):
        return
    x, y = _data(cls)
    make = (lambda: example["streaming"](COLUMNS)) if "streaming" in example else example["make"]
    wanted = outputs(make().fit(x, y), x)
    whole = _streamed(make(), x, y, (slice(0, 7), slice(7, 40), slice(40, None)))
    for name, value in outputs(whole, x).items():
        _require_close(cls, f"{name} after partial_fit over shards", value, wanted[name], SAME)
    if hasattr(cls, "merge"):
        halves = [_streamed(make(), x, y, (part,)) for part in (slice(0, 25), slice(25, None))]
        for name, value in outputs(halves[0].merge(halves[1]), x).items():
            _require_close(cls, f"{name} after merge", value, wanted[name], SAME)


def check_save_and_load(cls: type) -> None:
    """A saved estimator comes back bit for bit, fitted or not, and can be fitted on."""
    x, y = _data(cls)
    for estimator in (_made(cls), _made(cls).fit(x, y)):
        with tempfile.TemporaryDirectory() as folder:
            twin = load(estimator.save(folder))
        require(type(twin) is cls, cls, f"load returns a {type(twin).__name__}")
        require(twin.config() == estimator.config(), cls, "config() changes over save and load")
        if twin.config()["fitted"]:
            _require_same(cls, "after save and load", outputs(twin, x), outputs(estimator, x))
            if hasattr(cls, "partial_fit"):
                for one in (twin, estimator):
                    one.partial_fit(x, y)
                _require_same(cls, "after a loaded one went on", outputs(twin, x), outputs(estimator, x))
        _require_same(
            cls, "after fitting what was loaded", outputs(twin.fit(x, y), x), outputs(_made(cls).fit(x, y), x)
        )


def check_damaged_files(cls: type) -> None:
    """Truncated and altered files raise a ``FormatError`` or, where harmless, change nothing."""
    x, y = _data(cls)
    estimator = _made(cls).fit(x, y)
    wanted = outputs(estimator, x)
    with tempfile.TemporaryDirectory() as name:
        folder = estimator.save(name)
        for change in damages(folder, FORGED_FIELDS):
            try:
                twin = load(folder)
            except FormatError as error:
                require(str(folder) in str(error), cls, f"{change} is refused without naming the file: {error}")
                continue
            _require_same(cls, f"after {change}, which loads silently,", outputs(twin, x), wanted)


def outputs(estimator: Any, x: Array) -> dict[str, Array]:
    """Return what each method of a fitted estimator says about the rows ``x``."""
    return {name: np.asarray(getattr(estimator, name)(x)) for name in METHODS if hasattr(estimator, name)}


def _made(cls: type) -> Any:
    return example_of(cls)["make"]()


def _data(cls: type, dtype: Any = np.float64) -> tuple[Array, Array | None]:
    """Return rows, and targets or labels that depend on them, or None for what takes no targets."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((ROWS, COLUMNS))
    score = np.abs(x[:, 0]) + x[:, 1] + 0.1 * draw.standard_normal(ROWS)
    x = (x * example_of(cls).get("scale", 1.0)).astype(dtype)
    estimator = _made(cls)
    if is_classifier(estimator):
        return x, np.array(["low", "middle", "top"])[np.searchsorted(np.quantile(score, (0.3, 0.7)), score)]
    return x, score.astype(dtype) if is_regressor(estimator) else None


def _streamed(estimator: Any, x: Array, y: Array | None, parts: tuple[slice, ...]) -> Any:
    for i, part in enumerate(parts):
        labels = {"classes": np.unique(y)} if i == 0 and y is not None and is_classifier(estimator) else {}
        estimator.partial_fit(x[part], None if y is None else y[part], **labels)
    return estimator


def _failure(check: Any, estimator: Any) -> Exception | None:
    try:
        check(estimator)
    except Exception as error:  # scikit-learn's checks raise whatever the estimator raised
        return None if type(error).__name__ == "SkipTest" else error
    return None


def _require_same(cls: type, what: str, got: dict[str, Array], wanted: dict[str, Array]) -> None:
    for name, value in wanted.items():
        same = got[name].dtype == value.dtype and np.array_equal(got[name], value)
        require(same, cls, f"{name} {what} is not bit-equal")


def _require_close(cls: type, what: str, got: Array, wanted: Array, tolerance: float) -> None:
    if wanted.dtype.kind != "f":
        require(np.array_equal(got, wanted), cls, f"{what}: other labels")
        return
    require(got.shape == wanted.shape, cls, f"{what}: shape {got.shape} instead of {wanted.shape}")
    worst = float(np.abs(got - wanted).max(initial=0.0))
    require(
        worst <= tolerance * max(1.0, float(np.abs(wanted).max(initial=0.0))), cls, f"{what}: differs by {worst:.3g}"
    )


CHECKS = {
    "scikit_learn": check_scikit_learn,
    "precision": check_precision,
    "params": check_params,
    "determinism": check_determinism,
    "streaming": check_streaming,
    "save_and_load": check_save_and_load,
    "damaged_files": check_damaged_files,
}
