"""Events that are told to a trained model count as if they had been in the log; the network stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.bundle import load_bundle
from springtide.model.batch import EMPTY, History
from springtide.model.fusion import FusionModel
from springtide.model.recommender import Recommender
from springtide.training.sequences import Sequences
from toy import ITEMS_IN_TOY, sequences_of, tables_of, toy_bundle, toy_settings

torch.set_num_threads(1)
ITEMS = 9
ACTIONS = ["<unknown>", "buy", "view"]
# A decay of 1/2 makes sums of weights exact, so that counts can be compared bit by bit.
CONFIG = toy_settings(Path("none"), model__memory_decay=0.5, model__memory_distances=3).model

Rows = list[list[tuple[int, int]]]  # (item, action) of each user
events = st.tuples(st.integers(0, ITEMS - 2), st.sampled_from([1, 2]))
logs = st.lists(st.lists(events, min_size=1, max_size=9), min_size=1, max_size=4)


def log_of(rows: Rows, wanted: tuple[int, ...]) -> Sequences:
    return sequences_of(
        [[item for item, _ in row] for row in rows],
        actions=[[action for _, action in row] for row in rows],
        targets=[[action in wanted for _, action in row] for row in rows],
    )


def recommender_of(rows: Rows, wanted: tuple[int, ...] = (1, 2), timeless: bool = False) -> Recommender:
    tables = tables_of(log_of(rows, wanted), ITEMS, CONFIG)
    torch.manual_seed(0)
    popularity = torch.from_numpy(tables.popularity)
    model = FusionModel(CONFIG, 3, torch.zeros(ITEMS, CONFIG.text_dim), popularity > 0, popularity)
    tables.fill(model)
    names = [f"i{n}" for n in range(ITEMS)]
    allowed = np.array([number in wanted for number in range(len(ACTIONS))])
    return Recommender(model, names, names, [[]] * ITEMS, ACTIONS, tables.popularity, None, tables, allowed, timeless)


def history_of(row: list[tuple[int, int]], first: int = 0) -> History:
    items, actions = (np.array([pair[n] for pair in row], np.int64) for n in range(2))
    times = 10**12 + 1000 * np.arange(first, first + len(row))
    return History(items, actions, np.full(len(row), np.nan, np.float32), times)


@given(logs, st.data(), st.sampled_from([(1, 2), (1,)]))
@settings(max_examples=60)
def test_transitions_and_popularity_are_those_of_the_longer_log(
    rows: Rows, data: st.DataObject, wanted: tuple[int, ...]
) -> None:
    """Exactly; told at once or in two parts, and whatever is no successor is none here either."""
    cut = [data.draw(st.integers(0, len(row))) for row in rows]
    middle = [data.draw(st.integers(begin, len(row))) for begin, row in zip(cut, rows, strict=True)]
    live = recommender_of([row[:end] for row, end in zip(rows, cut, strict=True)], wanted)
    for begins, ends in ((cut, middle), (middle, [len(row) for row in rows])):
        live.observe(
            [history_of(row[:begin]) for row, begin in zip(rows, begins, strict=True)],
            [history_of(row[begin:end], begin) for row, begin, end in zip(rows, begins, ends, strict=True)],
        )
    whole = recommender_of(rows, wanted)
    one, other = live.model.channels.memory, whole.model.channels.memory
    assert one is not None and other is not None
    for name, value in other.named_buffers():
        assert torch.equal(dict(one.named_buffers())[name], value), name
    np.testing.assert_array_equal(live.popularity, whole.popularity)
    assert torch.equal(live.model.channels.log_popularity, whole.model.channels.log_popularity)


@pytest.mark.parametrize("timeless", [False, True])
def test_the_first_event_after_years_leaves_popular_what_was(timeless: bool) -> None:
    """Recent popularity is that of the log's end, but for the event. Without times events are as far apart as rows."""
    live = recommender_of([[(0, 1), (1, 1), (0, 1), (2, 1)], [(0, 1), (1, 1), (3, 1)]], timeless=timeless)
    recent = live.model.channels.recent
    assert recent is not None
    before = recent.table[-1].clone()
    some_years = 10**11
    event = history_of([(5, 1)])
    event.timestamps[:] += some_years
    live.observe([EMPTY], [event])
    after = recent.table[-1]
    assert after[5] > before[5] == 0
    assert (after[:4] > before[:4] / 4).all() and after[:4].argsort().tolist() == before[:4].argsort().tolist()
    if timeless:
        more = history_of([(n % 2 + 5, 1) for n in range(3)])
        more.timestamps[:] += some_years + 10**9 * np.arange(3)
        live.observe([EMPTY], [more])
        assert recent.latest.moment == 10**12 + 3000 + 4000  # a second each, whatever the clock says


def test_without_times_events_of_several_users_tick_in_the_order_in_which_they_came() -> None:
    rows = [[(0, 1), (1, 1), (0, 1), (2, 1)], [(0, 1), (1, 1), (3, 1)]]
    at_once, one_by_one = recommender_of(rows, timeless=True), recommender_of(rows, timeless=True)
    users = [history_of([(item, 1)] * 6) for item in (5, 6)]
    for number, user in enumerate(users):
        user.timestamps[:] = 10**13 + 10**6 * (2 * np.arange(6) + number)  # they take turns
    at_once.observe([EMPTY, EMPTY], users)
    for place in range(6):
        for user in users:
            one_by_one.observe([user[slice(0, place)]], [user[slice(place, place + 1)]])
    tables = [live.model.channels.recent.table[-1] for live in (at_once, one_by_one)]  # type: ignore[union-attr]
    torch.testing.assert_close(*tables)
    assert tables[0][6] > tables[0][5] > 0


def test_an_action_that_is_not_predicted_is_nobodys_successor() -> None:
    live = recommender_of([[(0, 1), (1, 1)]], wanted=(1,))
    live.observe([history_of([(3, 1)])], [history_of([(4, 2), (5, 1)], 1)])
    memory = live.model.channels.memory
    assert memory is not None and live._transitions is not None
    added = live._transitions.toarray()
    assert not added[:, 4].any() and added[4, 5] == 1 and added[3, 5] == 0.5
    assert live.popularity[4] == 1


def test_what_is_not_predicted_is_not_recently_popular_either() -> None:
    """The table is counted over targets; so are the events that come later."""
    live = recommender_of([[(0, 1), (1, 1)]], wanted=(1,))
    recent = live.model.channels.recent
    assert recent is not None
    live.observe([EMPTY], [history_of([(4, 2), (5, 1)], 5)])
    score = recent(torch.tensor([2 * 10**12]))[0][0]
    assert score[4] == 0 < score[5]


def test_observed_events_change_what_is_recommended_but_not_the_network() -> None:
    live = recommender_of([[(0, 1), (1, 1), (2, 1)]] * 3)
    before = {name: value.clone() for name, value in live.model.named_parameters()}
    past, vectors = history_of([(6, 1)]), live.item_vectors.copy()
    assert not live.recommendable[7] and live.top_k(live.score([past]).logits, 1)[0][0, 0] != 7
    for _ in range(30):
        live.observe([past], [history_of([(7, 1)], 20)])
    scores = live.score([past]).logits
    assert live.recommendable[7] and live.top_k(scores, 1)[0][0, 0] == 7
    assert np.isfinite(scores[0, [0, 1, 2, 7]]).all() and np.isneginf(scores[0, 8])
    assert all(torch.equal(value, before[name]) for name, value in live.model.named_parameters())
    np.testing.assert_array_equal(live.item_vectors, vectors)


def test_nothing_observed_changes_nothing(tmp_path: Path) -> None:
    live = load_bundle(toy_bundle(tmp_path)).recommender
    past = history_of([(1, 1), (2, 1)])
    before = live.score([past]).logits
    live.observe([], [])
    live.observe([past, EMPTY], [EMPTY, EMPTY])
    np.testing.assert_array_equal(before, live.score([past]).logits)


def test_a_loaded_bundle_goes_on_counting(tmp_path: Path) -> None:
    values = {"data__target_actions": ["purchase"], "data__split": "temporal"}
    live = load_bundle(toy_bundle(tmp_path, **values)).recommender
    assert live._predictable.tolist() == [False, True, False] and len(live.popularity) == ITEMS_IN_TOY
    memory = live.model.channels.memory
    assert memory is not None
    counted = float(memory.counts.sum())
    live.observe([EMPTY], [history_of([(1, 1), (2, 2), (3, 1)])])
    added = float(memory.counts.sum()) - counted
    assert added == pytest.approx(1 + live.model.config.memory_decay, abs=1e-2)  # from the view and from before it


def test_a_model_that_is_told_the_time_is_asked_right_after_its_log_ended(tmp_path: Path) -> None:
    live = load_bundle(toy_bundle(tmp_path, data__split="temporal")).recommender
    past, end = history_of([(1, 1), (2, 1)]), live.log_end
    assert live.model.config.request_time and end is not None and end > past.timestamps[-1]
    plain = live.score([past]).logits
    np.testing.assert_array_equal(plain, live.score([past], now=np.array([end + 1])).logits)
    recent = live.model.channels.recent
    assert recent is not None and recent.bucket(torch.tensor([end + 1]))[0] == len(recent.edges) - 1  # all counts
    assert not np.array_equal(plain, live.score([past], now=past.timestamps[-1:]).logits)
