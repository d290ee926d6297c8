"""Training windows, batches and held-out events, against loops over the same histories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.schemas import SEQUENCES, TEST, TRAIN, VALID
from springtide.training.sampling import Sampling
from springtide.training.sequences import (
    Sequences,
    concatenate,
    epoch_batches,
    from_table,
    training_batch,
    training_windows,
    validated_users,
    validation_cases,
)
from springtide.training.statistics import collect, merge
from toy import sequences_of, toy_settings

ITEMS = 12
MODEL = toy_settings(Path("none")).model
SMALL = Sampling(4, 3, 10)


@st.composite
def users(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Users as rows of the sequences table: parts in order, items with repeats, some events that are no target."""
    rows = []
    for number in range(draw(st.integers(0, 5))):
        train, valid, test = draw(st.integers(0, 9)), draw(st.integers(0, 3)), draw(st.integers(0, 2))
        length = train + valid + test
        rows.append(
            {
                "user_id": f"用户{number}",
                "items": draw(st.lists(st.integers(0, ITEMS - 1), min_size=length, max_size=length)),
                "actions": [number] * length,
                "ratings": [float("nan") if place % 3 else place / 2 for place in range(length)],
                "timestamps": [1000 * number + place for place in range(length)],
                "parts": [TRAIN] * train + [VALID] * valid + [TEST] * test,
                "targets": draw(st.lists(st.booleans(), min_size=length, max_size=length)),
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SEQUENCES)


def equal(one: Sequences, other: Sequences) -> bool:
    return all(
        np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@given(users(), st.permutations(range(5)), st.sampled_from([0.0, 0.5]))
@settings(max_examples=40)
def test_the_order_of_arrival_does_not_matter(rows: list[dict[str, Any]], order: list[int], share: float) -> None:
    shuffled = [rows[i] for i in order if i < len(rows)]
    assert equal(from_table(table_of(rows), share), from_table(table_of(shuffled), share))
    chunked = pa.concat_tables([table_of([row]) for row in shuffled] or [SEQUENCES.empty_table()])
    assert equal(from_table(table_of(rows), share), from_table(chunked, share))


@given(users())
@settings(max_examples=40)
def test_blocks_laid_end_to_end_equal_one(rows: list[dict[str, Any]]) -> None:
    whole = from_table(table_of(rows), 0)
    if rows:
        assert equal(whole, concatenate([from_table(table_of([row]), 0) for row in rows]))
        parts = [collect(from_table(table_of([row]), 0), ITEMS, MODEL) for row in rows]
        together, merged = collect(whole, ITEMS, MODEL), merge(parts)
        np.testing.assert_array_equal(together.popularity, merged.popularity)
        np.testing.assert_allclose(together.transitions.toarray(), merged.transitions.toarray(), rtol=1e-5)
        np.testing.assert_allclose(together.ratings, merged.ratings)


@given(users(), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12))
@settings(max_examples=80)
def test_every_training_target_is_asked_for_once(
    rows: list[dict[str, Any]], length: int, batch_size: int, positions: int
) -> None:
    sequences = from_table(table_of(rows), 0)
    asked: list[tuple[int, int, int]] = []  # (user, place of the target, item)
    for batch in epoch_batches(sequences, Sampling(length, batch_size, positions), (0, 1)):
        assert batch.items.shape[1] <= length and len(batch.items) <= batch_size
        assert batch.mask.numel() <= positions or len(batch.items) == 1
        for line in range(len(batch.items)):
            count = int(batch.mask[line].sum())
            assert batch.mask[line, :count].all() and count > 0
            for place in range(batch.items.shape[1]):
                target = int(batch.targets[line, place])
                if place >= count:
                    assert target == -1 and batch.items[line, place] == 0
                elif target >= 0:
                    asked.append((int(batch.actions[line, 0]), int(batch.offset[line]) + place + 1, target))
    expected = [
        (number, place, row["items"][place])
        for number, row in enumerate(rows)
        for place in range(1, row["parts"].count(TRAIN))
        if row["targets"][place]
    ]
    assert sorted(asked) == expected


@given(users(), st.integers(1, 6))
@settings(max_examples=60)
def test_a_batch_holds_slices_of_the_histories(rows: list[dict[str, Any]], length: int) -> None:
    sequences = from_table(table_of(rows), 0)
    windows = training_windows(sequences, length)
    if not len(windows):
        return
    batch = training_batch(sequences, windows)
    for line, (first, end, offset) in enumerate(windows.tolist()):
        part, after, count = slice(first, end), slice(first + 1, end + 1), end - first
        assert offset == first - max(s for s in sequences.start.tolist() if s <= first)
        assert int(batch.offset[line]) == offset
        assert batch.mask[line].tolist() == [True] * count + [False] * (batch.mask.shape[1] - count)
        for name in ("items", "actions", "ratings", "timestamps"):
            np.testing.assert_array_equal(getattr(batch, name)[line, :count], getattr(sequences, name)[part])
        np.testing.assert_array_equal(batch.now[line, :count], sequences.timestamps[after])
        expected = np.where(sequences.targets[after], sequences.items[after], -1)
        np.testing.assert_array_equal(batch.targets[line, :count], expected)


@given(users(), st.sampled_from([0.0, 0.3, 0.5]))
@settings(max_examples=80)
def test_held_out_events_are_nowhere_in_training(rows: list[dict[str, Any]], share: float) -> None:
    """Changing every event that is not trained on changes neither the batches nor the statistics."""
    sequences = from_table(table_of(rows), share)
    trained = np.zeros(len(sequences.items), bool)
    for start, end in zip(sequences.start, sequences.train_end, strict=True):
        trained[start:end] = True
    other = Sequences(
        **vars(sequences)
        | {
            "items": np.where(trained, sequences.items, (sequences.items + 1) % ITEMS),
            "ratings": np.where(trained, sequences.ratings, np.float32(99)),
            "timestamps": np.where(trained, sequences.timestamps, 7),
        }
    )
    for one, two in zip(epoch_batches(sequences, SMALL, (0,)), epoch_batches(other, SMALL, (0,)), strict=True):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(two, name), name)
    one_count, other_count = collect(sequences, ITEMS, MODEL), collect(other, ITEMS, MODEL)
    np.testing.assert_array_equal(one_count.popularity, other_count.popularity)
    assert (one_count.transitions != other_count.transitions).nnz == 0
    assert one_count.ratings == other_count.ratings
    assert (one_count.taken != other_count.taken).nnz == 0
    assert one_count.popularity.sum() == trained.sum()


def test_validation_asks_for_the_first_target_after_training() -> None:
    base = {"actions": [1] * 6, "ratings": [1.0] * 6, "timestamps": list(range(6))}
    rows = [
        {**base, "user_id": "a", "items": [0, 1, 2, 3, 4, 5], "parts": [0, 0, 0, 1, 1, 2], "targets": [True] * 6},
        # The first validation event is context only; like evaluation, validation does not show it.
        {
            **base,
            "user_id": "b",
            "items": [5, 4, 3, 2, 1, 0],
            "parts": [0, 0, 1, 1, 1, 2],
            "targets": [True, True, False, True, True, True],
        },
        {**base, "user_id": "c", "items": [0, 1, 2, 3, 4, 5], "parts": [1, 1, 1, 1, 1, 1], "targets": [True] * 6},
        {**base, "user_id": "d", "items": [0, 1, 2, 3, 4, 5], "parts": [0, 0, 0, 0, 0, 2], "targets": [True] * 6},
    ]
    cases = validation_cases(from_table(table_of(rows), 0), 10)
    assert [(history.items.tolist(), target) for history, target in cases] == [([0, 1, 2], 3), ([5, 4], 2)]
    assert len(validation_cases(from_table(table_of(rows), 0), 1)) == 1


def plain_row(user_id: str, items: list[int]) -> dict[str, Any]:
    """A user whose events are all for training."""
    count = len(items)
    return {
        "user_id": user_id,
        "items": items,
        "actions": [1] * count,
        "ratings": [1.0] * count,
        "timestamps": list(range(count)),
        "parts": [TRAIN] * count,
        "targets": [True] * count,
    }


def test_a_share_of_the_users_is_held_out_by_their_id() -> None:
    rows = [plain_row(f"u{n:03d}", [0, 1, 2, 3]) | {"targets": [True] * 3 + [n % 2 == 0]} for n in range(400)]
    sequences = from_table(table_of(rows), 0.25)
    held = sequences.valid_target >= 0
    assert 60 < held.sum() < 140
    np.testing.assert_array_equal(sequences.valid_target[held], sequences.train_end[held])
    assert set((sequences.train_end - sequences.start)[held].tolist()) == {2, 3}  # the last one that may be predicted
    assert ((sequences.train_end - sequences.start)[~held] == 4).all()
    few = from_table(table_of(rows[:50]), 0.25)
    np.testing.assert_array_equal(few.valid_target[:10] >= 0, (sequences.valid_target >= 0)[:10])
    short = [{**row, "targets": [True, True, False, False]} for row in rows]
    assert (from_table(table_of(short), 0.5).valid_target == -1).all()


def test_epochs_differ_and_seeds_repeat() -> None:
    rows = [plain_row(f"u{n}", [n % ITEMS] * 3) | {"actions": [n] * 3} for n in range(20)]
    sequences = from_table(table_of(rows), 0)

    def order(seed: tuple[int, ...]) -> list[int]:
        return [int(n) for batch in epoch_batches(sequences, Sampling(5, 4, 100), seed) for n in batch.actions[:, 0]]

    assert order((0, 1)) == order((0, 1)) != order((0, 2))
    assert sorted(order((0, 1))) == list(range(20))


@pytest.mark.parametrize("ratings", [[], [3.0], [1.0, 2.0, 4.0, 5.0]])
def test_the_scale_of_ratings(ratings: list[float]) -> None:
    row = {"user_id": "a", "items": [0] * (len(ratings) + 2), "actions": [1] * (len(ratings) + 2),
           "ratings": [*ratings, float("nan"), 1000.0], "timestamps": [1] * (len(ratings) + 2),
           "parts": [TRAIN] * (len(ratings) + 1) + [TEST], "targets": [True] * (len(ratings) + 2)}  # fmt: skip
    mean, deviation = collect(from_table(table_of([row]), 0), ITEMS, MODEL).rating_stats
    assert mean == pytest.approx(np.mean(ratings) if ratings else 0)
    assert deviation == pytest.approx(max(np.std(ratings), 1e-3**0.5) if ratings else 1)


def test_a_heavy_owner_shares_a_batch_with_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the owners took is padded to the longest: one of them must not make all the others' rows as long."""
    monkeypatch.setattr("springtide.training.sequences.OWNED", 600)
    rows = [list(range(200)), *([[1, 2, 3]] * 300)]
    log = from_table(table_of([plain_row(f"u{n:03d}", row) for n, row in enumerate(rows)]), 0)
    batches = list(epoch_batches(log, Sampling(60, 100, 10**6), (0,)))
    shapes = [tuple(batch.owned.shape) for batch in batches if batch.owned is not None]
    assert sum(rows for rows, _ in shapes) == 300 + 4
    assert max(rows * width for rows, width in shapes) <= 600 and any(width == 200 for _, width in shapes)
    assert max(rows for rows, _ in shapes) == 100


def test_of_many_users_those_that_validate_are_drawn_and_not_the_first() -> None:
    log = sequences_of([[n % 5, 6] for n in range(400)], parts=[[TRAIN, VALID]] * 400)
    users = validated_users(log, 100)
    assert len(users) == 100 == len(np.unique(users)) and (np.diff(users) > 0).all()
    assert 150 < users.mean() < 250
    assert validated_users(log, 100).tolist() == users.tolist()
    assert validated_users(log, 400).tolist() == validated_users(log, 1000).tolist() == list(range(400))
    assert len(validation_cases(log, 100)) == 100
