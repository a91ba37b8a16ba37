"""Fine-tune a low-rank model through its factors alone, and multiply the factors out afterwards.

WeLore (arXiv 2407.11239) trains only the matrices that turned out to be low-rank: the rest is frozen, so an
optimiser over the returned parameters holds state for the factors and nothing else, and no adapter is left over.
The paper uses AdamW with warm-up and cosine decay, 5e-5 on general text first, 1e-4 on the task.
"""

from __future__ import annotations

from torch import nn

from quernel._errors import QuernelError
from quernel.nn import StoredLinear, replace_module
from quernel.nn.linear.low_rank import linear_over
from quernel.nn.weights import LowRankWeight, StackedWeight


def low_rank_only(model: nn.Module, *, bias: bool = False) -> list[nn.Parameter]:
    """Freeze everything but the low-rank factors and return what is left to train.

    Parameters
    ----------
    model : nn.Module
        Holds factored layers, e.g. from ``compress(model, WeLore(...))``.  ``requires_grad`` is set on every
        parameter, in place.
    bias : bool, default=False
        Also train the biases of the factored layers.

    Returns
    -------
    parameters : list of nn.Parameter
        Give these, and only these, to the optimiser; shared factors once.

    Raises
    ------
    QuernelError
        If the model has no low-rank factors.

    References
    ----------
    Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
    arXiv 2407.11239, 2024.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import LowRankLinear
    >>> model = torch.nn.Sequential(LowRankLinear(8, 8, rank=2), torch.nn.Linear(8, 4))
    >>> optimizer = torch.optim.AdamW(low_rank_only(model), lr=1e-4)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.weight.a', '0.weight.b']
    """
    trainable = [p for m in model.modules() if isinstance(m, LowRankWeight) for p in (m.a, m.b)]
    if not trainable:
        raise QuernelError(
            f"model must hold low-rank factors; {type(model).__name__} has none. Compress it with WeLore first, at a "
            "target that factors at least one matrix"
        )
    if bias:
        factored = [m for m in model.modules() if isinstance(m, StoredLinear) and _is_factored(m)]
        trainable += [layer.bias for layer in factored if layer.bias is not None]
    trainable = list(dict.fromkeys(trainable))
    model.requires_grad_(False)
    # Gradients of before would be applied by the first step of an optimiser that holds every parameter.
    model.zero_grad(set_to_none=True)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return trainable


def merge_low_rank(model: nn.Module) -> list[str]:
    """Replace factored layers by plain ones with the multiplied-out weight, in place.

    The model computes the same and needs no Quernel any more; it is as large as before it was compressed.

    Returns
    -------
    names : list of str
        The layers replaced; empty if there was none.  Layers that shared factors share the weight.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import LowRankLinear
    >>> model = torch.nn.Sequential(LowRankLinear(8, 8, rank=2))
    >>> merge_low_rank(model), type(model[0]).__name__
    (['0'], 'Linear')
    """
    merged: dict[tuple[nn.Parameter, ...], nn.Parameter] = {}
    names = []
    for name, layer in list(model.named_modules()):
        if not name or not isinstance(layer, StoredLinear) or not _is_factored(layer):
            continue
        stored = tuple(layer.weight.parameters())
        if stored not in merged:
            trainable = any(p.requires_grad for p in stored)
            merged[stored] = nn.Parameter(layer.weight.dense().detach(), requires_grad=trainable)
        replace_module(model, name, linear_over(merged[stored], layer.bias))
        names.append(name)
    return names


def _is_factored(layer: StoredLinear) -> bool:
    weight = layer.weight
    parts = weight.blocks() if isinstance(weight, StackedWeight) else [weight]
    return any(isinstance(part, LowRankWeight) for part in parts)
