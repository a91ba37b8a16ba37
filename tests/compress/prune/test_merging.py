"""The merging core on arrays: equal to the algorithm as written down, Gram matrices exact after many merges."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quernel.compress import Context, FeatureMerging
from quernel.compress.graph import ChannelGroup, Slot, channel_map
from quernel.compress.prune._merging import Merger, Rule
from quernel.compress.prune._surgery import read_tensors, with_folds
from tests.compress.prune._nets import IMAGES, NETS, Residual, mlp, net_and_input, trained_norms
from tests.reference import feature_merging as oracle

# float64 sums over a few hundred products.
EXACT = 1e-9
GRAM = 1e-8


def arrays_of(net: nn.Module, x: Tensor, rule: Rule) -> tuple[Merger, dict[str, np.ndarray], list[oracle.Group]]:
    channels = channel_map(net, x)
    folds = dict(channels.folds)
    groups = [with_folds(g, folds) for g in channels.groups]
    names = tuple(dict.fromkeys(n for g in groups for n in g.names))
    tensors = read_tensors(net, names, folds)
    arrays = {k: v.copy() for k, v in tensors.items()}
    literal = [
        oracle.Group(g.size, [oracle.Part(s.tensor, s.axis, s.role, s in rule.compares(g)) for s in g.slots])
        for g in groups
    ]
    return Merger(tensors, groups, rule), arrays, literal


RULES = {
    "paper": Rule(),
    "current": Rule(reference="current"),
    "mean": Rule(scale="mean"),
    "normalized": Rule(normalize=True),
    "producers": Rule(distance="producers"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETS)
def test_equals_the_algorithm_as_written_down(name: str, rule: str) -> None:
    net, x = net_and_input(name)
    merger, arrays, groups = arrays_of(net, x, RULES[rule])
    options = {f: getattr(RULES[rule], f) for f in ("reference", "scale", "normalize")}
    oracle.run(arrays, groups, beta=0.6, max_ratio=0.7, **options)
    merger.run(0.6, 0.7)
    assert any(space.merged for space in merger.spaces)
    for space, group in zip(merger.spaces, groups, strict=True):
        assert {frozenset(m) for m in space.members if m} == {frozenset(m) for m in group.members}
        position = {frozenset(m): i for i, m in enumerate(space.members)}
        order = [position[frozenset(m)] for m in group.members]
        for slot in space.slots:  # bring the tensors to the order of the literal algorithm
            merger.tensors[slot.tensor] = np.take(
                merger.tensors[slot.tensor], slot.index[order].ravel(), axis=slot.axis
            )
    for key, array in arrays.items():
        np.testing.assert_allclose(merger.tensors[key], array, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_incremental_gram_equals_the_recomputed_one(rule: str) -> None:
    net = trained_norms(Residual(width=40, hidden=48))
    merger, _, _ = arrays_of(net, torch.randn(IMAGES), RULES[rule])
    merger.run(1.0, 0.9)
    assert sum(space.merged for space in merger.spaces) >= 50
    for space in merger.spaces:
        fresh = {True: 0.0, False: 0.0}
        for slot in space.compared:
            moved = np.moveaxis(merger.tensors[slot.tensor], slot.axis, 0)
            lines = moved[slot.index].reshape(space.group.size, -1)
            fresh[merger.rule.adds(slot)] = fresh[merger.rule.adds(slot)] + lines @ lines.T
        for adds, gram in fresh.items():
            np.testing.assert_allclose(space.grams[adds], gram, rtol=0, atol=GRAM * np.abs(gram).max())


def test_a_paused_group_goes_on_when_its_neighbours_have_merged() -> None:
    # Stopping a group for good at its first failure leaves more channels than testing it in every sweep.
    net, x = mlp(6, 24, 24, 24, 4), torch.randn(5, 6)
    merger, _, _ = arrays_of(net, x, Rule())
    merger.run(0.4)
    patient = [space.merged for space in merger.spaces]
    hasty, _, _ = arrays_of(net, x, Rule())
    going = list(hasty.spaces)
    while going:
        for space in list(going):
            gap, m, n = space.closest()
            if gap <= 0.4 * space.limit():
                hasty.merge(space, m, n)
            else:
                going.remove(space)
    assert sum(patient) > sum(space.merged for space in hasty.spaces)


@pytest.mark.parametrize("rule", ["paper", "current"])
def test_random_features_are_all_different(rule: str) -> None:
    merger, _, _ = arrays_of(mlp(64, 128, 96, 10), torch.randn(2, 64), RULES[rule])
    merger.run(0.3)
    assert [space.merged for space in merger.spaces] == [0, 0]


@pytest.mark.slow
def test_layer_of_512_channels_merges_in_five_seconds() -> None:
    rng, index = np.random.default_rng(0), np.arange(512)[:, None]
    slots = Slot("a", "weight", 0, "row", index), Slot("b", "weight", 1, "column", index)
    tensors = {"a.weight": rng.standard_normal((512, 512, 9)), "b.weight": rng.standard_normal((512, 512, 9))}
    start = time.process_time()
    merger = Merger(tensors, [ChannelGroup("a", 512, slots[:1], slots[1:])], Rule(reference="current"))
    merger.run(1.0, 0.8)
    assert merger.spaces[0].merged == 409
    assert time.process_time() - start < 5.0


@pytest.mark.slow
def test_vgg16_merges_in_a_minute() -> None:
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    layers = [nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise((3, *widths))]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 4, 10))
    start = time.process_time()
    plan = FeatureMerging(beta=1.0, max_ratio=0.8).plan(net, Context(example_inputs=torch.zeros(1, 3, 2, 2)))
    assert plan.summary["channels_after"] < 0.25 * sum(widths)
    assert time.process_time() - start < 60.0
