"""The loss that shares tokens out between experts of unequal speed (ShiftAddViT, arXiv 2306.06446).

    importance_i = a_i sum_x p_i(x),   load_i = a_i sum_x P(i is chosen for x),   a_i = latency_i / sum_j latency_j
    loss = SCV(importance) + SCV(load),   SCV(z) = var(z) / mean(z)^2

It is least where every expert is busy for the same time: a share of tokens inverse to its latency.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError

# Keeps the quotient finite where no token came.
EPS = 1e-10


def squared_variation(z: Tensor) -> Tensor:
    """Return ``var(z) / (mean(z)^2 + 1e-10)`` of a vector, with the unbiased variance; 0 for fewer than two entries.

    Examples
    --------
    >>> import torch
    >>> squared_variation(torch.tensor([1.0, 3.0]))
    tensor(0.5000)
    """
    if z.numel() < 2:
        return z.new_zeros(())
    return z.var() / (z.mean().square() + EPS)


def expert_balance_loss(clean: Tensor, noisy: Tensor, latencies: Tensor, noise: float) -> Tensor:
    """Return the balance loss of one routing.

    Parameters
    ----------
    clean : Tensor, shape (tokens, experts)
        Logits of the router.
    noisy : Tensor, shape (tokens, experts)
        The same with normal noise added: those that chose.
    latencies : Tensor, shape (experts,)
        Positive; only their ratios count.
    noise : float
        Standard deviation of the noise; without noise (0) the loss is that of the importance alone.

    Returns
    -------
    loss : Tensor, shape ()
        0 where all experts are busy for the same time.

    Raises
    ------
    QuernelError
        If shapes do not fit or there are fewer than two experts.

    Notes
    -----
    Importance takes the probabilities of all tokens, not only of the routed ones.  An expert is chosen if its noisy
    logit exceeds the largest noisy logit of the others; the gradient follows that threshold too.
    """
    if clean.ndim != 2 or clean.shape != noisy.shape or clean.shape[1] < 2 or latencies.shape != clean.shape[1:]:
        raise QuernelError(
            "clean and noisy must have one shape (tokens, experts) with two experts or more, latencies one entry an "
            f"expert; got {tuple(clean.shape)}, {tuple(noisy.shape)} and {tuple(latencies.shape)}"
        )
    wide = torch.float64 if clean.dtype == torch.float64 else torch.float32
    clean, noisy = clean.to(wide), noisy.to(wide)
    share = latencies.to(clean) / latencies.sum()
    loss = squared_variation(share * clean.softmax(1).sum(0))
    if noise <= 0:
        return loss
    largest, second = noisy.topk(2, dim=1).values.unbind(1)
    # The competitor of the winner is the second, that of all others the winner.
    threshold = torch.where(noisy == largest[:, None], second[:, None], largest[:, None])
    chosen = torch.special.ndtr((clean - threshold) / noise)
    return loss + squared_variation(share * chosen.sum(0))
