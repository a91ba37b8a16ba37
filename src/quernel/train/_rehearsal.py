"""Batches of a task for rehearsal: shuffled new samples, and beside them samples that were kept of earlier tasks.

Everything is drawn from one generator, so that two models trained with the same seed see the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel.train.replay_buffer import ReplayBuffer, rows_of


def as_dataset(dataset: Any) -> Any:
    """Return a map-style dataset; a pair of tensors becomes one.

    Raises
    ------
    QuernelError
        If it is neither, or is empty.
    """
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and all(isinstance(t, Tensor) for t in dataset):
        if len(dataset[0]) != len(dataset[1]):
            raise QuernelError(f"dataset must hold a label a sample; got {len(dataset[0])} and {len(dataset[1])}")
        dataset = torch.utils.data.TensorDataset(*dataset)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise QuernelError(
            f"dataset must be a pair of tensors (x, y) or a dataset with len() and items (x, y); got "
            f"{type(dataset).__name__}"
        )
    if not len(dataset):
        raise QuernelError("dataset must hold at least one sample; got none")
    return dataset


def labels_of(dataset: Any) -> Tensor:
    """Return all labels; from the ``tensors`` or ``targets`` of the dataset where it has them, else one by one."""
    if isinstance(dataset, torch.utils.data.TensorDataset) and len(dataset.tensors) == 2:
        return dataset.tensors[1]
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == len(dataset):
        return torch.as_tensor(targets)
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


class Rehearsal:
    """Epochs over a task; each batch has at most ``batch_size`` samples, some of them from the memory if it holds any.

    Iterate for ``(x, y, new)``: the first ``new`` rows are of the task.
    """

    def __init__(
        self,
        dataset: Any,
        memory: ReplayBuffer | None,
        *,
        epochs: int,
        batch_size: int,
        memory_share: float,
        generator: torch.Generator,
    ) -> None:
        self.dataset, self.epochs, self.generator = dataset, epochs, generator
        self.old = memory.items() if memory is not None and len(memory) else None
        share = memory_share if self.old is not None else 0.0
        self.replayed = min(round(share * batch_size), batch_size - 1)
        self.fresh = batch_size - self.replayed

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.dataset) // self.fresh)

    def __len__(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        for _ in range(self.epochs):
            order = torch.randperm(len(self.dataset), generator=self.generator)
            # Of equal size within one: batch norm cannot take a last batch of a single sample.
            for rows in order.tensor_split(self.batches):
                x, y = rows_of(self.dataset, rows)
                if self.old is not None and self.replayed:
                    drawn = torch.randint(len(self.old[1]), (self.replayed,), generator=self.generator)
                    x = torch.cat((x, self.old[0][drawn].to(x)))
                    y = torch.cat((y, self.old[1][drawn].to(y)))
                yield x, y, len(rows)
