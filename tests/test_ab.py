"""Figures of an A/B test on simulated users, where the truth is known: values, coverage of intervals, mismatch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from springtide.evaluation.ab import FIGURES, Arm, compare, figures, resampled, sample_ratio

SHOWN = 5  # items per exposure in the simulation


def simulated(users: int, chance: float, rng: np.random.Generator) -> Arm:
    """Users who differ: each takes the shown items with a chance of their own, drawn around `chance`, on 1 to 10
    visits. So a user's visits are alike, and an interval over visits would be too narrow."""
    exposures = rng.integers(1, 11, users)
    own = rng.beta(4 * chance, 4 * (1 - chance), users)
    hits, reciprocal, taken = np.zeros(users), np.zeros(users), np.zeros(users)
    for user in range(users):
        took = rng.random((exposures[user], SHOWN)) < own[user] / SHOWN
        hits[user] = took.any(1).sum()
        taken[user] = took.sum()
        reciprocal[user] = (took.any(1) / (took.argmax(1) + 1)).sum()
    return Arm(exposures, hits, reciprocal, exposures * SHOWN, taken)


def test_figures_by_hand() -> None:
    arm = Arm(*map(np.array, ([2, 1, 1], [1, 1, 0], [0.5, 1.0, 0.0], [10, 5, 5], [2, 1, 0])))
    assert figures(arm) == pytest.approx([2 / 4, 1.5 / 4, (0.2 + 0.2 + 0) / 3])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """The share of 300 simulated tests whose 95 % interval holds the true difference, for each figure."""
    rng = np.random.default_rng(11)
    large = [simulated(60_000, chance, rng) for chance in (0.30, 0.36)]
    truth = figures(large[1]) - figures(large[0])
    assert (truth > 0.005).all()
    covered = np.zeros(len(FIGURES))
    tests = 300
    for number in range(tests):
        arms = {"a": simulated(250, 0.30, rng), "b": simulated(250, 0.36, rng)}
        _, apart = compare(arms, "a", 300, seed=number)
        for i, name in enumerate(FIGURES):
            covered[i] += apart["b"][name].low <= truth[i] <= apart["b"][name].high
    for count in covered:  # 300 resamples of 250 users cost a little coverage
        assert stats.binomtest(int(count), tests, 0.94).pvalue > 0.005, covered / tests


def test_an_interval_over_exposures_would_be_too_narrow() -> None:
    """Why users are drawn and not exposures: against the spread over independent tests, ours is right."""
    rng = np.random.default_rng(5)
    arms = [simulated(250, 0.3, rng) for _ in range(200)]
    true_spread = np.std([figures(arm)[0] for arm in arms])
    ours = np.mean([resampled(arm, 200, rng)[:, 0].std() for arm in arms[:20]])
    naive = np.mean([np.sqrt(r * (1 - r) / a.exposures.sum()) for a in arms[:20] for r in figures(a)[:1]])
    assert ours == pytest.approx(true_spread, rel=0.15)
    assert naive < 0.8 * true_spread


def test_equal_arms_differ_as_often_as_chance_says() -> None:
    rng = np.random.default_rng(3)
    beyond = 0
    for number in range(200):
        _, apart = compare({n: simulated(200, 0.3, rng) for n in "ab"}, "a", 200, seed=number)
        beyond += not apart["b"]["hit_rate"].low <= 0 <= apart["b"]["hit_rate"].high
    assert stats.binomtest(beyond, 200, 0.06).pvalue > 0.005


ROWS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=30)


@given(ROWS, st.integers(0, 5))
@settings(max_examples=50)
def test_figures_are_bounded_and_repeatable(rows: list[tuple[int, int, int]], seed: int) -> None:
    exposures, hits, shown = (np.array(column) for column in zip(*rows, strict=True))
    hits, shown = np.minimum(hits, exposures), np.maximum(shown, exposures)
    arm = Arm(exposures, hits, hits / 2, shown, hits)
    own, apart = compare({"a": arm, "b": arm}, "a", 50, seed)
    again, _ = compare({"a": arm, "b": arm}, "a", 50, seed)
    assert own == again
    for name in FIGURES:
        estimate = own["a"][name]
        assert 0 <= estimate.low <= estimate.high <= 1 and 0 <= estimate.value <= 1
        assert apart["b"][name].value == 0


def test_an_arm_without_users_has_no_figures() -> None:
    nobody = Arm(*(np.zeros(0) for _ in range(5)))
    assert np.isnan(figures(nobody)).all()
    assert np.isnan(resampled(nobody, 3, np.random.default_rng(0))).all()


def test_a_split_that_did_not_divide_as_told_is_found() -> None:
    shares = {"a": 0.5, "b": 0.5}
    fair = sample_ratio({"a": 50_200, "b": 49_800}, shares)
    unfair = sample_ratio({"a": 51_500, "b": 48_500}, shares)
    assert fair is not None and unfair is not None
    assert fair.p_value == pytest.approx(stats.chisquare([50_200, 49_800]).pvalue)
    assert (fair.mismatch, unfair.mismatch) == (False, True)
    missing = sample_ratio({"a": 1000}, shares)  # an arm that nobody reached
    assert missing is not None and missing.mismatch
    uneven: Any = sample_ratio({"a": 9_030, "b": 970}, {"a": 0.9, "b": 0.1})
    assert not uneven.mismatch
    assert sample_ratio({"a": 5}, {"a": 1.0}) is None


def test_the_mismatch_test_rejects_as_often_as_its_p_value_says() -> None:
    rng = np.random.default_rng(8)
    draws = rng.binomial(20_000, 0.3, 2000)
    values = [sample_ratio({"a": int(n), "b": 20_000 - int(n)}, {"a": 0.3, "b": 0.7}) for n in draws]
    below = sum(value is not None and value.p_value < 0.05 for value in values)
    assert stats.binomtest(below, 2000, 0.05).pvalue > 0.005
