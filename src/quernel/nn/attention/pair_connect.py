"""``PairConnect``: tokens mixed by looking up a row for each pair of ids in a window (arXiv 2106.08235).

    p_t = 1 / Z_t  sum over j in N(t) of  a(t - j) P(x_t, x_j, bucket(t - j)),     N(t) the window of t, without padding
    softmax:  p_t = sum_j exp(s_tj) n_tj / sum_j exp(s_tj),     s and n both looked up; s in several heads

No projection and no dot product: a token costs W hashes, W random reads and W dim additions. Keys are ids, not hidden
states, so a layer's state in decoding is the last W ids. In softmax form it contains any attention over embedded tokens
(``compress.AttentionToPairs``), though no attention over what earlier layers made of them.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_int, check_type
from quernel.nn._block_plain import wide_dtype
from quernel.nn._pair_kernels import GAP, MEAN, SOFTMAX, SQRT
from quernel.nn._pair_plain import INTEGERS
from quernel.nn._stored import applied
from quernel.nn.attention._pair_stream import PairStream
from quernel.nn.attention.pair_table import PairTable

Normalise = Literal["sqrt", "mean", "softmax"]
Relative = Literal["key", "gain", "bias"]
NORMALISERS = {"sqrt": SQRT, "mean": MEAN, "softmax": SOFTMAX}
# Rows are met far less often than dense weights are used: they take larger steps.
TABLE_RATE = 10.0
_OPTIONS = ("window", "rel_buckets", "relative", "normalise", "causal", "n_heads")


def _example() -> dict[str, Any]:
    def make() -> PairConnect:
        generator = torch.Generator().manual_seed(0)
        table = PairTable(60, 8, vocab=16, sparse=False, generator=generator)
        return PairConnect(table, window=4, rel_buckets=3)

    return {"make": make, "input": lambda generator: (torch.randint(0, 16, (3, 7), generator=generator),)}


@register("pairconnect", pillar="nn", contract="module", paper="2106.08235", status="stable", example=_example)
class PairConnect(nn.Module):
    """A token mixer of looked-up pairs, in the place of the first layer of attention or as a layer of its own.

    Parameters
    ----------
    table : PairTable
        The rows; layers that share a table look up the same rows.
    window : int or None, default=32
        Tokens W that a token looks at, itself included; without causality W - 1 to either side. None is all.
    rel_buckets : int, optional
        Distances D that are told apart, the last for all beyond; without causality 2 D - 1. Default 1 for
        ``relative="key"``, else the window.
    relative : {"key", "gain", "bias"}, default="key"
        What a distance does: it is part of the pair's key, or a trained factor of its row, or, under softmax, a trained
        summand of its score, one a head.
    normalise : {"sqrt", "mean", "softmax"}, default="sqrt"
        Divide by the square root of the number of pairs, by the number, or weigh pairs by looked-up scores.
    causal : bool, default=True
        Look at earlier tokens only.
    n_heads : int, default=1
        For softmax: heads with scores of their own; each owns ``dim / n_heads`` columns.
    out_proj : bool, default=False
        Put a linear layer behind the sum; with several heads attention has one.

    Raises
    ------
    QuernelError
        If a size is out of range, sizes do not divide each other, or a direct table has too few rows.

    Notes
    -----
    Ids that do not count are masked; they form no pairs, and their own output is zero. The token's pair with itself is
    part of the sum. Position is known only through ``rel_buckets``: without, a layer sees a bag of pairs.

    References
    ----------
    Xu et al., "PairConnect: A Compute-Efficient MLP Alternative to Attention", arXiv 2106.08235, 2021.
    The layer is reconstructed from the abstract.

    Examples
    --------
    >>> mixer = PairConnect(PairTable(10_000, 32, vocab=500), window=8, rel_buckets=8)
    >>> ids = torch.randint(0, 500, (2, 20))
    >>> mixer(ids).shape
    torch.Size([2, 20, 32])
    >>> y, state = mixer.step(mixer.start(2), ids[:, 0])
    >>> bool((y == mixer(ids)[:, 0]).all()), state.nbytes
    (True, 64)
    """

    def __init__(
        self,
        table: PairTable,
        window: int | float | None = 32,
        rel_buckets: int | None = None,
        relative: Relative = "key",
        normalise: Normalise = "sqrt",
        causal: bool = True,
        *,
        n_heads: int = 1,
        out_proj: bool = False,
    ) -> None:
        super().__init__()
        self.table = check_type("table", table, PairTable)
        self.window = None if window in (None, math.inf) else check_int("window", window, low=1)
        self.relative = check_choice("relative", relative, ("key", "gain", "bias"))
        self.normalise = check_choice("normalise", normalise, tuple(NORMALISERS))
        self.causal = check_type("causal", causal, bool)
        self.n_heads = check_int("n_heads", n_heads, low=1)
        self.rel_buckets = self._distances(rel_buckets)
        check_type("out_proj", out_proj, bool)
        self._check_heads()
        buckets = self.rel_buckets if causal else 2 * self.rel_buckets - 1
        table.check_direct(buckets if relative == "key" else 1)
        self.layout = table.layout(
            window=self.window,
            distances=self.rel_buckets,
            keyed=relative == "key" and self.rel_buckets > 1,
            normaliser=NORMALISERS[normalise],
            causal=causal,
            heads=n_heads,
        )
        held = next(table.parameters())
        options: dict[str, Any] = {"device": held.device, "dtype": wide_dtype(held.dtype)}
        if normalise == "softmax":
            self.scores = nn.Parameter(torch.zeros(table.n_rows, n_heads, **options))
        if relative == "gain":
            self.gain = nn.Parameter(torch.ones(1, buckets, **options))
        elif relative == "bias":
            self.bias = nn.Parameter(torch.zeros(n_heads, buckets, **options))
        self.out_proj = nn.Linear(self.dim, self.dim, **options) if out_proj else None

    @property
    def dim(self) -> int:
        """Numbers of an output."""
        return self.table.dim

    @property
    def distance_weights(self) -> Tensor | None:
        """Gain or bias of each distance, (heads, buckets), or None where distances are part of the key."""
        return None if self.relative == "key" else self.gain if self.relative == "gain" else self.bias

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, T) -> (B, T, dim)
        """Return the mixed tokens.

        Parameters
        ----------
        ids : integer Tensor, shape (B, T)
        mask : bool Tensor, shape (B, T), optional
            True where a token counts. Ids elsewhere are not looked at.
        """
        return self.mix(ids if mask is None else masked(ids, mask))

    def mix(self, ids: Tensor, queries: int = 0) -> Tensor:  # (B, T) -> (B, T or queries, dim)
        """Return the last ``queries`` mixed tokens, 0 for all; padding is marked in ``ids`` as ``masked`` does."""
        scores = self.scores if self.normalise == "softmax" else None
        y = self.table.sums(ids, self.layout, scores=scores, relative=self.distance_weights, queries=queries)
        if self.out_proj is None:
            return y
        there = ids[:, ids.shape[1] - (queries or ids.shape[1]) :, None] != GAP
        # The projection's bias must not appear where there is no token.
        return applied(self.out_proj, y) * there

    def start(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Return the state of ``batch`` streams before their first token: room for W ids, none of them there."""
        return empty_state(batch, self.window, self.table.vocab, device)

    def step(self, state: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Take one token a stream.

        Parameters
        ----------
        state : Tensor
            From ``start`` or the step before. 4 W bytes a stream, whatever the width of the layer.
        ids : integer Tensor, shape (B,)

        Returns
        -------
        y, state : Tensor, shape (B, dim), and the next state
        """
        self._check_causal()
        state = advanced(state, ids, self.window)
        return self.mix(state, queries=1)[:, 0], state

    def stream(self, batch: int = 1) -> PairStream:
        """Return ``batch`` streams that decode with the least delay: ``stream.step(ids)``, on a CPU, without gradients.

        Equal to ``step``, which works everywhere, compiles, and leaves its state as it is. The layer may be trained or
        cast between steps.
        """
        return PairStream(self, check_int("batch", batch, low=1))

    def param_groups(self, lr: float, table_lr: float | None = None) -> list[dict[str, Any]]:
        """Return the dense parameters, and those of the table with ten times the rate; without weight decay there."""
        return param_groups(self, [self], lr, table_lr)

    def config(self) -> dict[str, Any]:
        """Return options and the table's description."""
        described = {name: getattr(self, name) for name in _OPTIONS} | {"out_proj": self.out_proj is not None}
        return described | {"table": self.table.config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a layer without values from ``config()``."""
        options = {name: config[name] for name in (*_OPTIONS, "out_proj")}
        return cls(PairTable.from_config(config["table"]), **options)

    def extra_repr(self) -> str:
        """Show the options."""
        order = "causal" if self.causal else "both sides"
        return f"window={self.window}, rel_buckets={self.rel_buckets} ({self.relative}), {self.normalise}, {order}"

    def _distances(self, given: int | None) -> int:
        if given is not None:
            return check_int("rel_buckets", given, low=1)
        if self.relative == "key":
            return 1
        if self.window is None:
            raise QuernelError(f"rel_buckets must be given for relative={self.relative!r} without a window")
        return self.window

    def _check_heads(self) -> None:
        softmax, dim, hashes = self.normalise == "softmax", self.dim, self.table.n_hashes
        if self.relative == ("gain" if softmax else "bias"):
            raise QuernelError(
                "relative='gain' is for sums and 'bias' for normalise='softmax'; take the other, or 'key'"
            )
        if self.n_heads > 1 and (not softmax or self.table.combine == "sum"):
            raise QuernelError("n_heads > 1 is for normalise='softmax' over a table with combine='concat'")
        if self.table.combine == "concat" and dim % math.lcm(self.n_heads, hashes):
            raise QuernelError(f"n_heads={self.n_heads} and n_hashes={hashes} must cut dim={dim} into equal parts")

    def _check_causal(self) -> None:
        if not self.causal:
            raise QuernelError("step needs causal=True: later tokens would change earlier outputs")


def masked(ids: Tensor, mask: Tensor) -> Tensor:
    """Return ids with padding marked, as the kernels take them."""
    check_type("mask", mask, Tensor)
    if mask.dtype is not torch.bool or mask.shape != ids.shape:
        raise QuernelError(
            f"mask must be boolean of the shape of ids, {tuple(ids.shape)}; got {mask.dtype} {tuple(mask.shape)}. "
            "Pass mask.bool()"
        )
    return whole(ids).masked_fill(~mask, GAP)


def whole(ids: Tensor) -> Tensor:
    """Return ids as int32, if they are, or int64; fractions are refused, not cut off."""
    if ids.dtype not in INTEGERS:
        raise QuernelError(f"ids must be integers; got {ids.dtype}. Convert them with .long()")
    return ids if ids.dtype is torch.int32 else ids.long()


def empty_state(batch: int, window: int | None, vocab: int | None, device: torch.device | str | None) -> Tensor:
    """Return the state of streams before their first token; an open vocabulary needs ids of 64 bits."""
    check_int("batch", batch, low=0)
    dtype = torch.int64 if vocab is None else torch.int32
    return torch.full((batch, window or 0), GAP, dtype=dtype, device=device)


def advanced(state: Tensor, ids: Tensor, window: int | None) -> Tensor:
    """Return the state with one id a stream appended, and the oldest dropped where there is a window."""
    if ids.shape != state.shape[:1]:
        raise QuernelError(f"ids must have shape ({state.shape[0]},), one a stream; got {tuple(ids.shape)}")
    ids = ids if ids.dtype is state.dtype else narrowed(ids, state.dtype)
    return torch.cat((state if window is None else state[:, 1:], ids.unsqueeze(1)), 1)


def narrowed(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ids in the dtype of a state; one that does not fit becomes no id in range, and no padding."""
    return whole(ids).clamp(-(2**31) + 1, 2**31 - 1).to(dtype)


def param_groups(
    model: nn.Module, mixers: list[PairConnect], lr: float, table_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return the parameters of a model as those of its pair tables, with a rate of their own, and the others."""
    found: dict[int, nn.Parameter] = {}
    for mixer in mixers:
        rows = [*mixer.table.parameters(), *([mixer.scores] if mixer.normalise == "softmax" else [])]
        found |= {id(p): p for p in rows}
    dense = [p for p in model.parameters() if id(p) not in found]
    rate = TABLE_RATE * lr if table_lr is None else table_lr
    return [{"params": dense, "lr": lr}, {"params": list(found.values()), "lr": rate, "weight_decay": 0.0}]
