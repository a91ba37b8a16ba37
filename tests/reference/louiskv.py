"""LouisKV and Quest token by token: lists of numbers of tokens, one key head after the other, nothing compiled.

A row is told its tokens and answers a step by the definition. Which keys of a prompt form a cluster is asked of the
package's k-means, which has tests of its own; everything else is written here again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quernel.kernels.clustering import kmeans
from tests.reference import mustafar


@dataclass
class Row:
    """One sequence in one layer; ``keys`` and ``values`` hold every token, (Hk, n, d)."""

    budget: int
    sink: int
    buffer: int
    cluster_size: int
    shortest: int
    longest: int
    tau: float | None  # None: Quest, pages of ``cluster_size`` and a choice at every step
    iterations: int = 10
    part: int = 2048
    kept: tuple[int, int] | None = None  # channels of keys and of values that a pruned pool keeps
    keys: Tensor | None = None
    values: Tensor | None = None
    sinks: list[int] = field(default_factory=list)
    closed: list[list[int]] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    units: list[list[list[int]]] = field(default_factory=list)  # a head's units of tokens
    chosen: list[list[int]] = field(default_factory=list)  # a head's chosen tokens
    last: Tensor | None = None
    fresh: bool = True
    selections: int = 0

    def _store(self, keys: Tensor, values: Tensor) -> list[int]:
        before = 0 if self.keys is None else self.keys.shape[1]
        self.keys = keys.clone() if self.keys is None else torch.cat((self.keys, keys), 1)
        self.values = values.clone() if self.values is None else torch.cat((self.values, values), 1)
        if not self.units:
            self.units, self.chosen = [[] for _ in keys], [[] for _ in keys]
        return list(range(before, self.keys.shape[1]))

    @property
    def local(self) -> list[int]:
        return [t for piece in [*self.closed, self.open] for t in piece]

    def _close(self) -> None:
        if self.open:
            self.closed.append(self.open)
            self.open = []

    def _leave(self) -> None:
        piece = self.closed.pop(0)
        for units, chosen in zip(self.units, self.chosen, strict=True):
            units.append(piece)
            if len(chosen) + len(piece) <= self.budget:
                chosen += piece

    def _release(self) -> None:
        while self.closed and len(self.local) - len(self.closed[0]) >= self.buffer:
            self._leave()

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Store a chunk of the prompt."""
        new = self._store(keys, values)
        self._close()
        self.fresh, self.last = True, None
        while new and len(self.sinks) < self.sink:
            self.sinks.append(new.pop(0))
        if len(new) > self.buffer:
            while self.closed:
                self._leave()
            self._form(new[: -self.buffer])
            new = new[-self.buffer :]
        piece = min(self.cluster_size, self.longest)
        self.closed += [new[i : i + piece] for i in range(0, len(new), piece)]
        self._release()

    def _form(self, tokens: list[int]) -> None:
        assert self.keys is not None
        piece = min(self.cluster_size, self.longest)
        parts = -(-len(tokens) // self.part)
        step = -(-len(tokens) // (parts * piece)) * piece
        for at in range(0, len(tokens), step):
            part = tokens[at : at + step]
            if self.tau is None:
                pages = [part[i : i + piece] for i in range(0, len(part), piece)]
                for units in self.units:
                    units += pages
                continue
            wanted = -(-len(part) // self.cluster_size)
            assigned = kmeans(self.keys[:, part], wanted, iterations=self.iterations).assignment.tolist()
            for units, clusters in zip(self.units, assigned, strict=True):
                for c in range(wanted):
                    members = [t for t, own in zip(part, clusters, strict=True) if own == c]
                    units += [members] if members else []

    def step(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store a token and answer its query (Hk, g, d)."""
        moved = True
        if self.tau is not None and self.last is not None:
            moved = bool(torch.cosine_similarity(query, self.last, dim=-1).mean() < self.tau)
        self.last = query.clone()
        new = self._store(key, value)
        if len(self.sinks) < self.sink:
            self.sinks += new
        else:
            if len(self.open) >= self.longest or (moved and len(self.open) >= self.shortest):
                self._close()
            self.open += new
        self._release()
        if moved or self.fresh:
            self.chosen = [self._choice(query[h], h, scale) for h in range(len(query))]
            self.fresh = False
            self.selections += 1
        return torch.stack([self._attend(query[h], h, self.working(h), scale) for h in range(len(query))])

    def working(self, head: int) -> list[int]:
        """Return the tokens that a head attends to."""
        return self.sinks + self.chosen[head] + self.local

    def _choice(self, query: Tensor, head: int, scale: float) -> list[int]:
        assert self.keys is not None
        units = self.units[head]
        if not units:
            return []
        logits = torch.stack([self._logit(query, self.keys[head, unit]) for unit in units], -1) * scale  # (g, U)
        scores = logits.softmax(-1).mean(0).tolist()
        chosen: list[int] = []
        for u in sorted(range(len(units)), key=lambda u: (-scores[u], u)):
            left = self.budget - len(chosen)
            if left == 0:
                break
            chosen += units[u][-left:]
        return chosen

    def _logit(self, query: Tensor, keys: Tensor) -> Tensor:
        if self.tau is None:
            low, high = keys.amin(0), keys.amax(0)
            return torch.maximum(query * low, query * high).sum(-1)
        return query @ keys.mean(0)

    def _attend(self, query: Tensor, head: int, tokens: list[int], scale: float) -> Tensor:
        keys, values = self.held(head, tokens)
        return (query @ keys.T * scale).softmax(-1) @ values

    def held(self, head: int, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Return keys and values of a head's tokens, as the pool keeps those that are neither sinks nor local."""
        assert self.keys is not None and self.values is not None
        found, whole = (self.keys[head, tokens], self.values[head, tokens]), {*self.sinks, *self.local}
        if self.kept is not None:
            for rows, n in zip(found, self.kept, strict=True):
                for i, t in enumerate(tokens):
                    if t not in whole:
                        rows[i] = torch.tensor(mustafar.pruned(rows[i].tolist(), n))
        return found

    def covered(self, query: Tensor, scale: float) -> float:
        """Return the share of the full softmax that falls on the working sets, mean over all query heads."""
        assert self.keys is not None
        shares = []
        for h in range(len(query)):
            weights = (query[h] @ self.keys[h].T * scale).softmax(-1)
            shares.append(weights[:, self.working(h)].sum(-1))
        return float(torch.stack(shares).mean())
