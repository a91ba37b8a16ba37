"""SharedArray: one parameter however many read it, seeds for its readers, its description."""

import copy

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.hashing import mix64
from quernel.nn import SharedArray
from quernel.nn._shared_array import check_memory


class Reader(nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.memory = memory


def test_initial_values_are_uniform_and_follow_the_generator():
    one = SharedArray(10_000, bound=0.5, generator=torch.Generator().manual_seed(1))
    same = SharedArray(10_000, bound=0.5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.values, same.values)
    largest = float(one.values.detach().abs().max())
    assert largest <= 0.5 < largest * 1.01
    # The standard deviation of 10 000 uniform numbers is known to 0.45 %; 3 % is beyond six standard errors.
    assert float(one.values.detach().std()) == pytest.approx(one.std, rel=0.03)
    assert one.std == pytest.approx(0.5 / 3**0.5)


def test_the_default_generator_is_torchs():
    torch.manual_seed(3)
    one = SharedArray(5).values
    torch.manual_seed(3)
    assert torch.equal(one, SharedArray(5).values)


def test_readers_share_one_parameter():
    memory = SharedArray(8)
    model = nn.Sequential(Reader(memory), Reader(memory))
    assert len(list(model.parameters())) == 1
    twin = copy.deepcopy(model)
    assert twin[0].memory is twin[1].memory is not memory
    model[0].memory().sum().backward()
    assert torch.equal(model[1].memory.values.grad, torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_config_round_trip(dtype):
    memory = SharedArray(7, seed=-3, bound=0.1, dtype=dtype)
    twin = SharedArray.from_config(memory.config())
    assert twin.config() == memory.config() and twin.values.dtype == dtype
    assert torch.equal(twin.values, torch.zeros(7, dtype=dtype))
    twin.load_state_dict(memory.state_dict())
    assert torch.equal(twin.values, memory.values)
    assert "size=7, seed=-3" in repr(twin)


def test_seeds_of_readers():
    memory = SharedArray(1, seed=5)
    assert memory.derived_seed(1, 2) == int(mix64(5, 1, 2)) != memory.derived_seed(2, 1)
    assert 0 <= memory.derived_seed(0) < 2**64


def test_meta_and_dtype():
    assert SharedArray(4, device="meta").values.is_meta
    torch.set_default_dtype(torch.float64)
    assert SharedArray(4).values.dtype == torch.float64


def test_memory_of_a_reader_is_checked():
    memory = SharedArray(4)
    assert check_memory(memory, 4, "one block") is memory
    with pytest.raises(QuernelError, match="memory must hold at least 5 numbers, one block; it holds 4"):
        check_memory(memory, 5, "one block")
    with pytest.raises(QuernelError, match="memory must be a SharedArray; got Tensor"):
        check_memory(torch.zeros(3), 1, "one block")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be an integer"),
        ({"size": 3, "seed": 2**64}, "seed must fit 64 bits"),
        ({"size": 3, "seed": 0.5}, "seed must be an integer"),
        ({"size": 3, "bound": -1}, "bound must be a finite number"),
        ({"size": 3, "dtype": torch.int8}, "dtype must be one of"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(QuernelError, match=message):
        SharedArray(**arguments)
