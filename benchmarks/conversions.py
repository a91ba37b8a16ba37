"""Token mixers put into existing networks, trained further for a moment: the score before, between and after.

``python -m benchmarks.conversions [--write] [--only NAME]``: a small ConvNeXt trained here on Fashion-MNIST and MiniLM
with its own weights are converted by ``quernel.compress.convert``; a ConvNeXt-tiny of random weights, for which there
are no weights at hand, says what the conversion does to the time at the size people use.  ``--write`` puts the figures
into ``benchmarks/conversions.json``, from which the page on token mixers is drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quernel import data, models
from quernel._timing import loaded, threads
from quernel.compress import convert
from quernel.nn import ChannelsFirst, EncoderMixer, InceptionDWConv2d, make_mixer

RESULTS = Path(__file__).resolve().with_suffix(".json")
IMAGES, BATCH, EPOCHS, MORE = 10_000, 64, 4, 1
MEAN, STD = 0.286, 0.353
RATE, LESS = 3e-3, 1e-3
SENTENCES, STEPS, DISTILLING = 32, 300, 3e-4


def is_depthwise(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (7, 7)


class Fitted(nn.Module):
    """A split convolution as ``from_depthwise`` fits it: channels in its order, scaled and shifted, and put back."""

    order: Tensor
    back: Tensor

    def __init__(self, fit: Any) -> None:
        super().__init__()
        self.mixer = ChannelsFirst(fit.mixer)
        self.scale = nn.Parameter(fit.scale[:, None, None].clone())
        self.shift = nn.Parameter(fit.shift[:, None, None].clone())
        self.register_buffer("order", fit.permutation)
        self.register_buffer("back", fit.permutation.argsort())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.addcmul(self.shift, self.scale, self.mixer(x[:, self.order]))
        return y[:, self.back]


def split_of(old: Any) -> nn.Module:
    """Return the split convolution nearest to a depthwise one; each channel goes to the branch that fits it best."""
    return Fitted(InceptionDWConv2d.from_depthwise(old))


def convnext(depths: tuple[int, ...], dims: tuple[int, ...], **options: Any) -> nn.Module:
    """Return an untrained network of ConvNeXt's blocks, channels last."""

    def mixer(dim: int) -> nn.Module:
        return nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.MetaNeXt(depths, dims, mixer, **options).to(memory_format=torch.channels_last).eval()


def convnext_tiny() -> dict[str, Any]:
    """Time alone: no weights at hand."""
    net = convnext((3, 3, 9, 3), (96, 192, 384, 768))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    # Random kernels have no order to keep.
    result = convert(net, is_depthwise, lambda old: ChannelsFirst(InceptionDWConv2d(old.in_channels)), example_inputs=x)
    return _row("ConvNeXt-tiny, random weights", "depthwise 7x7 to InceptionDWConv2d", "one image of 224 x 224", result)


def convnext_small() -> dict[str, Any]:
    """Train on Fashion-MNIST, convert, train one more epoch."""
    x, y, test_x, test_y = _images()
    net = convnext((2, 2, 2), (32, 64, 128), stem_stride=2, in_channels=1, num_classes=10)
    _train(net, x, y, EPOCHS, RATE)
    between: list[float] = []

    def accuracy(model: nn.Module) -> float:
        with torch.inference_mode():
            right = [(model(a).argmax(1) == b).sum() for a, b in zip(test_x.split(250), test_y.split(250), strict=True)]
        return float(torch.stack(right).sum()) / len(test_x)

    def further(model: nn.Module) -> None:
        between.append(accuracy(model.eval()))
        _train(model, x, y, MORE, LESS)

    result = convert(net, is_depthwise, split_of, example_inputs=test_x[:64], evaluate=accuracy, finetune=further)
    what = f"64 images of 28 x 28; {MORE} epoch of {IMAGES:,} images"
    return _row("ConvNeXt blocks on Fashion-MNIST", "depthwise 7x7 to InceptionDWConv2d", what, result, between[0])


def minilm() -> dict[str, Any]:
    """Put linear attention into MiniLM and let it learn its old vectors of training sentences."""
    net = models.MiniLM.load_pretrained().eval()
    task = models.task(net, "stsb")
    pairs = data.load("stsb", split="train")
    sentences = list(dict.fromkeys((*pairs.first, *pairs.second)))
    between: list[float] = []

    def further(model: nn.Module) -> None:
        between.append(task.judge(model.eval()))
        draw = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=DISTILLING)
        for step in _steps(STEPS, optimizer, DISTILLING):
            rows = torch.randint(len(sentences), (SENTENCES,), generator=draw).tolist()
            batch = net.tokenize([sentences[i] for i in rows])
            with torch.no_grad():
                wanted = net(**batch)
            (1 - F.cosine_similarity(model(**batch), wanted)).mean().backward()
            step()
        model.eval()

    result = convert(
        net,
        lambda name, m: name.endswith("attention.self"),
        lambda old: EncoderMixer(_like(old)),
        example_inputs=task.example_inputs,
        evaluate=task.judge,
        finetune=further,
    )
    what = f"32 sentences of 64 tokens; {STEPS} steps towards its own vectors"
    return _row("MiniLM on STS-B", "softmax attention to nalaformer", what, result, between[0])


def _like(old: Any) -> Any:
    """Return linear attention of as many channels and heads as BERT's attention has."""
    return make_mixer("nalaformer", old.query.in_features, num_heads=old.num_attention_heads, lepe=None)


CONVERSIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "convnext-tiny": convnext_tiny,
    "convnext-small": convnext_small,
    "minilm": minilm,
}


def _row(network: str, change: str, what: str, result: Any, between: float | None = None) -> dict[str, Any]:
    report = result.report
    return {
        "network": network,
        "change": change,
        "layers": len(result.recipe["converted"]),
        "measured_on": what,
        "metric": report.metric,
        "before": report.metric_before,
        "between": between,
        "after": report.metric_after,
        "ms_before": report.latency_ms_before,
        "ms_after": report.latency_ms_after,
        "flops_before": report.summary.get("FLOPs before"),
        "flops_after": report.summary.get("FLOPs after"),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
    }


def _images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts: list[Tensor] = []
    for split, count in (("train", IMAGES), ("test", None)):
        held = data.load("fashion-mnist", split=split)
        x = (torch.as_tensor(held.x[:count]).float().reshape(-1, 1, 28, 28) / 255 - MEAN) / STD
        parts += [x.contiguous(memory_format=torch.channels_last), torch.as_tensor(held.y[:count]).long()]
    return parts[0], parts[1], parts[2], parts[3]


def _train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    model.train()
    for step in _steps(epochs * len(x) // BATCH, optimizer, rate):
        rows = torch.randint(len(x), (BATCH,), generator=draw)
        F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.05).backward()
        step()
    model.eval()


def _steps(count: int, optimizer: torch.optim.Optimizer, rate: float) -> Iterator[Callable[[], None]]:
    """Yield ``count`` times what ends a step; the rate rises for a tenth of them and falls to zero."""

    def step() -> None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for i in range(count):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(10 * (i + 1) / count, 1 - i / count)
        yield step


def main() -> int:
    """Convert, print, and write if asked; 4 on a loaded machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversions", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--only", choices=CONVERSIONS, action="append")
    options = parser.parse_args()
    if busy := loaded():
        sys.stderr.write(f"the machine is busy, times will be missing: {busy}\n")
        if options.write:
            return 4
    held = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else {}
    for name in options.only or CONVERSIONS:
        with threads(1):
            held[name] = CONVERSIONS[name]() | {"date": time.strftime("%Y-%m-%d")}
        sys.stdout.write(f"{name}: {json.dumps(held[name])}\n")
    if options.write:
        RESULTS.write_text(json.dumps({"rows": held}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
