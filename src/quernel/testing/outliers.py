"""``inject_outliers``: give a small model the outlier channels of a large one, without changing what it computes.

Some gains of every norm are multiplied, the columns of the layers that alone read the norm are divided.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from quernel._errors import QuernelError
from quernel._validate import check_float, check_int
from quernel.compress import Context
from quernel.compress._context import tied_elsewhere
from quernel.compress.quant._adjacent import scalable_producers


def inject_outliers(
    model: nn.Module, data: Iterable[Any], *, channels: int = 4, factor: float = 30.0, seed: int = 0
) -> nn.Module:
    """Return a copy of ``model`` with outlier channels behind every norm that linear layers alone read.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    data : re-iterable of batches
        As ``compress`` takes it; the first batch shows and proves who reads which norm.
    channels : int, default=4
        Outlier channels a norm, drawn with the seed.
    factor : float, default=30.0
        How much larger they become.
    seed : int, default=0

    Returns
    -------
    outlier : nn.Module
        Computes what ``model`` computes, up to rounding.

    Raises
    ------
    QuernelError
        If there is no such norm, or it has fewer channels.

    Examples
    --------
    >>> import torch
    >>> model, x = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)), torch.randn(8, 16)
    >>> outlier = inject_outliers(model, [x])
    >>> torch.allclose(outlier(x), model(x), atol=1e-5), bool(outlier[0](x).abs().max() > 10 * model[0](x).abs().max())
    (True, True)
    """
    check_int("channels", channels, low=1)
    check_float("factor", factor, low=0.0, open_low=True)
    generator = torch.Generator().manual_seed(seed)
    work = copy.deepcopy(model)
    known = dict(work.named_modules())
    linears = [n for n, m in known.items() if type(m) is nn.Linear and tied_elsewhere(work, m.weight, [m]) is None]
    readers = scalable_producers(work, Context(data), linears)
    norms = [name for name in readers if known[name].get_parameter("weight").ndim == 1]
    if not norms:
        raise QuernelError("model has no norm whose output linear layers alone read, so no place for outliers")
    with torch.no_grad():
        for name in norms:
            gains = known[name].get_parameter("weight")
            if channels > len(gains):
                raise QuernelError(f"channels must be at most the {len(gains)} of {name!r}; got {channels}")
            chosen = torch.randperm(len(gains), generator=generator)[:channels].to(gains.device)
            for parameter in known[name].parameters(recurse=False):
                parameter[chosen] *= factor
            for reader in readers[name]:
                known[reader].get_parameter("weight")[:, chosen] /= factor
    return work
