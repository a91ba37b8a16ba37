"""What is known before any work: whether the model takes the dtype of its data."""

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.compress import Budget, CrossQuant, WeightInt8, _measure, compress, search


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    monkeypatch.setattr(_measure, "LATENCY_SECONDS", 0.02)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


X = torch.linspace(-1, 1, 64).reshape(4, 16)


@pytest.mark.parametrize("method", [WeightInt8(), CrossQuant()])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"data": [X.double()]}, "data"),
        ({"data": [(X.double(), torch.zeros(4))]}, "data"),
        ({"data": [X], "example_inputs": X.double()}, "example_inputs"),
        ({"data": [X.bfloat16()]}, "data"),
    ],
)
def test_a_dtype_that_the_model_does_not_take_is_named(method, options, name):
    with pytest.raises(QuernelError, match=rf"^{name} holds .*torch\.(float64|bfloat16).*x\.to\(torch.float32"):
        compress(net(), method, **options)
    with pytest.raises(QuernelError, match=f"^{name} holds tensors of"):
        search(net(), Budget(bytes=0.5), [method], evaluate=lambda model: 0.0, **options)


def test_a_model_that_converts_its_inputs_takes_any_dtype():
    class Converting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)

        def forward(self, x):
            return self.linear(x.float())

    assert compress(Converting(), WeightInt8(), data=[X.double()]).report.ratio > 1


def test_another_fault_is_not_blamed_on_the_dtype():
    with pytest.raises(QuernelError, match=r"must have shape \(..., 16\); got \(4, 3\)"):
        compress(net(), CrossQuant(), data=[torch.zeros(4, 3, dtype=torch.float64)])
