"""An encoder that counts words, so that what is closest can be seen by eye; some texts; a browser."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.report.conftest import chromium  # noqa: F401  (the same browser)

DIM = 64
TEXTS = {
    "animals/cats.txt": "Cats sleep most of the day.\n\n" + "A cat hunts mice and purrs when it is content. " * 6,
    "animals/dogs.md": "# Dogs\n\nDogs bark at strangers and guard the house.",
    "weather.txt": "Rain falls from clouds.\n\nSnow falls when it is cold.",
}


class WordCounter:
    """(n, 64) counts of hashed words; ``calls`` counts texts."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, sentences: Sequence[str]) -> Tensor:
        self.calls += len(sentences)
        counts = torch.full((len(sentences), DIM), 1e-3)
        for row, sentence in enumerate(sentences):
            for word in sentence.lower().replace(".", " ").replace("?", " ").split():
                counts[row, zlib.crc32(word.encode()) % DIM] += 1
        return counts

    def encode_tokens(self, sentences: Sequence[str]) -> list[Tensor]:
        self.calls += len(sentences)
        words = [sentence.lower().replace(".", " ").replace("?", " ").split() for sentence in sentences]
        return [torch.eye(DIM)[[zlib.crc32(w.encode()) % DIM for w in each]] for each in words]


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write(tmp_path / "texts", TEXTS)


@pytest.fixture
def encoder() -> WordCounter:
    return WordCounter()
