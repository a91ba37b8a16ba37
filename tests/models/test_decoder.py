"""TinyLM: causal, tied, equal to transformers' Llama on the same weights; stories260K writes its story."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from quernel import models
from quernel._errors import QuernelError
from quernel._module_tree import parameters_on_meta
from quernel.models import TinyLM
from quernel.models._tokenizers import ByteTokenizer, PieceTokenizer

SMALL = {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 24, "context": 12}
# float32 sums of some hundred terms, in another order.
SAME = {"atol": 1e-5, "rtol": 1e-5}


def _ids(b: int = 2, t: int = 9) -> torch.Tensor:
    return torch.randint(0, 32, (b, t), generator=torch.Generator().manual_seed(1))


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, ids = TinyLM(**SMALL).eval(), _ids()
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 32
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], **SAME)
    assert (before[:, 5:] - after[:, 5:]).abs().amax() > 1e-3


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_equals_transformers_llama(n_kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = TinyLM(**SMALL | {"n_kv_heads": n_kv_heads}, rope_theta=500.0).eval()
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    oracle = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    state = {name if name.startswith("lm_head") else f"model.{name}": t for name, t in model.state_dict().items()}
    oracle.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(_ids()), oracle(_ids()).logits, **SAME)


def test_head_is_tied_and_stays_tied() -> None:
    model = TinyLM(**SMALL)
    assert model.lm_head.weight is model.embed_tokens.weight
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.embed_tokens.weight
    assert sum(name.endswith("lm_head.weight") for name, _ in model.named_parameters()) == 0


def test_rebuilds_from_json_on_meta_without_drawing() -> None:
    model = TinyLM(**SMALL)
    config = json.loads(json.dumps(model.config()))
    before = torch.get_rng_state()
    with parameters_on_meta():
        empty = TinyLM.from_config(config)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(empty(_ids()), model(_ids()), rtol=0, atol=0)


def test_save_and_load_keep_the_tie(tmp_path: object) -> None:
    import quernel

    model = TinyLM(**SMALL).eval()
    loaded = quernel.load(models.save(model, tmp_path / "lm"))  # type: ignore[operator]
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    torch.testing.assert_close(loaded(_ids()), model(_ids()), rtol=0, atol=0)


def test_generate_is_greedy_and_slides() -> None:
    model, ids = TinyLM(**SMALL).eval(), _ids(2, 3)
    out = model.generate(ids, 14)
    assert out.shape == (2, 17)
    assert torch.equal(out[:, :3], ids)
    for position in range(3, 17):
        expected = model(out[:, max(0, position - 12) : position])[:, -1].argmax(-1)
        assert torch.equal(out[:, position], expected)
    assert torch.equal(model.generate(ids, 0), ids)


def test_exports_without_breaks() -> None:
    model, ids = TinyLM(**SMALL).eval(), _ids()
    exported = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(exported(ids), model(ids), **SAME)


def test_gradients_reach_every_parameter() -> None:
    model = TinyLM(**SMALL)
    model(_ids()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 20}, "multiple of 2"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"n_layers": 0}, "n_layers must be"),
        ({"tokenizer": "words"}, "tokenizer must be one of"),
        ({"rope_theta": 0.5}, "rope_theta must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(QuernelError, match=message):
        TinyLM(**SMALL | change)


def test_bad_inputs_are_named() -> None:
    model = TinyLM(**SMALL)
    with pytest.raises(QuernelError, match="at most context=12 tokens; got 13"):
        model(_ids(1, 13))
    with pytest.raises(QuernelError, match=r"T >= 1; got \(1, 0\)"):
        model.generate(torch.empty(1, 0, dtype=torch.int64), 1)


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("To bé") == [84, 111, 32, 98, 195, 169]
    assert tokenizer.decode(tokenizer.encode("To bé")) == "To bé"
    assert tokenizer.decode([195]) == "�"


def test_piece_tokenizer_merges_the_best_pair_first() -> None:
    special = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    octets = [(f"<0x{i:02X}>".encode(), 0.0) for i in range(256)]
    pieces = [(b" ", -9.0), (b"a", -9.0), (b"b", -9.0), (b"ab", -2.0), (b"ba", -1.0), (b" a", -3.0), (b" ab", -4.0)]
    tokenizer = PieceTokenizer([*special, *octets, *pieces])
    at = {piece: 259 + i for i, (piece, _) in enumerate(pieces)}
    # "ba" scores above "ab", so " abab" becomes " a" + "ba" + "b".
    assert tokenizer.encode("abab") == [1, at[b" a"], at[b"ba"], at[b"b"]]
    assert tokenizer.encode("ab") == [1, at[b" ab"]]
    assert tokenizer.encode("") == [1]
    for text in ("abab", "a\nb", "é", " a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day"


def test_stories260k_decodes_as_documented(real_data: object) -> None:
    before = torch.get_rng_state()
    model = TinyLM.stories260k()
    assert torch.equal(before, torch.get_rng_state())
    assert sum(p.numel() for p in model.parameters()) == 260_032
    ids = model.encode(STORY)
    written = model.generate(torch.tensor([[1]]), len(ids) - 1)[0]
    assert model.decode(written) == STORY
    assert torch.equal(written, ids), "the tokenizer writes what the model writes"
