"""k-means: a batch of clusterings against one at a time, against scikit-learn's, and against the definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from quernel._errors import QuernelError
from quernel.kernels import cluster_means, kmeans
from quernel.kernels.clustering import inertia

STARTS = ("spaced", "farthest")


def points(rows: int = 3, length: int = 40, dim: int = 5, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(6, dim, generator=draw)
    return centers[torch.randint(6, (rows, length), generator=draw)] + torch.randn(rows, length, dim, generator=draw)


def slow_inertia(x: Tensor, assignment: Tensor) -> float:
    total = 0.0
    for cluster in set(assignment.tolist()) - {-1}:
        members = x[assignment == cluster].double()
        total += float((members - members.mean(0)).square().sum())
    return total


@pytest.mark.parametrize("start", STARTS)
def test_finds_the_best_partition_of_points_that_are_apart(start: str) -> None:
    x = torch.tensor([0.0, 10.0, 20.0])[:, None].repeat_interleave(4, 0) + torch.linspace(0, 1, 12)[:, None]
    found = kmeans(x[None], 3, start=start).assignment[0]
    partitions = (torch.tensor([0, 0, 0, 0, *rest]) for rest in itertools.product(range(3), repeat=8))
    assert slow_inertia(x, found) == pytest.approx(min(slow_inertia(x, p) for p in partitions))


@pytest.mark.parametrize("start", STARTS)
def test_a_row_does_not_see_the_others(start: str) -> None:
    x, k = points(), torch.tensor([2, 9, 5])
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    together = kmeans(x, k, mask=mask, start=start)
    for row in range(3):
        alone = kmeans(x[row, mask[row]][None], int(k[row]), start=start)
        assert torch.equal(together.assignment[row, mask[row]], alone.assignment[0])
        assert bool((together.assignment[row, ~mask[row]] == -1).all())
        assert torch.equal(together.counts[row, : k[row]], alone.counts[0])
        assert not together.counts[row, k[row] :].any()


def test_what_is_masked_may_hold_anything() -> None:
    x, mask = points(1), torch.arange(40)[None] < 30
    broken = x.clone()
    broken[:, 30:] = float("nan")
    assert torch.equal(kmeans(broken, 4, mask=mask).assignment, kmeans(x, 4, mask=mask).assignment)
    assert not kmeans(x, 4, mask=torch.zeros(1, 40, dtype=torch.bool)).counts.any()


@pytest.mark.parametrize("start", STARTS)
def test_more_iterations_never_raise_the_inertia(start: str) -> None:
    x = points(4, 200, 8)
    values = torch.stack([inertia(x, kmeans(x, 12, iterations=n, start=start)) for n in range(1, 12)])
    assert bool((values[1:] <= values[:-1] * (1 + 1e-6)).all())


@pytest.mark.parametrize("shape", ["random", "drifting", "mixture"])
def test_inertia_is_near_that_of_scikit_learn(shape: str) -> None:
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 1024, 16, generator=draw)
    x = {"random": noise, "drifting": noise.cumsum(1) / 8, "mixture": points(1, 1024, 16)}[shape]
    peer = KMeans(64, n_init=1, random_state=0).fit(x[0].numpy())
    assert float(inertia(x, kmeans(x, 64))) <= 1.05 * peer.inertia_


@pytest.mark.parametrize("start", STARTS)
def test_as_many_clusters_as_distinct_points(start: str) -> None:
    distinct = points(1, 7, 3)
    assert kmeans(distinct, 7, start=start).counts.tolist() == [[1] * 7]
    assert kmeans(distinct, 12, start=start).counts.sum() == 7
    twice = distinct.repeat(1, 3, 1)
    found = kmeans(twice, 12, start=start)
    assert sorted(found.counts[0].tolist(), reverse=True) == [3] * 7 + [0] * 5
    assert float(inertia(twice, found)) < 1e-9


def test_order_does_not_matter_from_far_seeds() -> None:
    x = points(1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    plain, shuffled = kmeans(x, 6, start="farthest"), kmeans(x[:, order], 6, start="farthest")
    assert torch.equal(plain.assignment[:, order], shuffled.assignment)


def test_the_same_again_and_nothing_global_drawn() -> None:
    x, state = points(), torch.get_rng_state()
    assert torch.equal(kmeans(x, 5).assignment, kmeans(x, 5).assignment)
    assert torch.equal(state, torch.get_rng_state())


def test_means_and_their_gradient() -> None:
    x, k = points(2, 12, 3).double().requires_grad_(), 4
    mask = torch.arange(12) < torch.tensor([12, 9])[:, None]
    found = kmeans(x, k, mask=mask)
    means = cluster_means(x, found.assignment, k)
    for row, cluster in itertools.product(range(2), range(k)):
        members = x[row, found.assignment[row] == cluster]
        torch.testing.assert_close(means[row, cluster], members.mean(0))
    g = torch.randn(means.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means.backward(g)
    wanted = torch.zeros_like(x)
    for row, token in itertools.product(range(2), range(12)):
        if (c := int(found.assignment[row, token])) >= 0:
            wanted[row, token] = g[row, c] / found.counts[row, c]
    torch.testing.assert_close(x.grad, wanted)
    assert torch.autograd.gradcheck(lambda t: cluster_means(t, found.assignment, k), (x,))


def test_half_precision_is_clustered_in_single() -> None:
    x = points(1).to(torch.bfloat16)
    found = kmeans(x, 4)
    assert torch.equal(found.assignment, kmeans(x.float(), 4).assignment)
    assert cluster_means(x, found.assignment, 4).dtype == torch.bfloat16


def test_empty_batches() -> None:
    assert kmeans(torch.zeros(0, 5, 3), 2).assignment.shape == (0, 5)
    found = kmeans(torch.zeros(2, 0, 3), 2)
    assert found.assignment.shape == (2, 0) and found.counts.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"x": torch.zeros(4, 3)}, "x must be"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.int64)}, "x must be"),
        ({"x": torch.full((2, 4, 3), float("nan"))}, "NaN"),
        ({"k": 0}, "k must be"),
        ({"k": torch.tensor([1])}, "k must hold"),
        ({"k": torch.tensor([0, 1])}, "k must hold"),
        ({"mask": torch.ones(2, 4)}, "mask"),
        ({"iterations": 0}, "iterations"),
        ({"start": "random"}, "start"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], word: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(2, 4, 3), "k": 2} | change
    with pytest.raises(QuernelError, match=word):
        kmeans(arguments.pop("x"), arguments.pop("k"), **arguments)
