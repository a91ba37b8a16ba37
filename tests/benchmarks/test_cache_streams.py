"""What the caches' benchmarks say about the queries that they time."""

from __future__ import annotations

import pytest
import torch

from benchmarks._process import ROOT, load_file
from quernel.cache import KVPool, LouisKVConfig
from quernel.cache.louiskv import LouisKVRow


def test_the_stream_turns_as_often_as_is_said_by_the_measure_of_the_cache() -> None:
    made = load_file(ROOT / "benchmarks" / "cache" / "louiskv.py")
    stream = made.queries()
    said = made.turns_of(stream)
    assert said == pytest.approx(made.TURNS, abs=0.1)
    shape = torch.zeros(made.KEY_HEADS, 1, made.DIM)
    row = LouisKVRow(shape, shape, LouisKVConfig(), KVPool(made.KEY_HEADS, 2 * made.DIM))
    row._moved(stream[-1])
    assert sum(row._moved(query) for query in stream) == round(said * len(stream))
