"""``MetaBlock``: a token mixer with the norms, the perceptron and the residuals of three families of networks.

    metaformer   x = x + g1 Mixer(LN(x));  x = x + g2 MLP(LN(x))
    metanext     x = x + g MLP(BN(Mixer(x)))
    lsnet        x = Mixer(x);  x = x + MLP(x)

MLP is Linear C -> rC, activation, Linear rC -> C; g are learned scales a channel, residual branches may be dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._module_tree import changed_modules, signature, swap_modules
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.nn._described import check_config, layer_config, layer_from_config
from quernel.nn._mixer import Mixer, one_token, widened
from quernel.nn._param_groups import inner_groups
from quernel.nn.drop_path import DropPath

STYLES = ("metaformer", "metanext", "lsnet")


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        from quernel.nn.attention.softmax import SoftmaxAttention

        return MetaBlock(SoftmaxAttention(8, 2), ls_init=0.5)

    return {
        "make": make,
        "input": lambda generator: (torch.randn(2, 3, 5, 8, generator=generator),),
        "feature_axis": -1,
    }


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm of the channels of (B, *S, C), over samples and tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised tokens."""
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


@register(
    "softmax-attention", pillar="nn", contract="module", paper=None, status="stable", headline=False, example=_example
)
class MetaBlock(nn.Module):
    """A block of a network around any token mixer, (B, *S, C) in and out.

    Parameters
    ----------
    mixer : Mixer
    style : {"metaformer", "metanext", "lsnet"}, default="metaformer"
        Where norms and residuals stand.  "lsnet" leaves the residual of the mixing to the mixer.
    mlp_ratio : float, default=4.0
        Hidden width of the perceptron over C.
    drop_path : float, default=0.0
        Probability of leaving out a residual branch of a sample while training.
    ls_init : float, optional
        Initial value of the scales g; None leaves them out.
    eps : float, default=1e-5
        Of the norms, > 0.

    References
    ----------
    Yu et al., "MetaFormer Is Actually What You Need for Vision", arXiv 2111.11418, 2022; MetaNeXt: arXiv 2303.16900;
    LSNet: arXiv 2503.23135.

    Examples
    --------
    >>> import torch
    >>> from quernel.nn import make_mixer
    >>> block = MetaBlock(make_mixer("softmax-attention", 16, num_heads=2), mlp_ratio=2)
    >>> block(torch.randn(2, 7, 7, 16)).shape
    torch.Size([2, 7, 7, 16])
    """

    def __init__(
        self,
        mixer: Mixer,
        style: Literal["metaformer", "metanext", "lsnet"] = "metaformer",
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        ls_init: float | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.mixer = check_type("mixer", mixer, Mixer)
        self.style = check_choice("style", style, STYLES)
        self.mlp_ratio = check_float("mlp_ratio", mlp_ratio, low=0.0, open_low=True)
        self.drop = DropPath(check_float("drop_path", drop_path, low=0.0, high=1.0, open_high=True))
        self.ls_init = None if ls_init is None else check_float("ls_init", ls_init)
        self.eps = check_float("eps", eps, low=0.0, open_low=True)
        dim = mixer.dim
        hidden = check_int("mlp_ratio * dim", round(self.mlp_ratio * dim), low=1)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        norms = {"metaformer": (nn.LayerNorm, nn.LayerNorm), "metanext": (TokenBatchNorm,), "lsnet": ()}[style]
        self.norms = nn.ModuleList(norm(dim, eps=self.eps) for norm in norms)
        scales = 0 if ls_init is None else max(len(norms), 1)
        self.scales = nn.ParameterList(torch.full((dim,), float(ls_init or 0.0)) for _ in range(scales))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, state: Any = None) -> Any:
        """Mix the tokens, then the channels; ``mask`` and ``state`` as in the mixer.

        Returns
        -------
        y : Tensor, shape (B, *S, C), or (y, state) if a state was given
        """
        self.mixer._check(x)
        if state is None:
            return self._mixed(widened(x, self), lambda t: (self.mixer(t, mask=mask), None))[0].to(x.dtype)
        self._check_stream()
        y, state = self._mixed(widened(x, self), lambda t: self.mixer(t, mask=mask, state=state))
        return y.to(x.dtype), state

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> Any:
        """Return the state before the first token of ``batch`` streams, the mixer's; ``options`` as there."""
        self._check_stream()
        return self.mixer.init_state(batch, device=device, dtype=dtype, **options)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return the output of one more token and the state after it, if the mixer has a recurrent form.

        Parameters
        ----------
        x : Tensor, shape (B, C)
        state
            From ``init_state`` or the step before.

        Raises
        ------
        QuernelError
            If the mixer has none, or training makes a token's output depend on others: ``eval()`` first.
        """
        y, state = self(one_token(x, state), state=state)
        return y[:, 0], state

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return groups for an optimiser: what the mixer asks for, and the rest at ``lr``."""
        return inner_groups(list(self.children()), self, lr)

    def _mixed(self, x: Tensor, mixer: Callable[[Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        y, state = mixer(self.norms[0](x) if self.style == "metaformer" else x)
        if self.style == "metanext":
            return x + self._branch(self.mlp(self.norms[0](y)), 0), state
        if self.style == "lsnet":
            return y + self._branch(self.mlp(y), 0), state
        x = x + self._branch(y, 0)
        return x + self._branch(self.mlp(self.norms[1](x)), 1), state

    def _check_stream(self) -> None:
        """Raise unless a token's output depends on no other but by the mixer."""
        if not self.training:
            return
        for part in (*self.norms, self.drop):
            if isinstance(part, nn.BatchNorm1d):
                raise QuernelError(
                    f"a block of style {self.style!r} takes no state in training mode: its batch norm then looks at "
                    "all tokens of a batch. Call eval() first"
                )
            if part is self.drop and self.drop.p > 0:
                raise QuernelError(
                    "a block with drop_path takes no state in training mode: a branch would be dropped for some tokens "
                    "of a sample only. Call eval() first"
                )

    def _branch(self, x: Tensor, index: int) -> Tensor:
        y: Tensor = self.drop(x * self.scales[index] if len(self.scales) else x)
        return y

    def fuse(self) -> Self:
        """Return a copy for inference around the fused mixer, or the block itself if its mixer has nothing to fuse.

        The norms of the block stay.
        """
        mixer = self.mixer.fuse()
        # The copy takes the fused mixer where it would copy the other.
        return self if mixer is self.mixer else copy.deepcopy(self, {id(self.mixer): mixer})

    def config(self) -> dict[str, Any]:
        """Return the options, the mixer, and every inner layer that is not what the constructor made."""
        options = {
            "style": self.style,
            "mlp_ratio": self.mlp_ratio,
            "drop_path": self.drop.p,
            "ls_init": self.ls_init,
            "eps": self.eps,
        }
        mixer = layer_config(self.mixer)
        with torch.device("meta"):
            made = signature(type(self)(layer_from_config(mixer), **options))  # type: ignore[arg-type]
        replaced = {name: layer for name, layer in changed_modules(self, made).items() if name != "mixer"}
        return {"mixer": mixer, **options, "replaced": replaced}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained block from ``config()``."""
        fields = "style", "mlp_ratio", "drop_path", "ls_init", "eps"
        check_config(cls.__name__, config, ("mixer", *fields, "replaced"))
        options = {name: config[name] for name in fields}
        block = cls(layer_from_config(config["mixer"]), **options)  # type: ignore[arg-type]
        swap_modules(block, config["replaced"], file=cls.__name__)
        return block

    def extra_repr(self) -> str:
        """Show the style."""
        return f"style={self.style!r}"
