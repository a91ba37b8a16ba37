"""CrossQuant on all-MiniLM-L6-v2 and on small language models (arXiv 2410.07505).

The paper's models have 7 to 70 billion parameters and strong outlier channels; MiniLM has mild ones, so its gains
over SmoothQuant are small. The language model gets outlier channels by a change that keeps its function: four
gains of every norm times 30, the columns that read them over 30.

Differences from the paper: real int8 layers wherever a loss is measured (the paper's are simulated), static scales
from 64 calibration sentences, weights in 8 bits throughout.

Read the 4-bit comparison with care: ``alpha="auto"`` picks an exponent for each layer, while SmoothQuant keeps its
published 0.5. That favours CrossQuant, and the margin asked for is still not reached.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _harness import Outcome, Reproduction, at_least, at_most
from safetensors import safe_open
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data, models
from quernel.compress import Context, CrossQuant, Method, SmoothQuant
from quernel.nn.functional.activation_quant import quantization_kernel
from quernel.nn.linear.crossquant import channel_scale
from quernel.testing import inject_outliers

BITS = (8, 6, 5, 4)
CALIBRATION, TEST = 64, 96
OUTLIERS, FACTOR = 4, 30.0

crossquant = Reproduction("crossquant", paper="2410.07505")


@functools.cache
def encoder() -> nn.Module:
    return models.load("minilm")


@functools.cache
def sentences(seed: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return calibration and test batches of distinct sentences, drawn with the seed."""
    draw = np.random.default_rng(seed)
    batches = []
    for split, count in (("train", CALIBRATION), ("test", TEST)):
        pairs = data.load("stsb", split=split)
        distinct = sorted({*pairs.first, *pairs.second})
        chosen = [distinct[i] for i in draw.choice(len(distinct), count, replace=False)]
        batches.append([encoder().tokenize(chosen[i : i + 32]) for i in range(0, count, 32)])
    return batches[0], batches[1]


def quantised(model: nn.Module, method: Method, batches: list[Any]) -> nn.Module:
    work = copy.deepcopy(model)
    method.apply(work, method.plan(work, Context(batches)))
    return work


def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([F.normalize(model(**batch).float(), dim=-1) for batch in batches])


@functools.cache
def layer_inputs(seed: int, calibration: bool) -> dict[str, Tensor]:
    """Return the inputs of all linear layers, padding left out, (tokens, features) each."""
    rows: dict[str, list[Tensor]] = {}
    mask = None

    def keep(name: str, x: Tensor) -> None:
        rows.setdefault(name, []).append(x[mask])

    model = encoder()
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [
        m.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0].detach())) for name, m in linears
    ]
    with torch.inference_mode():
        for batch in sentences(seed)[0 if calibration else 1]:
            mask = batch["attention_mask"].bool()
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@functools.cache
def kernels(seed: int, bits: int) -> list[dict[str, Any]]:
    """Return the share of zero codes of each layer under the three schemes."""
    table = []
    for name, x in layer_inputs(seed, False).items():
        weight = encoder().get_submodule(name).weight.detach()
        absmax = layer_inputs(seed, True)[name].abs().amax(0)
        smooth = channel_scale(absmax, 0.5) / channel_scale(weight.abs().amax(0), 0.5)
        table.append(
            {
                "layer": name,
                "CrossQuant": quantization_kernel(x, bits, "cross"),
                "SmoothQuant": quantization_kernel(x / smooth, bits, "token"),
                "per token": quantization_kernel(x, bits, "token"),
            }
        )
    return table


def mean_kernel(seed: int, bits: int, scheme: str) -> float:
    return float(np.mean([row[scheme] for row in kernels(seed, bits)]))


@crossquant.claim(
    name="kernel",
    claim="Fewer activations round to zero than with per-token or SmoothQuant scales",
    scale="all-MiniLM-L6-v2, 36 linear layers, batch maxima, 96 sentences",
    data="STS-B test",
    metric="share of zero codes, 8 bits",
    baseline="per token",
    rule=at_most(1.0, of="ours / baseline"),
    checks=tuple(f"CrossQuant < SmoothQuant < per token at A{bits}" for bits in (8, 6, 4)),
    seeds=(0, 1, 2),
)
def kernel(seed: int) -> Outcome:
    share = {(b, s): mean_kernel(seed, b, s) for b in (8, 6, 4) for s in ("CrossQuant", "SmoothQuant", "per token")}
    return Outcome(
        ours=share[8, "CrossQuant"],
        baseline=share[8, "per token"],
        checks={
            f"CrossQuant < SmoothQuant < per token at A{b}": share[b, "CrossQuant"]
            < share[b, "SmoothQuant"]
            < share[b, "per token"]
            for b in (8, 6, 4)
        },
        rows=kernels(seed, 8),
        notes=[
            f"A{b}: {share[b, 'CrossQuant']:.1%} / {share[b, 'SmoothQuant']:.1%} / {share[b, 'per token']:.1%}"
            for b in (8, 6, 4)
        ],
    )


METHODS: dict[str, Any] = {
    "CrossQuant auto": lambda bits: CrossQuant(alpha="auto", abits=bits, activations="keep"),
    "CrossQuant 0.15": lambda bits: CrossQuant(abits=bits, activations="keep"),
    "SmoothQuant": lambda bits: SmoothQuant(abits=bits, activations="keep"),
    "per token": lambda bits: CrossQuant(alpha=1.0, abits=bits, activations="keep"),
}


@functools.cache
def cosine(seed: int, name: str, bits: int) -> float:
    """Return the mean cosine to the float32 embeddings, all layers in int8 with activation codes of ``bits``."""
    calibration, test = sentences(seed)
    method = METHODS[name](bits)
    got, wanted = embeddings(quantised(encoder(), method, calibration), test), embeddings(encoder(), test)
    return float((got * wanted).sum(1).mean())


@crossquant.claim(
    name="encoder-a8",
    claim="The loss of int8 activations is negligible",
    scale="all-MiniLM-L6-v2, real int8 layers with bfloat16 between them, 64 calibration sentences",
    data="STS-B test, 1379 pairs",
    metric="Spearman x 100",
    baseline="float32",
    rule=at_most(0.2, of="baseline - ours"),
    checks=("alpha=auto within 0.0005 cosine of SmoothQuant-0.5",),
    seeds=(0, 1, 2),
)
def encoder_a8(seed: int) -> Outcome:
    task = models.task(encoder(), "stsb")
    ours = task.judge(quantised(encoder(), CrossQuant(), sentences(seed)[0]))
    at_8 = {name: cosine(seed, name, 8) for name in METHODS}
    return Outcome(
        ours=100 * ours,
        baseline=100 * task.judge(encoder()),
        checks={
            "alpha=auto within 0.0005 cosine of SmoothQuant-0.5": at_8["CrossQuant auto"]
            >= at_8["SmoothQuant"] - 0.0005
        },
        notes=[f"cosine at A8, {name}: {value:.5f}" for name, value in at_8.items()],
    )


@crossquant.claim(
    name="encoder-a4",
    claim="A tuned exponent keeps more at 4-bit activations than SmoothQuant or per-token scales",
    scale="all-MiniLM-L6-v2, int8 weights, static scales, 96 sentences",
    data="STS-B test",
    metric="mean cosine to float32 embeddings",
    baseline="SmoothQuant-0.5",
    rule=at_least(0.01, of="ours - baseline", partly=0.0),
    checks=("0.05 above per token",),
    seeds=(0, 1, 2),
)
def encoder_a4(seed: int) -> Outcome:
    at_4 = {name: cosine(seed, name, 4) for name in METHODS}
    return Outcome(
        ours=at_4["CrossQuant auto"],
        baseline=at_4["SmoothQuant"],
        checks={"0.05 above per token": at_4["CrossQuant auto"] >= at_4["per token"] + 0.05},
        rows=[{"bits": b, **{name: cosine(seed, name, b) for name in METHODS}} for b in BITS],
    )


@crossquant.claim(
    name="kernel-predicts-loss",
    claim="The share of zero codes predicts the loss of an activation quantiser",
    scale="all-MiniLM-L6-v2; per token, SmoothQuant, CrossQuant at 8, 6, 5, 4 bits",
    data="STS-B test",
    metric="rank correlation of kernel and 1 - cosine",
    baseline="no relation",
    rule=at_least(0.8, of="ours"),
    seeds=(0, 1, 2),
)
def kernel_predicts_loss(seed: int) -> Outcome:
    schemes = {"CrossQuant": "CrossQuant 0.15", "SmoothQuant": "SmoothQuant", "per token": "per token"}
    pairs = list(itertools.product(schemes, BITS))
    shares = [mean_kernel(seed, bits, scheme) for scheme, bits in pairs]
    losses = [1 - cosine(seed, schemes[scheme], bits) for scheme, bits in pairs]
    return Outcome(ours=float(spearmanr(shares, losses).statistic), baseline=0.0)


@crossquant.claim(
    name="bytes",
    claim="The int8 weights with their scales take a quarter of the bytes",
    scale="all-MiniLM-L6-v2, 36 linear layers, tensors in the saved file",
    data="STS-B train, for calibration",
    metric="bytes on disk",
    baseline="float32",
    rule=at_most(0.27, of="ours / baseline"),
    seeds=(0,),
)
def stored(seed: int) -> Outcome:
    names = [name for name, m in encoder().named_modules() if isinstance(m, nn.Linear)]
    sizes = []
    for model in (quantised(encoder(), CrossQuant(), sentences(seed)[0]), encoder()):
        with tempfile.TemporaryDirectory() as folder:
            models.save(model, folder)
            with safe_open(Path(folder) / "model.safetensors", "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sizes.append(sum(t.nbytes for key, t in tensors.items() if any(key.startswith(f"{n}.") for n in names)))
    return Outcome(ours=float(sizes[0]), baseline=float(sizes[1]))


@functools.cache
def language_model() -> tuple[nn.Module, Any]:
    model = models.load("tiny-lm")
    return model, models.task(model, "tinyshakespeare")


@crossquant.claim(
    name="language-model",
    claim="With outlier channels, int8 per-token activations break a language model and CrossQuant does not",
    scale="tiny Llama-type model, outlier channels injected (4 gains of every norm x 30), real int8, static scales",
    data="tinyshakespeare",
    metric="perplexity, characters",
    baseline="the model in float32",
    rule=at_most(1.01, of="ours / baseline"),
    checks=(
        "per token loses at least 1 % more than CrossQuant",
        "within 1 % also with the division folded into the norms",
        "the injection keeps the function",
    ),
    seeds=(0, 1, 2),
)
def language(seed: int) -> Outcome:
    model, task = language_model()
    batches = list(task.calibration)
    outlier = inject_outliers(model, batches, channels=OUTLIERS, factor=FACTOR, seed=seed)
    perplexity = {
        "float32": math.exp(-task.judge(outlier)),
        "CrossQuant": math.exp(-task.judge(quantised(outlier, METHODS["CrossQuant 0.15"](8), batches))),
        "CrossQuant folded": math.exp(
            -task.judge(quantised(outlier, CrossQuant(mode="fold", activations="keep"), batches))
        ),
        "per token": math.exp(-task.judge(quantised(outlier, METHODS["per token"](8), batches))),
    }
    original = math.exp(-task.judge(model))
    return Outcome(
        ours=perplexity["CrossQuant"],
        baseline=perplexity["float32"],
        checks={
            "per token loses at least 1 % more than CrossQuant": perplexity["per token"]
            >= perplexity["CrossQuant"] + 0.01 * perplexity["float32"],
            "within 1 % also with the division folded into the norms": perplexity["CrossQuant folded"]
            <= 1.01 * perplexity["float32"],
            "the injection keeps the function": abs(perplexity["float32"] / original - 1) < 1e-4,
        },
        notes=[f"{name}: {value:.4f}" for name, value in perplexity.items()],
    )


if __name__ == "__main__":
    raise SystemExit(crossquant.main())
