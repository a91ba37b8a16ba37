"""Kar2 and Kar3: how far weights move, when means take part, states, refusals."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel.train import Kar2, Kar3


def test_the_first_step_moves_each_weight_by_the_rate() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([5.0, -1e-3, 0.0, 2.0])
    Kar3([p], lr=0.25).step()
    assert p.tolist() == [-0.25, 0.25, 0.0, -0.25]


def test_later_steps_move_by_three_or_one() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Kar3([p], lr=0.25, betas=(0.5, 0.95))
    moves = []
    # The fast mean turns with the first opposite gradient of this size, the slow one later.
    for gradient in (1.0, 1.0, -2.0, -2.0, -2.0):
        before = float(p)
        p.grad = torch.tensor([gradient])
        optimizer.step()
        moves.append((before - float(p)) / 0.25)
    # Means before each step: (0, 0), (.5, .05), (.75, .0975), (-.625, -.0074), (-1.3, -.107).
    assert moves == [1.0, 3.0, 1.0, -3.0, -3.0]


def test_one_mean_is_kar2() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Kar2([p], lr=0.5, beta=0.5)
    moves = []
    for gradient in (1.0, 1.0, -3.0):
        before = float(p)
        p.grad = torch.tensor([gradient])
        optimizer.step()
        moves.append((before - float(p)) / 0.5)
    assert moves == [1.0, 2.0, 0.0]


def test_states_are_saved_and_groups_keep_their_rates() -> None:
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = Kar3([{"params": [a], "lr": 1.0}, {"params": [b]}], lr=0.5)
    for p in (a, b):
        p.grad = torch.ones(2)
    optimizer.step()
    assert float(a[0]) == -1.0 and float(b[0]) == -0.5
    twin = Kar3([{"params": [a], "lr": 1.0}, {"params": [b]}], lr=0.5)
    twin.load_state_dict(optimizer.state_dict())
    twin.step()
    assert float(a[0]) == -4.0
    assert optimizer.step(lambda: 7.0) == 7.0


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (0.5,)}, {"betas": (0.5, 1.0)}, {"betas": 0.95}])
def test_what_cannot_be_right_is_refused(options: dict) -> None:
    with pytest.raises(QuernelError, match=r"lr|betas"):
        Kar3([torch.nn.Parameter(torch.zeros(1))], **options)


def test_sparse_gradients_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(QuernelError, match="dense gradients"):
        Kar2([p]).step()
