"""``SchurEntropy``: the diversity of answers, split into what prompts explain and what was added (arXiv 2412.18645).

    S(A) = sum_i l_i log(tau / l_i) = tau H(l / tau),   l the eigenvalues of A, tau their sum
    S_image = S(Lam_I),  S_text = S(Lam_T),  S_image + S_text <= S(C_XX) <= S_image + S_text + h2(tau)

with Lam_I the Schur complement of ``quernel.kernels.statistics.schur_complement``. Cost: n (D_T + D_X)^2 multiply-adds
and eigenvalues of a D_X x D_X matrix, memory without n; where n is no larger than the wider feature space, or the
kernel has no features, O(n^2 D + n^3) and the pairs are kept.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from quernel._array_folder import ArrayFolder, Arrays, take
from quernel._errors import QuernelError
from quernel._random import Seed, generator, spawn
from quernel._registry import register
from quernel._validate import check_bool, check_float, check_int, check_type
from quernel.kernels.moments import Gram
from quernel.kernels.statistics._pair_maps import BLOCK, Kernel, KernelChoice, KernelMap, dims
from quernel.kernels.statistics.intervals import Interval
from quernel.kernels.statistics.schur import PairSample, SchurSplit, best_eta, split_of_covariances
from quernel.kernels.statistics.schur_report import SchurReport, entropy

# Above this share of degrees of freedom to pairs the regression explains whatever it is given.
MOST_FREEDOM = 0.5


class DegenerateConditioningWarning(UserWarning):
    """The prompts can explain nearly any images: the score says more about the ridge than about the images."""


@register("schur-entropy", pillar="kernels", contract="diagnostic", paper="2412.18645", status="stable")
class SchurEntropy(ArrayFolder):
    """Tell how much of the diversity of images, or answers, comes from their prompts, and how much was added.

    Pairs of embeddings come in batches; parts of a data set ``merge`` exactly. Any two encoders, any two modalities.

    Parameters
    ----------
    kernel : {"cosine", "gaussian"} or callable, default="cosine"
        A callable takes two arrays of rows and returns the kernel between them, which must have a unit diagonal.
    bandwidth : float or pair of floats, optional
        s of exp(-|x - y|^2 / (2 s^2)), in the units of the rows; a pair is (text, image). Only for "gaussian".
    n_features : int, default=0
        Random features of the Gaussian kernel, an even number; 0 is the exact kernel, for which pairs are kept.
    eta : float or "loo", default=1e-3
        Ridge of the regression. "loo" takes the one of least leave-one-out error and keeps the pairs.
    order : float, default=1.0
        Of the entropy: 1 is Shannon's; 2 needs no eigenvalues.
    shared_space : bool, default=False
        Both sides are embeddings of one space and get the same random features.
    keep_pairs : bool, default=False
        Keep the pairs however many there are, which ``resamples`` and ``folds`` of ``compute`` need.
    random_state : int, default=0
        Of the random features, the resamples and the folds. Shards merge if they have the same.

    Notes
    -----
    With distinct prompts and eta -> 0, or as many features as pairs, a regression explains everything and the score is
    1 whatever the images are. Repeat prompts (several images each), or keep the ridge; ``dof`` tells, and
    ``DegenerateConditioningWarning`` is given above half a degree of freedom a pair. Scores of different n, kernels or
    ridges are not comparable. The covariances are not centred: the mean image is a mode like any other.

    An interval is centred: quantiles of the resamples about their mean, put around the estimate, because a resample
    repeats pairs and so has less diversity than the sample, a shift that is no uncertainty.

    Differs from the authors' code, whose cosine covariance is a correlation of coordinates, whose residuals of the
    Gaussian kernel use other frequencies than the regression, and whose ridge is never added.

    References
    ----------
    Ospanov, Jalali, Farnia, "Dissecting CLIP: Decomposition with a Schur Complement-based Approach",
    arXiv 2412.18645, 2024.

    Examples
    --------
    >>> prompts = np.eye(4).repeat(25, axis=0)
    >>> images = prompts @ np.eye(4, 8) + 0.5 * np.random.default_rng(0).standard_normal((100, 8))
    >>> report = SchurEntropy().update(prompts, images).compute()
    >>> bool(report.vendi > report.score > 1), round(report.dof, 2)
    (True, 0.04)
    """

    kind = "statistic"

    def __init__(
        self,
        kernel: Kernel = "cosine",
        *,
        bandwidth: float | Sequence[float] | None = None,
        n_features: int = 0,
        eta: float | Literal["loo"] = 1e-3,
        order: float = 1.0,
        shared_space: bool = False,
        keep_pairs: bool = False,
        random_state: int = 0,
    ) -> None:
        self.choice = KernelChoice(kernel, bandwidth, n_features, shared_space, random_state)
        self.eta = checked_eta(eta)
        self.order = check_float("order", order, low=0.0, open_low=True)
        self.keep_pairs = check_bool("keep_pairs", keep_pairs)
        self.n_pairs = 0
        self._widths: tuple[int, int] | None = None
        self._maps: tuple[KernelMap, KernelMap] | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._sums: Gram | None = None

    def update(self, T: Any, X: Any) -> Self:
        """Take pairs in.

        Parameters
        ----------
        T, X : arrays or Tensors, shapes (n, d_text) and (n, d_image)
            Row i of both belongs together. Rows need not be normalised.

        Returns
        -------
        self

        Raises
        ------
        QuernelError
            If there are not as many rows on both sides, widths differ from earlier ones, or a row is not finite or, for
            the cosine kernel, zero; then nothing is taken in.
        """
        t, x = self.choice.rows(T, X)
        widths = t.shape[1], x.shape[1]
        if self._widths not in (None, widths):
            raise QuernelError(f"T and X must have {self._widths} columns as before; got {widths}")
        self._open(widths)
        if self._sums is None and self._keeps(self.n_pairs + len(t)):
            self._pairs.append((t.clone(), x.clone()))
        else:
            self._fold([*self._pairs, (t, x)])
        self.n_pairs += len(t)
        return self

    def merge(self, other: Self) -> Self:
        """Take everything in that ``other`` saw; returns the object itself.

        Raises
        ------
        QuernelError
            If ``other`` has other settings or widths, or is the object itself; then nothing changed.
        """
        check_type("other", other, type(self))
        if other is self:
            raise QuernelError("other must be another object: pairs that count twice hide a degenerate regression")
        mine, theirs = self.config(), other.config()
        apart = [f"{k}={mine[k]!r} here and {theirs[k]!r} there" for k in mine if mine[k] != theirs[k]]
        if apart:
            raise QuernelError(f"other must have the same settings to be merged; it has {', '.join(apart)}")
        if other._widths is None:
            return self
        if self._widths not in (None, other._widths):
            raise QuernelError(f"other must have rows of {self._widths} columns; it has {other._widths}")
        self._open(other._widths)
        pairs = [*self._pairs, *other._pairs]
        if self._sums is None and other._sums is None and self._keeps(self.n_pairs + other.n_pairs):
            self._pairs = pairs
        else:
            self._fold(pairs)
            if other._sums is not None and self._sums is not None:
                self._sums.merge(other._sums)
        self.n_pairs += other.n_pairs
        return self

    def compute(self, *, resamples: int = 0, folds: int = 0, level: float = 0.95) -> SchurReport:
        """Return the scores of all pairs so far.

        Parameters
        ----------
        resamples : int, default=0
            Bootstrap samples for intervals, each as dear as the score itself; 50 are enough for a picture, 200 of order
            2, which needs no eigenvalues.
        folds : int, default=0
            Parts of the cross-fitted score; 0 leaves it out.
        level : float, default=0.95
            Of the intervals.

        Raises
        ------
        QuernelError
            If there are fewer than 2 pairs, or ``resamples`` or ``folds`` need pairs that were not kept.

        Warns
        -----
        DegenerateConditioningWarning
            If the regression has more than half a degree of freedom a pair.
        """
        if check_int("resamples", resamples, low=0) == 1:
            raise QuernelError("resamples must be 0, or some 20 and more for an interval; got 1")
        check_int("folds", folds, low=0)
        check_float("level", level, low=0.0, high=1.0, open_low=True, open_high=True)
        if self.n_pairs < 2 or self._maps is None:
            raise QuernelError(f"a score needs at least 2 pairs; got {self.n_pairs}. Call update() first")
        if folds == 1 or folds > self.n_pairs:
            raise QuernelError(f"folds must be 0 or in [2, {self.n_pairs}]; got {folds}")
        if self._sums is not None and (resamples or folds):
            raise QuernelError("resamples and folds need the pairs, which were summed; build with keep_pairs=True")
        sample = None if self._sums is not None else self._sample()
        eta = best_eta(sample) if self.eta == "loo" and sample is not None else float(self.eta)
        more: dict[str, Any] = {}
        seeds = spawn(self.choice.random_state, 4)[2:]
        if sample is not None:
            if folds:
                more["cross_fitted"] = entropy(sample.out_of_fold(eta, folds, seeds[0]), self.order)[0]
            split = sample.split(eta)
        else:
            split = self._split_of_sums(eta)
        form: Literal["features", "pairs"] = "features" if sample is None else sample.form
        if not resamples:
            sample = None  # its matrices are as large as those whose spectra follow
        image, tau = entropy(split.residual, self.order)
        text, _ = entropy(split.explained, self.order)
        total = entropy(split.total, self.order)[0]
        if sample is not None:
            more |= self._intervals(sample, eta, (image, text), resamples, level, seeds[1])
        dof = split.freedom / self.n_pairs
        if dof > MOST_FREEDOM:
            warnings.warn(_advice(dof, eta, self.n_pairs), DegenerateConditioningWarning, stacklevel=2)
        return SchurReport(
            image, text, math.exp(image), tau, total, math.exp(total), dof, self.n_pairs, eta, self.order,
            dims(self._maps), form, **more,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self.choice.config() | {"eta": self.eta, "order": self.order, "keep_pairs": self.keep_pairs}

    def __repr__(self) -> str:
        return f"SchurEntropy({', '.join(f'{name}={value!r}' for name, value in self.config().items())})"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save to a folder that ``quernel.load`` reads; a kernel that is a function cannot be saved."""
        if callable(self.choice.kernel):
            raise QuernelError("a kernel that is a function cannot be saved; merge in memory, or take a named kernel")
        return super().save(path)

    def _open(self, widths: tuple[int, int]) -> None:
        """Fix the widths, and with them the random features; the first time only."""
        if self._maps is None:
            self._maps = self.choice.maps(widths)
            self._widths = widths

    def _open_maps(self) -> tuple[KernelMap, KernelMap]:
        if self._maps is None:
            raise QuernelError("no pairs yet; call update() first")
        return self._maps

    def _keeps(self, n: int) -> bool:
        """Say whether n pairs are kept as they are: because something needs them, or they are fewer than features."""
        sizes = None if self._maps is None else dims(self._maps)
        return self.keep_pairs or self.eta == "loo" or sizes is None or n <= max(sizes)

    def _fold(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add pairs to the sums; a block of rows has features at a time."""
        maps = self._open_maps()
        if self._sums is None:
            self._sums = Gram(sum(dims(maps) or (0,)), compute_dtype=torch.float64)
        for t, x in pairs:
            for rows_t, rows_x in zip(t.split(BLOCK), x.split(BLOCK), strict=True):
                self._sums.update(torch.cat((maps[0].features(rows_t), maps[1].features(rows_x)), 1))
        self._pairs = []

    def _rows(self) -> tuple[Tensor, Tensor]:
        return torch.cat([t for t, _ in self._pairs]), torch.cat([x for _, x in self._pairs])

    def _sample(self) -> PairSample:
        return PairSample.of(self._open_maps(), *self._rows())

    def _split_of_sums(self, eta: float) -> SchurSplit:
        sums = self._sums.mean() if self._sums is not None else torch.zeros(0, 0)
        sizes = dims(self._open_maps()) or (0, 0)
        (c_tt, c_tx), (_, c_xx) = (part.split(sizes, 1) for part in sums.split(sizes))
        return split_of_covariances(c_tt, c_tx, c_xx, eta, spectra=True)

    def _intervals(
        self, sample: PairSample, eta: float, found: tuple[float, float], resamples: int, level: float, seed: Seed
    ) -> dict[str, Interval]:
        draw = generator(seed)
        drawn = []
        for _ in range(resamples):
            split = sample.weighted(draw.multinomial(sample.n, np.full(sample.n, 1 / sample.n))).split(eta)
            drawn.append([entropy(part, self.order)[0] for part in (split.residual, split.explained)])
        spread = np.array(drawn) - np.mean(drawn, 0)
        low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2], axis=0)
        both = [Interval(found[i], found[i] + float(low[i]), found[i] + float(high[i]), level) for i in range(2)]
        return {"ci": both[0], "ci_text": both[1]}

    def _arrays(self) -> Arrays:
        if self._widths is None:
            return {}
        held: Arrays = {"widths": np.array(self._widths, np.int64)}
        if self._sums is not None:
            return held | {"sums": self._sums.state()["sum"].numpy(), "count": np.array([self.n_pairs])}
        t, x = self._rows()
        return held | {"text": t.numpy(), "image": x.numpy()}

    def _restore(self, arrays: Arrays) -> None:
        if not arrays:
            return
        first, second = (check_int("widths", int(width), low=1) for width in take(arrays, "widths", np.int64, (2,)))
        self._open((first, second))
        if "sums" in arrays:
            size = sum(dims(self._open_maps()) or (0,))
            count = torch.from_numpy(take(arrays, "count", np.int64, (1,)))[0]
            sums = torch.from_numpy(take(arrays, "sums", np.float64, (size, size)))
            self._sums = Gram.from_state({"sum": sums, "count": count}, compute_dtype=torch.float64)
            self.n_pairs = self._sums.count
            return
        sides = []
        for name, width in (("text", first), ("image", second)):
            dtype = arrays[name].dtype if name in arrays and arrays[name].dtype == np.float32 else np.float64
            sides.append(take(arrays, name, dtype, (None, width)))
        t, x = self.choice.rows(*sides)
        self._pairs, self.n_pairs = [(t.clone(), x.clone())], len(t)


def checked_eta(eta: Any) -> float | Literal["loo"]:
    """Return a ridge >= 0, or "loo"; anything else is an error."""
    if isinstance(eta, str):
        if eta != "loo":
            raise QuernelError(f'eta must be a number >= 0 or "loo"; got {eta!r}')
        return "loo"
    return check_float("eta", eta, low=0.0)


def _advice(dof: float, eta: float, n: int) -> str:
    return (
        f"the prompts have {dof:.2f} degrees of freedom a pair ({n} pairs, eta={eta:g}) and explain nearly any "
        "images, so that the score says little. Likely causes: (a) all prompts differ: sample several images a prompt, "
        '(b) eta is too small: raise it or take eta="loo", (c) more features than pairs'
    )
