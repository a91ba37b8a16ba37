"""Channel groups of architectures of every kind: who makes a channel, who reads it, and what is left alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.compress.graph import ChannelMap, channel_groups, channel_map, explicit_map

IMAGE = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """Layers by keyword, forward as a function of (layers, x)."""

    def __init__(self, forward: Any, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def found(net: nn.Module, x: Any = IMAGE) -> dict[tuple[tuple[str, ...], int], tuple[str, ...]]:
    return {(g.names, g.size): g.nonlinear for g in channel_groups(net.eval(), x)}


def reasons(channels: ChannelMap) -> dict[str, str]:
    return {name: left.reason for left in channels.left_alone for name in left.names[:1]}


def conv(i: int, o: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **kwargs)


def test_flatten_gives_every_channel_its_block_of_columns() -> None:
    net = nn.Sequential(conv(3, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 6), nn.Linear(6, 2))
    first, second = channel_groups(net, IMAGE)
    assert (first.names, first.size) == (("0", "4"), 8)
    (columns,) = first.consumers
    np.testing.assert_array_equal(columns.index, np.arange(128).reshape(8, 16))
    assert (second.names, second.size) == (("4", "5"), 6)
    assert [s.tensor for s in first.producers] == ["0.weight"]
    assert [s.tensor for s in first.vectors] == ["0.bias"]


def test_residual_blocks_share_one_group() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        x = x + m.b(F.relu(m.a(x)))
        x += m.d(F.relu(m.c(x)))
        return m.head(x.mean((2, 3)))

    net = Net(forward, stem=conv(3, 8), a=conv(8, 5), b=conv(5, 8), c=conv(8, 7), d=conv(7, 8), head=nn.Linear(8, 2))
    groups = {g.name: g for g in channel_groups(net, IMAGE)}
    assert {s.module for s in groups["stem"].producers} == {"stem", "b", "d"}
    assert {s.module for s in groups["stem"].consumers} == {"a", "c", "head"}
    assert {g.name: g.size for g in groups.values()} == {"stem": 8, "a": 5, "c": 7}


def test_one_layer_residual_has_rows_and_columns_in_one_group() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        return m.head((x + F.relu(m.a(x))).mean((2, 3)))

    (group,) = channel_groups(Net(forward, stem=conv(3, 8), a=conv(8, 8), head=nn.Linear(8, 2)), IMAGE)
    assert [s.axis for s in group.slots if s.tensor == "a.weight"] == [0, 1]


def test_a_change_of_dtype_hands_channels_on() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(x)).to(torch.float64).to(x.dtype)), a=conv(3, 8), b=conv(8, 2))
    assert ("a", "b") in [g.names for g in channel_groups(net, IMAGE)]


def test_concatenation_splits_the_columns_of_the_reader() -> None:
    net = Net(
        lambda m, x: m.c(F.relu(torch.cat([m.a(x), m.b(x)], 1))).mean((1, 2, 3)),
        a=conv(3, 4),
        b=conv(3, 6),
        c=conv(10, 2),
    )
    a, b = channel_groups(net, IMAGE)
    np.testing.assert_array_equal(a.consumers[0].index.ravel(), np.arange(4))
    np.testing.assert_array_equal(b.consumers[0].index.ravel(), np.arange(4, 10))


def test_concatenation_added_to_a_wide_layer_gives_parts_that_may_not_mix() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head((m.wide(x) + torch.cat([m.a(x), m.b(x)], 1)).mean((2, 3)))

    groups = channel_groups(Net(forward, wide=conv(3, 10), a=conv(3, 4), b=conv(3, 6), head=nn.Linear(10, 2)), IMAGE)
    assert [(g.size, {s.module for s in g.producers}) for g in groups] == [(4, {"wide", "a"}), (6, {"wide", "b"})]
    assert len({g.name for g in groups}) == 2


def test_depthwise_convolution_and_batch_norm_scale_the_channels_they_read() -> None:
    net = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    (group,) = channel_groups(net, IMAGE)
    assert {(s.tensor, s.role) for s in group.producers} == {("0.weight", "row"), ("3.weight", "gain")}
    assert {(s.tensor, s.role) for s in group.vectors} == {
        ("0.bias", "row"), ("3.bias", "shift"), ("1.weight", "folded"), ("1.bias", "folded"), ("4.weight", "folded"),
        ("4.bias", "folded"),
    }  # fmt: skip
    assert channel_map(net, IMAGE).folds == (("0", "1"), ("3", "4"))


def test_batch_norm_that_is_not_alone_behind_a_layer_is_no_fold() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.b(F.relu(m.norm(y)) + y).mean((1, 2, 3))

    channels = channel_map(Net(forward, a=conv(3, 8), norm=nn.BatchNorm2d(8), b=conv(8, 2)), IMAGE)
    assert channels.folds == ()
    assert {s.role for s in channels.groups[0].vectors if s.module == "norm"} == {"gain", "shift"}


def test_batch_norm_after_linear_folds_only_over_features() -> None:
    flat = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    assert channel_map(flat.eval(), torch.zeros(3, 4)).folds == (("0", "1"),)
    # On (N, T, F) a batch norm works over T, here as wide as the features.
    assert channel_map(flat.eval(), torch.zeros(3, 6, 4)).folds == ()


@pytest.mark.parametrize(
    ("activation", "names"),
    [(nn.ReLU(), ()), (nn.LeakyReLU(), ()), (nn.GELU(), ("gelu",)), (nn.ReLU6(), ("hardtanh",))],
)
def test_activations_that_are_not_homogeneous_are_named(activation: nn.Module, names: tuple[str, ...]) -> None:
    net = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 2))
    assert found(net, torch.zeros(1, 4)) == {(("0", "2"), 6): names}


def test_constants_and_products_are_not_homogeneous() -> None:
    net = Net(
        lambda m, x: m.b((m.a(x) + 1) * torch.sigmoid(m.g(x))), a=nn.Linear(4, 6), g=nn.Linear(4, 6), b=nn.Linear(6, 2)
    )
    (group,) = channel_groups(net, torch.zeros(1, 4))
    assert group.nonlinear == ("add", "sigmoid", "mul")
    scaled = Net(lambda m, x: m.b(m.a(x) * 0.5 / 3), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    assert channel_groups(scaled, torch.zeros(1, 4))[0].nonlinear == ()


def test_outputs_and_single_channels_keep_their_number() -> None:
    net = Net(
        lambda m, x: (m.b(m.a(x)), m.d(m.c(x))),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 2),
        c=nn.Linear(4, 1),
        d=nn.Linear(1, 3),
    )
    channels = channel_map(net, torch.zeros(1, 4))
    assert [g.names for g in channels.groups] == [("a", "b")]
    assert reasons(channels) == {
        "b": "is an output of the model",
        "c": "has a single channel",
        "d": "is an output of the model",
    }


LEFT_ALONE = {
    "layer norm": (lambda m, x: m.b(m.norm(m.a(x))), {"norm": nn.LayerNorm(6)}, "is normalised over by layer_norm"),
    "rms norm": (lambda m, x: m.b(m.norm(m.a(x))), {"norm": nn.RMSNorm(6)}, "is normalised over by rms_norm"),
    "softmax": (lambda m, x: m.b(m.a(x).softmax(-1)), {}, "passes through softmax"),
    "constant": (lambda m, x: m.b(m.a(x) + torch.ones(6)), {}, "meets, in add, a tensor whose channels are fixed"),
    "input": (lambda m, x: m.b(m.a(x) * x[:, :1].expand(-1, 6)), {}, "meets, in mul, a tensor whose channels"),
    "padding": (lambda m, x: m.b(F.pad(m.a(x), (0, 2))[:, :6]), {}, "is padded with constant channels"),
    "slice": (lambda m, x: m.c(m.a(x)[:, :3]), {"c": nn.Linear(3, 2)}, "is cut by slice"),
    "chunk": (lambda m, x: m.c(m.a(x).chunk(2, -1)[0]), {"c": nn.Linear(3, 2)}, "is cut by chunk"),
    "heads": (lambda m, x: m.b(m.a(x).view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)), {}, "is reshaped across"),
    "reduction": (lambda m, x: m.b(m.a(x) - m.a(x).mean(-1, keepdim=True)), {}, "which the model uses more than once"),
    "mean": (lambda m, x: m.a(x).mean(-1), {}, "is reduced over by mean"),
    "weight read elsewhere": (lambda m, x: m.b(m.a(x)) + m.a.weight.sum(), {}, "whose tensors are also read outside"),
    "computed weight": (lambda m, x: F.linear(m.a(x), m.b.weight * 2), {}, "meets a weight that is computed"),
    "subclass": (lambda m, x: m.b(m.c(x)), {"c": type("Mine", (nn.Linear,), {})(4, 6)}, "a Mine, not a plain"),
    "comparison": (lambda m, x: m.b((y := m.a(x)) * (y > 0)), {}, "passes through gt"),
    "select": (lambda m, x: m.a(x)[:, 0], {}, "is cut by select"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_the_reason(name: str) -> None:
    forward, layers, reason = LEFT_ALONE[name]
    net = Net(forward, **({"a": nn.Linear(4, 6), "b": nn.Linear(6, 2)} | layers)).eval()
    channels = channel_map(net, torch.zeros(3, 4))
    assert channels.groups == ()
    assert any(reason in left.reason for left in channels.left_alone)


def test_shared_layers_are_left_alone() -> None:
    net = Net(lambda m, x: m.b(F.relu(m.a(F.relu(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    channels = channel_map(net, torch.zeros(1, 4))
    assert channels.groups == ()
    assert reasons(channels)["a"] == "belongs to 'a', which the model uses more than once"


def test_tied_weights_are_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    assert channel_map(net, torch.zeros(1, 4)).groups == ()
    unused = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(4, 6), b=nn.Linear(6, 2), embedding=nn.Embedding(6, 4))
    unused.embedding.weight = unused.a.weight
    assert "shares a tensor" in reasons(channel_map(unused, torch.zeros(1, 4)))["a"]


def test_grouped_convolution_is_refused_and_its_neighbours_are_not() -> None:
    net = nn.Sequential(conv(3, 8), conv(8, 8, groups=2), conv(8, 6), nn.ReLU(), conv(6, 2))
    channels = channel_map(net, IMAGE)
    assert [g.names for g in channels.groups] == [("2", "4")]
    assert "grouped convolution '1' (groups=2)" in reasons(channels)["0"]


def test_option_a_shortcut_leaves_the_stream_alone_but_not_the_blocks() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.stem(x))
        y = m.norm(m.b(F.relu(m.a(x))))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return m.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    layers = {"stem": conv(3, 4), "a": conv(4, 8, stride=2), "b": conv(8, 8), "norm": nn.BatchNorm2d(8)}
    channels = channel_map(Net(forward, **layers, head=nn.Linear(8, 2)).eval(), IMAGE)
    assert [g.names for g in channels.groups] == [("a", "b")]
    assert reasons(channels)["stem"] == "is padded with constant channels"
    assert reasons(channels)["b"] == "meets, in add, a tensor whose channels are fixed"
    assert channels.folds == (("b", "norm"),)


def test_batch_norm_with_batch_statistics_is_left_alone() -> None:
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), conv(8, 2)).eval()
    assert "statistics of the batch" in reasons(channel_map(net, IMAGE))["0"]


def test_transformer_feed_forward_is_found_and_the_stream_is_not() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 20, batch_first=True, activation="gelu").eval()
    channels = channel_map(net.requires_grad_(False), torch.zeros(2, 5, 8))
    assert [(g.names, g.nonlinear) for g in channels.groups] == [(("linear1", "linear2"), ("gelu",))]


@pytest.mark.slow
def test_bert_is_read_through_a_mapping() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16,
    )  # fmt: skip
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    groups = channel_groups(transformers.BertModel(config).eval(), batch)
    assert [(g.size, g.nonlinear) for g in groups] == [(12, ("gelu",))] * 2


def test_mode_and_weights_are_as_before() -> None:
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(), conv(8, 2))
    net[1].eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    channel_groups(net, IMAGE)
    assert [m.training for m in net] == [True, False, True, True]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_threads_may_trace_at_once() -> None:
    nets = [nn.Sequential(conv(3, n), nn.ReLU(), conv(n, 2)) for n in range(3, 11)]
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda net: [g.size for g in channel_groups(net, IMAGE)], nets))
    assert sizes == [[n] for n in range(3, 11)]


def test_forward_takes_batches_of_another_kind() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    assert channel_groups(net, {"pixels": torch.zeros(1, 4)}, lambda model, batch: model(batch["pixels"]))[0].size == 6


def test_untraceable_model_says_why_and_what_to_do() -> None:
    net = Net(lambda m, x: m.b(m.a(x)) if float(x.sum()) > 0 else x, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    with pytest.raises(QuernelError, match=r"torch\.export cannot read Net: .*groups="):
        channel_groups(net, torch.zeros(1, 4))


def test_explicit_groups_equal_the_traced_ones() -> None:
    net = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, groups=8), nn.Flatten(), nn.Linear(512, 2))
    traced, named = channel_map(net.eval(), IMAGE), explicit_map(net, [(("0", "1", "3"), ("5",))])
    assert named.folds == traced.folds
    for one, other in zip(traced.groups, named.groups, strict=True):
        assert (one.name, one.size) == (other.name, other.size)
        slots = [{(s.tensor, s.axis, s.role, s.index.tobytes()) for s in g.slots} for g in (one, other)]
        assert slots[0] == slots[1]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(("nope",), ("5",))], "'nope' is not a module"),
        ([(("2",), ("5",))], "'2' is a ReLU"),
        ([(("1",), ("5",))], "must come right after the layer"),
        ([(("0", "6"), ("5",))], "equal width; '6' has 6, others 8"),
        ([(("0",), ("6",))], "'6' has 5 columns, which do not fit 8"),
        ([(("7",), ("5",))], "grouped convolution"),
    ],
)
def test_explicit_groups_are_checked(groups: Any, message: str) -> None:
    net = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.ReLU(), nn.Flatten(), nn.Linear(512, 2), nn.Linear(5, 6),
        conv(8, 8, groups=2),
    )  # fmt: skip
    with pytest.raises(QuernelError, match=message):
        explicit_map(net, groups)
