"""The driver: order, contexts, what reaches the model, refusals, reports, saving and interruption."""

import copy
import json

import pytest
import torch
from torch import nn

import quernel
from quernel._errors import FormatError, QuernelError
from quernel._machine import processor_name
from quernel.compress import (
    Cast,
    Context,
    LayerPlan,
    Plan,
    WeightInt4,
    WeightInt8,
    _measure,
    compress,
    methods_from_recipe,
)
from quernel.compress._compress import ordered
from quernel.compress._context import observe_inputs, run_batch
from quernel.compress._method import Method, PerModuleMethod
from quernel.nn.weights import unique_bytes


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    """No test here reads a latency closely."""
    monkeypatch.setattr(_measure, "LATENCY_SECONDS", 0.05)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


X = torch.linspace(-1, 1, 64).reshape(4, 16)


class Recorder:
    """An observer that keeps what it saw."""

    def __init__(self):
        self.seen = []

    def update(self, x, mask=None):
        self.seen.append((tuple(x.shape), None if mask is None else mask.clone()))


def test_list_is_put_in_natural_order_and_reported():
    result = compress(net(), [Cast(), WeightInt8()], data=[X])
    assert [type(m) for m in ordered([Cast(), WeightInt8()])] == [WeightInt8, Cast]
    assert result.report.methods == ("WeightInt8", "Cast")
    assert [m["class"] for m in result.recipe["methods"]] == ["WeightInt8", "Cast"]


def test_report_counts_what_is_stored_and_measures_errors():
    result = compress(net(), WeightInt8(), data=[X], evaluate=lambda m: float(m(X).sum()))
    report = result.report
    assert report.bytes_after == unique_bytes(result.model) < report.bytes_before == unique_bytes(net())
    assert {layer.name for layer in report.layers} == {"0", "2"}
    assert all(0 < layer.relative_error < 0.02 for layer in report.layers)
    assert report.metric_before == pytest.approx(report.metric_after, rel=0.1)
    if report.latency_ms_before is None:  # the machine was busy, and the report says so
        assert any("latency not measured" in warning for warning in report.warnings)
    else:
        assert report.latency_ms_before > 0 and report.latency_ms_after > 0


def test_mode_and_device_are_kept():
    model = net().train()
    model[1].eval()
    result = compress(model, WeightInt8(), data=[X])
    assert result.model.training and result.model[0].training and not result.model[1].training
    assert model.training and not model[1].training


def test_include_and_exclude_choose_modules():
    assert [
        layer.name for layer in compress(net(), WeightInt8(), include=("2",)).report.layers if layer.action != "keep"
    ] == ["2"]
    kept = compress(net(), WeightInt8(), exclude=("2",)).report.layers
    assert [(layer.name, layer.action) for layer in kept] == [("0", "int8 weight"), ("2", "keep")]


def test_untouched_layers_are_listed_with_their_bytes():
    result = compress(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).eval(), WeightInt8(), data=[X])
    rows = {layer.name: layer for layer in result.report.layers}
    assert rows["1"].action == "keep" and rows["1"].bytes_after == rows["1"].bytes_before == 128
    assert sum(layer.bytes_after for layer in result.report.layers) == result.report.bytes_after


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"method": []}, "empty list"),
        ({"method": WeightInt8}, "WeightInt8()"),
        ({"method": "int8"}, "methods"),
        ({"model": "resnet"}, "torch.nn.Module"),
        ({"include": ("absent",)}, "nothing to compress"),
        ({"data": []}, "data is empty"),
        ({"data": [object()]}, "forward="),
        ({"evaluate": lambda m: float("nan")}, "finite"),
        ({"evaluate": lambda m: "good"}, "'good'"),
        ({"evaluate": lambda m: 1 / 0}, "ZeroDivisionError"),
    ],
)
def test_bad_input_is_refused_and_loses_nothing(options, word):
    model = options.pop("model", None) or net()
    before = copy.deepcopy(model)
    with pytest.raises(QuernelError, match=word.replace("(", r"\(").replace(")", r"\)")):
        compress(model, options.pop("method", WeightInt8()), **options)
    if isinstance(model, nn.Module):
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_evaluate_that_fails_on_the_compressed_model_names_it():
    calls = []

    def evaluate(model):
        calls.append(model)
        return 1.0 if len(calls) == 1 else float("inf")

    with pytest.raises(QuernelError, match="the compressed model"):
        compress(net(), WeightInt8(), evaluate=evaluate)


def test_model_without_layers_is_refused():
    with pytest.raises(QuernelError, match="nothing to compress"):
        compress(nn.Sequential(nn.ReLU()), WeightInt8())


@pytest.mark.parametrize(
    "batch", [X, (X,), [X], {"input": X}, {"input": X, "labels": torch.zeros(4)}, (X, torch.zeros(4))]
)
def test_batches_of_every_kind_run_and_labels_do_not_reach_the_model(batch):
    assert torch.equal(run_batch(net(), batch), net()(X))


def test_attention_mask_keeps_padding_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x, attention_mask):
            return self.linear(x) * attention_mask[..., None]

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    recorder = Recorder()
    context = Context(data=[{"x": torch.ones(2, 3, 3), "attention_mask": mask}])
    observe_inputs(Tokens(), context, {"linear": recorder})
    assert recorder.seen[0][0] == (2, 3, 3) and torch.equal(recorder.seen[0][1], mask.bool())


def test_forward_says_how_odd_batches_run():
    class Sample:
        x = X

    result = compress(net(), WeightInt8(), data=[Sample()], forward=lambda model, batch: model(batch.x))
    assert result.report.layers[0].relative_error is not None


def test_shared_layers_are_converted_once_and_stay_shared(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    result = compress(Tied(), WeightInt8(), data=[X])
    assert result.model.a is result.model.b
    back = quernel.load(result.save(tmp_path), model=Tied)
    assert back.a is back.b and torch.equal(back(X), result.model.eval()(X))


def test_saved_folder_holds_report_and_recipe(tmp_path):
    result = compress(net(), WeightInt8(), data=[X])
    result.save(tmp_path)
    assert quernel.Report.from_json((tmp_path / "report.json").read_text()) == result.report
    extra = json.loads((tmp_path / "config.json").read_text())["quernel"]["content"]["extra"]
    assert extra["recipe"] == result.recipe
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_progress_is_told():
    told = []
    compress(net(), WeightInt8(), progress=lambda message, fraction: told.append((message, fraction)))
    assert told and all(0 <= fraction <= 1 for _, fraction in told)


def test_finetune_runs_on_the_compressed_model():
    seen = []
    result = compress(net(), WeightInt8(), finetune=seen.append)
    assert seen == [result.model]


def test_interrupt_leaves_the_original_alone():
    class Interrupted(PerModuleMethod):
        stage = "quantise"

        def convert(self, module, stats, layer):
            raise KeyboardInterrupt

    model = net()
    with pytest.raises(KeyboardInterrupt):
        compress(model, Interrupted(), data=[X])
    assert type(model[0]) is nn.Linear and not model[0]._forward_pre_hooks


def test_stages_are_closed_under_order():
    class Late(Method):
        stage = "cast"

        def plan(self, model, context):
            kinds = {type(m).__name__ for m in model.modules()}
            return Plan((LayerPlan("0", "keep"),), summary={"saw": ",".join(sorted(kinds))})

        def apply(self, model, plan):
            pass

    result = compress(net(), [Late(), WeightInt8()], data=[X])
    assert "StoredLinear" in result.report.summary["Late: saw"]


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.parametrize("method", [Cast(), WeightInt8()])
def test_tied_weights_stay_tied_and_are_stored_once(method, tmp_path):
    ids = torch.arange(8).reshape(2, 4)
    result = compress(TiedHead().eval(), method, data=[ids])
    assert result.report.bytes_after <= 0.51 * result.report.bytes_before
    back = quernel.load(result.save(tmp_path), model=TiedHead)
    assert torch.equal(back(ids), result.model(ids))
    assert unique_bytes(back) == result.report.bytes_after


def test_fused_attention_is_skipped_with_its_reason_and_the_result_runs():
    x = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    result = compress(model, WeightInt8(), data=[x])
    rows = {layer.name: layer for layer in result.report.layers}
    assert rows["0"].action == "int8 weight" and result.model(x).shape == x.shape
    for name in ("1.linear1", "1.linear2", "1.self_attn.out_proj"):
        assert rows[name].action == "skip" and "fused attention" in rows[name].reason


class Breaking(PerModuleMethod):
    stage = "quantise"

    def convert(self, module, stats, layer):
        return nn.Linear(3, 3)


@pytest.mark.parametrize(("inplace", "harm"), [(False, "original is unharmed"), (True, "edited in place")])
def test_a_result_that_cannot_run_is_refused_by_name(inplace, harm):
    model = net()
    with pytest.raises(QuernelError, match=f"no longer runs after Breaking.*{harm}"):
        compress(model, Breaking(), example_inputs=X, inplace=inplace)
    assert (model[0].in_features == 16) is not inplace


def test_example_inputs_go_in_whole():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)
            self.seen = []

        def forward(self, x, scale=None):
            self.seen.append(scale is not None)
            return self.linear(x)

    model = Scaled()
    compress(model, WeightInt8(), example_inputs=(X, torch.ones(1)))
    assert model.seen and all(model.seen)


def test_keyword_calls_have_their_error_measured():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 4))

        def forward(self, x):
            return self.inner(input=x)

    class Whole(PerModuleMethod):
        stage = "quantise"
        targets = (nn.Sequential,)

        def convert(self, module, stats, layer):
            return nn.Sequential(nn.Linear(16, 4))

        def apply(self, model, plan):
            model.inner = self.convert(model.inner, None, plan.layers[0])

    assert compress(Keywords().eval(), Whole(), data=[X]).report.layers[0].relative_error > 0


def test_dry_run_has_nothing_to_save(tmp_path):
    result = compress(net(), WeightInt8(), dry_run=True)
    with pytest.raises(QuernelError, match="nothing was applied"):
        result.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_recipe_gives_its_methods_back():
    methods = [WeightInt8(), Cast("float16")]
    result = compress(net(), methods, data=[X])
    assert methods_from_recipe(json.loads(json.dumps(result.recipe))) == methods


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": 99}, "version"),
        ({"version": None}, "version"),
        ({"config": {"no": 1}}, "config"),
        ({"config": 3}, "object"),
    ],
)
def test_recipes_of_another_time_are_refused(change, word):
    with pytest.raises(FormatError, match=word):
        methods_from_recipe({"methods": [Cast().describe() | change]})


def test_recipe_without_methods_is_refused():
    with pytest.raises(FormatError, match="'methods'"):
        methods_from_recipe({})


def test_simulated_methods_are_announced():
    class Simulated(WeightInt8):
        simulated = True

    assert any("Simulated is simulated" in w for w in compress(net(), Simulated()).report.warnings)
    assert not any("simulated" in w for w in compress(net(), WeightInt8()).report.warnings)


def test_generators_are_refused_at_the_door():
    with pytest.raises(QuernelError, match="list or a loader"):
        compress(net(), WeightInt8(), data=(x for x in [X]))


def test_report_names_the_processor():
    assert compress(net(), WeightInt8()).report.environment["processor"] == processor_name()


def test_a_method_that_finds_nothing_left_is_told():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    both = compress(model, [WeightInt8(), WeightInt4()], data=[torch.randn(4, 32)])
    told = [text for text in both.report.warnings if "changed nothing: no layer was left for it" in text]
    assert len(told) == 1
    assert not any("changed nothing" in text for text in compress(model, WeightInt8()).report.warnings)
