"""``quernel::block_bag``: the written definition, wrapped blocks included, gradients, dtypes, threads, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._timing import threads
from quernel.hashing import BlockMap
from quernel.nn import _block_ops, _block_plain
from quernel.nn._block_ops import BlockTable, Field, block_bag, max_rows
from tests.reference import robe as oracle

# Sums of a few terms, taken in another order.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
PRIME = {"a": 1_234_567, "b": 7_654_321, "c": 42, "prime": 2038074743}
DIM, SEED, ROWS = 20, 5, 30
# Divisors of the row, others, more than a row, and lengths at which rows straddle sign words and vectors.
SIZES = [(DIM, z) for z in (1, 2, 3, 4, 8, 16, DIM, 3 * DIM, 33)] + [(16, 16), (16, 8), (70, 32), (64, 16), (1, 1)]
every_size = pytest.mark.parametrize(("dim", "block"), SIZES)


def terms_of(mapped: BlockMap, row: int) -> list[tuple[int, int]]:
    if mapped.prime is None:
        starts = oracle.mixed_starts(mapped.seed, mapped.n_starts)
    else:
        starts = oracle.published_starts(*PRIME.values(), mapped.n_starts, mapped.per_row)
    signs = oracle.random_signs(mapped.seed) if mapped.signs else lambda position: 1
    return oracle.terms(row, mapped.dim, mapped.size, mapped.block, starts, signs)


def array(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def small(dim: int, block: int) -> BlockMap:
    # Hardly longer than a block, so that most blocks wrap.
    return BlockMap(block + 5, dim, block, SEED)


@every_size
@pytest.mark.usefixtures("poisoned_memory")
def test_rows_are_the_definition(dim: int, block: int) -> None:
    for mapped in (small(dim, block), BlockMap(block + 5, dim, block, SEED, signs=False, circular=False)):
        values, table = array(mapped.size), BlockTable.of(mapped, [Field(7, ROWS)])
        got = block_bag(values, torch.arange(ROWS).reshape(-1, 1), table)
        wanted = [[sign * values[slot] for slot, sign in terms_of(mapped, 7 + e)] for e in range(ROWS)]
        assert torch.equal(got, torch.tensor(wanted))


def test_large_rows_and_large_arrays() -> None:
    mapped = BlockMap(1000, 16, 16, SEED)
    last = max_rows(mapped) - 1
    table = BlockTable.of(mapped, [Field(0, last + 1)])
    values, ids = array(1000), [last, last // 3, 2**40 + 1]
    got = block_bag(values, torch.tensor(ids).reshape(-1, 1), table)
    assert torch.equal(got, torch.tensor([[s * values[p] for p, s in terms_of(mapped, e)] for e in ids]))
    # More than 2^32 places take the long product; the array itself would not fit here.
    big = BlockMap(2**33, 4, 4, SEED)
    layout = _block_plain.Layout(*BlockTable.of(big, [Field(0, 9)]).layout)
    slots = _block_plain.slots_of(layout, None, torch.arange(9))
    assert torch.equal(slots, torch.from_numpy(big.index(np.arange(9))))


@pytest.mark.parametrize("circular", [True, False])
@every_size
def test_published_map(dim: int, block: int, circular: bool) -> None:
    mapped = BlockMap.mod_prime(**PRIME, size=block + 9, dim=dim, block=block, circular=circular)
    values, table = array(mapped.size), BlockTable.of(mapped, [Field(0, ROWS)])
    got = block_bag(values, torch.arange(ROWS).reshape(-1, 1), table)
    assert torch.equal(got, torch.tensor([[values[slot] for slot, _ in terms_of(mapped, e)] for e in range(ROWS)]))


@every_size
def test_given_starts_and_signs(dim: int, block: int) -> None:
    draw = np.random.default_rng(0)
    size, per_row = block + 5, -(-dim // block)
    n_blocks = ROWS * per_row if block <= dim else -(-ROWS * dim // block)
    signs = draw.choice([-1, 1], n_blocks * block)
    mapped = BlockMap.explicit(draw.integers(0, size, n_blocks), size, dim, block, signs=signs)
    assert max_rows(mapped) >= ROWS
    values, rows = array(size), np.arange(ROWS)
    got = block_bag(values, torch.arange(ROWS).reshape(-1, 1), BlockTable.of(mapped, [Field(0, ROWS)]))
    assert torch.equal(got, torch.from_numpy(mapped.signs_of(rows)) * values[torch.from_numpy(mapped.index(rows))])


def test_identity_map_is_an_embedding() -> None:
    for dim in (5, 16, 48):
        mapped = BlockMap.explicit(np.arange(ROWS) * dim, ROWS * dim, dim, dim)
        values, ids = array(ROWS * dim).requires_grad_(), torch.randint(0, ROWS, (64,))
        got = block_bag(values, ids.reshape(-1, 1), BlockTable.of(mapped, [Field(0, ROWS)]))
        weight = values.detach().reshape(ROWS, dim).clone().requires_grad_()
        wanted = F.embedding(ids, weight)
        assert torch.equal(got, wanted)
        grad = torch.randn(64, dim)
        (by_ours,) = torch.autograd.grad(got, values, grad)
        (by_torch,) = torch.autograd.grad(wanted, weight, grad)
        assert torch.equal(by_ours.reshape(ROWS, dim), by_torch)


def bag_case(mean: bool, fields: int, dim: int = DIM, block: int = 8) -> dict[str, Any]:
    """Return bags of unlike length, empty ones at the ends and in between, with padding and weights."""
    generator = torch.Generator().manual_seed(2)
    described = [Field(100 * f, ROWS, padding=3, scale=1.0 + f) for f in range(fields)]
    lengths = torch.tensor([0, 2, 5, 0, 0, 1, 4, 0]) if fields == 1 else torch.full((6,), fields)
    n = int(lengths.sum())
    return {
        "mapped": small(dim, block),
        "fields": described,
        "ids": torch.randint(0, 6, (n,), generator=generator),
        "bounds": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        "weights": None if mean else torch.randn(n, generator=generator, dtype=torch.float64),
        "mean": mean,
    }


def factors(case: dict[str, Any], bag_of: list[int]) -> list[float]:
    """Return what each row is multiplied by, from the words of the docstring."""
    ids, fields = case["ids"].tolist(), case["fields"]
    given = [1.0] * len(ids) if case["weights"] is None else case["weights"].tolist()
    present = [key != 3 for key in ids]
    counts = {bag: sum(p for p, b in zip(present, bag_of, strict=True) if b == bag) for bag in set(bag_of)}
    scales = [fields[i % len(fields)].scale for i in range(len(ids))]
    shares = [1 / counts[bag] if case["mean"] and counts[bag] else 1.0 for bag in bag_of]
    return [s * w * c for s, w, c in zip(scales, given, shares, strict=True)]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("fields", [1, 3])
@pytest.mark.parametrize("block", [1, 8, 50])
@pytest.mark.usefixtures("poisoned_memory")
def test_bags_and_gradients_are_the_definition(mean: bool, fields: int, block: int) -> None:
    case = bag_case(mean, fields, block=block)
    mapped, ids, bounds = case["mapped"], case["ids"], case["bounds"]
    n_bags = len(bounds) - 1
    bag_of = torch.repeat_interleave(torch.arange(n_bags), bounds.diff()).tolist()
    keys = [(i % fields, key) for i, key in enumerate(ids.tolist())]

    def of_row(key: Any) -> Any:
        f, row = key if isinstance(key, tuple) else (0, key)
        return None if row == 3 else terms_of(mapped, 100 * f + row)

    values = array(mapped.size, torch.float64).requires_grad_()
    weights = None if case["weights"] is None else case["weights"].clone().requires_grad_()
    table = BlockTable.of(mapped, case["fields"])
    # Bags of equal length may also come as a matrix.
    shaped = {"bounds": bounds} if fields == 1 else {}
    by_matrix = ids if fields == 1 else ids.reshape(-1, fields)
    given = None if weights is None else weights.reshape(by_matrix.shape)
    out = block_bag(values, by_matrix, table, weights=given, mean=mean, **shaped)
    scale = factors(case, bag_of)
    wanted = oracle.bags(values.tolist(), keys, scale, bag_of, n_bags, of_row)
    torch.testing.assert_close(out, torch.tensor(wanted, dtype=torch.float64), **CLOSE)
    grad = torch.randn(out.shape, dtype=torch.float64)
    out.backward(grad)
    wanted = oracle.gradient(mapped.size, keys, scale, bag_of, of_row, grad.tolist())
    torch.testing.assert_close(values.grad, torch.tensor(wanted, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("block", [1, 8, DIM, 50])
def test_gradcheck(mean: bool, block: int) -> None:
    case = bag_case(mean, 1, dim=6, block=block)
    table = BlockTable.of(case["mapped"], case["fields"])
    values = array(case["mapped"].size, torch.float64).requires_grad_()
    weights = case["weights"] if mean else case["weights"].requires_grad_()

    def run(values: Tensor, weights: Tensor | None) -> Tensor:
        return block_bag(values, case["ids"], table, bounds=case["bounds"], weights=weights, mean=mean)

    assert torch.autograd.gradcheck(run, (values, weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [3, 16])
def test_other_dtypes(dtype: torch.dtype, block: int) -> None:
    mapped = small(16, block)
    values = array(mapped.size, dtype).requires_grad_()
    table, ids = BlockTable.of(mapped, [Field(0, ROWS)]), torch.randint(0, ROWS, (40, 3))
    rows = block_bag(values, ids.reshape(-1, 1), table)
    assert rows.dtype == dtype
    wanted = block_bag(values.double(), ids.reshape(-1, 1), table)
    assert torch.equal(rows.double(), wanted)  # a row is copied, whatever the dtype
    sums = block_bag(values, ids, table)
    whole = block_bag(values.double(), ids, table)
    # One rounding of a sum that was taken in float32.
    assert torch.equal(sums, whole.float().to(dtype)) or dtype is torch.float64
    sums.sum().backward()
    held = values.detach().double().requires_grad_()
    block_bag(held, ids, table).sum().backward()
    assert torch.equal(values.grad, held.grad.to(dtype))  # sums of +-1: exact before the one rounding


def test_every_float16_is_widened_exactly() -> None:
    # All 65,536 bit patterns as an array, read through the identity.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    mapped = BlockMap.explicit(np.arange(2**12) * 16, 2**16, 16, 16)
    table = BlockTable.of(mapped, [Field(0, 2**12)])
    ids = torch.arange(2**12).reshape(-1, 1)
    rows = block_bag(values, ids, table).reshape(-1)
    same = (rows == values) | (rows.isnan() & values.isnan())
    assert bool(same.all())
    assert bool((rows.signbit() == values.signbit())[~values.isnan()].all())


def test_numbers_do_not_depend_on_threads() -> None:
    mapped = BlockMap(5000, 16, 16, SEED)
    table, ids = BlockTable.of(mapped, [Field(0, 10**9)]), torch.randint(0, 10**9, (20_000, 1))
    grad, found = torch.randn(20_000, 16), []
    for count in (1, 2, 3):
        with threads(count):
            values = array(5000).requires_grad_()
            out = block_bag(values, ids, table)
            out.backward(grad)
            found.append((out.detach(), values.grad))
    for out, by_values in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(by_values, found[0][1])


@pytest.mark.parametrize("ids", [torch.tensor([[0], [1]], dtype=torch.int32), torch.arange(8).reshape(4, 2)[:, ::2]])
def test_kinds_of_ids(ids: Tensor) -> None:
    mapped = small(16, 16)
    table, values = BlockTable.of(mapped, [Field(0, ROWS)]), array(mapped.size)
    assert torch.equal(block_bag(values, ids, table), block_bag(values, ids.long().contiguous(), table))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("block", [1, 8, 50])
def test_torch_operations_agree(mean: bool, block: int) -> None:
    # What other devices run, here on the CPU.
    case = bag_case(mean, 1, block=block)
    for mapped in (case["mapped"], BlockMap.mod_prime(**PRIME, size=70, dim=DIM, block=block)):
        table = BlockTable.of(mapped, case["fields"])
        values, ids, bounds, weights = array(mapped.size), case["ids"], case["bounds"], case["weights"]
        described = (None, None, list(table.layout), list(table.fields), list(table.scales))
        got = _block_plain.bag_plain(values, ids, bounds, weights, *described, mean, False)
        torch.testing.assert_close(
            got, block_bag(values, ids, table, bounds=bounds, weights=weights, mean=mean), **CLOSE
        )
        grad = torch.randn(got.shape)
        arguments = (grad, ids, bounds, weights, *described, mean)
        torch.testing.assert_close(_block_plain.scatter_plain(*arguments), _block_ops._scatter(*arguments), **CLOSE)
        if not mean:
            arguments = (values, grad, ids, bounds, *described)
            torch.testing.assert_close(_block_plain.dots_plain(*arguments), _block_ops._dots(*arguments), **CLOSE)


def test_sparse_gradient() -> None:
    case = bag_case(False, 1)
    table, grads = BlockTable.of(case["mapped"], case["fields"]), []
    for sparse in (False, True):
        values = array(case["mapped"].size).requires_grad_()
        weights = case["weights"].float()
        out = block_bag(values, case["ids"], table, bounds=case["bounds"], weights=weights, sparse=sparse)
        grads.append(torch.autograd.grad(out.square().sum(), values)[0])
    assert grads[1].is_coalesced()
    torch.testing.assert_close(grads[1].to_dense(), grads[0], **CLOSE)


def test_ops_are_well_formed() -> None:
    case = bag_case(False, 1)
    table = BlockTable.of(case["mapped"], case["fields"])
    values, weights = array(case["mapped"].size).requires_grad_(), case["weights"].float().requires_grad_()
    described = (None, None, list(table.layout), list(table.fields), list(table.scales))
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (values, case["ids"], case["bounds"], weights, *described, False, False)
    torch.library.opcheck(_block_ops._bag, arguments, test_utils=utils)
    grad = torch.randn(len(case["bounds"]) - 1, DIM)
    utils = ("test_schema", "test_faketensor")
    plain = (grad, case["ids"], case["bounds"], weights.detach(), *described, False)
    torch.library.opcheck(_block_ops._scatter, plain, test_utils=utils)
    plain = (values.detach(), grad, case["ids"], case["bounds"], *described)
    torch.library.opcheck(_block_ops._dots, plain, test_utils=utils)


@pytest.mark.parametrize("shape", [(0, 1), (0, 4), (3, 0)])
def test_nothing_to_sum(shape: tuple[int, int]) -> None:
    table = BlockTable.of(small(16, 16), [Field(0, ROWS)])
    values = array(21).requires_grad_()
    out = block_bag(values, torch.zeros(shape, dtype=torch.long), table, mean=True)
    assert torch.equal(out, torch.zeros(shape[0], 16))
    out.sum().backward()
    assert torch.equal(values.grad, torch.zeros(21))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([[0], [-1]])}, r"ids must be in \[0, 30\); got -1"),
        ({"ids": torch.tensor([[30], [0]])}, r"ids must be in \[0, 30\); got 30"),
        ({"ids": torch.tensor([[2**63 - 1]])}, "got 9223372036854775807"),
        ({"ids": torch.zeros(2, 1)}, r"ids must be integers; got torch.float32. Convert them with .long\(\)"),
        ({"ids": torch.zeros(2, 1, dtype=torch.bool)}, "ids must be integers"),
        ({"ids": torch.zeros(3, dtype=torch.long)}, "ids must have 2 dimensions, or 1 with offsets"),
        ({"values": torch.zeros(9)}, r"values must be floating of shape \(21,\)"),
        ({"values": torch.zeros(21, dtype=torch.long)}, "values must be floating"),
        ({"weights": torch.ones(3)}, r"per_sample_weights must have the shape of ids, \(2, 1\)"),
        ({"ids": torch.zeros(3, dtype=torch.long), "bounds": torch.tensor([1, 3])}, "offsets must begin with 0"),
        ({"ids": torch.zeros(3, dtype=torch.long), "bounds": torch.tensor([0, 2, 1, 3])}, "never decrease"),
        ({"ids": torch.zeros(3, dtype=torch.long), "bounds": torch.tensor([0, 4])}, "end within the 3 ids"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"values": array(21), "ids": torch.zeros(2, 1, dtype=torch.long)} | change
    with pytest.raises(QuernelError, match=message):
        block_bag(given.pop("values"), given.pop("ids"), BlockTable.of(small(16, 16), [Field(0, ROWS)]), **given)


def test_gradients_refuse_what_the_kernels_cannot_read() -> None:
    table = BlockTable.of(small(16, 16), [Field(0, ROWS)])
    described = (None, None, list(table.layout), list(table.fields), list(table.scales))
    ids = torch.tensor([[3], [ROWS]])
    with pytest.raises(QuernelError, match="ids must be in"):
        _block_ops._scatter(torch.ones(2, 16), ids, None, None, *described, False)
    with pytest.raises(QuernelError, match="ids must be in"):
        _block_ops._dots(array(21), torch.ones(2, 16), ids, None, *described)
    with pytest.raises(QuernelError, match=r"grad must have shape \(2, 16\); got \(1, 16\)"):
        _block_ops._scatter(torch.ones(1, 16), ids[:1].expand(2, 1), None, None, *described, False)


def test_the_field_of_a_bad_id_is_named() -> None:
    table = BlockTable.of(small(16, 16), [Field(0, 9), Field(9, 4)])
    with pytest.raises(QuernelError, match=r"ids of field 1 must be in \[0, 4\); got 5"):
        block_bag(array(21), torch.tensor([[8, 3], [8, 5]]), table)
