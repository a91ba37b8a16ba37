"""The temperature of ``ModelIndex`` by leaving one point of a hub's own specifications out at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from quernel._errors import QuernelError
from quernel._random import generator
from quernel._validate import check_float, check_int
from quernel.kernels._mean_targets import kernel_matrix

if TYPE_CHECKING:
    from quernel.search.model_index import ModelIndex


def best_temperature(index: ModelIndex, temperatures: Sequence[float], points: int, seed: int) -> float:
    """Return the temperature of the largest mean reciprocal rank; see ``ModelIndex.choose_temperature``."""
    check_int("points", points, low=1)
    values = [check_float("temperatures", value, low=0.0, open_low=True) for value in temperatures]
    store = index._store
    if not values or store.u is None or len(index) < 2:
        raise QuernelError(
            "a temperature is chosen among values in temperatures, by prompts of two models or more; "
            f"got {len(values)} values and {len(index)} models{', without prompts' * (store.u is None)}"
        )
    draw = generator(seed)
    images: list[np.ndarray] = []
    prompts: list[np.ndarray] = []
    own: list[int] = []
    left: list[int] = []
    for slot in np.flatnonzero(index.alive).tolist():
        a, b = store.z.offsets[slot], store.z.offsets[slot + 1]
        weights = store.weights[a:b].astype(np.float64)
        # A model of one point of all weight has nothing left without it.
        usable = np.flatnonzero((weights > 0) & (weights < 1))
        if not len(usable):
            continue
        share = weights[usable] / weights[usable].sum()
        chosen = draw.choice(usable, min(points, len(usable)), replace=False, p=share)
        images.append(store.z.values(a, b)[chosen])
        prompts.append(store.u.values(a, b)[chosen])
        own += [slot] * len(chosen)
        left += chosen.tolist()
    if not own:
        raise QuernelError("every model has one point only; give the temperature yourself")
    q, u = np.concatenate(images), np.concatenate(prompts)
    asked = index._items("q", q).with_prompts(u, index.prompt_dim)
    found = []
    for temperature in values:
        scores = index._scores(asked, temperature)
        scores[:, ~index.alive] = -np.inf
        ranks = []
        for i, (slot, point) in enumerate(zip(own, left, strict=True)):
            mine = _without(index, slot, point, temperature)
            others = np.delete(scores[i], slot)
            ranks.append(1 + int((others > mine).sum()))
        found.append(float(np.mean(1 / np.array(ranks))))
    return values[int(np.argmax(found))]


def _without(index: ModelIndex, slot: int, point: int, temperature: float) -> float:
    """Return the score of a model for one of its own points, which has no weight there."""
    store = index._store
    a, b = int(store.z.offsets[slot]), int(store.z.offsets[slot + 1])
    z, weights = store.z.values(a, b).astype(np.float64), store.weights[a:b].astype(np.float64)
    cosines = np.ones(b - a) if store.u is None else _cosines(store.u.values(a, b).astype(np.float64), point)
    rest = weights.copy()
    rest[point] = 0.0
    logits = np.where(rest > 0, cosines / temperature, -np.inf)
    rest *= np.exp(logits - logits.max())
    rest /= rest.sum()
    # One signed measure: the rest against the point itself.
    rest[point] -= 1.0
    return -float(rest @ kernel_matrix(z, z, store.kernel, store.gamma) @ rest)


def _cosines(prompts: np.ndarray, point: int) -> np.ndarray:
    found: np.ndarray = prompts @ (prompts[point] / np.linalg.norm(prompts[point]))
    return found
