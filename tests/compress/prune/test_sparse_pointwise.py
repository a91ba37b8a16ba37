"""``SparsePointwise``: the same function with fewer weights, chains that are chains, and what it leaves alone."""

import copy
import warnings

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import Cast, SparsePointwise, WeightInt8, compress
from quernel.nn import DepthwiseConv2d, SparseConv1x1, StoredLinear
from quernel.nn.functional import magnitude_mask

# Batch norms folded in float64, then rounded; sums in another order.
RTOL = 1e-5


def ready(net, sparsity=0.9, seed=0):
    """Give batch norms statistics and 1x1 weights zeros."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=g)
                module.running_var.uniform_(0.3, 2.0, generator=g)
                module.weight.normal_(generator=g)
                module.bias.normal_(generator=g)
            elif isinstance(module, nn.Conv2d) and tuple(module.kernel_size) == (1, 1):
                module.weight.mul_(magnitude_mask(module.weight, sparsity))
    return net.eval()


def unit(inputs, outputs, stride=1, activation=nn.ReLU6, size=3):
    return [
        nn.Conv2d(inputs, inputs, size, stride, size // 2, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        activation(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        activation(inplace=True),
    ]


def mobile(activation=nn.ReLU6):
    stem = [nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), activation(inplace=True)]
    body = [*unit(12, 24, 1, activation), *unit(24, 32, 2, activation, 5), *unit(32, 40, 1, activation)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5))


def kinds(net):
    return [type(m).__name__ for m in net if not isinstance(m, nn.Identity)]


def assert_same(got, wanted):
    assert float((got - wanted).abs().max()) <= RTOL * float(wanted.abs().max())


def quietly(net, method, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return compress(net, method, **options)


X = torch.randn(2, 3, 15, 17, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_a_mobile_net_runs_in_one_layout_and_computes_the_same(activation):
    net = ready(mobile(activation))
    result = quietly(net, SparsePointwise(), example_inputs=X)
    with torch.no_grad():
        assert_same(result.model(X), net(X))
    pair = ["DepthwiseConv2d", "SparseConv1x1"]
    stem = ["Conv2d", activation.__name__]
    assert kinds(result.model) == [*stem, *pair, *pair, *pair, "AdaptiveAvgPool2d", "Flatten", "Linear"]
    layers = [m for m in result.model if isinstance(m, DepthwiseConv2d | SparseConv1x1)]
    assert [m.aligned for m in layers] == [True] * 5 + [False]
    assert all(m.activation == activation.__name__.lower() for m in layers)
    summary = result.report.summary
    assert (summary["sparse_layers"], summary["depthwise_layers"], summary["folded_batch_norms"]) == (3, 3, 7)
    assert summary["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert result.report.bytes_after < 0.5 * result.report.bytes_before


def test_folding_keeps_the_pattern():
    net = ready(nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)))
    zero = net[0].weight == 0
    layer = quietly(net, SparsePointwise(), example_inputs=torch.randn(1, 16, 4, 4)).model[0]
    assert torch.equal(layer.weight.dense() == 0, zero)


def test_the_aligned_layout_goes_from_layer_to_layer():
    model = quietly(ready(mobile()), SparsePointwise(), example_inputs=X).model
    seen = []
    for layer in model:
        if isinstance(layer, SparseConv1x1 | DepthwiseConv2d):
            layer.register_forward_hook(lambda m, args, y: seen.append((args[0].stride(1), y.stride(1))))
    model(X)
    lines = [a // 16 % 2 for pair in seen[1:] for a in pair][:-1]
    assert lines == [1] * len(lines)


def test_one_shot_pruning_takes_the_smallest_and_says_what_it_lost():
    net = ready(mobile(), sparsity=0.0)
    weight = net[6].weight
    result = quietly(net, SparsePointwise(0.8), example_inputs=X)
    layer = result.model[6]
    assert layer.weight.sparsity == pytest.approx(0.8, abs=0.005)
    row = next(r for r in result.report.layers if r.name == "6")
    lost = (weight * ~magnitude_mask(weight, 0.8)).norm() / weight.norm()
    assert row.details["weight_lost"] == pytest.approx(lost.item(), rel=1e-5)
    assert row.details["sparsity"] == pytest.approx(0.8, abs=0.005)
    assert "sparsity=0.8 is reached at once, without training" in " ".join(result.report.warnings)


def test_without_fold_it_needs_nothing_and_touches_only_the_layers():
    net = ready(mobile())
    result = quietly(net, SparsePointwise(fold_bn=False))
    assert sum(isinstance(m, SparseConv1x1) for m in result.model) == 3
    assert sum(isinstance(m, nn.BatchNorm2d) for m in result.model) == 7
    with torch.no_grad():
        assert_same(result.model(X), net(X))
    with pytest.raises(QuernelError, match="needs graph; pass example_inputs"):
        compress(net, SparsePointwise())


class Branches(nn.Module):
    """What must not be fused: a norm's input read again, one activation in two places, a view of the pixels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.second, self.other = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.third, self.relu = nn.Conv2d(16, 16, 1), nn.ReLU()
        self.last = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        raw = self.first(x)
        a = self.relu(self.norm(raw)) + raw
        b = self.other(self.second(a))
        c = self.relu(self.third(b))
        return self.last(c.view(len(c), 16, -1, 1)).view(len(c), -1)


def test_what_is_read_elsewhere_stays_apart():
    net = ready(Branches(), 0.8)
    result = quietly(net, SparsePointwise(), example_inputs=X)
    model = result.model
    with torch.no_grad():
        assert_same(model(X), net(X))
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert isinstance(model.other, nn.Identity)
    assert isinstance(model.relu, nn.ReLU)
    assert all(isinstance(m, SparseConv1x1) for m in (model.first, model.second, model.third, model.last))
    assert all(m.activation is None for m in (model.first, model.second, model.third))
    assert model.second.aligned
    assert not model.last.aligned


class Viewing(nn.Module):
    """Hands a tensor on to a sparse layer and also views it as rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.first(x)
        return self.second(y).sum((2, 3)) + y.view(len(y), -1).sum(1, keepdim=True)


def test_a_tensor_that_is_viewed_stays_contiguous():
    net = ready(Viewing(), 0.8)
    model = quietly(net, SparsePointwise(), example_inputs=X).model
    assert not model.first.aligned
    with torch.no_grad():
        assert_same(model(X), net(X))


def test_residual_networks_work():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(inplace=True))
            self.filter = nn.Sequential(*unit(24, 8)[:5])

        def forward(self, x):
            return x + self.filter(self.expand(x))

    net = ready(nn.Sequential(nn.Conv2d(3, 8, 1), Residual(), Residual()), 0.7)
    model = quietly(net, SparsePointwise(), data=[X]).model
    with torch.no_grad():
        assert_same(model(X), net(X))
    assert isinstance(model[1].filter[0], DepthwiseConv2d)
    assert model[1].expand[0].aligned


def test_layers_with_few_zeros_and_other_convolutions_stay():
    net = ready(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)), 0.0)
    net[2].weight.data.mul_(magnitude_mask(net[2].weight, 0.7))
    result = quietly(net, SparsePointwise(), example_inputs=X)
    assert kinds(result.model) == ["Conv2d", "Conv2d", "SparseConv1x1"]
    reasons = {row.name: row.reason for row in result.report.layers}
    assert reasons["0"] == "0% of its weights are zero, fewer than min_sparsity=0.66"
    assert "no 1x1 convolution" in reasons["1"]
    assert kinds(quietly(net, SparsePointwise(min_sparsity=0.71), example_inputs=X).model) == ["Conv2d"] * 3


def test_a_low_bar_is_taken_with_a_warning():
    net = ready(nn.Sequential(nn.Conv2d(3, 8, 1)), 0.5)
    result = compress(net, SparsePointwise(min_sparsity=0.3), example_inputs=X)
    assert any("a dense layer is as fast" in text for text in result.report.warnings)
    assert isinstance(result.model[0], SparseConv1x1)


def test_exclude_holds_for_norms_too():
    net = ready(mobile())
    result = quietly(net, SparsePointwise(), example_inputs=X, exclude=("7", "12"))
    assert isinstance(result.model[7], nn.BatchNorm2d)
    assert result.model[6].activation is None
    assert isinstance(result.model[12], nn.Conv2d)


def test_blocks():
    net = ready(mobile(), 0.0)
    model = quietly(net, SparsePointwise(0.75, block=4), example_inputs=X).model
    assert {m.weight.block for m in model if isinstance(m, SparseConv1x1)} == {4}
    assert model[6].weight.nonzeros == 4 * model[6].weight.indices.numel()


def test_linear_layers_on_request():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(5, 64)
    model = quietly(net, SparsePointwise(0.9, linear=True), example_inputs=x).model
    assert kinds(model) == ["SparseLinear", "SparseLinear"]
    assert model[0].activation == "relu"
    result = compress(net, SparsePointwise(0.9), example_inputs=x)
    assert all(row.action in ("skip", "keep") for row in result.report.layers)


def test_a_tied_weight_stays_dense():
    net = ready(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)), 0.9)
    net[1].weight = net[0].weight
    result = compress(net, SparsePointwise(), example_inputs=torch.randn(1, 8, 3, 3))
    assert kinds(result.model) == ["Conv2d", "Conv2d"]


def test_zeros_are_held_while_the_caller_trains():
    net, seen = ready(mobile(), 0.0), []

    def finetune(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        model.train()
        before = model[6].weight.detach().clone()
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
            seen.append((model[6].weight == 0).float().mean())
        assert not torch.equal(before, model[6].weight)
        model.eval()

    result = compress(net, SparsePointwise(0.8), example_inputs=X, finetune=finetune)
    assert seen == pytest.approx([0.8] * 4, abs=0.005)
    layer = result.model[6]
    assert isinstance(layer, SparseConv1x1)
    assert layer.weight.sparsity == pytest.approx(0.8, abs=0.005)


def test_zeros_that_are_there_are_left_to_the_caller():
    # Without a target the model is converted at once: a caller who trains gets biases and depthwise weights to train.
    def finetune(model):
        assert isinstance(model[6], SparseConv1x1)

    compress(ready(mobile()), SparsePointwise(), example_inputs=X, finetune=finetune)


def test_other_methods_join():
    net = ready(mobile())
    for method in (WeightInt8(), Cast("bfloat16")):
        result = compress(net, [method, SparsePointwise()], example_inputs=X)
        assert isinstance(result.model[6], SparseConv1x1)
        assert isinstance(result.model[-1], StoredLinear)
        x = X.bfloat16() if isinstance(method, Cast) else X
        with torch.no_grad():
            difference = (result.model(x).float() - net(X)).norm() / net(X).norm()
        assert difference < 0.05


def test_a_saved_model_computes_the_same(tmp_path):
    result = quietly(ready(mobile()), SparsePointwise(), example_inputs=X)
    result.save(tmp_path)
    twin = quernel.load(tmp_path, model=mobile)
    with torch.no_grad():
        assert torch.equal(twin(X), result.model(X))
    assert [m.aligned for m in twin if isinstance(m, SparseConv1x1)] == [True, True, False]


def test_the_converted_model_compiles_and_exports():
    model = quietly(ready(mobile()), SparsePointwise(), example_inputs=X).model
    with torch.no_grad():
        wanted = model(X)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(X)
        exported = torch.export.export(model, (X,), strict=False).module()(X)
    torch.compiler.reset()
    torch.testing.assert_close(compiled, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported, wanted, rtol=1e-4, atol=1e-5)


def test_training_mode_and_trainability_are_kept():
    net = ready(mobile()).train()
    net[6].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    result = quietly(net, SparsePointwise(), example_inputs=X)
    assert result.model.training
    assert result.model[3].training
    assert not result.model[6].bias.requires_grad
    assert result.model[3].weight.requires_grad
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_menu_takes_zeros_that_are_there_first():
    labels = [m.label for m in SparsePointwise.menu()]
    assert labels == ["SparsePointwise", "SparsePointwise(sparsity=0.7)", "SparsePointwise(sparsity=0.8)"]
    assert isinstance(quietly(ready(mobile()), SparsePointwise.menu()[0], example_inputs=X).model[6], SparseConv1x1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.5}, r"sparsity must lie in \[min_sparsity=0\.66, 1\); got 0\.5"),
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"sparsity": "half"}, "sparsity must be a finite number"),
        ({"block": 3}, "block must be one of 1, 2, 4"),
        ({"min_sparsity": 2}, "min_sparsity"),
        ({"fold_bn": 1}, "fold_bn must be bool"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(QuernelError, match=message):
        SparsePointwise(**options)
