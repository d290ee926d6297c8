"""What is popular, and how soon it is forgotten: for whom nothing is known of, and for recent popularity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from springtide.bundle import load_bundle
from springtide.model.answers import NewItem
from springtide.model.batch import EMPTY, History
from springtide.model.decayed import DecayedCounts, decayed_table
from springtide.model.recommender import Recommender
from springtide.model.tables import from_arrays
from springtide.ranks import LEAST
from springtide.serving.engine import Engine, ScoreRequest
from springtide.serving.policies import Policies
from springtide.serving.popular import load_popular
from springtide.training.popularity import USUAL, newcomers_half_life, recent_half_life
from springtide.training.statistics import collect, merge
from springtide.training.tabulate import HalfLives, choose_half_lives, tabulate
from toy import ITEMS_IN_TOY, sequences_of, toy_bundle, toy_settings

ITEMS = 12
MODEL = toy_settings(Path("none")).model
FOREVER = float("inf")
DAY = 86_400_000
events = st.lists(st.tuples(st.integers(0, ITEMS - 1), st.integers(0, 1000)), max_size=40)
half_lives = st.sampled_from([3.0, 200.0, FOREVER])


def arrays(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item for item, _ in pairs], np.int64), np.array([at for _, at in pairs], np.int64)


# ---------------------------------------------------------------- counts that fade
@given(events, events, half_lives)
@settings(max_examples=80)
def test_counts_equal_a_loop_in_which_a_silence_is_a_half_life_at_most(
    first: list[tuple[int, int]], then: list[tuple[int, int]], half_life: float
) -> None:
    """Of one call in whatever order its events arrive; what is older than the last call is as old as it is."""
    found = DecayedCounts(np.zeros(ITEMS), 0, half_life).after(*arrays(first)).after(*arrays(then))
    moment, expected = 0, np.zeros(ITEMS)
    for call in (first, then):
        for item, at in sorted(call, key=lambda pair: pair[1]):
            if at > moment:
                expected *= 0.5 ** (min(at - moment, half_life) / half_life)
                moment = at
            expected[item] += 0.5 ** ((moment - at) / half_life)
    assert found.moment == max([at for _, at in first + then], default=0)
    np.testing.assert_allclose(found.counts, expected, rtol=1e-9, atol=1e-12)


def test_after_a_silence_of_years_one_event_is_not_all_that_is_popular() -> None:
    """The log ended long before the model is served: what was popular then still is, but for what is new."""
    counts = DecayedCounts(np.array([80.0, 40.0, 1.0]), 0, float(DAY))
    later = counts.after(np.array([2]), np.array([1000 * DAY]))
    np.testing.assert_allclose(later.counts, [40, 20, 1.5])
    went_on = later.after(np.repeat(2, 2000), 1000 * DAY + np.arange(2000) * DAY // 100)
    assert went_on.counts[2] > went_on.counts[0]  # traffic does change it


@given(events, st.lists(st.integers(0, 1001), min_size=1, max_size=6, unique=True).map(sorted), half_lives)
@settings(max_examples=80)
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


def cases_of(asked: list[tuple[list[int], int, int]]) -> list[tuple[History, int]]:
    """(items of the history, time of its last event, target) as validation cases."""
    return [
        (History(np.array(seen), np.ones(len(seen), np.int64), np.full(len(seen), np.nan, np.float32),
                 np.full(len(seen), at)), target)
        for seen, at, target in asked
    ]  # fmt: skip


def test_fashions_are_followed_as_fast_as_they_go() -> None:
    slow, fast = (newcomers_half_life(*fashions(length), 300) for length in (60, 10))
    assert fast is not None and slow is not None and fast < slow < 1
    for length in (10, 60):
        items, times, first = fashions(length)
        late = np.flatnonzero(first & (times > 400_000))
        cases = cases_of([([299], int(times[n]), int(items[n])) for n in late])
        assert recent_half_life(items, times, 300, cases, None, True) < USUAL


def test_validation_is_asked_at_the_time_it_is_told() -> None:
    """All want what was the fashion at the cut, and left long before it."""
    items, times, _ = fashions(10)
    cases = cases_of([([299], 0, int(item)) for item in items[1180::2]] * 10)
    assert recent_half_life(items, times, 300, cases, 600_000, True) < USUAL
    assert recent_half_life(items, times, 300, cases, None, True) == USUAL


def test_without_a_trend_nothing_is_forgotten() -> None:
    rng = np.random.default_rng(1)
    chances = 1 / np.arange(1, 301)
    items, times = rng.choice(300, 4000, p=chances / chances.sum()), np.arange(4000)
    assert newcomers_half_life(items, times, np.ones(4000, bool), 300) is None
    cases = cases_of([([299], int(at), int(items[at])) for at in range(3000, 4000)])
    assert recent_half_life(items, times, 300, cases, None, True) == USUAL


def test_what_is_taken_is_not_counted_before() -> None:
    """Everybody takes something new and comes back for it: if events counted for themselves the latest would win."""
    items, times = np.repeat(np.arange(300), 2), np.repeat(1000 * np.arange(300), 2) + np.tile([0, 500], 300)
    assert newcomers_half_life(items, times, np.tile([True, False], 300), 300) is None
    own = cases_of([([n], 1000 * n + 500, n) for n in range(200, 300)])
    assert recent_half_life(items, times, 300, own, None, True) == USUAL  # what one took oneself is no candidate


@pytest.mark.parametrize("users", [0, 1, LEAST])
def test_too_few_newcomers_or_no_times_choose_nothing(users: int) -> None:
    items, times, first = fashions(10)
    few, alike = slice(None, 2 * users), np.full(len(items), 7)
    assert newcomers_half_life(items[few], times[few], first[few], 300) is None
    assert newcomers_half_life(items, alike, first, 300) is None
    cases = cases_of([([1], 5000, 2)])
    assert recent_half_life(items[few], times[few], 300, [], None, True) == USUAL
    assert recent_half_life(items, alike, 300, cases, None, True) == USUAL


def test_what_is_set_is_not_chosen() -> None:
    log = sequences_of([[1, 2, 3], [3, 4]])
    statistics, cases = collect(log, ITEMS, MODEL), cases_of([([1], 10**12, 2)] * 30)
    assert choose_half_lives(statistics, MODEL, cases, True).recent == USUAL
    given = MODEL.model_copy(update={"recent_half_life": 0.02})
    assert choose_half_lives(statistics, given, cases, True).recent == 0.02


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
    counts = DecayedCounts(np.zeros(len(recommender.item_ids)), 0, float(DAY))
    recommender.popular = counts.after(np.array([3, 3, 1, 5]), np.array([0, 0, DAY, 2 * DAY]))
    recommender._read_catalogue()
    return recommender


def taken(recommender: Recommender, item: int, days: int, times: int = 1) -> History:
    actions = np.full(times, recommender.actions.index("purchase"))
    return History(np.full(times, item), actions, np.full(times, np.nan, np.float32), np.full(times, days * DAY))


def order(recommender: Recommender) -> list[int]:
    return [int(row) for row in recommender.top_k(recommender.score([EMPTY]).logits, ITEMS_IN_TOY)[0][0]]


def test_newcomers_get_what_is_popular_now(tmp_path: Path) -> None:
    recommender = of_late(toy_bundle(tmp_path))
    assert order(recommender)[:2] == [5, 3]  # 1 and 2 * 0.5 ** 2
    shares = recommender.explain(EMPTY, np.array([3, 5])).shares
    np.testing.assert_allclose(shares["popularity"], np.log1p([0.5, 1.0]), rtol=1e-4)
    recommender.observe([EMPTY], [taken(recommender, 3, days=3, times=3)])
    np.testing.assert_allclose(recommender.score([EMPTY]).logits[0][[3, 5]], np.log1p([3.25, 0.5]), rtol=1e-4)


def test_of_what_has_no_count_of_late_the_most_popular_ever_is_the_best_guess(tmp_path: Path) -> None:
    """A log of years ago, and one event of today."""
    recommender = of_late(toy_bundle(tmp_path))
    recommender.observe([EMPTY], [taken(recommender, 7, days=5000)])
    of_late_first = [7, 5, 3, 1]
    ever = np.argsort(-recommender.popularity, kind="stable")
    assert order(recommender) == [*of_late_first, *(int(row) for row in ever if row not in of_late_first)]


def test_an_added_item_is_offered_once_it_is_taken(tmp_path: Path) -> None:
    recommender = load_bundle(toy_bundle(tmp_path)).recommender
    width = recommender.model.item_vectors.text.shape[1]
    text = np.full(384, 384**-0.5, np.float32)
    recommender.put_items([NewItem("new", "New", [], text, np.ones(width, np.float32))])
    row = recommender.index["new"]
    assert recommender.score([EMPTY]).logits[0][row] == 0
    recommender.observe([EMPTY], [taken(recommender, row, days=30_000, times=1000)])
    assert recommender.score([EMPTY]).logits[0].argmax() == row


@pytest.mark.parametrize("damping", [0.3, 2.0])
def test_what_newcomers_get_is_not_damped(tmp_path: Path, damping: float) -> None:
    path = toy_bundle(tmp_path)
    plain, damped = (Engine(load_bundle(path), "toy", Policies(popularity_damping=d)) for d in (0.0, damping))
    one, other = (engine.score([ScoreRequest(k=5, explain=True)])[0] for engine in (plain, damped))
    assert isinstance(one, dict) and isinstance(other, dict)
    assert one["items"] == other["items"] and one["items"][0]["item_id"] == "i39"
    known = [engine.score([ScoreRequest([{"item_id": "i03"}], k=5)])[0] for engine in (plain, damped)]
    assert known[0]["items"] != known[1]["items"]  # type: ignore[index]


def test_it_comes_back_out_of_its_arrays_and_a_bundle_of_before_counts_alike() -> None:
    log = sequences_of([[1, 2, 3], [3, 4]], timestamps=[[10, 20, 30], [25, 40]])
    tables = tabulate(collect(log, ITEMS, MODEL), MODEL, HalfLives(newcomers=0.5))
    assert (tables.popular.moment, tables.popular.half_life) == (40, 15.0)
    kept = tables.arrays()
    again = from_arrays(kept).popular
    assert (again.moment, again.half_life) == (40, 15.0) and again.counts.tolist() == tables.popular.counts.tolist()
    of_before = {name: array for name, array in kept.items() if name not in ("popular", "popular_at")}
    before = from_arrays(of_before).popular
    assert before.counts.tolist() == tables.popularity.tolist() and before.half_life == FOREVER


def test_times_before_1970_fade_as_well() -> None:
    log = sequences_of([[1, 2, 3]], timestamps=[[-(10**12), -(10**12) + DAY, -(10**12) + 2 * DAY]])
    counts = tabulate(collect(log, ITEMS, MODEL), MODEL, HalfLives(newcomers=0.5)).popular.counts
    assert counts[1:4].tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("of_before", [False, True])
def test_the_ingress_offers_the_same(tmp_path: Path, of_before: bool) -> None:
    bundle = toy_bundle(tmp_path)
    kept = load_file(bundle / "memory.safetensors")
    kept["popular"] = np.random.default_rng(0).permutation(ITEMS_IN_TOY).astype(np.float64)
    if of_before:
        del kept["popular"], kept["popular_at"]
    save_file(kept, bundle / "memory.safetensors")
    recommender = load_bundle(bundle, verify=False).recommender
    answer = load_popular(bundle, "toy").answer(ScoreRequest(k=10))
    expected = order(recommender)[:10]
    assert [item["item_id"] for item in answer["items"]] == [recommender.item_ids[row] for row in expected]
    scores = recommender.score([EMPTY]).logits[0][expected]
    np.testing.assert_allclose([item["score"] for item in answer["items"]], scores, atol=1e-5)
