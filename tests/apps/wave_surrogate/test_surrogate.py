"""The surrogate network: shapes, rollouts, saving, compression of it."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import quernel
from quernel import models
from quernel._errors import QuernelError
from quernel.apps.wave_surrogate import WaveSurrogate, rollout
from quernel.compress import FactorizeConv, compress
from quernel.nn import FactorizedConv2d


class Shift(nn.Module):
    """Predicts the mean of the last two frames plus one."""

    def forward(self, frames, speed):
        return frames[:, -2:].mean(1) + speed


def test_rollout_feeds_predictions_back():
    frames = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)], dim=1)
    made = rollout(Shift(), frames, torch.ones(1, 2, 2), 3)
    assert made.shape == (1, 3, 2, 2)
    assert made[0, :, 0, 0].tolist() == [1.5, 2.25, 2.875]


def test_predicts_a_change_of_the_last_frame():
    model = WaveSurrogate(channels=4, layers=3)
    with torch.no_grad():
        for parameter in model.convs[-1].parameters():
            parameter.zero_()
    frames = torch.randn(2, 4, 9, 9)
    assert torch.equal(model(frames, torch.ones(2, 9, 9)), frames[:, -1])


def test_amplitude_is_scaled_by_one_number():
    model, frames, speed = WaveSurrogate(channels=4, layers=3), torch.randn(1, 4, 9, 9), torch.ones(1, 9, 9)
    before = model(frames, speed)
    model.field_std.fill_(10.0)
    model.change_std.fill_(10.0)
    torch.testing.assert_close(model(10 * frames, speed), 10 * before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [None, FactorizeConv(rank=1, mode="init")], ids=["dense", "factorised"])
def test_a_saved_surrogate_loads_by_itself(method, tmp_path):
    model = WaveSurrogate(channels=6, layers=3).eval()
    inputs = (torch.randn(1, 4, 9, 9), torch.ones(1, 9, 9))
    if method is None:
        folder = models.save(model, tmp_path)
    else:
        result = compress(model, method, data=[inputs])
        model, folder = result.model, result.save(tmp_path)
        assert isinstance(model.convs[1], FactorizedConv2d)
    twin = quernel.load(folder)
    assert type(twin) is WaveSurrogate
    with torch.no_grad():
        assert torch.equal(twin(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WaveSurrogate(layers=1), "layers must be"),
        (lambda: WaveSurrogate(history=1), "history must be"),
        (lambda: WaveSurrogate(kernel_size=4), "kernel_size must be odd"),
        (lambda: WaveSurrogate()(torch.ones(1, 3, 8, 8), torch.ones(1, 8, 8)), "frames must be of shape"),
        (lambda: WaveSurrogate()(torch.ones(1, 4, 8, 8), torch.ones(1, 1, 8, 8)), "frames must be of shape"),
        (lambda: rollout(Shift(), torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2), 0), "steps must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(QuernelError, match=message):
        call()


FRESH = """
import sys, torch, quernel
model = quernel.load(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.save(model(*inputs), sys.argv[3])
"""


@pytest.mark.slow
def test_a_factorised_surrogate_loads_in_a_process_of_its_own(tmp_path):
    inputs = (torch.randn(1, 4, 9, 9), torch.ones(1, 9, 9))
    result = compress(WaveSurrogate(channels=6, layers=3).eval(), FactorizeConv(rank=1, mode="init"), data=[inputs])
    torch.save(inputs, tmp_path / "in.pt")
    arguments = [str(result.save(tmp_path / "model")), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), result.model(*inputs))
