"""Thresholds over spectra: exact targets, monotone, scale-free, safe on flat spectra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quernel.compress.lowrank._ranks import (
    Spectrum,
    allowed_parameters,
    is_low_rank,
    normalised,
    ranks_at,
    stored_parameters,
    threshold_for_parameters,
    threshold_for_ranks,
    uniform_ranks,
)

PARAMETER_TOLERANCE = 0.01
# A millionth of a weight, by which the number of allowed ones is rounded up.
NUDGE = 1e-6


def _spectra(shapes: list[tuple[int, int]], seed: int = 0) -> list[Spectrum]:
    rng = np.random.default_rng(seed)
    values = [np.linalg.svd(rng.standard_normal(shape) * rng.uniform(0.1, 1, shape[1]) ** 3)[1] for shape in shapes]
    return [normalised(v, shape) for v, shape in zip(values, shapes, strict=True)]


SHAPES = [(64, 64), (128, 64), (64, 128), (48, 96), (96, 96)]
SPECTRA = _spectra(SHAPES)
TOTAL = sum(min(shape) for shape in SHAPES)


def test_normalised_runs_from_one_to_zero() -> None:
    for values in SPECTRA:
        assert values[0] == 1.0
        assert values[-1] == 0.0
        assert np.all(np.diff(values) <= 0)


@pytest.mark.parametrize("flat", [np.full(8, 3.0), np.zeros(8), np.array([2.0]), np.array([1.0, 1.0 - 1e-7])])
def test_flat_spectra_keep_everything(flat: Spectrum) -> None:
    assert np.array_equal(normalised(flat, (8, 8)), np.ones(len(flat)))


@given(st.floats(0, 0.98))
def test_rank_target_is_met_to_one_rank(target: float) -> None:
    choice = threshold_for_ranks(SPECTRA, target)
    cut = TOTAL - sum(choice.ranks)
    assert abs(cut - target * TOTAL) <= 1
    assert min(choice.ranks) >= 1


@given(st.floats(0.05, 0.98))
def test_ranks_are_those_above_tau(target: float) -> None:
    # From five dropped values on (one exact zero a matrix) nothing is tied.
    choice = threshold_for_ranks(SPECTRA, target)
    assert choice.tau is not None
    assert choice.ranks == ranks_at(SPECTRA, choice.tau)


@given(st.floats(0, 0.98), st.floats(0, 0.98))
def test_more_target_means_a_higher_threshold_and_no_larger_rank(one: float, two: float) -> None:
    low, high = (threshold_for_ranks(SPECTRA, t) for t in sorted((one, two)))
    assert low.tau is not None
    assert high.tau is not None
    assert low.tau <= high.tau
    assert all(a >= b for a, b in zip(low.ranks, high.ranks, strict=True))


def test_nothing_asked_keeps_every_rank() -> None:
    choice = threshold_for_ranks(SPECTRA, 0.0)
    assert choice.tau == 0.0
    assert choice.ranks == tuple(min(shape) for shape in SHAPES)


def test_small_targets_drop_tied_zeros_one_by_one() -> None:
    assert TOTAL - sum(threshold_for_ranks(SPECTRA, 2 / TOTAL).ranks) == 2


def test_every_matrix_keeps_a_rank() -> None:
    assert threshold_for_ranks(SPECTRA, 0.9999).ranks == (1,) * len(SHAPES)
    flat = [np.ones(8), SPECTRA[0]]
    assert threshold_for_ranks(flat, 0.9999).ranks == (8, 1)


@given(st.floats(0, 0.9))
def test_parameter_target_is_met_within_one_percent(target: float) -> None:
    choice = threshold_for_parameters(SPECTRA, SHAPES, target, "auto")
    before = sum(m * n for m, n in SHAPES)
    stored = stored_parameters(SHAPES, choice.ranks, "auto")
    assert stored <= (1 - target) * before + NUDGE
    assert 1 - stored / before <= target + PARAMETER_TOLERANCE


@settings(max_examples=20)
@given(st.floats(0, 0.9), st.sampled_from(["auto", 0.0, 0.3, 0.6, 0.9]))
def test_parameter_choice_is_the_first_that_fits(target: float, min_ratio: float) -> None:
    choice = threshold_for_parameters(SPECTRA, SHAPES, target, min_ratio)
    budget = allowed_parameters(SHAPES, target)
    fits = [
        sum(threshold_for_ranks(SPECTRA, count / TOTAL).ranks)
        for count in range(TOTAL - len(SHAPES) + 1)
        if stored_parameters(SHAPES, threshold_for_ranks(SPECTRA, count / TOTAL).ranks, min_ratio) <= budget
    ]
    assert sum(choice.ranks) == (fits[0] if fits else len(SHAPES))


def test_break_even_is_half_rank_of_a_square() -> None:
    assert not is_low_rank((64, 64), 32, "auto")
    assert is_low_rank((64, 64), 31, "auto")
    assert is_low_rank((64, 64), 60, 0.05)
    assert not is_low_rank((64, 64), 64, 0.0)


def test_uniform_ranks_take_the_same_share() -> None:
    assert uniform_ranks([(64, 64), (128, 32)], 0.5, "rank").ranks == (32, 16)
    # keep half of m n in k (m + n)
    assert uniform_ranks([(64, 64), (96, 32)], 0.5, "params").ranks == (16, 12)
    assert uniform_ranks([(64, 64), (96, 32)], 0.0, "params").ranks == (64, 32)
    assert uniform_ranks([(2, 2)], 0.99, "params").ranks == (1,)
