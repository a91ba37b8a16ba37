"""``MatryoshkaLoss``: any loss, summed over prefixes of an embedding or over nested classifiers (arXiv 2205.13147).

    loss = sum over m in dims of c_m base_loss(prefix m, ...),   prefix m = z_{1:m} / |z_{1:m}|

A sum, never a mean: with G prefixes of weight 1 the gradient is about G times that of the plain loss, so the learning
rate wants to be smaller. The trunk runs once, with one dropout mask for all prefixes of a sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_increasing, check_int
from quernel.nn.functional import nested_dims, unit_prefix


@register("matryoshka", pillar="train", contract="trainer", paper="2205.13147", status="stable", headline=False)
class MatryoshkaLoss(nn.Module):
    """Make every prefix of an embedding useful by itself: the sum of a loss over prefixes.

    What ``forward`` gets decides what a prefix is:

    - the dict of logits of a training ``MatryoshkaHead``: ``base_loss(logits_m, *others)``;
    - an embedding (..., d), or a list or tuple of them: ``base_loss(*prefixes, *others)``;
    - the features of sentence-transformers, a list of dicts: their model runs once a column, and the base loss gets
      the prefixes through its ``compute_loss_from_embeddings(prefixes, labels)``.

    Parameters
    ----------
    base_loss : callable or nn.Module
        Gives a scalar. A module's parameters belong to this module too.
    dims : sequence of int, optional
        Prefix lengths, increasing; should end with the whole length d. Default: all of a head's logits; for embeddings
        8, 16, 32, ... and d.
    weights : sequence of float, optional
        A weight c_m for each of ``dims``, not negative; default 1 each.
    normalize : {"auto", True, False}, default="auto"
        Divide each prefix by its own length. "auto" does so for embeddings and not for logits. False suits a base loss
        that normalises by itself or wants raw vectors.
    n_dims_per_step : int, optional
        In training, use a random subset of so many prefixes a step; default all. Drawn from torch's default generator
        unless ``generator`` is given.
    generator : torch.Generator, optional

    Raises
    ------
    QuernelError
        If ``dims`` do not increase, ``weights`` have another length, or a prefix is longer than the embedding.

    Notes
    -----
    Nothing of sentence-transformers is patched or imported. Its losses that keep gradients of their own ("Cached...")
    offer no ``compute_loss_from_embeddings`` and are refused: that library's own ``MatryoshkaLoss`` handles them.

    References
    ----------
    Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, 2022, eq. (1).

    Examples
    --------
    >>> import torch
    >>> from torch.nn import functional as F
    >>> loss = MatryoshkaLoss(F.mse_loss, dims=(1, 2), normalize=False)
    >>> float(loss([torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)]))
    3.5
    """

    def __init__(
        self,
        base_loss: Callable[..., Any],
        dims: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        normalize: Literal["auto"] | bool = "auto",
        n_dims_per_step: int | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not callable(base_loss):
            raise QuernelError(f"base_loss must be callable; got {type(base_loss).__name__}")
        self.base_loss = base_loss
        self.dims = None if dims is None else check_increasing("dims", dims, low=1)
        self.weights = None if weights is None else self._checked(weights)
        self.normalize = check_choice("normalize", normalize, ("auto", True, False))
        most = None if self.dims is None else len(self.dims)
        self.n_dims_per_step = (
            None if n_dims_per_step is None else check_int("n_dims_per_step", n_dims_per_step, low=1, high=most)
        )
        self.generator = generator

    @property
    def model(self) -> Any:
        """The model inside the base loss, where there is one: sentence-transformers' trainers look for it."""
        return self.base_loss.model  # type: ignore[attr-defined]

    def forward(self, inputs: Any, *others: Any) -> Tensor:
        """Return the weighted sum; ``others`` (labels) go to the base loss as they are."""
        if isinstance(inputs, Mapping):
            return self._of_logits(inputs, others)
        if isinstance(inputs, Tensor):
            return self._of_embeddings([inputs], lambda prefixes: self.base_loss(*prefixes, *others))
        columns = list(inputs) if isinstance(inputs, Sequence) else []
        if columns and all(isinstance(column, Tensor) for column in columns):
            return self._of_embeddings(columns, lambda prefixes: self.base_loss(*prefixes, *others))
        if columns and all(isinstance(column, Mapping) for column in columns):
            return self._of_features(columns, others)
        raise QuernelError(
            "inputs must be the logits of a MatryoshkaHead in training, an embedding, a list of embeddings, or the "
            f"features of sentence-transformers; got {type(inputs).__name__}"
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings, for the model card of sentence-transformers."""
        return {
            "loss": type(self.base_loss).__name__,
            "dims": self.dims,
            "weights": self.weights,
            "normalize": self.normalize,
            "n_dims_per_step": self.n_dims_per_step,
        }

    def extra_repr(self) -> str:
        """Show prefix lengths and weights."""
        return f"dims={self.dims}, weights={self.weights}, normalize={self.normalize!r}"

    def _of_logits(self, logits: Mapping[Any, Any], others: tuple[Any, ...]) -> Tensor:
        if self.normalize is True:
            raise QuernelError('normalize must be "auto" or False for logits, whose length means something; got True')
        dims = tuple(logits) if self.dims is None else self.dims
        missing = [m for m in dims if m not in logits]
        if missing:
            raise QuernelError(f"dims must be among those of the head, {tuple(logits)}; got {missing[0]}")
        return self._sum(dims, lambda m: self.base_loss(logits[m], *others))

    def _of_features(self, features: Sequence[Any], others: tuple[Any, ...]) -> Tensor:
        base: Any = self.base_loss
        if not hasattr(base, "compute_loss_from_embeddings") or not hasattr(base, "model"):
            raise QuernelError(
                f"base_loss must have model and compute_loss_from_embeddings to be used on features; "
                f"{type(base).__name__} has not. Take sentence_transformers.losses.MatryoshkaLoss for it"
            )
        embeddings = [base.model(column)["sentence_embedding"] for column in features]
        return self._of_embeddings(embeddings, lambda prefixes: base.compute_loss_from_embeddings(prefixes, *others))

    def _of_embeddings(self, embeddings: list[Tensor], loss: Callable[[list[Tensor]], Any]) -> Tensor:
        widths = {z.shape[-1] if z.ndim else 0 for z in embeddings}
        if len(widths) > 1 or not min(widths):
            raise QuernelError(f"embeddings must be of one length d > 0; got {[tuple(z.shape) for z in embeddings]}")
        (d,) = widths
        dims = nested_dims(d) if self.dims is None else self.dims
        if dims[-1] > d:
            raise QuernelError(f"dims must be at most d={d}, the length of the embeddings; got {dims[-1]}")
        if dims[-1] < d:
            warnings.warn(
                f"dims end with {dims[-1]}: the other coordinates of the {d} are not trained. Include {d}", stacklevel=4
            )

        def prefixes(m: int) -> list[Tensor]:
            return [unit_prefix(z, m) if self.normalize else z[..., :m] for z in embeddings]

        return self._sum(dims, lambda m: loss(prefixes(m)))

    def _sum(self, dims: Sequence[int], loss: Callable[[int], Any]) -> Tensor:
        places: Sequence[int] = range(len(dims))
        if self.training and self.n_dims_per_step is not None and self.n_dims_per_step < len(dims):
            places = sorted(torch.randperm(len(dims), generator=self.generator)[: self.n_dims_per_step].tolist())
        weights = self.weights or (1.0,) * len(dims)
        # Not from zero on: one prefix of weight 1 is the plain loss, bit for bit.
        parts = [weights[place] * loss(dims[place]) for place in places]
        total: Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _checked(self, weights: Sequence[float]) -> tuple[float, ...]:
        if self.dims is None or len(weights) != len(self.dims):
            raise QuernelError(f"weights must be {len(self.dims or ())} numbers, one for each of dims; got {weights!r}")
        return tuple(check_float("weights", weight, low=0.0) for weight in weights)
