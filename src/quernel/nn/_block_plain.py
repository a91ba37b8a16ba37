"""Bags of rows of a ``BlockMap`` in torch's own operations: for other devices than CPUs, and for sparse gradients.

Everything is gathered and added as index tensors, which the compiled kernels (``_block_kernels``) never form. torch has
no unsigned arithmetic of 64 bits: sums and products wrap alike, shifts are made logical by a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.hashing.block_map import PRIME, SIGNS

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LOW = 2**32 - 1


class Layout(NamedTuple):
    """What of a map an op takes as integers; ``state`` is the hash of the seed as a signed number."""

    kind: int
    state: int
    places: int
    a: int
    b: int
    c: int
    prime: int
    size: int
    dim: int
    block: int
    signs: int

    @property
    def per_row(self) -> int:
        """Blocks that a row begins, 1 where blocks run over rows."""
        return -(-self.dim // self.block)

    @property
    def pitch(self) -> int:
        """Positions from one row to the next."""
        return self.per_row * self.block if self.block <= self.dim else self.dim


def check(values: Tensor, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, layout: list[int]) -> None:
    """Raise unless the operands fit together: the kernels read without bounds checks."""
    size = Layout(*layout).size
    if values.dtype not in FLOATS or tuple(values.shape) != (size,):
        raise QuernelError(
            f"values must be floating of shape ({size},) to fit the map; got {values.dtype} {tuple(values.shape)}"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise QuernelError(f"ids must be integers; got {ids.dtype}. Convert them with .long()")
    if ids.ndim != (2 if bounds is None else 1):
        raise QuernelError(f"ids must have 2 dimensions, or 1 with offsets; got {tuple(ids.shape)}")
    if weights is not None and weights.shape != ids.shape:
        raise QuernelError(
            f"per_sample_weights must have the shape of ids, {tuple(ids.shape)}; got {tuple(weights.shape)}"
        )


def check_grad(grad: Tensor, bags: int, layout: list[int]) -> None:
    """Raise unless a gradient has a row a bag."""
    if tuple(grad.shape) != (bags, Layout(*layout).dim):
        raise QuernelError(f"grad must have shape ({bags}, {Layout(*layout).dim}); got {tuple(grad.shape)}")


def refuse(ids: Tensor, place: int, fields: list[int]) -> None:
    """Raise over the id at a place."""
    field = place % (len(fields) // 3)
    where = f" of field {field}" if len(fields) > 3 else ""
    raise QuernelError(
        f"ids{where} must be in [0, {fields[3 * field + 1]}); got {int(ids.reshape(-1)[place])}. "
        "Check the vocabulary, or pass num_embeddings=None for an open one"
    )


def bags_of(ids: Tensor, bounds: Tensor | None) -> tuple[int, int]:
    """Return the number of bags, and the ids of each where that is one number."""
    return (ids.shape[0], ids.shape[1]) if bounds is None else (bounds.shape[0] - 1, 0)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which an array of this one is summed."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Parts:
    """The terms of all bags, as index tensors: what the compiled kernels never form."""

    bags: int
    bag: Tensor  # (n,)
    slots: Tensor  # (n, dim)
    factors: Tensor  # (n, dim)

    @classmethod
    def of(
        cls, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, starts: Tensor | None, flips: Tensor | None,
        layout: list[int], fields: list[int], scales: list[float], mean: bool, wide: torch.dtype,
    ) -> Self:  # fmt: skip
        described = Layout(*layout)
        bags, per_bag = bags_of(ids, bounds)
        keys, device = ids.long().reshape(-1), ids.device
        place = torch.arange(keys.numel(), device=device)
        first, limit, padding = torch.tensor(fields, device=device).reshape(-1, 3)[place % len(scales)].unbind(1)
        bad = ((keys < 0) | (keys >= limit)).nonzero()
        if bad.numel():
            refuse(ids, int(bad[0]), fields)
        bag = place // max(1, per_bag)
        if bounds is not None:
            bag = torch.repeat_interleave(torch.arange(bags, device=device), bounds.diff())
        present = (keys != padding).to(wide)
        factor = present * torch.tensor(scales, dtype=wide, device=device)[place % len(scales)]
        if weights is not None:
            factor = factor * weights.reshape(-1).to(wide)
        if mean:
            counts = present.new_zeros(bags).index_add_(0, bag, present)
            factor = factor / counts.clamp_min(1)[bag]
        rows = keys + first
        signs = signs_of(described, flips, rows)
        factors = factor[:, None].expand(-1, described.dim) if signs is None else factor[:, None] * signs
        return cls(bags, bag, slots_of(described, starts, rows), factors)


def bag_plain(
    values: Tensor, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, starts: Tensor | None,
    flips: Tensor | None, layout: list[int], fields: list[int], scales: list[float], mean: bool, sparse: bool,
) -> Tensor:  # fmt: skip
    """Return the sums of the bags."""
    check(values, ids, bounds, weights, layout)
    parts = Parts.of(ids, bounds, weights, starts, flips, layout, fields, scales, mean, wide_dtype(values.dtype))
    rows = values.to(parts.factors.dtype)[parts.slots] * parts.factors
    return rows.new_zeros(parts.bags, Layout(*layout).dim).index_add_(0, parts.bag, rows).to(values.dtype)


def scatter_plain(
    grad: Tensor, ids: Tensor, bounds: Tensor | None, weights: Tensor | None, starts: Tensor | None,
    flips: Tensor | None, layout: list[int], fields: list[int], scales: list[float], mean: bool,
) -> Tensor:  # fmt: skip
    """Return the gradient of the array."""
    parts = Parts.of(ids, bounds, weights, starts, flips, layout, fields, scales, mean, wide_dtype(grad.dtype))
    terms = grad.to(parts.factors.dtype)[parts.bag] * parts.factors
    return terms.new_zeros(Layout(*layout).size).index_add_(0, parts.slots.reshape(-1), terms.reshape(-1))


def dots_plain(
    values: Tensor, grad: Tensor, ids: Tensor, bounds: Tensor | None, starts: Tensor | None, flips: Tensor | None,
    layout: list[int], fields: list[int], scales: list[float],
) -> Tensor:  # fmt: skip
    """Return the gradient of the weights."""
    wide = wide_dtype(values.dtype)
    parts = Parts.of(ids, bounds, None, starts, flips, layout, fields, scales, False, wide)
    rows = values.to(wide)[parts.slots] * parts.factors
    return (rows * grad.to(wide)[parts.bag]).sum(1).reshape(ids.shape)


def sparse_gradient(grad: Tensor, size: int, parts: Parts) -> Tensor:
    """Return the gradient of the array as a coalesced sparse tensor."""
    terms = (grad.to(parts.factors.dtype)[parts.bag] * parts.factors).reshape(-1)
    return torch.sparse_coo_tensor(parts.slots.reshape(1, -1), terms, (size,), check_invariants=False).coalesce()


def slots_of(layout: Layout, starts: Tensor | None, rows: Tensor) -> Tensor:  # (n,) -> (n, dim)
    """Return the slots of rows, int64."""
    position = _positions(layout, rows)
    block = position // layout.block
    if starts is not None:
        begin = starts[block]
    elif layout.kind == PRIME:
        row, chunk = block // layout.per_row, block % layout.per_row
        total = _multiply_mod(layout.a, row, layout.prime) + _multiply_mod(layout.b, chunk, layout.prime) + layout.c
        begin = total % layout.prime % layout.places
    else:
        begin = fastrange_of(mix(layout.state, block), layout.places)
    return (begin + position % layout.block) % layout.size


def signs_of(layout: Layout, flips: Tensor | None, rows: Tensor) -> Tensor | None:  # (n,) -> (n, dim)
    """Return the signs of rows, int64 of +1 and -1, or None if all are +1."""
    if not layout.signs:
        return None
    position = _positions(layout, rows)
    if flips is not None:
        return flips[position].long()
    word = mix(mix(layout.state, position >> 6), SIGNS)
    return 1 - 2 * ((word >> (position & 63)) & 1)


def _positions(layout: Layout, rows: Tensor) -> Tensor:
    return rows[:, None] * layout.pitch + torch.arange(layout.dim, device=rows.device)


def mix(state: int | Tensor, key: int | Tensor) -> Tensor:
    """One step of ``mix64``."""
    z: Tensor = state + key + _signed(0x9E3779B97F4A7C15)  # type: ignore[assignment]
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def fastrange_of(h: Tensor, n: int) -> Tensor:
    h_low, h_high = h & _LOW, _shift(h, 32)
    n_low, n_high = n & _LOW, n >> 32
    middle = h_high * n_low + _shift(h_low * n_low, 32)
    other = h_low * n_high + (middle & _LOW)
    return h_high * n_high + _shift(middle, 32) + _shift(other, 32)


def _multiply_mod(a: int, x: Tensor, prime: int) -> Tensor:
    """Return ``a x mod prime`` for a prime below 2^32, in steps that stay below 2^63."""
    x = x % prime
    return ((a >> 16) * x % prime * 2**16 + (a & 0xFFFF) * x) % prime


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
