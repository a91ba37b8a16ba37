"""PairConnect: the definition in three loops, causality, decoding from ids alone, strictness, memory, messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import testing
from quernel._errors import QuernelError
from quernel.nn import PairConnect, PairTable
from tests.reference import pairconnect as oracle

VOCAB, DIM, T = 10, 8, 9
# Sums of a few float64 terms, in another order.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
KINDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"rel_buckets": 3}),
    ({"n_hashes": 4}, {"relative": "gain", "rel_buckets": 4, "normalise": "mean"}),
    ({"direct": True, "n_rows": 700}, {"rel_buckets": 4, "normalise": "mean"}),
    ({}, {"normalise": "softmax", "n_heads": 4, "relative": "bias", "rel_buckets": 3}),
    ({"n_hashes": 4}, {"normalise": "softmax", "n_heads": 2, "rel_buckets": 2}),
    ({"storage": "robe", "size": 200, "block": 4}, {"normalise": "softmax", "n_heads": 2, "rel_buckets": 2}),
    ({"storage": "robe", "size": 200, "block": 4}, {"relative": "gain", "rel_buckets": 4}),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: ",".join(f"{a}={b}" for d in k for a, b in d.items()))


def made(kind: Any, dtype: torch.dtype = torch.float64, **rest: Any) -> PairConnect:
    table, options = kind
    generator = torch.Generator().manual_seed(0)
    held = {"n_rows": 60, "dim": DIM, "vocab": VOCAB, "sparse": False, "std": 1.0} | table
    layer = PairConnect(PairTable(**held, dtype=dtype, generator=generator), **options | rest)
    with torch.no_grad():
        for name in ("scores", "gain", "bias"):
            if hasattr(layer, name):
                getattr(layer, name).normal_(generator=generator)
    return layer


def ids_of(batch: int = 3, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def wanted(layer: PairConnect, ids: Tensor, mask: Tensor | None) -> Tensor:
    table = layer.table
    if table.storage == "robe":
        rows = table.views(torch.arange(table.n_rows * table.n_hashes).reshape(-1, 1))
    else:
        rows = table.weight
    rows = rows.detach().reshape(table.n_rows, table.n_hashes, -1).tolist()
    scores = layer.scores.tolist() if hasattr(layer, "scores") else None
    relative = getattr(layer, "gain", getattr(layer, "bias", None))
    held = None if relative is None else relative.tolist()
    buckets = layer.rel_buckets if layer.causal else 2 * layer.rel_buckets - 1
    options = {
        name: getattr(layer, name) for name in ("window", "rel_buckets", "relative", "normalise", "causal", "n_heads")
    }
    options |= {name: getattr(table, name) for name in ("dim", "n_hashes", "n_rows", "direct", "vocab", "seed")}
    options["buckets"] = buckets
    there = (torch.ones_like(ids, dtype=torch.bool) if mask is None else mask).tolist()
    neutral = 0.0 if layer.normalise == "softmax" else 1.0
    found = oracle.mixed(
        ids.tolist(),
        there,
        lambda r, c, x: rows[r][c][x],
        lambda r, h: scores[r][h],
        lambda h, b: neutral if held is None else held[h][b],
        options,
    )
    return torch.tensor(found, dtype=torch.float64)


@every_kind
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_is_the_definition(kind: Any, causal: bool) -> None:
    for window, ragged in itertools.product((1, 7, T, T + 5, None), (False, True)):
        layer, ids = made(kind, causal=causal, window=window), ids_of()
        mask = None
        if ragged:  # right, left and inner padding, and a row of nothing else
            mask = torch.ones(4, T, dtype=torch.bool)
            mask[0, 6:], mask[1, :3], mask[2, 4], mask[3] = False, False, False, False
            ids = torch.cat([ids, ids[:1]])
        got = layer(ids, mask).detach()
        torch.testing.assert_close(got, wanted(layer, ids, mask), **CLOSE)
        if mask is not None:
            assert not bool(got[~mask].any())
            # What stands at padding is not looked at, whatever it is.
            assert torch.equal(layer(ids.masked_fill(~mask, -100), mask), layer(ids, mask))


@every_kind
def test_gradcheck(kind: Any) -> None:
    layer = made(kind, window=4)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    mask = torch.rand(2, 5) > 0.2

    def run(*tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (ids_of(2, 5), mask))

    held = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    assert torch.autograd.gradcheck(run, held, fast_mode=True)


@every_kind
def test_later_tokens_change_nothing(kind: Any) -> None:
    layer, ids = made(kind, window=4), ids_of()
    for s in range(T):
        changed = ids.clone()
        changed[:, s] = (changed[:, s] + 1) % VOCAB
        assert torch.equal(layer(changed)[:, :s], layer(ids)[:, :s])
        assert not torch.equal(layer(changed)[:, s], layer(ids)[:, s])
        assert torch.equal(layer(changed)[:, s + 4 :], layer(ids)[:, s + 4 :])  # beyond the window


@every_kind
@pytest.mark.parametrize("window", [1, 4, T, None])
def test_decoding_step_by_step(kind: Any, window: int | None) -> None:
    layer, ids = made(kind, window=window), ids_of()
    whole, state = layer(ids), layer.start(3)
    for t in range(T):
        y, state = layer.step(state, ids[:, t])
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-5)
        assert state.nbytes <= 3 * 4 * (window or t + 1)
    assert state.dtype is torch.int32


@pytest.mark.parametrize("kind", [k for k in KINDS if "storage" not in k[0]] + [({"storage": "bf16"}, {})], ids=str)
@pytest.mark.parametrize("window", [1, 4])
@torch.no_grad()
def test_streams_equal_steps(kind: Any, window: int) -> None:
    dtype = torch.float32 if kind[0].get("storage") else torch.float64
    layer, ids = made(kind, dtype, window=window, out_proj=True), ids_of()
    state, stream = layer.start(3), layer.stream(3)
    for t in range(T):
        y, state = layer.step(state, ids[:, t])
        assert torch.equal(stream.step(ids[:, t].contiguous()), y)
        assert torch.equal(stream.state, state)
    with torch.no_grad():
        layer.table.weight.mul_(2)  # values may change, the stream sees them
    y, _ = layer.step(state, ids[:, 0])
    assert torch.equal(stream.step(ids[:, 0].contiguous()), y)


def test_streams_refuse_what_they_cannot() -> None:
    for layer in (
        made(KINDS[5]),
        made(KINDS[0], causal=False),
        made(KINDS[0], window=None),
        made(({"combine": "sum"}, {})),
    ):
        with pytest.raises(QuernelError, match=r"decode with step\(state, ids\)"):
            layer.stream()
    stream = made(KINDS[0]).stream(2)
    for ids, message in (
        (torch.tensor([1, 2**32 + 1]), "ids must be in"),
        (torch.tensor([1, -1]), "got -1"),
        (torch.tensor([1]), r"ids must be int64 of shape \(2,\)"),
        (torch.tensor([1, 2], dtype=torch.int32), "got torch.int32"),
    ):
        with pytest.raises(QuernelError, match=message):
            stream.step(ids)


@every_kind
def test_bidirectional_layers_see_both_sides(kind: Any) -> None:
    layer, ids = made(kind, window=3, causal=False), ids_of()
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    moved = (layer(changed) != layer(ids)).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    with pytest.raises(QuernelError, match="step needs causal=True"):
        layer.step(layer.start(3), ids[:, 0])


@every_kind
def test_conformance_of_every_kind(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    example = {"make": lambda: made(kind, torch.float32), "input": lambda g: (ids_of(),)}
    monkeypatch.setattr(PairConnect, "_quernel_example", staticmethod(lambda: example))
    checks = testing.checks_for("module")
    for name in ("outputs", "batch_independence", "gradients", "copy", "config_round_trip", "save_and_load"):
        checks[name](PairConnect)


@pytest.mark.slow
@every_kind
def test_compile_and_export_of_every_kind(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    example = {"make": lambda: made(kind, torch.float32, window=4), "input": lambda g: (ids_of(),)}
    monkeypatch.setattr(PairConnect, "_quernel_example", staticmethod(lambda: example))
    testing.checks_for("module")["compile"](PairConnect)


def test_projection_leaves_padding_at_zero() -> None:
    layer = made(KINDS[3], out_proj=True)
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[1, :4] = False
    y = layer(ids_of(), mask)
    assert not bool(y[~mask].any())
    layer.out_proj = None
    assert y.shape == layer(ids_of(), mask).shape


def test_a_cast_model_computes_in_its_dtype() -> None:
    layer, ids = made(KINDS[0], torch.float32), ids_of()
    assert layer.bfloat16()(ids).dtype is torch.bfloat16
    assert made(({"storage": "bf16"}, {}), None)(ids).dtype is torch.float32
    assert made(KINDS[0])(ids).dtype is torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 8])
def test_any_function_of_pairs_is_in_reach_and_not_of_attention(dim: int) -> None:
    # A random table of full rank over 64 x 64 pairs; the pair (u, v) as two tokens, the second one asked.
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(64, 64, dim, generator=generator)
    u, v = torch.cartesian_prod(torch.arange(64), torch.arange(64)).unbind(1)
    ids, target = torch.stack([v, u], dim=1), f[u, v]
    table = PairTable(64**2 * 2, dim, direct=True, vocab=64, sparse=False, std=0.0)
    layer = PairConnect(table, window=2, rel_buckets=2, normalise="mean")
    ours = trained(lambda: layer(ids)[:, 1], layer, target, 0.1, 400)
    assert ours < 1e-4
    # One head of 8 with free embeddings, values and projection: the best of several rates, trained longer than ours.
    best = min(trained(*attention_of(ids, dim), target, rate, 1000) for rate in (3e-3, 1e-2, 3e-2))
    assert best > 0.1 > ours


def attention_of(ids: Tensor, dim: int) -> tuple[Callable[[], Tensor], nn.Module]:
    torch.manual_seed(0)
    embedding, attention = nn.Embedding(64, 32), nn.MultiheadAttention(8, 1, kdim=32, vdim=32, batch_first=True)
    query, out = nn.Linear(32, 8), nn.Linear(8, dim)

    def run() -> Tensor:
        x = embedding(ids)
        return out(attention(query(x[:, 1:]), x, x, need_weights=False)[0][:, 0])

    return run, nn.ModuleList([embedding, attention, query, out])


def trained(run: Callable[[], Tensor], model: nn.Module, target: Tensor, rate: float, steps: int) -> float:
    """Fit by Adam, the rate going down to nothing; return the mean squared error that is left."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        F.mse_loss(run(), target).backward()
        optimizer.step()
    return float(F.mse_loss(run(), target).detach())


def test_rates_of_tables() -> None:
    layer = made(KINDS[3], out_proj=True)
    dense, rows = layer.param_groups(1e-3)
    assert rows["lr"] == pytest.approx(1e-2)
    assert {id(p) for p in rows["params"]} == {id(layer.table.weight), id(layer.scores)}
    assert len(dense["params"]) == 3  # bias of distances, and the projection's two
    assert layer.param_groups(1e-3, 0.5)[1]["lr"] == 0.5


def test_sparse_training_moves_only_rows_that_occur() -> None:
    layer = PairConnect(PairTable(5000, 8, vocab=50), window=3)
    before = layer.table.weight.detach().clone()
    optimizer = torch.optim.Adagrad(layer.parameters(), lr=0.1)
    layer(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    moved = (layer.table.weight.detach() != before).any(1)
    assert 0 < int(moved.sum()) <= 6 * 2  # six pairs, two chunks each


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({}, {"window": 0}, "window must be an integer in"),
        ({}, {"rel_buckets": 0}, "rel_buckets must be an integer in"),
        ({}, {"normalise": "max"}, "normalise must be one of"),
        ({}, {"relative": "rotary"}, "relative must be one of"),
        ({}, {"relative": "bias"}, "relative='gain' is for sums and 'bias' for normalise='softmax'"),
        ({}, {"relative": "gain", "normalise": "softmax"}, "relative='gain' is for sums"),
        ({}, {"relative": "gain", "window": None}, "rel_buckets must be given for relative='gain' without a window"),
        ({}, {"n_heads": 2}, "n_heads > 1 is for normalise='softmax'"),
        ({}, {"n_heads": 3, "normalise": "softmax"}, "n_heads=3 and n_hashes=2 must cut dim=8"),
        ({"direct": True, "n_rows": 300}, {"rel_buckets": 4}, r"10\^2 \* 4 = 400 for direct=True; got 300"),
        ({"direct": True, "n_rows": 600}, {"rel_buckets": 4, "causal": False}, r"10\^2 \* 7 = 700"),
    ],
)
def test_bad_arguments_are_named(table: Any, options: Any, message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        made((table, options))


def test_bad_inputs_are_named() -> None:
    layer, ids = made(KINDS[0]), ids_of()
    with pytest.raises(QuernelError, match=r"ids must be in \[0, 10\); got 10"):
        layer(ids.clone().fill_(10))
    with pytest.raises(QuernelError, match="got -1"):
        layer(ids.clone().fill_(-1))
    with pytest.raises(QuernelError, match="got -1"):
        layer(ids.clone().fill_(-1), torch.ones_like(ids, dtype=torch.bool))
    with pytest.raises(QuernelError, match="mask must be boolean of the shape of ids"):
        layer(ids, torch.ones_like(ids))
    with pytest.raises(QuernelError, match=r"ids must have shape \(3,\), one a stream"):
        layer.step(layer.start(3), ids[:2, 0])
    with pytest.raises(QuernelError, match="ids must be in"):
        layer.step(layer.start(1), torch.tensor([2**32 + 1]))
    with pytest.raises(QuernelError, match="n_heads must divide n_hashes=2 for storage='robe'"):
        made(({"storage": "robe", "size": 99}, {"normalise": "softmax", "n_heads": 4}))(ids)
