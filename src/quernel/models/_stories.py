"""stories260K: llama2.c tensors put into a ``TinyLM``."""

from __future__ import annotations

import torch
from torch import Tensor

from quernel import data
from quernel._module_tree import parameters_on_meta
from quernel.models.decoder import TinyLM


def load_stories() -> TinyLM:
    """Return stories260K in eval mode; draws nothing from any generator."""
    held = data.load("stories260k")
    size = {name: int(value) for name, value in held.config.items()}
    with parameters_on_meta():
        model = TinyLM(
            vocab_size=size["vocab_size"],
            dim=size["dim"],
            n_layers=size["n_layers"],
            n_heads=size["n_heads"],
            n_kv_heads=size["n_kv_heads"],
            hidden_dim=size["hidden_dim"],
            context=size["seq_len"],
            tokenizer="llama2c-512",
        )
    t = held.tensors
    embedding = torch.nn.Parameter(t["token_embedding"])
    state: dict[str, Tensor] = {"embed_tokens.weight": embedding, "lm_head.weight": embedding, "norm.weight": t["norm"]}
    head_dim = size["dim"] // size["n_heads"]
    for i in range(size["n_layers"]):
        layer = {
            "input_layernorm": t["attention_norm"][i],
            "self_attn.q_proj": _half_split(t["wq"][i], head_dim),
            "self_attn.k_proj": _half_split(t["wk"][i], head_dim),
            "self_attn.v_proj": t["wv"][i],
            "self_attn.o_proj": t["wo"][i],
            "post_attention_layernorm": t["ffn_norm"][i],
            "mlp.gate_proj": t["w1"][i],
            "mlp.down_proj": t["w2"][i],
            "mlp.up_proj": t["w3"][i],
        }
        state |= {f"layers.{i}.{name}.weight": tensor.clone() for name, tensor in layer.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder a projection from rotating rows (2i, 2i+1) of a head to rotating rows (i, i + d/2)."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[-1])
    return heads.transpose(1, 2).reshape(weight.shape)
