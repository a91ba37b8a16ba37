"""``convert``: token mixers in the place of convolutions and of MiniLM's attention, and the report of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quernel
from quernel._errors import QuernelError
from quernel.compress import _measure, convert, methods_from_recipe
from quernel.models import MetaNeXt, MiniLM
from quernel.nn import ChannelsFirst, EncoderMixer, InceptionDWConv2d, SoftmaxAttention, make_mixer
from quernel.nn.weights import unique_bytes

# float32 sums of some hundred terms through some layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TINY: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 64,
}  # fmt: skip
TOKENS = {
    "input_ids": torch.arange(18).view(2, 9) % 64,
    "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
}


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here reads a latency closely."""
    monkeypatch.setattr(_measure, "LATENCY_SECONDS", 0.05)


def is_depthwise(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (7, 7)


def convnext() -> MetaNeXt:
    """A small net whose mixers are depthwise 7x7 convolutions."""
    torch.manual_seed(0)
    return MetaNeXt(
        (1, 2), (16, 32), lambda dim: nn.Conv2d(dim, dim, 7, padding=3, groups=dim), num_classes=5, stem_stride=2,
        ls_init=1.0,
    ).eval()  # fmt: skip


def minilm() -> MiniLM:
    """A small encoder whose attention is far from uniform."""
    torch.manual_seed(0)
    net = MiniLM(TINY).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "attention" in name and parameter.ndim == 2:
                parameter.mul_(20.0)
    return net


def same_attention(attention: Any) -> nn.Module:
    """Put the weights of an encoder's attention into ``SoftmaxAttention``, the projection behind it included."""
    old, mixer = attention.self, SoftmaxAttention(32, 4)
    parts = (old.query, old.key, old.value)
    mixer.qkv.weight = nn.Parameter(torch.cat([p.weight for p in parts]).detach())
    mixer.qkv.bias = nn.Parameter(torch.cat([p.bias for p in parts]).detach())
    mixer.proj = attention.output.dense
    attention.self, attention.output.dense = EncoderMixer(mixer), nn.Identity()
    return attention  # type: ignore[no-any-return]


def is_attention(name: str, module: nn.Module) -> bool:
    return name.endswith(".attention")


def timed_or_told(report: Any) -> bool:
    """Whether there is a latency, or a line that says why not."""
    return report.latency_ms_before is not None or any("latency not measured" in line for line in report.warnings)


def test_depthwise_convolutions_become_inception_mixers(tmp_path: Any) -> None:
    net, x = convnext(), torch.randn(2, 3, 32, 32)
    wanted = net(x).detach()
    result = convert(net, is_depthwise, lambda old: ChannelsFirst(InceptionDWConv2d(old.in_channels)), data=[x])
    report = result.report
    assert torch.equal(net(x), wanted) and not any(is_depthwise(n, m) for n, m in result.model.named_modules())
    rows = {layer.name: layer for layer in report.layers if not layer.untouched}
    assert list(rows) == [f"stages.{place}.token_mixer" for place in ("0.blocks.0", "1.blocks.0", "1.blocks.1")]
    first = rows["stages.0.blocks.0.token_mixer"]
    assert (first.kind, first.action) == ("Conv2d", "InceptionDWConv2d")
    assert (first.bytes_before, first.bytes_after) == (4 * 16 * 50, 4 * (2 * 31 + 6))
    # Two images of 16 x 16 places: 49 products a channel, then 31 on an eighth of them and biases.
    assert first.details == {"FLOPs before": 2 * 512 * 16 * 49, "FLOPs after": 512 * (2 * 2 * 31 + 6)}
    assert first.relative_error is not None and first.relative_error > 0.1  # another function until it is trained
    assert report.bytes_before == unique_bytes(net) and report.bytes_after == unique_bytes(result.model)
    # Blocks hold gamma and other layers; no byte is counted twice.
    assert sum(layer.bytes_before for layer in report.layers) == report.bytes_before
    assert sum(layer.bytes_after for layer in report.layers) == report.bytes_after
    block = next(layer for layer in report.layers if layer.name == "stages.0.blocks.0")
    assert (block.kind, block.action, block.bytes_before, block.bytes_after) == ("MetaNeXtBlock", "keep", 64, 64)
    saved = sum(row.details["FLOPs before"] - row.details["FLOPs after"] for row in rows.values())
    assert report.summary["FLOPs before"] - report.summary["FLOPs after"] == saved > 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert report.summary["FLOPs before"] == counter.get_total_flops()
    assert timed_or_told(report)
    result.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(quernel.load(tmp_path)(x), result.model(x))


def test_a_convolution_that_is_an_inception_mixer_keeps_its_function() -> None:
    torch.manual_seed(0)
    net = MetaNeXt((1, 1), (16, 32), "inception", num_classes=5, stem_stride=2, ls_init=1.0).eval()
    x = torch.randn(2, 3, 32, 32)
    whole = convert(net, InceptionDWConv2d, lambda old: old.to_depthwise(), example_inputs=x)
    torch.testing.assert_close(whole.model(x), net(x), **CLOSE)

    def back(old: Any) -> nn.Module:
        fit = InceptionDWConv2d.from_depthwise(old)
        assert fit.permutation.tolist() == list(range(old.in_channels)) and fit.error < 1e-12
        return ChannelsFirst(fit.mixer)

    result = convert(whole.model, lambda name, m: name.endswith("token_mixer"), back, example_inputs=x)
    torch.testing.assert_close(result.model(x), net(x), **CLOSE)
    errors = [layer.relative_error for layer in result.report.layers if not layer.untouched]
    assert len(errors) == 2 and max(errors) < 1e-5
    assert result.report.bytes_after == unique_bytes(net)


def test_the_attention_of_minilm_becomes_the_same_mixer(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    net = minilm()
    with torch.no_grad():
        wanted = net(**TOKENS)
    result = convert(
        net,
        is_attention,
        same_attention,
        data=[TOKENS],
        evaluate=lambda m: float((m(**TOKENS).detach() * wanted).sum()),
    )
    report = result.report
    assert sum(isinstance(m, SoftmaxAttention) for m in result.model.modules()) == 2
    with torch.no_grad():
        torch.testing.assert_close(result.model(**TOKENS), wanted, **CLOSE)
    assert report.metric_before == pytest.approx(2.0) and report.metric_after == pytest.approx(2.0)
    errors = [layer.relative_error for layer in report.layers if not layer.untouched]
    assert len(errors) == 2 and max(errors) < 1e-5
    # Nothing but the order of the weights has changed, and products of attention are counted on both sides.
    assert report.bytes_before == report.bytes_after
    assert report.summary["FLOPs before"] == report.summary["FLOPs after"]
    layer = next(row for row in report.layers if not row.untouched)
    assert layer.details["FLOPs before"] == 2 * (8 * 9 * 32 * 32 + 4 * 9 * 9 * 32)
    assert timed_or_told(report)
    result.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(quernel.load(tmp_path)(**TOKENS), result.model(**TOKENS))


@pytest.mark.parametrize(
    ("mixer", "options"),
    [("nalaformer", {"num_heads": 4, "lepe": None}), ("InceptionDWConv1d", {})],
)
def test_the_attention_of_minilm_becomes_another_mixer(mixer: str, options: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    net, trained = minilm(), []
    result = convert(
        net,
        lambda name, m: name.endswith("attention.self"),
        lambda old: EncoderMixer(make_mixer(mixer, 32, **options)),
        example_inputs=TOKENS,
        finetune=trained.append,
    )
    assert trained == [result.model]
    rows = [layer for layer in result.report.layers if not layer.untouched]
    made = make_mixer(mixer, 32, **options)
    assert [row.details["FLOPs after"] for row in rows] == [made.flops((2, 9, 32))] * 2
    assert [row.action for row in rows] == [type(made).__name__] * 2
    assert all(row.relative_error is not None and row.relative_error > 0.1 for row in rows)
    # Padding still counts for nothing.
    with torch.no_grad():
        alone = result.model(TOKENS["input_ids"][1:, :6])
        torch.testing.assert_close(result.model(**TOKENS)[1:], alone, **CLOSE)


def test_without_data_sizes_alone_are_reported() -> None:
    result = convert(convnext(), is_depthwise, lambda old: ChannelsFirst(InceptionDWConv2d(old.in_channels)))
    assert result.report.summary == {} and result.report.latency_ms_before is None
    assert result.report.bytes_after < result.report.bytes_before
    assert methods_from_recipe(result.recipe) == []
    assert set(result.recipe["converted"].values()) == {"InceptionDWConv2d"}


def test_a_bare_mixer_is_not_fed_what_is_not_its_own() -> None:
    result = convert(
        convnext(),
        is_depthwise,
        lambda old: InceptionDWConv2d(old.in_channels),
        example_inputs=torch.randn(1, 3, 32, 32),
    )
    assert all(layer.relative_error is None for layer in result.report.layers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: convert(convnext(), nn.LSTM, lambda old: old), "match finds nothing"),
        (lambda x: convert("net", nn.LSTM, lambda old: old), "model must be a torch.nn.Module; got str"),
        (
            lambda x: convert(convnext(), is_depthwise, lambda old: nn.Conv2d(3, 3, 1), example_inputs=x),
            "no longer runs after MetaNeXt: 3 Conv2d to Conv2d",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(torch.randn(1, 3, 32, 32))


def test_fused_layers_of_torch_are_counted_by_their_parts() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    net, x = nn.Sequential(layer, nn.Linear(16, 3)).eval(), torch.randn(2, 5, 16)
    report = convert(net, lambda name, m: name == "1", lambda old: nn.Identity(), example_inputs=x).report
    attention, perceptron = 10 * 8 * 16 * 16 + 2 * 4 * 5 * 5 * 16, 10 * 4 * 16 * 24
    assert report.summary["FLOPs after"] == attention + perceptron
    assert report.summary["FLOPs before"] == attention + perceptron + 10 * 2 * 16 * 3
    assert torch.backends.mha.get_fastpath_enabled()
    # Another width cannot be compared.
    assert [(row.action, row.relative_error) for row in report.layers if not row.untouched] == [("Identity", None)]


def test_what_a_mixer_says_is_counted_once() -> None:
    mixer = SoftmaxAttention(8, 2)
    net, x = nn.Sequential(mixer, nn.Linear(8, 8), mixer).eval(), torch.randn(2, 5, 8)
    report = convert(net, nn.Linear, lambda old: old, example_inputs=x).report
    assert report.summary["FLOPs before"] == 2 * mixer.flops((2, 5, 8)) + 2 * 10 * 64
