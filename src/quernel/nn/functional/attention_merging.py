"""``merge_attentions``: attention over several sets of keys from the attention over each (arXiv 2403.04690).

With outputs o and logarithms l of the sums of exponentials, of disjoint sets of keys,

    l = log(exp(l1) + exp(l2)),   o = o1 - sigmoid(l2 - l1) (o1 - o2),

and more sets one after another.  Cost O(N D) a set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quernel._errors import QuernelError

NOTHING = float("-inf")


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the attention over the union of disjoint sets of keys.

    Parameters
    ----------
    outputs : sequence of Tensor, shape (..., D)
        Of the same queries, one a set.
    lses : sequence of Tensor, shape (...)
        log sum_j exp(scale * q . k_j) of each; minus infinity where a query sees no key of a set, and the output
        there may hold anything.

    Returns
    -------
    out : Tensor, shape (..., D)
        In the dtype of the first output; zero where a query sees no key at all.
    lse : Tensor, shape (...)
        In at least float32.

    Raises
    ------
    QuernelError
        If the shapes do not fit.

    Notes
    -----
    Half precision is merged in float32.  Gradients flow through outputs and logarithms, and stay finite where either
    is minus infinity.

    Examples
    --------
    >>> merge_attentions([torch.ones(1, 2), torch.zeros(1, 2)], [torch.zeros(1), torch.zeros(1)])[0]
    tensor([[0.5000, 0.5000]])
    """
    if not outputs or len(outputs) != len(lses):
        raise QuernelError(
            f"outputs and lses must hold one tensor a set of keys, at least one; got {len(outputs)} and {len(lses)}"
        )
    shape = outputs[0].shape
    for o, each in zip(outputs, lses, strict=True):
        if o.shape != shape or each.shape != shape[:-1]:
            raise QuernelError(
                f"every output must have the shape of the first, {tuple(shape)}, and every lse that without its last "
                f"axis; got {tuple(o.shape)} and {tuple(each.shape)}"
            )
    out, lse = _wide(outputs[0]), _wide(lses[0])
    out = out.masked_fill(torch.isneginf(lse)[..., None], 0.0)
    for o, each in zip(outputs[1:], lses[1:], strict=True):
        out, lse = _merged(out, lse, _wide(o), _wide(each))
    return out.to(outputs[0].dtype), lse


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _merged(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.isneginf(l1), torch.isneginf(l2)
    none = first & second
    o2 = o2.masked_fill(second[..., None], 0.0)
    # Two infinities have no difference; zeros in their place keep values and gradients finite until both are filled.
    l1, l2 = l1.masked_fill(none, 0.0), l2.masked_fill(none, 0.0)
    share = torch.sigmoid(l2 - l1)[..., None]
    # Of logaddexp and not l1 + softplus(l2 - l1), which is not a number where l1 is minus infinity.
    return o1 - share * (o1 - o2), torch.logaddexp(l1, l2).masked_fill(none, NOTHING)
