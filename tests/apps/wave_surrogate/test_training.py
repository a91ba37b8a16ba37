"""Training and judging surrogates: it learns, repeats, touches no global generator; errors are what they say."""

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.apps.wave_surrogate import WaveSurrogate, one_step_error, rollout_errors, train_surrogate, wave_data
from quernel.compress import FactorizeConv, compress


@pytest.fixture(scope="module")
def data():
    return wave_data(10, size=16, frames=16)


def small(kind="dense"):
    torch.manual_seed(0)
    model = WaveSurrogate(channels=8, layers=3)
    return model if kind == "dense" else compress(model, FactorizeConv(rank=2, mode="init")).model


class Still(nn.Module):
    """Predicts that nothing moves."""

    history = 4

    def forward(self, frames, speed):
        return frames[:, -1]


@pytest.mark.parametrize("kind", ["dense", "factorised"])
def test_learns_to_be_better_than_no_motion(data, kind):
    train, _, test = data.split(7, 0)
    model = train_surrogate(small(kind), train, windows=600, lr=5e-3)
    assert not model.training
    assert one_step_error(model, test) < 0.6 * one_step_error(Still(), test)
    assert float(model.field_std) == pytest.approx(float(train.frames.std()))


def test_repeats_and_leaves_the_global_generator_alone(data):
    before = None
    states = []
    for _ in range(2):
        model = small()
        before = torch.get_rng_state()
        train_surrogate(model, data, windows=16, seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    other = train_surrogate(small(), data, windows=16, seed=4).state_dict()
    assert any(not torch.equal(a, other[key]) for key, a in states[0].items())


def test_every_window_is_seen_before_any_comes_again(data):
    seen = []

    class Watching(WaveSurrogate):
        def forward(self, frames, speed):
            seen.extend(frames[:, 0].flatten(1).sum(1).tolist())
            return super().forward(frames, speed)

    windows = 10 * (16 - 4)
    train_surrogate(Watching(channels=2, layers=2), data, windows=windows, batch_size=8)
    assert len(seen) == windows == len(set(seen))


def test_errors_are_relative_norms(data):
    errors = rollout_errors(Still(), data, steps=3, every=5)
    wrong = size = torch.zeros(3, dtype=torch.float64)
    for first in (0, 5):
        true, last = data.frames[:, first + 4 : first + 7].double(), data.frames[:, first + 3 : first + 4].double()
        wrong = wrong + (last - true).square().sum((0, 2, 3))
        size = size + true.square().sum((0, 2, 3))
    assert errors == pytest.approx((wrong / size).sqrt().tolist())
    assert errors[0] < errors[1] < errors[2]
    assert one_step_error(Still(), data, every=5) == pytest.approx(rollout_errors(Still(), data, steps=1, every=5)[0])


def test_progress_is_told(data):
    told = []
    train_surrogate(small(), data, windows=20, batch_size=8, progress=lambda step, loss: told.append((step, loss)))
    assert [step for step, _ in told] == [0, 1, 2]
    assert all(loss > 0 for _, loss in told)


def test_bad_input_is_named(data):
    with pytest.raises(QuernelError, match="more than 4 frames; got 3"):
        train_surrogate(small(), wave_data(1, size=8, frames=3), windows=1)
    with pytest.raises(QuernelError, match="windows must be"):
        train_surrogate(small(), data, windows=0)
    with pytest.raises(QuernelError, match="trajectories must have 24 frames for 20 steps; got 16"):
        rollout_errors(small(), data, steps=20)
    broken = small()
    with torch.no_grad():
        broken.convs[0].weight.fill_(torch.nan)
    with pytest.raises(QuernelError, match="diverged at step 0"):
        train_surrogate(broken, data, windows=8)
