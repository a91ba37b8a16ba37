"""What methods may look at: fused modules stay, masks and keywords reach the statistics."""

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.compress import Context
from quernel.compress._context import is_below, observe_inputs, opaque_parents, run_batch


class Recorder:
    """An observer that keeps what it saw."""

    def __init__(self):
        self.seen = []

    def update(self, x, mask=None):
        self.seen.append((tuple(x.shape), mask))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x):
        return self.lin(input=x)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x, attention_mask=None):
        return self.lin(x.flatten(0, 1))


class Optional(nn.Module):
    def forward(self, x, mask=None):
        return x if mask is None else x * mask


class Two(nn.Module):
    def forward(self, x, y, scale=2.0):
        return (x + y) * scale


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return self.out_proj(x)


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def test_children_of_fused_attention_are_not_selected():
    model = nn.Sequential(nn.Linear(8, 8), encoder(), OwnForward(8, 2))
    assert opaque_parents(model) == ("1", "1.self_attn")
    assert [name for name, _ in Context().selected(model, (nn.Linear,))] == ["0"]
    assert Context().selected(encoder(), (nn.Linear,)) == []


def test_being_below_is_strict_and_follows_the_dots():
    assert is_below("1.linear1", ("1",)) and is_below("linear1", ("",))
    assert not is_below("1", ("1",)) and not is_below("10.linear1", ("1",)) and not is_below("", ("",))


def test_keyword_calls_are_observed():
    recorder = Recorder()
    observe_inputs(Keywords(), Context(data=[torch.ones(2, 3)]), {"lin": recorder})
    assert recorder.seen == [((2, 3), None)]


def test_mask_follows_inputs_that_were_flattened():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    recorder = Recorder()
    observe_inputs(Flat(), Context(data=[{"x": torch.ones(2, 3, 3), "attention_mask": mask}]), {"lin": recorder})
    assert recorder.seen[0][0] == (6, 3) and recorder.seen[0][1].tolist() == [True, True, False, True, False, False]


def test_tuples_fill_the_required_parameters_only():
    x, label = torch.ones(2), torch.zeros(2)
    assert torch.equal(run_batch(Optional(), (x, label)), x)
    assert torch.equal(run_batch(Two(), [x, x, label]), 4 * x)
    assert torch.equal(run_batch(Optional(), {"x": x, "mask": label}), label)


def test_what_the_data_allows():
    assert Context().have == frozenset()
    assert Context(example_inputs=torch.ones(1)).have == {"graph"}
    assert Context(data=[torch.ones(1)]).have == {"data", "graph"}


def test_generators_are_refused():
    with pytest.raises(QuernelError, match="more than once; got a generator"):
        next(Context(data=(x for x in [torch.ones(1)])).batches())


def test_one_tensor_is_one_batch() -> None:
    x = torch.zeros(5, 3, 4, 4)
    assert [tuple(batch.shape) for batch in Context(data=x).batches()] == [(5, 3, 4, 4)]
