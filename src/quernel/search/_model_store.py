"""Specifications of models as arrays: checked as they come in, stacked by slot, gathered, saved.

Model t holds points [offsets[t], offsets[t + 1]) of the stacked z, weights and prompts, its beta^T K beta, and with
prompts its K, flat. All of it is computed from the points as they are kept, so that rounding does not bend distances.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from quernel._array_folder import Arrays, take
from quernel._errors import FormatError, QuernelError
from quernel._growing import GrowingArray
from quernel._validate import check_finite
from quernel.kernels import WeightedRKME, gaussian_kernel
from quernel.kernels._specification import Specification, check_comparable
from quernel.search._ragged import Ragged, RaggedVectors
from quernel.search._stored_numbers import VectorType, check_storable

Rows = NDArray[np.float32]
Slots = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Specs:
    """Checked specifications on their way in."""

    z: Ragged
    weights: NDArray[np.float32]
    u: Ragged | None
    privacy: tuple[dict[str, Any] | None, ...]

    def __len__(self) -> int:
        return len(self.z)


class Held(NamedTuple):
    """Some models, their points as they are kept."""

    offsets: NDArray[np.int64]
    points: NDArray[Any]
    scales: Rows
    lengths: Rows
    weights: Rows
    norms: Rows
    prompts: NDArray[Any] | None
    prompt_scales: Rows | None
    grams: Rows | None
    places: NDArray[np.int64]


class ModelStore:
    """The models of an index, by slot.

    Parameters
    ----------
    dim : int
    gamma : float
    kernel : {"gaussian", "cosine"}
    prompt_dim : int or None
    dtype : {"float32", "float16", "int8"}
        How points and prompts are kept.
    """

    def __init__(self, dim: int, gamma: float, kernel: str, prompt_dim: int | None, dtype: VectorType) -> None:
        self.gamma, self.kernel, self.prompt_dim = gamma, kernel, prompt_dim
        self.z = RaggedVectors(dim, dtype)
        self.u = None if prompt_dim is None else RaggedVectors(prompt_dim, dtype)
        none = np.zeros(0, np.float32)
        self._weights, self._lengths = GrowingArray(none), GrowingArray(none)
        self._norms, self._grams = GrowingArray(none), GrowingArray(none)
        self._places = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self.z)

    @property
    def weights(self) -> Rows:
        """Beta of every point."""
        found: Rows = self._weights.rows
        return found

    @property
    def norms(self) -> Rows:
        """Beta^T K beta of every model."""
        found: Rows = self._norms.rows
        return found

    def checked(self, name: str, x: Any, encoder: str) -> Specs:
        """Take one specification or a sequence of them, and check every one.

        Raises
        ------
        QuernelError
            Naming what does not fit.
        """
        if isinstance(x, Specs):
            return x
        given = [x] if isinstance(x, Specification) else x
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict):
            raise QuernelError(f"{name} must be fitted WeightedRKMEs, one a model; got {type(x).__name__}")
        specs: list[Any] = list(given)
        for i, spec in enumerate(specs):
            where = f"{name}[{i}]"
            check_comparable(where, spec, self.kernel, self.gamma, encoder, self.z.dim)
            _check_numbers(where, spec)
            if self.u is not None:
                prompts = spec.u_ if isinstance(spec, WeightedRKME) else None
                if prompts is None or prompts.shape[1] != self.u.dim:
                    raise QuernelError(
                        f"{where} must hold prompts of {self.u.dim} numbers; got "
                        f"{'none' if prompts is None else prompts.shape[1]}. Give fit(X, prompts=...)"
                    )
        points = [_unit(spec.z_) if self.kernel == "cosine" else spec.z_ for spec in specs]
        weights = [spec.beta_ / spec.beta_.sum() for spec in specs]
        found = Specs(
            Ragged.of(name, points, self.z.dim),
            np.concatenate([np.zeros(0), *weights]).astype(np.float32),
            None if self.u is None else Ragged.of(name, [spec.u_ for spec in specs], self.u.dim),
            tuple(spec.privacy for spec in specs),
        )
        for part in (found.z, found.u):
            if part is not None:
                check_storable(name, part.rows, self.z.dtype)
        return found

    def append(self, specs: Specs) -> None:
        """Put models into the next slots."""
        first, row = len(self.z), int(self.z.offsets[-1])
        # ``checked`` refused what cannot be stored: nothing is half added.
        self.z.append(specs.z)
        if self.u is not None and specs.u is not None:
            self.u.append(specs.u)
        self._weights.append(specs.weights)
        points = self.z.values(row)
        self._lengths.append(self._half_lengths(points))
        grams, norms = [], []
        for a, b in itertools.pairwise((self.z.offsets[first:] - row).tolist()):
            k = self._gram(points[a:b])
            beta = specs.weights[a:b].astype(np.float64)
            norms.append(max(0.0, float(beta @ k @ beta)))  # opposite points cancel, up to rounding
            if self.u is not None:
                grams.append(k.astype(np.float32).ravel())
        self._norms.append(np.array(norms, np.float32))
        self._grams.append(np.concatenate([np.zeros(0, np.float32), *grams]))
        self._place()

    def slots(self, a: int, b: int) -> Held:
        """Return models [a, b), nothing copied."""
        rows = slice(self.z.offsets[a], self.z.offsets[b])
        scaled = self.z.dtype == "int8"
        grams = None if self.u is None else self._grams.rows[self._places[a] : self._places[b]]
        return Held(
            self.z.offsets[a : b + 1], self.z.rows[rows], self.z.scales[rows] if scaled else self.z.scales,
            self._lengths.rows[rows], self.weights[rows], self._norms.rows[a:b],
            None if self.u is None else self.u.rows[rows],
            None if self.u is None else (self.u.scales[rows] if scaled else self.u.scales),
            grams, self._places[a : b + 1],
        )  # fmt: skip

    def gathered(self, slots: Slots) -> Held:
        """Return these models in this order, copied."""
        offsets, points, scales = self.z.gathered(slots)
        begins = self.z.offsets[slots]
        rows = np.repeat(begins - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
        prompts = prompt_scales = grams = None
        places = np.concatenate([[0], np.cumsum(np.diff(offsets) ** 2)])
        if self.u is not None:
            _, prompts, prompt_scales = self.u.gathered(slots)
            held = self._grams.rows
            parts = [held[self._places[t] : self._places[t + 1]] for t in slots]
            grams = np.concatenate([held[:0], *parts])
        return Held(
            offsets, points, scales, self._lengths.rows[rows], self.weights[rows], self._norms.rows[slots], prompts,
            prompt_scales, grams, places,
        )  # fmt: skip

    def keep(self, wanted: NDArray[np.bool_]) -> None:
        """Drop the other models; the rest is numbered again."""
        held = self.gathered(np.flatnonzero(wanted).astype(np.int64))
        self.z.keep(wanted)
        if self.u is not None:
            self.u.keep(wanted)
        grams = self._grams.rows[:0] if held.grams is None else held.grams
        self._weights, self._lengths = GrowingArray(held.weights), GrowingArray(held.lengths)
        self._norms, self._grams = GrowingArray(held.norms), GrowingArray(grams)
        self._place()

    def arrays(self) -> Arrays:
        """Return what a file holds."""
        held = {**self.z.arrays(), "weights": self.weights, "lengths": self._lengths.rows, "norms": self._norms.rows}
        if self.u is not None:
            prompts = {f"prompt_{name}": array for name, array in self.u.arrays().items() if name != "offsets"}
            held |= {**prompts, "grams": self._grams.rows}
        return held

    def restore(self, arrays: Arrays, n: int) -> None:
        """Take ``n`` models out of the arrays of a file.

        Raises
        ------
        FormatError
            If something is missing or does not fit.
        """
        self.z.restore(arrays, n)
        rows = len(self.z.rows)
        self._weights = GrowingArray(take(arrays, "weights", np.float32, (rows,)))
        self._lengths = GrowingArray(take(arrays, "lengths", np.float32, (rows,)))
        self._norms = GrowingArray(take(arrays, "norms", np.float32, (n,)))
        if self.u is not None:
            own = {"offsets": self.z.offsets}
            for name in ("vectors", "scales"):
                if f"prompt_{name}" in arrays:
                    own[name] = arrays.pop(f"prompt_{name}")
            self.u.restore(own, n)
            self._grams = GrowingArray(take(arrays, "grams", np.float32, (None,)))
        self._place()
        if self.u is not None and len(self._grams) != self._places[-1]:
            raise FormatError(f"array 'grams' must have {self._places[-1]} numbers; got {len(self._grams)}")

    def check(self) -> None:
        """Raise unless the numbers are ones that a specification can have."""
        for name, array in (("weights", self.weights), ("norms", self._norms.rows), ("lengths", self._lengths.rows)):
            if not np.isfinite(array).all() or (array < 0).any():
                raise FormatError(f"array {name!r} must hold finite numbers >= 0")

    def _place(self) -> None:
        self._places = np.concatenate([[0], np.cumsum(np.diff(self.z.offsets) ** 2)]).astype(np.int64)

    def _half_lengths(self, points: Rows) -> Rows:
        """Return gamma |z|^2 of each point."""
        squares: Rows = np.einsum("ij,ij->i", points, points)
        return np.float32(self.gamma) * squares

    def _gram(self, points: Rows) -> NDArray[np.float64]:
        rows = torch.from_numpy(points.astype(np.float64))
        if self.kernel == "cosine":
            return np.asarray((rows @ rows.T).numpy())
        scaled = rows * np.sqrt(2 * self.gamma)
        return np.asarray(gaussian_kernel(scaled, scaled).numpy())


def checked_meta(meta: Any, n: int) -> list[dict[str, Any]]:
    """Return what is said of n models, as JSON gives it back; {} where nothing is."""
    if meta is None:
        return [{} for _ in range(n)]
    listed = isinstance(meta, Sequence) and not isinstance(meta, str)
    if not listed or len(meta) != n or not all(isinstance(held, Mapping) for held in meta):
        got = ", ".join(sorted({type(held).__name__ for held in meta})) if listed else type(meta).__name__
        raise QuernelError(f"meta must be {n} mappings, one a model; got {f'{len(meta)} of ' * listed}{got}")
    try:
        # Through JSON and back: what is kept is what a file gives.
        return [dict(json.loads(json.dumps(dict(held), allow_nan=False))) for held in meta]
    except (TypeError, ValueError) as error:
        raise QuernelError(f"meta must hold what JSON can: {error}") from error


def _check_numbers(where: str, spec: Specification) -> None:
    if len(spec.z_) != len(spec.beta_) or not len(spec.z_):
        raise QuernelError(f"{where} must have a weight for each of its points; got {spec.beta_.shape}")
    check_finite(f"{where}.z_", spec.z_)
    check_finite(f"{where}.beta_", spec.beta_)
    if (spec.beta_ < 0).any():
        raise QuernelError(f"{where} has negative weights, which no query can weigh; fit with simplex=True")
    if not spec.beta_.sum() > 0:
        raise QuernelError(f"{where} has weights that are all 0")


def _unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
