"""Neighborhood attention and its gradients over the tiles of a plan, in torch's own operations: any dtype and device.

Rows of a tile and of its halo are gathered, their scores are one small matrix product a tile, and outputs are
scattered once.  Tiles go in pieces whose gathered rows stay within a budget.  Shapes: q (B, N, H, D), k (B, M, G, D),
v (B, M, G, E), lse and delta (B, N, H).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quernel.nn._neighborhood_plan import NeighborhoodPlan, Tiles

# Bytes of gathered rows and scores of a piece: within a core's caches, and enough for a GPU.
BUDGET, DEVICE_BUDGET = 2**22, 2**28


def attend(q: Tensor, k: Tensor, v: Tensor, plan: NeighborhoodPlan, scale: float) -> tuple[Tensor, Tensor]:
    """Return outputs, (B, N, H, E), and the logarithms of their sums of exponentials."""
    groups, outs, lses = k.shape[2], [], []
    for lanes, halo, mask in _pieces(plan.queries, q, v):
        queries, keys, values = _heads(q, lanes, groups), _rows(k, halo), _rows(v, halo)
        scores = _masked(queries @ keys.mT * scale, mask)  # (B, c, G, r t, m)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        # Lanes that are no query see nothing: zeros, and not NaN.
        lse = lse.masked_fill(torch.isneginf(lse), 0.0)
        outs.append(_back(torch.exp(scores - lse) @ values, lanes.shape[1]))
        lses.append(_back(lse, lanes.shape[1]))
    home = plan.queries.on(q.device)["home"]
    out, lse = (torch.cat(held, 1).index_select(1, home) for held in (outs, lses))
    return out.to(q.dtype), lse[..., 0]


def gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, plan: NeighborhoodPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; delta is the sum of grad * out less the gradient of lse."""
    groups, beside = k.shape[2], torch.stack([lse, delta], -1)  # (B, N, H, 2)
    held: list[Tensor] = []
    for lanes, halo, mask in _pieces(plan.queries, q, v):
        queries, keys, values = _heads(q, lanes, groups), _rows(k, halo), _rows(v, halo)
        top, less = _heads(beside, lanes, groups).split(1, -1)
        weights = torch.exp(_masked(queries @ keys.mT * scale, mask) - top)
        slopes = weights * (_heads(grad, lanes, groups) @ values.mT - less)
        held.append(_back(slopes @ keys * scale, lanes.shape[1]))
    dq = torch.cat(held, 1).index_select(1, plan.queries.on(q.device)["home"])
    parts = []
    for tiles in plan.keys:
        pairs = []
        for lanes, halo, mask in _pieces(tiles, q, v):
            keys, values = _rows(k, lanes), _rows(v, lanes)
            queries, grads = _heads(q, halo, groups), _heads(grad, halo, groups)  # (B, c, G, r m, D)
            top, less = _heads(beside, halo, groups).split(1, -1)
            weights = torch.exp(_masked(queries @ keys.mT * scale, mask.mT) - top)
            slopes = weights * (grads @ values.mT - less)
            both = torch.cat([slopes.mT @ queries * scale, weights.mT @ grads], -1)  # (B, c, G, t, D + E)
            pairs.append(both.transpose(2, 3).flatten(1, 2))
        parts.append(torch.cat(pairs, 1).index_select(1, tiles.on(q.device)["home"]))
    dk, dv = torch.cat(parts, 1).split([k.shape[-1], v.shape[-1]], -1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _pieces(tiles: Tiles, q: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield lanes (c, t), halos (c, m) and masks (c or 1, t, m) of as many tiles as the budget allows."""
    held = tiles.on(q.device)
    lanes, halo = tiles.lanes.shape[1], tiles.halo
    row = 4 * q.shape[2] * (2 * lanes * halo + (lanes + halo) * (q.shape[-1] + v.shape[-1]))
    budget = BUDGET if q.device.type == "cpu" else DEVICE_BUDGET
    size = max(1, budget // max(1, row * len(q)))
    for first in range(0, len(tiles.lanes), size):
        piece = slice(first, first + size)
        mask = held["masks"] if len(tiles.masks) == 1 else held["masks"][held["kinds"][piece]]
        yield held["lanes"][piece], tiles.halos(piece, q.device), mask


def _rows(x: Tensor, index: Tensor) -> Tensor:  # (B, N, G, D), (c, m) -> (B, c, G, m, D)
    """Gather rows, in at least float32."""
    rows = x.index_select(1, index.flatten()).unflatten(1, index.shape).transpose(2, 3)
    return rows.to(torch.promote_types(x.dtype, torch.float32))


def _heads(x: Tensor, index: Tensor, groups: int) -> Tensor:  # (B, N, H, D), (c, t) -> (B, c, G, r t, D)
    """Gather rows of queries; heads that share their keys stand one behind the other."""
    return _rows(x, index).unflatten(2, (groups, -1)).flatten(3, 4)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Fill scores, (B, c, G, r t, m), with minus infinity where the mask, (c, t, m), is False."""
    share = scores.shape[3] // mask.shape[1]
    parts = scores.unflatten(3, (share, -1))
    return parts.masked_fill(~mask[None, :, None, None], float("-inf")).flatten(3, 4)


def _back(x: Tensor, lanes: int) -> Tensor:  # (B, c, G, r t, D) -> (B, c t, H, D)
    return x.unflatten(3, (-1, lanes)).flatten(2, 3).transpose(2, 3).flatten(1, 2)
