"""Queries of ``ModelIndex``: images with prompts as they come in, and their scores with a block of models.

The kernel of a block of points with all images of a group of queries is formed in the cache, from one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quernel._array_folder import readable
from quernel._errors import QuernelError
from quernel._threads import workspace
from quernel.hashing._family import check_rows
from quernel.kernels._mean_targets import kernel_matrix
from quernel.search._index import Scores
from quernel.search._model_kernels import mean_over_images, plain_scores, weighted_scores
from quernel.search._model_store import Held, ModelStore
from quernel.search._ragged import Ragged

Vectors = NDArray[np.float32]

# Bytes of a cache line; where torch's own tensors begin.
_LINE = 64


@dataclass(frozen=True, eq=False)
class Asked:
    """Checked queries: images and, where the prompt counts, a unit prompt each."""

    images: Ragged
    prompts: Vectors | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, some: slice) -> Asked:
        return Asked(self.images[some], None if self.prompts is None else self.prompts[some])

    @classmethod
    def of(cls, name: str, q: Any, dim: int, *, unit: bool) -> Asked:
        """Take rows, one image a query, or a sequence of arrays (n_i, dim); ``unit`` makes their lengths 1."""
        several = hasattr(q, "shape") and len(q.shape) == 3
        if not hasattr(q, "shape") and isinstance(q, Sequence) and len(q):
            several = np.ndim(q[0]) == 2
        if several:
            images = Ragged.of(name, q, dim)
        else:
            rows = check_rows(name, q, dim)
            images = Ragged(np.arange(len(rows) + 1), rows)
        if unit:
            lengths = np.linalg.norm(images.rows, axis=1, keepdims=True)
            if not (lengths > 0).all():
                raise QuernelError(f"{name} holds a vector of zeros, which has no direction for the cosine")
            images = Ragged(images.offsets, images.rows / lengths)
        return cls(images)

    def with_prompts(self, prompts: Any, dim: int | None) -> Asked:
        """Return the same queries with a prompt each."""
        if dim is None:
            raise QuernelError("prompts need an index with prompts; make it with prompt_dim=")
        rows = check_rows("prompts", prompts, dim)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if len(rows) != len(self):
            raise QuernelError(f"prompts must be {len(self)} vectors, one a query; got {len(rows)}")
        if not (lengths > 0).all():
            raise QuernelError(f"prompts must not be 0; number {int(np.argmin(lengths))} is")
        return Asked(self.images, np.asarray(rows / lengths, np.float32))

    def groups(self, images: int, queries: int) -> list[Asked]:
        """Cut into groups of at most so many images and queries, at least one query each."""
        groups, a, offsets = [], 0, self.images.offsets
        while a < len(self):
            b = int(np.searchsorted(offsets, offsets[a] + images, side="right")) - 1
            b = max(a + 1, min(b, a + queries))
            groups.append(self[a:b])
            a = b
        return groups


class Prepared:
    """A group of queries as the kernels take them."""

    def __init__(self, store: ModelStore, queries: Asked, temperature: float) -> None:
        images = queries.images
        self.store, self.images, self.n = store, images.offsets, len(queries)
        # Torch's own memory, for the same reason as in ``as_rows``.
        self.asked = torch.tensor(images.rows).T
        squares = np.einsum("ij,ij->i", images.rows, images.rows, dtype=np.float64)
        self.lengths = torch.from_numpy((store.gamma * squares).astype(np.float32))
        self.single = bool((np.diff(images.offsets) == 1).all())
        self.selves = np.array([self._own(images[i : i + 1].rows) for i in range(self.n)], np.float32)
        self.prompts = None if queries.prompts is None else torch.tensor(queries.prompts).T
        self.sharpness = np.float32(1.0 / temperature)

    def score(self, held: Held, out: Scores) -> None:
        """Write the scores of some models into ``out``, (n, models)."""
        rows, columns = len(held.points), self.asked.shape[1]
        dim = held.points.shape[1]
        values = workspace("model kernels", rows * columns, torch.float32).view(rows, columns)
        room = workspace("model points", rows * dim, torch.float32).view(rows, dim)
        similarities(self.store, held, self.asked, self.lengths, room, values)
        near = values.numpy()
        if not self.single:
            near = workspace("model means", rows * self.n, torch.float32).view(rows, self.n).numpy()
            mean_over_images(values.numpy(), self.images, near)
        if self.prompts is None or held.prompts is None or held.grams is None or held.prompt_scales is None:
            plain_scores(near, held.weights, held.norms, self.selves, held.offsets, out)
            return
        width = held.prompts.shape[1]
        cosines = workspace("model cosines", rows * self.n, torch.float32).view(rows, self.n)
        room = workspace("model points", rows * width, torch.float32).view(rows, width)
        torch.mm(as_rows(held.prompts, held.prompt_scales, room), self.prompts, out=cosines)
        a = np.empty(int(np.diff(held.offsets).max(initial=1)), np.float32)
        weighted_scores(
            near, cosines.numpy(), held.weights, held.grams, held.places, self.selves, self.sharpness, held.offsets,
            a, out,
        )  # fmt: skip

    def _own(self, rows: Vectors) -> float:
        if len(rows) == 1:
            return 1.0
        return float(kernel_matrix(rows, rows, self.store.kernel, self.store.gamma).mean())


def similarities(
    store: ModelStore, held: Held, asked: Tensor, asked_lengths: Tensor, rows: Tensor, out: Tensor
) -> None:
    """Write the kernel of points (rows) and query images (columns) into ``out``.

    asked: (dim, columns); asked_lengths: (columns,) gamma |x|^2; rows: float32 room for the points.
    """
    torch.mm(as_rows(held.points, held.scales, rows), asked, out=out)
    if store.kernel == "gaussian":
        out.mul_(2.0 * store.gamma).sub_(torch.from_numpy(held.lengths)[:, None]).sub_(asked_lengths)
        # |x|^2 + |y|^2 - 2 x.y may be rounded below 0.
        out.clamp_(max=0.0).exp_()


def as_rows(rows: NDArray[Any], scales: Vectors, room: Tensor) -> Tensor:
    """Return rows in float32, in ``room`` unless they are, and begin where a cache line begins.

    The rounding of a product may depend on that, and a loaded index must answer as the saved one did, bit for bit.
    """
    held = readable(rows)
    if held.dtype == torch.float32 and held.data_ptr() % _LINE == 0:
        return held
    room.copy_(held)
    return room.mul_(torch.from_numpy(scales)[:, None]) if len(scales) else room
