"""What a user may type for a model, and what he reads when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from quernel import models
from quernel._errors import FormatError, QuernelError
from quernel.compress import WeightInt8, compress
from quernel.models import DigitsCNN, TinyLM, _bundled
from quernel.search import FlatIndex

FACTORY = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))

def tied():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    return net

def wrong():
    return 3

def sized(width):
    return build()

number = 3
made = build()
"""


@pytest.fixture(autouse=True)
def _factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))


def _net() -> torch.nn.Module:
    return models.resolve("toy_factory:build")


def test_bundled_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = DigitsCNN(channels=(2, 2, 2))
    monkeypatch.setitem(_bundled._LOADERS, "digits-cnn", lambda progress: made)
    assert models.resolve("digits-cnn") is made
    assert not made.training


def test_names_are_documented_and_sorted() -> None:
    assert models.names() == sorted(models.names())
    with pytest.raises(QuernelError, match=r"'digits-cnn', 'minilm'.*got 'gpt'"):
        models.load("gpt")


def test_a_folder_of_an_own_class_is_taken_as_weights(tmp_path: Path) -> None:
    model = _net()
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    plain = models.save(model, tmp_path / "mine")
    torch.testing.assert_close(models.resolve("toy_factory:build", weights=plain)(x), model(x), rtol=0, atol=0)
    small = compress(model, WeightInt8())
    again = models.resolve("toy_factory:build", weights=small.save(tmp_path / "small"))
    torch.testing.assert_close(again(x), small.model(x), rtol=0, atol=0)
    with pytest.raises(QuernelError, match=r"package\.module:factory as the model, and --weights"):
        models.resolve(plain)
    FlatIndex(2).save(tmp_path / "index")
    with pytest.raises(QuernelError, match="holds a FlatIndex, not a model"):
        models.resolve("toy_factory:build", weights=tmp_path / "index")


def test_quernel_folder(tmp_path: Path) -> None:
    model = TinyLM(vocab_size=16, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=8).eval()
    loaded = models.resolve(models.save(model, tmp_path / "mine"))
    ids = torch.arange(5)[None]
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("hf") / "bert"
    config = transformers.BertConfig(vocab_size=12, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_transformers_folder_keeps_its_head(bert: Path) -> None:
    before = torch.get_rng_state()
    model = models.resolve(bert)
    assert torch.equal(before, torch.get_rng_state())
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model(torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 3)
    saved = load_file(bert / "model.safetensors")
    assert torch.equal(model.state_dict()["classifier.weight"], saved["classifier.weight"])


def test_truncated_transformers_folder_names_the_file(bert: Path, tmp_path: Path) -> None:
    for file in bert.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:-50] if file.suffix == ".safetensors" else content)
    with pytest.raises(FormatError, match=r"model\.safetensors.*truncated"):
        models.resolve(tmp_path)


def test_folder_without_weights_or_config(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"neither config\.json nor modules\.json"):
        models.resolve(tmp_path)
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    with pytest.raises(FormatError, match="transformers cannot open it"):
        models.resolve(tmp_path)


def test_factory_with_weights(tmp_path: Path) -> None:
    trained = _net()
    file = tmp_path / "trained.safetensors"
    save_file(trained.state_dict(), file)
    model = models.resolve("toy_factory:build", file)
    assert not model.training
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_model_itself_may_be_named() -> None:
    assert isinstance(models.resolve("toy_factory:made"), torch.nn.Module)


def test_tied_weights_stored_once_are_tied_again(tmp_path: Path) -> None:
    trained = models.resolve("toy_factory:tied")
    save_model(trained, tmp_path / "tied.safetensors")
    assert len(load_file(tmp_path / "tied.safetensors")) == 1
    model = models.resolve("toy_factory:tied", tmp_path / "tied.safetensors")
    assert model[0].weight is model[1].weight  # type: ignore[index]
    assert torch.equal(model[0].weight, trained[0].weight)  # type: ignore[index]


def test_wrong_architecture_lists_the_first_differences(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(5, 4), "0.bias": torch.zeros(3), "9.weight": torch.zeros(1)}, file)
    with pytest.raises(FormatError) as caught:
        models.resolve("toy_factory:build", file)
    for part in (str(file), "2.weight is missing", "2.bias is missing", "9.weight is unexpected", "(5, 4)", "(3, 4)"):
        assert part in str(caught.value)
    save_file({f"layer{i}.weight": torch.zeros(1) for i in range(9)}, file)
    with pytest.raises(FormatError, match="and 8 more"):
        models.resolve("toy_factory:build", file)


def test_truncated_missing_or_foreign_weights(tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    save_file(_net().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"cut\.safetensors.*truncated"):
        models.resolve("toy_factory:build", file)
    with pytest.raises(FormatError, match=r"none\.safetensors: the file is missing"):
        models.resolve("toy_factory:build", tmp_path / "none.safetensors")
    with pytest.raises(QuernelError, match=r"must be a \.safetensors file.*weights\.pt"):
        models.resolve("toy_factory:build", tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-model", "bundled name .*folder.*got 'no-such-model'"),
        ("no_such_module:build", "cannot import 'no_such_module'.*PYTHONPATH"),
        ("toy_factory:absent", "has no function 'absent'"),
        ("toy_factory:number", "has no function 'number'"),
        ("toy_factory:sized", "must be a function that needs no arguments: missing a required argument: 'width'"),
        ("toy_factory:wrong", r"must give an nn\.Module; got int"),
        (":build", "'' of model ':build' is no name of a module"),
        ("./nofolder:build", "'./nofolder' of model './nofolder:build' is no name of a module"),
    ],
)
def test_wrong_sources(source: str, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        models.resolve(source)


def test_only_modules_are_saved(tmp_path):
    with pytest.raises(QuernelError, match=r"model must be an nn\.Module; got Pipeline\. Estimators have a save"):
        models.save(make_pipeline(StandardScaler()), tmp_path)
