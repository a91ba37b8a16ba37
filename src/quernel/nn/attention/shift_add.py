"""``BinaryLinearAttention``: self-attention linear in the number of tokens, by additions (arXiv 2306.06446).

Per head, with q, k, v projected as usual and rows normalised,

    b = 1[x / ||x|| > tau],   y = v / 2 + (1 / pi) b_q (b_k^T v),   out = y / ||y|| + DWConv(v),

then the heads are merged and projected.  Cost O(N C D) beside the projections, D the size of a head; memory O(N C).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._random import seeded
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int
from quernel.nn._binary_attention_kernels import EPS
from quernel.nn._described import layer_config, layer_from_config
from quernel.nn._mixer import checked_mask
from quernel.nn._stored import applied
from quernel.nn.functional.binary_attention import CONSTANTS, binary_linear_attention
from quernel.nn.linear.low_rank import linear_over

TAUS = ("running", "row", "batch")
# The share of the newest batch in the running mean, as in torch's batch norms.
MOMENTUM = 0.1


def _example() -> dict[str, Any]:
    @seeded
    def make() -> nn.Module:
        return BinaryLinearAttention(16, 2, conv_kernel=3)

    return {"make": make, "input": lambda generator: (torch.randn(3, 6, 16, generator=generator),)}


@register(
    "shiftaddvit", pillar="nn", contract="module", paper="2306.06446", status="stable", headline=False, example=_example
)
class BinaryLinearAttention(nn.Module):
    """Multi-head self-attention with binary queries and keys, linear in the number of tokens.

    Parameters
    ----------
    dim : int
        Channels.
    num_heads : int
        Divides ``dim``.
    qkv_bias : bool, default=True
        Whether queries, keys and values have a bias.
    codes : {"sign"}, default="sign"
        How queries and keys are binarised: one bit a channel.
    tau : {"running", "row", "batch"}, default="running"
        The threshold: a running mean a head (training uses the batch's own and updates it); the mean of each row; or
        the mean over the whole batch, as in the authors' code, which makes a sample depend on the others beside it.
    constant : {"self", "sum"}, default="self"
        The constant term of the kernel: half the token's own value, or half the sum of all values.
    conv_kernel : int, default=9
        Odd width of the depthwise convolution along the tokens.
    sparse : float, optional
        While training, also add softmax attention with weights up to this left out (0.02 in the authors' code); it
        costs O(N^2) and is dropped in eval mode.

    Raises
    ------
    QuernelError
        If a size is out of range or an option unknown; in ``forward`` if shapes do not fit.

    Notes
    -----
    Input and output are (B, *S, C), channels last; tokens of images count row by row.  Rows of zeros stay finite.
    Differs from the authors' code: the threshold does not depend on the batch in eval mode, and divisions by a norm
    have a floor of 1e-12.

    References
    ----------
    You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer",
    arXiv 2306.06446, 2023.

    Examples
    --------
    >>> import torch
    >>> mixer = BinaryLinearAttention(64, num_heads=4).eval()
    >>> mixer(torch.randn(2, 14, 14, 64)).shape
    torch.Size([2, 14, 14, 64])
    """

    spatial_ndim: ClassVar[tuple[int, ...]] = (1, 2, 3)
    causal: ClassVar[bool] = False
    fixed_shape: ClassVar[tuple[int, ...] | None] = None
    max_len: ClassVar[int | None] = None

    tau_means: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        *,
        codes: Literal["sign"] = "sign",
        tau: Literal["running", "row", "batch"] = "running",
        constant: Literal["self", "sum"] = "self",
        conv_kernel: int = 9,
        sparse: float | None = None,
    ) -> None:
        check_int("dim", dim, low=1)
        options: dict[str, Any] = {
            "codes": codes,
            "tau": tau,
            "constant": constant,
            "conv_kernel": conv_kernel,
            "sparse": sparse,
        }
        self._build(nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim), dim, num_heads, **options)
        bound = self.conv.shape[1] ** -0.5
        nn.init.uniform_(self.conv, -bound, bound)

    def _build(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        dim: int,
        num_heads: int,
        *,
        codes: Literal["sign"] = "sign",
        tau: Literal["running", "row", "batch"] = "running",
        constant: Literal["self", "sum"] = "self",
        conv_kernel: int = 9,
        sparse: float | None = None,
    ) -> None:
        """Check the options and hold the projections, with a convolution of zeros."""
        nn.Module.__init__(self)
        self.dim, self.num_heads = check_int("dim", dim, low=1), check_int("num_heads", num_heads, low=1)
        if dim % num_heads:
            raise QuernelError(f"num_heads must divide dim={dim}; got {num_heads}")
        self.codes = check_choice("codes", codes, ("sign",))
        self.tau = check_choice("tau", tau, TAUS)
        self.constant = check_choice("constant", constant, CONSTANTS)
        if check_int("conv_kernel", conv_kernel, low=1) % 2 == 0:
            raise QuernelError(f"conv_kernel must be odd, so that it is centred on its token; got {conv_kernel}")
        self.sparse = None if sparse is None else check_float("sparse", sparse, low=0.0, high=1.0)
        self.qkv, self.proj = qkv, proj
        self.conv = nn.Parameter(torch.zeros(num_heads, conv_kernel))
        if tau == "running":
            self.register_buffer("tau_means", torch.zeros(2, num_heads))  # of queries, of keys

    @classmethod
    def over(cls, qkv: nn.Module, proj: nn.Module, num_heads: int, **options: Any) -> Self:
        """Build a mixer around existing projections, its convolution zero.

        Parameters
        ----------
        qkv, proj : nn.Module
            Linear layers dim -> 3 dim (queries, keys, values, each head by head) and dim -> dim; held, not copied.
        num_heads : int
        **options
            As in the class.
        """
        dim = int(proj.in_features)  # type: ignore[arg-type]
        if qkv.in_features != dim or qkv.out_features != 3 * dim or proj.out_features != dim:
            raise QuernelError(
                f"qkv must be a linear layer {dim} -> {3 * dim} and proj one {dim} -> {dim}; got {qkv} and {proj}"
            )
        new = cls.__new__(cls)
        new._build(qkv, proj, dim, num_heads, **options)
        return new.train(qkv.training)

    @classmethod
    def from_attention(cls, attention: nn.Module, **options: Any) -> Self:
        """Take the projections of a trained self-attention; fine-tune afterwards.

        Parameters
        ----------
        attention : nn.Module
            ``nn.MultiheadAttention`` with one size for queries, keys and values, or any module with linear layers
            ``qkv`` and ``proj`` and an integer ``num_heads``.  Its parameters are shared.
        **options
            As in the class.

        Raises
        ------
        QuernelError
            If the projections cannot be found.
        """
        if isinstance(attention, nn.MultiheadAttention):
            weight, bias = attention.in_proj_weight, attention.in_proj_bias
            if weight is None or attention.bias_k is not None or attention.add_zero_attn:
                raise QuernelError(
                    "attention must project queries, keys and values of one size and add no further key; got "
                    f"{attention}"
                )
            out = attention.out_proj
            projections = linear_over(weight, bias), linear_over(out.weight, out.bias)  # type: ignore[arg-type]
            return cls.over(*projections, attention.num_heads, **options).train(attention.training)
        qkv, proj, heads = (getattr(attention, name, None) for name in ("qkv", "proj", "num_heads"))
        if not isinstance(qkv, nn.Module) or not isinstance(proj, nn.Module) or not isinstance(heads, int):
            raise QuernelError(
                "attention must be nn.MultiheadAttention or have linear layers qkv and proj and an int num_heads; got "
                f"{type(attention).__name__}. Build the mixer with BinaryLinearAttention.over(qkv, proj, num_heads)"
            )
        return cls.over(qkv, proj, heads, **options).train(attention.training)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:  # (B, *S, C) -> (B, *S, C)
        """Mix the tokens; ``mask``, (B, *S) bool, marks the tokens that count."""
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise QuernelError(f"x must have shape (batch, ..., {self.dim}) with tokens between; got {tuple(x.shape)}")
        tokens = x.flatten(1, -2)  # (B, N, C)
        kept = None if mask is None else checked_mask(mask, x).flatten(1)
        qkv = applied(self.qkv, tokens).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D) each
        if kept is not None:
            v = v * kept[:, None, :, None]
        q_limit, k_limit = self._thresholds(q, k, kept)
        y = binary_linear_attention(
            q,
            k,
            v,
            self.conv,
            q_threshold=q_limit,
            k_threshold=k_limit,
            constant=self.constant,
            sparse=self.sparse if self.training else None,
        )
        return applied(self.proj, y.transpose(1, 2).flatten(2)).reshape(x.shape).to(x.dtype)

    def flops(self, shape: tuple[int, ...]) -> int:
        """Return the floating-point operations of a forward pass over (B, *S, C), additions and products alike."""
        *sizes, channels = shape
        tokens = int(torch.Size(sizes).numel())
        head = channels // self.num_heads
        return 2 * tokens * channels * (4 * channels + 2 * head + self.conv.shape[1])

    def _thresholds(self, q: Tensor, k: Tensor, kept: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the thresholds of queries and keys, (H,) each, or None for the mean of each row."""
        if self.tau == "row":
            return None, None
        if self.tau == "running" and not self.training:
            return self.tau_means[0], self.tau_means[1]
        means = torch.stack([_mean(x, kept) for x in (q, k)])  # (2, H)
        if self.tau == "batch":
            means = means.mean(1, keepdim=True).expand(-1, self.num_heads)
        else:
            with torch.no_grad():
                self.tau_means.lerp_(means.to(self.tau_means.dtype), MOMENTUM)
        return means[0], means[1]

    def config(self) -> dict[str, Any]:
        """Return the options and the classes of the projections."""
        return {
            "qkv": layer_config(self.qkv),
            "proj": layer_config(self.proj),
            "num_heads": self.num_heads,
            "codes": self.codes,
            "tau": self.tau,
            "constant": self.constant,
            "conv_kernel": self.conv.shape[1],
            "sparse": self.sparse,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained mixer from ``config()``."""
        options = {name: config[name] for name in ("codes", "tau", "constant", "conv_kernel", "sparse")}
        qkv, proj = layer_from_config(config["qkv"]), layer_from_config(config["proj"])
        return cls.over(qkv, proj, config["num_heads"], **options)

    def extra_repr(self) -> str:
        """Show the sizes and options."""
        parts = [f"{self.dim}, num_heads={self.num_heads}, tau={self.tau!r}, constant={self.constant!r}"]
        parts += [f"conv_kernel={self.conv.shape[1]}"]
        return ", ".join(parts + ([] if self.sparse is None else [f"sparse={self.sparse}"]))


@torch.no_grad()
def _mean(x: Tensor, kept: Tensor | None) -> Tensor:
    """Return the mean of the normalised rows a head, of the tokens that count; x: (B, H, N, D) -> (H,)."""
    x = x.float()
    rows = x.sum(-1) / torch.linalg.vector_norm(x, dim=-1).clamp_min(EPS)  # (B, H, N)
    weights = torch.ones_like(rows) if kept is None else kept[:, None].to(rows.dtype).expand_as(rows)
    return (rows * weights).sum((0, 2)) / (weights.sum((0, 2)) * x.shape[-1]).clamp_min(1)
