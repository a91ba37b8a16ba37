"""``HOCLoss``: fine-tune under the constraint that features stay close to an old model's (arXiv 2405.02581).

    L = lam CE(z W^T, y) + (1 - lam) L_c,   h = z / |z|, h^o frozen old features, h^n new ones, over a batch of N:

    L_c = 1/N sum_i [ -mu <h^o_i, h^n_i> + log sum_{j: y_j != y_i} exp(mu <h^o_i, h^n_j>) ].

Cross-entropy alone aligns class means with the fixed classifier; L_c aligns samples.  Cost: one N x N product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_float, check_probability, check_type


@register(
    "stationary-representations",
    pillar="train",
    contract="trainer",
    paper="2405.02581",
    status="stable",
    headline=False,
)
class HOCLoss(nn.Module):
    """Cross-entropy under a higher-order compatibility constraint.

    The positive of an old feature is the new feature of the same sample; negatives are new features of other classes.
    The positive and other samples of its class are not in the denominator.

    Parameters
    ----------
    mu : float, default=10.0
        Inverse temperature of the cosines, above 0.
    lam : float, default=0.1
        Share of the cross-entropy, in [0, 1]: 1 is cross-entropy alone.
    reference_mask : bool, default=False
        Whether to sum as the authors' code does: cosines of the same class are set to 0 and stay in the sum, each
        adding exp(0) = 1, the positive too.

    Notes
    -----
    A batch of one class has no negatives: the logarithm of an empty sum is left out and the attraction stays
    (``reference_mask`` gives log N instead).  The order of samples does not matter.

    References
    ----------
    Biondi et al., "Stationary Representations: Optimally Approximating Compatibility and Implications for Improved
    Model Replacements", arXiv 2405.02581, 2024.

    Examples
    --------
    >>> z, y = torch.eye(3)[:2], torch.tensor([0, 1])
    >>> round(float(HOCLoss(lam=0.0)(torch.zeros(2, 4), y, z, z)), 3)
    -10.0
    """

    def __init__(self, mu: float = 10.0, lam: float = 0.1, *, reference_mask: bool = False) -> None:
        super().__init__()
        self.mu = check_float("mu", mu, low=0.0, open_low=True)
        self.lam = check_probability("lam", lam)
        self.reference_mask = check_type("reference_mask", reference_mask, bool)

    def forward(self, logits: Tensor, y: Tensor, feat_new: Tensor, feat_old: Tensor) -> Tensor:
        """Return the loss of a batch.

        Parameters
        ----------
        logits : Tensor, shape (N, K)
            One a prototype, as ``SimplexHead`` gives them.
        y : Tensor, shape (N,), int64
            Prototype of each sample: ``head.targets(labels)``.
        feat_new, feat_old : Tensor, shape (N, d)
            Features of the model in training and of the old one; no gradient reaches the latter.

        Returns
        -------
        loss : Tensor, scalar
            At least float32.

        Raises
        ------
        QuernelError
            If shapes do not fit or the batch is empty.
        """
        if feat_new.ndim != 2 or feat_new.shape != feat_old.shape:
            raise QuernelError(
                f"feat_new and feat_old must have the same shape (N, d); got {tuple(feat_new.shape)} and "
                f"{tuple(feat_old.shape)}. All versions need the same n_prototypes"
            )
        if not len(feat_new) or y.shape != feat_new.shape[:1] or logits.shape[:-1] != y.shape:
            raise QuernelError(
                f"logits, y and features must be of the same N >= 1 samples; got shapes {tuple(logits.shape)}, "
                f"{tuple(y.shape)} and {tuple(feat_new.shape)}"
            )
        cross = F.cross_entropy(at_least_single(logits), y)
        return self.lam * cross + (1 - self.lam) * self.constraint(y, feat_new, feat_old)

    def constraint(self, y: Tensor, feat_new: Tensor, feat_old: Tensor) -> Tensor:
        """Return L_c alone."""
        old, new = (F.normalize(at_least_single(z), dim=1) for z in (feat_old.detach(), feat_new))
        cosines = self.mu * (old @ new.T)  # (N, N): rows old, columns new
        same = y[:, None] == y
        if self.reference_mask:
            spread = cosines.masked_fill(same, 0.0).logsumexp(1)
        else:
            alone = same.all(1)
            # A row of -inf has no gradient: rows without negatives get zeros here, and their sum is not used.
            open_row = cosines.masked_fill(same & ~alone[:, None], -torch.inf).masked_fill(alone[:, None], 0.0)
            spread = open_row.logsumexp(1).masked_fill(alone, 0.0)
        return (spread - cosines.diagonal()).mean()

    def extra_repr(self) -> str:
        """Show the weights."""
        return f"mu={self.mu}, lam={self.lam}, reference_mask={self.reference_mask}"


def at_least_single(x: Tensor) -> Tensor:
    """Return ``x``, in float32 where it is of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
