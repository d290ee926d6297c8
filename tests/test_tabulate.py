"""What is counted before training: of training events only, also in a refit, and how old events are weighed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.config import ModelConfig
from springtide.model.fusion import FusionModel
from springtide.model.tables import from_arrays
from springtide.schemas import SEQUENCES, TEST, TRAIN, VALID
from springtide.training.sequences import from_table, validation_cases
from springtide.training.statistics import collect, collect_file, merge
from springtide.training.tabulate import HalfLives, choose_share, tabulate
from toy import ITEMS_IN_TOY, sequences_of, toy_sequences, toy_settings

torch.set_num_threads(1)
ITEMS = 12
MODEL = toy_settings(Path("none")).model
DAY = 86_400_000


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Users with training, validation and test events, in that order, with repeats and events that are no target."""
    rows = []
    for number in range(draw(st.integers(1, 5))):
        train, valid, test = (draw(st.integers(0, most)) for most in (8, 3, 3))
        count = train + valid + test
        rows.append(
            {
                "user_id": f"u{number}",
                "items": draw(st.lists(st.integers(0, ITEMS - 1), min_size=count, max_size=count)),
                "actions": [1] * count,
                "ratings": draw(st.lists(st.sampled_from([1.0, 3.5, float("nan")]), min_size=count, max_size=count)),
                "timestamps": [1000 * place + number for place in range(count)],
                "parts": [TRAIN] * train + [VALID] * valid + [TEST] * test,
                "targets": draw(st.lists(st.booleans(), min_size=count, max_size=count)),
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SEQUENCES)


# ---------------------------------------------------------------- the refit
@given(tables(), st.sampled_from([0.0, 0.5]))
@settings(max_examples=60)
def test_a_refit_counts_training_and_validation_events_and_never_test_events(
    rows: list[dict[str, Any]], share: float
) -> None:
    """It is as if the validation events were training events and there were no test events at all."""
    refitted = from_table(table_of(rows), share, refit=True)
    assert validation_cases(refitted, 10**6) == [] and (refitted.valid_target == -1).all()
    cut = []
    for row in rows:
        known = len(row["parts"]) - row["parts"].count(TEST)
        lists = {name: value[:known] for name, value in row.items() if name != "user_id"}
        cut.append({"user_id": row["user_id"], **lists, "parts": [TRAIN] * known})
    found, expected = collect(refitted, ITEMS, MODEL), collect(from_table(table_of(cut), 0), ITEMS, MODEL)
    np.testing.assert_array_equal(found.popularity, expected.popularity)
    np.testing.assert_array_equal(found.transitions.toarray(), expected.transitions.toarray())
    np.testing.assert_array_equal(found.taken.toarray(), expected.taken.toarray())
    assert found.ratings == expected.ratings
    assert found.popularity.sum() == sum(len(row["parts"]) - row["parts"].count(TEST) for row in rows)


def test_a_file_is_counted_for_the_refit_too(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "items": [0, 1, 2, 3], "actions": [1] * 4, "ratings": [1.0] * 4,
             "timestamps": [0, 1, 2, 3], "parts": [TRAIN, TRAIN, VALID, TEST], "targets": [True] * 4}]  # fmt: skip
    file = tmp_path / "part.parquet"
    pa.parquet.write_table(table_of(rows), file)
    counted = [collect_file(file, ITEMS, MODEL, 0.0, refit).popularity[:4].tolist() for refit in (False, True)]
    assert counted == [[1, 1, 0, 0], [1, 1, 1, 0]]


# ---------------------------------------------------------------- who took what
@given(tables())
@settings(max_examples=60)
def test_taken_holds_the_last_time_of_each_target(rows: list[dict[str, Any]]) -> None:
    taken = collect(from_table(table_of(rows), 0), ITEMS, MODEL).taken.toarray()
    expected = np.zeros((len(rows), ITEMS), np.int64)
    for user, row in enumerate(rows):
        for item, at, part, target in zip(row["items"], row["timestamps"], row["parts"], row["targets"], strict=True):
            if part == TRAIN and target:
                expected[user, item] = at + 1
    np.testing.assert_array_equal(taken, expected)


@given(tables(), st.sampled_from([None, 0.4]))
@settings(max_examples=60)
def test_the_inverse_is_that_of_the_weighed_log(rows: list[dict[str, Any]], share: float | None) -> None:
    statistics = merge([collect(from_table(table_of([row]), 0), ITEMS, MODEL) for row in rows])
    config = ModelConfig(neighbour_items=5, neighbour_l2=2.0)
    found = tabulate(statistics, config, HalfLives(share))
    x = statistics.taken.toarray().astype(float)
    if share is not None and x.any() and np.ptp(x[x > 0]):
        assert found.half_life == pytest.approx(share * np.ptp(x[x > 0]))
    x = np.where(x > 0, 0.5 ** ((found.end + 1 - x) / found.half_life), 0)[:, found.neighbour_items]
    assert len(found.neighbour_items) == min(5, int((statistics.popularity > 0).sum()))
    least = statistics.popularity[found.neighbour_items].min(initial=10**9)
    assert (np.delete(statistics.popularity, found.neighbour_items) <= least).all()
    np.testing.assert_allclose(
        found.inverse @ (x.T @ x + 2 * np.eye(x.shape[1])), np.eye(x.shape[1]), rtol=1e-4, atol=1e-4
    )


def test_counts_come_back_out_of_their_arrays() -> None:
    config = MODEL.model_copy(update={"neighbour_items": 12})
    found = tabulate(collect(toy_sequences(), ITEMS_IN_TOY, config), config, HalfLives(0.4))
    again = from_arrays(found.arrays())
    assert found.pairs.counts.nnz and found.pairs.norms.all()
    values = vars(found) | vars(found.pairs)
    others = vars(again) | vars(again.pairs)
    for name, value in values.items():
        other = others[name]
        if name == "pairs":
            continue  # its parts are compared
        if name in ("transitions", "counts"):
            assert (value != other).nnz == 0
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other, name)
        else:
            assert value == other, name
    endless = from_arrays(replace(found, half_life=float("inf")).arrays())
    assert endless.half_life == float("inf") and isinstance(endless.end, int)


@pytest.mark.parametrize("count", [1, 3])
def test_a_log_at_one_moment(count: int) -> None:
    log = sequences_of([[0, 1, 2]] * count, timestamps=[[7, 7, 7]] * count)
    found = tabulate(collect(log, ITEMS, MODEL), MODEL, HalfLives(0.4))
    assert found.half_life == found.recent_half_life == float("inf") and found.end == 7
    popularity = torch.from_numpy(found.popularity)
    model = FusionModel(MODEL, 2, torch.zeros(ITEMS, MODEL.text_dim), popularity > 0, popularity)
    found.fill(model)
    assert all(
        value.isfinite().all() for name, value in model.named_buffers() if name != "channels.neighbours.half_life"
    )


# ---------------------------------------------------------------- do old events count less?
def taste(flip: bool, users: int = 150) -> Any:
    """Partners of items, by one pairing in the first half of the log and by another in the second if tastes flip.

    Most was taken in the first half, so counted alike the old pairing wins. The last pair is left open.
    """
    rng = np.random.default_rng(0)
    rows, times = [], []
    for user in range(users):
        late = user % 3 == 0
        shift = 1 if flip and late else 0
        pairs = rng.permutation(10)[:4]
        row = [item for a in pairs for item in (int(a), 10 + int((a + shift) % 10))]
        rows.append(row)
        begin = 100 * DAY if late else int(rng.integers(0, 20)) * DAY
        times.append([begin + int(rng.integers(0, DAY)) + 1000 * place for place in range(len(row))])
    late_users = range(0, users, 3)
    log = sequences_of(rows, timestamps=times)
    ends = log.train_end.copy()
    ends[list(late_users)] -= 1  # what follows is the question
    log = replace(log, train_end=ends)
    cases = [(log.history(user, int(ends[user])), rows[user][-1]) for user in late_users]
    return collect(log, 20, MODEL), cases


def test_old_events_count_less_where_tastes_change_and_not_where_they_do_not() -> None:
    config = ModelConfig(neighbour_l2=5.0)
    assert choose_share(*of(taste(flip=True), config)) is not None
    assert choose_share(*of(taste(flip=False), config)) is None


def of(made: Any, config: ModelConfig) -> Any:
    statistics, cases = made
    return statistics, config, cases, True


def test_without_neighbours_or_cases_there_is_nothing_to_choose() -> None:
    statistics, cases = taste(flip=True, users=9)
    assert choose_share(statistics, ModelConfig(neighbours=False), cases, True) is None
    assert choose_share(statistics, ModelConfig(), [], True) is None
