"""``MatryoshkaLoss``: the plain loss for one prefix, sums for more, and the convention of sentence-transformers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.nn import MatryoshkaHead
from quernel.train import MatryoshkaLoss
from tests.reference import matryoshka as oracle

# float64 sums in another order.
SAME = {"rtol": 1e-10, "atol": 1e-12}


def products(a, b):
    """A contrastive loss by inner products: it needs prefixes of unit length from outside."""
    return F.cross_entropy(10 * a @ b.T, torch.arange(len(a)))


def columns(n=6, d=8, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, d, generator=g, dtype=dtype, requires_grad=True) for _ in range(2)]


def test_one_classifier_is_the_plain_loss_bit_for_bit():
    head, y = MatryoshkaHead(8, 3, (8,)), torch.tensor([0, 2, 1])
    z = torch.randn(3, 8, requires_grad=True)
    plain = F.cross_entropy(F.linear(z, head.weights[0], head.biases[0]), y)
    nested = MatryoshkaLoss(F.cross_entropy)(head(z), y)
    assert torch.equal(nested, plain)
    inputs = [z, *head.parameters()]
    pairs = zip(torch.autograd.grad(nested, inputs), torch.autograd.grad(plain, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_one_whole_prefix_is_the_plain_loss_bit_for_bit():
    pair = columns()
    nested, plain = MatryoshkaLoss(products, (8,), normalize=False)(pair), products(*pair)
    assert torch.equal(nested, plain)
    gradients = zip(torch.autograd.grad(nested, pair), torch.autograd.grad(plain, pair), strict=True)
    assert all(torch.equal(a, b) for a, b in gradients)


@pytest.mark.parametrize("weights", [None, (0.5, 0.0, 3.0)])
def test_embeddings_sum_over_normalised_prefixes(weights):
    pair, dims = columns(), (2, 3, 8)
    nested = MatryoshkaLoss(products, dims, weights)(pair)
    wanted = oracle.nested_loss(products, pair, dims, weights or (1.0, 1.0, 1.0))
    torch.testing.assert_close(nested, wanted, **SAME)
    for a, b in zip(torch.autograd.grad(nested, pair), torch.autograd.grad(wanted, pair), strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_gradient_check():
    loss = MatryoshkaLoss(products, (1, 3, 5))
    pair = [z.detach()[:3, :5].clone().requires_grad_() for z in columns()]
    assert torch.autograd.gradcheck(lambda a, b: loss((a, b)), pair)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_coordinate_is_trained_by_the_prefixes_that_hold_it(normalize):
    dims = (2, 5, 8)
    for place, m in enumerate(dims):
        weights = [0.0] * len(dims)
        weights[place] = 1.0
        pair = columns()
        loss = MatryoshkaLoss(products, dims, weights, normalize)(pair)
        for gradient in torch.autograd.grad(loss, pair):
            assert (gradient[:, m:] == 0).all() and (gradient[:, :m] != 0).all()


def test_it_is_a_sum_and_not_a_mean():
    pair = columns()
    one, three = (MatryoshkaLoss(lambda a, b: torch.ones(()), dims)(pair) for dims in ((8,), (2, 4, 8)))
    assert (float(one), float(three)) == (1.0, 3.0)


def test_logits_are_not_normalised_and_may_be_chosen():
    head, y, z = MatryoshkaHead(8, 3, (2, 4, 8)), torch.tensor([0, 2, 1]), torch.randn(3, 8)
    logits = head(z)
    parts = {m: float(F.cross_entropy(logits[m], y)) for m in head.dims}
    assert float(MatryoshkaLoss(F.cross_entropy)(logits, y)) == pytest.approx(sum(parts.values()))
    chosen = MatryoshkaLoss(F.cross_entropy, (2, 8), (3.0, 0.5))(logits, y)
    assert float(chosen) == pytest.approx(3 * parts[2] + 0.5 * parts[8])


def test_dropout_is_shared_by_the_prefixes():
    seen = []
    z = F.dropout(torch.ones(4, 8), 0.5)
    MatryoshkaLoss(lambda a: seen.append(a) or a.sum(), (2, 8), normalize=False)(z)
    assert torch.equal(seen[0], seen[1][:, :2])


def test_some_prefixes_a_step_in_training_only():
    pair, dims = columns(), (1, 2, 4, 8)
    seen: list[int] = []

    def base(a, b):
        seen.append(a.shape[1])
        return a.sum()

    loss = MatryoshkaLoss(base, dims, n_dims_per_step=2, generator=torch.Generator().manual_seed(0))
    drawn = set()
    for _ in range(30):
        seen.clear()
        loss(pair)
        assert len(seen) == 2 and seen == sorted(seen)
        drawn |= set(seen)
    assert drawn == set(dims)  # at this fixed seed
    seen.clear()
    loss.eval()(pair)
    assert seen == list(dims)


class _Encoder(nn.Module):
    """Answers as a SentenceTransformer does, and counts how often."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(5, 8), 0

    def forward(self, features):
        self.calls += 1
        return features | {"sentence_embedding": self.linear(features["x"])}


class _Ranking(nn.Module):
    """A loss with the convention of sentence-transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def compute_loss_from_embeddings(self, embeddings, labels):
        return products(*embeddings) + 0 * labels.sum()


def test_features_of_sentence_transformers_run_the_model_once_a_column():
    base = _Ranking(_Encoder())
    loss = MatryoshkaLoss(base, (2, 8))
    features, labels = [{"x": torch.randn(6, 5)} for _ in range(2)], torch.zeros(6)
    value = loss(features, labels)
    assert base.model.calls == 2
    wanted = MatryoshkaLoss(products, (2, 8))([base.model(f)["sentence_embedding"] for f in features])
    torch.testing.assert_close(value, wanted)
    assert loss.model is base.model and not hasattr(MatryoshkaLoss(products), "model")
    assert {n for n, _ in loss.named_parameters()} == {"base_loss.model.linear.weight", "base_loss.model.linear.bias"}
    assert loss.get_config_dict()["dims"] == (2, 8)


@pytest.mark.slow
def test_equals_the_loss_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.losses")

    class Model(_Encoder):
        def get_embedding_dimension(self):
            return 8

    model = Model()
    base = losses.MultipleNegativesRankingLoss(model)
    features, dims, weights = [{"x": torch.randn(6, 5)} for _ in range(2)], (2, 4, 8), (1.0, 0.5, 2.0)
    ours = MatryoshkaLoss(base, dims, weights)(features, None)
    theirs = losses.MatryoshkaLoss(model, base, list(dims), list(weights))(features, None)
    torch.testing.assert_close(ours, theirs)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_a_missing_whole_length_is_warned_of():
    with pytest.warns(UserWarning, match="dims end with 4: the other coordinates of the 8 are not trained. Include 8"):
        MatryoshkaLoss(products, (2, 4))(columns())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MatryoshkaLoss(products)(columns())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MatryoshkaLoss(products, (4, 2)), "dims must be integers that increase"),
        (lambda: MatryoshkaLoss(products, (2, 9))(columns()), "dims must be at most d=8, .*; got 9"),
        (lambda: MatryoshkaLoss(products, (2, 8), (1.0,)), "weights must be 2 numbers, one for each of dims"),
        (lambda: MatryoshkaLoss(products, weights=(1.0,)), "weights must be 0 numbers"),
        (lambda: MatryoshkaLoss(products, (2, 8), (1.0, -1.0)), "weights must be a finite number in"),
        (
            lambda: MatryoshkaLoss(products, (2, 8), n_dims_per_step=3),
            r"n_dims_per_step must be an integer in \[1, 2\]",
        ),
        (lambda: MatryoshkaLoss("ce"), "base_loss must be callable; got str"),
        (lambda: MatryoshkaLoss(products, normalize="yes"), "normalize must be one of"),
        (lambda: MatryoshkaLoss(products, normalize=True)({8: torch.ones(1, 2)}), 'normalize must be "auto" or False'),
        (lambda: MatryoshkaLoss(products, (2,))({8: torch.ones(1, 2)}), r"those of the head, \(8,\); got 2"),
        (lambda: MatryoshkaLoss(products)([torch.ones(1, 2), torch.ones(1, 3)]), "must be of one length"),
        (lambda: MatryoshkaLoss(products)([{"x": torch.ones(1, 2)}]), "function has not. Take sentence_transformers"),
        (lambda: MatryoshkaLoss(products)(3), "inputs must be the logits .* got int"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
