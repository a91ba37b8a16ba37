"""Seeds: reproducible children, pass-through generators, torch generators, no global state."""

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel._random import generator, row_states, seeded, spawn, torch_generator


def test_the_same_seed_gives_the_same_numbers():
    assert generator(3).integers(2**60) == generator(3).integers(2**60) != generator(4).integers(2**60)


def test_an_existing_generator_passes_through():
    made = np.random.default_rng(0)
    assert generator(made) is made


def test_none_draws_fresh_entropy():
    assert generator(None).integers(2**60) != generator(None).integers(2**60)


def test_children_are_reproducible_and_different():
    first, again = spawn(5, 4), spawn(5, 4)
    numbers = [generator(child).integers(2**60) for child in first]
    assert numbers == [generator(child).integers(2**60) for child in again]
    assert len(set(numbers)) == 4
    # More children keep the first ones; a sequence and its entropy are the same parent.
    assert [c.spawn_key for c in spawn(5, 2)] == [c.spawn_key for c in first[:2]]
    assert [c.spawn_key for c in spawn(np.random.SeedSequence(5), 4)] == [c.spawn_key for c in first]


def test_grandchildren_differ_from_children():
    children = spawn(5, 2)
    keys = {c.spawn_key for child in children for c in spawn(child, 2)} | {c.spawn_key for c in children}
    assert len(keys) == 6
    assert generator(spawn(children[0], 1)[0]).integers(2**60) != generator(children[0]).integers(2**60)


def test_torch_generator():
    def draw(seed):
        return torch.rand(3, generator=torch_generator(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_row_states_are_non_zero_and_reproducible():
    states = row_states(7, 1000)
    assert states.shape == (1000,)
    assert states.dtype == np.uint64
    assert (states != 0).all()
    assert len(set(states.tolist())) == 1000
    np.testing.assert_array_equal(states, row_states(7, 1000))
    assert row_states(7, 0).shape == (0,)


def test_global_generators_are_left_alone():
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(1)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    generator(1).random(5)
    torch_generator(1)
    row_states(1, 5)
    assert (np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


@pytest.mark.parametrize("seed", [-1, True, False, 1.5, "a"])
def test_bad_seeds(seed):
    with pytest.raises(QuernelError, match="seed must be"):
        generator(seed)


def test_seeded_examples_repeat_and_leave_torch_alone() -> None:
    make = seeded(lambda: torch.nn.Linear(3, 2).weight)
    before = torch.get_rng_state()
    assert torch.equal(make(), make())
    assert torch.equal(torch.get_rng_state(), before)
