"""A ``TinyLM`` as a ``LlamaForCausalLM`` of transformers: the same weights, for its ``generate`` and its caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from quernel.models.decoder import TinyLM


def as_llama(model: TinyLM) -> Any:
    """Return a model of transformers that shares the weights, in the same mode."""
    size = model.config()
    config = LlamaConfig(
        vocab_size=size["vocab_size"],
        hidden_size=size["dim"],
        intermediate_size=size["hidden_dim"],
        num_hidden_layers=size["n_layers"],
        num_attention_heads=size["n_heads"],
        num_key_value_heads=size["n_kv_heads"],
        max_position_embeddings=size["context"],
        rope_parameters={"rope_type": "default", "rope_theta": size["rope_theta"]},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        wrapped = LlamaForCausalLM(config)
    names = {name: name if name.startswith("lm_head") else f"model.{name}" for name in model.state_dict()}
    wrapped.load_state_dict(
        {names[name]: parameter for name, parameter in model.state_dict(keep_vars=True).items()}, assign=True
    )
    wrapped.tie_weights()
    return wrapped.train(model.training)
