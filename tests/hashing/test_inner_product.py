"""Maximum inner product on the sphere: unit lengths, the exact ratio, the same order; as Frank-Wolfe uses it."""

import numpy as np
import pytest

from quernel._errors import QuernelError
from quernel.hashing import SignProjection, sphere_items, sphere_queries


def test_lengths_and_ratio():
    draw = np.random.default_rng(0)
    items, queries = draw.standard_normal((200, 7)), draw.standard_normal((20, 7))
    radius, longest = np.linalg.norm(items, axis=1).max(), np.linalg.norm(queries, axis=1).max()
    a, b = sphere_items(items), sphere_queries(queries)
    wide = sphere_queries(queries, radius=longest)
    for rows in (a, b, wide, sphere_items(items, radius=3 * radius)):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-12)
    products = queries @ items.T
    np.testing.assert_allclose(b @ a.T, products / np.linalg.norm(queries, axis=1)[:, None] / radius, atol=1e-12)
    np.testing.assert_allclose(wide @ a.T, products / longest / radius, atol=1e-12)
    np.testing.assert_array_equal((b @ a.T).argmax(1), products.argmax(1))
    assert (b[:, -1] == 0).all() and (a[:, -1] == 0).all() and (b[:, -2] == 0).all()


def test_the_gap_is_a_non_negative_product():
    # phi0(w) = [grad; <w, grad>], psi0(s) = [-s; 1]: their product is <w - s, grad>, and its maximum is the gap.
    draw = np.random.default_rng(1)
    atoms = draw.standard_normal((300, 9))
    w = draw.dirichlet(np.ones(300)) @ atoms
    grad = draw.standard_normal(9)
    q, y = np.append(grad, w @ grad), np.hstack([-atoms, np.ones((300, 1))])
    wanted = (w - atoms) @ grad
    np.testing.assert_allclose(y @ q, wanted, atol=1e-12)
    assert wanted.max() >= 0
    on_sphere = sphere_items(y) @ sphere_queries(q[None])[0]
    # The whole order, not the maximum alone.
    np.testing.assert_array_equal(np.argsort(on_sphere), np.argsort(wanted))
    scale = np.linalg.norm(q) * np.linalg.norm(y, axis=1).max()
    np.testing.assert_allclose(on_sphere, wanted / scale, atol=1e-12)


def test_bits_agree_by_the_angle_on_the_sphere():
    # P(bit) = 1 - arccos(<q', y'>) / pi, 40 000 bits of one query and four items, 5 standard errors (6e-7 each).
    draw = np.random.default_rng(2)
    a, b = sphere_items(draw.standard_normal((4, 5))), sphere_queries(draw.standard_normal((1, 5)))
    family = SignProjection(7, 40_000, 1, seed=3)
    agree = (family.codes(a) == family.codes(b)).mean(1)
    p = 1 - np.arccos((b @ a.T)[0]) / np.pi
    assert (np.abs(agree - p) < 5 * np.sqrt(p * (1 - p) / 40_000)).all()


def test_float32_stays_and_zeros_are_fine():
    assert sphere_items(np.ones((3, 2), np.float32)).dtype == sphere_queries(np.ones((1, 2), np.float32)).dtype == "f4"
    assert sphere_items(np.zeros((2, 3))).tolist() == [[0, 0, 0, 1, 0]] * 2
    assert sphere_queries(np.zeros((1, 3))).tolist() == [[0, 0, 0, 0, 1]]
    assert sphere_items(np.zeros((0, 3))).shape == (0, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sphere_items(np.ones((2, 2)), radius=1.0), "radius must be at least the longest item, 1.41"),
        (lambda: sphere_queries(np.ones((2, 2)), radius=1.0), "radius must be at least the longest query"),
        (lambda: sphere_items(np.ones(2)), r"items must be floating point of shape \(n, d\); got float64 of shape"),
        (lambda: sphere_queries(np.ones((1, 2), int)), "queries must be floating point"),
        (lambda: sphere_items(np.array([[np.inf, 0]])), "items holds NaN or infinity"),
        (lambda: sphere_items(np.ones((1, 1)), radius=np.nan), "radius must be a finite number"),
    ],
)
def test_errors(call, message):
    with pytest.raises(QuernelError, match=message):
        call()
