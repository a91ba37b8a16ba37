"""``ModelIndex``: find the model whose outputs look like an example, from small specifications (arXiv 2412.12232).

    D(S, q) = a^T K a - 2 sum_n a_n mean_i k(z_n, x_i) + mean_ij k(x_i, x_j),    a = beta, or weighted by the prompt

Exact: one product of all points with the query, exponentials and sums while a block of them is in the cache,
O(T M (d + M)) for T models of M points. With ``candidates`` the mean embeddings of the models in random Fourier
features pick some first, O(T n_features), and only those are compared exactly.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from quernel._array_folder import Arrays, readable, take
from quernel._errors import FormatError, QuernelError
from quernel._growing import GrowingArray
from quernel._registry import register
from quernel._threads import parallel_ranges
from quernel._validate import check_choice, check_float, check_int, check_type
from quernel.kernels import RandomFourierFeatures, WeightedRKME
from quernel.kernels._mean_targets import KERNELS, kernel_matrix
from quernel.search._index import Ids, Index, Scores
from quernel.search._model_kernels import mean_over_images
from quernel.search._model_queries import Asked, Prepared
from quernel.search._model_store import ModelStore, Specs, checked_meta
from quernel.search._stored_numbers import VectorType
from quernel.search._top_k import top_k

# Query images asked together, and kernel values held at a time: 512 KB, so that they stay in the second-level cache.
_COLUMNS, _VALUES = 256, 2**17
# Points of a block at most: what is converted to float32 stays in the cache too.
_ROWS = 2**11
# Scores held at a time, 64 MB.
_SCORES = 2**24
# Points gathered at a time when candidates are scored.
_GATHERED = 2**11

Vectors = NDArray[np.float32]


def _toy_data() -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Return the centre of each of 200 models, apart from each other, and eight outputs around each."""
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((200, 12))
    return centers, [center + 0.1 * draw.standard_normal((8, 12)) for center in centers]


@functools.cache
def _toy_models() -> tuple[WeightedRKME, ...]:
    return tuple(WeightedRKME(3, gamma=0.1, rounds=0, random_state=0).fit(x) for x in _toy_data()[1])


def _by_definition(specs: Any, queries: Any) -> NDArray[np.float64]:
    """Return minus the squared distances, (queries, specs)."""
    scores = np.empty((len(queries), len(specs)))
    for t, spec in enumerate(specs):
        square = spec.beta_ @ kernel_matrix(spec.z_, spec.z_, spec.kernel, spec.gamma_) @ spec.beta_
        scores[:, t] = 2 * kernel_matrix(queries, spec.z_, spec.kernel, spec.gamma_) @ spec.beta_ - square - 1.0
    return np.minimum(scores, 0.0)


def _toy_queries(n: int) -> Vectors:
    return _toy_data()[0][:n].astype(np.float32)


def _wrong_models(specs: Any) -> list[tuple[str, Any]]:
    other = copy.deepcopy(specs[0])
    other.gamma_ = 0.2
    broken = copy.deepcopy(specs[0])
    broken.z_[0, 0] = np.nan
    return [("another gamma", [specs[1], other]), ("NaN", [specs[1], broken]), ("text", ["a"]), ("a number", 5)]


def _example() -> dict[str, Any]:
    return {
        "make": lambda: ModelIndex(12, 0.1, n_features=16),
        "items": lambda n: list(_toy_models()[:n]),
        "queries": _toy_queries,
        "reference": _by_definition,
        "wrong_items": _wrong_models,
        "recall": 1.0,
    }


@register("rkme-model-search", pillar="search", contract="index", paper="2412.12232", status="stable", example=_example)
class ModelIndex(Index):
    """Rank models, or data sets, by how much their outputs look like one or a few examples.

    Items are fitted ``quernel.kernels.WeightedRKME`` (or ``ReducedMeanEmbedding``) specifications; no model is run.

    Parameters
    ----------
    dim : int
        Coordinates of an embedded output.
    gamma : float
        Of the kernel, the same for all; see ``quernel.kernels.statistics.median_gamma``.
    kernel : {"gaussian", "cosine"}, default="gaussian"
    prompt_dim : int, optional
        Coordinates of an embedded prompt; None for an index without prompts.
    encoder : str, default=""
        Fingerprint of the encoder that specifications and queries come from.
    dtype : {"float32", "float16", "int8"}, default="float32"
        How points and prompts are kept. 50 points of 384 + 384 numbers take 154 KB, 77 KB or 39 KB.
    n_features : int, default=512
        Random features for ``candidates``, an even number; 0 for none. The cosine needs none: its mean is exact.
    seed : int, default=0
        Of these features.

    Notes
    -----
    Scores are minus squared distances, comparable between models for one query. For "no model fits" compare the best
    score with those of queries that are known to fit or not.

    References
    ----------
    Zhou, Guo, Song, Li, "You Only Submit One Image to Find the Most Suitable Generative Model", arXiv 2412.12232, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> draw = np.random.default_rng(0)
    >>> outputs = {name: draw.standard_normal((100, 2)) + place for name, place in (("here", 0), ("there", 3))}
    >>> specs = [WeightedRKME(10, gamma=0.5, random_state=0).fit(x) for x in outputs.values()]
    >>> index = ModelIndex(2, 0.5).add(specs, meta=[{"name": name} for name in outputs])
    >>> scores, ids = index.search([[2.5, 3.1]], k=1)
    >>> index.meta(ids[0, 0])
    {'name': 'there'}
    """

    metric = "rkme"

    def __init__(
        self,
        dim: int,
        gamma: float,
        *,
        kernel: Literal["gaussian", "cosine"] = "gaussian",
        prompt_dim: int | None = None,
        encoder: str = "",
        dtype: VectorType = "float32",
        n_features: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dim: int = check_int("dim", dim, low=1)
        self.gamma = check_float("gamma", gamma, low=0.0, open_low=True)
        self.kernel = check_choice("kernel", kernel, KERNELS)
        self.prompt_dim = None if prompt_dim is None else check_int("prompt_dim", prompt_dim, low=1)
        self.encoder = check_type("encoder", encoder, str)
        self.n_features = check_int("n_features", n_features, low=0)
        self.seed = check_int("seed", seed, low=0, high=2**63 - 1)
        self._store = ModelStore(self.dim, self.gamma, self.kernel, self.prompt_dim, dtype)
        self._map = self._feature_map()
        self._means = GrowingArray(np.zeros((0, self._width), np.float32))
        self._meta: list[dict[str, Any]] = []

    @property
    def dtype(self) -> VectorType:
        """How points and prompts are kept."""
        return self._store.z.dtype

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("dim", "gamma", "kernel", "prompt_dim", "encoder", "dtype", "n_features", "seed")
        return {name: getattr(self, name) for name in names}

    def add(self, x: Any, ids: Any = None, *, meta: Sequence[Mapping[str, Any]] | None = None) -> Self:
        """Add models.

        Parameters
        ----------
        x : WeightedRKME, or sequence of them
            Fitted, with the index's kernel, gamma, encoder and dimensions.
        ids : sequence of int, optional
            A non-negative id a model; default counts on from the largest so far.
        meta : sequence of mappings, optional
            Anything that JSON holds: names, addresses, licences; "privacy" is what a private specification promises.

        Raises
        ------
        QuernelError
            If anything is wrong with a specification, an id or ``meta``; nothing was added.
        """
        specs = self._items("x", x)
        held = checked_meta(meta, len(specs))
        for said, promise in zip(held, specs.privacy, strict=True):
            said.update({} if promise is None else {"privacy": promise})
        super().add(specs, ids)
        self._meta.extend(held)
        return self

    def update(self, x: Any, ids: Any, *, meta: Sequence[Mapping[str, Any]] | None = None) -> Self:
        """Replace the specifications of models that are in the index; their ids stay.

        ``meta`` replaces what was said of them; without it that stays too. Nothing changes where anything is wrong.
        """
        specs = self._items("x", x)
        wanted = np.asarray(ids).reshape(-1)
        if not len(specs) == len(wanted) == np.isin(self._ids.ids[self._ids.alive], wanted).sum():
            raise QuernelError(f"ids must be {len(specs)} different ids of models in the index; got {ids!r}")
        if meta is None:  # what was promised of the points that go, goes with them
            meta = [{k: v for k, v in self.meta(i).items() if k != "privacy"} for i in wanted]
        held = checked_meta(meta, len(specs))
        self.remove(wanted)
        return self.add(specs, wanted, meta=held)

    def meta(self, model: int) -> dict[str, Any]:
        """Return what was said of a model, by its id."""
        found = np.flatnonzero((self._ids.ids == check_int("model", model)) & self._ids.alive)
        if not len(found):
            raise QuernelError(f"model must be an id of the index; got {model}")
        return copy.deepcopy(self._meta[int(found[0])])

    def search(
        self,
        q: Any,
        k: int = 10,
        *,
        prompts: Any = None,
        temperature: float = 0.1,
        candidates: int | None = None,
    ) -> tuple[Scores, Ids]:
        """Return the k models that are closest to each query, closest first.

        Parameters
        ----------
        q : array, shape (n, dim), or sequence of arrays, shapes (n_i, dim)
            One embedded example a query, or several.
        k : int, default=10
        prompts : array, shape (n, prompt_dim), optional
            The embedded prompt of each query: compare what models answer to it. Without, whole distributions.
        temperature : float, default=0.1
            T > 0 of the weights; small looks at one prompt, large at all. See ``choose_temperature``.
        candidates : int, optional
            Compare only so many models exactly, chosen by mean embedding without the prompt; at least k.

        Returns
        -------
        scores : array, shape (n, k), float32
            Minus the squared distance; NaN where there are fewer models.
        ids : array, shape (n, k), int64
            -1 where there are fewer models.
        """
        check_float("temperature", temperature, low=0.0, open_low=True)
        k = check_int("k", k, low=1)
        asked = self._items("q", q)
        if prompts is not None:
            asked = asked.with_prompts(prompts, self.prompt_dim)
        if candidates is None:
            return self._answer(asked, k, functools.partial(self._search, temperature=temperature))
        room = check_int("candidates", candidates, low=k)
        if not self._width:
            raise QuernelError("candidates needs random features; make the index with n_features > 0")
        return self._answer(asked, k, functools.partial(self._search_some, temperature=temperature, room=room))

    def choose_temperature(
        self, temperatures: Sequence[float] = (0.03, 0.1, 0.3, 1.0), *, points: int = 5, seed: int = 0
    ) -> float:
        """Return the temperature with which models find themselves best from their own points, left out.

        Some points of each model, drawn by weight, are asked for with their prompts; in the model's own specification
        that point has no weight. No query is looked at.

        Parameters
        ----------
        temperatures : sequence of float
        points : int, default=5
            Asked of each model, at most.
        seed : int, default=0

        Returns
        -------
        temperature : float
            Of the largest mean reciprocal rank; the first of several.
        """
        from quernel.search._model_tuning import best_temperature

        return best_temperature(self, temperatures, points, seed)

    def compact(self) -> Self:
        """Drop removed models for good; the rest keeps its order and its ids."""
        alive = self._ids.alive
        if not alive.all():
            self._store.keep(alive)
            self._means = GrowingArray(self._means.rows[alive].copy())
            self._meta = [held for held, wanted in zip(self._meta, alive, strict=True) if wanted]
            self._ids = type(self._ids)(self._ids.ids[alive])
        return self

    @property
    def _width(self) -> int:
        return self.dim if self.kernel == "cosine" else self.n_features

    def _feature_map(self) -> RandomFourierFeatures | None:
        if self.kernel == "cosine" or not self.n_features:
            return None
        drawn = RandomFourierFeatures(self.n_features, gamma=self.gamma, random_state=self.seed)
        return drawn.fit(np.zeros((1, self.dim), np.float32))

    def _items(self, name: str, x: Any) -> Any:
        """Return checked specifications, or checked queries."""
        if name == "x":
            return self._store.checked(name, x, self.encoder)
        return x if isinstance(x, Asked) else Asked.of(name, x, self.dim, unit=self.kernel == "cosine")

    def _append(self, items: Specs) -> None:
        first = len(self._store)
        self._store.append(items)
        if self._width:
            self._means.append(self._mean_features(first))

    def _mean_features(self, first: int) -> Vectors:
        """Return the weighted mean features of the models from slot ``first`` on."""
        offsets, store = self._store.z.offsets[first:], self._store
        means = np.zeros((len(offsets) - 1, self._width), np.float32)
        for i, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
            means[i] = store.weights[a:b] @ self._features(store.z.values(a, b))
        return means

    def _features(self, rows: Vectors) -> Vectors:
        return rows if self._map is None else np.asarray(self._map.transform(rows))

    def _search(self, queries: Asked, k: int, temperature: float = 0.1) -> tuple[Scores, NDArray[np.int64]]:
        groups = queries.groups(_COLUMNS, max(1, _SCORES // max(1, len(self._store))))
        parts = [top_k(self._scores(group, temperature), k, self._ids.alive) for group in groups]
        return np.concatenate([s for s, _ in parts]), np.concatenate([i for _, i in parts])

    def _scores(self, queries: Asked, temperature: float) -> Scores:
        """Return the scores of all models, (n, slots)."""
        out = np.empty((len(queries), len(self._store)), np.float32)
        prepared = Prepared(self._store, queries, temperature)
        # Blocks end where a model ends; the same ones whatever the number of threads.
        cuts = self._store.z.blocks(min(_ROWS, max(1, _VALUES // len(queries.images.rows))))

        def work(start: int, stop: int) -> None:
            for a, b in zip(cuts[start:stop], cuts[start + 1 : stop + 1], strict=True):
                prepared.score(self._store.slots(a, b), out[:, a:b])

        parallel_ranges(work, len(cuts) - 1)
        return out

    def _search_some(self, queries: Asked, k: int, temperature: float, room: int) -> tuple[Scores, NDArray[np.int64]]:
        """Score exactly only the models of the best approximate scores."""
        chosen = self._chosen(queries, room)
        scores, slots = np.full((len(queries), k), np.nan, np.float32), np.full((len(queries), k), -1, np.int64)

        def work(start: int, stop: int) -> None:
            for i in range(start, stop):
                found = np.empty((1, len(chosen[i])), np.float32)
                prepared = Prepared(self._store, queries[i : i + 1], temperature)
                sizes = np.diff(self._store.z.offsets)[chosen[i]]
                step = max(1, _GATHERED // max(1, int(sizes.max(initial=1))))
                for a in range(0, len(chosen[i]), step):
                    prepared.score(self._store.gathered(chosen[i][a : a + step]), found[:, a : a + step])
                best, places = top_k(found, k, np.ones(len(chosen[i]), bool))
                scores[i] = best[0]
                slots[i] = np.where(places[0] >= 0, chosen[i][places[0]], -1)

        parallel_ranges(work, len(queries))
        return scores, slots

    def _chosen(self, queries: Asked, room: int) -> list[NDArray[np.int64]]:
        """Return the slots of the best models by mean embedding for each query, ascending."""
        images = queries.images
        features = self._features(images.rows)
        # The distance up to what is the query's own: |mu|^2 - 2 <mu, features>, the first exact.
        near = (readable(self._means.rows) @ torch.from_numpy(np.ascontiguousarray(features.T))).numpy()
        rough = np.empty((len(near), len(images)), np.float32)
        mean_over_images(near, images.offsets, rough)
        rough = 2 * rough - self._store.norms[:, None]
        rough[~self._ids.alive] = -np.inf
        held = min(room, len(self))
        return [np.sort(np.argpartition(-column, held - 1)[:held]) for column in rough.T]

    def _arrays(self) -> Arrays:
        text = json.dumps(self._meta, sort_keys=True).encode()
        means = {"means": self._means.rows} if self._width else {}
        return {**self._store.arrays(), **means, "meta": np.frombuffer(text, np.uint8).copy()}

    def _restore(self, arrays: Arrays) -> None:
        n = self._ids.slots
        self._store.restore(arrays, n)
        if self._width:
            self._means = GrowingArray(take(arrays, "means", np.float32, (n, self._width)))
        meta = json.loads(take(arrays, "meta", np.uint8, (None,)).tobytes())
        if not isinstance(meta, list) or len(meta) != n or not all(isinstance(held, dict) for held in meta):
            raise FormatError(f"array 'meta' must be the JSON of a list of {n} objects")
        self._meta = meta

    def _check_contents(self) -> None:
        self._store.check()
