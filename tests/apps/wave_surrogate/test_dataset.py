"""The data set of waves: repeatable, one trajectory at a time, split between trajectories, physical."""

import pytest
import torch

from quernel._errors import QuernelError
from quernel.apps.wave_surrogate import WaveSolver, wave_data
from quernel.apps.wave_surrogate.dataset import BACKGROUND, FASTEST, SLOWEST

SMALL = {"size": 20, "frames": 8}
# Fields are kept in float32.
ROUNDING = 1e-5


def test_a_trajectory_depends_on_the_seed_and_its_number_alone():
    few, more = wave_data(3, **SMALL), wave_data(5, **SMALL)
    assert torch.equal(few.frames, more.frames[:3])
    assert torch.equal(few.speed, more.speed[:3])
    assert not torch.equal(wave_data(3, **SMALL, seed=1).frames, few.frames)
    assert few.frames.shape == (3, 8, 20, 20)
    assert few.frames.dtype == torch.float32


def test_frames_are_the_solvers():
    data = wave_data(4, **SMALL, every=3)
    solver = WaveSolver(data.speed, dt=data.dt / 3)
    again = solver.solve(data.frames[:, 0], frames=8, every=3)
    assert float((again - data.frames).abs().max()) < ROUNDING


def test_media_are_piecewise_constant_and_share_their_time_step():
    data = wave_data(40, size=24, frames=2)
    assert data.dt == pytest.approx(4 * 0.5 / 25 / FASTEST)
    plain = (data.speed == BACKGROUND).flatten(1).all(1)
    assert 8 <= int(plain.sum()) <= 32  # half of them; P < 1e-4 outside
    for speed in data.speed:
        levels = speed.unique()
        assert len(levels) <= 3
        assert float(levels.min()) >= SLOWEST
        assert float(levels.max()) <= FASTEST
    assert bool((wave_data(5, **SMALL, inclusions=False).speed == BACKGROUND).all())


def test_fields_start_at_rest_with_bumps_of_order_one():
    data = wave_data(20, size=24, frames=3)
    top = data.frames[:, 0].abs().amax((1, 2))
    assert 0.3 < float(top.min()) < float(top.max()) < 3.1
    assert float(data.frames.mean().abs()) < 0.1


def test_parts_are_of_trajectories():
    data = wave_data(6, **SMALL)
    train, validation, test = data.split(3, 1)
    assert (len(train), len(validation), len(test)) == (3, 1, 2)
    assert torch.equal(test.frames, data.frames[4:])
    assert torch.equal(test.speed, data.speed[4:])
    with pytest.raises(QuernelError, match="leave nothing of 6 trajectories"):
        data.split(5, 1)
    with pytest.raises(QuernelError, match="n must be an integer"):
        wave_data(0)
