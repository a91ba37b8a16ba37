"""Pooling of tokens: identity, mean, order, padding, duplicates, gradients; and the Chamfer score against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.kernels.clustering import inertia, kmeans
from quernel.nn.functional import chamfer_scores, cluster_tokens, spaced_tokens, tail_tokens
from tests.reference import crisp as reference

# float32 sums in another order.
SAME = {"rtol": 1e-5, "atol": 1e-6}


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def as_mask(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def rows_of(pooled) -> list[np.ndarray]:
    """Return the vectors of each text in an order of their own."""
    found = [v[m].detach().double().numpy() for v, m in zip(pooled.vectors, pooled.mask, strict=True)]
    return [rows[np.lexsort(rows.T)] for rows in found]


# -- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [6, 7, 50])
def test_enough_clusters_keep_every_token_bit_for_bit(k: int) -> None:
    x, mask = 3 * tokens(3, 6, 5), as_mask([6, 2, 4], 6)
    vectors, there = cluster_tokens(x, k, mask=mask)
    for i, length in enumerate((6, 2, 4)):
        assert torch.equal(vectors[i][there[i]], x[i, :length])
    others = tokens(4, 5, 5, seed=1)
    assert torch.equal(
        chamfer_scores(others, vectors, document_mask=there), chamfer_scores(others, x, document_mask=mask)
    )


def test_one_cluster_is_the_mean() -> None:
    x, mask = tokens(2, 6, 5), as_mask([6, 4], 6)
    means = torch.stack([x[0].mean(0), x[1, :4].mean(0)])
    torch.testing.assert_close(cluster_tokens(x, 1, mask=mask, normalize=False).vectors[:, 0], means)
    torch.testing.assert_close(cluster_tokens(x, 1, mask=mask).vectors[:, 0], F.normalize(means, dim=-1))


@pytest.mark.parametrize("k", [4, 0.25])
def test_neither_padding_nor_the_order_of_tokens_matters(k: float) -> None:
    x = tokens(3, 20, 8)
    wanted = rows_of(cluster_tokens(x, k))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    for got, want in zip(rows_of(cluster_tokens(x[:, order], k)), wanted, strict=True):
        np.testing.assert_allclose(got, want, **SAME)
    padded = torch.cat([torch.full((3, 3, 8), torch.nan), x, torch.full((3, 4, 8), 1e9)], 1)
    mask = torch.zeros(3, 27, dtype=torch.bool)
    mask[:, 3:23] = True
    for got, want in zip(rows_of(cluster_tokens(padded, k, mask=mask)), wanted, strict=True):
        np.testing.assert_allclose(got, want, **SAME)


def test_a_share_counts_real_tokens() -> None:
    x, mask = tokens(4, 100, 8), as_mask([100, 41, 7, 3], 100)
    assert cluster_tokens(x, 0.25, mask=mask).mask.sum(1).tolist() == [25, 10, 1, 1]
    assert tail_tokens(x, 0.29, mask=mask).mask.sum(1).tolist() == [29, 11, 2, 1]


def test_few_distinct_tokens_give_few_vectors() -> None:
    a, b, c = tokens(3, 4)
    x = torch.stack([torch.stack([a, a, b, a, b, a]), torch.stack([a, b, c, c, b, a]), a.expand(6, 4)])
    vectors, there = cluster_tokens(x, 4)
    assert there.sum(1).tolist() == [2, 3, 1]
    assert cluster_tokens(x, 3).mask.sum(1).tolist() == [2, 3, 1], "k distinct tokens give k clusters"
    assert vectors.isfinite().all()
    for i, wanted in enumerate(([a, b], [a, b, c], [a])):
        distances = torch.cdist(torch.stack(wanted), vectors[i][there[i]])
        assert (distances.min(1).values < 1e-3).all(), "every distinct token is there"


def test_a_batch_is_its_texts_and_runs_are_the_same() -> None:
    lengths = [30, 9, 17, 3]
    x, mask = tokens(4, 30, 8), as_mask(lengths, 30)
    together = cluster_tokens(x, 5, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(together, cluster_tokens(x, 5, mask=mask), strict=True))
    for i, length in enumerate(lengths):
        alone = cluster_tokens(x[i : i + 1, :length], 5)
        np.testing.assert_allclose(together.vectors[i][together.mask[i]], alone.vectors[0][alone.mask[0]], **SAME)


def test_more_iterations_never_raise_the_inertia_and_means_are_those_of_the_partition() -> None:
    x = tokens(5, 40, 6, dtype=torch.float64)
    spreads = torch.stack([inertia(x, kmeans(x, 6, iterations=n, start="farthest")) for n in range(1, 12)])
    assert (spreads[1:] <= spreads[:-1] + 1e-12).all()
    assert (spreads[-1] < spreads[0]).all()
    found = kmeans(x, 6, iterations=11, start="farthest")
    for i in range(5):
        own = found.assignment[i].tolist()
        assert float(spreads[-1, i]) == pytest.approx(reference.inertia(x[i].numpy(), own), rel=1e-9)
        for normalize in (False, True):
            wanted = reference.cluster_means(x[i].numpy(), own, normalize)
            got = rows_of(cluster_tokens(x[i : i + 1], 6, iterations=11, normalize=normalize))[0]
            np.testing.assert_allclose(got, wanted[np.lexsort(wanted.T)], rtol=1e-9, atol=1e-12)


def test_the_gradient_flows_through_the_means_alone() -> None:
    x = tokens(2, 12, 4, dtype=torch.float64).requires_grad_()
    mask = as_mask([12, 7], 12)
    vectors, there = cluster_tokens(x, 3, mask=mask, normalize=False)
    upstream = torch.randn(vectors.shape, dtype=torch.float64)
    vectors.backward(upstream)
    found = kmeans(x, 3, mask=mask, start="farthest")
    for i in range(2):
        for t in range(12):
            c = int(found.assignment[i, t])
            wanted = upstream[i, c] / found.counts[i, c] if c >= 0 else torch.zeros(4, dtype=torch.float64)
            torch.testing.assert_close(x.grad[i, t], wanted)
    assert there.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype: torch.dtype) -> None:
    x = (100 * tokens(1, 400, 4) + 100).to(dtype)
    got = cluster_tokens(x, 1, normalize=False).vectors
    assert got.dtype == dtype
    torch.testing.assert_close(got[0, 0], x[0].float().mean(0).to(dtype))


# -- tokens that are kept ---------------------------------------------------------------------------------------------


def test_tail_and_spacing_skip_padding_wherever_it_stands() -> None:
    x = torch.arange(1.0, 13.0).view(2, 6, 1)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    assert [r.flatten().tolist() for r in rows_of(tail_tokens(x, 3, mask=mask))] == [[3, 5, 6], [7, 8]]
    assert [r.flatten().tolist() for r in rows_of(spaced_tokens(x, 2, mask=mask))] == [[2, 5], [7]]
    assert spaced_tokens(x, 4).mask.sum(1).tolist() == [2, 2]  # ceil(6 / 4)
    vectors, there = tail_tokens(x, 3, mask=mask)
    assert vectors[1, 2].item() == 0 and not there[1, 2]


def test_an_empty_batch_is_pooled() -> None:
    for pooled in (cluster_tokens(torch.zeros(0, 5, 3), 2), tail_tokens(torch.zeros(0, 5, 3), 2)):
        assert len(pooled.vectors) == len(pooled.mask) == 0


# -- the score --------------------------------------------------------------------------------------------------------


def test_the_score_equals_loops_on_ragged_texts() -> None:
    draw = np.random.default_rng(0)
    queries = [draw.standard_normal((n, 7)) for n in (3, 1, 5)]
    texts = [draw.standard_normal((n, 7)) - 2 for n in (4, 9, 1, 6)]  # all similarities of some are negative
    q, x = (torch.nn.utils.rnn.pad_sequence([torch.from_numpy(m) for m in part], True) for part in (queries, texts))
    masks = as_mask([3, 1, 5], 5), as_mask([4, 9, 1, 6], 9)
    got = chamfer_scores(q, x, query_mask=masks[0], document_mask=masks[1])
    np.testing.assert_allclose(got, reference.chamfer_matrix(queries, texts), rtol=0, atol=1e-6)
    q[~masks[0]], x[~masks[1]] = torch.nan, torch.inf
    assert torch.equal(chamfer_scores(q, x, query_mask=masks[0], document_mask=masks[1]), got)


def test_a_text_without_vectors_scores_minus_infinity() -> None:
    q, x = tokens(2, 3, 4), tokens(2, 5, 4, seed=1).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    scores = chamfer_scores(q, x, document_mask=mask)
    assert scores[:, 1].tolist() == [-torch.inf] * 2
    scores[:, 0].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert (chamfer_scores(q, x[:, :0]) == -torch.inf).all()
    assert (chamfer_scores(q, x, query_mask=torch.zeros(2, 3, dtype=torch.bool)) == 0).all()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cluster_tokens(x, 0), "k must be an integer in"),
        (lambda x: cluster_tokens(x, 0.0), "k must be a finite number"),
        (lambda x: cluster_tokens(x, 1.5), "k must be a finite number"),
        (lambda x: tail_tokens(x, -1), "k must be"),
        (lambda x: spaced_tokens(x, 0), "step must be"),
        (lambda x: cluster_tokens(x, 2, iterations=0), "iterations must be"),
        (lambda x: cluster_tokens(x[0], 2), r"x must be \(B, L, d\)"),
        (lambda x: cluster_tokens(x, 2, mask=torch.ones(2, 3)), r"mask must have shape \(2, 6\)"),
        (lambda x: cluster_tokens(x, 2, mask=as_mask([3, 0], 6)), r"x\[1\] has no tokens"),
        (lambda x: cluster_tokens(x / 0 * 0, 2), r"x\[0\] holds NaN"),
        (lambda x: chamfer_scores(x, x[..., :3]), "of one d"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        call(tokens(2, 6, 4))
