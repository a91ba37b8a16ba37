"""Text sets: sentence pairs (STS-B), labelled sentences (SST-2), running text and word streams.

Files may be gzipped, as kept here, or plain, as their origin publishes them; both are checked.
"""

from __future__ import annotations

import csv
import gzip
import io
import zipfile

import numpy as np

from quernel.data._kinds import Pairs, Sentences, Text, Tokens
from quernel.data._sources import DataSet, File, Parse, Source

_END = "<eos>"
_GZIP_MAGIC = b"\x1f\x8b"


def _text(content: bytes) -> str:
    return (gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content).decode("utf-8")


def _pairs(split: str, content: bytes) -> Pairs:
    rows = list(csv.reader(io.StringIO(_text(content), newline="")))
    first, second, score = zip(*rows, strict=True)
    return Pairs(first, second, np.array(score, np.float32))


def _labelled(split: str, content: bytes) -> Sentences:
    rows = [line.rpartition("\t") for line in _text(content).splitlines()[1:]]
    return Sentences(
        tuple(sentence.strip() for sentence, _, _ in rows),
        np.array([int(label) for _, _, label in rows], np.int64),
        ("negative", "positive"),
    )


def _shakespeare(split: str, content: bytes) -> Text:
    """Cut at 90 % and 95 %; the last two splits together are the usual validation part."""
    text = _text(content)
    cuts = {"train": (0, 18), "validation": (18, 19), "test": (19, 20)}[split]
    start, stop = (len(text) * cut // 20 for cut in cuts)
    return Text(text[start:stop])


def _wikitext(split: str, content: bytes) -> Tokens:
    words: list[str] = []
    for line in _text(content).splitlines():
        words += [*line.split(), _END]
    return Tokens(tuple(words), _END)


def _brown(split: str, content: bytes) -> Tokens:
    """Read the members ``brown/c???``; tokens are ``word/tag``, one sentence a line, blank lines between."""
    words: list[str] = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in sorted(archive.namelist()):
            document = name.rpartition("/")[2]
            if len(document) == 4 and document.startswith("c"):
                for line in archive.read(name).decode("utf-8").splitlines():
                    if tagged := line.split():
                        words += [*(token.rpartition("/")[0] for token in tagged), _END]
    return Tokens(tuple(words), _END)


def _source(parse: Parse, path: str, sums: dict[str, str], url: str = "") -> Source:
    """Make a source with one file a split; ``{}`` in path and url stands for the file's own name of the split."""
    files = {
        {"valid": "validation"}.get(part, part): (File(path.format(part), digest, url.format(part)),)
        for part, digest in sums.items()
    }
    return Source(parse, files)


def _shared(parse: Parse, splits: tuple[str, ...], file: File) -> Source:
    """Make a source whose splits are cut from one file."""
    return Source(parse, dict.fromkeys(splits, (file,)))


_SHAKESPEARE_SPLITS = ("train", "validation", "test")
_RAW = "https://raw.githubusercontent.com/"

SETS = (
    DataSet(
        "stsb",
        "STS benchmark, English: 5,749 / 1,500 / 1,379 sentence pairs with similarity 0..5",
        "CC BY-SA 4.0",
        "ixa2.si.ehu.eus/stswiki; CSV: github.com/PhilipMay/stsb-multi-mt",
        ("train", "dev", "test"),
        (
            _source(
                _pairs,
                "text/stsb_en_{}.csv.gz",
                {
                    "train": "91f8d1bf4155b68f63833d1f610086e11b452ee092cb2f3fe4cee61da5cde7e0",
                    "dev": "61a7a545615562a5f769f72f444ecf5a03bef9738e72f75ec25a9556b3967eff",
                    "test": "4b08c7069783f3a7fda7e2a63ea19fe362d7835194cde9ee305f65883a9a508e",
                },
            ),
            _source(
                _pairs,
                "text/stsb_en_{}.csv",
                {
                    "train": "e1e84fec60bbb598735552f54a35f4949904a484750fd2cb11e2720e49f63da6",
                    "dev": "d29586e96558c4eb52cf5ea5d14e9c24d3bf0e44f111b017caba43a5adc33226",
                    "test": "11523b625219e94e9ca05d2816b5f02cac1614c5894fe657376fa0806378d053",
                },
                _RAW + "PhilipMay/stsb-multi-mt/30de0dec4ee199b7f42351d3f1a0b19592955385/data/stsb-en-{}.csv",
            ),
        ),
    ),
    DataSet(
        "sst2",
        "Stanford sentiment treebank, GLUE version: 67,349 + 872 film review sentences, 2 classes",
        "research use",
        "nlp.stanford.edu/sentiment; TSV: github.com/forest-snow/alps, its two training files joined",
        ("train", "dev"),
        (
            _source(
                _labelled,
                "text/sst2_{}.tsv.gz",
                {
                    "train": "343b9cff04996b46be04073bc1c21d6415dee35acbbf529ed36b4754d6f493db",
                    "dev": "2b362b78d36eccad2d3304110e76d95a56654f860a5913f91fe4b12546d439b4",
                },
            ),
        ),
    ),
    DataSet(
        "tinyshakespeare",
        "1,115,394 characters of Shakespeare, 65 different ones; cut at 90 % and 95 %",
        "public domain",
        "A. Karpathy, github.com/karpathy/char-rnn",
        _SHAKESPEARE_SPLITS,
        (
            _shared(
                _shakespeare,
                _SHAKESPEARE_SPLITS,
                File("text/tinyshakespeare.txt.gz", "13125fe8f49092165d7d489e3944db52d1ba546e64a60080cc9523bcd0c5e46a"),
            ),
            _shared(
                _shakespeare,
                _SHAKESPEARE_SPLITS,
                File(
                    "text/tinyshakespeare.txt",
                    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
                    _RAW + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                ),
            ),
        ),
    ),
    DataSet(
        "wikitext2",
        "WikiText-2, words: 217,646 / 245,569 tokens with line ends; no training part",
        "CC BY-SA 3.0",
        "Salesforce Research (Merity et al. 2016); github.com/pytorch/examples, word_language_model",
        ("validation", "test"),
        (
            _source(
                _wikitext,
                "text/wikitext2_{}.txt.gz",
                {
                    "valid": "3cdd8cb5bb349a05840c7c3bef9578d90d64df77e27e0c25c033ba9342757ee3",
                    "test": "688887879b4b526692cb2e423a516dcc5f6584a01fd3f33a8e164fbed2de8090",
                },
            ),
            _source(
                _wikitext,
                "text/wikitext2_{}.txt",
                {
                    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
                },
                _RAW + "pytorch/examples/main/word_language_model/data/wikitext-2/{}.txt",
            ),
        ),
    ),
    DataSet(
        "brown",
        "Brown corpus, words: 500 documents, 1.16 M words, one sentence after the other",
        "non-commercial use only",
        "Francis and Kucera 1979; github.com/nltk/nltk_data, packages/corpora/brown.zip",
        ("all",),
        (
            _source(
                _brown,
                "text/brown.zip",
                {"all": "9b275f9b3b95d7bd66ccfb7cd259f445a13bbe5d1f4107aba09fd3e8364bafa6"},
                _RAW + "nltk/nltk_data/gh-pages/packages/corpora/brown.zip",
            ),
        ),
    ),
)
