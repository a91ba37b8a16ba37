"""Reproduce PairConnect (arXiv 2106.08235) on a laptop: language models of pairs against small Transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import _pair_language as language
from _harness import Outcome, Reproduction, at_most
from _kneser_ney import KneserNey
from torch import nn

from quernel.models import PairConnectLM

pairconnect = Reproduction("pairconnect", paper="2106.08235")

STEPS = {"characters": 600, "words": 1000}
TUNING_STEPS = 60
# Six settings for every model; ours has a second rate, of its tables.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "transformer": {"rate": (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2)},
    "pairs": {"rate": (2e-3, 5e-3), "table_rate": (3e-3, 1e-2, 3e-2)},
}
WORD_ROWS, WORD_DISTANCES = 500_000, 8
TOKENS = language.LENGTH * language.BATCH
SIZES = f"width {language.DIM}, 2 layers, window {language.WINDOW}"
TWO_LAYERS, ONE_LAYER = "2-layer Transformer", "1-layer Transformer"
OURS, TENTH = "PairConnect, 2 layers", "the same in a ROBE array of a tenth"


def corpus(name: str) -> language.Corpus:
    return language.characters() if name == "characters" else language.words()


def maker(name: str, model: str) -> tuple[str, Callable[[], nn.Module]]:
    """Return the kind of a model and the function that makes it."""
    vocab = corpus(name).vocab
    if model in (ONE_LAYER, TWO_LAYERS):
        return "transformer", partial(language.Transformer, vocab, 1 if model == ONE_LAYER else 2)
    rows = None if name == "characters" else WORD_ROWS
    distances = language.WINDOW if name == "characters" else WORD_DISTANCES
    ratio = 10 if model == TENTH else 1
    return "pairs", partial(language.ours, vocab, 2, ratio=ratio, rows=rows, distances=distances)


@functools.cache
def setting(name: str, model: str) -> tuple[tuple[str, float], ...]:
    kind, make = maker(name, model)
    return tuple(language.best_setting(make, corpus(name), GRIDS[kind], TUNING_STEPS).items())


@functools.cache
def measured(name: str, model: str, seed: int) -> tuple[float, dict[str, Any]]:
    """Train a model with its best rates; return its loss and a row of the table."""
    _, make = maker(name, model)
    text, chosen = corpus(name), setting(name, model)
    made = language.trained(make, text, steps=STEPS[name], seed=seed, **dict(chosen))
    loss = language.loss_of(made, text.judging)
    tables = made.table_bytes if isinstance(made, PairConnectLM) else 0
    bytes_held = sum(p.nbytes for p in made.parameters())
    row = {
        "model": model,
        "loss": f"{loss:.4f}",
        "perplexity": f"{math.exp(loss):.2f}",
        "table MB": f"{tables / 1e6:.1f}",
        "other MB": f"{(bytes_held - tables) / 1e6:.2f}",
        "rates": ", ".join(f"{key}={value:g}" for key, value in chosen),
    }
    return loss, row


@functools.cache
def counted(name: str, order: int) -> float:
    """Return the loss of a Kneser-Ney model, which needs no tuning."""
    text = corpus(name)
    return KneserNey(text.train.numpy(), order, text.vocab).loss(text.judging.numpy())


BEATS = ("at most the 1-layer Transformer", "better than the bigram model", "better than Kneser-Ney 3-gram")


def compared(name: str, seed: int) -> tuple[float, float, dict[str, bool], list[dict[str, Any]]]:
    """Return our loss, that of the 2-layer Transformer, the checks and the table."""
    found = {model: measured(name, model, seed) for model in (OURS, TWO_LAYERS, ONE_LAYER)}
    bigram, trigram = counted(name, 2), counted(name, 3)
    mine = found[OURS][0]
    checks = dict(zip(BEATS, (mine <= found[ONE_LAYER][0], mine < bigram, mine < trigram), strict=True))
    rows = [row for _, row in found.values()]
    counts = (("bigram, Kneser-Ney", bigram), ("3-gram, Kneser-Ney", trigram))
    blank = dict.fromkeys(("table MB", "other MB", "rates"), "")
    rows += [{"model": m, "loss": f"{x:.4f}", "perplexity": f"{math.exp(x):.2f}"} | blank for m, x in counts]
    return mine, found[TWO_LAYERS][0], checks, rows


@pairconnect.claim(
    name="characters",
    claim="Language modelling by pair embeddings is as good as by Transformers",
    scale=f"{SIZES}, 65^2 x 32 exact pairs, {STEPS['characters'] * TOKENS / 1e6:.1f} M tokens, rates tuned",
    data="tinyshakespeare by characters, last 5 %",
    metric="loss (nats a character)",
    baseline="2-layer Transformer of equal width and tokens",
    rule=at_most(0.10, of="ours - baseline"),
    checks=BEATS,
    seeds=(0, 1),
)
def characters(seed: int) -> Outcome:
    return Outcome(*compared("characters", seed))


@pairconnect.claim(
    name="words",
    claim="With hashed pairs of words the perplexity is comparable to that of Transformers",
    scale=f"{SIZES}, 500,000 rows a layer, {STEPS['words'] * TOKENS / 1e6:.1f} M tokens, rates tuned",
    data="Brown corpus, 4,096 words, held-out twentieths (stand-in for WikiText-2, whose training part is missing)",
    metric="perplexity",
    baseline="2-layer Transformer of equal width and tokens",
    rule=at_most(1.10, of="ours / baseline"),
    checks=BEATS,
    seeds=(0, 1),
)
def words(seed: int) -> Outcome:
    mine, other, checks, rows = compared("words", seed)
    return Outcome(math.exp(mine), math.exp(other), checks, rows)


@pairconnect.claim(
    name="memory",
    claim="Pair tables as views of one array of a tenth of their size lose next to nothing",
    scale="the character model, its two tables in one ROBE array",
    data="tinyshakespeare by characters, last 5 %",
    metric="loss (nats a character)",
    baseline="tables of their own",
    rule=at_most(0.03, of="ours - baseline"),
    seeds=(0, 1),
)
def memory(seed: int) -> Outcome:
    (small, row), (whole, other) = (measured("characters", model, seed) for model in (TENTH, OURS))
    return Outcome(small, whole, rows=[row, other])


if __name__ == "__main__":
    raise SystemExit(pairconnect.main())
