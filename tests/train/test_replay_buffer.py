"""``ReplayBuffer``: how many stay, that all have the same chance, seeds, refusals."""

from __future__ import annotations

import pytest
import torch

from quernel._errors import QuernelError
from quernel._registry import catalogue
from quernel.train import ReplayBuffer


def test_it_is_in_the_catalogue_of_its_system():
    (entry,) = [e for e in catalogue() if e.name == "ReplayBuffer"]
    assert (entry.slug, entry.contract, entry.headline) == ("stationary-representations", "trainer", False)
    assert entry.resolve() is ReplayBuffer


def test_every_class_keeps_its_number_and_its_samples():
    y = torch.tensor([0] * 30 + [1] * 3 + [5] * 12)
    x = torch.arange(45.0)[:, None]
    memory = ReplayBuffer(10).add(x, y)
    kept, labels = memory.items()
    assert torch.bincount(labels).tolist() == [10, 3, 0, 0, 0, 10] and len(memory) == 23
    assert torch.equal(y[kept[:, 0].long()], labels)
    assert len(kept.unique()) == 23
    assert memory.nbytes == 23 * (4 + 8 + 8)


def test_early_and_late_samples_stay_with_the_same_chance():
    # 500 draws of 2 out of 10 offered in three parts: each count is binomial with mean 100 and deviation 8.9;
    # six deviations on ten counts fail by chance less than once in 10^7.
    counts = torch.zeros(10)
    x, y = torch.arange(10), torch.zeros(10, dtype=torch.int64)
    for seed in range(500):
        memory = ReplayBuffer(2, seed=seed)
        for rows in (slice(0, 1), slice(1, 8), slice(8, 10)):
            memory.add(x[rows], y[rows])
        counts[memory.items()[0]] += 1
    assert float((counts - 100).abs().max()) < 6 * 8.9


def test_the_seed_decides_and_the_global_generator_does_not():
    x, y = torch.arange(50.0), torch.arange(50) % 2
    state = torch.get_rng_state()
    first, again, other = (ReplayBuffer(5, seed=s).add(x, y).items()[0] for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_does_not_fit_is_refused():
    memory = ReplayBuffer(2)
    with pytest.raises(QuernelError, match="empty"):
        memory.items()
    memory.add(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    for x, y in (
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(3, 4).double(), torch.zeros(3, dtype=torch.int64)),
    ):
        with pytest.raises(QuernelError, match="like those held"):
            memory.add(x, y)
    for y in (torch.zeros(2, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(QuernelError, match="n integer labels"):
            memory.add(torch.zeros(3, 4), y)
    assert len(memory) == 2
    with pytest.raises(QuernelError, match="per_class"):
        ReplayBuffer(0)
