"""Projections: the same bits for a row alone, in any batch, on any threads and paths; equal to one FMA at a time."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from quernel._intrinsics import target_features
from quernel._timing import threads
from quernel.hashing._directions import Projections
from quernel.hashing._projection_kernels import PANEL, as_panels, project_row, project_rows
from tests.reference import projections as oracle

fused = pytest.mark.skipif("fma" not in target_features(), reason="without FMA products are rounded by themselves")


def rows_of(n, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)


@fused
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize(("dim", "m"), [(1, 1), (7, 63), (33, 64), (20, 65), (3, 200)])
def test_equals_fused_steps_in_order(n, dim, m):
    x, directions = rows_of(n, dim), rows_of(m, dim, 1)
    panels = as_panels(directions)
    out = np.full((n, len(panels) * PANEL), np.nan, np.float32)
    project_rows(x, panels, out, 0, n)
    np.testing.assert_array_equal(out[:, :m], oracle.project(x, directions))
    assert (out[:, m:] == 0).all()  # what fills up the last panel


def test_a_row_has_its_bits_in_any_company():
    x = rows_of(300, 30)
    projections = Projections(30, 130, "gaussian", 0)
    wanted = projections.project(x)
    for i in (0, 1, 2, 3, 150, 299):
        np.testing.assert_array_equal(projections.project(x[i : i + 1])[0], wanted[i])
        alone = np.empty(projections.width, np.float32)
        project_row(x[i], projections.panels, alone)
        np.testing.assert_array_equal(alone[:130], wanted[i])
    for size in (2, 3, 7, 64):
        parts = [projections.project(x[i : i + size]) for i in range(0, 300, size)]
        np.testing.assert_array_equal(np.concatenate(parts), wanted)
    for n in (1, 2):
        with threads(n):
            np.testing.assert_array_equal(projections.project(x), wanted)


def test_neighbouring_memory_is_not_touched():
    x, panels = rows_of(5, 6), as_panels(rows_of(10, 6, 1))
    out = np.full((7, PANEL), 7, np.float32)
    project_rows(x, panels, out[1:4], 1, 4)
    assert (out[[0, 4, 5, 6]] == 7).all() and not (out[1:4] == 7).all(1).any()


SCRIPT = """
import hashlib, sys
import numpy as np
from quernel._intrinsics import portable
from quernel.hashing import PStable, SignProjection, WinnerTakeAll
from quernel.hashing._directions import Projections
x = np.random.default_rng(5).standard_normal((101, 37)).astype(np.float32)
digest = hashlib.sha256()
for kind in ("gaussian", "cauchy", "rademacher", "sparse"):
    digest.update(np.ascontiguousarray(Projections(37, 70, kind, 1).project(x)))
for family in (SignProjection(37, 5, 9), PStable(37, 5, 3, width=2.0), WinnerTakeAll(37, 5, 2)):
    digest.update(family.codes(x))
sys.stdout.write(f"{portable()} {digest.hexdigest()}")
"""


@fused
@pytest.mark.slow
def test_the_portable_path_gives_the_same_bits():
    # Both forms of the fused step are llvm.fma where the processor has it.
    def run(value):
        environment = os.environ | {"QUERNEL_PORTABLE": value, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    path, digest = run("1")
    assert path == "True" and len(digest) == 2 * hashlib.sha256().digest_size
    assert run("0")[1] == digest
