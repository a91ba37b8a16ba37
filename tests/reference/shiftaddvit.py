"""ShiftAddViT by its definitions, slow and readable: N x N attention, powers of two by logarithms, token by token."""

import math

import numpy as np
import torch


def binary_attention(q, k, v, conv, q_threshold, k_threshold, constant="self", sparse=None):
    """Mix the tokens of one head; q, k, v: (N, D), conv: (kernel,), thresholds: numbers or None for row means."""
    n, d = v.shape
    codes = []
    for x, threshold in ((q, q_threshold), (k, k_threshold)):
        unit = x / max_with_floor(x)
        limit = unit.mean(1, keepdim=True) if threshold is None else threshold
        codes.append((unit > limit).to(v.dtype))
    weights = codes[0] @ codes[1].T / math.pi  # (N, N)
    weights = weights + (0.5 * torch.eye(n, dtype=v.dtype) if constant == "self" else 0.5)
    if sparse is not None:
        soft = torch.softmax(q @ k.T / math.sqrt(d), dim=1)
        weights = weights + soft * (soft > sparse)
    y = weights @ v
    y = y / max_with_floor(y)
    reach = len(conv) // 2
    for i in range(n):
        for j in range(n):
            if abs(i - j) <= reach:
                y[i] = y[i] + conv[j - i + reach] * v[j]
    return y


def max_with_floor(x):
    """Return the length of each row, at least 1e-12."""
    return x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def power_of_two(x, low, high, rounding="log"):
    """Round a Python float to a signed power of two."""
    if x == 0:
        return 0.0
    if rounding == "log":
        exponent = round(math.log2(abs(x)))
        return math.copysign(2.0 ** min(max(exponent, low), high), x)
    choices = [0.0, *(2.0**p for p in range(low, high + 1))]
    return math.copysign(min(choices, key=lambda c: (abs(abs(x) - c), -c)), x)


def shift_codes(weight, bits, rounding="log"):
    """Return the dense matrix of powers and the least-squares factor of each row, row by row in float64."""
    low = -(2 ** (bits - 1) - 2)
    powers = np.zeros(weight.shape)
    scale = np.ones(len(weight))
    for o, row in enumerate(np.asarray(weight, np.float64)):
        largest = np.abs(row).max()
        if largest == 0:
            continue
        powers[o] = [power_of_two(float(w / largest), low, 0, rounding) for w in row]
        scale[o] = (powers[o] @ row) / (powers[o] @ powers[o])
    return powers, scale


def mixture(x, router, experts, weighted=True):
    """Send each token to the expert of its largest logit; x: (T, in), router: (2, in), experts: callables."""
    rows = []
    for token in x:
        p = torch.softmax(router @ token, dim=0)
        chosen = int(p.argmax())
        rows.append((p[chosen] if weighted else 1.0) * experts[chosen](token[None])[0])
    return torch.stack(rows)


def balance_loss(clean, noisy, latencies, noise):
    """Return SCV(importance) + SCV(load), expert by expert."""
    total = sum(latencies)
    experts = range(len(latencies))
    importance = [latencies[i] / total * sum(row.softmax(0)[i] for row in clean) for i in experts]
    load = []
    for i in experts:
        chances = []
        for row, drawn in zip(clean, noisy, strict=True):
            threshold = max(drawn[j] for j in experts if j != i)
            chances.append(0.5 * (1 + torch.erf((row[i] - threshold) / noise / math.sqrt(2))))
        load.append(latencies[i] / total * sum(chances))
    return scv(importance) + scv(load)


def scv(values):
    """Return the squared coefficient of variation with the unbiased variance."""
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / (mean**2 + 1e-10)
