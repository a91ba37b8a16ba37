"""What the comparison of turns with fixed intervals counts, and when it says anything."""

from __future__ import annotations

import pytest
import torch

from quernel.cache import attention
from quernel.models import TinyLM
from reproductions._forced_decoding import FixedIntervals, beside_fixed, no_better

OPTIONS = {"budget": 16, "cluster_size": 4, "sink": 2, "buffer": 8, "max_segment": 8, "dense_below": 0}


def model():
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return TinyLM(dim=32, n_layers=1, n_heads=2, n_kv_heads=1).eval().to_transformers()


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.3, 0.7, 1.0])
def test_fixed_intervals_choose_at_their_rate_the_first_step_included(rate):
    net = model()
    ids = torch.randint(0, 256, (1, 150), generator=torch.Generator().manual_seed(0))
    cache = FixedIntervals(net.config, rate, **OPTIONS)
    with attention(net), torch.no_grad():
        for part in ids.split([50, *[1] * 100], dim=1):
            net(part, past_key_values=cache)
    assert cache.report().details["retrieval_rate"] == pytest.approx(rate)


def test_where_every_step_chooses_nothing_is_shown_about_fixed_intervals():
    net = model()
    ids = torch.randint(0, 256, (1, 120), generator=torch.Generator().manual_seed(0))
    same, fewer = (beside_fixed(net, ids, tau, OPTIONS) for tau in (2.0, 0.5))
    assert same["rate"] == 1 and same["fixed intervals"] == same["adaptive"] and not no_better(same)
    assert 0 < fewer["rate"] < 1 and fewer["fixed intervals"] != fewer["adaptive"]
    assert no_better({"rate": 0.5, "adaptive": 1.0, "fixed intervals": 1.1})
    assert not no_better({"rate": 0.5, "adaptive": 1.0, "fixed intervals": 0.9})
