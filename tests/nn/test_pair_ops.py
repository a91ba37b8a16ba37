"""``quernel::pair_sum``: gradients, dtypes, threads, memory, bad operands; the definition is tested with the module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.hashing.mixers import mix64
from quernel.nn import _pair_kernels, _pair_ops, _pair_plain
from quernel.nn._block_plain import wide_dtype
from quernel.nn._pair_kernels import GAP, LAYOUT, MEAN, SOFTMAX, SQRT
from quernel.nn._pair_ops import Layout, pair_rows, pair_sum

STATE = int(np.uint64(mix64(3)).view(np.int64))
VOCAB, DIM, ROWS, DISTANCES = 9, 8, 50, 3
# float64 sums of a few terms, in another order.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
KINDS = [
    {"normaliser": SQRT, "hashes": 2, "keyed": 1},
    {"normaliser": MEAN, "hashes": 4, "causal": 0, "window": 3},
    {"normaliser": SOFTMAX, "hashes": 2, "heads": 4, "window": 0, "related": True},
    {"normaliser": SOFTMAX, "hashes": 1, "heads": 2, "direct": 1, "causal": 0, "related": True},
    {"normaliser": SQRT, "hashes": 1, "direct": 1, "keyed": 1, "causal": 0},
    {"normaliser": MEAN, "hashes": 1, "related": True, "window": 4},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: ",".join(f"{a}={b}" for a, b in k.items()))


def case(kind: dict[str, Any], dtype: torch.dtype = torch.float64, batch: int = 3) -> dict[str, Any]:
    options = {"window": 6, "causal": 1, "heads": 1, "direct": 0, "keyed": 0} | kind
    related = options.pop("related", False)
    buckets = DISTANCES if options["causal"] else 2 * DISTANCES - 1
    rows = VOCAB**2 * (buckets if options["keyed"] else 1) if options["direct"] else ROWS
    layout = Layout(
        state=STATE, rows=rows, chunk=DIM // options["hashes"], vocab=VOCAB, distances=DISTANCES, **options
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).requires_grad_()

    wide = wide_dtype(dtype)
    ids = torch.randint(0, VOCAB, (batch, 11), generator=generator)
    ids[1, 5], ids[2, :4] = GAP, GAP
    return {
        "weight": drawn(rows * layout.hashes, layout.chunk),
        "scores": drawn(rows, layout.heads, kind=wide) if layout.normaliser == SOFTMAX else None,
        "relative": drawn(layout.heads, buckets, kind=wide) if related else None,
        "ids": ids,
        "layout": layout,
    }


def summed(held: dict[str, Any], **rest: Any) -> Tensor:
    given = {"scores": held["scores"], "relative": held["relative"]} | rest
    return pair_sum(held["weight"], held["ids"], held["layout"], **given)


def leaves(held: dict[str, Any]) -> list[Tensor]:
    return [held[name] for name in ("weight", "scores", "relative") if held[name] is not None]


def plain(held: dict[str, Any]) -> tuple[Any, ...]:
    tensors = (None if held[n] is None else held[n].detach() for n in ("weight", "scores", "relative"))
    return *tensors, held["ids"], list(held["layout"])


def test_layout_is_what_the_kernels_read() -> None:
    assert Layout._fields == LAYOUT


@every_kind
@pytest.mark.parametrize("queries", [0, 1, 4])
@pytest.mark.usefixtures("poisoned_memory")
def test_torch_operations_agree(kind: dict[str, Any], queries: int) -> None:
    # What other devices run, here on the CPU; gradients dense and sparse.
    held = case(kind)
    out = summed(held, queries=queries)
    torch.testing.assert_close(out.detach(), _pair_plain.sum_plain(*plain(held), queries), **CLOSE)
    grad = torch.randn_like(out)
    dense = torch.autograd.grad(out, leaves(held), grad)
    sparse = torch.autograd.grad(summed(held, queries=queries, sparse=True), leaves(held), grad)
    found = [g for g in _pair_plain.gradient_plain(grad, *plain(held), queries) if g.numel()]
    for a, b, c in zip(dense, sparse, found, strict=True):
        torch.testing.assert_close(b.to_dense() if b.is_sparse else b, a, **CLOSE)
        torch.testing.assert_close(c, a, **CLOSE)
    padding = len(held["weight"])
    rows = pair_rows(held["ids"], held["layout"], padding, queries=queries)
    assert torch.equal(rows, _pair_plain.rows_plain(held["ids"], list(held["layout"]), queries, padding))
    used = rows[rows < padding].unique()
    few = _pair_plain.gradient_plain(grad, *plain(held), queries, used)[0]
    assert sparse[0].is_coalesced()
    assert torch.equal(sparse[0].indices()[0], used)
    torch.testing.assert_close(few, sparse[0].values(), **CLOSE)


@every_kind
def test_gradcheck(kind: dict[str, Any]) -> None:
    held = case(kind)
    names = [n for n in ("weight", "scores", "relative") if held[n] is not None]

    def run(*tensors: Tensor) -> Tensor:
        return summed(held | dict(zip(names, tensors, strict=True)), queries=3)

    assert torch.autograd.gradcheck(run, leaves(held), fast_mode=True)


@every_kind
def test_other_dtypes_and_ids(kind: dict[str, Any]) -> None:
    wanted = summed(case(kind))
    single, half = case(kind, torch.float32), case(kind, torch.bfloat16)
    assert summed(single).dtype is torch.float32
    torch.testing.assert_close(summed(single).double(), wanted, rtol=1e-4, atol=1e-5)
    rounded = half | {"weight": half["weight"].detach().float()}
    torch.testing.assert_close(summed(half), summed(rounded), rtol=1e-6, atol=1e-6)  # rows are widened exactly
    assert torch.equal(summed(single | {"ids": single["ids"].int()}), summed(single))
    spread = torch.stack([single["ids"]] * 2, dim=-1)[..., 0]
    assert torch.equal(summed(single | {"ids": spread}), summed(single))
    summed(half).sum().backward()
    assert half["weight"].grad.dtype is torch.bfloat16


def test_scores_of_any_size_are_weighed() -> None:
    held = case({"normaliser": SOFTMAX, "hashes": 1}, torch.float32)
    held["scores"] = (held["scores"].detach() + 1) * 1e4
    got = summed(held)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got.detach(), _pair_plain.sum_plain(*plain(held), 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_numbers_do_not_depend_on_threads(sparse: bool) -> None:
    held = case({"normaliser": SOFTMAX, "hashes": 2, "related": True}, torch.float32, batch=600)
    grad, found = torch.randn(600, 11, DIM), []
    for count in (1, 2, 3):
        with threads(count):
            out = summed(held, sparse=sparse)
            grads = torch.autograd.grad(out, leaves(held), grad)
            found.append([out.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_backward_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    held = case(KINDS[2])
    out = summed(held)
    grad = torch.randn_like(out)
    for sparse in (False, True):
        whole = torch.autograd.grad(summed(held, sparse=sparse), leaves(held), grad)
        monkeypatch.setattr(_pair_ops, "_BLOCK_PAIRS", 40)
        parts = torch.autograd.grad(summed(held, sparse=sparse), leaves(held), grad)
        monkeypatch.undo()
        for a, b in zip(whole, parts, strict=True):
            assert torch.equal(a.to_dense() if sparse and a.is_sparse else a, b.to_dense() if b.is_sparse else b)


@pytest.mark.parametrize("name", ["note_rows", "number_rows"])
def test_an_interrupted_backward_leaves_no_marks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, kernel, calls = case(KINDS[0]), getattr(_pair_kernels, name), []
    grad = torch.randn(summed(held).shape, dtype=torch.float64)
    wanted = torch.autograd.grad(summed(held, sparse=True), held["weight"], grad)[0]

    def interrupted(*arguments: Any) -> Any:
        calls.append(kernel(*arguments))
        if len(calls) == (3 if name == "note_rows" else 1):
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(_pair_ops, "_BLOCK_PAIRS", 40)
    monkeypatch.setattr(_pair_kernels, name, interrupted)
    blocks = _pair_ops._Blocks(grad, held["weight"], None, None, held["ids"], held["layout"], 11)
    with pytest.raises(KeyboardInterrupt):
        blocks.__enter__()
    monkeypatch.undo()
    again = torch.autograd.grad(summed(held, sparse=True), held["weight"], grad)[0]
    assert torch.equal(again.indices(), wanted.indices()) and torch.equal(again.values(), wanted.values())


def test_ops_are_well_formed() -> None:
    for kind in KINDS[:3]:
        held = case(kind, torch.float32)
        arguments = (*plain(held), 0)
        torch.library.opcheck(_pair_ops._sum, arguments, test_utils=("test_schema", "test_faketensor"))
        grad = torch.randn(summed(held).shape)
        torch.library.opcheck(_pair_ops._gradient, (grad, *arguments), test_utils=("test_schema", "test_faketensor"))
        rows = (held["ids"], list(held["layout"]), 2, len(held["weight"]))
        torch.library.opcheck(_pair_ops._rows, rows, test_utils=("test_schema", "test_faketensor"))


def test_training_compiles_with_dense_gradients() -> None:
    held = case(KINDS[0], torch.float32)
    runs = (summed, torch.compile(summed, backend="aot_eager", fullgraph=True))
    grads = [torch.autograd.grad(run(held).square().sum(), held["weight"])[0] for run in runs]
    torch.compiler.reset()
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_sum(shape: tuple[int, int]) -> None:
    held = case(KINDS[0]) | {"ids": torch.zeros(shape, dtype=torch.long)}
    for sparse in (False, True):
        out = summed(held, sparse=sparse)
        assert out.shape == (*shape, DIM)
        grad = torch.autograd.grad(out.sum(), held["weight"])[0]
        assert not bool((grad.to_dense() if sparse else grad).any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([[1, 9]])}, r"ids must be in \[0, 9\); got 9"),
        ({"ids": torch.tensor([[-1, 1]])}, r"ids must be in \[0, 9\); got -1"),
        ({"ids": torch.tensor([[2**40]])}, "got 1099511627776"),
        ({"ids": torch.zeros(2, 3)}, "ids must be integers of shape"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, "ids must be integers of shape"),
        ({"weight": torch.zeros(7, 4)}, r"weight must be float32, float64 or bfloat16 of shape \(100, 4\)"),
        ({"weight": torch.zeros(100, 4, dtype=torch.float16)}, "got torch.float16"),
        ({"scores": torch.zeros(50, 1)}, "scores must be given for softmax"),
        ({"relative": torch.zeros(1, 9)}, r"relative must have shape \(1, 3\)"),
        ({"queries": 4, "ids": torch.zeros(1, 3, dtype=torch.long)}, "queries must be at most the 3 tokens"),
    ],
)
def test_bad_operands_are_named(change: dict[str, Any], message: str) -> None:
    held = case(KINDS[0], torch.float32)
    with pytest.raises(QuernelError, match=message):
        summed(held | {k: v for k, v in change.items() if k != "queries"}, queries=change.get("queries", 0))
