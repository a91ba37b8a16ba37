"""``FrankWolfePolicy``: improve a policy inside a set of allowed actions, one Frank-Wolfe step at a time (2111.15139).

    c(s) = argmax_{a in C} <a, grad_a Q(s, pi(s))>,   target(s) = pi(s) + alpha (c(s) - pi(s)),

and the policy is fitted to the targets by squared error. A target lies between two points of the hull of C, so no
action ever has to be projected. The argmax over a shared catalogue is an inner-product search; an index makes it
sub-linear in the number of actions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_finite, check_float
from quernel.kernels.frank_wolfe import check_lookup

# Products held at a time by the exact search, 16 MB.
_BLOCK = 2**22


@register(
    "lsh-frank-wolfe", pillar="train", contract="trainer", paper="2111.15139", status="experimental", headline=False
)
class FrankWolfePolicy:
    """Targets and losses for a policy over a finite catalogue of actions.

    Parameters
    ----------
    actions : Tensor or array, shape (n, d)
        The allowed actions, the same in every state; a policy's output should lie in their hull.
    lmo : {"exact"} or index, default="exact"
        "exact" compares all actions. An index is asked instead, e.g. ``quernel.search.MaxIPIndex(d)``; an empty one
        is copied and filled, another must hold the actions by row number.
    step : float, default=0.1
        The step alpha, in (0, 1].

    References
    ----------
    Lin et al., "Escaping from Zero Gradient: Revisiting Action-Constrained Reinforcement Learning via Frank-Wolfe
    Policy Optimization", arXiv 2102.11055, 2021.
    Xu, Song, Shrivastava, arXiv 2111.15139, 2021.

    Examples
    --------
    >>> corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> frank_wolfe = FrankWolfePolicy(corners, step=0.5)
    >>> frank_wolfe.target(torch.zeros(1, 2), torch.tensor([[3.0, -1.0]])).tolist()
    [[0.5, -0.5]]
    """

    def __init__(self, actions: Tensor | Any, *, lmo: Literal["exact"] | Any = "exact", step: float = 0.1) -> None:
        held = torch.as_tensor(actions)
        if held.ndim != 2 or not len(held) or not held.is_floating_point():
            raise QuernelError(
                f"actions must be floating point of shape (n, d), n > 0; got {held.dtype} of shape {tuple(held.shape)}"
            )
        check_finite("actions", held)
        check_lookup("lmo", lmo)
        self.actions = held
        self.step = check_float("step", step, low=0.0, high=1.0, open_low=True)
        self.index = None if isinstance(lmo, str) else self._filled(lmo)

    def best(self, gradient: Tensor) -> Tensor:
        """Return the number of the best action for each gradient (B, d), int64 (B,)."""
        if gradient.ndim != 2 or gradient.shape[1] != self.actions.shape[1]:
            raise QuernelError(f"gradient must have shape (B, {self.actions.shape[1]}); got {tuple(gradient.shape)}")
        check_finite("gradient", gradient)
        if self.index is not None:
            ids = self.index.search(gradient.detach().cpu().numpy().astype(np.float32), 1)[1][:, 0]
            # A query that meets no bucket at all is answered exactly.
            found = torch.from_numpy(np.array(ids)).to(gradient.device)
            lost = found < 0
            if bool(lost.any()):
                found[lost] = self._exact(gradient[lost])
            return found
        return self._exact(gradient)

    def target(self, action: Tensor, gradient: Tensor) -> Tensor:
        """Return what the policy should answer instead of ``action`` (B, d), given the gradient of Q by it (B, d)."""
        goal = self.actions[self.best(gradient).to(self.actions.device)].to(action)
        return action.detach() + self.step * (goal - action.detach())

    def loss(
        self, policy: Callable[[Tensor], Tensor], critic: Callable[[Tensor, Tensor], Tensor], states: Tensor
    ) -> Tensor:
        """Return the squared error of the policy to its targets in these states, a scalar with a gradient.

        Parameters
        ----------
        policy : callable
            States (B, ...) to actions (B, d).
        critic : callable
            States and actions to values (B,) or (B, 1).
        states : Tensor, shape (B, ...)
        """
        action = policy(states)
        probe = action.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(critic(states, probe).sum(), probe)
        return F.mse_loss(action, self.target(action, gradient))

    def _exact(self, gradient: Tensor) -> Tensor:
        actions = self.actions.to(gradient)
        rows = max(1, _BLOCK // len(actions))
        return torch.cat([(part @ actions.mT).argmax(1) for part in gradient.detach().split(rows)])

    def _filled(self, index: Any) -> Any:
        if len(index) == len(self.actions):
            return index
        if len(index):
            raise QuernelError(f"lmo holds {len(index)} items, but there are {len(self.actions)} actions")
        return copy.deepcopy(index).add(self.actions.detach().cpu().numpy())
