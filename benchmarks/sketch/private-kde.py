"""Private kernel sums: taking rows in, answering, against limits, the exact sum and DP-SGD (Opacus).

Rows are random: speed does not depend on them. Images have 784 coordinates, embeddings 384 (as many rows as SST-2 has).
Classes are timed with their release, noise from the operating system included. Opacus trains one epoch of the twenty of
a probe, reading whole lots at a time (its faster way), its set-up not counted: 2.5 times here are 50 in all.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks._runner import Case, Isolated, allowed
from quernel.kernels.features import shift_invariant_kernel
from quernel.sketch import PrivateDistanceSum, PrivateKDE, PrivateSimilarityClassifier

FLOPS = 94e9  # a core
DIM, FREQUENCIES, BANDWIDTH = 784, 2048, 10.0
POINTS, QUERIES = 60_000, 1000
EMBEDDINGS, EMBEDDED, LOT = 67_349, 384, 4096
LIMIT_FIT, LIMIT_QUERY, LIMIT_L1 = 6.0, 0.6, 0.05  # seconds: 60,000 rows, 10,000 queries, 100,000 numbers
OPACUS = "opacus==1.5.4"


def images(rows: int) -> SimpleNamespace:
    draw = np.random.default_rng(0)
    x = draw.random((rows, DIM), dtype=np.float32)
    kde = PrivateKDE(bandwidth=BANDWIDTH, n_features=FREQUENCIES).partial_fit(x)
    q = draw.random((QUERIES, DIM), dtype=np.float32)
    return SimpleNamespace(x=x, q=q, release=kde.release(), held=torch.from_numpy(x), squares=(x**2).sum(1))


def fit(s: SimpleNamespace) -> None:
    PrivateKDE(bandwidth=BANDWIDTH, n_features=FREQUENCIES).partial_fit(s.x)


def exact(s: SimpleNamespace) -> np.ndarray:
    """Sum the kernel as fast as it goes: one product, one fused exponential."""
    q = torch.from_numpy(s.q)
    total = torch.zeros(len(q))
    for start in range(0, len(s.x), 4096):
        part = s.held[start : start + 4096]
        z = torch.addmm(torch.from_numpy(s.squares[start : start + 4096])[None], q, part.T, alpha=-2)
        total += z.add_((q**2).sum(1, keepdim=True)).mul_(-1 / BANDWIDTH**2).exp_().sum(1)
    return total.numpy()


def answers_are_near(s: SimpleNamespace) -> None:
    few = s.q[:20]
    wanted = shift_invariant_kernel("gaussian", few, s.x, bandwidth=BANDWIDTH).sum(1)
    np.testing.assert_allclose(exact(SimpleNamespace(**vars(s) | {"q": few})), wanted, rtol=1e-3)
    error = np.abs(s.release.query(few) - wanted).max()
    if error > 6 * (s.release.noise_std + len(s.x) / (2 * FREQUENCIES) ** 0.5):
        raise ValueError(f"answers are off by {error:.4g}")


def numbers() -> SimpleNamespace:
    draw = np.random.default_rng(0)
    x = draw.random((POINTS, 1))
    release = PrivateDistanceSum().partial_fit(x).release()
    return SimpleNamespace(x=x, y=draw.random((100_000, 1)), release=release)


def distances_are_near(s: SimpleNamespace) -> None:
    few = s.y[:50]
    wanted = np.abs(few - s.x.T).mean(1)
    np.testing.assert_allclose(s.release.query(few, mean=True), wanted, atol=5e-3)


def embeddings() -> SimpleNamespace:
    x, y = embedded()
    return SimpleNamespace(x=x, y=y)


def embedded() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, EMBEDDINGS)
    x = draw.standard_normal((EMBEDDINGS, EMBEDDED), dtype=np.float32)
    x[:, 0] += 4 * y
    return x / np.linalg.norm(x, axis=1, keepdims=True), y


def classifier(s: SimpleNamespace) -> PrivateSimilarityClassifier:
    return PrivateSimilarityClassifier([0, 1], similarity="l2sq", epsilon=1.0, delta=1e-5).fit(s.x, s.y)


def classes_are_told_apart(s: SimpleNamespace) -> None:
    score = classifier(s).score(s.x, s.y)
    if score < 0.9:
        raise ValueError(f"accuracy {score:.3f}")


def opacus_epoch() -> object:
    """Return a call that trains one epoch of a private linear probe."""
    from opacus import PrivacyEngine
    from torch import nn

    x, y = (torch.from_numpy(a) for a in embedded())
    torch.manual_seed(0)

    class Lots(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, i: int) -> object:
            return x[i], y[i]

        def __getitems__(self, chosen: list[int]) -> object:
            return x[chosen], y[chosen]

    model = nn.Linear(EMBEDDED, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    loader = torch.utils.data.DataLoader(Lots(), batch_size=LOT, collate_fn=lambda lot: lot)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=2.0, max_grad_norm=1.0
    )

    def epoch() -> None:
        for a, b in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(a), b).backward()
            optimizer.step()

    return epoch


def products(rows: int, s: SimpleNamespace, threads: int) -> float:
    return 2 * rows * DIM * FREQUENCIES / (FLOPS * threads) * 1e3


CASES = [
    Case(
        name=f"take in {POINTS // 10:,} rows of {DIM}, J={FREQUENCIES}",
        setup=partial(images, POINTS // 10),
        ours=fit,
        peers={f"{LIMIT_FIT:.0f} s for {POINTS:,}": allowed(LIMIT_FIT / 10)},
        gate=answers_are_near,
        target={f"{LIMIT_FIT:.0f} s for {POINTS:,}": 1.0},
        bound_ms=partial(products, POINTS // 10),
        bound="multiply-adds at 94 GFLOP/s a core",
        threads=(2,),
    ),
    Case(
        name=f"answer {QUERIES:,} queries of {DIM} about {POINTS:,} rows, J={FREQUENCIES}",
        setup=partial(images, POINTS),
        ours=lambda s: s.release.query(s.q),
        peers={"exact sum": exact, f"{LIMIT_QUERY} s for 10,000": allowed(LIMIT_QUERY / 10)},
        gate=answers_are_near,
        target={"exact sum": 10.0, f"{LIMIT_QUERY} s for 10,000": 1.0},
        bound_ms=partial(products, QUERIES),
        bound="multiply-adds at 94 GFLOP/s a core",
        threads=(2,),
        facts=lambda s: f"{s.release.nbytes:,} bytes published",
    ),
    Case(
        name="answer 100,000 sums of l1 distances in one coordinate, 256 leaves",
        setup=numbers,
        ours=lambda s: s.release.query(s.y),
        peers={"50 ms": allowed(LIMIT_L1)},
        gate=distances_are_near,
        target={"50 ms": 1.0},
        threads=(1,),
    ),
    Case(
        name=f"fit and release two classes of {EMBEDDINGS:,} rows of {EMBEDDED}",
        setup=embeddings,
        ours=classifier,
        peers={"Opacus, one epoch of twenty": Isolated("opacus_epoch", requires=(OPACUS,))},
        gate=classes_are_told_apart,
        target={"Opacus, one epoch of twenty": 2.5},
    ),
]
