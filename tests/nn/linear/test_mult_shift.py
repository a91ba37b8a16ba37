"""``MultShiftMoE``: dispatch against token by token, balance, losses that leave no stale graph, packing."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel.nn import MultShiftMoE, PackedShiftLinear, collect_aux_loss
from tests.reference import shiftaddvit as reference

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# Share of tokens that balancing may be off by.
SHARE = 0.03


def _mixture(latencies: tuple[float, float] = (6, 4), size: int = 8, **options: object) -> MultShiftMoE:
    generator = torch.Generator().manual_seed(0)
    return MultShiftMoE.from_linear(nn.Linear(size, 6), latencies=latencies, generator=generator, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["weighted", "hard"])
def test_each_token_goes_through_its_expert(gate: str) -> None:
    mixture, x = _mixture(gate=gate).eval(), torch.randn(4, 5, 8)
    wanted = reference.mixture(
        x.view(-1, 8), mixture.router, (mixture.mult, mixture.shift), weighted=gate == "weighted"
    )
    torch.testing.assert_close(mixture(x), wanted.view(4, 5, 6), **CLOSE)
    assert 0 < float(mixture.share(x)[0]) < 1


@pytest.mark.parametrize("expert", [0, 1])
def test_forced_routing_gives_that_expert(expert: int) -> None:
    mixture, x = _mixture(), torch.rand(7, 8)
    with torch.no_grad():
        mixture.router.zero_()
        mixture.router[expert] = 100
    wanted = (mixture.mult, mixture.shift)[expert](x)
    torch.testing.assert_close(mixture.eval()(x), wanted, **CLOSE)
    # The other expert has no token: training works, and its gradient is zero.
    mixture.train()(x).sum().backward()
    other = (mixture.shift, mixture.mult)[expert]
    assert all(p.grad is not None and not p.grad.any() for p in other.parameters())


def test_permuted_tokens_give_permuted_outputs_and_none_give_none() -> None:
    mixture, x = _mixture().eval(), torch.randn(20, 8)
    order = torch.randperm(20)
    torch.testing.assert_close(mixture(x[order]), mixture(x)[order], **CLOSE)
    assert mixture(x[:0]).shape == (0, 6)
    assert mixture.train()(x[:0]).shape == (0, 6)


def test_it_starts_as_the_layer_that_it_replaces() -> None:
    linear, x = nn.Linear(8, 6), torch.randn(50, 8)
    mixture = MultShiftMoE.from_linear(linear, latencies=(1, 1)).eval()
    with torch.no_grad():
        mixture.router.zero_()  # undecided: all to the first expert, at half its output
    torch.testing.assert_close(mixture(x), linear(x), **CLOSE)
    assert torch.equal(mixture.mult.weight, 2 * linear.weight)
    hard = MultShiftMoE.from_linear(linear, latencies=(1, 1), gate="hard")
    assert torch.equal(hard.mult.weight, linear.weight)


def test_router_learns_from_the_task_unless_the_gate_is_hard() -> None:
    x = torch.randn(10, 8)
    for gate, learns in (("weighted", True), ("hard", False)):
        mixture = _mixture(gate=gate, balance=0.0)
        mixture(x).sum().backward()
        assert (mixture.router.grad is not None) is learns


@pytest.mark.parametrize("latencies", [(6.0, 4.0), (1.0, 3.0)])
def test_the_loss_alone_draws_shares_to_the_inverse_of_latency(latencies: tuple[float, float]) -> None:
    mixture = _mixture(latencies, balance=1.0)
    # Tokens behind a norm with a bias: their mean is not zero.
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    optimizer = torch.optim.Adam([mixture.router], lr=0.05)
    for _ in range(300):
        mixture(x)
        optimizer.zero_grad()
        collect_aux_loss(mixture).backward()
        optimizer.step()
    wanted = (1 / latencies[0]) / (1 / latencies[0] + 1 / latencies[1])
    assert float(mixture.eval().share(x)[0]) == pytest.approx(wanted, abs=SHARE)


def test_loss_is_that_of_the_definition() -> None:
    mixture, x = _mixture(balance=0.3), torch.randn(30, 8)
    torch.manual_seed(5)
    mixture(x)
    torch.manual_seed(5)
    clean = (x @ mixture.router.T).detach()
    noisy = clean + 0.5 * torch.randn_like(clean)
    wanted = 0.3 * reference.balance_loss(clean, noisy, (6.0, 4.0), 0.5)
    torch.testing.assert_close(mixture.aux_loss.detach(), wanted, **CLOSE)


def test_losses_are_summed_until_collected_and_then_gone() -> None:
    model, x = nn.Sequential(_mixture(size=6), _mixture(size=6)), torch.randn(9, 6)
    model(x)
    model[0](x)  # used twice within one step
    assert len(model[0]._pending.losses) == 2
    total = float((model[0].aux_loss + model[1].aux_loss).detach())
    assert float(collect_aux_loss(model).detach()) == pytest.approx(total)
    assert float(collect_aux_loss(model)) == 0
    assert float(collect_aux_loss(nn.Linear(2, 2))) == 0


def test_uncollected_losses_do_not_outlive_their_step() -> None:
    mixture, x = _mixture(), torch.randn(9, 8)
    for _ in range(3):
        mixture(x).sum().backward()
        assert len(mixture._pending.losses) == 1
    mixture(x)
    graph = weakref.ref(mixture._pending.losses[-1])
    mixture.eval()
    gc.collect()
    assert graph() is None


def test_eval_and_no_grad_leave_nothing() -> None:
    mixture, x = _mixture(), torch.randn(9, 8)
    with torch.no_grad():
        mixture(x)
    assert float(mixture.aux_loss) == 0
    mixture.eval()(x)
    assert float(mixture.aux_loss) == 0
    frozen = _mixture()
    frozen.router.requires_grad_(False)
    frozen(x)
    assert not frozen._pending.losses


def test_gradient_accumulation_adds_each_loss_once() -> None:
    mixture, parts = _mixture(noise=0.0), torch.randn(2, 9, 8).unbind(0)

    def grad(pieces: tuple[Tensor, ...]) -> Tensor:
        mixture.router.grad = None
        for x in pieces:
            (mixture(x).sum() + collect_aux_loss(mixture)).backward()
        assert mixture.router.grad is not None
        return mixture.router.grad.clone()

    torch.testing.assert_close(grad(parts), grad(parts[:1]) + grad(parts[1:]), **CLOSE)


def test_a_model_in_training_can_be_copied() -> None:
    mixture = _mixture()
    mixture(torch.randn(9, 8))
    assert float(copy.deepcopy(mixture).aux_loss) == 0


def test_packing_keeps_the_outputs() -> None:
    for bits in (4, 5):
        mixture, x = _mixture(bits=bits, size=64).eval(), torch.randn(40, 64)
        packed = mixture.pack()
        assert isinstance(packed.shift, PackedShiftLinear) and packed.router is mixture.router
        # With 4 bits the activations are rounded to int8.
        torch.testing.assert_close(packed(x), mixture(x), rtol=0.05, atol=0.05 if bits == 4 else 1e-4)
        twin = MultShiftMoE.from_config(packed.config()).eval()
        twin.load_state_dict(packed.state_dict())
        assert torch.equal(twin(x), packed(x))


def test_latencies_can_be_measured() -> None:
    mixture = MultShiftMoE.from_linear(nn.Linear(64, 64), tokens=16)
    assert len(mixture.latencies) == 2 and min(mixture.latencies) > 0


def test_bad_input_is_named() -> None:
    for bad in ((1, 0), (-1, 2), (float("nan"), 1)):
        with pytest.raises(QuernelError, match="latencies must be a finite number"):
            _mixture(bad)
    with pytest.raises(QuernelError, match="latencies must hold 2 numbers"):
        _mixture((1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="latencies must be one of 'measure'"):
        _mixture("guess")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match=r"bits must be an integer in \[3, 6\]"):
        _mixture(bits=7)
    with pytest.raises(QuernelError, match="linear layers of one size"):
        MultShiftMoE(nn.Linear(4, 4), nn.Linear(4, 5), (1, 1))
    with pytest.raises(QuernelError, match="x must have shape"):
        _mixture()(torch.zeros(2, 9))
    with pytest.raises(QuernelError, match="gate must be one of"):
        _mixture(gate="soft")
