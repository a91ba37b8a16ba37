"""DGQ as a method: smoothing that keeps the function, what it stores, static scales, composition, refusals."""

import copy

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel.compress import DGQ, Cast, Context, UniformLowRank, WeightInt4, WeightInt8, compress
from quernel.compress.quant import dual_grained as module
from quernel.compress.quant._adjacent import scalable_pairs, scale_producer
from quernel.compress.quant._percentile import find_smoothing, percentile_scale
from quernel.models import TinyLM
from quernel.nn import StoredLinear, W4A8Linear
from quernel.nn.weights import ProductWeight
from quernel.testing import inject_outliers

QUICK = {"grid": (2, 6)}
# Two float32 roundings a smoothed channel, through a whole model.
FUNCTION = 1e-5
EXACT = {"rtol": 0, "atol": 0}


def language_model(layers=2):
    torch.manual_seed(0)
    return TinyLM(dim=64, n_layers=layers, n_heads=2, n_kv_heads=2, hidden_dim=96).eval()


IDS = [torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def perceptron(activation=None, width=128):
    torch.manual_seed(0)
    layers = nn.LayerNorm(width), nn.Linear(width, width), activation or nn.GELU(), nn.Linear(width, width)
    return nn.Sequential(*layers).eval()


def inputs(rows=200, width=128):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 30
    return x


@pytest.mark.parametrize(("n", "rank"), [(50, 1), (128, 2), (384, 3), (1000, 6)])
def test_percentile_changes_exactly_the_largest_channels(n, rank):
    absmax = torch.randperm(n, generator=torch.Generator().manual_seed(0)).float() + 1
    scale = percentile_scale(absmax, 99.5)
    assert int((scale > 1).sum()) == rank - 1
    torch.testing.assert_close((absmax / scale).max(), absmax.topk(rank).values[-1])
    assert torch.equal(percentile_scale(absmax * 1e-9, 99.5), torch.ones(n))
    assert torch.equal(percentile_scale(absmax, 100.0), torch.ones(n))


def test_gated_and_value_pairs_are_found_by_running():
    names = [name for name, m in language_model().named_modules() if type(m) is nn.Linear and name != "lm_head"]
    pairs = scalable_pairs(language_model(), Context(IDS), names)
    assert pairs == {f"layers.{i}.mlp.up_proj": (f"layers.{i}.mlp.down_proj",) for i in range(2)}
    mixing = scalable_pairs(language_model(), Context(IDS), names, mixing=True)
    values = {f"layers.{i}.self_attn.v_proj": (f"layers.{i}.self_attn.o_proj",) for i in range(2)}
    assert mixing == pairs | values


def test_pairs_around_a_relu_count_and_around_a_gelu_do_not():
    assert scalable_pairs(perceptron(nn.ReLU()), Context([inputs()]), ["1", "3"]) == {"1": ("3",)}
    assert scalable_pairs(perceptron(nn.GELU()), Context([inputs()]), ["1", "3"]) == {}


def test_looking_for_pairs_leaves_the_weights_bit_equal():
    model = language_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    scalable_pairs(model, Context(IDS), names, mixing=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("mixing", [False, True])
def test_smoothing_keeps_the_function(mixing):
    model = inject_outliers(language_model(), IDS)
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    seen = {n: torch.zeros(m.in_features) for n, m in linears.items()}
    handles = [
        m.register_forward_pre_hook(
            lambda _, args, n=n: seen.update({n: torch.maximum(seen[n], args[0].flatten(0, 1).abs().amax(0))})
        )
        for n, m in linears.items()
    ]
    with torch.no_grad():
        wanted = model(IDS[0])
        for handle in handles:
            handle.remove()
        smoothing = find_smoothing(model, Context(IDS), seen, 95.0, mixing=mixing)
        assert len(smoothing.producers) == (8 if mixing else 6)
        for producer, scale in smoothing.producers.items():
            scale_producer(model.get_submodule(producer), 1 / scale)
        for reader, scale in smoothing.readers.items():
            model.get_submodule(reader).weight.mul_(scale)
        got = model(IDS[0])
    assert float((got - wanted).abs().max()) <= FUNCTION * float(wanted.abs().max())


@pytest.mark.parametrize("act", ["token", "static", None])
def test_the_layers_are_four_bit_and_near_the_original(act):
    model, x = perceptron(), inputs()
    result = compress(model, DGQ(act=act), data=[x])
    assert [type(m) for m in result.model] == [nn.LayerNorm, W4A8Linear, nn.Identity, W4A8Linear]
    assert result.model[1].activation == "gelu" and result.model[1].act == act
    assert (result.model(x) - model(x)).norm() < 0.15 * model(x).norm()
    details = result.report.layers[1].details
    assert result.report.layers[1].action == f"int4 x {'float' if act is None else 'int8'}"
    assert details["group_size"] == 32 and details["bits_per_weight"] == pytest.approx(4 + 16 / 32 + 32 / 128)
    assert 0 < details["calibration_error"] < 0.12 and details["phase_1_error"] > 0
    assert result.report.summary["4-bit layers"] == 2 and result.report.summary["calibration tokens"] == 200
    # An embedding, a norm, biases aside, all bytes are those of 4-bit weights.
    assert result.report.bytes_after < 0.2 * result.report.bytes_before


def test_smoothing_moves_an_outlier_into_the_weight():
    model = inject_outliers(perceptron(), [inputs()], channels=1)
    smooth, plain = (
        compress(model, DGQ(act="static", smooth=how, fuse=False, **QUICK), data=[inputs()])
        for how in ("percentile", None)
    )
    assert smooth.report.layers[1].details["smoothed_channels"] == 1
    assert plain.report.layers[1].details["smoothed_channels"] == 0
    with torch.no_grad():
        lost = [float((r.model[:2](inputs()) - model[:2](inputs())).norm()) for r in (smooth, plain)]
    assert lost[0] < 0.5 * lost[1]


def test_up_projection_takes_the_division_of_the_down_projection():
    model = language_model()
    method = DGQ(percentile=90.0, **QUICK)
    plan = method.plan(model, Context(IDS))
    divisor = plan.payload.divisors["layers.0.mlp.up_proj"]
    work = copy.deepcopy(model)
    method.apply(work, plan)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    up, smoothed = model.layers[0].mlp.up_proj(x), work.layers[0].mlp.up_proj
    norm = plan.payload.divisors["layers.0.post_attention_layernorm"]
    assert (divisor > 1).any()
    assert (smoothed(x / norm) * divisor - up).norm() < 0.15 * up.norm()


def test_excluded_norms_are_not_scaled():
    model = inject_outliers(perceptron(), [inputs()], channels=1)
    result = compress(model, DGQ(**QUICK), data=[inputs()], exclude=("0",))
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert result.report.summary["smoothed layers"] == 0


def test_many_small_passes_equal_one(monkeypatch):
    x = inputs()
    whole = compress(perceptron(), DGQ(**QUICK), data=[x]).model
    monkeypatch.setattr(module, "GRAM_BYTES", 1)
    for a, b in zip(
        whole.state_dict().values(),
        compress(perceptron(), DGQ(**QUICK), data=[x]).model.state_dict().values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


def test_padding_takes_no_part():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(64, 64)

        def forward(self, x, attention_mask):
            return self.linear(x)

    x, mask = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 100, dtype=torch.int64)
    mask[:, 80:] = 0
    dirty = torch.where(mask.bool()[..., None], x, 1e4)
    clean, padded = (
        compress(Masked().eval(), DGQ(act="static", **QUICK), data=[batch]).model.state_dict()
        for batch in ({"x": x[:, :80], "attention_mask": mask[:, :80]}, {"x": dirty, "attention_mask": mask})
    )
    for name, tensor in clean.items():
        torch.testing.assert_close(padded[name], tensor, rtol=1e-6, atol=0)


def test_composition_is_reported_in_order_and_quantised_layers_stay():
    model, x = perceptron(width=256), inputs(width=256)
    result = compress(model, [Cast(), DGQ(**QUICK), UniformLowRank(0.2, budget="params")], data=[x])
    assert [name.partition("(")[0] for name in result.report.methods] == ["UniformLowRank", "DGQ", "Cast"]
    assert type(result.model[1]) is StoredLinear and isinstance(result.model[1].weight, ProductWeight)
    assert result.report.layers[1].action == "low-rank + int4 x int8"
    thin = compress(model, UniformLowRank(0.2, budget="params"), data=[x]).model
    assert (result.model(x).float() - thin(x)).norm() < 0.2 * thin(x).norm()
    for again in (DGQ(), WeightInt4(), WeightInt8()):
        with pytest.raises(QuernelError, match="nothing to compress"):
            compress(result.model, again, data=[x])
    int8 = compress(model, WeightInt8(), data=[x]).model
    with pytest.raises(QuernelError, match="nothing to compress"):
        compress(int8, DGQ(), data=[x])


@pytest.mark.parametrize("act", ["token", "static", None])
def test_saved_and_loaded(act, tmp_path):
    method = DGQ(act=act, percentile=90.0, **QUICK)
    result = compress(language_model(1), [method, WeightInt4(), Cast()], data=IDS)
    back = quernel.load(result.save(tmp_path), model=lambda: language_model(1))
    with torch.no_grad():
        torch.testing.assert_close(back(IDS[0]), result.model(IDS[0]), **EXACT)


def test_what_is_left_is_listed_by_name():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.conv = nn.Embedding(20, 64), nn.Conv1d(64, 64, 1)
            self.used, self.unused, self.narrow = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2)

        def forward(self, ids):
            x = self.embed(ids)
            return self.narrow(self.used(self.conv(x.transpose(1, 2)).transpose(1, 2)).mean(1))

    ids = torch.arange(400).view(40, 10) % 20
    rows = {layer.name: layer for layer in compress(Mixed().eval(), DGQ(**QUICK), data=[ids]).report.layers}
    assert rows["embed"].reason.startswith("Embedding is no linear layer") and rows["conv"].reason.startswith("Conv1d")
    assert "never reached" in rows["unused"].reason
    assert "gave it 40 rows, fewer than min_tokens=128" in rows["narrow"].reason
    assert rows["used"].action == "int4 x int8"


def test_weights_that_would_grow_are_left_alone():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 128), nn.Linear(128, 128)).eval()
    rows = compress(model, DGQ(**QUICK), data=[torch.randn(200, 16)]).report.layers
    assert [row.action for row in rows] == ["skip", "skip", "int4 x int8"]
    assert "padded to 128 values" in rows[0].reason


def test_too_few_tokens_are_refused():
    with pytest.raises(QuernelError, match="data holds 20 rows, fewer than min_tokens=128"):
        compress(perceptron(), DGQ(), data=[inputs(20)])
    assert compress(perceptron(), DGQ(min_tokens=20, **QUICK), data=[inputs(20)]).report.bytes_after > 0


def test_strict_names_the_layer():
    with pytest.raises(QuernelError, match=r"layer '1': group_size must divide the 96 inputs with strict=True; got 64"):
        compress(perceptron(width=96), DGQ(group_size=64, strict=True), data=[inputs(width=96)])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"group_size": 16}, "group_size"),
        ({"group_size": "best"}, "group_size"),
        ({"act": "row"}, "act"),
        ({"smooth": "search"}, "smooth"),
        ({"percentile": 0.0}, "percentile"),
        ({"percentile": 101.0}, "percentile"),
        ({"grid": (20, 0)}, r"grid\[1\]"),
        ({"grid": 20}, "grid"),
        ({"min_tokens": 0}, "min_tokens"),
        ({"fuse": 1}, "fuse"),
        ({"compensate": None}, "compensate"),
    ],
)
def test_settings_out_of_range_are_refused(options, word):
    with pytest.raises(QuernelError, match=word):
        DGQ(**options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_data_and_weights(value):
    x = inputs()
    x[3, 3] = value
    with pytest.raises(QuernelError, match="NaN or inf"):
        compress(perceptron(), DGQ(**QUICK), data=[x])
    model = perceptron()
    with torch.no_grad():
        model[3].weight[0, 0] = value
    rows = {row.name: row for row in compress(model, DGQ(**QUICK), data=[inputs()]).report.layers}
    assert "NaN or infinity" in rows["3"].reason
