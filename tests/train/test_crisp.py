"""CrispLoss: against loops, its gradient, a plain training loop, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel.kernels.clustering import cluster_means, kmeans
from quernel.nn.functional import chamfer_scores, cluster_tokens
from quernel.train import CrispLoss
from tests.reference import crisp as reference

KQ, KD = 2, 4


class Head(nn.Linear):
    """A linear head over token states, as the loss calls a model."""

    def forward(self, features, task):  # type: ignore[override]
        """Project and normalise."""
        assert task in ("query", "document")
        return features | {"token_embeddings": F.normalize(super().forward(features["token_embeddings"]), dim=-1)}


class Same(nn.Module):
    def forward(self, features, task):
        """Return what comes."""
        return features


def pool(features, task):
    vectors, mask = cluster_tokens(
        features["token_embeddings"], KQ if task == "query" else KD, mask=features["attention_mask"].bool()
    )
    return features | {"token_embeddings": vectors, "attention_mask": mask}


def column(lengths: list[int], dim: int, seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    width = max(lengths)
    x = torch.randn(len(lengths), width, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return {
        "token_embeddings": F.normalize(x, dim=-1),
        "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
    }


def as_lists(features, task):
    pooled = pool(features, task)
    pairs = zip(pooled["token_embeddings"], pooled["attention_mask"], strict=True)
    return [x[m].double().numpy() for x, m in pairs]


@pytest.mark.parametrize("length_normalize", [True, False])
@pytest.mark.parametrize("negatives", [0, 2])
def test_equals_loops(length_normalize: bool, negatives: int) -> None:
    columns = [column([5, 2, 9], 6, 0), *(column([7, 3, 12], 6, 1 + i) for i in range(1 + negatives))]
    loss = CrispLoss(Same(), pool, temperature=0.3, length_normalize=length_normalize)
    queries, *texts = [as_lists(c, "document" if i else "query") for i, c in enumerate(columns)]
    wanted = reference.loss(queries, texts, 0.3, length_normalize)
    assert float(loss(columns)) == pytest.approx(wanted, rel=1e-5)


def test_without_a_pool_it_is_plain_late_interaction() -> None:
    columns = [column([5, 2], 6, 0), column([7, 3], 6, 1)]
    q, x = columns
    scores = chamfer_scores(
        q["token_embeddings"], x["token_embeddings"], query_mask=q["attention_mask"], document_mask=x["attention_mask"]
    )
    wanted = F.cross_entropy(scores / torch.tensor([[5.0], [2.0]]) / 0.05, torch.arange(2))
    torch.testing.assert_close(CrispLoss(Same())(columns), wanted)


def test_its_gradient_is_that_of_the_means_with_the_partition_held() -> None:
    q, x = column([6, 4], 4, 0, torch.float64), column([9, 8], 4, 1, torch.float64)
    held = {
        id(f): kmeans(f["token_embeddings"], k, mask=f["attention_mask"].bool(), start="farthest").assignment
        for f, k in ((q, KQ), (x, KD))
    }

    def frozen(a, b):
        sets = [cluster_means(v, held[id(f)], k) for v, f, k in ((a, q, KQ), (b, x, KD))]
        scores = chamfer_scores(*(F.normalize(s, dim=-1) for s in sets))
        return F.cross_entropy(scores / KQ / 0.5, torch.arange(2))

    inputs = [f["token_embeddings"].clone().requires_grad_() for f in (q, x)]
    loss = CrispLoss(Same(), pool, temperature=0.5)
    got = loss([f | {"token_embeddings": v} for f, v in zip((q, x), inputs, strict=True)])
    torch.testing.assert_close(got, frozen(*inputs))
    gradients = torch.autograd.grad(got, inputs)
    for gradient, wanted in zip(gradients, torch.autograd.grad(frozen(*inputs), inputs), strict=True):
        torch.testing.assert_close(gradient, wanted)
    assert torch.autograd.gradcheck(frozen, inputs)


def test_a_plain_loop_learns() -> None:
    """Positives are noisy copies in a subspace that the untrained head does not look at."""
    torch.manual_seed(0)
    head = Head(12, 4, bias=False)
    with torch.no_grad():
        head.weight[:, :4] *= 0.05
    loss = CrispLoss(head, pool, temperature=0.1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    signal = torch.randn(8, 1, 4)

    def batch(width: int) -> dict[str, torch.Tensor]:
        x = torch.cat([signal + 0.3 * torch.randn(8, width, 4), torch.randn(8, width, 8)], -1)
        return {"token_embeddings": x, "attention_mask": torch.ones(8, width)}

    losses = []
    for _ in range(60):
        value = loss([batch(6), batch(15)])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_tasks_come_from_the_features_or_the_column() -> None:
    seen = []

    class Asked(Same):
        def forward(self, features, task):
            """Note the task."""
            seen.append(task)
            return features

    columns = [column([3, 3], 4, i) for i in range(3)]
    columns[2]["task"] = "passage"
    CrispLoss(Asked(), None)(columns)
    assert seen == ["query", "document", "passage"]
    assert CrispLoss(Same(), pool).get_config_dict()["pool"] == "pool"


def test_one_pair_alone_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="one pair and no negatives"):
        assert float(CrispLoss(Same(), pool)([column([5], 4, 0), column([6], 4, 1)])) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(CrispLoss(Same(), pool)([column([5], 4, i) for i in range(3)])) > 0


def test_bad_input_is_named() -> None:
    loss = CrispLoss(Same(), pool)
    with pytest.raises(QuernelError, match=r"as many of each; got \[2, 3\]"):
        loss([column([3, 3], 4, 0), column([3, 3, 3], 4, 1)])
    with pytest.raises(QuernelError, match=r"got \[2\]"):
        loss([column([3, 3], 4, 0)])
    with pytest.raises(QuernelError, match=r"x\[1\] has no tokens"):
        loss([column([3, 0], 4, 0), column([3, 3], 4, 1)])
    with pytest.raises(QuernelError, match=r"sentence_features\[1\]: text 0 has no vectors"):
        CrispLoss(Same())([column([3, 3], 4, 0), column([0, 3], 4, 1)])
    with pytest.raises(QuernelError, match="temperature must be"):
        CrispLoss(Same(), pool, temperature=0.0)
    with pytest.raises(QuernelError, match="model and pool must be callable"):
        CrispLoss(Same(), 8)  # type: ignore[arg-type]
