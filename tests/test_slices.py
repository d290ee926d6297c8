"""Slices of the users, and how items without a training event are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from springtide.evaluation import comparison, slices
from springtide.evaluation.ranking import Cases, build_cases, flatten
from springtide.model.batch import History
from springtide.schemas import SEQUENCES, TEST, TRAIN, VALID

CATALOGUE = 6


def cases_of(*users: tuple[Sequence[int], Sequence[int]], split: str = "leave_one_out") -> Cases:
    """Users of (items, parts)."""
    rows: list[dict[str, Any]] = [
        {"user_id": f"u{n}", "items": i, "timestamps": list(range(len(i))), "parts": p, "actions": [1] * len(i),
         "ratings": [1.0] * len(i), "targets": [True] * len(i)}
        for n, (i, p) in enumerate(users)
    ]  # fmt: skip
    return build_cases(flatten(pa.Table.from_pylist(rows, SEQUENCES), CATALOGUE), TEST, split)


# Training events: item 0 five times, item 1 twice, item 2 once, items 3, 4 and 5 never.
USERS = [
    ([0, 0, 1, 4], [0, 0, 0, 2]), ([0, 1, 2], [0, 0, 2]), ([0, 2, 3], [0, 0, 2]), ([0, 1], [0, 2]),
]  # fmt: skip


def test_quartiles_keep_equal_values_together() -> None:
    values = np.array([3, 1, 1, 1, 9, 2])
    found = slices.quartiles(values, {"model": np.arange(6.0)})
    assert [(g["from"], g["to"], g["users"]) for g in found] == [(1, 1, 3), (2, 2, 1), (3, 9, 2)]
    assert [g["ndcg@10"]["model"] for g in found] == [2, 5, 2]
    assert all(isinstance(g["from"], int) for g in found)


def test_targets_without_a_training_event_are_a_group_of_their_own() -> None:
    found = slices.by_target_popularity(cases_of(*USERS), {"model": np.array([0.1, 0.2, 0.3, 0.6])})
    assert [(g["from"], g["to"], g["users"]) for g in found] == [(0, 0, 2), (1, 1, 1), (2, 2, 1)]
    assert [g["ndcg@10"]["model"] for g in found] == pytest.approx([0.2, 0.2, 0.6])


def test_cold_items_count_but_cold_users_do_not_under_temporal() -> None:
    users = [*USERS, ([1, 3], [1, 2])]  # the last has no training event
    ndcg = {"model": np.array([0.1, 0.2, 0.3, 0.6, 1.0])}
    temporal = slices.by_target_popularity(cases_of(*users, split="temporal"), ndcg)
    assert [(g["from"], g["users"]) for g in temporal] == [(0, 2), (1, 1), (2, 1)]
    alone = cases_of(([1, 3], [1, 2]), split="temporal")
    assert [g["users"] for g in slices.by_target_popularity(alone, {"model": np.array([1.0])})] == [1]


class TwoMinds:
    def disagreement(self, histories: Sequence[History]) -> np.ndarray:
        self.batches = [*getattr(self, "batches", []), len(histories)]
        return np.array([h.items[0] / 10 if h.items[0] != 5 else np.nan for h in histories], dtype=np.float32)


def test_disagreement_in_quartiles_without_those_it_says_nothing_of() -> None:
    cases = cases_of(*[([first, 1], [0, 2]) for first in (4, 3, 2, 1, 5)])
    model = TwoMinds()
    found = slices.by_disagreement(cases, {"model": np.arange(5.0)}, model, batch_size=2)
    assert model.batches == [2, 2, 1] and [g["users"] for g in found] == [1, 1, 1, 1]
    assert [g["ndcg@10"]["model"] for g in found] == [3, 2, 1, 0]
    assert [g["from"] for g in found] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    unknown = cases_of(([5, 1], [0, 2]))
    assert slices.by_disagreement(unknown, {"model": np.ones(1)}, TwoMinds(), 2) == []


def test_new_items_are_ranked_in_the_catalogue_and_among_themselves() -> None:
    cases = cases_of(*USERS)

    def score(histories: Sequence[History]) -> np.ndarray:
        return np.tile(np.array([9, 8, 7, 1, 3, 2], dtype=np.float32), (len(histories), 1))

    found = slices.new_items(cases, {"model": score}, exclude_seen=True, batch_size=1, resamples=100)
    assert found is not None
    assert (found["targets"], found["candidates"], found["chance_hr@10"]) == (2, 3, 1.0)
    # User 0 (seen 0 and 1) wants item 4: after item 2, second; among 3, 4 and 5 first.
    # User 2 (seen 0 and 2) wants item 3: after 1, 4 and 5, fourth; among them third.
    told = found["scorers"]["model"]
    assert told["catalogue"]["ndcg@10"]["value"] == pytest.approx((1 / log2(3) + 1 / log2(5)) / 2)
    assert told["new_only"]["ndcg@10"]["value"] == pytest.approx((1 + 1 / log2(4)) / 2)
    assert told["new_only"]["hr@10"] == {"value": 1, "lo": 1, "hi": 1}
    assert told["catalogue"]["ndcg@10"]["lo"] <= told["catalogue"]["ndcg@10"]["value"]


def test_what_validation_showed_to_a_refitted_model_is_not_new() -> None:
    rows = [
        {"user_id": f"u{n}", "items": items, "actions": [1] * 3, "ratings": [1.0] * 3, "timestamps": [1, 2, 3],
         "parts": [TRAIN, VALID, TEST], "targets": [True] * 3}
        for n, items in enumerate(([0, 1, 2], [0, 2, 3], [1, 0, 4]))
    ]  # fmt: skip
    events = flatten(pa.Table.from_pylist(rows, SEQUENCES), CATALOGUE)
    alone, refitted = (build_cases(events, TEST, "leave_one_out", fitted) for fitted in (TRAIN, VALID))
    assert alone.new_items.tolist() == [True, True, True] and refitted.new_items.tolist() == [False, True, True]
    ndcg = {"model": np.array([1.0, 0.0, 0.0])}
    assert [(g["from"], g["users"]) for g in slices.by_target_popularity(refitted, ndcg)] == [(0, 2), (1, 1)]
    found = slices.new_items(
        refitted, {"model": lambda h: np.zeros((len(h), CATALOGUE), np.float32)}, exclude_seen=True, batch_size=2,
        resamples=100,
    )  # fmt: skip
    assert found is not None and (found["targets"], found["candidates"]) == (2, CATALOGUE - 3)


def test_without_new_targets_there_is_nothing_to_tell() -> None:
    cases = cases_of(USERS[1], ([0, 2, 1], [0, 0, 2]))
    assert slices.new_items(cases, {}, exclude_seen=True, batch_size=1, resamples=100) is None


def test_lists_are_judged_by_categories_or_else_by_vectors() -> None:
    table = comparison.category_table([["a", "b", "a"], ["b", "c"], [], ["b", "a"]])
    assert table is not None and table.toarray().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert comparison.category_table([[], []]) is None
    lists, popularity, vectors = np.array([[0, 1], [0, 3]]), np.array([2, 1, 0, 1]), np.eye(4)
    by_sets = comparison.beyond_accuracy(lists, comparison.Catalogue(popularity, table, vectors))
    assert by_sets["diversity@10"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert by_sets["novelty@10"]["value"] == pytest.approx((1 + 2) / 2)
    of_one = comparison.category_table([["a"]] * 4)
    assert (
        comparison.beyond_accuracy(lists, comparison.Catalogue(popularity, of_one, vectors))["diversity@10"]["value"]
        == 0
    )
    by_vectors = comparison.beyond_accuracy(lists, comparison.Catalogue(popularity, None, vectors))
    assert by_vectors["diversity@10"]["value"] == 1
    assert "diversity@10" not in comparison.beyond_accuracy(lists, comparison.Catalogue(popularity, None, None))
