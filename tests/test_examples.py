"""Every script in ``examples`` runs on data that comes with scikit-learn, and ends in a picture of something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=[script.stem for script in EXAMPLES])
def test_an_example_ends_in_a_picture(script, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-W", "error::DeprecationWarning", str(script), "--output", str(picture)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    pixels = image.imread(picture)
    assert min(pixels.shape[:2]) >= 200
    # Axes alone are two colours; curves, points and names are more.
    assert len({tuple(row) for row in pixels.reshape(-1, pixels.shape[2]).round(2).tolist()}) > 20
