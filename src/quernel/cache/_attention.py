"""``attention(model)``: lets a transformers model attend through its cache.

A cache of transformers sees keys and values but no query.  So ``update`` of our layers hands the new keys on with a
mark, and the attention function registered here as ``"quernel"`` finds the mark, passes the query to the layer and
returns what it answers.  Keys without a mark (no cache, or a cache of transformers) go to the library's own SDPA.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quernel._errors import QuernelError

if TYPE_CHECKING:
    from quernel.cache._layer import CacheLayer

NAME = "quernel"
_MARK = "_quernel_layer"
NEVER_ASKED = (
    "the attention function never asked this cache, so earlier tokens would be missing; run the model inside "
    "`with quernel.cache.attention(model):`"
)
# What some models ask of their attention and the caches do not compute.
_REFUSED = ("softcap", "sliding_window", "position_bias", "s_aux")
# Models inside the block now; threads that generate share it with the one that entered.
_inside: list[Any] = []
_lock = threading.Lock()


@contextmanager
def attention(model: Any) -> Iterator[None]:
    """Within this block ``model`` attends through Quernel's caches.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder whose attention goes through transformers' ``AttentionInterface``, as that of Llama or Qwen does.
        Afterwards it attends as before, also after an error.

    Raises
    ------
    QuernelError
        If the model does not let its attention be chosen.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from quernel.cache import WindowCache, attention
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> model, cache = LlamaForCausalLM(config).eval(), WindowCache(config, budget=8, sink=2)
    >>> with attention(model):
    ...     ids = model.generate(torch.ones(1, 20, dtype=torch.int64), past_key_values=cache, max_new_tokens=3)
    """
    if not hasattr(model, "set_attn_implementation"):
        raise QuernelError(f"model must be a model of transformers; got {type(model).__name__}")
    AttentionInterface.register(NAME, attend)
    # Without a mask function of the same name masks are None, and padding would be attended to.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise QuernelError(
            f"{type(model).__name__} does not let its attention be chosen, so no cache can see its queries"
        )
    with _lock:
        _inside.append(model)
    try:
        yield
    finally:
        with _lock:
            _inside.remove(model)
        model.set_attn_implementation(before)


def check_inside() -> None:
    """Raise unless some model is inside the block: one outside would attend to its new tokens alone."""
    if not _inside:
        raise QuernelError(NEVER_ASKED)


def marked(key: Tensor, layer: CacheLayer) -> Tensor:
    """Return a view of ``key`` by which ``attend`` finds the layer."""
    view = key.view_as(key)
    setattr(view, _MARK, layer)
    return view


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Answer a query as transformers' attention functions do: (B, H, q, d) -> (B, q, H, d)."""
    layer: CacheLayer | None = getattr(key, _MARK, None)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
    asked = [name for name in _REFUSED if rest.get(name) is not None]
    if asked or dropout:
        raise QuernelError(
            f"{type(module).__name__} asks for {', '.join(asked) or 'dropout'}, which Quernel's caches do not compute; "
            "use a cache of transformers, or eval() if it is the dropout"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(module, query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None
