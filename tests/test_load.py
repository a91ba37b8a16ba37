"""What a folder gives back: exact layers, models within wrappers, transformers without foreign code, old formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quernel
from quernel import models
from quernel._errors import FormatError
from quernel._io import CONFIG, digest_of
from quernel._load import load, save_model
from quernel.compress import Roast, WeightInt8, compress
from quernel.nn import (
    RoastEmbedding,
    RoastLinear,
    RobeArray,
    RobeEmbedding,
    SharedArray,
    StoredConv2d,
    StoredEmbedding,
    StoredLinear,
    scale_memory_gradients,
)
from quernel.nn.hashed._memory import readers_of, slot_sums
from quernel.nn.weights import DenseWeight, Int8Weight

V1 = Path(__file__).parent / "data" / "format-v1"
TINY_BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 50,
}


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the subtree of a saved folder and give it a digest that matches."""
    document = json.loads((folder / CONFIG).read_text())
    subtree = document["quernel"]
    change(subtree)
    subtree["digest"] = digest_of({k: v for k, v in subtree.items() if k != "digest"})
    (folder / CONFIG).write_text(json.dumps(document))


def test_model_within_a_wrapper_is_compressed_and_comes_back(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(models.DigitsCNN(), nn.Linear(10, 4))

    x = torch.randn(2, *next(iter(_digits_input())).shape[1:])
    result = compress(build().eval(), WeightInt8())
    folder = result.save(tmp_path / "saved")
    back = load(folder, model=build)
    assert any(isinstance(module, StoredLinear | StoredConv2d) for module in back[0].modules())
    with torch.no_grad():
        assert torch.equal(back(x), result.model(x))


def _digits_input() -> tuple[torch.Tensor, ...]:
    from quernel._registry import example_of

    return example_of(models.DigitsCNN)["input"](torch.Generator().manual_seed(0))


def test_layers_of_an_unknown_architecture_come_back_exactly(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(9, 4, padding_idx=2, max_norm=1.0, norm_type=1.0, scale_grad_by_freq=True, sparse=True),
            nn.Conv1d(3, 2, 2, padding="same", padding_mode="circular", bias=False),
            nn.BatchNorm1d(2, momentum=None, track_running_stats=False),
        )

    model = build()
    save_model(model, tmp_path)
    given = build()
    held = list(given)
    assert all(back is own for back, own in zip(load(tmp_path, model=given), held, strict=True))
    other = nn.Sequential(nn.Embedding(9, 5), nn.Linear(2, 2), nn.Identity())
    for back, own in zip(load(tmp_path, model=other), model, strict=True):
        assert type(back) is type(own) and back.extra_repr() == own.extra_repr()
    assert other[0].max_norm == 1.0 and other[0].norm_type == 1.0 and other[0].sparse


def test_tied_modules_stay_tied_after_the_tenth(tmp_path: Path) -> None:
    def build(layer: Callable[[], nn.Module]) -> nn.Sequential:
        return nn.Sequential(*(layer() for _ in range(11)))

    model = build(lambda: nn.Linear(3, 3))
    model[10] = model[2]
    save_model(model, tmp_path)
    back = load(tmp_path, model=lambda: build(nn.Identity))
    assert back[10] is back[2] and torch.equal(back[2].weight, model[2].weight)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: m["0"]["config"].update(padding_mode="sideways"), "modules.0"),
        (lambda m: m["0"]["config"].update(stride=[1]), "modules.0"),
        (lambda m: m["1"]["config"].update(eps="1e-5"), "modules.1"),
        (lambda m: m["1"]["config"].pop("eps"), "modules.1"),
        (lambda m: m["2"]["config"]["weight"]["config"].update(shape=[64]), "modules.2"),
        (lambda m: m["2"]["config"]["weight"].update({"class": "os.system"}), "modules.2"),
        (lambda m: m["2"]["config"].update({"extra": 1}), "modules.2"),
        (lambda m: m["2"].update({"config": None}), "modules.2"),
        (lambda m: m.update({"": {"class": "torch.Identity", "config": {}}}), "modules."),
        (lambda m: m.update({"2.weight": {"class": "torch.Identity", "config": {}}}), "modules.2.weight"),
        (lambda m: m.update({"0": {"alias": ""}}), "modules.0"),
    ],
)
def test_wrong_values_under_a_matching_digest_name_file_and_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], field: str
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), StoredLinear(DenseWeight((2, 2), "float32")))

    save_model(build(), tmp_path)
    forge(tmp_path, lambda subtree: change(subtree["content"]["modules"]))
    with pytest.raises(FormatError, match=field.replace(".", r"\.")) as caught:
        load(tmp_path, model=build)
    assert str(caught.value).startswith(str(tmp_path / CONFIG))


def test_aliases_of_another_type_are_refused(tmp_path: Path) -> None:
    save_model(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    for aliases in ({"x": [1]}, {"x": None}, {"0.bias": "0.weight"}):
        forge(tmp_path, lambda subtree, value=aliases: subtree["tensors"].update(aliases=value))
        with pytest.raises(FormatError, match="aliases"):
            load(tmp_path, model=lambda: nn.Sequential(nn.Linear(2, 2)))


def test_floats_may_differ_in_precision_but_not_in_kind(tmp_path: Path) -> None:
    def build(dtype: torch.dtype) -> nn.Module:
        model = nn.Module()
        model.register_buffer("table", torch.ones(3, dtype=dtype))
        return model

    save_model(build(torch.float16), tmp_path)
    assert load(tmp_path, model=lambda: build(torch.float32)).table.dtype == torch.float16
    for wanted in (torch.int8, torch.bool, torch.complex64):
        with pytest.raises(FormatError, match=r"table has dtype torch\.float16"):
            load(tmp_path, model=lambda wanted=wanted: build(wanted))
    save_model(build(torch.int32), tmp_path)
    with pytest.raises(FormatError, match=r"table has dtype torch\.int32, the model expects torch\.int64"):
        load(tmp_path, model=lambda: build(torch.int64))


def test_transformers_model_with_many_labels(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**TINY_BERT, num_labels=12)
    model = transformers.BertForSequenceClassification(config).eval()
    save_model(model, tmp_path)
    back, ids = load(tmp_path), torch.arange(6).reshape(1, 6)
    assert back.config.id2label[11] == "LABEL_11"
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)
    assert type(transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize(
    ("asked", "got"), [("eager", "eager"), ("sdpa", "sdpa"), ("someone/kernel", "sdpa"), (7, "sdpa")]
)
def test_a_file_chooses_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, got: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.integrations import hub_kernels

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel of a hub was asked for")

    monkeypatch.setattr(hub_kernels, "get_kernel", forbidden, raising=False)
    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", forbidden, raising=False)
    save_model(transformers.BertModel(transformers.BertConfig(**TINY_BERT)), tmp_path)

    def change(subtree: dict[str, Any]) -> None:
        architecture = subtree["content"]["architecture"]
        architecture["attention"] = asked
        architecture["config"] |= {
            "attn_implementation": "someone/kernel",
            "_attn_implementation": "someone/kernel",
            "_attn_implementation_internal": "someone/kernel",
            "experts_implementation": "someone/kernel",
            "auto_map": {"AutoConfig": "someone/code--config.Config"},
            "use_kernels": True,
            "kernel_config": {"x": "someone/kernel"},
            "backbone": "someone/backbone",
        }

    forge(tmp_path, change)
    config = load(tmp_path).config
    assert config._attn_implementation == got
    assert not any(hasattr(config, name) for name in ("auto_map", "use_kernels", "kernel_config", "backbone"))


def test_resolve_and_sentence_encoder_choose_no_code_either(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertModel(transformers.BertConfig(**TINY_BERT)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_attn_implementation": "someone/kernel"}))
    assert models.resolve(tmp_path).config._attn_implementation == "sdpa"
    asked = TINY_BERT | {
        "model_type": "bert",
        "attn_implementation": "someone/kernel",
        "auto_map": {"AutoModel": "a--b"},
    }
    model = models.SentenceEncoder.from_config({"encoder": asked})
    assert model.encoder.config._attn_implementation == "sdpa" and "auto_map" not in model.config()["encoder"]


def v1_architecture() -> nn.Sequential:
    """Return the uncompressed architecture of the folder ``data/format-v1``."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    )
    model[4].weight = model[3].weight
    return model


def v1_input() -> torch.Tensor:
    return torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)


# What the model gave when the folder was written, on x86-64 with torch 2.13.
V1_OUTPUT = [
    [-6.85892, -5.1216, -2.78811, -0.13007, 2.54311, 4.92026],
    [-3.7531, -0.99073, 1.88695, 4.54499, 6.67398, 8.02608],
]
# Other processors sum in another order.
V1_SAME = {"rtol": 1e-4, "atol": 1e-5}


def test_format_1_still_loads() -> None:
    """The folder ``data/format-v1`` was written by this script, by the version whose format it shows::

    model = v1_architecture()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).sin().reshape(parameter.shape))
    model[2] = StoredLinear(Int8Weight.from_dense(model[2].weight), model[2].bias)
    save_model(model, V1)
    """
    assert json.loads((V1 / CONFIG).read_text())["quernel"]["format"] == 1
    model = load(V1, model=v1_architecture)
    assert isinstance(model[2], StoredLinear) and isinstance(model[2].weight, Int8Weight)
    assert model[4].weight is model[3].weight
    with torch.no_grad():
        torch.testing.assert_close(model(v1_input()), torch.tensor(V1_OUTPUT), **V1_SAME)


@pytest.mark.parametrize("layer", [StoredConv2d, StoredEmbedding])
def test_stored_layers_keep_their_fields(tmp_path: Path, layer: type[nn.Module]) -> None:
    if layer is StoredConv2d:
        module: nn.Module = StoredConv2d(DenseWeight((2, 1, 3, 3), "float32"), padding="same", padding_mode="reflect")
    else:
        module = StoredEmbedding(DenseWeight((4, 2), "float32"), padding_idx=1)
    save_model(nn.Sequential(module), tmp_path)
    back = load(tmp_path, model=lambda: nn.Sequential(nn.Identity()))[0]
    assert type(back) is layer and back.config() == module.config()


def test_moved_folder_keeps_its_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "plays"]))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert transformers.__version__
    encoder = TINY_BERT | {"model_type": "bert"}
    model = models.SentenceEncoder(encoder, tokenizer=str(source)).eval()
    wanted = model.encode(["a man plays"])
    saved = models.save(model, tmp_path / "saved")
    assert str(tmp_path) not in (saved / CONFIG).read_text()
    moved = saved.rename(tmp_path / "moved")
    shutil.rmtree(source)
    back = quernel.load(moved)
    assert torch.equal(back.encode(["a man plays"]), wanted)
    # Over itself: the tokenizer is read from the folder that is being replaced.
    again = quernel.load(models.save(back, moved))
    assert torch.equal(again.encode(["a man plays"]), wanted) and len(list(moved.glob("files-*"))) == 1
    vocabulary = next(moved.glob("files-*")) / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("man", "men"))
    with pytest.raises(FormatError, match=r"vocab\.txt.*sha256"):
        quernel.load(moved)
    models.save(models.SentenceEncoder(encoder), moved)
    assert not list(moved.glob("files-*"))


def test_a_file_cannot_place_the_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = models.SentenceEncoder(TINY_BERT | {"model_type": "bert"})
    folder = models.save(model, tmp_path / "saved")
    forge(folder, lambda subtree: subtree["content"]["architecture"]["config"].update(tokenizer=str(tmp_path)))
    assert quernel.load(folder).tokenizer_source is None
    forge(folder, lambda subtree: subtree.update(files={"folder": "..", "sha256": {}}))
    with pytest.raises(FormatError, match=r"quernel\.files\.folder"):
        quernel.load(folder)


def two_readers() -> tuple[nn.Sequential, Callable[[], nn.Sequential]]:
    """Return a table and a head of one view, beside a layer over the same array, and what builds their places."""
    memory = SharedArray(400, seed=2)
    head = RoastLinear(16, 50, False, memory=memory, tile=(8, 8))
    model = nn.Sequential(RoastEmbedding.over(head.weight), RoastLinear(16, 16, memory=memory, tile=(8, 8)), head)
    return model, lambda: nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())


def test_what_is_shared_within_layers_is_one_object_again(tmp_path: Path) -> None:
    model, build = two_readers()
    back = load(save_model(model, tmp_path), model=build)
    assert back[0].weight is back[2].weight and back[1].weight is not back[2].weight
    assert back[0].memory is back[1].memory is back[2].memory
    # Tied rows count once, as they did.
    for before, after in zip(slot_sums(readers_of(model), 400), slot_sums(readers_of(back), 400), strict=True):
        assert torch.equal(before, after)
    x = torch.randn(2, 16)
    for one in (model, back):
        scale_memory_gradients(one)
        one[2](one[1](x)).square().sum().backward()
    torch.testing.assert_close(back[0].memory.values.grad, model[0].memory.values.grad)
    dense = Roast.to_dense(back)
    assert dense[0].weight is dense[2].weight and len(list(dense.parameters())) == 3
    # Whichever reader is asked, the next one gets a seed that no other has.
    seeds = [back[place].memory.next_seed() for place in (0, 1, 2)]
    assert len({*seeds, *(back[place].weight.mapped.seed for place in (1, 2))}) == 5
    again = load(save_model(back, tmp_path / "again"), model=build)
    assert again[0].weight is again[2].weight and again[1].memory.readers == 5


def test_an_array_that_the_model_names_itself_stays_the_readers(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = RobeArray(60, seed=3)
            self.user, self.item = (RobeEmbedding(9, 4, memory=self.memory, field=f) for f in (0, 1))

    model = Named()
    back = load(save_model(model, tmp_path), model=Named)
    assert back.memory is back.user.memory is back.item.memory
    assert torch.equal(back.memory.values, model.memory.values)


def test_layers_of_a_model_share_their_array_again(tmp_path: Path) -> None:
    model = models.PairConnectLM(20, 8, layers=2, window=3, rows=50, storage="robe", size=90, sparse=False)
    back = load(models.save(model, tmp_path))
    first, second = (mixer.table.views.memory for mixer in back.mixers)
    assert first is second and len(list(back.parameters())) == len(list(model.parameters()))


def test_folders_that_name_nothing_shared_load_as_before(tmp_path: Path) -> None:
    model, build = two_readers()
    save_model(model, tmp_path)
    forge(tmp_path, lambda subtree: subtree["content"].pop("shared"))
    back, ids = load(tmp_path, model=build), torch.arange(50)
    assert torch.equal(back(ids), model(ids)) and back[0].memory.values is back[2].memory.values


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        ([], r"'quernel\.content\.shared' must be an object; got \[\]"),
        (
            {"2.weight": "1.weight"},
            r"shared\.2\.weight' does not fit: QuernelError: it is HashedTileWeight.*'1\.weight'",
        ),
        ({"2.weight": "0.memory"}, r"shared\.2\.weight' does not fit"),
        ({"2.weight": "7"}, r"shared\.2\.weight' does not fit"),
        ({"2.weight": ["0"]}, r"shared\.2\.weight' does not fit"),
        ({"2.weights": "0.weight"}, r"shared\.2\.weights' does not fit"),
    ],
)
def test_what_cannot_be_shared_is_named(tmp_path: Path, shared: Any, message: str) -> None:
    model, build = two_readers()
    save_model(model, tmp_path)
    forge(tmp_path, lambda subtree: subtree["content"].update(shared=shared))
    with pytest.raises(FormatError, match=message):
        load(tmp_path, model=build)
