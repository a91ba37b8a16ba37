"""``calibrate_tau``: what a cache would choose at each step, how alike that is, and the threshold that follows."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.cache import LouisKVConfig, calibrate_tau
from quernel.cache._calibration import ALWAYS, chosen_by, jaccard, kept_on
from tests.cache.test_louiskv import SMALL, llama, text
from tests.cache.test_retrieval import stream
from tests.reference.louiskv import Row

SCALE = 0.5


def test_choices_are_those_of_the_definition() -> None:
    queries, keys, values = stream(90)
    settings = LouisKVConfig(budget=10, tau=ALWAYS, dense_below=0, **SMALL)
    got = chosen_by(settings, queries[:, :, 60:], keys[:, :60], keys[:, 60:], SCALE)
    slow = Row(10, settings.sink, settings.buffer, 4, settings.min_segment, settings.max_segment, ALWAYS)
    slow.extend(keys[:, :60], values[:, :60])
    for t in range(60, 90):
        slow.step(queries[:, :, t], keys[:, t : t + 1], values[:, t : t + 1], SCALE)
        assert [sorted(head) for head in got[t - 60].tolist()] == [sorted(head) for head in slow.chosen]
    alike = jaccard(got)
    assert torch.allclose(alike.diagonal(), torch.ones(30))
    sets = [[set(head) for head in step] for step in got.tolist()]
    for a, b in ((0, 1), (0, 29), (13, 14)):
        wanted = np.mean([len(x & y) / len(x | y) for x, y in zip(sets[a], sets[b], strict=True)])
        assert float(alike[a, b]) == pytest.approx(wanted)


def test_queries_of_one_unit_choose_alike_whichever_of_its_keys_is_nearest() -> None:
    # Two far clusters that are nearly as good; inside both the queries turn to and fro between the same two sides.
    keys = torch.zeros(1, 52, 3)
    keys[0, :16, 0], keys[0, 16:32, 1] = 10.0, 9.9
    keys[0, :32, 2] = torch.arange(32) % 2 - 0.5
    queries = torch.tensor([1.0, 1.0, 0.3]).repeat(1, 1, 12, 1)
    queries[:, :, ::2, 2] = -0.3
    best = (queries[0, 0] @ keys[0, :32].T).topk(16).indices
    assert not set(best[0].tolist()) & set(best[1].tolist())
    settings = LouisKVConfig(budget=16, cluster_size=16, tau=ALWAYS, sink=0, buffer=8, max_segment=8, dense_below=0)
    chosen = chosen_by(settings, queries, keys[:, :40], keys[:, 40:], SCALE)
    assert chosen.sort().values.tolist() == [[list(range(16))]] * 12
    assert bool((jaccard(chosen) == 1.0).all())


def test_kept_on_plays_the_steps() -> None:
    alike = np.array([[1.0, 0.8, 0.2], [0.8, 1.0, 0.4], [0.2, 0.4, 1.0]])
    seen = [(np.array([0.9, 0.5]), alike)]
    assert kept_on(seen, -1.0) == pytest.approx((0.8 + 0.2) / 2)
    assert kept_on(seen, 0.7) == pytest.approx(0.8)
    assert kept_on(seen, 2.0) == 1.0
    # Where the first falls below, the second step uses its choice on.
    assert kept_on([(np.array([0.5, 0.9]), alike)], 0.7) == pytest.approx(0.4)


def test_tau_follows_the_target_and_is_warned_of() -> None:
    model, settings = llama(), LouisKVConfig(budget=24, **SMALL)
    batches = [text(2, 120, seed) for seed in range(2)]
    found = [calibrate_tau(model, batches, target, settings=settings) for target in (0.1, 0.2)]
    assert -1 <= found[0] < found[1] < 1
    with pytest.warns(UserWarning, match="smaller target_jaccard"):
        assert calibrate_tau(model, batches, 1.0, settings=settings) == ALWAYS
    assert model.config._attn_implementation == "sdpa"
    # A text that says the same again and again asks for the same again and again.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = torch.full((1, 120), 7)
        assert calibrate_tau(model, [same], 0.2, settings=settings) < 1


@pytest.mark.parametrize(
    ("batches", "target", "word"),
    [
        ([], 0.8, "got none"),
        ([torch.zeros(1, 12, dtype=torch.int64)], 0.8, "longer"),
        ([torch.zeros(5)], 0.8, "integers"),
        ([torch.zeros(1, 90, dtype=torch.int64)], 0.0, "target_jaccard"),
    ],
)
def test_errors_of_the_calibration(batches: list[Tensor], target: float, word: str) -> None:
    with pytest.raises(QuernelError, match=word):
        calibrate_tau(llama(), batches, target, settings=LouisKVConfig(budget=24, **SMALL))
