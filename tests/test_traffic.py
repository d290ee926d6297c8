"""Splits are stable, fair and independent; shadows are compared rightly and never delay or fail an answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from springtide.serving.engine import ScoreRequest
from springtide.serving.options import TrafficOptions
from springtide.serving.traffic import BUCKETS, Traffic, bucket, choose, overlap, rank_correlation, shares

ITEMS = st.lists(st.sampled_from([f"i{n}" for n in range(12)]), unique=True, max_size=8)
USERS = [f"user-{number}" for number in range(20_000)]


def drawn(options: TrafficOptions, users: list[str] = USERS) -> list[str | None]:
    return [choose(options, None, user, "r").model for user in users]


def test_a_split_follows_its_weights() -> None:
    options = TrafficOptions(split={"a": 50, "b": 30, "c": 20, "off": 0})
    counts = Counter(drawn(options))
    assert set(counts) == {"a", "b", "c"}
    assert stats.chisquare([counts[m] for m in "abc"], [10_000, 6_000, 4_000]).pvalue > 0.001
    assert shares(options) == {"a": 0.5, "b": 0.3, "c": 0.2}


@given(st.text(min_size=1, max_size=20), st.text(max_size=8))
def test_a_user_stays_with_a_model(user: str, salt: str) -> None:
    options = TrafficOptions(split={"a": 1, "b": 1}, salt=salt)
    assert len({choose(options, None, user, request_id) for request_id in map(str, range(20))}) == 1


def test_another_salt_draws_anew_and_independently() -> None:
    first, second = (drawn(TrafficOptions(split={"a": 1, "b": 1}, salt=salt)) for salt in ("x", "y"))
    table = [[sum(p == q == m for p, q in zip(first, second, strict=True)) for m in "ab"]]
    table.append([sum((p, q) == pair for p, q in zip(first, second, strict=True)) for pair in (("a", "b"), ("b", "a"))])
    assert stats.chi2_contingency(table).pvalue > 0.001


def test_a_change_of_weights_moves_only_the_difference() -> None:
    before = drawn(TrafficOptions(split={"a": 90, "b": 10}))
    after = drawn(TrafficOptions(split={"a": 80, "b": 20}))
    moved = Counter((p, q) for p, q in zip(before, after, strict=True) if p != q)
    assert set(moved) == {("a", "b")}
    assert moved["a", "b"] == pytest.approx(0.1 * len(USERS), rel=0.1)


def test_the_order_in_the_configuration_moves_nobody() -> None:
    weights = {"a": 50, "b": 30, "c": 20}
    assert drawn(TrafficOptions(split=weights)) == drawn(TrafficOptions(split=dict(reversed(weights.items()))))


@pytest.mark.parametrize("weights", [{"new": 25}, {"a": 25}, {"c": 80}, {"a": 0}], ids=str)
def test_a_changed_model_moves_no_user_between_two_others(weights: dict[str, float]) -> None:
    split = {"a": 50.0, "b": 30.0, "c": 20.0}
    before, after = drawn(TrafficOptions(split=split)), drawn(TrafficOptions(split={**split, **weights}))
    moved = {(p, q) for p, q in zip(before, after, strict=True) if p != q}
    assert moved and all(next(iter(weights)) in pair for pair in moved)


def test_a_test_is_another_one_with_another_split_or_salt() -> None:
    def named(split: dict[str, float], salt: str = "") -> str | None:
        return choose(TrafficOptions(split=split, salt=salt), None, "u", "r").test

    same = [{"a": 1, "b": 3}, {"b": 75, "a": 25}, {"a": 0.1, "b": 0.3, "off": 0}]
    others = [named({"a": 3, "b": 1}), named({"a": 1, "c": 3}), named({"a": 1, "b": 3}, "salt")]
    assert len({named(split) for split in same}) == 1
    assert len({named(same[0]), *others}) == 4 and None not in others
    assert choose(TrafficOptions(split={"a": 1}), "a", "u", "r").test is None


def test_a_named_model_goes_before_the_split_and_strangers_are_drawn_by_request() -> None:
    options = TrafficOptions(split={"a": 1, "b": 1})
    assert (choose(options, "c", "u", "r").model, choose(options, "c", "u", "r").by) == ("c", "request")
    assert choose(TrafficOptions(), None, "u", "r").by == "default"
    strangers = Counter(choose(options, None, None, str(n)).model for n in range(2000))
    assert stats.binomtest(strangers["a"], 2000).pvalue > 0.001


@given(st.text(max_size=30), st.text(max_size=30))
def test_buckets_are_in_bounds(salt: str, key: str) -> None:
    assert 0 <= bucket(salt, key) < BUCKETS


@pytest.mark.parametrize(
    "values",
    [{"split": {"a": -1}}, {"split": {"a": 0}}, {"split": {"a": float("inf")}}, {"shadow": {"a": 1.1}}],
    ids=str,
)
def test_senseless_weights_are_refused(values: Any) -> None:
    with pytest.raises(ValidationError):
        TrafficOptions(**values)


# ---------------------------------------------------------------- comparing two answers
@given(ITEMS, ITEMS)
def test_measures_are_symmetric_and_bounded(first: list[str], second: list[str]) -> None:
    assert overlap(first, second) == overlap(second, first)
    assert rank_correlation(first, second) == pytest.approx(rank_correlation(second, first))
    assert 0 <= overlap(first, second) <= 1 and -1 - 1e-9 <= rank_correlation(first, second) <= 1 + 1e-9
    assert overlap(first, first) == rank_correlation(first, first) == 1


@given(st.permutations(list(range(8))), st.permutations(list(range(8))))
def test_the_correlation_of_permutations_is_spearmans(first: list[int], second: list[int]) -> None:
    ours = rank_correlation([f"i{n}" for n in first], [f"i{n}" for n in second])
    assert ours == pytest.approx(stats.spearmanr(np.argsort(first), np.argsort(second)).statistic)


def test_lists_with_nothing_in_common() -> None:
    assert overlap(["a", "b"], ["c", "d"]) == 0
    assert rank_correlation(["a", "b"], ["c", "d"]) < 0
    assert rank_correlation([], ["a"]) == 0


# ---------------------------------------------------------------- shadows
def answer(*items: str, score: float = 1.0) -> dict[str, Any]:
    return {"model": "a@1", "items": [{"item_id": item, "score": score} for item in items]}


def test_a_shadow_is_compared_with_what_was_shown() -> None:
    asked: list[ScoreRequest] = []

    async def score(request: ScoreRequest) -> dict[str, Any]:
        asked.append(request)
        return answer("x", "y", score=3.0)

    async def run() -> Traffic:
        traffic = Traffic(TrafficOptions(shadow={"b": 1, "a": 1}), score)
        request = ScoreRequest(k=2, explain=True)
        traffic.shadow(request, answer("x", "y"), "1")
        traffic.shadow(request, answer("y", "z", score=1.5), "2")
        await traffic.finished()
        return traffic

    (told,) = asyncio.run(run()).report()  # a model is no shadow of itself
    assert [(request.model, request.explain) for request in asked] == [("b", False)] * 2
    assert (told["model"], told["shadow"], told["requests"], told["failed"]) == ("a@1", "b", 2, 0)
    assert told["overlap"] == {"mean": 0.75, "deviation": 0.25}
    assert told["score_drift"] == {"mean": 1.75, "deviation": 0.25}


def test_a_share_of_requests_is_copied() -> None:
    count = 0

    async def score(request: ScoreRequest) -> dict[str, Any]:
        nonlocal count
        count += 1
        return answer("x")

    async def run() -> None:
        traffic = Traffic(TrafficOptions(shadow={"b": 0.25}, shadow_concurrency=256), score)
        for number in range(2000):
            traffic.shadow(ScoreRequest(), answer("x"), str(number))
            await asyncio.sleep(0)
        await traffic.finished()

    asyncio.run(run())
    assert stats.binomtest(count, 2000, 0.25).pvalue > 0.001


def test_a_shadow_that_hangs_or_fails_costs_the_answer_nothing() -> None:
    async def score(request: ScoreRequest) -> dict[str, Any]:
        if request.k == 1:
            raise ConnectionError("gone")
        await asyncio.sleep(60)
        return answer()

    async def run() -> Any:
        traffic = Traffic(TrafficOptions(shadow={"b": 1}, shadow_concurrency=3), score)
        traffic.shadow(ScoreRequest(k=1), answer("x"), "failing")
        await traffic.finished()
        began = time.monotonic()
        for number in range(1000):
            traffic.shadow(ScoreRequest(k=2), answer("x"), str(number))
        assert time.monotonic() - began < 1
        return traffic.report()

    (told,) = asyncio.run(run())
    assert (told["requests"], told["failed"], told["skipped"], told["overlap"]) == (0, 1, 997, None)
