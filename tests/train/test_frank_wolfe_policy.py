"""FrankWolfePolicy: targets by their definition, stay in the hull, gradients only for the policy, and it learns."""

import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.search import FlatIndex, MaxIPIndex
from quernel.train import FrankWolfePolicy


def actions(n=500, d=3):
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.norm(dim=1, keepdim=True).clamp_min(1.0)


@pytest.mark.parametrize("lmo", ["exact", FlatIndex(3, "ip")])
def test_targets_by_definition(lmo):
    held = actions()
    frank_wolfe = FrankWolfePolicy(held, lmo=lmo, step=0.25)
    generator = torch.Generator().manual_seed(1)
    action, gradient = torch.randn(2, 7, 3, generator=generator)
    target = frank_wolfe.target(action, gradient)
    for i in range(7):
        best = max(range(500), key=lambda j: float(held[j] @ gradient[i]))
        torch.testing.assert_close(target[i], action[i] + 0.25 * (held[best] - action[i]))


def test_an_index_answers_nearly_as_well():
    held = actions(20_000, 4)
    gradient = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    index = MaxIPIndex(4)
    one, other = FrankWolfePolicy(held), FrankWolfePolicy(held, lmo=index)
    assert len(index) == 0 and len(other.index) == 20_000
    assert FrankWolfePolicy(held, lmo=other.index).index is other.index
    reached = ((held[other.best(gradient)] * gradient).sum(1) / (held[one.best(gradient)] * gradient).sum(1)).min()
    assert float(reached) > 0.95


def test_an_index_that_finds_nothing_is_replaced_by_the_scan():
    class Silent(FlatIndex):
        def search(self, q, k=10):
            """Find every second item only."""
            scores, ids = super().search(q, k)
            ids[::2] = -1
            return scores, ids

    gradient = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    held = actions()
    got = FrankWolfePolicy(held, lmo=Silent(3, "ip")).best(gradient)
    assert torch.equal(got, FrankWolfePolicy(held).best(gradient))


def test_the_loss_moves_the_policy_only():
    policy, critic = nn.Linear(2, 3), nn.Bilinear(2, 3, 1)
    states = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    frank_wolfe = FrankWolfePolicy(actions(), step=0.5)
    loss = frank_wolfe.loss(policy, critic, states)
    loss.backward()
    assert policy.weight.grad is not None and critic.weight.grad is None
    action = policy(states).detach().requires_grad_()
    critic(states, action).sum().backward()
    wanted = ((policy(states) - frank_wolfe.target(action, action.grad)) ** 2).mean()
    torch.testing.assert_close(loss, wanted)
    with torch.no_grad():
        assert torch.isfinite(frank_wolfe.loss(policy, critic, states))


def test_a_bandit_is_learned():
    # Reward -|a - goal(s)|^2 over the unit ball; the best reachable action is the goal itself.
    torch.manual_seed(0)
    held = actions(2000, 2)
    policy = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    frank_wolfe = FrankWolfePolicy(held, step=0.2)

    def goal(s):
        return 0.6 * torch.cat([torch.cos(3 * s), torch.sin(3 * s)], 1)

    def critic(s, a):
        return -((a - goal(s)) ** 2).sum(1)

    states = torch.linspace(-1, 1, 64)[:, None]
    before = float(critic(states, policy(states)).detach().mean())
    for _ in range(300):
        optimizer.zero_grad()
        frank_wolfe.loss(policy, critic, states).backward()
        optimizer.step()
    after = float(critic(states, policy(states)).detach().mean())
    assert after > 0.1 * before  # regret falls more than tenfold


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: FrankWolfePolicy(a[:0]), r"actions must be floating point of shape \(n, d\), n > 0"),
        (lambda a: FrankWolfePolicy(a[0]), "actions must be floating point"),
        (lambda a: FrankWolfePolicy(a.int()), "actions must be floating point"),
        (lambda a: FrankWolfePolicy(a * float("nan")), "actions holds NaN"),
        (lambda a: FrankWolfePolicy(a, step=0.0), "step must be"),
        (lambda a: FrankWolfePolicy(a, step=1.5), "step must be"),
        (lambda a: FrankWolfePolicy(a, lmo="lsh"), "lmo must be one of 'exact'"),
        (lambda a: FrankWolfePolicy(a, lmo=FlatIndex(3, "ip").add(a[:4])), "lmo holds 4 items, but there are 500"),
        (lambda a: FrankWolfePolicy(a).best(a[:, :2]), r"gradient must have shape \(B, 3\); got \(500, 2\)"),
        (lambda a: FrankWolfePolicy(a).best(a * float("inf")), "gradient holds NaN or infinity"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call(actions())
