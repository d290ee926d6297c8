"""The counting channels: what a new item gets from them, and that recent popularity knows nothing of the future."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.model.batch import scoring_batch
from springtide.model.channels import RecentPopularity
from springtide.model.fusion import FusionModel
from springtide.model.inputs import CONTEXT
from springtide.training.popularity import RECENT_ROWS, recent_popularity
from springtide.training.sequences import training_batch, training_windows
from toy import sequences_of, tables_of, toy_settings

torch.set_num_threads(1)
ITEMS = 12
CHANNELS = ("memory", "neighbours", "text_neighbours", "recent_popularity", "popularity")
STEMS = {"memory": "transitions", "text_neighbours": "text"}  # where the channel has another name than its setting


def build(rows: list[list[int]], **values: object) -> FusionModel:
    """A model whose every weight is random, with the counts of a log."""
    config = toy_settings(Path("none"), **{f"model__{name}": value for name, value in values.items()}).model
    tables = tables_of(sequences_of(rows), ITEMS, config)
    popularity = torch.from_numpy(tables.popularity)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(ITEMS, config.text_dim, generator=generator)
    model = FusionModel(config, 2, text, popularity > 0, popularity)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    tables.fill(model)
    return model.eval()


ROWS = [np.random.default_rng(n).integers(0, ITEMS - 1, 9).tolist() for n in range(12)]  # the last item is never taken


# ---------------------------------------------------------------- new items
def test_a_cold_item_scores_as_one_without_an_id_and_without_counts() -> None:
    model = build(ROWS)
    cold = torch.arange(ITEMS) == 4
    log = sequences_of(ROWS)
    batch = training_batch(log, training_windows(log, 20))
    moments = batch.mask.nonzero()
    vectors = model.item_vectors(cold)
    assert model.item_vectors.project is not None and model.item_vectors.ids is not None
    torch.testing.assert_close(vectors[4], model.item_vectors.project(model.item_vectors.text)[4])
    with torch.no_grad():
        interest = model.interest(batch, vectors)
        found = model.logits_at(batch, interest, vectors, moments, held_out=True, cold=cold)
        # As little of it as there is of the item that was never taken; what is left is what does not count.
        plain = build(ROWS, **dict.fromkeys(CHANNELS, False))
        plain.load_state_dict(model.state_dict(), strict=False)
        network = plain.logits_at(batch, plain.interest(batch, vectors), vectors, moments)
        row, at = moments.unbind(1)
        weight = dict(zip(model.channels.names, interest.weights[row, at].unbind(-1), strict=True))
        of_text = model.channels.products(batch, interest.weights[row, at], moments)["text"]
        described = (of_text[0] @ of_text[1].T)[:, 4]
        least = weight["popularity"] * model.channels.log_popularity.min()
        torch.testing.assert_close(found[:, 4], network[:, 4] + described + least, rtol=1e-4, atol=1e-4)
        # Everybody else is scored by their counts as before.
        warm = model.logits_at(batch, interest, vectors, moments, held_out=True)
    torch.testing.assert_close(np.delete(found, 4, 1), np.delete(warm, 4, 1))
    assert (found[:, 4] - warm[:, 4]).abs().max() > 0.1


def test_every_channel_has_a_weight_and_only_popularity_may_count_against_an_item() -> None:
    model = build(ROWS)
    names = model.channels.names
    assert names[-2:] == ["recent_popularity", "popularity"]
    assert set(names) == {
        "transitions_short",
        "transitions_long",
        "neighbours_short",
        "neighbours_long",
        "text_short",
        "text_long",
        *names[-2:],
    }
    generator = torch.Generator().manual_seed(0)
    user, context = torch.randn(3, 9, 16, generator=generator), torch.rand(3, 9, CONTEXT, generator=generator)
    weights = model.channels.weights(user, context)
    assert weights.shape == (3, 9, len(names))
    assert (weights[..., :-2] > 0).all() and (weights[..., -2:] < 0).flatten(0, 1).any(0).all()
    assert weights.std((0, 1)).min() > 0  # of each user's and each moment's own
    other = model.channels.weights(user, context + 1)
    assert not torch.isclose(weights, other).any()


@pytest.mark.parametrize("off", CHANNELS)
def test_a_channel_that_is_off_leaves_no_trace(off: str) -> None:
    stem = STEMS.get(off, off)
    model = build(ROWS, **{off: False})
    batch = scoring_batch([sequences_of(ROWS).history(0, 9)], 20)
    vectors, moments = model.item_vectors(), torch.tensor([[0, 8]])
    interest = model.interest(batch, vectors)
    scores = model.scores_at(batch, interest, vectors, moments)
    assert stem not in scores and not [name for name in model.channels.names if name.startswith(stem)]
    torch.testing.assert_close(
        sum(scores.values()), model.logits_at(batch, interest, vectors, moments), rtol=1e-4, atol=1e-4
    )
    assert set(scores) == {"network", *(STEMS.get(on, on) for on in CHANNELS if on != off)}


# ---------------------------------------------------------------- recent popularity
def events_of(events: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, int]:
    """(user, item, time) -> what recent_popularity reads."""
    _, items, times = (np.array(column, np.int64) for column in zip(*events, strict=True))
    return items, times, ITEMS


def test_a_table_by_hand() -> None:
    """Half-life 4 ms: each event weighs 2^(-age / 4)."""
    table, edges = recent_popularity(*events_of([(0, 1, 0), (0, 2, 4), (1, 1, 8)]), 0.5)
    assert edges[-1] == 9 and edges[0] == 0 and (np.diff(edges) > 0).all()
    rows = {int(edge): row for edge, row in zip(edges, table, strict=True)}
    assert not rows[0].any()
    np.testing.assert_allclose(rows[4][:3], [0, 0.5, 0], rtol=1e-6)  # what happens at 4 comes after it
    np.testing.assert_allclose(rows[9][:3], [0, 2 ** (-9 / 4) + 2 ** (-1 / 4), 2 ** (-5 / 4)], rtol=1e-6)
    channel = RecentPopularity(ITEMS)
    channel.load(table, edges, 4.0)
    score, there = channel(torch.tensor([-1, 0, 7, 8, 9, 100]))
    assert there.tolist() == [False, True, True, True, True, True]
    assert not score[1].any()
    latest = rows[9] / rows[9].mean()
    for row in (4, 5):
        np.testing.assert_allclose(score[row], np.log1p(latest), rtol=1e-5)


logs = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, ITEMS - 1), st.integers(0, 10**6)),
    min_size=2, max_size=120,
)  # fmt: skip


@given(logs, st.sampled_from([0.003, 0.05, 0.3, 2.0]))
@settings(max_examples=60)
def test_only_what_came_before_is_counted(events: list[tuple[int, int, int]], share: float) -> None:
    start, end = min(e[2] for e in events), max(e[2] for e in events)
    table, edges = recent_popularity(*events_of(events), share)
    assert len(table) == len(edges) <= max(RECENT_ROWS, 2 / share) and edges[-1] == end + 1
    half_life = share * (end - start)
    for row, edge in zip(table, edges.tolist(), strict=True):
        expected = np.zeros(ITEMS)
        for _, item, at in events:
            if at < edge and end > start:
                expected[item] += 0.5 ** ((edge - at) / half_life)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-6)
    channel = RecentPopularity(ITEMS)
    channel.load(table, edges, half_life or float("inf"))
    for _, item, at in events:  # nobody is asked about an event that is counted: the edge is not after it
        score, there = channel(torch.tensor([at]))
        if not [e for e in events if e[1] == item and e[2] < at]:
            assert not (there * score[0, item]).item()


def test_training_sees_the_table_of_the_time_at_which_it_is_asked() -> None:
    rows = [[0, 1, 2, 3], [4, 5, 6, 7]]
    times = [[0, 1000, 2000, 3000], [500, 1500, 2500, 3500]]
    nothing = {name: False for name in CHANNELS if name != "recent_popularity"}
    config = toy_settings(Path("none"), **{f"model__{name}": value for name, value in nothing.items()}).model
    log = sequences_of(rows, timestamps=times)
    tables = tables_of(log, ITEMS, config)
    popularity = torch.from_numpy(tables.popularity)
    model = FusionModel(config, 2, torch.zeros(ITEMS, config.text_dim), popularity > 0, popularity).eval()
    tables.fill(model)
    batch = training_batch(log, training_windows(log, 20))
    moments = batch.mask.nonzero()
    ones = torch.ones(len(moments), 1)
    scores = model.channels.counted(batch, ones, moments, held_out=True)["recent_popularity"]
    for (row, at), score in zip(moments.tolist(), scores, strict=True):
        assert score[int(batch.targets[row, at])] == 0  # each item is taken once: its count is its own target


# ---------------------------------------------------------------- events that come later
@given(logs, st.integers(1, 20))
@settings(max_examples=40)
def test_observed_events_count_as_if_they_had_been_in_the_log(events: list[tuple[int, int, int]], later: int) -> None:
    start, end = min(e[2] for e in events), max(e[2] for e in events)
    if end == start:
        return
    share = 0.3
    half_life = share * (end - start)
    channel, whole = RecentPopularity(ITEMS), RecentPopularity(ITEMS)
    table, edges = recent_popularity(*events_of(events), share)
    channel.load(table, edges, half_life)
    rng = np.random.default_rng(later)
    steps = rng.integers(0, int(half_life) + 1, later)  # never a silence of more than a half-life
    items, times = rng.integers(0, ITEMS, later), end + 1 + steps.cumsum()
    for part in np.array_split(np.arange(later), 3):  # in one go or in several
        channel.observe(items[part], times[part])
    more = [(10 + n, int(item), int(at)) for n, (item, at) in enumerate(zip(items, times, strict=True))]
    longer = half_life / (int(times[-1]) - start)  # the same half-life in ms
    whole.load(*recent_popularity(*events_of(events + more), longer), half_life)
    now = torch.tensor([int(times[-1]) + 1])
    torch.testing.assert_close(channel(now)[0], whole(now)[0], rtol=1e-4, atol=1e-5)
    # What was known of earlier times stays as it was.
    np.testing.assert_allclose(
        channel.table[:-1], np.log1p(table[:-1] / np.maximum(table[:-1].mean(1, keepdims=True), 1e-9)), rtol=1e-5
    )


def test_events_very_much_later_are_counted_too() -> None:
    """Thousands of half-lives after the log's end there is still a number for every item."""
    channel = RecentPopularity(ITEMS)
    channel.load(np.ones((1, ITEMS)), np.array([1000]), 1.0)
    channel.observe(np.array([3, 3, 5]), np.array([5000, 900_000, 900_000]))
    score = channel(torch.tensor([900_001]))[0][0]
    assert score.isfinite().all() and score[3] > score[5] > score[0]
