"""``CompatibleTrainer``: train the next version of a model so that what the old one stored stays searchable.

A plain loop of torch: cross-entropy against the fixed simplex and, with an old model, ``HOCLoss`` towards its features
(arXiv 2405.02581).  What must agree between versions is checked before the first step; nothing is saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import _random
from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_int, check_probability, check_type
from quernel.nn import SimplexHead
from quernel.train._rehearsal import Rehearsal, as_dataset, labels_of
from quernel.train.hoc_loss import HOCLoss, at_least_single
from quernel.train.replay_buffer import ReplayBuffer, rows_of

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
EpochProgress = Callable[[int, int, float], None]


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the default optimiser; weight decay keeps the length of features, which CE never stops to lengthen."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)


@register(
    "stationary-representations",
    pillar="train",
    contract="trainer",
    paper="2405.02581",
    status="stable",
    headline=False,
)
class CompatibleTrainer:
    """Train a backbone under a fixed simplex classifier, compatible with an old model where one is given.

    Parameters
    ----------
    backbone : nn.Module
        (N, ...) -> (N, head.in_features); trained in place.
    head : SimplexHead
        With a prototype for every class of the data; trained in place where it has a linear map.
    old : nn.Module, optional
        The version whose features are stored, with one ``SimplexHead`` in it, that returns ``(logits, features)``.  It
        is copied, frozen and kept in eval mode: it may share modules with ``backbone``, and is never changed.
    memory : ReplayBuffer, optional
        Samples of earlier tasks; those of this task are added in its last epoch.
    loss : HOCLoss, optional
        Default ``HOCLoss()``.  Without ``old``, cross-entropy alone.
    epochs, batch_size : int, default=1 and 128
    memory_share : float, default=0.5
        Part of a batch that is drawn from the memory where it holds any, in [0, 1).
    optimizer : callable (parameters) -> Optimizer, default AdamW(lr=1e-3, weight_decay=1e-2)
    seed : int, default=0
        Of the order of samples.  What the backbone draws itself (dropout) follows torch.
    progress : callable (step, steps, loss), optional
        Called after every step.

    Attributes
    ----------
    model : nn.Sequential
        ``Sequential(backbone, head)``, x -> (logits, features).
    old : nn.Module or None
        The frozen copy.
    steps : int
        Steps taken so far.

    Raises
    ------
    QuernelError
        If the heads do not agree; from ``fit``, before training, if a label has no prototype or a width does not fit.

    References
    ----------
    Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved
    Model Replacements", arXiv 2405.02581, 2024.

    Examples
    --------
    >>> from quernel.nn import SimplexHead
    >>> x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 2
    >>> old = CompatibleTrainer(nn.Linear(8, 16), SimplexHead(4, 16)).fit((x, y)).model
    >>> new = CompatibleTrainer(nn.Linear(8, 32), SimplexHead(4, 32), old=old).fit((x, y)).model
    >>> tuple(new(x)[1].shape)
    (64, 3)
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: SimplexHead,
        *,
        old: nn.Module | None = None,
        memory: ReplayBuffer | None = None,
        loss: HOCLoss | None = None,
        epochs: int = 1,
        batch_size: int = 128,
        memory_share: float = 0.5,
        optimizer: Optimizer = adam,
        seed: int = 0,
        progress: EpochProgress | None = None,
    ) -> None:
        check_type("backbone", backbone, nn.Module)
        check_type("memory", memory, (ReplayBuffer, type(None)))
        self.head = check_type("head", head, SimplexHead)
        self.loss = check_type("loss", HOCLoss() if loss is None else loss, HOCLoss)
        self.epochs = check_int("epochs", epochs, low=1)
        self.batch_size = check_int("batch_size", batch_size, low=1)
        self.memory_share = check_probability("memory_share", memory_share)
        if self.memory_share == 1 or (memory is not None and self.memory_share > 0 and self.batch_size == 1):
            raise QuernelError(
                f"memory_share={memory_share} of batch_size={batch_size} leaves no room for new samples. Take a "
                "smaller share or larger batches"
            )
        self.optimizer, self.progress, self.memory = optimizer, progress, memory
        self.model = nn.Sequential(backbone, head)
        self.old: nn.Module | None = None
        if old is not None:
            head.check_agrees(head_of(old))
            # A copy, because fine-tuning often starts from the very modules of the old model.
            self.old = copy.deepcopy(old).eval().requires_grad_(False)
        self.steps = 0
        self._generator = _random.torch_generator(check_int("seed", seed, low=0))

    def fit(self, dataset: Any) -> Self:
        """Train on a task, and leave the model in eval mode.

        Parameters
        ----------
        dataset : (Tensor, Tensor) or map-style dataset of (x, y)
            Samples and integer labels.

        Raises
        ------
        QuernelError
            Before the first step if something does not fit; during training if the loss is no longer finite.
        """
        dataset = as_dataset(dataset)
        self._check(dataset)
        rehearsal = Rehearsal(
            dataset,
            self.memory,
            epochs=self.epochs,
            batch_size=self.batch_size,
            memory_share=self.memory_share,
            generator=self._generator,
        )
        optimizer = self.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.model.train()
        try:
            for step, (x, y, new) in enumerate(rehearsal, start=1):
                loss = self._step(x, y, optimizer, step)
                if self.memory is not None and step > len(rehearsal) - rehearsal.batches:
                    self.memory.add(x[:new], y[:new])
                if self.progress is not None:
                    self.progress(step, len(rehearsal), loss)
        finally:
            self.model.eval()
        return self

    def _step(self, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, step: int) -> float:
        x = x.to(self._device)
        targets = self.head.targets(y)
        logits, features = self.model(x)
        if self.old is None:
            loss = F.cross_entropy(at_least_single(logits), targets)
        else:
            with torch.no_grad():
                before = self.old(x)[1]
            loss = self.loss(logits, targets, features, before)
        value = float(loss.detach())
        if not abs(value) < torch.inf:
            raise QuernelError(
                f"the loss is {value} at step {step}; take a smaller rate, or look for NaN in the samples"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        self.steps += 1
        return value

    @property
    def _device(self) -> torch.device:
        return self.head.spec.device

    @torch.no_grad()
    def _check(self, dataset: Any) -> None:
        """Raise unless labels have prototypes and one sample goes through both models."""
        self.head.targets(labels_of(dataset))
        if self.memory is not None and len(self.memory):
            self.head.targets(self.memory.items()[1])
        x = rows_of(dataset, torch.zeros(1, dtype=torch.int64))[0].to(self._device)
        self.model.eval()
        wanted = (1, self.head.n_features)
        check_features("the new model", self.model(x), wanted)
        if self.old is not None:
            check_features("old", self.old(x), wanted)


def head_of(model: nn.Module) -> SimplexHead:
    """Return the one ``SimplexHead`` of a model.

    Raises
    ------
    QuernelError
        If there is none, or more than one.
    """
    heads = [module for module in check_type("old", model, nn.Module).modules() if isinstance(module, SimplexHead)]
    if len(heads) != 1:
        raise QuernelError(
            f"old must hold one SimplexHead; {type(model).__name__} has {len(heads)}. A model trained with another "
            "classifier has no features that a new version could be made to agree with by this trainer"
        )
    return heads[0]


def check_features(what: str, answer: Any, wanted: tuple[int, int]) -> None:
    """Raise unless a model answered ``(logits, features)`` with features of the wanted shape."""
    pair = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Tensor)
    if not pair or tuple(answer[1].shape) != wanted:
        got = tuple(answer[1].shape) if pair else type(answer).__name__
        raise QuernelError(f"{what} must return (logits, features) with features of shape {wanted}; got {got}")
