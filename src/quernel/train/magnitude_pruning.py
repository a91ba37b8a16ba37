"""Gradual magnitude pruning: train a network to few weights by taking the smallest away step by step (1710.01878).

s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3  at  t = t0, t0 + dt, ..., t0 + n dt.  At each of these steps the
smallest |w| of every layer are masked; masked weights are set back to zero after each step of the optimiser.  The
1x1 layers of fast sparse networks (arXiv 1911.09723) are trained this way.  Cost: one sort a layer every dt steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int, check_probability, check_type
from quernel.nn.functional.magnitude import BLOCKS, magnitude_mask


@register(
    "fast-sparse-convnets",
    pillar="train",
    contract="trainer",
    paper="1911.09723",
    status="stable",
    headline=False,
)
class GradualMagnitudePruner:
    """Bring weights to a share of zeros while they are trained.

    Call ``step(optimizer)`` where the training loop calls ``optimizer.step()``.  Every weight tensor gets the same
    sparsity; depthwise and first convolutions, biases and norms should stay out (``for_pointwise`` leaves them out).

    Parameters
    ----------
    params : iterable of nn.Parameter
        Weights of shape (out, in, ...).
    total_steps : int
        Steps of the optimiser in the whole training.
    initial, final : float, default=0.0 and 0.9
        Sparsity at the first and from the last pruning step on, 0 <= initial <= final < 1.
    start, end : float, default=0.2 and 0.8
        Where the ramp begins and ends, as shares of ``total_steps``.  What comes after trains what is left.
    every : int, default=100
        Steps from one pruning to the next.
    block : {1, 2, 4}, default=1
        Consecutive output rows that are kept or removed together, ranked by their mean magnitude.

    Attributes
    ----------
    masks : tuple of Tensor, bool
        True where a weight lives, in the order of ``params``.
    steps : int
        Steps taken so far.

    Raises
    ------
    QuernelError
        If an argument is out of range, a parameter is no matrix of weights, or no pruning step fits the ramp.

    Notes
    -----
    A weight that is masked stays masked.  The schedule is that of Zhu & Gupta, which the sparse networks of Elsen et
    al. are trained with; their own lengths and intervals are not known here.

    References
    ----------
    Zhu & Gupta, "To prune, or not to prune", arXiv 1710.01878, 2017, eq. (1).
    Elsen et al., "Fast Sparse ConvNets", arXiv 1911.09723, 2019.

    Examples
    --------
    >>> import torch
    >>> w = torch.nn.Parameter(torch.randn(8, 8))
    >>> pruner, sgd = GradualMagnitudePruner([w], total_steps=10, final=0.5, every=1), torch.optim.SGD([w], lr=0.1)
    >>> for _ in range(10): pruner.step(sgd)
    >>> pruner.sparsity(), int((w == 0).sum())
    (0.5, 32)
    """

    masks: tuple[Tensor, ...]

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        total_steps: int,
        *,
        initial: float = 0.0,
        final: float = 0.9,
        start: float = 0.2,
        end: float = 0.8,
        every: int = 100,
        block: int = 1,
    ) -> None:
        self.params = tuple(params)
        if not self.params or len({id(p) for p in self.params}) < len(self.params):
            raise QuernelError(f"params must be different weight tensors, at least one; got {len(self.params)}")
        for p in self.params:
            check_type("params", p, Tensor)
            if p.ndim < 2 or not p.is_floating_point():
                raise QuernelError(
                    f"params must hold floating weights of shape (out, in, ...); got {p.dtype} of {tuple(p.shape)}. "
                    "Leave biases and norms out"
                )
        self.final = check_float("final", final, low=0.0, high=1.0, open_high=True)
        self.initial = check_float("initial", initial, low=0.0, high=self.final)
        self.block = check_choice("block", block, BLOCKS)
        self.every = check_int("every", every, low=1)
        total = check_int("total_steps", total_steps, low=1)
        self.begin = round(check_probability("start", start) * total)
        ramp = round(check_float("end", end, low=start, high=1.0) * total) - self.begin
        self.prunings = ramp // self.every
        if self.prunings < 1:
            raise QuernelError(
                f"every={every} must fit into the ramp, {ramp} of the {total} steps from start={start} to end={end}. "
                "Prune more often, or train longer"
            )
        self.steps, self._reached = 0, 0.0
        self.masks = tuple(torch.ones_like(p, dtype=torch.bool) for p in self.params)

    @classmethod
    def for_pointwise(cls, model: nn.Module, total_steps: int, **options: Any) -> Self:
        """Prune the weights of all 1x1 convolutions without groups; ``options`` as of the class.

        Raises
        ------
        QuernelError
            If the model has none, or an option is out of range.
        """
        layers = (m for m in model.modules() if isinstance(m, nn.Conv2d))
        weights: list[Any] = [m.weight for m in layers if tuple(m.kernel_size) == (1, 1) and m.groups == 1]
        if not weights:
            raise QuernelError(
                f"model must have 1x1 convolutions; {type(model).__name__} has none. Name params yourself"
            )
        return cls(dict.fromkeys(weights), total_steps, **options)

    def target(self, step: int) -> float:
        """Return the sparsity that holds after so many steps."""
        if step < self.begin:
            return 0.0
        done = min(self.prunings, (step - self.begin) // self.every) / self.prunings
        return self.final + (self.initial - self.final) * (1 - done) ** 3

    def sparsity(self) -> float:
        """Return the share of weights that are masked."""
        kept = sum(int(mask.sum()) for mask in self.masks)
        return 1 - kept / max(1, sum(mask.numel() for mask in self.masks))

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Let the optimiser take a step, then ``update``; return what the optimiser returns."""
        loss = optimizer.step() if closure is None else optimizer.step(closure)
        self.update()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        """Count a step that the optimiser has taken, set masked weights to zero, mask more if it is time."""
        self.steps += 1
        now = self.target(self.steps)
        # First of all the old masks: gradients and momentum have moved what they cover.
        self._apply()
        if now > self._reached:
            self.masks = tuple(magnitude_mask(p, now, block=self.block) & m for p, m in self._pairs())
            self._reached = now
            self._apply()

    def _pairs(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        return zip(self.params, self.masks, strict=True)

    def _apply(self) -> None:
        if self._reached > 0:
            for p, mask in self._pairs():
                p.masked_fill_(~mask, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming a training needs: steps and masks."""
        return {"steps": self.steps, "masks": list(self.masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over steps and masks from ``state_dict``.

        Raises
        ------
        QuernelError
            If the masks do not fit the parameters.
        """
        masks = tuple(state["masks"])
        if [tuple(m.shape) for m in masks] != [tuple(p.shape) for p in self.params]:
            raise QuernelError(
                f"state must hold masks of shapes {[tuple(p.shape) for p in self.params]}; "
                f"got {[tuple(m.shape) for m in masks]}. Build the pruner over the same layers"
            )
        self.steps = check_int("steps", state["steps"], low=0)
        self._reached = self.target(self.steps) if self.steps else 0.0
        self.masks = tuple(m.to(p.device, torch.bool).clone() for m, p in zip(masks, self.params, strict=True))
