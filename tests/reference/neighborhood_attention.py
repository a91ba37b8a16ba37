"""Neighborhood attention by its definition: the window of one token at a time, softmax over what it sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def window(i: int, length: int, w: int, s: int, d: int, causal: bool) -> list[int]:
    """Return the positions of an axis that position i sees."""
    line = [j for j in range(length) if j % d == i % d]
    t = line.index(i)
    group = [u for u in range(len(line)) if u // s == t // s]
    if causal:
        leader = min(group[0] + s - 1, len(line) - 1)
        return [line[u] for u in range(leader - w + 1, t + 1) if u >= 0]
    leader = min(group[0] + s // 2, len(line) - 1)
    left = w // 2
    right = left - 1 if w % 2 == 0 else left
    centre = min(max(leader, left), len(line) - 1 - right)
    return line[centre - left : centre + right + 1]


def mask(shape: Sequence[int], w: Sequence[int], s: Sequence[int], d: Sequence[int], causal: Sequence[bool]) -> Tensor:
    """Return which token sees which, (N, N)."""
    tokens = list(itertools.product(*map(range, shape)))
    number = {token: n for n, token in enumerate(tokens)}
    seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for token in tokens:
        windows = [window(*numbers) for numbers in zip(token, shape, w, s, d, causal, strict=True)]
        for other in itertools.product(*windows):
            seen[number[token], number[other]] = True
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Return softmax attention under a mask and the logarithms of its sums; q: (B, N, H, D), k: (B, M, G, D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    share = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // share].mT * scale
        scores = scores.masked_fill(~seen, -math.inf)
        outs.append(torch.softmax(scores, -1) @ v[:, :, head // share])
        lses.append(torch.logsumexp(scores, -1))
    return torch.stack(outs, 2), torch.stack(lses, 2)
