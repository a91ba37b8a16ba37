"""Logits of a fixed simplex without its matrix, against the dense product with it, batch 256, float32.

The dense product is K (K - 1) multiply-adds a row; without the matrix a row is read twice and written once.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._runner import Case
from quernel.nn.functional import simplex_logits, simplex_prototypes

BATCH = 256
# Features and logits of these sizes stay in the last level of the cache.
L3_BYTES = 97e9


def setup(k: int) -> SimpleNamespace:
    z = torch.randn(BATCH, k - 1, generator=torch.Generator().manual_seed(0))
    y = torch.arange(BATCH) % k
    return SimpleNamespace(z=z, y=y, w=simplex_prototypes(k), leaf=z.clone().requires_grad_(), k=k)


@torch.inference_mode()
def ours(s: SimpleNamespace) -> Tensor:
    return simplex_logits(s.z)


@torch.inference_mode()
def dense(s: SimpleNamespace) -> Tensor:
    return F.linear(s.z, s.w)


def trained(logits: Tensor, s: SimpleNamespace) -> Tensor:
    return torch.autograd.grad(F.cross_entropy(logits, s.y), s.leaf)[0]


def ours_trained(s: SimpleNamespace) -> Tensor:
    return trained(simplex_logits(s.leaf), s)


def dense_trained(s: SimpleNamespace) -> Tensor:
    return trained(F.linear(s.leaf, s.w), s)


def is_the_product(s: SimpleNamespace) -> None:
    wanted = s.z.double() @ simplex_prototypes(s.k, dtype=torch.float64).T
    if not float((ours(s).double() - wanted).abs().max()) < 1e-5:
        raise ValueError("logits differ from the product")
    torch.testing.assert_close(ours_trained(s), dense_trained(s), rtol=1e-3, atol=1e-7)


def bound(passes: int, s: SimpleNamespace, threads: int) -> float:
    return passes * 4 * BATCH * s.k / (L3_BYTES * threads) * 1e3


CASES = [
    *(
        Case(
            name=f"logits of {k} prototypes, batch {BATCH}",
            setup=partial(setup, k),
            ours=ours,
            peers={"dense product": dense},
            gate=is_the_product,
            target={"dense product": 20.0},
            bound_ms=partial(bound, 2),
            bound="features read once and logits written once, 97 GB/s a core",
        )
        for k in (1024, 4096)
    ),
    *(
        Case(
            name=f"cross-entropy and its gradient, {k} prototypes, batch {BATCH}",
            setup=partial(setup, k),
            ours=ours_trained,
            peers={"dense product": dense_trained},
            gate=is_the_product,
            # Features in, logits out and in, their gradient out and in, the features' gradient out.
            bound_ms=partial(bound, 6),
            bound="six arrays of the batch read or written once, 97 GB/s a core",
        )
        for k in (1024, 4096)
    ),
]
