"""Randomness without a global generator: child seeds, one seed for NumPy, torch and row states, seeded examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from quernel._errors import QuernelError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Seed = int | np.random.SeedSequence | np.random.Generator | None


def generator(seed: Seed, name: str = "seed") -> np.random.Generator:
    """Return a NumPy generator; an existing one passes through, None draws fresh entropy. ``name`` is for errors."""
    known = seed is None or isinstance(seed, int | np.integer | np.random.SeedSequence | np.random.Generator)
    if not known or isinstance(seed, bool) or (isinstance(seed, int | np.integer) and seed < 0):
        raise QuernelError(f"{name} must be a non-negative integer, a SeedSequence, a Generator or None; got {seed!r}")
    return np.random.default_rng(seed)


def spawn(seed: int | np.random.SeedSequence, n: int) -> list[np.random.SeedSequence]:
    """Return ``n`` independent child seeds; the same call gives the same children."""
    # A fresh sequence each time: SeedSequence.spawn itself counts up, so two calls would differ.
    entropy = seed if isinstance(seed, int) else seed.entropy
    key = () if isinstance(seed, int) else seed.spawn_key
    return [np.random.SeedSequence(entropy, spawn_key=(*key, i)) for i in range(n)]


def torch_generator(seed: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator seeded from the same source."""
    import torch

    # 63 bits: torch takes a signed seed on some back ends.
    return torch.Generator(device).manual_seed(int(generator(seed).integers(0, 2**63 - 1)))


def row_states(seed: Seed, n: int) -> np.ndarray:
    """Return one non-zero uint64 state a row, shape (n,), for kernels that draw inside a loop."""
    return generator(seed).integers(1, 2**64, size=n, dtype=np.uint64)


def seeded(make: Callable[[], T]) -> Callable[[], T]:
    """Return ``make``, with torch's initialisers drawing the same numbers every time; its generator is put back."""

    @functools.wraps(make)
    def made() -> T:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return make()

    return made
