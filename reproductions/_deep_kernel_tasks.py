"""Rows, arms and peers of ``deep-kernel-machines.py``; what an arm answers is kept in the cache folder.

A file is named after all that decides its content: task, seed, settings, and the source of the method.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import quernel.kernels
from quernel import data
from quernel.data import cache_folder
from quernel.kernels import DeepKernelClassifier, DeepKernelRegressor
from quernel.kernels._deep_kernel_training import chosen_inducing

GPYTORCH = "gpytorch==1.15.2"
ROOT = Path(__file__).resolve().parents[1]
PARITY_COLUMNS, PARITY_OF = 20, 3
FASHION_ROWS, FASHION_COLUMNS = 10_000, 64
# The last of the ten published splits is for choices.
TUNING_SPLIT, TABLE_ROWS = 9, 10_000
SVC_GRID = {"svc__C": (1.0, 10.0, 100.0), "svc__gamma": (0.2, 0.5, 1.0, 2.0)}

Answers = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """Rows to train on and to judge on; targets are numbers, or class numbers."""

    name: str
    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@functools.cache
def parity(rows: int, seed: int) -> Task:
    """Return signs whose class is the product of three of them; 1,000 test rows."""
    draw = np.random.default_rng(seed)
    x = draw.choice([-1.0, 1.0], (rows + 1000, PARITY_COLUMNS))
    y = (x[:, :PARITY_OF].prod(1) > 0).astype(np.int64)
    return Task(f"parity-{rows}-{seed}", x[:rows], y[:rows], x[rows:], y[rows:])


@functools.cache
def fashion(seed: int) -> Task:
    """Return 10,000 random training and all test images as 64 principal components of the former."""
    train, test = (data.load("fashion-mnist", split=split) for split in ("train", "test"))
    chosen = np.random.default_rng(seed).permutation(len(train.x))[:FASHION_ROWS]
    flat = [x.reshape(len(x), -1).astype(np.float64) / 255 for x in (train.x[chosen], test.x)]
    found = PCA(FASHION_COLUMNS, random_state=0).fit(flat[0])
    return Task(
        f"fashion-{seed}",
        found.transform(flat[0]),
        train.y[chosen].astype(np.int64),
        found.transform(flat[1]),
        test.y.astype(np.int64),
    )


@functools.cache
def table(name: str, split: int) -> Task:
    """Return one published split of a UCI table, at most 10,000 rows of it; columns and targets standardised."""
    held = data.load(f"uci-{name}")
    chosen = np.random.default_rng(0).permutation(len(held.x))[:TABLE_ROWS]
    x, y, tested = held.x[chosen], held.y[chosen], held.test_rows[chosen, split]
    scaler, target = StandardScaler().fit(x[~tested]), StandardScaler().fit(y[~tested, None])
    x, y = scaler.transform(x), target.transform(y[:, None])[:, 0]
    return Task(f"{name}-{split}", x[~tested], y[~tested], x[tested], y[tested])


def machine(task: Task, **settings: Any) -> Answers:
    """Return what a deep kernel machine answers at the test rows, and its alignments."""

    def fitted() -> Answers:
        if task.y.dtype.kind == "i":
            model: Any = DeepKernelClassifier(**settings).fit(task.x, task.y)
            return {"probabilities": model.predict_proba(task.test_x), "alignment": model.alignment_}
        model = DeepKernelRegressor(**settings).fit(task.x, task.y)
        mean, std = model.predict(task.test_x, return_std=True)
        far = model.predict(10 * task.test_x, return_std=True)[1]
        return {"mean": mean, "std": std, "far": far, "alignment": model.alignment_}

    return kept("machine", task, settings, fitted)


def sparse_gp(task: Task, **settings: Any) -> Answers:
    """Return what gpytorch's sparse variational Gaussian process answers, from the inducing inputs that ours has."""
    seed = settings["random_state"]

    def fitted() -> Answers:
        if str(ROOT) not in sys.path:
            sys.path.append(str(ROOT))
        from benchmarks._peers import PeerUnavailable, peer_python
        from benchmarks._process import in_fresh_process
        from quernel._errors import DataError

        try:
            python = peer_python(GPYTORCH)
        except PeerUnavailable as error:
            raise DataError(f"the peer gpytorch is missing: {error}") from error
        draw = np.random.default_rng(seed)
        inducing = chosen_inducing(torch.from_numpy(task.x), settings["n_inducing"], draw).numpy()
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "task.npz")
            np.savez(file, x=task.x, y=task.y, test_x=task.test_x, inducing=inducing)
            function = "classify" if task.y.dtype.kind == "i" else "regress"
            here = Path(__file__).with_name("_deep_kernel_gpytorch.py")
            in_fresh_process(here, function, file, settings, seed, threads=torch.get_num_threads(), python=python)
            return dict(np.load(f"{file}.out.npz"))

    return kept("svgp", task, settings, fitted)


def support_vectors(task: Task, folds: int = 3, grid: dict[str, Any] | None = None) -> float:
    """Return the test accuracy of an RBF SVC whose C and gamma (times 1 / columns) cross-validation chose."""
    grid = SVC_GRID if grid is None else grid
    relative = {**grid, "svc__gamma": [g / task.x.shape[1] / task.x.var() for g in grid["svc__gamma"]]}

    def fitted() -> Answers:
        search = GridSearchCV(make_pipeline(SVC()), relative, cv=folds).fit(task.x, task.y)
        return {"score": np.array(search.score(task.test_x, task.test_y))}

    return float(kept("svc", task, {"folds": folds, **{k: list(v) for k, v in grid.items()}}, fitted)["score"])


def kept(kind: str, task: Task, settings: dict[str, Any], make: Callable[[], Answers]) -> Answers:
    """Return what ``make`` returned for the same task, settings and source."""
    folder = Path(quernel.kernels.__file__).parent
    sources = [*sorted(folder.glob("*deep_kernel*.py")), folder / "grams.py", folder / "linalg.py"]
    mine = (
        []
        if kind == "svc"
        else sources
        if kind == "machine"
        else [Path(__file__).with_name("_deep_kernel_gpytorch.py")]
    )
    digest = hashlib.sha256(json.dumps([kind, task.name, settings], sort_keys=True, default=str).encode())
    for part in (task.x, task.y, task.test_x):
        digest.update(np.ascontiguousarray(part).tobytes())
    for file in mine:
        digest.update(file.read_bytes())
    file = cache_folder() / "reproductions" / f"deep-kernel-{kind}-{task.name}-{digest.hexdigest()[:12]}.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.tmp.npz")
        np.savez(scratch, **make())
        scratch.replace(file)
    with np.load(file) as held:
        return dict(held)


def log_density(task: Task, answers: Answers) -> float:
    """Return the mean log-density of test targets, standardised ones, or the log-probability of test classes."""
    if "probabilities" in answers:
        return float(np.log(answers["probabilities"][np.arange(len(task.test_y)), task.test_y]).mean())
    error = (task.test_y - answers["mean"]) / answers["std"]
    return float((-0.5 * (np.log(2 * np.pi) + error**2) - np.log(answers["std"])).mean())


def accuracy(task: Task, answers: Answers) -> float:
    """Return the share of right classes, in percent."""
    return 100 * float((answers["probabilities"].argmax(1) == task.test_y).mean())
