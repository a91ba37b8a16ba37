"""Trials on Ray's workers are the trials of this process; without Ray the remedy is named."""

import os
import signal
import sys
import time

import pytest
import torch
from torch import nn

from quernel._errors import MissingExtraError, QuernelError
from quernel.compress import Budget, Cast, RayExecutor, WeightInt8, search


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"quernel\[ray\]"):
        RayExecutor()


@pytest.mark.slow
def test_a_search_on_two_workers_finds_what_one_process_finds():
    pytest.importorskip("ray")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.linspace(-1, 1, 512).reshape(8, 64)
    wanted = model(x).detach()

    def closeness(candidate):  # inside, so that it travels by value
        return 1.0 - float((candidate(x).float() - wanted).detach().norm() / wanted.norm())

    def broken():
        return 1 // 0

    options = {"data": [x], "evaluate": (closeness, closeness), "methods": [Cast(), WeightInt8()]}
    alone = search(model, Budget(drop=0.1), **options)
    with RayExecutor(num_cpus=2) as executor:
        spread = search(model, Budget(drop=0.1), executor=executor, **options)
        # A task that fails is a trial that fails, and the next one runs.
        assert isinstance(executor.submit(broken).exception(), ZeroDivisionError)
        assert executor.submit(pow, 2, 5).result() == 32
    assert [(t.label, t.file_bytes, t.metric) for t in spread.trials] == [
        (t.label, t.file_bytes, t.metric) for t in alone.trials
    ]
    assert spread.chosen == alone.chosen


def _slow(seconds):
    time.sleep(seconds)
    return "done"


def _first(values):
    return float(values[0].reshape(-1)[0])


def _answer(model, x, *, factor=1.0):
    return float(factor * model(x).sum())


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_it_keeps_the_promises_of_an_executor():
    pytest.importorskip("ray")
    x = torch.zeros(3)
    with RayExecutor(num_cpus=2) as executor:
        # Changed data is sent again, whatever held it before.
        before = executor.submit(_first, [x])
        assert before.result() == 0.0
        x[0] = 7.0
        assert executor.submit(_first, [x]).result() == 7.0
        # A worker that dies fails its task, once, and others go on.
        assert executor.submit(_killed).exception() is not None
        late = executor.submit(_slow, 1.0)
    # Leaving the block waits for what runs.
    assert late.result(timeout=0) == "done"
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(pow, 2, 2)


@pytest.mark.slow
def test_a_changed_model_is_sent_again_and_an_unchanged_one_is_not():
    pytest.importorskip("ray")
    model, x = nn.Sequential(nn.Linear(200, 200), nn.ReLU()), torch.ones(1, 200)
    nn.init.constant_(model[0].weight, -1.0), nn.init.zeros_(model[0].bias)
    with RayExecutor(num_cpus=1) as executor:
        assert executor.submit(_answer, model, x).result() == 0.0
        assert executor.submit(_answer, model, x=x, factor=2.0).result() == 0.0
        assert len(executor._stored) == 1
        # A part without tensors is replaced; a weight is written past its version counter.
        model[1] = nn.Identity()
        assert executor.submit(_answer, model, x).result() == -40_000.0
        model[0].weight.data.fill_(1.0)
        assert executor.submit(_answer, model, x, factor=0.5).result() == 20_000.0
        # A list forgets a tensor, whose address the next one may get.
        values = [torch.zeros(30_000)]
        assert executor.submit(_first, values[0]).result() == 0.0
        values.clear()
        values.append(torch.ones(30_000))
        assert executor.submit(_first, values[0]).result() == 1.0
        assert len(executor._stored) == 5


@pytest.mark.parametrize("cpus", [0, 1.5])
def test_bad_arguments(cpus):
    pytest.importorskip("ray")
    with pytest.raises(QuernelError, match="cpus_per_task"):
        RayExecutor(cpus_per_task=cpus)
