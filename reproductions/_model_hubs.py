"""Hubs of small generators with one known origin of every query, of images and of texts, and how methods find it.

Images: four groups of Fashion-MNIST classes in five styles, a Gaussian on principal components for each class. Texts:
twelve sources, a trigram sampler for each, started with words of a shared list. The broad ones among them (four
classes) are what weights by prompt are for: the rest of what they draw counts against them otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _sentence_vectors as sentences
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from quernel import data
from quernel.kernels import WeightedRKME
from quernel.kernels.statistics import median_gamma
from quernel.search import ModelIndex

Vectors = NDArray[np.float32]
POINTS = 50
# Groups of classes, 1 to 4 of them.
GROUPS = ((1,), (5, 8), (0, 7, 9), (2, 3, 4, 6))


@dataclass(frozen=True, eq=False)
class Hub:
    """Embedded outputs and prompts of each model, and queries whose model is known.

    ``queries`` holds several images a query, (n, images, d).
    """

    outputs: list[Vectors]
    prompts: list[Vectors]
    queries: Vectors
    asked: Vectors
    wrong: Vectors
    own: NDArray[np.int64]
    gamma: float


def _thick(x: Vectors) -> Vectors:
    return ndimage.grey_dilation(x, size=(1, 3, 3))


STYLES: dict[str, Callable[[Vectors, np.random.Generator], Vectors]] = {
    "inverted": lambda x, draw: 1 - x,
    "rotated": lambda x, draw: ndimage.rotate(x, 30, axes=(1, 2), reshape=False, order=1),
    "blurred": lambda x, draw: ndimage.gaussian_filter(x, (0, 1.5, 1.5)),
    "noisy": lambda x, draw: np.clip(x + 0.25 * draw.standard_normal(x.shape), 0, 1).astype(np.float32),
    "thick": lambda x, draw: _thick(x),
}


@functools.cache
def _fashion(split: str) -> tuple[Vectors, NDArray[np.int64]]:
    held = data.load("fashion-mnist", split=split)
    return held.x.astype(np.float32) / 255, held.y


@functools.lru_cache(maxsize=1)
def images(seed: int, count: int = 1000, outputs: int = 2000, each: int = 4) -> Hub:
    """Return 20 models of 2,000 outputs, and ``count`` queries of ``each`` held-out images in the style of one."""
    draw = np.random.default_rng(seed)
    x, y = _fashion("train")
    held_x, held_y = _fashion("test")
    # The encoder's images and the generators' are different ones.
    order = draw.permutation(len(x))
    public, private = order[:10_000], order[10_000:]
    mixed = np.concatenate(
        [style(x[part], draw) for style, part in zip(STYLES.values(), np.split(public, 5), strict=True)]
    )
    flat = mixed.reshape(len(mixed), -1)
    mean, axes = sentences.principal(flat, 32, centred=True)

    def encoded(pixels: Vectors) -> Vectors:
        return np.asarray((pixels.reshape(len(pixels), -1) - mean) @ axes, np.float32)

    names = sentences.encoded(
        [f"a photo of a {name.lower()}" for name in data.load("fashion-mnist", split="test").classes]
    )
    made: list[tuple[Vectors, Vectors]] = []
    queries, asked, wrong, own = [], [], [], []
    for style in STYLES.values():
        for group in GROUPS:
            parts, labels = [], []
            for label, n in zip(group, _shares(outputs, len(group)), strict=True):
                rows = private[y[private] == label][:1500]
                parts.append(_sampled(style(x[rows], draw).reshape(len(rows), -1), n, draw))
                labels += [label] * n
            made.append((encoded(np.concatenate(parts)), names[labels]))
            n = count // (len(STYLES) * len(GROUPS))
            chosen = draw.choice(group, n)
            for label in chosen:
                rows = draw.choice(np.flatnonzero(held_y == label), each, replace=False)
                queries.append(encoded(style(held_x[rows], draw)))
                asked.append(names[label])
                wrong.append(names[draw.choice([other for other in range(10) if other != label])])
            own += [len(made) - 1] * n
    gamma = median_gamma(encoded(mixed), random_state=seed)
    return Hub(
        [e for e, _ in made],
        [u for _, u in made],
        np.array(queries),
        np.array(asked),
        np.array(wrong),
        np.array(own),
        gamma,
    )


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _sampled(flat: Vectors, n: int, draw: np.random.Generator) -> Vectors:
    """Return n draws from the Gaussian on the first 40 principal components."""
    pca = PCA(40, svd_solver="randomized", random_state=0).fit(flat)
    codes = draw.standard_normal((n, 40)) * np.sqrt(pca.explained_variance_)
    return np.asarray(np.clip(codes @ pca.components_ + pca.mean_, 0, 1), np.float32)


def _sentences_of(words: list[str], end: str) -> list[list[str]]:
    """Cut a stream of words at the ends of lines and at full stops."""
    found: list[list[str]] = [[]]
    for word in words:
        if word in (end, "."):
            found.append([])
        else:
            found[-1].append(word.lower())
    return found


@functools.cache
def sources() -> dict[str, list[list[str]]]:
    """Return the sentences of twelve sources as words, six to forty of them."""
    plays, films = data.load("tinyshakespeare", split="train").text, data.load("sst2", split="train")
    wiki = [w for split in ("validation", "test") for w in data.load("wikitext2", split=split).words]
    brown = list(data.load("brown").words)
    split_text = lambda text: [s.split() for s in text.lower().replace("?", ".").replace("!", ".").split(".")]  # noqa: E731
    held = {
        "plays, first half": split_text(plays[: len(plays) // 2].replace("\n", " ")),
        "plays, second half": split_text(plays[len(plays) // 2 :].replace("\n", " ")),
        "praise of films": [s.split() for s, y in zip(films.text, films.y, strict=True) if y == 1],
        "blame of films": [s.split() for s, y in zip(films.text, films.y, strict=True) if y == 0],
        "aerodynamics": [s for d in data.load("cranfield").documents for s in split_text(d)],
        "electronics": [s for d in data.load("npl").documents for s in split_text(d)],
        "articles, first half": _sentences_of(wiki[: len(wiki) // 2], "<eos>"),
        "articles, second half": _sentences_of(wiki[len(wiki) // 2 :], "<eos>"),
    }
    # The Brown corpus goes from press over essays and learned texts to fiction.
    quarter = len(brown) // 4
    held |= {f"brown, part {i + 1}": _sentences_of(brown[i * quarter : (i + 1) * quarter], "<eos>") for i in range(4)}
    return {name: [s for s in found if 6 <= len(s) <= 40] for name, found in held.items()}


def shared_words(count: int) -> list[str]:
    """Return the words of content that most sources use: those of the largest median frequency over the sources."""
    counts: dict[str, list[float]] = {}
    for found in sources().values():
        words = [w for s in found for w in s if len(w) >= 5 and w.isalpha() and w not in ENGLISH_STOP_WORDS]
        values, numbers = np.unique(words, return_counts=True)
        for word, number in zip(values.tolist(), (numbers / len(words)).tolist(), strict=True):
            counts.setdefault(word, []).append(number)
    middle = {word: float(np.median(seen + [0.0] * (12 - len(seen)))) for word, seen in counts.items()}
    return sorted(middle, key=lambda word: -middle[word])[:count]


class Trigrams:
    """A sampler of sentences: trigrams, where they were seen, else bigrams, else words."""

    def __init__(self, found: list[list[str]]) -> None:
        self.following: dict[tuple[str, ...], list[str]] = {}
        for words in found:
            padded = [*words, "</s>"]
            for i, word in enumerate(padded):
                for order in (0, 1, 2):
                    if i >= order:
                        self.following.setdefault(tuple(padded[i - order : i]), []).append(word)

    def sample(self, start: str, draw: np.random.Generator) -> str:
        """Return a sentence that begins with a word, if the sampler knows it."""
        words = [start] if (start,) in self.following else []
        while len(words) < 25:
            for order in (2, 1, 0):
                history = tuple(words[len(words) - order :]) if order <= len(words) else None
                if history is not None and history in self.following:
                    options = self.following[history]
                    break
            word = options[int(draw.integers(len(options)))]
            if word == "</s>" and len(words) >= 6:
                break
            if word != "</s>":
                words.append(word)
            else:
                words.append(self.following[()][int(draw.integers(len(self.following[()])))])
        return " ".join(words)


@functools.lru_cache(maxsize=1)
def texts(seed: int, count: int = 600, words: int = 40, samples: int = 10) -> Hub:
    """Return 12 models of 400 sentences, and ``count`` held-out sentences, each with the nearest word as its prompt."""
    draw = np.random.default_rng(seed)
    starts = shared_words(words)
    prompts = sentences.encoded(starts)
    outputs, shown, queries, own = [], [], [], []
    for i, found in enumerate(sources().values()):
        order = draw.permutation(len(found))
        held = len(found) // 10
        model = Trigrams([found[j] for j in order[held:]])
        made = [model.sample(start, draw) for start in starts for _ in range(samples)]
        outputs.append(sentences.encoded(made))
        shown.append(np.repeat(prompts, samples, 0))
        n = count // 12
        queries.append(sentences.encoded([" ".join(found[j]) for j in order[:n]]))
        own += [i] * n
    q = np.concatenate(queries)
    # The interrogator: which word of the list is nearest to the sentence.
    ranked = np.argsort(-(q @ prompts.T), axis=1)
    gamma = median_gamma(np.concatenate(outputs), random_state=seed)
    return Hub(outputs, shown, q[:, None], prompts[ranked[:, 0]], prompts[ranked[:, -1]], np.array(own), gamma)


@functools.lru_cache(maxsize=2)
def index_of(hub: Hub) -> ModelIndex:
    """Return the index of a hub's specifications."""
    specs = [
        WeightedRKME(POINTS, gamma=hub.gamma, random_state=0, measure_error=False).fit(e, prompts=u)
        for e, u in zip(hub.outputs, hub.prompts, strict=True)
    ]
    return ModelIndex(hub.outputs[0].shape[1], hub.gamma, prompt_dim=hub.prompts[0].shape[1]).add(specs)


def ranks(scores: NDArray[Any], own: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rank of each query's own model, 0 the best, by scores (n, models)."""
    mine = scores[np.arange(len(own)), own]
    found: NDArray[np.int64] = (scores > mine[:, None]).sum(1)
    return found


def by_index(hub: Hub, *, each: int = 1, prompts: Vectors | None = None, temperature: float = 0.1) -> NDArray[np.int64]:
    """Return ranks by the index from the first ``each`` images of each query."""
    index = index_of(hub)
    ids = index.search(list(hub.queries[:, :each]), len(index), prompts=prompts, temperature=temperature)[1]
    return np.asarray((ids == hub.own[:, None]).argmax(1))


def by_mean(hub: Hub) -> NDArray[np.int64]:
    """Return ranks by the mean of each model's outputs, by cosine or by distance, whichever is better."""
    means, q = np.stack([e.mean(0) for e in hub.outputs]), hub.queries[:, 0]
    found = (
        ranks(sentences.unit(q) @ sentences.unit(means).T, hub.own),
        ranks(-((q[:, None] - means[None]) ** 2).sum(-1), hub.own),
    )
    return min(found, key=lambda r: -(r == 0).mean())


def by_neighbours(hub: Hub) -> NDArray[np.int64]:
    """Return ranks by votes of the nearest of all outputs, with the best number of them: the ceiling."""
    stored, q = np.concatenate(hub.outputs), hub.queries[:, 0]
    model = np.repeat(np.arange(len(hub.outputs)), [len(e) for e in hub.outputs])
    near = np.concatenate([
        np.argpartition((stored**2).sum(1) - 2 * part @ stored.T, 50, axis=1)[:, :50] for part in np.array_split(q, 20)
    ])  # fmt: skip
    apart = ((stored[near] - q[:, None]) ** 2).sum(-1)
    order = np.argsort(apart, axis=1)
    near, apart = np.take_along_axis(near, order, 1), np.take_along_axis(apart, order, 1)
    found = []
    for k in (1, 5, 15, 50):
        # Nearer ones break ties.
        votes = np.zeros((len(q), len(hub.outputs)))
        for j in range(50):
            weight = 1.0 if j < k else 0.0
            votes[np.arange(len(q)), model[near[:, j]]] += weight + 1e-6 / (1 + j)
        found.append(ranks(votes, hub.own))
    return min(found, key=lambda r: -(r == 0).mean())
