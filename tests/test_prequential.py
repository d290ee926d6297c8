"""The prequential replay: what is shown when, ranks worked by hand on a toy log, and how figures are drawn together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from springtide.errors import SpringtideError
from springtide.evaluation import prequential as p
from springtide.evaluation.ranking import FlatSequences, flatten
from springtide.model.batch import History
from springtide.schemas import SEQUENCES, TEST, TRAIN

Event = tuple[int, int, bool]  # item, time, may be predicted


def log_of(users: dict[str, Sequence[Event]], cut: int, catalogue: int) -> FlatSequences:
    """Events at or after `cut` are the test part. Ratings number a user's events, so that histories can be told."""
    rows = [
        {
            "user_id": name, "items": [e[0] for e in own], "actions": [1] * len(own),
            "ratings": [float(n) for n in range(len(own))], "timestamps": [e[1] for e in own],
            "parts": [TEST if e[1] >= cut else TRAIN for e in own], "targets": [e[2] for e in own],
        }
        for name, own in users.items()
    ]  # fmt: skip
    return flatten(pa.Table.from_pylist(rows, SEQUENCES), catalogue)


def plan_of(events: FlatSequences, limit: int = 10_000, exclude_seen: bool = True, **more: Any) -> p.Plan:
    plan = p.make_plan(events, TEST, limit, exclude_seen, **more)
    assert plan is not None
    return plan


class Popular:
    """Ranks items by how often it has seen them, and writes down what it is told."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = np.array(counts, dtype=np.float32)
        self.told: list[tuple[list[int], list[int]]] = []
        self.asked: list[tuple[list[int], int]] = []

    def score(self, histories: Sequence[History], now: np.ndarray) -> np.ndarray:
        self.asked += [(h.items.tolist(), int(t)) for h, t in zip(histories, now, strict=True)]
        return np.tile(self.counts, (len(histories), 1))

    def observe(self, histories: Sequence[History], events: Sequence[History]) -> None:
        for history, news in zip(histories, events, strict=True):
            self.told.append((history.items.tolist(), news.items.tolist()))
            np.add.at(self.counts, news.items, 1)


# Three users took item 0 before the cut at 100; afterwards everybody takes item 5, which nobody had, and then item 4.
FASHION = log_of(
    {
        "a": [(0, 1, True), (5, 100, True), (4, 104, True)],
        "b": [(0, 2, True), (5, 101, True), (4, 105, True)],
        "c": [(0, 3, True), (5, 102, True), (4, 106, True)],
    },
    cut=100, catalogue=6,
)  # fmt: skip
COUNTS = [3, 2, 2, 1, 0, 0]  # of the training part, with others' events


def test_everybodys_events_help_at_once_and_ranks_are_those_worked_by_hand() -> None:
    plan = plan_of(FASHION)
    assert FASHION.timestamps[plan.asked].tolist() == [100, 101, 102, 104, 105, 106] and plan.cut == 4
    # Frozen: candidates 1 2 3 4 5 by counts 2 2 1 0 0, so item 5 is fifth and item 4 fourth.
    assert p.replay_frozen(plan, Popular(COUNTS).score).tolist() == [5, 5, 5, 4, 4, 4]
    # Own events: by the time of item 4, item 5 is no candidate any more, but it ranked below anyway.
    assert p.replay_history(plan, Popular(COUNTS).score).tolist() == [5, 5, 5, 4, 4, 4]
    # Live, an event at a time. Item 5: never seen: fifth of 1 2 3 4 5; once (level with 3, below it by row): fourth;
    # twice (level with 1 and 2): third. Item 4 (5 is gone): never seen: fourth of 1 2 3 4; once: level with 3: fourth;
    # twice: level with 1 and 2, above 3: third.
    one = Popular(COUNTS)
    assert p.replay_live(plan, one, chunk=1).tolist() == [5, 4, 3, 4, 4, 3]
    assert one.told == [([0], [5])] * 3 + [([0, 5], [4])] * 3
    # Two at a time: the second of a chunk is asked before the first was counted.
    assert p.replay_live(plan, Popular(COUNTS), chunk=2).tolist() == [5, 5, 3, 4, 4, 4]
    # All at once: nothing has been counted when the last is asked.
    assert p.replay_live(plan, Popular(COUNTS), chunk=100).tolist() == [5, 5, 5, 4, 4, 4]


def test_what_is_worth_knowing_is_told_as_a_ratio() -> None:
    plan = plan_of(FASHION)
    ranks = {"frozen": p.replay_frozen(plan, Popular(COUNTS).score),
             "live": p.replay_live(plan, Popular(COUNTS), chunk=1)}  # fmt: skip
    told = p.summarise(plan, ranks, 200)["all"]
    frozen = (3 / log2(6) + 3 / log2(5)) / 6
    live = (1 / log2(6) + 3 / log2(5) + 2 / log2(4)) / 6
    assert told["events"] == 6 and told["modes"]["frozen"]["ndcg@10"]["value"] == pytest.approx(frozen)
    assert told["modes"]["live"]["ndcg@10"]["value"] == pytest.approx(live)
    ratio = told["ratios"]["live/frozen"]
    assert set(told["ratios"]) == {"live/frozen"} and ratio["value"] == pytest.approx(live / frozen)
    # The best a resample can do is user c three times, the worst is user a.
    best = (1 / log2(4) + 1 / log2(4)) / (1 / log2(6) + 1 / log2(5))
    assert 1 <= ratio["lo"] <= ratio["value"] <= ratio["hi"] <= best + 1e-12


def test_a_fashion_that_begins_after_the_cut_is_missed_by_a_frozen_model() -> None:
    """Forty users take item 10; before, items 1 to 9 had been taken 9 to 1 times, and it never."""
    events = log_of({f"u{n:02}": [(0, 1, True), (10, 100 + n, True)] for n in range(40)}, 100, 11)
    plan, counts = plan_of(events), [40, *range(9, 0, -1), 0]
    ranks = {"frozen": p.replay_frozen(plan, Popular(counts).score),
             "history": p.replay_history(plan, Popular(counts).score),
             "live": p.replay_live(plan, Popular(counts), chunk=1)}  # fmt: skip
    assert ranks["frozen"].tolist() == ranks["history"].tolist() == [10] * 40
    # Counted n times, it comes after the 10 - n items that were taken n times or more.
    assert ranks["live"].tolist() == [10, *range(10, 1, -1)] + [1] * 30
    told = p.summarise(plan, ranks, 300)["all"]["ratios"]
    assert told["live/frozen"] == told["live/history"] and told["live/frozen"]["lo"] > 2
    assert told["history/frozen"] == {"value": 1, "lo": 1, "hi": 1}


def test_requests_come_at_the_event_or_at_the_cut() -> None:
    plan, frozen, history = plan_of(FASHION), Popular(COUNTS), Popular(COUNTS)
    p.replay_frozen(plan, frozen.score)
    assert frozen.asked == [([0], 4)] * 3  # once for each user, after the last event before the cut
    p.replay_history(plan, history.score, batch_size=2)
    assert history.asked == [([0], 100), ([0], 101), ([0], 102), ([0, 5], 104), ([0, 5], 105), ([0, 5], 106)]


def test_repeats_and_context_are_revealed_but_not_asked_about() -> None:
    events = log_of({"a": [(0, 1, True), (1, 10, False), (0, 11, True), (2, 12, True), (2, 13, True)]}, 10, 4)
    plan = plan_of(events)
    assert events.timestamps[plan.asked].tolist() == [12] and plan.skipped == 2 and plan.eligible == 1
    live = Popular([1, 0, 0, 0])
    p.replay_live(plan, live)
    assert live.told == [([0], [1, 0, 2, 2])] and live.asked == [([0, 1, 0], 12)]
    again = plan_of(events, exclude_seen=False)
    assert events.timestamps[again.asked].tolist() == [11, 12, 13] and again.skipped == 0
    # item 0 of the history is a candidate and by far the most popular
    assert p.replay_history(again, Popular([9, 0, 0, 0]).score).tolist() == [1, 3, 3]


def test_frozen_still_offers_what_was_taken_after_the_cut() -> None:
    events = log_of({"a": [(0, 1, True), (1, 10, True), (2, 11, True)]}, 10, 3)
    plan = plan_of(events)
    assert p.replay_frozen(plan, Popular([3, 2, 1]).score).tolist() == [1, 2]
    assert p.replay_history(plan, Popular([3, 2, 1]).score).tolist() == [1, 1]  # item 1 is no candidate any more


def test_users_without_a_past_are_asked_with_an_empty_history() -> None:
    events = log_of({"a": [(0, 1, True), (1, 10, True)], "new": [(1, 11, True), (0, 12, True)]}, 10, 2)
    asked = Popular([1, 0])
    assert p.replay_frozen(plan_of(events), asked.score).tolist() == [1, 2, 1]
    assert asked.asked == [([0], 2), ([], 2)]


def test_above_the_limit_whole_users_are_drawn_and_all_events_are_revealed() -> None:
    users = {f"u{n}": [(0, 1, True), *[(i, 100 + 7 * i + n, True) for i in range(1, 5)]] for n in range(20)}
    events = log_of(users, 100, 5)
    plan = plan_of(events, limit=22)
    assert len(plan.asked) == 20 and len(np.unique(plan.users)) == 5 and plan.eligible == 80
    assert (np.diff(events.timestamps[plan.asked]) >= 0).all() and len(plan.revealed) == 80
    live = Popular([20, 0, 0, 0, 0])
    p.replay_live(plan, live, chunk=9)
    assert live.counts.tolist() == [20, 20, 20, 20, 20] and len(live.asked) == 20
    others = plan_of(events, limit=22, seed=1)
    assert set(plan.users.tolist()) != set(others.users.tolist())
    assert plan_of(events, limit=22).asked.tolist() == plan.asked.tolist()
    assert len(plan_of(events, limit=1).asked) == 4  # one user at least
    assert len(plan_of(events, limit=80).asked) == 80


def test_a_long_replay_is_revealed_in_larger_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    users = {f"u{n}": [(0, 1, True), *[(i, 100 + 7 * i + n, True) for i in range(1, 5)]] for n in range(20)}
    plan = plan_of(log_of(users, 100, 5))
    assert len(plan.revealed) == 80 and p.describe(plan)["chunk"] == p.CHUNK
    monkeypatch.setattr(p, "CHUNK", 2)
    monkeypatch.setattr(p, "CHUNKS", 9)
    live = Popular([20, 0, 0, 0, 0])
    told: list[int] = []
    observe = live.observe
    live.observe = lambda histories, events: (told.append(sum(map(len, events))), observe(histories, events))[1]
    p.replay_live(plan, live)
    assert told == [9] * 8 + [8] and p.describe(plan)["chunk"] == 9


def test_nothing_to_predict_is_no_plan() -> None:
    assert p.make_plan(log_of({"a": [(0, 1, True), (1, 10, False)]}, 10, 2), TEST, 9, True) is None
    assert p.make_plan(log_of({"a": [(0, 1, True), (0, 10, True)]}, 10, 2), TEST, 9, True) is None


def test_nan_is_refused_with_the_users_name() -> None:
    def broken(histories: Sequence[History], now: np.ndarray) -> np.ndarray:
        return np.where(now[:, None] == 105, np.nan, np.zeros((len(histories), 6)))

    with pytest.raises(SpringtideError, match="user b hold NaN"):
        p.replay_history(plan_of(FASHION), broken)


def test_sessions_begin_after_half_an_hour() -> None:
    minute = 60_000
    times = [
        0,
        40 * minute,
        70 * minute,
        70 * minute + 1,
        100 * minute + 2,
    ]  # pauses of 40, 30, 0 and 30 minutes + 1 ms
    events = log_of({"a": [(n, t, True) for n, t in enumerate(times)], "new": [(0, times[1] + 5, True)]}, 1, 6)
    plan = plan_of(events)
    starts = dict(zip(zip(plan.users.tolist(), events.timestamps[plan.asked].tolist(), strict=True),
                      plan.session_starts.tolist(), strict=True))  # fmt: skip
    assert starts == {(0, times[1]): True, (1, times[1] + 5): True, (0, times[2]): False, (0, times[3]): False,
                      (0, times[4]): True}  # fmt: skip
    ranks = np.array([1, 0, 1, 3, 0])  # in time order
    told = p.summarise(plan, {"frozen": ranks}, 100)
    assert told["session_start"]["events"] == 3 and told["within_session"]["events"] == 2
    assert told["session_start"]["modes"]["frozen"]["hr@10"]["value"] == pytest.approx(1 / 3)
    assert told["within_session"]["modes"]["frozen"]["ndcg@10"]["value"] == pytest.approx((1 + 1 / 2) / 2)


def test_a_figure_is_the_mean_over_events_and_the_bootstrap_draws_users() -> None:
    events = log_of(
        {"a": [(0, 1, True), (1, 10, True)], "b": [(0, 1, True), *[(i, 10 + i, True) for i in (1, 2, 3)]]}, 10, 5
    )
    plan = plan_of(events)
    ranks = np.where(plan.users == 0, 1, 0)  # all of a's, none of b's
    told = p.summarise(plan, {"x": ranks, "y": np.zeros_like(ranks)}, 500)["all"]
    assert told["modes"]["x"]["hr@10"]["value"] == pytest.approx(1 / 4)
    assert told["modes"]["x"]["user_mean_ndcg@10"]["value"] == pytest.approx(1 / 2)
    # Two users can be drawn in three ways: both a, one of each, both b.
    assert (told["modes"]["x"]["hr@10"]["lo"], told["modes"]["x"]["hr@10"]["hi"]) == (0, 1)
    assert told["ratios"] == {"y/x": None}  # drawn both b, x has no hit to divide by
    assert p.summarise(plan, {"y": np.zeros_like(ranks), "x": ranks}, 100)["all"]["ratios"] == {"x/y": None}


# ---------------------------------------------------------------- for any log
CATALOGUE = 7
user_events = st.lists(st.tuples(st.integers(0, CATALOGUE - 1), st.integers(0, 12), st.booleans()), max_size=9)


@given(st.lists(user_events, min_size=1, max_size=5), st.integers(0, 12), st.integers(1, 6), st.booleans())
def test_at_each_event_exactly_the_events_before_it_are_shown(
    logs: list[list[Event]], cut: int, step: int, exclude_seen: bool
) -> None:
    users = {f"u{n}": sorted(own, key=lambda e: e[1]) for n, own in enumerate(logs) if own}
    if not users:
        return
    events = log_of(users, cut, CATALOGUE)
    expected = {}  # (user, place) -> (places shown, time), for every event that may be predicted
    for number, own in enumerate(users.values()):
        for place, (item, time, target) in enumerate(own):
            seen = {e[0] for e in own[:place]}
            if time >= cut and target and not (exclude_seen and item in seen):
                expected[number, place] = (tuple(range(place)), time)
    plan = p.make_plan(events, TEST, 10_000, exclude_seen)
    if plan is None:
        assert expected == {}
        return
    asked: list[tuple[tuple[int, ...], int]] = []
    told = Counter[tuple[int, ...]]()

    class Recorder:
        def score(self, histories: Sequence[History], now: np.ndarray) -> np.ndarray:
            asked.extend((tuple(map(int, h.ratings)), int(t)) for h, t in zip(histories, now, strict=True))
            return np.stack([np.roll(np.arange(CATALOGUE), len(h)) for h in histories])

        def observe(self, histories: Sequence[History], news: Sequence[History]) -> None:
            for h, e in zip(histories, news, strict=True):
                assert h.ratings.tolist() == list(range(len(h)))  # all that came before, of this user
                assert e.ratings.tolist() == list(range(len(h), len(h) + len(e)))  # and then what is new
                told.update(zip(e.items.tolist(), e.timestamps.tolist(), strict=True))

    ranks = p.replay_history(plan, Recorder().score, step)
    places = [(int(u), int(r - events.offsets[u])) for u, r in zip(plan.users, plan.asked, strict=True)]
    assert dict(zip(places, asked, strict=True)) == expected and len(places) == len(expected)
    times = [t for _, t in asked]
    assert times == sorted(times)
    for (user, place), rank in zip(places, ranks, strict=True):
        scores = np.roll(np.arange(CATALOGUE, dtype=float), place)
        own = list(users.values())[user]
        if exclude_seen:
            scores[[e[0] for e in own[:place]]] = -np.inf
        assert rank == 1 + (scores > scores[own[place][0]]).sum()

    asked.clear()
    assert p.replay_live(plan, Recorder(), chunk=step).tolist() == ranks.tolist()
    assert dict(zip(places, asked, strict=True)) == expected
    assert told == Counter((e[0], e[1]) for own in users.values() for e in own if e[1] >= cut)

    asked.clear()
    p.replay_frozen(plan, Recorder().score, step)
    before = {tuple(range(sum(e[1] < cut for e in own))) for own in users.values()}
    assert {shown for shown, _ in asked} <= before and {t for _, t in asked} == {plan.cut}


def test_a_user_of_many_events_does_not_crowd_out_the_others() -> None:
    owners = np.concatenate([np.repeat(np.arange(300), 10), np.full(100_000, 300)])
    for seed in range(20):
        chosen = p._draw_users(owners, 301, 2000, seed)
        assert chosen.sum() == 200 and not chosen[300]
    assert p._draw_users(owners, 301, 5, 0).sum() == 1  # nobody fits: the lightest all the same
    assert p._draw_users(owners, 301, 10**6, 0).all()
