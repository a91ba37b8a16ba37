"""``PairConnectLM``: a causal language model whose tokens meet in tables of pairs only (arXiv 2106.08235).

    u_t = LayerNorm(e_t + Drop(p_t)),   e_t' = LayerNorm(u_t + MLP(u_t)),   p_t from PairConnect,  e_t^(0) the embedding

Every layer looks at ids, so the logits at t depend on the last W ids alone, however deep the model, and those ids are
all that decoding carries: no cache of keys and values. A token costs two products of d by 4 d and W row reads a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.hashing.mixers import mix64
from quernel.nn import PairConnect, PairTable, RobeArray
from quernel.nn._pair_kernels import GAP
from quernel.nn.attention._pair_stream import PairStream, why_not_streamed
from quernel.nn.attention.pair_connect import advanced, empty_state, masked, narrowed, param_groups, whole

EXPANSION = 4
STD = 0.02


class LMOutput(NamedTuple):
    """What a language model returns."""

    logits: Tensor  # (B, T, vocab)


def _example() -> dict[str, Any]:
    def make() -> PairConnectLM:
        return PairConnectLM(24, 8, layers=2, window=4, rows=60, rel_buckets=2, sparse=False)

    return {"make": make, "input": lambda generator: (torch.randint(0, 24, (2, 7), generator=generator),)}


class PairBlock(nn.Module):
    """A mixer and a perceptron, each with its residual and its norm."""

    def __init__(self, mixer: PairConnect, dropout: float, activation: str) -> None:
        super().__init__()
        dim = mixer.dim
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)
        self.mixed_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, EXPANSION * dim), nn.Linear(EXPANSION * dim, dim)
        self.activation = F.gelu if activation == "gelu" else F.relu

    def forward(self, e: Tensor, p: Tensor) -> Tensor:  # (..., dim) each
        """Return tokens ``e`` after what the mixer found for them, ``p``, and the perceptron."""
        u = self.mixed_norm(e + self.dropout(p).to(e.dtype))
        y: Tensor = self.norm(u + self.dropout(self.down(self.activation(self.up(u)))))
        return y


@register(
    "pairconnect",
    pillar="models",
    contract="model",
    paper="2106.08235",
    status="stable",
    headline=False,
    example=_example,
)
class PairConnectLM(nn.Module):
    """A causal language model of pair look-ups and perceptrons, for decoding on a CPU one token at a time.

    Parameters
    ----------
    vocab : int
        Number of tokens.
    dim : int, default=128
        Width.
    layers : int, default=2
        Blocks, each with a table of its own.
    window : int, default=32
        Tokens that a token looks at, itself included: all the context there is.
    rows : int, default=500_000
        Rows of each table.
    rel_buckets : int, default=8
        Distances that are part of a pair's key.
    n_hashes : int, optional
        Hash functions; default 2, or 1 for ``direct=True``.
    direct : bool, default=False
        Number pairs exactly; ``rows`` must be at least vocab^2 * rel_buckets.
    normalise : {"sqrt", "mean", "softmax"}, default="sqrt"
        As in ``PairConnect``.
    storage : {"dense", "bf16", "robe"}, default="dense"
        How tables are stored; "robe" makes all of them views of one array.
    size : int, optional
        For "robe": numbers of that array.
    dropout : float, default=0.0
        Of the mixed tokens and of the perceptrons' outputs.
    activation : {"gelu", "relu"}, default="gelu"
        Within the perceptrons.
    tied : bool, default=True
        Whether the output layer is the embedding.
    seed : int, default=0
        Decides the hashes.
    sparse : bool, default=True
        Whether tables get sparse gradients; give them an optimiser of their own, by ``param_groups``.

    Notes
    -----
    Training by plain cross-entropy: Adam for the dense parameters, ``torch.optim.SparseAdam`` or ``Adagrad`` with ten
    times the rate for the tables.

    Examples
    --------
    >>> import torch
    >>> model = PairConnectLM(vocab=50, dim=16, layers=2, window=8, rows=1000).eval()
    >>> ids = torch.randint(0, 50, (2, 12))
    >>> model(ids).logits.shape, model.generate(ids, 5).shape
    (torch.Size([2, 12, 50]), torch.Size([2, 17]))
    """

    def __init__(
        self,
        vocab: int,
        dim: int = 128,
        layers: int = 2,
        window: int = 32,
        rows: int = 500_000,
        *,
        rel_buckets: int = 8,
        n_hashes: int | None = None,
        direct: bool = False,
        normalise: Literal["sqrt", "mean", "softmax"] = "sqrt",
        storage: Literal["dense", "bf16", "robe"] = "dense",
        size: int | None = None,
        dropout: float = 0.0,
        activation: Literal["gelu", "relu"] = "gelu",
        tied: bool = True,
        seed: int = 0,
        sparse: bool = True,
    ) -> None:
        super().__init__()
        check_int("vocab", vocab, low=1)
        check_int("dim", dim, low=1)
        check_int("layers", layers, low=1)
        check_int("window", window, low=1)
        check_float("dropout", dropout, low=0.0, high=1.0)
        check_choice("activation", activation, ("gelu", "relu"))
        check_int("seed", seed)
        check_type("tied", tied, bool)
        self._config: dict[str, Any] = {
            "vocab": vocab, "dim": dim, "layers": layers, "window": window, "rows": rows, "rel_buckets": rel_buckets,
            "n_hashes": n_hashes, "direct": direct, "normalise": normalise, "storage": storage, "size": size,
            "dropout": dropout, "activation": activation, "tied": tied, "seed": seed, "sparse": sparse,
        }  # fmt: skip
        self.vocab, self.window = vocab, window
        self.embed = nn.Embedding(vocab, dim)
        memory = self._memory(storage, size, seed)
        options: dict[str, Any] = {"n_hashes": n_hashes, "direct": direct, "storage": storage, "sparse": sparse}
        tables = [
            PairTable(rows, dim, vocab=vocab, seed=int(mix64(seed, layer)), memory=memory, std=STD, **options)
            for layer in range(layers)
        ]
        mixers = [PairConnect(table, window, rel_buckets, normalise=normalise) for table in tables]
        self.blocks = nn.ModuleList(PairBlock(mixer, dropout, activation) for mixer in mixers)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.embed.weight, std=STD)
        if tied:
            self.head.weight = self.embed.weight

    @staticmethod
    def _memory(storage: str, size: int | None, seed: int) -> RobeArray | None:
        if (storage == "robe") != (size is not None):
            raise QuernelError("size must be given for storage='robe', and for nothing else: numbers of the array")
        return None if size is None else RobeArray(size, seed=seed, bound=STD * 3**0.5)

    @property
    def mixers(self) -> list[PairConnect]:
        """The mixer of each block."""
        return [cast(PairBlock, block).mixer for block in self.blocks]

    @property
    def table_bytes(self) -> int:
        """Bytes of the pair tables."""
        parameters = {id(p): p.nbytes for mixer in self.mixers for p in mixer.table.parameters()}
        return sum(parameters.values())

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> LMOutput:  # (B, T)
        """Return logits of the token after each.

        Parameters
        ----------
        ids : integer Tensor, shape (B, T)
        mask : bool Tensor, shape (B, T), optional
            True where a token counts; what the model says elsewhere means nothing.
        """
        return LMOutput(self._logits(whole(ids) if mask is None else masked(ids, mask)))

    def start(self, batch: int = 1) -> Tensor:
        """Return the state of ``batch`` streams before their first token: (batch, W) ids of 32 bits."""
        return empty_state(batch, self.window, self.vocab, self.embed.weight.device)

    def step(self, state: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Take one token a stream.

        Parameters
        ----------
        state : int32 Tensor, shape (B, W)
            From ``start`` or the step before.
        ids : integer Tensor, shape (B,)

        Returns
        -------
        logits, state : Tensor, shape (B, vocab), and the next state
        """
        state = advanced(state, ids, self.window)
        return self._logits(state, queries=1)[:, 0], state

    def stream(self, batch: int = 1) -> LMStream:
        """Return ``batch`` streams that decode with the least delay; equal to ``step``, see ``PairConnect.stream``."""
        return LMStream(self, [mixer.stream(batch) for mixer in self.mixers])

    @torch.no_grad()
    def generate(self, ids: Tensor, max_new_tokens: int, mask: Tensor | None = None) -> Tensor:
        """Append the most likely token, again and again.

        Parameters
        ----------
        ids : integer Tensor, shape (B, T)
            At least one token a stream.
        max_new_tokens : int
        mask : bool Tensor, shape (B, T), optional
            False at padding on the left of shorter streams.

        Returns
        -------
        ids : int64 Tensor, shape (B, T + max_new_tokens)
        """
        check_int("max_new_tokens", max_new_tokens, low=0)
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise QuernelError(f"ids must have shape (B, T) with T >= 1; got {tuple(ids.shape)}")
        if mask is not None and not bool(mask[:, -1].all()):
            raise QuernelError("mask must be True at the last token of every stream; pad on the left")
        seen = (whole(ids) if mask is None else masked(ids, mask))[:, -self.window :]
        state = self.start(len(ids))
        state[:, self.window - seen.shape[1] :] = narrowed(seen, state.dtype).masked_fill(seen == GAP, GAP)
        logits = self._logits(state, queries=1)[:, 0]
        step = self._stepper(state)
        made = [ids.long()]
        for i in range(max_new_tokens):
            made.append(logits.argmax(-1, keepdim=True))
            if i + 1 < max_new_tokens:
                logits = step(made[-1][:, 0])
        return torch.cat(made, dim=1)

    def param_groups(self, lr: float, table_lr: float | None = None) -> list[dict[str, Any]]:
        """Return dense parameters and, with ten times the rate, those of the tables.

        Examples
        --------
        >>> import torch
        >>> dense, tables = PairConnectLM(30, 8, rows=100).param_groups(1e-3)
        >>> optimizers = torch.optim.AdamW([dense]), torch.optim.Adagrad([tables])
        >>> tables["lr"]
        0.01
        """
        return param_groups(self, self.mixers, lr, table_lr)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)

    def _stepper(self, state: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the function from the next ids to their logits, which carries the state on."""
        if state.is_cpu and len(state) and not any(map(why_not_streamed, self.mixers)):
            return self.stream(len(state)).start_from(state).step

        def step(ids: Tensor) -> Tensor:
            nonlocal state
            logits, state = self.step(state, ids)
            return logits

        return step

    def _logits(self, ids: Tensor, queries: int = 0) -> Tensor:
        """Return logits of the last ``queries`` tokens, 0 for all; padding is marked in ``ids``."""
        tokens = ids[:, ids.shape[1] - queries :] if queries else ids
        # Ids out of range are for the first mixer to refuse, which says which.
        e = self.embed(tokens.clamp(0, self.vocab - 1))
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            e = block(e, mixer.mix(ids, queries))
        logits: Tensor = self.head(e)
        return logits


class LMStream:
    """Streams of tokens through a ``PairConnectLM`` on a CPU; made by its ``stream``."""

    def __init__(self, model: PairConnectLM, streams: list[PairStream]) -> None:
        self.model, self.streams = model, streams

    def start_from(self, state: Tensor) -> Self:  # (B, W), as ``PairConnectLM.step`` returns it
        """Take over the ids that came before."""
        held = self.streams[0].state
        if state.dtype is not held.dtype or state.shape != held.shape:
            raise QuernelError(
                f"state must be {held.dtype} of shape {tuple(held.shape)}, as step returns it; got {state.dtype} "
                f"{tuple(state.shape)}"
            )
        for stream in self.streams:
            stream.state.copy_(state)
        return self

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:  # int64 (B,) -> (B, vocab)
        """Take one token a stream; return the logits of the next."""
        mixed = [stream.step(ids) for stream in self.streams]  # first, for they refuse ids out of range
        e = self.model.embed(ids)
        for block, p in zip(self.model.blocks, mixed, strict=True):
            e = block(e, p)
        logits: Tensor = self.model.head(e)
        return logits
