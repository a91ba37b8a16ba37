"""DGQ's search against the written-down form, its limits, its guarantees, and rounding with error feedback."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quernel._errors import QuernelError
from quernel.nn.functional import compensate, dgq_search, round_to_nearest
from quernel.nn.functional import dual_grained as module
from quernel.nn.functional.dual_grained import coarse_ratios, coarse_search, fine_ratios, fine_search, requantise
from tests.reference import dgq as reference

# float32 sums of d H d^T against float64 sums of (X d)^2.
GRAM = 1e-4
# Neither grid holds the ratio 1, so a weight that lies on the grid does not quite come back.
ON_GRID_FINE, ON_GRID = 1e-5, 3e-3
# Of nested searches in float64, one holds every point of the other.
NESTED = 1 + 1e-12


def problem(out=6, inputs=64, tokens=200, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, inputs, generator=generator, dtype=dtype)
    X = torch.randn(tokens, inputs, generator=generator, dtype=dtype) * torch.logspace(0.5, -1, inputs, dtype=dtype)
    return W, X + X[:, :1] / 2  # correlated, as activations are


def awkward_rows(inputs):
    """Constant, zero, one-signed groups, a lone outlier, a whole row of zeros."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(7, inputs, generator=generator, dtype=torch.float64)
    W[0, :32], W[1, :32] = 0.3, 0.0
    W[2], W[3] = W[2].abs() + 0.1, -W[3].abs() - 0.1
    W[4, 5] = 100.0
    W[5] = 0.0
    W[6, :32] = -0.2
    return W


@pytest.mark.parametrize("inputs", [64, 96])
@pytest.mark.parametrize("rows", ["normal", "awkward"])
def test_search_is_the_written_down_one(inputs, rows):
    W, X = problem(inputs=inputs)
    W = W if rows == "normal" else awkward_rows(inputs)
    found = dgq_search(W, X.T @ X, 32, (5, 9))
    wanted = reference.search(W.numpy(), X.numpy(), 32, (5, 9))
    for name in ("q", "S2", "z"):
        np.testing.assert_array_equal(getattr(found, name).numpy(), wanted[name])
    np.testing.assert_allclose(found.s1.numpy(), wanted["s1"])
    np.testing.assert_allclose(found.error.numpy(), wanted["error"], rtol=1e-9, atol=1e-9)
    first = fine_search(W, X.T @ X, 32, fine_ratios(5))
    np.testing.assert_allclose(first.error.numpy(), wanted["group_error"], rtol=1e-9, atol=1e-9)


def test_float32_errors_are_those_of_the_outputs():
    W, X = (part.float() for part in problem(out=16, inputs=256, tokens=500))
    found = dgq_search(W, X.T @ X, 64)
    direct = (X.double() @ (W - found.dense()).T.double()).square().sum(0)
    np.testing.assert_allclose(found.error.numpy(), direct.numpy(), rtol=GRAM)
    np.testing.assert_allclose(found.signal.numpy(), (X @ W.T).double().square().sum(0).numpy(), rtol=GRAM)
    assert found.relative_errors[1] == pytest.approx(float((direct.sum() / found.signal.sum()).sqrt()), rel=GRAM)


def test_tiles_of_the_gram_matrix_change_nothing(monkeypatch):
    W, X = problem(inputs=160)
    whole = dgq_search(W, X.T @ X, 32, (3, 5))
    monkeypatch.setattr(module, "TILE", 48)
    tiled = dgq_search(W, X.T @ X, 32, (3, 5))
    assert torch.equal(whole.q, tiled.q)
    torch.testing.assert_close(whole.error, tiled.error)


def test_blocks_of_rows_change_nothing(monkeypatch):
    W, X = problem(out=40)
    whole = dgq_search(W, X.T @ X, 32, (3, 5))
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)  # the least: 16 rows
    parts = dgq_search(W, X.T @ X, 32, (3, 5))
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("q", "S2", "z", "s1"))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_products_stay_in_int8(group_size):
    for W in (problem(inputs=256)[0], awkward_rows(256), 1e-30 * problem(inputs=256)[0]):
        found = dgq_search(W.float(), None, group_size)
        q, z = (part.int() for part in (found.q, found.z))
        columns = torch.arange(256) // group_size
        exact = found.S2.int()[:, columns] * (q - z[:, columns])
        assert int(exact.abs().max()) <= 127
        assert torch.equal(found.integers().int(), exact)
        assert int(found.S2.min()) >= 1 and int(q.max()) <= 15 and int(z.max()) <= 15
        assert found.dense().isfinite().all()


def test_zeros_stay_zero_and_an_incomplete_group_is_padded():
    W, X = problem(inputs=70)
    W[:, 3] = 0
    found = dgq_search(W, X.T @ X, 64)
    assert found.q.shape == (6, 70) and found.S2.shape == (6, 2)
    assert not found.integers()[:, 3].any()
    with pytest.raises(QuernelError, match="group_size must divide the 70 inputs with strict=True; got 64"):
        dgq_search(W, None, 64, strict=True)


def test_a_weight_on_the_grid_is_kept_by_the_quantiser_and_nearly_by_the_search():
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (32, 256), generator=generator).double()
    q[:, ::64], q[:, 1::64] = 0, 15  # every group spans its range
    z = torch.randint(3, 12, (32, 4), generator=generator).double()
    S2 = torch.randint(5, 9, (32, 4), generator=generator).double()
    s1 = torch.rand(32, generator=generator, dtype=torch.float64) + 0.5
    columns = torch.arange(256) // 64
    W = s1[:, None] * S2[:, columns] * (q - z[:, columns])
    X = problem(inputs=256, tokens=1000)[1]
    kept = requantise(W, None, module.FineGrid(S2 * s1[:, None], z, z), s1, 64)
    assert torch.equal(kept.q.double(), q) and torch.equal(kept.S2.double(), S2)
    assert float(kept.error.max()) < 1e-20
    found = dgq_search(W, X.T @ X, 64)
    assert float(found.fine_error.sum() / found.signal.sum()) <= ON_GRID_FINE
    assert float(found.error.sum() / found.signal.sum()) <= ON_GRID


def test_more_points_never_hurt():
    W, X = problem(out=32, inputs=128)
    H = X.T @ X
    coarse, fine = fine_search(W, H, 64, fine_ratios(10)), fine_search(W, H, 64, fine_ratios(20))
    assert set(np.round(fine_ratios(10), 12)) <= set(np.round(fine_ratios(20), 12))
    assert bool((fine.error <= coarse.error * NESTED).all())
    few, many = (coarse_search(W, H, fine, 64, coarse_ratios(n))[1] for n in (40, 80))
    assert bool((many <= few * NESTED).all())


def test_the_search_beats_plain_rounding_on_the_inputs():
    W, X = (part.float() for part in problem(out=64, inputs=256, tokens=1000))
    lost = {
        "row": (X @ (W - round_to_nearest(W)).T).norm(),
        "groups": (X @ (W - round_to_nearest(W, 64)).T).norm(),
        "weights only": (X @ (W - dgq_search(W, None, 64).dense()).T).norm(),
        "search": (X @ (W - dgq_search(W, X.T @ X, 64).dense()).T).norm(),
    }
    assert lost["search"] < 0.9 * lost["groups"] < 0.9 * lost["row"]
    assert lost["weights only"] < lost["groups"]


@pytest.mark.parametrize("size", [96, 32, 40])
def test_plain_rounding_errs_by_a_step_at_most(size):
    W = awkward_rows(96)
    back = round_to_nearest(W, None if size == 96 else size)
    for part, rounded in zip(W.split(size, dim=1), back.split(size, dim=1), strict=True):
        step = (part.amax(1).clamp_min(0) - part.amin(1).clamp_max(0)) / 15
        # Half a step of rounding, and half a step where the rounded zero point clips an end of the range.
        assert bool(((part - rounded).abs().amax(1) <= 1.0001 * step).all())
    assert torch.equal(round_to_nearest(torch.arange(16.0)[None]), torch.arange(16.0)[None])


def test_feedback_lowers_the_error_on_the_same_grid():
    generator = torch.Generator().manual_seed(0)
    W, few = torch.randn(48, 256, generator=generator), torch.randn(1000, 48, generator=generator)
    # Inputs that vary in few directions: what one column errs, others can make up for.
    X = few @ torch.randn(48, 256, generator=generator) + torch.randn(1000, 256, generator=generator)
    H = X.T @ X
    found = dgq_search(W, H, 64)
    better = compensate(W, H, found)
    assert all(torch.equal(getattr(better, name), getattr(found, name)) for name in ("S2", "z", "s1"))
    assert float(better.error.sum()) < 0.5 * float(found.error.sum())
    assert int(better.integers().int().abs().max()) <= 127 and int(better.q.max()) <= 15
    direct = (X @ (W - better.dense()).T).double().square().sum(0)
    np.testing.assert_allclose(better.error.numpy(), direct.numpy(), rtol=GRAM)


def test_feedback_has_nothing_to_do_where_inputs_are_zero_or_uncorrelated():
    W, _ = problem(inputs=64)
    found = dgq_search(W, None, 32)
    assert compensate(W, torch.zeros(64, 64), found) is found
    assert torch.equal(compensate(W, torch.eye(64), found).q, found.q)


def test_feedback_over_several_blocks_equals_one(monkeypatch):
    from quernel.nn.functional import compensated_rounding

    W, X = problem(out=8, inputs=300)
    found = dgq_search(W, X.T @ X, 128, (3, 5))
    blocks = compensate(W, X.T @ X, found)
    monkeypatch.setattr(compensated_rounding, "BLOCK", 300)
    assert torch.equal(compensate(W, X.T @ X, found).q, blocks.q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W": torch.full((2, 64), float("nan"))}, "W holds NaN or infinity"),
        ({"W": torch.ones(64)}, "W must be a floating matrix"),
        ({"W": torch.ones(2, 64, dtype=torch.int64)}, "W must be a floating matrix"),
        ({"H": torch.eye(63)}, r"H must have shape \(64, 64\) to fit W; got \(63, 63\)"),
        ({"H": torch.full((64, 64), float("inf"))}, "H holds NaN or infinity"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128; got 48"),
        ({"grid": (0, 80)}, r"grid\[0\] must be an integer"),
        ({"grid": 20}, "grid must be two numbers"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"W": torch.ones(2, 64), "H": torch.eye(64), "group_size": 32} | change
    with pytest.raises(QuernelError, match=message):
        dgq_search(**arguments)
