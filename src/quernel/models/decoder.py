"""TinyLM: a decoder of Llama type (RMSNorm, RoPE, SwiGLU, grouped queries, tied head) in plain ``nn.Linear``.

Projections are separate modules with transformers' Llama names and half-split rotation, so that every
compression method sees them and weights carry over. There are no buffers: rotation angles are computed.
``TinyLM.load_pretrained`` gives the character model trained once on tinyshakespeare, ``TinyLM.stories260k``
Karpathy's checkpoint.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel._errors import MissingExtraError, QuernelError
from quernel._registry import register
from quernel._validate import check_choice, check_float, check_int
from quernel.models._tokenizers import ByteTokenizer, PieceTokenizer


def _example() -> dict[str, Any]:
    def make() -> TinyLM:
        return TinyLM(vocab_size=32, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24)

    return {"make": make, "input": lambda generator: (torch.randint(0, 32, (2, 7), generator=generator),)}


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its angle; x: (B, H, T, d), angles: (T, d/2)."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention in which ``n_heads / n_kv_heads`` query heads share one key and value head."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, theta: float) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.theta = n_heads, n_kv_heads, dim // n_heads, theta
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            projection(x).view(b, t, heads, self.head_dim).transpose(1, 2)
            for projection, heads in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        half = torch.arange(self.head_dim // 2, device=x.device, dtype=torch.float32)
        position = torch.arange(t, device=x.device, dtype=torch.float32)
        angles = position[:, None] * self.theta ** (half / -(self.head_dim // 2))  # (T, d/2)
        q, k = rotate(q, angles), rotate(k, angles)
        group = self.n_heads // self.n_kv_heads
        if group > 1:
            # Repeating is faster than enable_gqa on the CPU, which falls back to the unfused path.
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, d)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(b, t, self.n_heads * self.head_dim))
        return out


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, hidden_dim: int, theta: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(dim, eps=1e-5)
        self.self_attn = Attention(dim, n_heads, n_kv_heads, theta)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = FeedForward(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


@register("tiny-lm", pillar="models", contract="model", paper=None, status="stable", example=_example)
class TinyLM(nn.Module):
    """A small causal language model of Llama type.

    Parameters
    ----------
    vocab_size : int, default=256
        Number of tokens; 256 with the byte tokenizer.
    dim : int, default=128
        Width; a multiple of ``2 * n_heads``.
    n_layers, n_heads, n_kv_heads : int, default=4, 4, 2
        Blocks, query heads, key and value heads (a divisor of ``n_heads``).
    hidden_dim : int, default=344
        Width inside the feed-forward.
    context : int, default=1024
        Longest input in tokens.
    rope_theta : float, default=10000
        Base of the rotation frequencies.
    tokenizer : {"bytes", "llama2c-512"}
        Which tokenizer ``encode`` and ``decode`` use.

    Notes
    -----
    ``lm_head`` is an ``nn.Linear`` that shares the embedding's parameter. ``generate`` runs the whole context for each
    new token; ``to_transformers()`` has caches.

    Examples
    --------
    >>> import torch
    >>> from quernel.models import TinyLM
    >>> model = TinyLM(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=64)
    >>> model(model.encode("To be")[None]).shape
    torch.Size([1, 5, 256])
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 128,
        n_layers: int = 4,
        n_heads: int = 4,
        n_kv_heads: int = 2,
        hidden_dim: int = 344,
        context: int = 1024,
        rope_theta: float = 10000.0,
        tokenizer: str = "bytes",
    ) -> None:
        super().__init__()
        check_int("vocab_size", vocab_size, low=1)
        check_int("n_heads", n_heads, low=1)
        check_int("n_kv_heads", n_kv_heads, low=1)
        check_int("dim", dim, low=2)
        check_int("n_layers", n_layers, low=1)
        check_int("hidden_dim", hidden_dim, low=1)
        check_int("context", context, low=1)
        check_float("rope_theta", rope_theta, low=1.0)
        check_choice("tokenizer", tokenizer, ("bytes", "llama2c-512"))
        if dim % (2 * n_heads) or n_heads % n_kv_heads:
            raise QuernelError(
                "dim must be a multiple of 2 * n_heads and n_heads a multiple of n_kv_heads; "
                f"got dim={dim}, n_heads={n_heads}, n_kv_heads={n_kv_heads}"
            )
        self._config = {
            "vocab_size": vocab_size,
            "dim": dim,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "hidden_dim": hidden_dim,
            "context": context,
            "rope_theta": rope_theta,
            "tokenizer": tokenizer,
        }
        self.context = context
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        blocks = (Block(dim, n_heads, n_kv_heads, hidden_dim, rope_theta) for _ in range(n_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Residual branches start smaller by the square root of their number, as in GPT-2.
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / (2 * n_layers) ** 0.5 if into_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build an untrained model from ``config()``."""
        return cls(**config)

    @classmethod
    def load_pretrained(cls) -> TinyLM:
        """Return the tinyshakespeare model, trained on first use and cached (see ``quernel.models.tiny_lm``)."""
        from quernel.models._lm_training import tiny_lm

        return tiny_lm()

    @classmethod
    def stories260k(cls) -> TinyLM:
        """Return Karpathy's stories260K (data set ``stories260k``), in eval mode."""
        from quernel.models._stories import load_stories

        return load_stories()

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, vocab_size)
        """Return next-token logits for every position."""
        if input_ids.shape[-1] > self.context:
            raise QuernelError(
                f"input_ids must hold at most context={self.context} tokens; got {input_ids.shape[-1]}. Cut the input"
            )
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, shape (T,), int64."""
        return torch.tensor(self._tokenizer().encode(text), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """Return the text of token ids, shape (T,)."""
        return self._tokenizer().decode(ids.tolist())

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int) -> Tensor:
        """Append the most likely token, again and again.

        Parameters
        ----------
        input_ids : Tensor of int64, shape (B, T)
            At least one token a row.
        max_new_tokens : int
            How many tokens to append; only the last ``context`` tokens are looked at.

        Returns
        -------
        Tensor of int64, shape (B, T + max_new_tokens)
        """
        check_int("max_new_tokens", max_new_tokens, low=0)
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise QuernelError(f"input_ids must have shape (B, T) with T >= 1; got {tuple(input_ids.shape)}")
        for _ in range(max_new_tokens):
            following = self(input_ids[:, -self.context :])[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, following), dim=1)
        return input_ids

    def to_transformers(self) -> Any:
        """Return a ``LlamaForCausalLM`` that shares the weights: for caches, beams and all else of ``generate``.

        Raises
        ------
        MissingExtraError
            Without transformers (extra ``hf``).
        """
        try:
            from quernel.models._llama import as_llama
        except ModuleNotFoundError as error:
            raise MissingExtraError("TinyLM.to_transformers", "hf") from error
        return as_llama(self)

    def _tokenizer(self) -> ByteTokenizer | PieceTokenizer:
        return ByteTokenizer() if self._config["tokenizer"] == "bytes" else PieceTokenizer.llama2c_512()
