"""What is popular, and how soon it is forgotten: for whom nothing is known of, and for recent popularity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.bundle import load_bundle
from springtide.model.batch import EMPTY, History
from springtide.model.decayed import DecayedCounts, decayed_table
from springtide.model.recommender import Recommender
from springtide.model.tables import from_arrays
from springtide.serving.engine import ScoreRequest
from springtide.serving.popular import load_popular
from springtide.training.half_lives import LEAST, USUAL, newcomers_half_life, recent_half_life
from springtide.training.statistics import collect, merge
from springtide.training.tabulate import popular
from toy import sequences_of, tables_of, toy_bundle, toy_settings

ITEMS = 12
MODEL = toy_settings(Path("none")).model
FOREVER = float("inf")
events = st.lists(st.tuples(st.integers(0, ITEMS - 1), st.integers(0, 1000)), max_size=40)
half_lives = st.sampled_from([3.0, 200.0, FOREVER])


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item for item, _ in pairs], np.int64), np.array([at for _, at in pairs], np.int64)


# ---------------------------------------------------------------- counts that fade
@given(events, events, half_lives)
@settings(max_examples=80, deadline=None)
def test_counts_equal_a_loop_in_whatever_order_events_arrive(
    first: list[tuple[int, int]], then: list[tuple[int, int]], half_life: float
) -> None:
    found = DecayedCounts(np.zeros(ITEMS), 0, half_life).after(*arrays(first)).after(*arrays(then))
    moment = max([at for _, at in first + then], default=0)
    expected = np.zeros(ITEMS)
    for item, at in first + then:
        expected[item] += 0.5 ** ((moment - at) / half_life)
    assert found.moment == moment
    np.testing.assert_allclose(found.counts, expected, rtol=1e-9, atol=1e-12)


@given(events, st.lists(st.integers(0, 1001), min_size=1, max_size=6, unique=True).map(sorted), half_lives)
@settings(max_examples=80, deadline=None)
def test_a_table_holds_what_was_before_each_edge(
    pairs: list[tuple[int, int]], edges: list[int], half_life: float
) -> None:
    table = decayed_table(*arrays(pairs), ITEMS, half_life, np.array(edges))
    for row, edge in zip(table, edges, strict=True):
        expected = np.zeros(ITEMS)
        for item, at in pairs:
            if at < edge:
                expected[item] += 0.5 ** ((edge - at) / half_life)
        np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the choice
def fashions(length: int, users: int = 600, catalogue: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each user's first of two events is one of the five items in fashion, five others after every `length` users."""
    rng = np.random.default_rng(0)
    items = np.stack([(5 * (np.arange(users) // length) + rng.integers(0, 5, users)) % catalogue,
                      rng.integers(0, catalogue, users)], 1)  # fmt: skip
    return items.ravel(), np.repeat(1000 * np.arange(users), 2), np.tile([True, False], users)


def test_fashions_are_followed_as_fast_as_they_go() -> None:
    slow, fast = (newcomers_half_life(*fashions(length), 300) for length in (60, 10))
    assert fast < slow < 1
    slow, fast = (recent_half_life(*fashions(length)[:2], 300) for length in (60, 10))
    assert fast < slow <= USUAL


def test_without_a_trend_nothing_is_forgotten() -> None:
    rng = np.random.default_rng(1)
    chances = 1 / np.arange(1, 301)
    items = rng.choice(300, 4000, p=chances / chances.sum())
    assert newcomers_half_life(items, np.arange(4000), np.ones(4000, bool), 300) == FOREVER
    assert recent_half_life(items, np.arange(4000), 300) in (USUAL, 0.3)


def test_what_is_taken_is_not_counted_before() -> None:
    """Everybody takes something new, twice: if events counted for themselves the latest would win."""
    items, times = np.repeat(np.arange(300), 2), np.repeat(1000 * np.arange(300), 2)
    assert newcomers_half_life(items, times, np.tile([True, False], 300), 300) == FOREVER
    assert recent_half_life(items, times, 300) == USUAL


@pytest.mark.parametrize("users", [0, 1, LEAST])
def test_too_few_newcomers_or_no_times_choose_nothing(users: int) -> None:
    items, times, first = fashions(10)
    few = slice(None, 2 * users)
    assert newcomers_half_life(items[few], times[few], first[few], 300) == FOREVER
    assert newcomers_half_life(items, np.full(len(items), 7), first, 300) == FOREVER
    assert recent_half_life(items[:2], times[:2], 300) == recent_half_life(items, np.full(len(items), 7), 300) == USUAL


def test_the_first_of_each_user_that_may_be_predicted() -> None:
    rows = [[1, 2, 3], [4], [], [5, 6]]
    wanted = [[False, True, True], [True], [], [False, False]]
    logs = [sequences_of(rows, targets=wanted), sequences_of([[7, 8]])]
    found = merge([collect(log, ITEMS, MODEL) for log in logs])
    assert found.wanted.tolist() == [2, 3, 4, 7, 8]
    assert found.wanted_first.tolist() == [True, False, True, True, False]


# ---------------------------------------------------------------- in use
def of_late(bundle: Path) -> Recommender:
    """A bundle's recommender, for which an event of a day before counts half."""
    recommender = load_bundle(bundle).recommender
    counts = DecayedCounts(np.zeros(len(recommender.item_ids)), 0, 86_400_000.0)
    recommender._popular = counts.after(np.array([3, 3, 5]), np.array([0, 0, 2 * 86_400_000]))
    return recommender


def test_newcomers_get_what_is_popular_now(tmp_path: Path) -> None:
    recommender = of_late(toy_bundle(tmp_path))
    assert recommender.score([EMPTY]).logits[0].argsort()[::-1][:2].tolist() == [5, 3]  # 1 and 2 * 0.5 ** 2
    shares = recommender.explain(EMPTY, np.array([3, 5])).shares
    np.testing.assert_allclose(shares["popularity"], np.log1p([0.5, 1.0]), rtol=1e-6)
    day = np.array([3, 3, 3]) * 86_400_000
    wanted = recommender.actions.index("purchase")
    seen = History(np.array([3, 3, 3]), np.full(3, wanted), np.full(3, np.nan, np.float32), day)
    recommender.observe([EMPTY], [seen])
    np.testing.assert_allclose(recommender.score([EMPTY]).logits[0][[3, 5]], np.log1p([3.25, 0.5]), rtol=1e-6)


def test_it_comes_back_out_of_its_arrays_and_a_bundle_of_before_counts_alike() -> None:
    log = sequences_of([[1, 2, 3], [3, 4]], timestamps=[[10, 20, 30], [25, 40]])
    tables = tables_of(log, ITEMS, MODEL)
    assert tables.popular.moment == 40 and tables.popular.half_life == FOREVER
    assert tables.popular.counts.tolist() == popular(collect(log, ITEMS, MODEL)).counts.tolist()
    kept = tables.arrays()
    again = from_arrays(kept).popular
    assert (again.moment, again.half_life) == (40, FOREVER) and again.counts.tolist() == tables.popular.counts.tolist()
    before = from_arrays({name: array for name, array in kept.items() if not name.startswith("popular_at")
                          and name != "popular"}).popular  # fmt: skip
    assert before.counts.tolist() == tables.popularity.tolist() and before.half_life == FOREVER


def test_the_ingress_offers_the_same(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path)
    recommender = load_bundle(bundle).recommender
    logits = recommender.score([EMPTY]).logits
    rows, scores = recommender.top_k(logits, 10)
    answer = load_popular(bundle, "toy").answer(ScoreRequest(k=10))
    assert [item["item_id"] for item in answer["items"]] == [recommender.item_ids[row] for row in rows[0]]
    np.testing.assert_allclose([item["score"] for item in answer["items"]], scores[0], atol=1e-5)
