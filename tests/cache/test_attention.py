"""The attention block: other caches and no cache pass through it, and what cannot be computed is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nTextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    cache_utils,
)

from quernel._errors import QuernelError
from quernel.cache import WindowCache, attention
from quernel.cache._cache import layer_kinds
from quernel.models import TinyLM

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
IDS = torch.arange(1, 11)[None]


def llama(**more: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**(SMALL | more))).eval()


def test_other_caches_and_none_pass_through() -> None:
    model = llama()
    with torch.no_grad():
        wanted = model(IDS).logits
        with attention(model):
            assert torch.equal(model(IDS).logits, wanted)
            assert torch.equal(model(IDS, past_key_values=DynamicCache(config=model.config)).logits, wanted)
            plain = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, model.generate(IDS, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=16)),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})),
    ],
)
def test_other_families(kind: type, config: Any) -> None:
    model = kind(config).eval()
    wanted = model.generate(IDS, max_new_tokens=5, do_sample=False)
    with attention(model):
        cache = WindowCache(config, budget=64)
        assert torch.equal(model.generate(IDS, past_key_values=cache, max_new_tokens=5, do_sample=False), wanted)


def test_what_is_not_computed_is_refused() -> None:
    config = Gemma2Config(
        **(SMALL | {"attn_implementation": "eager"}),
        head_dim=8,
        layer_types=["full_attention"] * 2,
        attn_logit_softcapping=50.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    with attention(model), pytest.raises(QuernelError, match="softcap"):
        model(IDS, past_key_values=WindowCache(config, budget=64))
    trained = llama(attention_dropout=0.1).train()
    with attention(trained), pytest.raises(QuernelError, match="dropout"):
        trained(IDS, past_key_values=WindowCache(trained.config, budget=64))


@pytest.mark.parametrize("early", [False, True])
def test_what_the_layers_attend_to(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if early:
        # As transformers before 5.16.
        monkeypatch.delattr(cache_utils, "get_layer_types_and_kwargs", raising=False)
    assert layer_kinds(LlamaConfig(**SMALL)) == ["full_attention"] * 2
    assert layer_kinds(MistralConfig(**SMALL, sliding_window=None)) == ["full_attention"] * 2
    assert layer_kinds(MistralConfig(**SMALL, sliding_window=8)) == ["sliding_attention"] * 2
    mixed = ["full_attention", "sliding_attention"]
    assert layer_kinds(Gemma2Config(**SMALL, head_dim=8, layer_types=mixed)) == mixed
    chunked = LlamaConfig(**SMALL)
    chunked.attention_chunk_size = 8
    assert "full_attention" not in layer_kinds(chunked)
    sharing = Gemma3nTextConfig(num_hidden_layers=3, num_kv_shared_layers=1, layer_types=["full_attention"] * 3)
    assert layer_kinds(sharing) == ["full_attention", "full_attention", "dummy"]
    with pytest.raises(QuernelError, match="dummy"):
        WindowCache(sharing, budget=8)


def test_lengths_from_places_and_by_the_old_name() -> None:
    layer = WindowCache(LlamaConfig(**SMALL), budget=64).layers[0]
    # The first versions of transformers 5 ask with the places of the new tokens.
    assert layer.get_mask_sizes(torch.arange(5)) == layer.get_mask_sizes(5) == (5, 0)
    assert layer.get_mask_sizes(torch.tensor(5)) == (5, 0)
    assert layer.get_max_cache_shape() == layer.get_max_length() == -1


def test_a_module_of_torch_is_refused() -> None:
    with pytest.raises(QuernelError, match="transformers"), attention(torch.nn.Linear(2, 2)):
        pass


def test_blocks_nest_and_models_keep_their_own() -> None:
    model, eager = llama(), llama(attn_implementation="eager")
    with attention(model), attention(model):
        pass
    assert model.config._attn_implementation == "sdpa"
    with attention(eager):
        pass
    assert eager.config._attn_implementation == "eager"


def test_prompt_lookup_decoding_is_refused_with_a_reason() -> None:
    # The first versions of transformers 5 cannot do this without a token that ends a text.
    model = llama(eos_token_id=31)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]])
    with attention(model), pytest.raises((QuernelError, ValueError), match=r"prompt-lookup|crop|not support"):
        model.generate(
            ids, past_key_values=WindowCache(model.config, budget=64), max_new_tokens=8, prompt_lookup_num_tokens=3
        )


def test_a_tiny_lm_of_ours_runs_in_transformers() -> None:
    ours = TinyLM(vocab_size=40, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48).eval()
    theirs = ours.to_transformers()
    ids = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0), ours.generate(ids, 6))
    assert theirs.get_input_embeddings().weight is ours.embed_tokens.weight


def test_a_cache_of_fewer_layers_is_refused() -> None:
    model, other = llama(), LlamaConfig(**SMALL | {"num_hidden_layers": 1})
    with attention(model), pytest.raises(QuernelError, match="made for a model of 1 layers"):
        model(IDS, past_key_values=WindowCache(other, budget=8))


def test_a_second_turn_outside_the_block_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    cache, ids = WindowCache(model.config, budget=16), torch.arange(1, 13)[None]
    with attention(model):
        model(ids, past_key_values=cache)
    with pytest.raises(QuernelError, match="run the model inside"):
        model(ids[:, :5], past_key_values=cache)
    # Another block that is open does not make it right, but what was held is still there for the first model.
    with attention(model):
        model(ids[:, :5], past_key_values=cache)
    assert cache.get_seq_length() == 17
