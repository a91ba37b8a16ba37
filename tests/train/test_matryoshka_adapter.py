"""Adapters: they begin at the principal axes and are never worse, prefixes agree, folders load, pairs are learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import quernel
from quernel._errors import QuernelError
from quernel.train import MatryoshkaAdapter, fit_matryoshka_adapter
from quernel.train.matryoshka_adapter import principal_axes
from tests.reference import matryoshka as oracle

D, DIMS = 16, (2, 4, 16)


def embeddings(n=300, seed=0):
    """Directions around a few centres, in axes that are not those of the coordinates."""
    draw = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(9).standard_normal((D, D)))[0]
    spread = 1.0 / np.arange(1, D + 1)
    rows = draw.standard_normal((8, D))[draw.integers(0, 8, n)] + 0.7 * draw.standard_normal((n, D))
    return ((rows * spread) @ turn).astype(np.float32)


def pairs_of_noise(n=400):
    """Embeddings whose strong coordinates are noise: what belongs together agrees in the weak ones."""
    draw = np.random.default_rng(1)
    meaning = draw.standard_normal((n // 2, 4))
    rows = np.concatenate([meaning, meaning]) + 0.1 * draw.standard_normal((n, 4))
    whole = np.concatenate([2 * draw.standard_normal((n, D - 4)), rows], 1).astype(np.float32)
    return whole, np.stack([np.arange(n // 2), np.arange(n // 2) + n // 2], 1)


def test_it_begins_at_the_principal_axes():
    E = embeddings()
    adapter = fit_matryoshka_adapter(E, dims=DIMS, epochs=0)
    axes = adapter.weight.detach().double()
    torch.testing.assert_close(axes @ axes.T, torch.eye(D, dtype=torch.float64), atol=1e-5, rtol=0)
    unit = E / np.linalg.norm(E, axis=1, keepdims=True)
    energy = np.square(unit @ axes.numpy().T).sum(0)
    wanted = np.linalg.svd(unit.astype(np.float64))[1] ** 2
    np.testing.assert_allclose(energy, wanted, rtol=1e-4)
    full = adapter.transform(E)
    np.testing.assert_allclose(full @ full.T, unit @ unit.T, atol=1e-5)


def test_without_pairs_it_is_not_worse_than_the_axes():
    E, other = embeddings(), embeddings(60, seed=5)
    learned, axes = (fit_matryoshka_adapter(E, dims=DIMS, epochs=epochs, lr=3e-3) for epochs in (40, 0))
    errors = {
        name: [oracle.similarity_error(adapter.transform(other), other, m) for m in DIMS]
        for name, adapter in (("learned", learned), ("axes", axes))
    }
    assert sum(errors["learned"]) < 0.98 * sum(errors["axes"])
    assert errors["learned"][0] < errors["axes"][0] and errors["learned"][1] < errors["axes"][1]
    assert errors["learned"][-1] < 0.01


def test_a_rate_that_ruins_it_gives_the_axes_back():
    E = embeddings(80)
    ruined, axes = (fit_matryoshka_adapter(E, dims=DIMS, epochs=epochs, lr=1e3) for epochs in (1, 0))
    assert torch.equal(ruined.weight, axes.weight)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_pairs_are_learned_where_the_axes_see_noise(kind):
    E, pairs = pairs_of_noise()
    first = {}
    for epochs in (0, 60):
        adapter = fit_matryoshka_adapter(
            E, pairs[:150], DIMS, kind, epochs=epochs, lr=0.03, preserve=0.0, batch_size=64
        )
        a, b = (adapter.transform(E[pairs[150:, side]], dim=4) for side in (0, 1))
        first[epochs] = float(((a @ b.T).argmax(1) == np.arange(50)).mean())
    assert first[60] > first[0] + 0.3


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_prefixes_agree_and_folders_load(kind, tmp_path):
    E = embeddings(60)
    adapter = fit_matryoshka_adapter(E, dims=DIMS, kind=kind, epochs=2)
    whole = adapter.transform(E)
    for m in (*DIMS, 7):
        cut = whole[:, :m] / np.linalg.norm(whole[:, :m], axis=1, keepdims=True)
        np.testing.assert_allclose(adapter.transform(E, dim=m), cut, atol=1e-6)
    twin = quernel.load(adapter.save(tmp_path))
    assert type(twin) is MatryoshkaAdapter and twin.config() == adapter.config()
    np.testing.assert_array_equal(twin.transform(E, dim=4), adapter.transform(E, dim=4))
    other = MatryoshkaAdapter(D, DIMS, kind)
    other.load_state_dict(adapter.state_dict())
    np.testing.assert_array_equal(other.transform(E), whole)


def test_within_a_sequential_under_autocast_and_with_gradients():
    encoder = nn.Linear(5, D)
    net = nn.Sequential(encoder, MatryoshkaAdapter(D, DIMS))
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x)
    torch.testing.assert_close(half.float(), net(x), rtol=0.05, atol=0.05)  # 8 bits of mantissa
    net[1].transform(encoder(x), dim=4).square().sum().backward()
    assert encoder.weight.grad is not None


def test_a_tensor_gives_a_tensor_and_lengths_do_not_matter():
    E = torch.from_numpy(embeddings(20))
    adapter = fit_matryoshka_adapter(E, dims=DIMS, kind="mlp", epochs=1)
    got = adapter.transform(E, dim=4)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.detach().numpy(), adapter.transform(E.numpy(), dim=4), atol=1e-6)
    np.testing.assert_allclose(adapter.transform(3 * E.numpy()), adapter.transform(E.numpy()), atol=1e-5)


def test_a_seed_decides_and_nothing_global_is_drawn():
    E = embeddings(80)
    before = torch.get_rng_state()
    one, two, three = (
        fit_matryoshka_adapter(E, [[0, 1], [2, 3], [4, 5]], DIMS, "mlp", epochs=2, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.weight, two.weight) and torch.equal(one.outer, two.outer)
    assert not torch.equal(one.inner, three.inner)


def test_axes_have_a_sign():
    rows = torch.from_numpy(embeddings(40))
    assert torch.equal(principal_axes(rows), principal_axes(-rows))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda E: fit_matryoshka_adapter(E, dims=(4, 2)), "dims must be integers that increase"),
        (lambda E: fit_matryoshka_adapter(E, dims=(4, 17)), r"dims must be an integer in \[1, 16\]; got 17"),
        (lambda E: fit_matryoshka_adapter(E, dims=DIMS, weights=(1.0,)), "weights must be 3 numbers"),
        (lambda E: fit_matryoshka_adapter(E, kind="deep"), "kind must be one of 'linear', 'mlp'"),
        (lambda E: fit_matryoshka_adapter(E, [[0, 99], [0, 1]]), "pairs must name rows of E, 0 to 19; got 0 to 99"),
        (lambda E: fit_matryoshka_adapter(E, [[0.0, 1.0]] * 3), "pairs must be integers of shape"),
        (lambda E: fit_matryoshka_adapter(E, [0, 1]), "pairs must be integers of shape"),
        (lambda E: fit_matryoshka_adapter(E, preserve=0.0), "there is nothing to learn"),
        (lambda E: fit_matryoshka_adapter(E[:1]), "E must have at least 2 rows; got 1"),
        (lambda E: fit_matryoshka_adapter(E[0]), r"E must be real of shape \(n, D\); got \(16,\)"),
        (lambda E: fit_matryoshka_adapter(np.full((4, 4), np.nan)), "E holds NaN or infinity"),
        (lambda E: fit_matryoshka_adapter(E, lr=0.0), "lr must be a finite number"),
        (lambda E: MatryoshkaAdapter(D).transform(E, dim=17), r"dim must be an integer in \[1, 16\]; got 17"),
        (lambda E: MatryoshkaAdapter(D).transform(E[:, :3]), r"E must be real of shape \(n, 16\); got \(20, 3\)"),
        (lambda E: MatryoshkaAdapter(D)(torch.ones(2, 3)), r"x must have shape \(..., 16\); got \(2, 3\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call(embeddings(20))
