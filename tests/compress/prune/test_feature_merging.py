"""FeatureMerging: exact on duplicates, equal to the algorithm as written down, and honest about its limits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.compress import Context, FeatureMerging, compress, feature_complexity
from quernel.compress.graph import channel_groups, channel_map
from tests.compress.prune._nets import (
    CLOSE,
    NETS,
    Residual,
    apply,
    change,
    duplicated,
    merged,
    mlp,
    net_and_input,
    widths,
)

# Rounding of folded float32 weights; outputs are of order one.
FOLD = 1e-5


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{}, {"scale": "mean"}, {"order": "global"}, {"reference": "current"}], ids=str)
def test_duplicates_merge_exactly(name: str, options: dict[str, Any]) -> None:
    net, x = net_and_input(name)
    wide = duplicated(net, x)
    assert change(wide, net, x) < CLOSE
    assert widths(wide, x) == {g: n + 3 for g, n in widths(net, x).items()}
    small = merged(wide, x, beta=0.0, **options)
    assert widths(small, x) == widths(net, x)
    assert change(small, wide, x) < CLOSE


def test_unevenly_used_duplicates_need_producer_distances() -> None:
    net, x = net_and_input("mlp")
    wide = duplicated(net, x, random=True)
    assert change(wide, net, x) < CLOSE
    assert widths(merged(wide, x, beta=1e-6), x) == widths(wide, x)
    small = merged(wide, x, beta=0.0, distance="producers", scale="mean")
    assert widths(small, x) == widths(net, x)
    assert change(small, wide, x) < CLOSE


def test_one_uneven_layer_merges_by_producers_under_the_sum_rule() -> None:
    # In one hidden layer no neighbour's rows change, so copies stay copies until they meet.
    net, x = mlp(6, 16, 4), torch.randn(5, 6)
    wide = duplicated(net, x, random=True)
    small = merged(wide, x, beta=0.0, distance="producers")
    assert widths(small, x) == widths(net, x)


def test_producer_distance_sees_biases() -> None:
    net, x = mlp(6, 4, 2), torch.randn(5, 6)
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0]
    assert widths(merged(net, x, beta=0.0, distance="producers"), x) == {"0": 4}


@pytest.mark.parametrize(("scale", "restored"), [("sum", False), ("mean", True)])
def test_three_copies_are_restored_by_means_only(scale: str, restored: bool) -> None:
    net, x = net_and_input("mlp")
    wide = duplicated(net, x, per_group=2, copies=2)
    small = merged(wide, x, beta=0.0, distance="producers", scale=scale)
    assert (widths(small, x) == widths(net, x)) is restored
    if restored:
        assert change(small, wide, x) < CLOSE


@pytest.mark.parametrize(("scale", "exact"), [("sum", False), ("mean", True)])
def test_gelu_duplicates_are_exact_by_means_only(scale: str, exact: bool) -> None:
    net, x = mlp(6, 16, 4, activation=nn.GELU), torch.randn(5, 6)
    wide = duplicated(net, x)
    method = FeatureMerging(beta=0.0, scale=scale)
    plan = method.plan(wide, Context(example_inputs=x))
    assert any("gelu" in w and 'scale="mean"' in w for w in plan.warnings) is not exact
    method.apply(wide, plan)
    assert widths(wide, x) == widths(net, x)
    assert (change(wide, net, x) < CLOSE) is exact


def test_folding_alone_changes_little_and_leaves_no_batch_norm() -> None:
    net, x = net_and_input("batch norms and residuals")
    groups, folds = channel_groups(net, x), dict(channel_map(net, x).folds)
    assert len(folds) == 5
    small = merged(net, x, beta=1.0, max_ratio=0.2)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    one = merged(duplicated(net, x, per_group=1), x, beta=0.0)  # each group loses exactly the copies
    assert change(one, net, x) < FOLD * 10
    assert {g.name for g in groups} == {"stem", "a", "b"}


def test_keep_bn_leaves_neutral_batch_norms() -> None:
    net, x = net_and_input("batch norms and residuals")
    with_norms, without = (merged(net, x, beta=1.0, max_ratio=0.5, keep_bn=k) for k in (True, False))
    assert with_norms.na.num_features == with_norms.a.out_channels == 5
    assert change(with_norms, without, x) < FOLD
    with_norms.train()(x).sum().backward()
    assert with_norms.na.weight.grad is not None


@pytest.mark.parametrize("name", NETS)
def test_zero_ratio_and_zero_beta_change_nothing(name: str) -> None:
    net, x = net_and_input(name)
    for options in ({"beta": 1.0, "max_ratio": 0.0}, {"beta": 0.0}):
        same = merged(net, x, **options)
        assert all(torch.equal(v, same.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("order", ["sweep", "global"])
def test_larger_beta_never_leaves_more(name: str, order: Any) -> None:
    net, x = net_and_input(name)
    counts = feature_complexity(net, x, (0.0, 0.1, 0.3, 0.5, 0.7, 1.0), method=FeatureMerging(order=order))
    assert counts.keys() == widths(net, x).keys()
    for group, curve in counts.items():
        assert curve == sorted(curve, reverse=True)
        assert curve[0] == widths(net, x)[group]
        assert curve[-1] < curve[0]


def test_complexity_is_what_merging_leaves() -> None:
    net, x = net_and_input("mlp")
    for order in ("sweep", "global"):
        counts = feature_complexity(net, x, (0.6, 0.3), method=FeatureMerging(order=order))
        for i, beta in enumerate((0.6, 0.3)):
            small = merged(net, x, beta=beta, max_ratio=1.0, order=order)
            left = [small[0].out_features, small[2].out_features]  # a group of one channel is no group any more
            assert [curve[i] for curve in counts.values()] == left


def test_order_of_channels_does_not_matter() -> None:
    net, x = net_and_input("mlp")
    shuffled = copy.deepcopy(net)
    with torch.no_grad():
        for first, second in ((shuffled[0], shuffled[2]), (shuffled[2], shuffled[4])):
            order = torch.randperm(first.out_features)
            first.weight.copy_(first.weight[order])
            first.bias.copy_(first.bias[order])
            second.weight.copy_(second.weight[:, order])
    assert change(net, shuffled, x) < FOLD
    one, other = (merged(n, x, beta=0.5) for n in (net, shuffled))
    assert widths(one, x) == widths(other, x) != widths(net, x)
    assert change(one, other, x) < CLOSE


def test_narrow_model_is_a_plain_model_of_the_new_widths() -> None:
    net, x = net_and_input("batch norms and residuals")
    small = merged(net, x, beta=1.0, max_ratio=0.5)
    fresh = Residual(4, 5)
    for name in ("norm", "na", "nb", "nc", "nd"):
        setattr(fresh, name, nn.Identity())
    shapes = {k: v.shape for k, v in fresh.named_parameters()}
    assert {k: v.shape for k, v in small.named_parameters() if not _conv_bias(k)} == shapes
    assert sum(v.numel() for k, v in small.named_parameters() if _conv_bias(k)) == 4 + 2 * 5 + 2 * 4
    for name, module in small.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.extra_repr().replace(", bias=False", "") == fresh.get_submodule(name).extra_repr().replace(
                ", bias=False", ""
            )


def _conv_bias(name: str) -> bool:
    return name.endswith(".bias") and not name.startswith("head")


def test_dtype_frozen_weights_and_layout_are_kept() -> None:
    net, x = net_and_input("batch norms and residuals")
    net = net.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False)
    x = x.bfloat16()
    small = merged(net, x, beta=1.0, max_ratio=0.5)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in small.parameters())
    assert small.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert small.head.weight.is_contiguous()


def test_nothing_is_drawn_and_repeats_agree() -> None:
    net, x = net_and_input("batch norms and residuals")
    state = torch.get_rng_state()
    one, other = (merged(net, x, beta=0.8) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_repair_gives_back_the_variance() -> None:
    # One group of four unit rows at right angles: their sum has twice the length; equal ones would have four times.
    net, x = mlp(4, 4, 2), torch.randn(5, 4)
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4))
        net[2].weight.fill_(1.0)
    plain, repaired = (merged(net, x, beta=1.0, max_ratio=0.75, repair=r, reference="current") for r in (False, True))
    torch.testing.assert_close(plain[0].weight, torch.ones(1, 4))
    torch.testing.assert_close(repaired[0].weight, 2 * torch.ones(1, 4))
    wide = duplicated(mlp(6, 16, 4), x6 := torch.randn(5, 6))
    assert change(*(merged(wide, x6, beta=0.0, repair=r) for r in (False, True)), x6) < CLOSE


def test_include_and_exclude() -> None:
    net, x = net_and_input("batch norms and residuals")
    method = FeatureMerging(beta=1.0, max_ratio=0.5)
    plan = method.plan(net, Context(example_inputs=x, exclude=("b", "stem")))
    assert {layer.name for layer in plan.layers if not layer.skipped} == {"a", "na", "c", "nc"}
    assert any("leave out 'b'" in layer.reason for layer in plan.layers)


def test_layer_norm_is_warned_about_and_skipped() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    plan = FeatureMerging(beta=1.0).plan(net, Context(example_inputs=torch.zeros(1, 4)))
    assert any("normalised over by layer_norm" in w for w in plan.warnings)
    assert {layer.name: layer.action for layer in plan.layers} == {"0": "keep", "2": "merge", "4": "merge"}


def test_runaway_is_warned_about() -> None:
    plan = FeatureMerging(beta=1.0, max_ratio=0.9, reference="current").plan(
        mlp(4, 20, 2), Context(example_inputs=torch.zeros(1, 4))
    )
    assert any("keeps 2 of 20 channels" in w and 'reference="initial"' in w for w in plan.warnings)


def test_width_written_into_the_forward_is_an_error() -> None:
    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 6, 3), nn.Linear(96, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.conv(x)).view(-1, 96))

    with pytest.raises(QuernelError, match=r"LeNet cannot run with narrower layers.*flatten\(1\)"):
        FeatureMerging(beta=1.0).plan(LeNet(), Context(example_inputs=torch.zeros(2, 1, 6, 6)))


def test_explicit_groups_need_no_graph() -> None:
    class Branching(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if float(x.sum()) != 0 else x

    net, x = mlp(6, 16, 4), torch.randn(5, 6)
    wide = Branching(duplicated(net, x))
    with pytest.raises(QuernelError, match="groups="):
        merged(wide, x, beta=0.0)
    method = FeatureMerging(beta=0.0, groups=[(["net.0"], ["net.2"])])  # type: ignore[arg-type]
    assert method.needs == frozenset()
    small = apply(wide, method, Context())
    assert small.net[0].out_features == 16
    assert change(small, wide, x) < CLOSE
    assert FeatureMerging.from_config(method.config()) == method


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_an_error() -> None:
    net = mlp(4, 8, 8, 8, 2)
    quantised = torch.ao.quantization.quantize_dynamic(net, {"2"}, dtype=torch.qint8)
    with pytest.raises(QuernelError, match=r"torch\.export cannot read Sequential"):
        FeatureMerging(beta=1.0).plan(quantised, Context(example_inputs=torch.zeros(1, 4)))


def test_compress_merges_and_reports() -> None:
    net, x = net_and_input("batch norms and residuals")
    result = compress(net, FeatureMerging(beta=1.0, max_ratio=0.5), example_inputs=x)
    assert result.report.bytes_after < 0.4 * result.report.bytes_before
    assert {layer.name: layer.action for layer in result.report.layers}["na"] == "fold"
    assert result.model.a.out_channels == 5
    assert net.a.out_channels == 10
