"""The leakage checks, on clean sequences and on sequences that leak on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from springtide.errors import SpringtideError
from springtide.evaluation.leakage import check
from springtide.evaluation.ranking import FlatSequences, flatten
from springtide.schemas import SEQUENCES, VALID


def events_of(*users: dict[str, Any]) -> FlatSequences:
    """Users of {"items", "times", "parts"} and optionally "actions", "ratings" and "user_id"."""
    rows = [
        {
            "user_id": u.get("user_id", f"u{n}"), "items": u["items"], "timestamps": u["times"], "parts": u["parts"],
            "actions": u.get("actions", [1] * len(u["items"])), "targets": [True] * len(u["items"]),
            "ratings": u.get("ratings", [float("nan")] * len(u["items"])),
        }
        for n, u in enumerate(users)
    ]  # fmt: skip
    return flatten(pa.Table.from_pylist(rows, SEQUENCES), 10)


def user(items: Sequence[int], times: Sequence[int], parts: Sequence[int], **more: Any) -> dict[str, Any]:
    return {"items": items, "times": times, "parts": parts, **more}


CLEAN = events_of(user([0, 1, 2, 3], [1, 2, 5, 9], [0, 0, 1, 2]), user([0, 1, 4], [2, 6, 9], [0, 1, 2]))


def test_a_clean_split_passes() -> None:
    assert check(CLEAN, "leave_one_out") == {
        "learned_from": "training", "test_events": 2, "test_events_in_training": 0,
        "same_moment_in_training": 0, "histories_out_of_order": 0
    }  # fmt: skip
    found = check(CLEAN, "temporal")
    assert found["cuts"] == {"validation": 5, "test": 9} and found["training_events_after_the_cut"] == 0


@pytest.mark.parametrize("rating", [float("nan"), 4.0])
def test_a_test_event_in_the_training_part_is_found(rating: float) -> None:
    tied = user([3, 1, 3], [7, 7, 7], [0, 1, 2], ratings=[rating] * 3, user_id="bad one")
    with pytest.raises(SpringtideError, match="test event of user bad one on catalogue row 3 is in the training part"):
        check(events_of(user([0, 1, 2], [1, 2, 3], [0, 1, 2]), tied), "leave_one_out")


def test_a_test_event_in_the_validation_part_is_found_where_that_was_learned_from() -> None:
    tied = events_of(user([0, 1, 2], [1, 2, 3], [0, 1, 2]), user([3, 1, 1], [5, 7, 7], [0, 1, 2]))
    assert check(tied, "leave_one_out")["learned_from"] == "training"
    with pytest.raises(SpringtideError, match="catalogue row 1 is in the training or validation part too"):
        check(tied, "leave_one_out", VALID)


def test_a_user_who_is_there_twice_is_one_user() -> None:
    twins = (user([0, 1, 2], [1, 2, 3], [0, 1, 2], user_id="a"), user([2, 5, 6], [3, 4, 5], [0, 1, 2], user_id="a"))
    with pytest.raises(SpringtideError, match=r"\(1 such events\)"):
        check(events_of(*twins), "leave_one_out")
    others = events_of(twins[0], twins[1] | {"user_id": "b"})  # what another user took is no leak
    assert check(others, "leave_one_out")["same_moment_in_training"] == 0


def test_another_action_or_rating_of_the_same_moment_is_told_but_no_leak() -> None:
    seen_and_bought = user([3, 1, 3], [7, 7, 7], [0, 1, 2], actions=[2, 1, 1])
    rated_twice = user([3, 1, 3], [7, 7, 7], [0, 1, 2], ratings=[1.0, 2.0, 3.0])
    later = user([3, 1, 3], [7, 8, 9], [0, 1, 2])
    assert check(events_of(seen_and_bought, rated_twice, later), "leave_one_out")["same_moment_in_training"] == 2


def test_histories_run_forward() -> None:
    with pytest.raises(SpringtideError, match="user u1 goes back in time or to an earlier part at event 3"):
        check(replace(CLEAN, timestamps=np.array([1, 2, 5, 9, 2, 10, 9])), "leave_one_out")
    with pytest.raises(SpringtideError, match="user u0 goes back in time or to an earlier part at event 4"):
        check(replace(CLEAN, parts=np.array([0, 0, 1, 0, 0, 1, 2], dtype=np.int8)), "leave_one_out")


def test_under_temporal_nobody_trains_after_the_cut() -> None:
    late = events_of(user([0, 1, 2, 3], [1, 2, 5, 9], [0, 0, 1, 2]), user([0, 1], [2, 6], [0, 0], user_id="late"))
    assert check(late, "leave_one_out")["test_events"] == 1
    with pytest.raises(SpringtideError, match="a training event of user late is not before the first validation event"):
        check(late, "temporal")
    level = events_of(user([0, 1], [1, 9], [0, 2]), user([0, 1], [2, 9], [0, 1], user_id="level"))
    with pytest.raises(SpringtideError, match="a validation event of user level is not before the first test event"):
        check(level, "temporal")
