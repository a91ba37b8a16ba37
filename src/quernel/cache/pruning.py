"""Which entries of keys and values a cache drops: Mustafar's rule and those that it is compared with.

``prune_per_token`` is the rule of ``MustafarCache`` (arXiv 2505.22913).  The others are for study, in plain torch: they
return dense tensors with zeros and save no memory, since their rows keep different numbers of channels, or whole
channels go (ThinK, arXiv 2407.21018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int


def kept_channels(dim: int, sparsity: float, name: str = "sparsity") -> int:
    """Return ``dim - floor(sparsity * dim)``, how many channels of a row are kept.

    Raises
    ------
    QuernelError
        If ``sparsity`` is outside [0, 1) or leaves no channel.
    """
    check_int("dim", dim, low=1)
    check_float(name, sparsity, low=0.0, high=1.0, open_high=True)
    # 0.29 * 100 is 28.999999999999996; no rounding otherwise.
    kept = dim - int(sparsity * dim + 1e-9)
    if kept < 1:
        raise QuernelError(f"{name} of {sparsity} leaves none of {dim} channels; lower it")
    return kept


def prune_per_token(x: Tensor, sparsity: float) -> Tensor:
    """Return ``x`` with zeros for the entries of each row that are smallest in magnitude.

    Of all tensors with as many non-zero entries a row this one is nearest to ``x``.

    Parameters
    ----------
    x : Tensor, shape (..., d)
    sparsity : float
        Share of each row that goes, in [0, 1): exactly ``d - floor(sparsity * d)`` entries stay, of equal ones the
        first.

    Returns
    -------
    Tensor, shape (..., d)

    Raises
    ------
    QuernelError
        If ``sparsity`` is outside [0, 1) or leaves no entry, or ``x`` is no float tensor.

    References
    ----------
    D. Joo et al., "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
    arXiv 2505.22913, 2025.

    Examples
    --------
    >>> import torch
    >>> from quernel.cache import prune_per_token
    >>> prune_per_token(torch.tensor([[1.0, -3.0, 0.5, 2.0]]), 0.5)
    tensor([[ 0., -3.,  0.,  2.]])
    """
    _check(x)
    return _kept(x, x.abs(), kept_channels(x.shape[-1], sparsity))


def prune_by_output(keys: Tensor, queries: Tensor, sparsity: float) -> Tensor:
    """Return keys pruned per token by ``|K|`` times the summed ``|Q|`` of some queries, channel by channel.

    keys: (..., T, d)  queries: (..., n, d), as the paper takes them the last 32, of all heads that share the keys
    """
    _check(keys)
    scores = keys.abs() * queries.abs().sum(-2, keepdim=True)
    return _kept(keys, scores, kept_channels(keys.shape[-1], sparsity))


def prune_per_channel(x: Tensor, sparsity: float, group: int = 32) -> Tensor:
    """Return ``x``, (..., T, d), pruned by magnitude in each channel over groups of ``group`` tokens."""
    _check(x)
    check_int("group", group, low=1)
    parts = []
    for part in x.split(group, dim=-2):
        turned = part.mT
        parts.append(_kept(turned, turned.abs(), kept_channels(turned.shape[-1], sparsity)).mT)
    return torch.cat(parts, dim=-2)


def prune_channels(keys: Tensor, queries: Tensor, sparsity: float) -> Tensor:
    """Return keys without the channels that add least to the logits, the same of all tokens, as ThinK does.

    A channel c weighs ``|q_c| |k_c|``, the norms over tokens.  keys: (..., T, d)  queries: (..., n, d)
    """
    _check(keys)
    scores = queries.norm(dim=-2, keepdim=True) * keys.norm(dim=-2, keepdim=True)
    return _kept(keys, scores.expand_as(keys), kept_channels(keys.shape[-1], sparsity))


def _kept(x: Tensor, scores: Tensor, n: int) -> Tensor:
    # A stable sort leaves the first of equal ones in front; topk promises no order.
    places = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(x).scatter_(-1, places, x.gather(-1, places))


def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise QuernelError(f"what is pruned must be a float tensor; got {x.dtype}")
