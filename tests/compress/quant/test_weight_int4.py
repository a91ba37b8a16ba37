"""WeightInt4: what it takes, what it leaves, and how it stands beside other methods."""

import copy

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import DGQ, Cast, UniformLowRank, WeightInt4, WeightInt8, compress
from quernel.nn import LowRankLinear, StoredConv2d, StoredEmbedding, StoredLinear
from quernel.nn.functional import round_to_nearest
from quernel.nn.weights import Int4GroupWeight, Int8Weight, ProductWeight

# Rows of unit normals in 4 bits with groups of 32 err by 7 to 9 %.
RELATIVE = 0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 128, padding_idx=0)
        self.conv = nn.Conv2d(128, 16, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.out = nn.Linear(256, 64)

    def forward(self, ids):  # (N, 8, 8)
        x = self.conv(self.embed(ids).permute(0, 3, 1, 2))
        return self.out(self.depthwise(nn.functional.pad(x, (1, 1, 1, 1))).flatten(1))


def net():
    torch.manual_seed(0)
    return Net().eval()


IDS = torch.arange(128).view(2, 8, 8) % 50


def test_every_kind_of_layer_is_stored_in_four_bits():
    model = net()
    result = compress(model, WeightInt4(), data=[IDS])
    kinds = (StoredEmbedding, StoredConv2d, StoredConv2d, StoredLinear)
    layers = (result.model.embed, result.model.conv, result.model.depthwise, result.model.out)
    assert all(type(layer) is kind for layer, kind in zip(layers, kinds, strict=True))
    for old, new in ((model.embed, layers[0]), (model.conv, layers[1]), (model.out, layers[3])):
        assert (new.weight.dense() - old.weight).norm() < RELATIVE * old.weight.norm()
    assert layers[0].padding_idx == 0 and not layers[0].weight.dense()[0].any()
    rows = {layer.name: layer.action for layer in result.report.layers}
    assert rows == {"embed": "int4 weight", "conv": "int4 weight", "depthwise": "int8 weight", "out": "int4 weight"}
    assert isinstance(result.model.depthwise.weight, Int8Weight)
    assert (result.model(IDS) - model(IDS)).norm() < 2 * RELATIVE * model(IDS).norm()


@pytest.mark.parametrize("group_size", [32, 128])
def test_search_loses_less_than_rounding(group_size):
    weight = torch.randn(200, 384, generator=torch.Generator().manual_seed(0))
    stored = Int4GroupWeight.from_dense(weight, group_size).dense()
    plain = round_to_nearest(weight, group_size)
    assert (stored - weight).norm() < 0.99 * (plain - weight).norm()


def test_it_takes_what_dgq_leaves_and_touches_no_quantised_layer():
    x = torch.arange(300).view(30, 10) % 50
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 128), nn.Linear(128, 128)).eval()
    both = compress(model, [DGQ(grid=(2, 4)), WeightInt4(), Cast()], data=[x])
    assert both.report.methods == ("DGQ(grid=(2, 4))", "WeightInt4", "Cast")
    alone = compress(model, DGQ(grid=(2, 4)), data=[x])
    for name, tensor in alone.model[1].state_dict().items():
        assert torch.equal(tensor, both.model[1].state_dict()[name])
    assert isinstance(both.model[0].weight, Int4GroupWeight)
    for again in (DGQ(), WeightInt4(), WeightInt8()):
        with pytest.raises(QuernelError, match="nothing to compress"):
            compress(both.model, again, data=[x])


@pytest.mark.parametrize("method", [WeightInt4(), WeightInt8()])
def test_low_rank_factors_are_stored_small(method, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()

    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    thin = compress(model(), UniformLowRank(0.2, budget="params"), data=[x])
    assert isinstance(thin.model[0], LowRankLinear)
    result = compress(model(), [method, UniformLowRank(0.2, budget="params"), Cast()], data=[x])
    assert [name.partition("(")[0] for name in result.report.methods] == [
        "UniformLowRank",
        type(method).__name__,
        "Cast",
    ]
    form = "int4 weight" if method == WeightInt4() else "int8 weight"
    assert result.report.layers[0].action == f"low-rank + {form}"
    assert isinstance(result.model[0].weight, ProductWeight)
    assert result.report.bytes_after < (0.18 if method == WeightInt4() else 0.28) * thin.report.bytes_after
    wanted = thin.model(x)
    assert (result.model(x) - wanted).norm() < 0.2 * wanted.norm()
    back = quernel.load(result.save(tmp_path), model=model)
    assert torch.equal(back(x), result.model(x))


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(40, 128), nn.Linear(128, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    result = compress(Tied().eval(), WeightInt4(), data=[torch.arange(40)])
    assert result.model.head.weight is result.model.embed.weight


@pytest.mark.parametrize(("group_size", "word"), [(16, "group_size"), ("best", "group_size"), (None, "group_size")])
def test_settings_out_of_range_are_refused(group_size, word):
    with pytest.raises(QuernelError, match=word):
        WeightInt4(group_size=group_size)


def test_damaged_weights_are_left_alone():
    model = net()
    with torch.no_grad():
        model.out.weight[0, 0] = torch.nan
    before = copy.deepcopy(model.out.weight)
    result = compress(model, WeightInt4(), data=[IDS])
    rows = {layer.name: layer for layer in result.report.layers}
    assert "NaN" in rows["out"].reason
    assert torch.equal(result.model.out.weight.nan_to_num(), before.nan_to_num())
