"""All views of one array at once: rates, gradient scales, projections, the variance of shared and separate arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from quernel._errors import QuernelError
from quernel.hashing import TileMap
from quernel.nn import (
    RoastConv2d,
    RoastEmbedding,
    RoastLinear,
    RobeArray,
    RobeEmbedding,
    RobeEmbeddingBag,
    SharedArray,
    roast_param_groups,
    scale_memory_gradients,
)
from quernel.nn._tile_ops import TileOperands, tile_scatter
from quernel.nn.hashed._memory import DIVISORS, gradient_divisors, project, readers_of, slot_sums
from quernel.nn.weights.hashed import HashedWeight


def model_of_three(memory: SharedArray) -> nn.ModuleList:
    layers = (
        RoastLinear(9, 7, memory=memory, tile=(2, 4), scale=0.5),
        RoastConv2d(2, 3, 3, memory=memory, tile=(4, 4), scale=-2.0),
        RoastEmbedding(5, 6, memory=memory, block=4, scale=1.5),
    )
    return nn.ModuleList(layers)


def slots_of(weight: HashedWeight) -> np.ndarray:
    index = (
        weight.mapped.index() if isinstance(weight.mapped, TileMap) else weight.mapped.index(np.arange(weight.shape[0]))
    )
    return index.ravel()


def test_next_seeds_differ_and_go_on_after_loading() -> None:
    memory = SharedArray(4, seed=5)
    seeds = {memory.next_seed() for _ in range(10)}
    twin = SharedArray.from_config(memory.config())
    assert len(seeds | {twin.next_seed()}) == 11
    assert SharedArray(4, seed=5).next_seed() in seeds


def test_counts_and_sums_of_scales() -> None:
    memory = SharedArray(50, seed=1)
    weights = readers_of(model_of_three(memory))
    c, s, q = slot_sums(weights, 50)
    wanted = np.zeros((3, 50))
    for weight in weights:
        for slot in slots_of(weight):
            wanted[:, slot] += (1, abs(weight.scale), weight.scale**2)
    np.testing.assert_allclose(torch.stack((c, s, q)).numpy(), wanted)


@pytest.mark.parametrize("kind", DIVISORS)
def test_gradient_scales(kind) -> None:
    memory = SharedArray(300, seed=1)  # more slots than weights: some are read by none
    layers = model_of_three(memory)
    c, s, q = slot_sums(readers_of(layers), 300)
    assert bool((c == 0).any()) and bool((c > 1).any())
    wanted = {"none": c * 0 + 1, "mean-sq": s**2 / c, "s": s, "s/c": s / c, "sqrt q": q**0.5, "q": q}[kind]
    divisors = gradient_divisors(readers_of(layers), 300, kind)
    assert torch.equal(divisors[c == 0], torch.ones(int((c == 0).sum()), dtype=torch.float64))
    torch.testing.assert_close(divisors[c > 0], wanted[c > 0])

    def gradient() -> torch.Tensor:
        memory.values.grad = None
        x = torch.linspace(-1, 1, 18).reshape(2, 9)
        (layers[0](x).square().sum() + layers[2](torch.tensor([0, 4])).square().sum()).backward()
        return memory.values.grad

    plain = gradient().clone()
    handles = scale_memory_gradients(layers, kind)
    torch.testing.assert_close(gradient(), plain / divisors.float())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(gradient(), plain)


def test_divided_by_q_a_step_is_the_projection_of_the_dense_step() -> None:
    memory = SharedArray(50, seed=1, dtype=torch.float64)
    layers = model_of_three(memory)
    weights = readers_of(layers)
    steps = {w: torch.randn(w.shape, dtype=torch.float64) for w in weights}
    sum((w.dense() * step).sum() for w, step in steps.items()).backward()  # type: ignore[union-attr]
    moved = memory.values.grad / gradient_divisors(weights, 50, "q")
    best = SharedArray(50, seed=1, dtype=torch.float64)
    with torch.no_grad():
        best.values.zero_()
    project(best, steps)
    torch.testing.assert_close(moved, best.values.detach())


def test_projection_is_least_squares() -> None:
    memory = SharedArray(30, seed=1, dtype=torch.float64)
    weights = readers_of(model_of_three(memory))
    targets = {w: torch.randn(w.shape, dtype=torch.float64) for w in weights}
    columns = []
    for slot in range(30):
        unit = torch.zeros(30, dtype=torch.float64)
        unit[slot] = 1
        columns.append(torch.cat([(w.expand(unit) * w.scale).flatten() for w in weights]))
    matrix, wanted = torch.stack(columns, dim=1), torch.cat([t.flatten() for t in targets.values()])
    before = memory.values.detach().clone()
    project(memory, targets)
    best = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
    read = slot_sums(weights, 30)[0] > 0
    torch.testing.assert_close(memory.values.detach()[read], best[read])
    assert torch.equal(memory.values[~read], before[~read])


def test_projecting_c_random_weights_a_slot_keeps_one_in_sqrt_c() -> None:
    # 40,000 independent numbers on 10,000 slots: relative error sqrt(1 - 1/4) = 0.866 for c = 4 exactly, near it here.
    memory = SharedArray(10_000, seed=1)
    layer = RoastLinear(200, 200, memory=memory, tile=(1, 8), scale=1.0)
    target = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    project(memory, {layer.weight: target})
    error = float((layer.materialize() - target).detach().norm() / target.norm())
    assert error == pytest.approx(0.866, abs=0.02)


def test_rates_make_up_for_scales() -> None:
    memory = SharedArray(2000, bound=1.0)
    net = nn.Sequential(
        RoastLinear(64, 64, memory=memory), nn.ReLU(), RoastLinear(64, 64, memory=memory), nn.Linear(64, 3)
    )
    arrays, rest = roast_param_groups(net, 1e-3, memory_lr_factor=2.0, weight_decay=0.1)
    assert arrays["params"] == [memory.values] and arrays["weight_decay"] == 0
    assert arrays["lr"] == pytest.approx(2e-3 / net[0].weight.scale)  # type: ignore[operator]
    assert rest["lr"] == 1e-3 and rest["weight_decay"] == 0.1
    assert {id(p) for p in rest["params"]} == {id(p) for p in net.parameters()} - {id(memory.values)}


def test_the_size_of_the_array_s_numbers_does_not_matter_to_adam() -> None:
    def trained(bound: float) -> torch.Tensor:
        memory = SharedArray(500, seed=1, bound=bound, generator=torch.Generator().manual_seed(0))
        layer = RoastLinear(32, 16, False, memory=memory, tile=(4, 8))
        optimizer = torch.optim.Adam(roast_param_groups(layer, 1e-2), eps=1e-30)
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
        for _ in range(20):
            optimizer.zero_grad()
            (layer(x) - x[:, :16]).square().mean().backward()
            optimizer.step()
        return layer.materialize().detach()

    torch.testing.assert_close(trained(1.0), trained(0.01), rtol=1e-3, atol=1e-4)


def fields_and_a_layer() -> tuple[SharedArray, nn.ModuleList]:
    """Return layers of ROBE and of ROAST over one array."""
    memory = RobeArray(200, seed=1)
    fields = RobeEmbeddingBag([9, 30], 4, memory=memory, mode=None, offset=0, scale=[0.5, 2.0], padding_idx=0)
    table = RobeEmbedding(20, 6, memory=memory, field=1, scale=3.0)
    return memory, nn.ModuleList([fields, table, RoastLinear(9, 7, memory=memory, tile=(2, 4), scale=0.25)])


def test_readers_of_both_kinds_are_counted() -> None:
    memory, layers = fields_and_a_layer()
    wanted = np.zeros((3, 200))
    fields, table, layer = layers
    for mapped, rows, scale in (
        (fields.map, range(1, 9), 0.5),
        (fields.map, range(10, 39), 2.0),
        (table.map, range(20), 3),
    ):
        for slot in mapped.index(np.array(rows)).ravel():
            wanted[:, slot] += (1, scale, scale**2)
    for slot in slots_of(layer.weight):
        wanted[:, slot] += (1, 0.25, 0.0625)
    np.testing.assert_allclose(torch.stack(slot_sums(readers_of(layers), 200)).numpy(), wanted)
    (handle,) = scale_memory_gradients(layers, "q")
    table(torch.arange(20)).sum().backward()
    scaled, memory.values.grad = memory.values.grad, None
    handle.remove()
    table(torch.arange(20)).sum().backward()
    q = torch.from_numpy(wanted[2]).float()
    torch.testing.assert_close(scaled, memory.values.grad / torch.where(q > 0, q, 1))


def test_arrays_of_embeddings_get_no_weight_decay() -> None:
    memory, layers = fields_and_a_layer()
    arrays, rest = roast_param_groups(layers, 1e-3, weight_decay=0.1)
    assert arrays["params"] == [memory.values] and arrays["weight_decay"] == 0
    numbers, scales = np.array([36, 120, 120, 63]), np.array([0.5, 2.0, 3.0, 0.25])
    assert arrays["lr"] == pytest.approx(1e-3 / np.sqrt((numbers * scales**2).sum() / numbers.sum()))
    assert rest["weight_decay"] == 0.1 and len(rest["params"]) == 1  # the bias
    alone = RobeEmbedding(None, 16, size=1000)
    (group,) = roast_param_groups(alone, 1e-3, weight_decay=0.1)
    assert group == {"params": [alone.memory.values], "lr": 1e-3, "weight_decay": 0.0}
    with pytest.raises(QuernelError, match="how many rows of an open vocabulary share a slot is not known"):
        scale_memory_gradients(alone)


def test_frozen_arrays_are_left_alone() -> None:
    memory, layers = fields_and_a_layer()
    memory.values.requires_grad_(False)
    (rest,) = roast_param_groups(layers, 1e-3)
    assert all(p is not memory.values for p in rest["params"])
    assert scale_memory_gradients(layers) == []


def test_bad_arguments_are_named() -> None:
    with pytest.raises(QuernelError, match="model holds no layer over a shared array"):
        scale_memory_gradients(nn.Linear(2, 2))
    layer = RoastLinear(7, 5, memory=SharedArray(2000))
    with pytest.raises(QuernelError, match="kind must be one of 'none', 'mean-sq'"):
        scale_memory_gradients(layer, "v1")  # type: ignore[arg-type]
    with pytest.raises(QuernelError, match="lr must be a finite number"):
        roast_param_groups(layer, -1.0)


@pytest.mark.slow
def test_variance_of_shared_and_separate_arrays() -> None:
    """V_local = sum_l V_l, V_l = C_l / (f_l m); V_global = sum_l f_l V_l + sum_{l != r} cross_lr / m.

    cross_lr = |x_l|^2 |y_r|^2 + <x_l, y_l> <x_r, y_r>.

    60,000 draws know a variance to about 1 %, so 5 % is missed by chance less often than once in a million.
    """
    m, shares, shape, draws = 24, (0.25, 0.75), (2, 5), 60_000
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 2, *shape))
    x[0] *= 3  # a layer with more energy than memory
    tensors = torch.from_numpy(np.stack((x, y)))
    together, apart = np.empty(draws), np.empty(draws)
    for draw in range(draws):
        both, one = 0.0, 0.0
        for layer in range(2):
            maps = [TileMap(size, shape, (1, 1), seed=2 * draw + layer) for size in (m, int(shares[layer] * m))]
            shared, own = (
                [tile_scatter(tensors[i, layer], TileOperands.of(mapped)).numpy() for i in range(2)] for mapped in maps
            )
            both, one = both + np.stack(shared), one + own[0] @ own[1]
        together[draw], apart[draw] = both[0] @ both[1], one
    flat = [v.reshape(2, -1) for v in (x, y)]
    dots, norms = (flat[0] * flat[1]).sum(1), [(v**2).sum(1) for v in flat]
    # C_l: all pairs of different numbers of a layer.
    c = norms[0] * norms[1] + dots**2 - 2 * (flat[0] ** 2 * flat[1] ** 2).sum(1)
    local = c / (np.array(shares) * m)
    cross = sum(norms[0][i] * norms[1][1 - i] + dots[0] * dots[1] for i in range(2))
    shared_variance = (np.array(shares) * local).sum() + cross / m
    assert apart.var() == pytest.approx(local.sum(), rel=0.05)
    assert together.var() == pytest.approx(shared_variance, rel=0.05)
    assert shared_variance < local.sum()  # the shares do not fit the energies
