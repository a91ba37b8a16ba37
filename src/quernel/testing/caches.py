"""Conformance of caches: held against the plain cache where nothing is left out, and kept honest beyond.

A Llama of random weights, small and seeded, decodes through the cache.  Weights are scaled up so that attention is far
from uniform: a cache that loses or repeats a token gives other numbers.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from quernel._errors import QuernelError
from quernel._registry import example_of
from quernel.testing._suite import global_generators_untouched, require, require_close, run_all

VOCAB, NEW = 64, 12
# Numbers of a random model's logits are of order one; sums over the same tokens in another order.
SAME = 2e-5
BF16 = 0.15
# Rounding can turn a choice, of channels or of tokens, and with it an answer; answers to something else differ by 1.4.
TURNED = 0.6


def check_cache(cls: type) -> None:
    """Run every check of the ``cache`` contract.

    The registered ``example()`` returns ``{"make": (config) -> cache}`` and ``"exact_to"``: the number of tokens up to
    which the cache promises the plain cache's answers (None: at every length), at least 20.
    """
    run_all(cls, "cache")


def check_exact_where_promised(cls: type) -> None:
    """Short contexts give the plain cache's logits at every step, with grouped heads and without."""
    for key_heads in (1, 2, 4):
        model = _model(key_heads)
        prompt = _ids(1, _exact(cls) - NEW - 2)
        require_close(
            cls,
            f"{key_heads} key heads",
            _logits(model, _make(cls, model), prompt),
            _logits(model, None, prompt),
            atol=SAME,
        )


def check_left_padding(cls: type) -> None:
    """A padded batch gives every row the answers of the plain cache."""
    model = _model()
    prompt = _ids(3, _exact(cls) - NEW - 2)
    mask = torch.ones_like(prompt)
    mask[1, :3], mask[2, : prompt.shape[1] - 2] = 0, 0
    got, wanted = (_logits(model, cache, prompt, mask) for cache in (_make(cls, model), None))
    require_close(cls, "a batch with left padding", got, wanted, atol=SAME)


def check_a_row_does_not_see_the_others(cls: type) -> None:
    """Beyond what is exact too, a padded row of a batch answers as it does alone."""
    model = _model()
    prompt = _ids(2, 90)
    mask = torch.ones_like(prompt)
    mask[1, :40] = 0
    together = _logits(model, _make(cls, model), prompt, mask)
    alone = _logits(model, _make(cls, model), prompt[1:, 40:], forced=together[1:].argmax(-1))
    require_close(cls, "a row beside another", together[1:], alone, atol=SAME)


def check_chunks(cls: type) -> None:
    """A prompt in chunks, and a second turn on the same cache, give the plain cache's answers where these are exact."""
    model = _model()
    prompt = _ids(2, _exact(cls) - NEW - 2)
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    answers = []
    for cache in (_make(cls, model), _plain(model)):
        with _inside(model, cache), torch.no_grad():
            parts = []
            for start, stop in ((0, 5), (5, 6), (6, 7), (7, prompt.shape[1])):
                parts.append(model(prompt[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
        logits = torch.cat(parts, dim=1)
        answers.append(logits * mask[..., None])
        require(cache.get_seq_length() == prompt.shape[1], cls, f"get_seq_length is {cache.get_seq_length()}")
    require_close(cls, "a prompt in chunks", answers[0], answers[1], atol=SAME)


def check_generate(cls: type) -> None:
    """``generate`` gives the plain cache's tokens, and goes on from a cache that holds a turn already."""
    model = _model()
    prompt = _ids(2, 6)
    turns = []
    for cache in (_make(cls, model), _plain(model)):
        with _inside(model, cache):
            first = model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False)
            more = torch.cat((first, _ids(2, 3, seed=5)), dim=1)
            turns.append(model.generate(more, past_key_values=cache, max_new_tokens=4, do_sample=False))
    require(torch.equal(*turns), cls, "generate gives other tokens than with the plain cache")


def check_generate_with_left_padding(cls: type) -> None:
    """``generate`` on a padded batch gives the plain cache's tokens, in the first turn and in one that follows."""
    model = _model()
    prompt = _ids(3, 7)
    mask = torch.ones_like(prompt)
    mask[1, :2], mask[2, :5] = 0, 0
    turns = []
    for cache in (_make(cls, model), _plain(model)):
        with _inside(model, cache):
            first = _generated(model, cache, prompt, mask, 3)
            more = torch.cat((first, _ids(3, 3, seed=5)), dim=1)
            seen = torch.cat((mask, mask.new_ones(3, more.shape[1] - mask.shape[1])), dim=1)
            turns.append(_generated(model, cache, more, seen, 4))
    require(torch.equal(*turns), cls, "generate on a padded batch gives other tokens than with the plain cache")


def check_beams(cls: type) -> None:
    """Beam search gives the plain cache's tokens, or is refused with a reason."""
    model = _model()
    prompt = _ids(2, 6)
    found = []
    for cache in (_make(cls, model), _plain(model)):
        with _inside(model, cache):
            try:
                found.append(
                    model.generate(prompt, past_key_values=cache, max_new_tokens=6, num_beams=3, do_sample=False)
                )
            except QuernelError as error:
                require("beam" in str(error), cls, f"beam search is refused without a reason: {error}")
                return
    require(torch.equal(*found), cls, "beam search gives other tokens than with the plain cache")


def check_long_contexts(cls: type) -> None:
    """Far beyond any budget the answers are finite, the same again, and draw from no global generator."""
    model = _model()
    prompt = _ids(1, 300)
    with global_generators_untouched(cls, "decoding"):
        caches = [_make(cls, model) for _ in range(2)]
        first, again = (_logits(model, cache, prompt) for cache in caches)
    require(bool(first.isfinite().all()), cls, "a long context gives answers that are not finite")
    require(torch.equal(first, again), cls, "the same context gives other answers the second time")
    require(caches[0].get_seq_length() == 300 + NEW, cls, f"get_seq_length is {caches[0].get_seq_length()}, not 312")
    require(caches[0].layers[0].get_mask_sizes(2) == (302 + NEW, 0), cls, "get_mask_sizes leaves tokens out")


def check_reset(cls: type) -> None:
    """A reset cache is a new one."""
    model = _model()
    prompt = _ids(1, 40)
    cache = _make(cls, model)
    first = _logits(model, cache, prompt)
    cache.reset()
    require(cache.get_seq_length() == 0 and cache.nbytes == 0, cls, "a reset cache holds something")
    require(torch.equal(first, _logits(model, cache, prompt[:, :40])), cls, "a reset cache answers differently")
    cache.reset()
    require_close(cls, "another batch after reset", _logits(model, cache, prompt.expand(2, -1))[:1], first, atol=SAME)


def check_report(cls: type) -> None:
    """The report counts bytes that are there, and the plain cache's for the same tokens."""
    model = _model()
    cache = _make(cls, model)
    require(cache.report().bytes_stored == 0 == cache.nbytes, cls, "an empty cache reports bytes")
    _logits(model, cache, _ids(2, 60))
    report = cache.report()
    tokens = 60 + NEW
    numbers = 2 * model.config.num_key_value_heads * model.config.head_dim * model.config.num_hidden_layers
    require(report.bytes_dense == 2 * tokens * numbers * 4, cls, f"bytes_dense is {report.bytes_dense}")
    stored = sum(_bytes(row.tensors()) for layer in cache.layers for row in layer.rows)
    require(report.bytes_stored == cache.nbytes == stored > 0, cls, "bytes_stored is not what the tensors hold")
    require(0 < report.bytes_resident <= report.bytes_stored, cls, f"bytes_resident is {report.bytes_resident}")
    require(report.tokens == 2 * tokens, cls, f"tokens is {report.tokens}, not {2 * tokens}")


def check_low_precision(cls: type) -> None:
    """A model in bfloat16 keeps its dtype and stays near the plain cache."""
    model = _model().to(torch.bfloat16)
    prompt = _ids(2, _exact(cls) - NEW - 2)
    wanted = _logits(model, None, prompt)
    got = _logits(model, _make(cls, model), prompt, forced=wanted.argmax(-1))
    require(got.dtype == torch.bfloat16, cls, f"answers are {got.dtype}")
    require_close(cls, "bfloat16", got, wanted, atol=BF16, rtol=BF16)


def check_low_precision_of_long_contexts(cls: type) -> None:
    """Beyond what is exact too, where things are left out or packed, bfloat16 answers much as float32 does."""
    low = _model().to(torch.bfloat16)
    same = copy.deepcopy(low).float()
    prompt = _ids(2, 90)
    mask = torch.ones_like(prompt)
    mask[1, :40] = 0
    wanted = _logits(same, _make(cls, same), prompt, mask)
    got = _logits(low, _make(cls, low), prompt, mask, forced=wanted.argmax(-1))
    require(got.dtype == torch.bfloat16, cls, f"answers are {got.dtype}")
    off = float((got.float() - wanted).norm() / wanted.norm())
    require(off <= TURNED, cls, f"answers in bfloat16 differ from those in float32 by {off:.2f} of their length")


def check_attention_is_needed(cls: type) -> None:
    """Without the attention function the first decode step raises; within it the model's own is put back."""
    from quernel.cache import attention

    model = _model()
    cache = _make(cls, model)
    try:
        model.generate(_ids(1, 8), past_key_values=cache, max_new_tokens=3, do_sample=False)
    except QuernelError as error:
        require("attention" in str(error), cls, f"the error does not say what is missing: {error}")
    else:
        require(False, cls, "decoding without the attention function goes on, seeing only the new token")
    before = model.config._attn_implementation
    try:
        with attention(model):
            raise RuntimeError
    except RuntimeError:
        pass
    require(model.config._attn_implementation == before, cls, "the model's own attention is not put back")


def check_refusals(cls: type) -> None:
    """Models with sliding windows, taking tokens back, and another batch are refused with a Quernel error."""
    from transformers import MistralConfig

    model = _model()
    cache = _make(cls, model)
    _logits(model, cache, _ids(2, 10))
    short = MistralConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    for what, word, call in (
        ("a model with sliding windows", "sliding", lambda: example_of(cls)["make"](short)),
        ("crop", "back", lambda: cache.crop(-2)),
        ("another batch", "2 sequences", lambda: _logits(model, cache, _ids(1, 1))),
    ):
        try:
            call()
        except QuernelError as error:
            require(word in str(error), cls, f"{what}: the error does not mention {word!r}: {error}")
        else:
            require(False, cls, f"{what} is not refused")


def _exact(cls: type) -> int:
    return example_of(cls)["exact_to"] or 120


def _make(cls: type, model: Any) -> Any:
    return example_of(cls)["make"](model.config)


def _plain(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _model(key_heads: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        max_position_embeddings=1024,
        attn_implementation="sdpa",
        # No token ends a text early.
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 20
    return model


def _generated(model: Any, cache: Any, ids: Tensor, mask: Tensor, new: int) -> Tensor:
    found: Tensor = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return found


def _ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _inside(model: Any, cache: Any) -> Any:
    """Return the attention block for our caches, and none for the plain one."""
    from contextlib import nullcontext

    from transformers import DynamicCache

    from quernel.cache import attention

    return nullcontext() if isinstance(cache, DynamicCache) else attention(model)


def _logits(model: Any, cache: Any, prompt: Tensor, mask: Tensor | None = None, forced: Tensor | None = None) -> Tensor:
    """Return the logits of a prompt's last token and of ``NEW`` steps; greedy, or along ``forced`` tokens."""
    cache = _plain(model) if cache is None else cache
    mask = torch.ones_like(prompt) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with _inside(model, cache), torch.no_grad():
        out = model(prompt, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]
        logits = [out]
        for step in range(NEW):
            token = out.argmax(-1) if forced is None else forced[:, step : step + 1]
            mask = torch.cat((mask, torch.ones_like(token)), dim=1)
            positions = mask.sum(1, keepdim=True) - 1
            out = model(token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
            logits.append(out)
    return torch.cat(logits, dim=1)


def _bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


CHECKS = {
    "exact_where_promised": check_exact_where_promised,
    "left_padding": check_left_padding,
    "a_row_does_not_see_the_others": check_a_row_does_not_see_the_others,
    "chunks": check_chunks,
    "generate": check_generate,
    "generate_with_left_padding": check_generate_with_left_padding,
    "beams": check_beams,
    "long_contexts": check_long_contexts,
    "reset": check_reset,
    "report": check_report,
    "low_precision": check_low_precision,
    "low_precision_of_long_contexts": check_low_precision_of_long_contexts,
    "attention_is_needed": check_attention_is_needed,
    "refusals": check_refusals,
}
