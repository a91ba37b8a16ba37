"""Folders of transformers and sentence-transformers: compressed, saved, loaded with one call, used as before."""

import json

import pytest
import torch

import quernel
from quernel.compress import DGQ, CrossQuant, WeightInt8, compress
from quernel.models import resolve

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "plot"]
# int8 codes of a random net of two layers; its scores are below 1.
INT8_ERROR = 0.05
# Four bits have 16 times the step.
INT4_ERROR = 0.2


def save_tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), **size)
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def scores(model, folder):
    run = transformers.pipeline("text-classification", model=model, tokenizer=str(folder), top_k=None)
    return {found["label"]: found["score"] for found in run("a good film")[0]}


def test_a_transformers_folder_stays_one(classifier_folder, tmp_path):
    model = resolve(classifier_folder)
    before = scores(model, classifier_folder)
    ids = torch.randint(5, len(WORDS), (4, 7), generator=torch.Generator().manual_seed(0))
    result = compress(model, CrossQuant(), data=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    saved = result.save(tmp_path / "small")

    loaded = quernel.load(saved)  # one call
    assert type(loaded).__name__ == "BertForSequenceClassification"
    after = scores(loaded, saved)  # the tokenizer came along
    assert after == pytest.approx(scores(result.model, saved))
    assert after == pytest.approx(before, abs=INT8_ERROR)
    assert json.loads((saved / "config.json").read_text())["model_type"] == "bert"
    # What was loaded can be saved again, tokenizer included.
    again = compress(loaded, WeightInt8()).save(tmp_path / "again")
    assert scores(quernel.load(again), again) == pytest.approx(after, abs=INT8_ERROR)


def test_four_bits_serve_in_a_pipeline(classifier_folder, tmp_path):
    model = resolve(classifier_folder)
    before = scores(model, classifier_folder)
    ids = torch.randint(5, len(WORDS), (4, 40), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    # Layers of 32 inputs would grow in 4 bits: rows are padded.
    result = compress(model, DGQ(grid=(2, 6)), data=data)
    assert result.report.summary["4-bit layers"] >= 1
    saved = result.save(tmp_path / "small")
    loaded = quernel.load(saved)
    assert any(type(m).__name__ == "W4A8Linear" for m in loaded.modules())
    assert scores(loaded, saved) == pytest.approx(scores(result.model, saved))
    assert scores(loaded, saved) == pytest.approx(before, abs=INT4_ERROR)


@pytest.mark.slow
def test_a_sentence_transformer_still_encodes(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    from quernel.models._sentence_folder import minilm_folder

    def fresh():
        return library.SentenceTransformer(str(minilm_folder()), device="cpu")

    sentences = ["A man plays a guitar.", "The stock fell."]
    model = fresh()
    before = model.encode(sentences, convert_to_tensor=True)
    result = compress(model, WeightInt8())
    after = result.model.encode(sentences, convert_to_tensor=True)
    assert torch.cosine_similarity(before, after).min() > 0.995
    assert result.report.bytes_after < 0.3 * result.report.bytes_before
    loaded = quernel.load(result.save(tmp_path / "small"), model=fresh)
    torch.testing.assert_close(loaded.encode(sentences, convert_to_tensor=True), after)
