"""``MatryoshkaHead``: a linear classifier on every prefix of a representation (arXiv 2205.13147, MRL and MRL-E).

    logits_m = W^(m) z_{1:m} + b^(m),   m in dims

MRL: a weight and a bias for each m, sum(dims) * n_classes numbers. MRL-E (``efficient=True``): W^(m) is the first m
columns of one weight, with one bias: the memory of a single classifier, slightly worse at the smallest m.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_increasing, check_int, check_type
from quernel.nn.functional.prefixes import nested_dims


def _example() -> dict[str, Any]:
    return {
        "make": lambda: MatryoshkaHead(12, 5, (2, 4, 12), generator=torch.Generator().manual_seed(0)),
        "input": lambda generator: (torch.randn(4, 12, generator=generator),),
    }


@register(
    "matryoshka", pillar="nn", contract="module", paper="2205.13147", status="stable", headline=False, example=_example
)
class MatryoshkaHead(nn.Module):
    """Linear classifiers on nested prefixes of one representation.

    Parameters
    ----------
    in_features : int
        Length d of the representation.
    n_classes : int
        Outputs L.
    dims : sequence of int, optional
        Prefix lengths, increasing, the last one d; default 8, 16, 32, ... and d.
    efficient : bool, default=False
        Share one weight and one bias among all prefixes (MRL-E).
    bias : bool, default=True
    dim : int, optional
        Length that an eval forward uses, one of ``dims``; default the longest. The attribute may be set later.
    device, dtype : optional
        As in ``torch.nn.Linear``.
    generator : torch.Generator, optional
        For the initial values; default is torch's own.

    Raises
    ------
    QuernelError
        If a size is out of range, ``dims`` do not increase up to d, or ``dim`` is not one of them.

    Notes
    -----
    Initial values are those of ``torch.nn.Linear`` with m inputs. Put no norm between the representation and the head:
    its statistics would depend on m. For a tied output matrix (masked language models) take ``efficient=True`` and
    assign the embedding's parameter to ``head.weights[0]``.

    References
    ----------
    Kusupati et al., "Matryoshka Representation Learning", arXiv 2205.13147, 2022, eq. (1).

    Examples
    --------
    >>> import torch
    >>> head = MatryoshkaHead(16, 10, dims=(4, 16))
    >>> {m: tuple(y.shape) for m, y in head(torch.ones(2, 16)).items()}
    {4: (2, 10), 16: (2, 10)}
    >>> head.eval()(torch.ones(2, 16), dim=4).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        dims: Sequence[int] | None = None,
        efficient: bool = False,
        bias: bool = True,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_int("in_features", in_features, low=1)
        self.n_classes = check_int("n_classes", n_classes, low=1)
        self.dims = (
            nested_dims(in_features) if dims is None else check_increasing("dims", dims, low=1, high=in_features)
        )
        if self.dims[-1] != in_features:
            raise QuernelError(f"dims must end with in_features={in_features}, the whole; got {self.dims}")
        self.efficient = check_type("efficient", efficient, bool)
        check_type("bias", bias, bool)
        widths = self.dims[-1:] if efficient else self.dims
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weights = nn.ParameterList(torch.empty(n_classes, width, **factory) for width in widths)
        self.biases = nn.ParameterList(torch.empty(n_classes, **factory) for _ in widths) if bias else None
        self.dim = self.dims[-1] if dim is None else dim
        self.reset_parameters(generator)

    @property
    def dim(self) -> int:
        """Prefix length of an eval forward."""
        return self._dim

    @dim.setter
    def dim(self, value: int) -> None:
        self._dim = self.dims[self._place(value)]

    def forward(self, z: Tensor, dim: int | None = None) -> Tensor | dict[int, Tensor]:
        """Return the logits of every prefix in training, of one in eval mode or where ``dim`` is given.

        Parameters
        ----------
        z : Tensor, shape (..., in_features)
        dim : int, optional
            One of ``dims``.

        Returns
        -------
        logits : Tensor, shape (..., n_classes), or dict
            Training without ``dim``: a dict from each of ``dims``, in order, to its logits.
        """
        if z.shape[-1] != self.in_features:
            raise QuernelError(f"z must have shape (..., {self.in_features}); got {tuple(z.shape)}")
        if dim is not None:
            return self._logits(z, self._place(dim))
        if self.training:
            return {m: self._logits(z, place) for place, m in enumerate(self.dims)}
        return self._logits(z, self._place(self._dim))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values."""
        with torch.no_grad():
            for place, weight in enumerate(self.weights):
                bound = weight.shape[1] ** -0.5
                weight.uniform_(-bound, bound, generator=generator)
                if self.biases is not None:
                    self.biases[place].uniform_(-bound, bound, generator=generator)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, JSON-able."""
        return {
            "in_features": self.in_features,
            "n_classes": self.n_classes,
            "dims": list(self.dims),
            "efficient": self.efficient,
            "bias": self.biases is not None,
            "dim": self._dim,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained head from ``config()``."""
        return cls(**config)

    def extra_repr(self) -> str:
        """Show sizes and prefix lengths."""
        kind = ", efficient=True" if self.efficient else ""
        return f"in_features={self.in_features}, n_classes={self.n_classes}, dims={self.dims}{kind}"

    def _place(self, dim: int) -> int:
        if dim not in self.dims:
            raise QuernelError(f"dim must be one of dims={self.dims}, for which there is a classifier; got {dim!r}")
        return self.dims.index(dim)

    def _logits(self, z: Tensor, place: int) -> Tensor:
        width, which = self.dims[place], 0 if self.efficient else place
        weight = self.weights[which][:, :width]
        bias = None if self.biases is None else self.biases[which]
        if torch.is_autocast_enabled(z.device.type):
            return F.linear(z[..., :width], weight, bias)
        return F.linear(z[..., :width].to(weight.dtype), weight, bias).to(z.dtype)
