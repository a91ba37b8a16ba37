"""``GradualMagnitudePruner``: the schedule, masks that hold against momentum and weight decay, resuming, refusals."""

import itertools

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.train import GradualMagnitudePruner
from tests.reference import fast_sparse_convnets as oracle


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((16, 8, 1, 1), (8, 16, 1, 1), (10, 7))
    return [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]


def train(pruner, params, optimizer, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)  # reaches masked weights too
        pruner.step(optimizer)
        yield pruner.steps


@pytest.mark.parametrize(("initial", "final", "every"), [(0.0, 0.9, 1), (0.3, 0.8, 7), (0.0, 0.5, 60), (0.5, 0.5, 3)])
def test_the_schedule_is_the_formula(initial, final, every):
    pruner = GradualMagnitudePruner(weights(), 100, initial=initial, final=final, every=every)
    targets = [pruner.target(t) for t in range(101)]
    wanted = [oracle.schedule(t, initial, final, 20, every, 60 // every) for t in range(101)]
    assert targets == pytest.approx(wanted, abs=1e-12)
    assert targets[19] == 0
    assert targets[20] == pytest.approx(initial, abs=1e-12)
    assert targets[-1] == targets[20 + 60 // every * every] == final
    assert all(a <= b for a, b in itertools.pairwise(targets))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_masked_weights_are_zero_after_every_step(make):
    params = weights()
    pruner = GradualMagnitudePruner(params, 50, initial=0.1, final=0.9, every=3)
    before = pruner.masks
    for step in train(pruner, params, make(params), 50):
        for p, mask, old in zip(params, pruner.masks, before, strict=True):
            assert not p[~mask].any()
            assert not (mask & ~old).any(), "a masked weight came back"
            # Within one weight a layer: the count is rounded, and the mask is what it was before where it is zero.
            assert abs(int((~mask).sum()) - pruner.target(step) * p.numel()) <= 1
        before = pruner.masks
    assert pruner.sparsity() == pytest.approx(0.9, abs=0.01)
    assert all(int((p == 0).sum()) == int((~m).sum()) for p, m in zip(params, pruner.masks, strict=True))


def test_a_ramp_from_the_first_step_on():
    params = weights()
    pruner = GradualMagnitudePruner(params, 10, initial=0.4, final=0.4, start=0.0, end=1.0, every=5)
    next(train(pruner, params, torch.optim.SGD(params, lr=0.1), 1))
    assert pruner.sparsity() == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("block", [2, 4])
def test_blocks_of_output_rows(block):
    params = weights()
    pruner = GradualMagnitudePruner(params, 10, final=0.75, every=1, block=block)
    list(train(pruner, params, torch.optim.SGD(params, lr=0.1), 10))
    grouped = params[0].detach().view(-1, block, 8)
    assert torch.equal((grouped != 0).any(1), (grouped != 0).all(1))
    assert (params[0] == 0).float().mean() == pytest.approx(0.75, abs=0.05)


def test_training_resumes_where_it_was():
    runs = []
    for interrupted in (False, True):
        params = weights()
        optimizer = torch.optim.SGD(params, lr=0.1)
        pruner = GradualMagnitudePruner(params, 40, every=2)
        list(train(pruner, params, optimizer, 20, seed=1))
        if interrupted:
            state, pruner = pruner.state_dict(), GradualMagnitudePruner(params, 40, every=2)
            pruner.load_state_dict(state)
        list(train(pruner, params, optimizer, 20, seed=2))
        runs.append([p.detach() for p in params])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(QuernelError, match="state must hold masks of shapes"):
        GradualMagnitudePruner(params[:1], 40, every=2).load_state_dict(state)


def test_takes_the_pointwise_convolutions_of_a_model():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Linear(16, 4))
    pruner = GradualMagnitudePruner.for_pointwise(net, 10, every=1)
    assert [p is net[2].weight for p in pruner.params] == [True]
    with pytest.raises(QuernelError, match="1x1 convolutions; Linear has none"):
        GradualMagnitudePruner.for_pointwise(net[3], 10)


def test_the_optimizers_loss_and_closure_pass_through():
    (p, *_) = weights()
    pruner = GradualMagnitudePruner([p], 10, every=1)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert pruner.step(torch.optim.SGD([p], lr=0.1), closure) is not None
    assert pruner.step(torch.optim.SGD([p], lr=0.1)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final": 1.0}, r"final must be a finite number in \[0\.0, 1\.0\)"),
        ({"initial": 0.95}, "initial"),
        ({"start": 0.9}, "end must be"),
        ({"every": 61}, "every=61 must fit into the ramp, 60 of the 100 steps"),
        ({"every": 0}, "every must be an integer"),
        ({"block": 3}, "block must be one of"),
        ({"params": []}, "at least one; got 0"),
        ({"params": [nn.Parameter(torch.ones(3))]}, "biases and norms out"),
        ({"total_steps": 0}, "total_steps"),
    ],
)
def test_refusals(options, message):
    arguments = {"params": weights(), "total_steps": 100, "every": 10} | options
    with pytest.raises(QuernelError, match=message):
        GradualMagnitudePruner(arguments.pop("params"), arguments.pop("total_steps"), **arguments)


def test_a_diverged_weight_is_named():
    params = weights()
    pruner = GradualMagnitudePruner(params, 10, every=1, start=0.0)
    with torch.no_grad():
        params[1][0] = float("nan")
    with pytest.raises(QuernelError, match="NaN"):
        list(train(pruner, params, torch.optim.SGD(params, lr=0.1), 10))
