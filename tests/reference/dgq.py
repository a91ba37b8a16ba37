"""Dual grained quantisation as it is written down: row by row, ratio by ratio, errors on the inputs themselves.

Everything is float64 NumPy; W is one row (K,), X (T, K), groups of g consecutive inputs.
"""

from __future__ import annotations

import numpy as np


def group_range(w: np.ndarray) -> tuple[float, int]:
    """Return the step at ratio 1 and the zero point of a group."""
    low, high = min(0.0, w.min()), max(0.0, w.max())
    step = (high - low) / 15 or 1.0
    return step, int(np.clip(np.round(-low / step), 0, 15))


def codes(w: np.ndarray, step: float, zero: int, low: int = 0, high: int = 15) -> np.ndarray:
    """Return codes of a group, rounded half to even."""
    return np.clip(np.round(w / step) + zero, low, high)


def phase_1(w: np.ndarray, X: np.ndarray, ratios: list[float]) -> tuple[float, int, float]:
    """Return step, zero point and error of one group; w: (g,) X: (T, g)."""
    base, zero = group_range(w)
    tried = []
    for ratio in ratios:
        step = base * ratio
        d = w - step * (codes(w, step, zero) - zero)
        tried.append((float(np.square(X @ d).sum()), step))
    error, step = min(tried, key=lambda pair: pair[0])
    return step, zero, error


def on_grid(w: np.ndarray, s1: float, steps: list[float], zeros: list[int], g: int) -> tuple[np.ndarray, ...]:
    """Return codes and integer scales of a row for a row scale, and the row they stand for."""
    q, scales, back = [], [], []
    for i, (step, zero) in enumerate(zip(steps, zeros, strict=True)):
        part = w[i * g : (i + 1) * g]
        S2 = int(np.clip(np.round(step / s1), 1, 127))
        reach = 127 // S2
        found = codes(part, S2 * s1, zero, max(0, zero - reach), min(15, zero + reach))
        q.append(found)
        scales.append(S2)
        back.append(s1 * S2 * (found - zero))
    return np.concatenate(q), np.array(scales), np.concatenate(back)


def phase_2(
    w: np.ndarray, X: np.ndarray, steps: list[float], zeros: list[int], g: int, ratios: list[float]
) -> tuple[float, float]:
    """Return the scale of a row and its error on all inputs."""
    top = np.abs(w).max() / 127 or 1.0
    tried = []
    for ratio in ratios:
        back = on_grid(w, top * ratio, steps, zeros, g)[2]
        tried.append((float(np.square(X @ (w - back)).sum()), top * ratio))
    error, s1 = min(tried, key=lambda pair: pair[0])
    return s1, error


def search(W: np.ndarray, X: np.ndarray, g: int, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return codes, integer scales, zero points, row scales and errors of both phases; W: (O, K)."""
    fine = [1.02 - 0.22 * (i + 1) / grid[0] for i in range(grid[0])]
    coarse = [1.02 - 0.82 * (i + 1) / grid[1] for i in range(grid[1])]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("q", "S2", "z", "s1", "error", "group_error")}
    for w in W:
        groups = [slice(start, start + g) for start in range(0, len(w), g)]
        found = [phase_1(w[part], X[:, part], fine) for part in groups]
        steps, zeros = [step for step, _, _ in found], [zero for _, zero, _ in found]
        s1, error = phase_2(w, X, steps, zeros, g, coarse)
        q, S2, _ = on_grid(w, s1, steps, zeros, g)
        row = {"q": q, "S2": S2, "z": zeros, "s1": s1, "error": error, "group_error": [e for _, _, e in found]}
        for name, value in row.items():
            rows[name].append(np.asarray(value))
    return {name: np.stack(values) for name, values in rows.items()}


def multiply(q: np.ndarray, S2: np.ndarray, z: np.ndarray, x8: np.ndarray, g: int) -> np.ndarray:
    """Return the int64 sums of the fused form: group sums of codes times x, less zero points times sums of x."""
    total = np.zeros((len(x8), len(q)), dtype=np.int64)
    for i in range(S2.shape[1]):
        part = slice(i * g, (i + 1) * g)
        x = x8[:, part].astype(np.int64)
        inner = x @ q[:, part].astype(np.int64).T - x.sum(1, keepdims=True) * z[:, i].astype(np.int64)
        total += inner * S2[:, i].astype(np.int64)
    return total
