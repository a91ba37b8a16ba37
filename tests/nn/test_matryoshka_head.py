"""``MatryoshkaHead``: nested classifiers against plain ones, what trains what, eval at one length."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import MatryoshkaHead

DIMS = (2, 4, 8)


def copied(efficient: MatryoshkaHead) -> MatryoshkaHead:
    """Return an MRL head whose classifiers are the slices of an MRL-E head."""
    head = MatryoshkaHead(efficient.in_features, efficient.n_classes, efficient.dims)
    with torch.no_grad():
        for width, weight, bias in zip(head.dims, head.weights, head.biases, strict=True):
            weight.copy_(efficient.weights[0][:, :width])
            bias.copy_(efficient.biases[0])
    return head


def test_slices_of_one_weight_are_mrl_e():
    z = torch.randn(5, 8)
    efficient = MatryoshkaHead(8, 3, DIMS, efficient=True)
    for m, logits in copied(efficient)(z).items():
        torch.testing.assert_close(efficient(z)[m], logits, rtol=0, atol=0)
    assert sum(p.numel() for p in efficient.parameters()) == 8 * 3 + 3
    assert sum(p.numel() for p in copied(efficient).parameters()) == sum(DIMS) * 3 + 3 * 3


@pytest.mark.parametrize("efficient", [False, True])
def test_each_prefix_has_a_plain_linear_layer(efficient):
    head, z = MatryoshkaHead(8, 3, DIMS, efficient), torch.randn(2, 7, 8)
    for place, (m, logits) in enumerate(head(z).items()):
        which = 0 if efficient else place
        wanted = F.linear(z[..., :m], head.weights[which][:, :m], head.biases[which])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
        torch.testing.assert_close(head(z, dim=m), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("efficient", [False, True])
def test_a_coordinate_is_trained_by_the_prefixes_that_hold_it(efficient):
    head = MatryoshkaHead(8, 3, DIMS, efficient)
    for m in DIMS:
        z = torch.randn(4, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(head(z)[m].square().sum(), z)
        assert (gradient[:, m:] == 0).all() and (gradient[:, :m] != 0).all()


def test_gradients_of_the_nested_loss():
    head = MatryoshkaHead(5, 3, (1, 3, 5), dtype=torch.float64)
    y = torch.tensor([0, 2])

    def loss(z):
        return sum(F.cross_entropy(logits, y) for logits in head(z).values())

    assert torch.autograd.gradcheck(loss, torch.randn(2, 5, dtype=torch.float64, requires_grad=True))


def test_eval_answers_at_one_length_that_may_be_set():
    head, z = MatryoshkaHead(8, 3, DIMS).eval(), torch.randn(5, 8)
    torch.testing.assert_close(head(z), head(z, dim=8), rtol=0, atol=0)
    head.dim = 4
    torch.testing.assert_close(head(z), head(z, dim=4), rtol=0, atol=0)
    assert MatryoshkaHead.from_config(head.config()).dim == 4


def test_within_a_sequential_under_autocast():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), MatryoshkaHead(8, 3, DIMS))
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    assert {y.dtype for y in logits.values()} == {torch.bfloat16}
    for m, plain in net(x).items():
        torch.testing.assert_close(logits[m].float(), plain, rtol=0.05, atol=0.05)  # 8 bits of mantissa, 8 terms
    sum(y.float().sum() for y in logits.values()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_states_round_trip():
    one, two = MatryoshkaHead(8, 3, DIMS), MatryoshkaHead(8, 3, DIMS)
    two.load_state_dict(one.state_dict())
    z = torch.randn(5, 8)
    assert all(torch.equal(one(z)[m], two(z)[m]) for m in DIMS)


def test_a_tied_weight_is_the_embedding():
    embedding = nn.Embedding(11, 8)
    head = MatryoshkaHead(8, 11, DIMS, efficient=True, bias=False)
    head.weights[0] = embedding.weight
    z = torch.randn(3, 8)
    torch.testing.assert_close(head(z)[4], z[:, :4] @ embedding.weight[:, :4].T)


def test_default_lengths_and_initial_values():
    head = MatryoshkaHead(100, 400, generator=torch.Generator().manual_seed(0))
    assert head.dims == (8, 16, 32, 64, 100)
    for m, weight in zip(head.dims, head.weights, strict=True):
        # 3,200 uniform values at a fixed seed: the largest is within a percent of the bound.
        assert float(weight.detach().abs().max()) == pytest.approx(m**-0.5, rel=0.01)
    before = torch.get_rng_state()
    MatryoshkaHead(8, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MatryoshkaHead(8, 3, (4, 4)), r"dims must be integers that increase; got \(4, 4\)"),
        (lambda: MatryoshkaHead(8, 3, ()), "dims must be integers that increase"),
        (lambda: MatryoshkaHead(8, 3, (2, 4)), r"dims must end with in_features=8, the whole; got \(2, 4\)"),
        (lambda: MatryoshkaHead(8, 3, (4, 16)), r"dims must be an integer in \[1, 8\]; got 16"),
        (
            lambda: MatryoshkaHead(8, 3, DIMS, dim=3),
            "dim must be one of dims=.*, for which there is a classifier; got 3",
        ),
        (lambda: MatryoshkaHead(8, 3, DIMS)(torch.ones(1, 8), dim=5), "got 5"),
        (lambda: MatryoshkaHead(8, 3, DIMS)(torch.ones(1, 9)), r"z must have shape \(..., 8\); got \(1, 9\)"),
        (lambda: MatryoshkaHead(0, 3), "in_features must be an integer"),
        (lambda: MatryoshkaHead(8, 3, efficient=1), "efficient must be bool"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
