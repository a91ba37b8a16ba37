"""The native chain: its ranges cover all rows once on every team, other runtimes and failures are told."""

import pytest
import torch

from quernel._errors import QuernelError
from quernel._intrinsics import portable
from quernel.nn import _int8_chain as chain
from quernel.nn import _native_ranges
from quernel.nn.functional import int8_linear


def operands(n, k=40, m=9):
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    return torch.randn(n, k, generator=g), codes, torch.rand(m, generator=g), torch.randn(m, generator=g)


pytestmark = pytest.mark.skipif(portable() or not chain.available(), reason="plain operations are used here")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [127, 128, 129, 1000])
@pytest.mark.parametrize("team", [True, False])
def test_any_number_of_ranges_gives_the_same_bits(threads, n, team, monkeypatch, poisoned_memory):
    arguments = operands(n)
    torch.set_num_threads(1)
    wanted = int8_linear(*arguments)
    assert wanted.isfinite().all()
    torch.set_num_threads(threads)
    monkeypatch.setattr(chain, "BLOCK", 50)
    monkeypatch.setattr(chain, "GRAIN", 20)
    if not team:
        monkeypatch.setattr(_native_ranges, "native_team", lambda: None)
    assert torch.equal(int8_linear(*arguments), wanted)


def test_a_failing_product_is_an_error(monkeypatch):
    # Without codes of dtypes torch cannot make its tensors.
    functions = chain._torch_functions()
    monkeypatch.setattr(chain, "_torch_functions", lambda: (*functions[:3], 99, 99, 99))
    with pytest.raises(QuernelError, match="torch's int8 product failed for 4 rows, 40 inputs, 9 outputs"):
        int8_linear(*operands(4))


def test_without_the_interface_plain_operations_step_in(monkeypatch):
    arguments = operands(20)
    wanted = int8_linear(*arguments)
    monkeypatch.setattr(chain, "_torch_functions", lambda: None)
    assert not chain.available()
    torch.testing.assert_close(int8_linear(*arguments), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(QuernelError, match="lacks the C interface"):
        chain.apply(0, 0, (0,) * 8, 1, 1, 1, 4)
