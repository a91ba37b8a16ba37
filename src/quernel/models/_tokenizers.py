"""The two tokenizers of ``TinyLM``: UTF-8 bytes, and the scored pieces of a llama2.c tokenizer file."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Self

from quernel import data

_BOS = 1
_FIRST_BYTE = 3


class ByteTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text; on ASCII text this is a character tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return one id a byte."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; ids that are not whole UTF-8 characters become replacement characters."""
        return bytes(ids).decode("utf-8", errors="replace")


class PieceTokenizer:
    """Sentencepiece BPE as llama2.c stores it: merge the neighbours whose joint piece scores highest.

    Id 1 opens a text, ids 3..258 stand for bytes that have no piece of their own.
    """

    def __init__(self, vocabulary: Sequence[tuple[bytes, float]]) -> None:
        self._pieces = [piece for piece, _ in vocabulary]
        self._ranks = {piece: (score, i) for i, (piece, score) in enumerate(vocabulary) if i >= _FIRST_BYTE + 256}
        self._known: dict[str, list[int]] = {}

    @classmethod
    @functools.cache
    def llama2c_512(cls) -> Self:
        """Return the tokenizer of stories260K (data set ``stories260k``)."""
        return cls(data.load("stories260k").vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, opened by the begin token."""
        ids = [_BOS]
        # Pieces hold a space only in front and no line end, so words merge apart from each other.
        for word in re.findall(" ?[^ \n]+|[ \n]", f" {text}" if text else ""):
            if word not in self._known:
                self._known[word] = self._ids(word)
            ids += self._known[word]
        return ids

    def _ids(self, word: str) -> list[int]:
        parts = [character.encode("utf-8") for character in word]
        while True:
            ranks = (self._ranks.get(a + b) for a, b in itertools.pairwise(parts))
            found = [(rank[0], -i) for i, rank in enumerate(ranks) if rank]
            if not found:
                break
            at = -max(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids: list[int] = []
        for part in parts:
            # What never became a piece falls apart into bytes.
            ids += [self._ranks[part][1]] if part in self._ranks else [_FIRST_BYTE + byte for byte in part]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; the begin token and the space after it are dropped."""
        opened = bool(ids) and ids[0] == _BOS
        kept = [i for i in ids if i > 2]
        text = b"".join(bytes([i - _FIRST_BYTE]) if i < _FIRST_BYTE + 256 else self._pieces[i] for i in kept)
        return text.decode("utf-8", errors="replace").removeprefix(" " if opened else "")
