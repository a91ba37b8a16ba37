"""The list of sets is well formed, and every parser reads what its format promises."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

from quernel import data
from quernel._errors import DataError
from quernel.data import _catalogue, checkpoints, images, retrieval, tables, text


@pytest.mark.parametrize("name", data.names())
def test_set_is_described_and_checksummed(name: str) -> None:
    item = _catalogue._SETS[name]
    assert item.summary
    assert item.licence
    assert item.origin
    given = {split for source in item.sources for split in source.files}
    assert given == set(item.splits)
    for source in item.sources:
        for files in source.files.values():
            for file in files:
                assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
                assert not file.path.startswith("/")
                assert ".." not in file.path
                assert not file.url or file.url.startswith("https://")


def test_info_tells_what_is_present(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("QUERNEL_DATA", str(tmp_path))
    monkeypatch.setenv("QUERNEL_CACHE", str(tmp_path))
    info = data.info("fashion-mnist")
    assert info.splits == ("train", "test")
    assert info.present == ()
    assert info.downloadable
    assert "fashion_mnist/t10k-labels-idx1-ubyte.gz" in info.files
    assert data.info("digits").present == ("train", "validation", "test")
    assert not data.info("mnist").downloadable


def test_digits_are_dealt_out_completely_and_in_balance() -> None:
    splits = {split: data.load("digits", split=split) for split in ("train", "validation", "test")}
    assert [len(s) for s in splits.values()] == [899, 449, 449]
    for split in splits.values():
        assert split.x.shape[1:] == (8, 8)
        assert split.x.dtype == np.uint8
        assert split.x.max() == 16
        assert np.bincount(split.y, minlength=10).min() > 0.08 * len(split)
    together = np.concatenate([s.x.reshape(-1, 64) for s in splits.values()])
    assert len(together) == 1797


def _idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def test_idx_round_trip() -> None:
    x, y = np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([7, 1], np.uint8)
    found = images._idx_pair(tuple("0123456789"))("train", _idx(x), _idx(y))
    np.testing.assert_array_equal(found.x, x)
    np.testing.assert_array_equal(found.y, [7, 1])
    assert found.x.flags.writeable


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip",
        gzip.compress(b"\0\0", mtime=0),
        gzip.compress(b"\0\0\x0d\x01\0\0\0\x01x", mtime=0),
        _idx(np.zeros(9, np.uint8))[:-9],
    ],
    ids=["empty", "not-gzip", "two-bytes", "wrong-shape", "cut-short"],
)
def test_idx_refuses_other_bytes(content: bytes) -> None:
    with pytest.raises(DataError, match="IDX"):
        images._idx(content)


def _npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def test_lossless_halves_are_disjoint() -> None:
    x = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    content = _npz(images=x, labels=np.arange(6, dtype=np.uint8))
    fit, judge = (images._cifar_lossless(split, content) for split in ("calibration", "test"))
    assert fit.y.tolist() == [0, 1, 2]
    assert judge.y.tolist() == [3, 4, 5]
    assert "training images" in judge.note
    assert "Pillow" in images._cifar_decoded("test", content).note


def test_text_parsers() -> None:
    pairs = text._pairs("dev", b'"Yes, a dog.",A cat.,3.8\r\n"Two\nlines",B,0.0\r\n')
    assert pairs.first == ("Yes, a dog.", "Two\nlines")
    assert pairs.score.tolist() == pytest.approx([3.8, 0.0])
    labelled = text._labelled("dev", gzip.compress(b"sentence\tlabel\nbad \t0\ngood film \t1\n"))
    assert labelled.text == ("bad", "good film")
    assert labelled.y is not None
    assert labelled.y.tolist() == [0, 1]
    words = text._wikitext("test", b" \n = A b = \n")
    assert words.words == ("<eos>", "=", "A", "b", "=", "<eos>")


def test_collections_have_their_judgements() -> None:
    corpus = b'{"_id": "7", "title": "a b", "text": "a b c"}\n{"_id": "3", "title": "t", "text": "u"}\n'
    corpus += b'{"_id": "9", "title": "", "text": ""}\n'
    queries = b'{"_id": "1", "text": "q"}\n{"_id": "2", "text": "r"}\n'
    header = b"query-id\tcorpus-id\tscore\n"
    found = retrieval._collection("all", gzip.compress(corpus), queries, header + b"2\t9\t1\n2\t7\t-1\n2\t9\t3\n")
    assert found.documents == ("a b c", "t u", "")
    assert (found.queries, [r.tolist() for r in found.relevant], len(found)) == (("q", "r"), [[], [0, 2]], 2)
    with pytest.raises(DataError, match="document '8'"):
        retrieval._collection("all", gzip.compress(corpus), queries, header + b"1\t8\t1\n")


def test_shakespeare_splits_join_to_the_whole() -> None:
    whole = "".join(chr(33 + i % 90) for i in range(1003))
    parts = [text._shakespeare(s, whole.encode()).text for s in ("train", "validation", "test")]
    assert "".join(parts) == whole
    assert [len(p) for p in parts] == [902, 50, 51]


def test_brown_reads_documents_only() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("brown/README", "not/a document/b")
        archive.writestr("brown/ca02", "B/x ./.\n")
        archive.writestr("brown/ca01", "\n\n\tA/at 1/2/cd\n\n")
    assert text._brown("all", stream.getvalue()).words == ("A", "1/2", "<eos>", "B", ".", "<eos>")


def test_llama2c_tensors_stand_in_order() -> None:
    sizes = {"dim": 4, "hidden_dim": 6, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 3, "seq_len": 5}
    count = 3 * 4 + 2 * 4 + 2 * (16 + 8 + 8 + 16) + 2 * 4 + 3 * 2 * 24 + 4
    weights = struct.pack("<7i", *sizes.values()) + np.arange(count + 10, dtype="<f4").tobytes()
    pieces = b"".join(struct.pack("<fi", score, len(p)) + p for p, score in ((b"a", 0.0), (b"", -1.0), (b"bc", 2.0)))
    found = checkpoints._llama2c("all", weights, struct.pack("<i", 2) + pieces)
    assert found.config == sizes
    assert found.vocabulary == ((b"a", 0.0), (b"", -1.0), (b"bc", 2.0))
    assert found.tensors["wk"].shape == (2, 2, 4)
    assert found.tensors["norm"].tolist() == [count - 4, count - 3, count - 2, count - 1]
    with pytest.raises(DataError, match="tokenizer"):
        checkpoints._llama2c("all", weights, struct.pack("<i", 2) + pieces + b"x")


def test_checkpoint_names_lose_the_wrapper() -> None:
    stream = io.BytesIO()
    torch.save({"state_dict": {"module.a.weight": torch.ones(2)}, "best_prec1": 91.5}, stream)
    found = checkpoints._resnet20("all", stream.getvalue())
    assert list(found.tensors) == ["a.weight"]
    assert found.config == {"best_prec1": 91.5}


# Sizes as the origins state them; what each file is was verified when its checksum was taken.
SIZES = {
    ("brown", "all"): 1_218_532,
    ("cifar10-jpeg", "test"): None,  # 10,000 with Pillow, else 2,000
    ("cifar10-lossless", "calibration"): 2000,
    ("cifar10-lossless", "test"): 2000,
    ("cranfield", "all"): 225,
    ("fashion-mnist", "test"): 10_000,
    ("mnist", "test"): 10_000,
    ("npl", "all"): 93,
    ("sst2", "dev"): 872,
    ("sst2", "train"): 67_349,
    ("stsb", "dev"): 1500,
    ("stsb", "test"): 1379,
    ("stsb", "train"): 5749,
    ("tinyshakespeare", "train"): 1_003_854,
    ("wikitext2", "test"): 245_569,
    ("wikitext2", "validation"): 217_646,
}


@pytest.mark.parametrize(("name", "split"), SIZES)
def test_real_set_has_its_official_size(name: str, split: str, real_data: object) -> None:
    if split not in data.info(name).present:
        pytest.skip(f"{name}/{split} is not in QUERNEL_DATA")
    found = data.load(name, split=split)
    assert len(found) == (SIZES[name, split] or len(found))
    if name.startswith(("cifar10", "mnist", "fashion")):
        assert len(found.x) == len(found.y)
        counts = np.bincount(found.y, minlength=10)
        assert counts.min() > 0.08 * len(found), "ten classes, about equally many of each"


def test_tables_of_numbers_with_their_splits() -> None:
    rows, masks = b"1,2,30\n4,5,60\n", b"1,0\n0,1\n"
    table = tables._uci("all", gzip.compress(rows), gzip.compress(masks))
    np.testing.assert_array_equal(table.x, [[1, 2], [4, 5]])
    np.testing.assert_array_equal(table.y, [30, 60])
    np.testing.assert_array_equal(table.test_rows, [[True, False], [False, True]])
    table = tables._pmlb("all", gzip.compress(b"a\tb\ttarget\n1\t2\t3\n"))
    assert (table.x.tolist(), table.y.tolist(), table.test_rows, len(table)) == ([[1, 2]], [3], None, 1)
    with pytest.raises(DataError, match="not a gzipped table"):
        tables._pmlb("all", gzip.compress(b"a\nx\n"))
    held = data.load("diabetes")
    assert held.x.shape == (442, 10) and held.x.dtype == held.y.dtype == np.float64
