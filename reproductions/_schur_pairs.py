"""Pairs for Schur complement entropy: prompts with sentences that follow them, class names with images, and LEACE.

Sentences of WikiText-2 and their MiniLM vectors; Fashion-MNIST through the last feature maps of the ResNet-20 that
was trained on CIFAR-10, means of the four quarters; the 80 class names of COCO, in the order of CLIP's vectors.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from quernel import data
from quernel.models import ResNet20
from quernel.models.resnet20 import MEAN, STD

ROOT = Path(__file__).resolve().parents[1]
Vectors = NDArray[np.float32]
FOLLOWING = 8
LEACE = "concept-erasure==0.2.4"
COCO = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "television", "laptop", "mouse", "remote control", "keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
]  # fmt: skip
FASHION = [
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]  # in the order of the labels


@functools.cache
def articles() -> tuple[tuple[str, ...], ...]:
    """Return the sentences of every article, at least eight words each, without unknown words."""
    found: list[list[str]] = []
    for split in ("validation", "test"):
        tokens = data.load("wikitext2", split=split)
        line: list[str] = []
        for word in tokens.words:
            if word != tokens.end:
                line.append(word)
                continue
            if line[:1] == ["="]:
                if line[1] != "=":
                    found.append([])
            elif found:
                found[-1] += _sentences(line)
            line = []
    return tuple(map(tuple, found))


def _sentences(words: list[str]) -> list[str]:
    found, held = [], []
    for word in words:
        held.append(word)
        if word == ".":
            if len(held) > 8 and "<unk>" not in held:
                found.append(" ".join(held))
            held = []
    return found


def topics(seed: int, count: int) -> list[tuple[str, str, list[str]]]:
    """Return (prompt, rest of its sentence, eight sentences that follow, in random order), each of another article."""
    draw = np.random.default_rng(seed)
    found = []
    for i in draw.permutation(len(articles())):
        sentences = articles()[i]
        starts = [s for s in range(len(sentences) - FOLLOWING) if _clause(sentences[s])]
        if starts and len(found) < count:
            start = int(draw.choice(starts))
            order = draw.permutation(FOLLOWING) + start + 1
            cut = _clause(sentences[start])
            words = sentences[start].split()
            found.append((" ".join(words[:cut]), " ".join(words[cut + 1 :]), [sentences[j] for j in order]))
    if len(found) < count:
        raise ValueError(f"only {len(found)} articles have {FOLLOWING + 1} sentences")
    return found


def _clause(sentence: str) -> int:
    """Return how many words stand before the first comma, if 4 to 12 do and five follow; else 0."""
    words = sentence.split()
    cut = words.index(",") if "," in words else 0
    return cut if 4 <= cut <= 12 and len(words) - cut > 5 else 0


@functools.cache
def _encoder() -> ResNet20:
    return ResNet20.load_pretrained()


def image_vectors(pixels: np.ndarray) -> Vectors:
    """Return (n, 256): feature maps of grey images (n, 28, 28), averaged over quarters."""
    model = _encoder()
    mean, std = (torch.tensor(value).reshape(1, 3, 1, 1) for value in (MEAN, STD))
    rows = []
    for part in np.array_split(pixels, max(1, len(pixels) // 250)):
        images = F.pad(torch.from_numpy(part).float()[:, None] / 255, (2, 2, 2, 2))
        with torch.inference_mode():
            x = F.relu(model.bn1(model.conv1((images.expand(-1, 3, -1, -1) - mean) / std)))
            maps = model.layer3(model.layer2(model.layer1(x)))
            rows.append(F.adaptive_avg_pool2d(maps, 2).flatten(1))
    return torch.cat(rows).numpy()


@functools.cache
def turned_images(split: str, count: int, seed: int) -> tuple[Vectors, NDArray[np.int64], NDArray[np.int64]]:
    """Return vectors of images turned by a random quarter, their classes, and the quarters."""
    held = data.load("fashion-mnist", split=split)
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(held.x))[:count]
    quarter = draw.integers(0, 4, count)
    pixels = np.stack([np.rot90(held.x[i], q) for i, q in zip(chosen, quarter, strict=True)])
    return image_vectors(pixels), held.y[chosen], quarter


def erased_by_leace(x: Vectors, labels: NDArray[np.int64], held: Vectors) -> list[Vectors]:
    """Return x and held after concept-erasure's LEACE, fitted on x and one-hot labels, in an environment of its own."""
    sys.path.append(str(ROOT))
    from benchmarks._peers import PeerUnavailable, peer_python
    from benchmarks._process import in_fresh_process
    from quernel._errors import MissingExtraError

    try:
        python = peer_python(LEACE)
    except PeerUnavailable as error:
        raise MissingExtraError(f"the peer {LEACE}", "peers") from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vectors.npz"
        np.savez(file, x=x, labels=labels, held=held)
        in_fresh_process(__file__, "_leace", str(file), python=python)
        with np.load(file) as found:
            return [found["x"], found["held"]]


def _leace(file: str) -> None:
    from concept_erasure import LeaceEraser

    with np.load(file) as given:
        arrays = {name: torch.from_numpy(given[name]) for name in ("x", "labels", "held")}
    eraser = LeaceEraser.fit(arrays["x"].double(), F.one_hot(arrays["labels"]).double())
    erased = {name: eraser(arrays[name].double()).float().numpy() for name in ("x", "held")}
    np.savez(file, **erased)
