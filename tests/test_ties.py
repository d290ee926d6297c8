"""Events with equal times: how they are counted, what may change places, and what it does to the figures."""

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

from springtide.evaluation import ties
from springtide.evaluation.ranking import FlatSequences, build_cases, flatten
from springtide.model.batch import History
from springtide.schemas import SEQUENCES, TEST, TRAIN, VALID

LOO, CATALOGUE = "leave_one_out", 10


def events_of(*users: tuple[Sequence[int], Sequence[int], Sequence[int]], **more: Any) -> FlatSequences:
    """Users of (items, times, parts)."""
    rows = [
        {"user_id": f"u{n:03}", "items": i, "timestamps": t, "parts": p, "actions": [1] * len(i),
         "ratings": [float(x) for x in i], "targets": more.get("targets", [True] * len(i))}
        for n, (i, t, p) in enumerate(users)
    ]  # fmt: skip
    return flatten(pa.Table.from_pylist(rows, SEQUENCES), CATALOGUE)


def by_item(events: FlatSequences) -> np.ndarray:
    return events.items.astype(float)


def test_neighbours_in_time_are_counted() -> None:
    events = events_of(
        ([0, 1, 2, 3], [1, 2, 3, 4], [0, 0, 1, 2]),  # no tie
        ([0, 1, 2, 3], [1, 1, 3, 3], [0, 0, 1, 2]),  # the target ties with what is shown last
        ([0, 1, 2, 3, 4], [1, 2, 3, 5, 5], [0, 0, 1, 2, 2]),  # the target ties with what follows
        ([0, 1, 2, 3, 4], [5, 5, 5, 5, 5], [0, 0, 1, 2, 2]),  # with both
    )
    assert ties.count(build_cases(events, TEST, LOO)) == {
        "events": 18, "events_tied": 4 + 2 + 5, "targets": 4, "targets_with_history": 2, "targets_with_next": 2,
        "targets_with_either": 3,
    }  # fmt: skip
    alone = build_cases(events_of(([0], [1], [2]), ([0], [1], [2])), TEST, "temporal")
    assert ties.count(alone)["events_tied"] == 0  # two users at the same time are no tie


def test_the_order_of_the_log_changes_nothing() -> None:
    events = events_of(([3, 1, 2, 0], [1, 1, 1, 1], [0, 0, 1, 2]), ([1, 0, 2], [1, 2, 2], [0, 1, 2]))
    same = ties.reorder(events, np.arange(7.0), swap=True)
    assert same.items.tolist() == events.items.tolist() and same.targets.tolist() == events.targets.tolist()


def test_only_events_of_one_moment_and_part_change_places() -> None:
    events = events_of(([9, 8, 7, 5, 6, 4, 3, 2], [1, 2, 2, 2, 2, 2, 5, 5], [0, 0, 0, 1, 1, 1, 2, 2]))
    kept = ties.reorder(events, by_item(events), swap=False)
    assert kept.items.tolist() == [9, 7, 8, 4, 5, 6, 2, 3]
    assert kept.ratings.tolist() == kept.items.tolist()  # all of an event moves
    assert kept.timestamps is events.timestamps and kept.parts is events.parts
    # Swapping concerns targets of one moment; these are of different ones.
    assert ties.reorder(events, by_item(events), swap=True).items.tolist() == kept.items.tolist()


def test_targets_of_one_moment_may_change_places_but_training_events_never_become_targets() -> None:
    events = events_of(([7, 9, 8, 1], [3, 3, 3, 3], [0, 0, 1, 2]), ([0, 2, 3], [1, 3, 3], [0, 1, 2]))
    swapped = ties.reorder(events, by_item(events), swap=True)
    assert swapped.items.tolist() == [7, 9, 1, 8, 0, 2, 3]  # the larger of validation and test is the last
    kept = ties.reorder(events, by_item(events), swap=False)
    assert kept.items.tolist() == [7, 9, 8, 1, 0, 2, 3]


def test_a_swap_is_a_matter_of_chance() -> None:
    events = events_of(*[([0, 1, 2], [1, 3, 3], [0, 1, 2])] * 400)
    rng = np.random.default_rng(0)
    last = ties.reorder(events, rng.random(1200), swap=True).items[2::3]
    assert set(last.tolist()) == {1, 2} and 150 < (last == 1).sum() < 250


def test_context_moves_with_what_it_is() -> None:
    events = events_of(([5, 4, 3, 2], [1, 2, 2, 2], [0, 1, 1, 2]), targets=[True, True, False, True])
    swapped = ties.reorder(events, by_item(events), swap=True)  # validation: 3 (context), 4; then 4 > 2 changes places
    assert swapped.items.tolist() == [5, 3, 2, 4] and swapped.targets.tolist() == [True, False, True, True]


tied_users = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.sampled_from([TRAIN, VALID, TEST])), max_size=8),
    min_size=1, max_size=4,
)  # fmt: skip


@given(tied_users, st.integers(0, 1000), st.booleans())
def test_whatever_the_log_nothing_leaves_its_user_time_and_training_part(
    users: list[list[tuple[int, int, int]]], seed: int, swap: bool
) -> None:
    kept = [sorted(u, key=lambda e: (e[2], e[1])) for u in users if u]
    # Parts follow one another in time but meet at one moment.
    events = events_of(*[([e[0] for e in u], [e[2] * 3 + e[1] for e in u], [e[2] for e in u]) for u in kept])
    other = ties.reorder(events, np.random.default_rng(seed).random(len(events.items)), swap)

    def bag(found: FlatSequences, training: bool) -> Counter[tuple[int, int, int]]:
        rows = (found.parts == TRAIN) == training
        return Counter(zip(found.users[rows].tolist(), found.timestamps[rows].tolist(), found.items[rows].tolist(),
                           strict=True))  # fmt: skip

    assert bag(events, True) == bag(other, True) and bag(events, False) == bag(other, False)
    assert other.offsets is events.offsets


class LastItem:
    """Ranks first the item after the last one shown; counts how many it is asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, histories: Sequence[History]) -> np.ndarray:
        self.asked += len(histories)
        return np.stack([-((np.arange(CATALOGUE) - h.items[-1] - 1) % CATALOGUE) for h in histories]).astype(np.float32)


def test_the_effect_is_worked_by_hand_and_only_changed_cases_are_asked_again() -> None:
    # User 0 ends on a tie of validation 5 and test 4; user 1 has no tie.
    events = events_of(([1, 5, 4], [1, 9, 9], [0, 1, 2]), ([1, 2, 3], [1, 2, 3], [0, 1, 2]))
    cases, scorer = build_cases(events, TEST, LOO), LastItem()
    found = ties.effect(
        cases, TEST, LOO, {"model": scorer}, np.arange(CATALOGUE), orders=20, swap=True, exclude_seen=True, batch_size=8
    )
    # As logged: after 5, item 4 comes after 6 7 8 9 0 2 3 (1 and 5 are seen): eighth. Swapped: after 4 comes 5: first.
    logged, swapped = (1 / log2(9) + 1) / 2, 1.0
    told = found["scorers"]["model"]
    assert (told["log"], told["min"], told["max"]) == pytest.approx((logged, logged, swapped))
    assert told["by_item"] == pytest.approx(swapped)  # 4 before 5
    share = found["changed_targets"] * 2  # of the orders, how many swapped user 0
    assert 0.2 < share < 0.8 and told["mean"] == pytest.approx(share * swapped + (1 - share) * logged)
    assert scorer.asked == 2 + round(20 * share) + 1
    still = ties.effect(
        cases, TEST, LOO, {"model": LastItem()}, np.arange(CATALOGUE), orders=3, swap=False, exclude_seen=True,
        batch_size=8,
    )  # fmt: skip
    assert still["scorers"]["model"] == {key: pytest.approx(logged) for key in ("log", "mean", "min", "max", "by_item")}
    assert still["changed_targets"] == 0


def test_shuffled_histories_are_asked_again() -> None:
    """The training events tie, and the target follows one of them."""
    events = events_of(([1, 6, 9, 2], [1, 1, 1, 9], [0, 0, 0, 2]))
    cases = build_cases(events, TEST, "temporal")
    found = ties.effect(
        cases, TEST, "temporal", {"model": LastItem()}, np.array([5, 6, 2, 3, 4, 0, 1, 7, 8, -1]), orders=30, swap=True,
        exclude_seen=True, batch_size=8,
    )["scorers"]["model"]  # fmt: skip
    # The target 2 (1, 6 and 9 are seen): after 1 it is first; after 6, fourth (7 8 0 2); after 9, second (0 2).
    after = {1: 1.0, 6: 1 / log2(5), 9: 1 / log2(3)}
    assert found["log"] == pytest.approx(after[9]) and found["max"] == 1.0
    assert found["min"] == pytest.approx(after[6]) and found["by_item"] == pytest.approx(1.0)
