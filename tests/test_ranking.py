"""Evaluation cases and full-catalogue ranking."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from springtide.errors import SpringtideError
from springtide.evaluation import ranking
from springtide.model.batch import EMPTY, History
from springtide.schemas import SEQUENCES, TEST, VALID

Row = tuple[str, Sequence[int], Sequence[int], Sequence[bool] | None]


def sequences(*rows: Row) -> pa.Table:
    """A SEQUENCES table of (user, items, parts, targets or None for all True)."""
    return pa.table(
        {
            "user_id": [r[0] for r in rows],
            "items": [list(r[1]) for r in rows],
            "actions": [[1] * len(r[1]) for r in rows],
            "ratings": [[float("nan")] * len(r[1]) for r in rows],
            "timestamps": [list(range(len(r[1]))) for r in rows],
            "parts": [list(r[2]) for r in rows],
            "targets": [list(r[3]) if r[3] is not None else [True] * len(r[1]) for r in rows],
        },
        schema=SEQUENCES,
    )


LOO = sequences(("u2", [3, 1, 2, 0], [0, 0, 1, 2], None), ("u1", [0, 1, 2], [0, 1, 2], None))


def fixed(scores: Sequence[float]) -> ranking.Score:
    return lambda histories: np.tile(np.array(scores, dtype=np.float32), (len(histories), 1))


def test_cases_come_in_order_of_user_with_the_right_history_and_target() -> None:
    events = ranking.flatten(LOO, 4)
    assert events.user_ids.to_pylist() == ["u1", "u2"]
    test, valid = (ranking.build_cases(events, part, "leave_one_out") for part in (TEST, VALID))
    assert test.targets.tolist() == [2, 0] and valid.targets.tolist() == [1, 2]
    assert [h.items.tolist() for h in test.histories()] == [[0, 1], [3, 1, 2]]
    assert [h.items.tolist() for h in valid.histories()] == [[0], [3, 1]]
    assert test.history(1).timestamps.tolist() == [0, 1, 2] and test.lengths.tolist() == [2, 3]


def test_nothing_from_the_part_on_reaches_a_scorer() -> None:
    table = sequences(("u", [0, 1, 2, 3, 4], [0, 0, 2, 2, 2], [True, True, False, True, True]))
    case = ranking.build_cases(ranking.flatten(table, 5), TEST, "temporal")
    assert case.history(0).items.tolist() == [0, 1]  # not 2, which is context inside the part
    assert case.targets.tolist() == [3] and case.all_targets.tolist() == [3, 4]


def test_temporal_slices() -> None:
    table = sequences(
        ("cold", [0, 1], [2, 2], None), ("new", [0, 4], [0, 2], None), ("none", [0, 1], [0, 1], None),
        ("warm", [0, 1, 2, 0], [0, 0, 1, 2], None),
    )  # fmt: skip
    cases = ranking.build_cases(ranking.flatten(table, 5), TEST, "temporal")
    assert cases.slices.tolist() == [ranking.COLD_USER, ranking.COLD_ITEM, ranking.WARM]
    assert [len(h) for h in cases.histories()] == [0, 1, 3]
    assert cases.new_items.tolist() == [False, True, False]
    found = ranking.rank_cases(cases, fixed([5, 4, 3, 2, 1]), depth=5, exclude_seen=True, batch_size=2)
    assert found.ranks.tolist() == [1, 4, 0]  # the last target, 0, is already in the history
    assert ranking.repeated_targets(cases) == 1
    taken = cases.take(np.array([2, 0]))
    assert taken.all_targets.tolist() == [0, 0, 1] and taken.all_offsets.tolist() == [0, 1, 3]


@pytest.mark.parametrize(("warm", "about"), [(0, "all"), (1, "all"), (2, "warm"), (10, "warm")])
def test_the_headline_is_about_warm_users_unless_hardly_any_is(warm: int, about: str) -> None:
    """Of ten users; what the others want was never there in training."""
    table = sequences(*((f"u{n}", [0, 1 if n < warm else 2], [0, 2], None) for n in range(10)),
                      ("one more", [1], [0], None))  # fmt: skip
    cases = ranking.build_cases(ranking.flatten(table, 5), TEST, "temporal")
    mask, name = ranking.headline_mask(cases)
    assert (name, mask.sum()) == (about, warm if about == "warm" else 10)


def test_seen_items_are_left_out_only_if_asked() -> None:
    cases = ranking.build_cases(ranking.flatten(LOO, 4), TEST, "leave_one_out")
    out = ranking.rank_cases(cases, fixed([1, 2, 3, 4]), depth=4, exclude_seen=True, batch_size=10)
    assert out.lists.tolist() == [[3, 2, -1, -1], [0, -1, -1, -1]] and out.ranks.tolist() == [2, 1]
    kept = ranking.rank_cases(cases, fixed([1, 2, 3, 4]), depth=4, exclude_seen=False, batch_size=1)
    assert kept.lists.tolist() == [[3, 2, 1, 0]] * 2 and kept.ranks.tolist() == [2, 4]


def test_ties_rank_by_catalogue_row_as_in_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (50, 37)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    expected = np.argsort(-scores, axis=1, kind="stable")
    expected[np.take_along_axis(scores, expected, axis=1) == -np.inf] = -1
    for k in (1, 5, 36, 37, 50):
        assert np.array_equal(ranking.top_k(scores, k), expected[:, :k])


@pytest.mark.parametrize("scores", [[[np.nan] * 3], [[np.nan, 1, 2], [1, 2, 3]], [[1, 2, 3], [np.nan, 1, 2]]])
def test_the_best_of_what_is_no_number_are_refused(scores: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="no numbers"):
        ranking.top_k(np.array(scores, np.float32), 3)


def test_a_targets_place_equals_its_place_in_the_list() -> None:
    rng = np.random.default_rng(1)
    rows: list[Row] = [(f"u{n:02}", rng.integers(0, 30, 6).tolist(), [0, 0, 0, 0, 1, 2], None) for n in range(40)]
    cases = ranking.build_cases(ranking.flatten(sequences(*rows), 30), TEST, "leave_one_out")
    table = rng.integers(0, 5, 30)

    def score(histories: Sequence[History]) -> np.ndarray:
        return np.stack([np.roll(table, int(h.items[-1])) for h in histories])

    for seen in (True, False):
        lists = ranking.rank_cases(cases, score, depth=30, exclude_seen=seen, batch_size=7)
        places = ranking.target_ranks(cases, score, exclude_seen=seen, batch_size=7)
        assert np.array_equal(lists.ranks, places)


def test_a_user_with_a_hundred_thousand_events() -> None:
    items = np.arange(100_000) % 500
    table = sequences(("u", items.tolist() + [700], [0] * 99_999 + [1, 2], None), ("v", [1, 2, 3], [0, 1, 2], None))
    cases = ranking.build_cases(ranking.flatten(table, 1000), TEST, "leave_one_out")
    found = ranking.rank_cases(cases, fixed(np.arange(1000, 0, -1)), depth=20, exclude_seen=True, batch_size=8)
    assert found.lists[0].tolist() == list(range(500, 520)) and found.ranks[0] == 0
    assert ranking.target_ranks(cases, fixed(np.arange(1000, 0, -1)), exclude_seen=True, batch_size=8)[0] == 201


def test_nan_scores_and_foreign_items_are_refused() -> None:
    cases = ranking.build_cases(ranking.flatten(LOO, 4), TEST, "leave_one_out")
    with pytest.raises(SpringtideError, match="user u1 hold NaN"):
        ranking.rank_cases(cases, fixed([0, float("nan"), 0, 0]), depth=2, exclude_seen=False, batch_size=8)
    with pytest.raises(SpringtideError, match="outside the catalogue of 3"):
        ranking.flatten(LOO, 3)
    with pytest.raises(SpringtideError, match="expected columns"):
        ranking.flatten(LOO.drop_columns("parts"), 4)


def test_an_empty_part_has_no_cases() -> None:
    table = sequences(("u", [0, 1], [0, 0], None))
    cases = ranking.build_cases(ranking.flatten(table, 2), TEST, "none")
    assert len(cases) == 0 and len(ranking.build_cases(ranking.flatten(SEQUENCES.empty_table(), 2), TEST, "none")) == 0


def test_a_model_is_asked_when_validation_asked_it() -> None:
    """Under temporal after the end of the log that it knows, else with the last event."""
    one = History(np.array([1, 2]), np.array([0, 0]), np.zeros(2, np.float32), np.array([10, 20]))
    assert ranking.asked_at([one, one.before(1), EMPTY], "leave_one_out", 90).tolist() == [20, 10, 0]
    assert ranking.asked_at([one, one.before(1), EMPTY], "temporal", 90).tolist() == [91, 91, 91]
    assert ranking.asked_at([one], "temporal", 15).tolist() == [21]
