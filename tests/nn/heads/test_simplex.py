"""``SimplexHead``: identities of the simplex, logits without a matrix, gradients, the class map as a contract."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import quernel
from quernel._errors import FormatError, QuernelError
from quernel._load import save_model
from quernel.nn import SimplexHead
from quernel.nn.functional import simplex_logits, simplex_prototypes
from tests.reference import stationary_representations as oracle

SIZES = (2, 3, 10, 1024)


def features(n, d, dtype=torch.float64):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("k", SIZES)
def test_prototypes_are_a_regular_simplex(k, dtype, tolerance):
    w = simplex_prototypes(k, dtype=dtype)
    assert w.dtype == dtype and w.shape == (k, k - 1)
    w = w.double()
    cosines = torch.full((k, k), -1 / (k - 1), dtype=torch.float64).fill_diagonal_(1)
    assert float((w @ w.T - cosines).abs().max()) < tolerance
    assert float(w.sum(0).abs().max()) < tolerance
    assert float((w.T @ w - k / (k - 1) * torch.eye(k - 1, dtype=torch.float64)).abs().max()) < tolerance
    assert float((w - oracle.simplex(k)).abs().max()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("k", SIZES)
def test_fast_logits_are_the_product(k, dtype, tolerance):
    z = features(7, k - 1)
    wanted = z @ oracle.simplex(k).T
    got = simplex_logits(z.to(dtype))
    assert got.dtype == dtype
    assert float((got.double() - wanted).abs().max()) < tolerance
    assert torch.equal(simplex_logits(z.to(dtype).reshape(7, 1, -1))[:, 0], got)


def test_half_precision_sums_in_float32():
    z = torch.full((1, 1023), 0.1, dtype=torch.bfloat16)
    wanted = z.double() @ oracle.simplex(1024).T
    assert float((simplex_logits(z).double() - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())


def test_empty_and_strided_inputs():
    assert simplex_logits(torch.zeros(0, 4)).shape == (0, 5)
    z = features(4, 12)
    # Sums over strides are taken in another order.
    torch.testing.assert_close(simplex_logits(z[:, ::2]), simplex_logits(z[:, ::2].contiguous()), rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_gradient_of_cross_entropy_is_the_formula(k):
    z = features(6, k - 1).requires_grad_()
    y = torch.arange(6) % k
    F.cross_entropy(simplex_logits(z), y, reduction="sum").backward()
    w = oracle.simplex(k)
    wanted = ((z.detach() @ w.T).softmax(1) - F.one_hot(y, k)) @ w  # W^T (softmax - onehot), a row a sample
    torch.testing.assert_close(z.grad, wanted, rtol=0, atol=1e-12)


def test_gradients_are_exact():
    z = features(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(simplex_logits, z)
    assert torch.autograd.gradgradcheck(simplex_logits, z)


def test_head_trains_nothing_and_stores_only_its_spec():
    head = SimplexHead(1024, class_map=list(range(1023, 923, -1)))
    assert not list(head.parameters())
    state = head.state_dict()
    assert list(state) == ["spec"] and state["spec"].dtype == torch.int64
    assert state["spec"].tolist() == [1024, *range(1023, 923, -1)]
    # A matrix would take 4 MB.
    assert sum(t.numel() * t.element_size() for t in state.values()) == 8 * 101


def test_a_backbone_of_another_width_gets_one_linear_map_without_bias():
    head = SimplexHead(10, in_features=6, generator=torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in head.parameters()] == [(9, 6)]
    x = features(4, 6, torch.float32)
    logits, z = head(x)
    assert torch.equal(z, x @ head.weight.T)
    assert torch.equal(logits, simplex_logits(z))
    with pytest.raises(QuernelError, match=r"x must have shape \(\.\.\., 6\); got \(4, 5\).*in_features"):
        head(x[:, :5])
    with pytest.raises(QuernelError, match="n_prototypes - 1 = 9"):
        SimplexHead(10)(x)


def test_labels_go_to_their_prototypes_and_back():
    head = SimplexHead(6, class_map={0: 5, 2: 3, 3: 0})
    assert head.classes == (0, 2, 3) and head.class_map == (5, -1, 3, 0)
    assert head.targets(torch.tensor([3, 0, 2, 0])).tolist() == [0, 5, 3, 5]
    w = head.prototypes(torch.tensor([0, 2, 3]))
    torch.testing.assert_close(w.double(), oracle.simplex(6)[[5, 3, 0]], rtol=0, atol=1e-6)
    logits, _ = head(w)
    assert head.predict(logits).tolist() == [0, 2, 3]
    # Prototypes without a class are never predicted.
    assert head.predict(torch.eye(6)[[1, 2, 4]] - torch.eye(6)[[5, 5, 5]] / 2).tolist() == [2, 2, 2]


@pytest.mark.parametrize("label", [1, 4, -1])
def test_a_label_without_prototype_is_named(label):
    head = SimplexHead(6, class_map={0: 5, 2: 3, 3: 0})
    with pytest.raises(QuernelError, match=rf"labels \[{label}\] have no prototype; the class map knows 3 labels"):
        head.targets(torch.tensor([0, label]))
    with pytest.raises(QuernelError, match="labels must be integers"):
        head.targets(torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_prototypes": 1}, r"n_prototypes must be an integer in \[2"),
        ({"n_prototypes": 3, "class_map": range(4)}, "4 classes for n_prototypes=3"),
        ({"n_prototypes": 3, "class_map": [0, 0]}, "a prototype of its own; 0 is given twice"),
        ({"n_prototypes": 3, "class_map": [3]}, r"prototype of label 0 in class_map must be .* got 3"),
        ({"n_prototypes": 3, "class_map": {-1: 0}}, "label in class_map"),
        ({"n_prototypes": 3, "class_map": 5}, "sequence or a mapping"),
        ({"n_prototypes": 3, "in_features": 0}, "in_features"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(arguments, message):
    with pytest.raises(QuernelError, match=message):
        SimplexHead(**arguments)


def test_growing_keeps_prototypes_and_weights():
    old = SimplexHead(8, in_features=5, class_map=[7, 6])
    new = old.extended([7, 6, 5, 4])
    assert new.classes == (0, 1, 2, 3) and torch.equal(new.weight, old.weight) and new.weight is not old.weight
    assert new.spec.device == old.spec.device and new.spec.tolist() == [8, 7, 6, 5, 4]
    new.check_agrees(old)
    old.check_agrees(new)
    with pytest.raises(QuernelError, match="label 0 has prototype 7"):
        old.extended([6, 7, 5])
    with pytest.raises(QuernelError, match="must keep the labels"):
        old.extended({0: 7})
    with pytest.raises(QuernelError, match="belongs to label 2"):
        SimplexHead(8, class_map={2: 7}).check_agrees(old)
    with pytest.raises(QuernelError, match="n_prototypes must be the same in all versions; got 9 and 8"):
        SimplexHead(9).check_agrees(old)


def test_a_state_of_another_map_is_refused_before_anything_is_loaded():
    head = SimplexHead(8, in_features=5, class_map=[7, 6])
    weight = head.weight.clone()
    for other in (SimplexHead(8, 5, [6, 7]), SimplexHead(8, 5, [7, 6, 5])):
        with pytest.raises(QuernelError, match=r"spec must be the K and class map of this head, \[8, 7, 6\]; got \[8"):
            head.load_state_dict(other.state_dict())
        assert torch.equal(head.weight, weight)
    twin = SimplexHead(8, 5, [7, 6])
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin.weight, head.weight)


def test_a_saved_model_brings_its_map_and_a_forged_one_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), SimplexHead(8, 5, {1: 7, 3: 2}))
    save_model(model, tmp_path)
    twin = quernel.load(tmp_path, model=lambda: torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Identity()))
    assert twin[1].class_map == (-1, 7, -1, 2)
    x = features(3, 4, torch.float32)
    assert torch.equal(twin(x)[0], model(x)[0])
    config = model[1].config()
    for place, value in ((1, 6), (3, -1)):
        forged = {**config, "class_map": [*config["class_map"][:place], value, *config["class_map"][place + 1 :]]}
        with pytest.raises((QuernelError, FormatError)):
            SimplexHead.from_config(forged).load_state_dict(model[1].state_dict())
