"""A small map behind a frozen encoder that makes every prefix of its embeddings useful (after arXiv 2205.13147).

    z = A e,  or  z = A e + W_2 gelu(W_1 e + b),   e = E / |E|,   A from the principal axes of E, W_2 = 0 at first

trained with a contrastive loss on pairs, summed over prefixes, and a term that keeps similarities,

    sum over m of  mean over (e, e') of  (cos(z_{1:m}, z'_{1:m}) - cos(e, e'))^2,

which is all there is without pairs.  Cost: D^2 multiply-adds a vector, seconds to minutes of training.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._load import save_model
from quernel._random import torch_generator
from quernel._registry import register
from quernel._validate import check_choice, check_finite, check_float, check_increasing, check_int
from quernel.nn.functional import nested_dims, unit_prefix
from quernel.train.matryoshka_loss import MatryoshkaLoss

Kind = Literal["linear", "mlp"]
KINDS: tuple[Kind, ...] = ("linear", "mlp")
# Rows that ``transform`` maps at a time.
_ROWS = 2**14
# Of the rows, and of the pairs, kept to choose the epoch.
_HELD_OUT = 0.1


def _example() -> dict[str, Any]:
    return {
        "make": lambda: MatryoshkaAdapter(12, (2, 4, 12), "mlp", generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(4, 12, generator=generator),),
    }


@register(
    "matryoshka",
    pillar="train",
    contract="model",
    paper="2205.13147",
    status="stable",
    headline=False,
    example=_example,
)
class MatryoshkaAdapter(nn.Module):
    """A map from embeddings to embeddings whose prefixes are embeddings; ``fit_matryoshka_adapter`` trains one.

    Parameters
    ----------
    in_features : int
        Length D of the embeddings, before and after.
    dims : sequence of int, optional
        Prefix lengths it is trained for, increasing, at most D; default 8, 16, 32, ... and D. Others in between work
        almost as well.
    kind : {"linear", "mlp"}, default="linear"
        A matrix, or a matrix and a network of one hidden layer beside it.
    hidden : int, optional
        Width of the hidden layer; default D.
    generator : torch.Generator, optional
        For the initial values of the hidden layer; default is torch's own.

    References
    ----------
    Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, 2022.

    Examples
    --------
    >>> import numpy as np
    >>> from quernel.train import fit_matryoshka_adapter
    >>> E = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    >>> adapter = fit_matryoshka_adapter(E, dims=(4, 16), epochs=2)
    >>> adapter.transform(E, dim=4).shape
    (200, 4)
    """

    def __init__(
        self,
        in_features: int,
        dims: Sequence[int] | None = None,
        kind: Kind = "linear",
        *,
        hidden: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_int("in_features", in_features, low=1)
        self.dims = (
            nested_dims(in_features) if dims is None else check_increasing("dims", dims, low=1, high=in_features)
        )
        self.kind: Kind = check_choice("kind", kind, KINDS)
        self.hidden = check_int("hidden", in_features if hidden is None else hidden, low=1)
        self.weight = nn.Parameter(torch.eye(in_features))
        if kind == "mlp":
            bound = in_features**-0.5
            self.inner = nn.Parameter(
                torch.empty(self.hidden, in_features).uniform_(-bound, bound, generator=generator)
            )
            self.bias = nn.Parameter(torch.zeros(self.hidden))
            # Zeros: the map begins as the matrix alone.
            self.outer = nn.Parameter(torch.zeros(in_features, self.hidden))

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """Return the mapped embeddings, not of unit length; cut and normalise them with ``transform``."""
        if x.shape[-1] != self.in_features:
            raise QuernelError(f"x must have shape (..., {self.in_features}); got {tuple(x.shape)}")
        unit = unit_prefix(x)
        z = F.linear(unit, self.weight)
        if self.kind == "mlp":
            z = z + F.linear(F.gelu(F.linear(unit, self.inner, self.bias)), self.outer)
        return z

    def transform(self, E: Any, dim: int | None = None) -> Any:
        """Return the first ``dim`` coordinates of mapped embeddings, of unit length.

        Parameters
        ----------
        E : array or Tensor, shape (n, D)
        dim : int, optional
            In [1, D], one of ``dims`` or between them; default D.

        Returns
        -------
        z : array or Tensor, shape (n, dim)
            What ``E`` was; arrays in float32. A row of zeros stays one.
        """
        width = self.in_features if dim is None else check_int("dim", dim, low=1, high=self.in_features)
        if isinstance(E, Tensor):
            return unit_prefix(self(E), width)
        rows = _rows("E", E, self.in_features)
        with torch.no_grad():
            parts = [unit_prefix(self(part.to(self.weight)), width).float().cpu() for part in rows.split(_ROWS)]
        return torch.cat(parts).numpy() if parts else np.zeros((0, width), np.float32)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder that ``quernel.load`` reads."""
        return save_model(self, path)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, JSON-able."""
        return {"in_features": self.in_features, "dims": list(self.dims), "kind": self.kind, "hidden": self.hidden}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained adapter from ``config()``."""
        return cls(**config)

    def extra_repr(self) -> str:
        """Show sizes."""
        return f"in_features={self.in_features}, dims={self.dims}, kind={self.kind!r}"


def fit_matryoshka_adapter(
    E: Any,
    pairs: Any = None,
    dims: Sequence[int] | None = None,
    kind: Kind = "linear",
    *,
    weights: Sequence[float] | None = None,
    preserve: float = 10.0,
    temperature: float = 0.05,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
) -> MatryoshkaAdapter:
    """Fit an adapter to frozen embeddings.

    Parameters
    ----------
    E : array or Tensor, shape (n, D)
        Embeddings; only their directions count.
    pairs : array, shape (p, 2), integer, optional
        Rows of ``E`` that belong together; the others of a batch are taken as not belonging. Default: similarities are
        preserved and nothing else.
    dims, kind
        As of ``MatryoshkaAdapter``.
    weights : sequence of float, optional
        Of each of ``dims`` in the sums; default 1.
    preserve : float, default=10.0
        Factor of the term that keeps similarities, whose squared errors are small numbers; 0 leaves it out.
    temperature : float, default=0.05
        Of the contrastive loss.
    epochs : int, default=20
        Passes over the pairs, or over the rows where there are none.
    batch_size : int, default=256
    lr : float, default=1e-3
        Of Adam at first; falls to zero on half a cosine.
    seed : int, default=0
        Order of the batches, what is held out, initial values.

    Returns
    -------
    adapter : MatryoshkaAdapter
        In eval mode: that of the epoch with the smallest loss on the tenth that is held out, the untrained principal
        axes included, so what is trained is never worse than they are there.

    Raises
    ------
    QuernelError
        If shapes do not fit, ``E`` is not finite, pairs name rows that are not there, or nothing is to be learned.
    """
    rows = _rows("E", E)
    d = rows.shape[1]
    if len(rows) < 2:
        raise QuernelError(f"E must have at least 2 rows; got {len(rows)}")
    joined = None if pairs is None else _pairs(pairs, len(rows))
    preserve = check_float("preserve", preserve, low=0.0)
    temperature = check_float("temperature", temperature, low=0.0, open_low=True)
    if joined is None and not preserve:
        raise QuernelError("preserve must be positive where there are no pairs; got 0: there is nothing to learn")
    epochs = check_int("epochs", epochs, low=0)
    batch_size = check_int("batch_size", batch_size, low=2)
    lr = check_float("lr", lr, low=0.0, open_low=True)
    generator = torch_generator(check_int("seed", seed, low=0))
    adapter = MatryoshkaAdapter(d, dims, kind, generator=generator)
    unit = unit_prefix(rows)
    with torch.no_grad():
        adapter.weight.copy_(principal_axes(unit))
    together = MatryoshkaLoss(_Contrastive(temperature), adapter.dims, weights)
    kept = MatryoshkaLoss(_kept_similarities, adapter.dims, weights)

    def loss(chosen: Tensor, some: Tensor) -> Tensor:
        total = torch.zeros(())
        if joined is not None:
            names = joined[chosen]
            total = total + together([adapter(unit[names[:, 0]]), adapter(unit[names[:, 1]])], names)
        if preserve:
            total = total + preserve * kept(adapter(unit[some]), unit[some])
        return total

    items = len(rows) if joined is None else len(joined)
    held_items, items_left = _split(items, generator)
    held_rows, rows_left = (held_items, items_left) if joined is None else _split(len(rows), generator)

    def step_batches() -> Any:
        order = items_left[torch.randperm(len(items_left), generator=generator)]
        for chosen in order.split(batch_size):
            if len(chosen) > 1:
                other = torch.randint(len(rows_left), (batch_size,), generator=generator)
                yield chosen, chosen if joined is None else rows_left[other]

    held = list(zip(_cycled(held_items, batch_size), _cycled(held_rows, batch_size), strict=False))
    _train(adapter, loss, step_batches, held, epochs, lr, -(-len(items_left) // batch_size))
    return adapter.eval()


def principal_axes(rows: Tensor) -> Tensor:
    """Return the principal axes of rows (n, D) about the origin, (D, D), the strongest first; an orthogonal matrix.

    About the origin and not the mean: moving the rows would change their cosines.
    """
    moments = rows.double().T @ rows.double()
    axes = torch.linalg.eigh(moments).eigenvectors.flip(1).T
    # Eigenvectors have no sign of their own: the largest entry is made positive.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return (axes * largest.sign()).float()


class _Contrastive:
    """Cross-entropy of finding b_i among all b, and a_i among all a, by cosines over a temperature."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, a: Tensor, b: Tensor, names: Tensor) -> Tensor:
        scores = a @ b.T / self.temperature
        # A row that is in a batch twice is not its own opposite.
        twins = (names[:, None] == names[None]).any(-1).fill_diagonal_(False)
        scores = scores.masked_fill(twins, -torch.inf)
        wanted = torch.arange(len(a))
        return (F.cross_entropy(scores, wanted) + F.cross_entropy(scores.T, wanted)) / 2


def _kept_similarities(prefix: Tensor, unit: Tensor) -> Tensor:
    n = len(prefix)
    # The diagonal is 1 on both sides.
    return (prefix @ prefix.T - unit @ unit.T).square().sum() / max(1, n * (n - 1))


def _train(
    adapter: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Callable[[], Any],
    held: Sequence[tuple[Tensor, Tensor]],
    epochs: int,
    lr: float,
    steps: int,
) -> None:
    """Train in place and leave the state of the epoch with the smallest mean loss on the held-out batches."""

    @torch.no_grad()
    def judged() -> float:
        return sum(float(loss(*batch)) for batch in held) / len(held)

    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * steps))
    best, state = judged(), copy.deepcopy(adapter.state_dict())
    for _ in range(epochs):
        for batch in batches():
            optimizer.zero_grad()
            loss(*batch).backward()
            optimizer.step()
            schedule.step()
        now = judged()
        if now < best:
            best, state = now, copy.deepcopy(adapter.state_dict())
    adapter.load_state_dict(state)


def _split(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a tenth of ``range(n)`` in random order, and the rest; both all of it where there are very few."""
    order = torch.randperm(n, generator=generator)
    held = max(2, round(_HELD_OUT * n))
    return (order[:held], order[held:]) if n - held >= 2 else (order, order)


def _cycled(rows: Tensor, size: int) -> list[Tensor]:
    """Return batches, a last one of a single row left out."""
    return [part for part in rows.split(size) if len(part) > 1]


def _rows(name: str, E: Any, d: int | None = None) -> Tensor:
    rows = torch.as_tensor(E.detach().cpu() if isinstance(E, Tensor) else np.asarray(E))
    if rows.ndim != 2 or not rows.shape[1] or (d is not None and rows.shape[1] != d) or rows.is_complex():
        raise QuernelError(f"{name} must be real of shape (n, {'D' if d is None else d}); got {tuple(rows.shape)}")
    rows = rows.float()
    check_finite(name, rows)
    return rows


def _pairs(pairs: Any, n: int) -> Tensor:
    found = torch.as_tensor(np.asarray(pairs))
    if found.ndim != 2 or found.shape[1] != 2 or len(found) < 2 or found.is_floating_point():
        raise QuernelError(f"pairs must be integers of shape (p, 2), p > 1; got {found.dtype} of {tuple(found.shape)}")
    if int(found.min()) < 0 or int(found.max()) >= n:
        raise QuernelError(f"pairs must name rows of E, 0 to {n - 1}; got {int(found.min())} to {int(found.max())}")
    return found.long()
