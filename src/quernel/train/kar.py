"""``Kar2`` and ``Kar3``: updates by signs of the gradient and of its running means (arXiv 2401.17948).

    p <- p - lr (sign(g) + sign(m1) + sign(m2)),   then   m_i <- beta_i m_i + (1 - beta_i) g

with one mean (``Kar2``) or two (``Kar3``), each as it was before it takes in g, and no weight decay.  Every weight
moves by lr on the first step and by up to 2 or 3 lr later: rates are some ten times smaller than Adam's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class _Kar(torch.optim.Optimizer):
    """Signs of the gradient and of as many means as there are betas."""

    def __init__(self, params: Params, lr: float, betas: tuple[float, ...]) -> None:
        check_float("lr", lr, low=0.0)
        for beta in betas:
            check_float("betas", beta, low=0.0, high=1.0, open_high=True)
        super().__init__(params, {"lr": lr, "betas": tuple(betas)})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["lr"], group["betas"])
        return loss

    def _update(self, p: Tensor, lr: float, betas: tuple[float, ...]) -> None:
        state, grad = self.state[p], p.grad
        if grad is None or grad.is_sparse:
            raise QuernelError(
                f"{type(self).__name__} needs dense gradients; got a sparse one of shape {tuple(p.shape)}"
            )
        move = grad.sign()
        for i, beta in enumerate(betas):
            mean = state.setdefault(f"mean{i}", torch.zeros_like(p, memory_format=torch.preserve_format))
            move = move + mean.sign()
            mean.lerp_(grad, 1 - beta)
        p.sub_(move, alpha=lr)


class Kar3(_Kar):
    """Signs of the gradient and of a fast and a slow mean.

    Parameters
    ----------
    params : iterable of Tensor or of dict
    lr : float, default=0.001215
    betas : (float, float), default=(0.5, 0.95)
        In [0, 1).

    References
    ----------
    H. Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948, 2024.

    Examples
    --------
    >>> p = torch.nn.Parameter(torch.zeros(2))
    >>> p.grad = torch.tensor([3.0, -0.1])
    >>> Kar3([p], lr=0.5).step()
    >>> p.data
    tensor([-0.5000,  0.5000])
    """

    def __init__(self, params: Params, lr: float = 0.001215, betas: tuple[float, float] = (0.5, 0.95)) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise QuernelError(f"betas must be two numbers; got {betas!r}")
        super().__init__(params, lr, tuple(betas))


class Kar2(_Kar):
    """Signs of the gradient and of one mean.

    Parameters
    ----------
    params : iterable of Tensor or of dict
    lr : float, default=0.001215
    beta : float, default=0.95
        In [0, 1).

    References
    ----------
    H. Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv 2401.17948, 2024.
    """

    def __init__(self, params: Params, lr: float = 0.001215, beta: float = 0.95) -> None:
        super().__init__(params, lr, (beta,))
