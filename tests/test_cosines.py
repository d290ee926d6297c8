"""Neighbours by cosine of the long tail: counted as by the definition, and nobody is scored by what they added."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noise import NOISE_ITEMS, random_log, train_on_noise
from springtide.config import ModelConfig
from springtide.model import cosines
from springtide.model.cosines import Cosines, count_pairs
from springtide.model.neighbours import SHORT_DECAY, Neighbours
from springtide.training.sequences import training_batch, training_windows
from springtide.training.statistics import collect
from springtide.training.tabulate import HalfLives, tabulate
from toy import sequences_of

torch.set_num_threads(1)
ITEMS, SHRINKAGE = 8, 2.0
HOUR = 3_600_000

rows_of_items = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=2, max_size=9), min_size=2, max_size=5)


def time_of(user: int, place: int) -> int:
    return 10**12 + HOUR * (3 * place + user)


def weights_of(rows: list[list[int]], half_life: float, end: int) -> np.ndarray:
    """X [U, ITEMS]; the last time counts."""
    x = np.zeros((len(rows), ITEMS))
    for user, row in enumerate(rows):
        for place, item in enumerate(row):
            x[user, item] = 0.5 ** ((end - time_of(user, place)) / half_life)
    return x


def similarity(x: np.ndarray, without: int | None = None) -> np.ndarray:
    """[a, b] by the definition; what one user's row adds to their pairs and to the norms of candidates left out."""
    rest = x if without is None else np.delete(x, without, 0)
    both, of, candidate = rest.T @ rest, np.sqrt((x**2).sum(0)), np.sqrt((rest**2).sum(0))
    similar = both / (of[:, None] * candidate[None] + SHRINKAGE)
    np.fill_diagonal(similar, 0)
    return similar


@given(rows_of_items, st.integers(0, ITEMS - 1), st.sampled_from([None, 0.4]), st.booleans(), st.sampled_from([0, 9]))
@settings(max_examples=60)
def test_an_owner_is_scored_as_if_the_pairs_had_been_counted_without_them(
    rows: list[list[int]], dense: int, share: float | None, every_moment: bool, sparse: float
) -> None:
    """In either way of adding them up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosines, "SPARSE", sparse)
        _scored_without_their_owner(rows, dense, share, every_moment)


def _scored_without_their_owner(rows: list[list[int]], dense: int, share: float | None, every_moment: bool) -> None:
    times = [[time_of(user, place) for place in range(len(row))] for user, row in enumerate(rows)]
    log = sequences_of(rows, timestamps=times)
    config = ModelConfig(neighbour_items=max(dense, 1), neighbour_shrinkage=SHRINKAGE)
    tables = tabulate(collect(log, ITEMS, config), config, HalfLives(share))
    model = Neighbours(ITEMS, SHRINKAGE)
    model.load(tables.inverse, tables.neighbour_items, tables.end, tables.half_life, tables.pairs)
    batch = training_batch(log, training_windows(log, 20))
    assert batch.owned is not None and batch.owned_at is not None
    moments = batch.mask.nonzero()
    weights = torch.rand(len(moments), 2, generator=torch.Generator().manual_seed(1))
    owned = (batch.owned, batch.owned_at)
    if every_moment:
        found = torch.zeros(len(moments), ITEMS)
        model.add_beyond(found, batch.items, moments, weights, owned)
    else:
        found = torch.zeros(len(moments), ITEMS)
        for n in range(len(moments)):
            model.add_beyond(found[n : n + 1], batch.items, moments[n : n + 1], weights[n : n + 1], owned)
    x = weights_of(rows, tables.half_life, tables.end)
    among = np.isin(np.arange(ITEMS), tables.neighbour_items)
    unit = float(model.cosines.unit)
    for (row, place), weight, score in zip(moments.tolist(), weights.tolist(), found.tolist(), strict=True):
        past = rows[row][: place + 1]
        similar = similarity(x, row) * ~(among[:, None] & among[None])
        expected = np.zeros(ITEMS)
        for age, item in enumerate(past[::-1]):
            expected += (weight[0] * SHORT_DECAY**age + weight[1] * len(past) ** -0.5) * similar[item] / unit
        np.testing.assert_allclose(score, expected, atol=1e-4)


def fitted(seed: int, dense: int) -> tuple[Neighbours, torch.Tensor]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, ITEMS, 12).tolist() for _ in range(5)]
    log = sequences_of(rows)
    config = ModelConfig(neighbour_items=dense, neighbour_shrinkage=SHRINKAGE)
    tables = tabulate(collect(log, ITEMS, config), config, HalfLives())
    model = Neighbours(ITEMS, SHRINKAGE)
    model.load(tables.inverse, tables.neighbour_items, tables.end, tables.half_life, tables.pairs)
    return model, torch.tensor(rows)


def test_some_columns_are_those_of_all_and_events_add_up() -> None:
    model, histories = fitted(0, 3)
    moments = torch.tensor([[row, place] for row in range(len(histories)) for place in (2, 7, 11)])
    weights, columns = torch.rand(len(moments), 2), torch.tensor([0, 2, 3, 7])
    whole = model(histories, moments, weights)
    torch.testing.assert_close(model(histories, moments, weights, None, columns), whole[:, columns])
    for number, (row, place) in enumerate(moments.tolist()):
        each = model.by_event(histories[row, : place + 1], weights[number], columns)
        torch.testing.assert_close(each.sum(0), whole[number, columns])
    heard = model.cosines.heard(histories[0])
    said = torch.zeros(1, ITEMS)
    model.add_beyond(said, histories[:1], torch.tensor([[0, 11]]), torch.ones(1, 2))
    assert set(said[0].nonzero()[:, 0].tolist()) == set(heard.tolist())


def test_new_items_are_heard_of_by_nobody() -> None:
    model, histories = fitted(1, 3)
    asked = (histories[:1], torch.tensor([[0, 11]]), torch.ones(1, 2))
    before = model(*asked)
    model.grow(2)
    torch.testing.assert_close(model(*asked), torch.nn.functional.pad(before, (0, 2)))
    new = (torch.tensor([[ITEMS + 1]]), torch.tensor([[0, 0]]), torch.ones(1, 2))
    assert not model(*new).any()


def test_without_a_tail_there_are_no_pairs() -> None:
    model, histories = fitted(2, ITEMS)
    assert not len(model.cosines.items)
    scores = model(histories, torch.tensor([[0, 11]]), torch.ones(1, 2))
    scores.sum().backward()  # all parameters get a gradient: DDP waits for every one
    assert model.cosines.log_scale.grad is not None


def said_by(model: Cosines, *asked: Any) -> torch.Tensor:
    """[3] at one moment."""
    scores = torch.zeros(1, 3)
    model(scores, *asked)
    return scores[0]


def test_only_the_nearest_are_kept_and_a_place_owed_to_oneself_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosines, "NEAREST", 1)
    # Two users took 0 with 2, two took 1 with 2, of whom one is asking: without them 1 is not the nearest of 2.
    x = sp.csr_array(np.array([[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]], float))
    pairs = count_pairs(x, np.zeros(0, np.int64), SHRINKAGE)
    assert pairs.counts[1, 2] == pytest.approx(3)  # 3 / (sqrt(15) + 2)
    assert pairs.counts[0, 2] == 0  # against 2 / (sqrt(10) + 2)
    assert pairs.near_from[2] == pytest.approx(2 / (math.sqrt(10) + 2))
    model = Cosines(3, SHRINKAGE)
    model.load(pairs)
    asked = (torch.tensor([[1]]), torch.tensor([[0, 0]]), torch.ones(1, 1))
    owner = (torch.tensor([[1, 2]]), torch.ones(1, 2))
    assert said_by(model, *asked)[2] == pytest.approx(3 / (math.sqrt(15) + 2))
    assert said_by(model, *asked, owner)[2] == 0  # 2 / (sqrt(12) + 2) is .366; what was left out says .387
    monkeypatch.setattr(cosines, "HEARD", 1)
    heard = count_pairs(sp.csr_array(np.eye(3)[[0, 0, 0]] + np.eye(3)[[1, 1, 2]]), np.zeros(0, np.int64), SHRINKAGE)
    assert heard.counts[0, 1] == pytest.approx(2) and heard.counts[0, 2] == 0
    assert heard.heard_from[0] == pytest.approx(1 / (math.sqrt(3) + 2))


def test_a_place_owed_to_oneself_is_measured_without_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their owner 0 is nearer to 2 than 1 is, though what 0 said when the list was cut was less than 1 says."""
    monkeypatch.setattr(cosines, "NEAREST", 1)
    pairs = count_pairs(
        sp.csr_array(np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0]], float)), np.zeros(0, np.int64), 5.0
    )
    model = Cosines(3, 5.0)
    model.load(pairs)
    asked = (torch.tensor([[1]]), torch.tensor([[0, 0]]), torch.ones(1, 1))
    assert said_by(model, *asked)[2] and not said_by(model, *asked, (torch.tensor([[1, 2]]), torch.ones(1, 2)))[2]


@pytest.mark.parametrize("counted", [1, 7])
def test_pairs_are_the_same_in_whatever_blocks_they_are_counted(counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = sp.csr_array((rng.random((30, ITEMS)) < 0.4) * rng.random((30, ITEMS)))
    whole = count_pairs(x, np.array([1, 4]), SHRINKAGE)
    monkeypatch.setattr(cosines, "COUNTED", counted)
    parts = count_pairs(x, np.array([1, 4]), SHRINKAGE)
    np.testing.assert_array_equal(whole.counts.toarray(), parts.counts.toarray())
    dense = np.isin(np.arange(ITEMS), [1, 4])
    expected = (x.T @ x).toarray() * ~(dense[:, None] & dense) * ~np.eye(ITEMS, dtype=bool)
    np.testing.assert_allclose(whole.counts.toarray(), expected, rtol=1e-5)


def test_users_of_very_many_items_are_left_out_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosines, "MOST", 2)
    x = np.array([[1, 1, 0], [1, 1, 1]], float)
    pairs = count_pairs(sp.csr_array(x), np.zeros(0, np.int64), SHRINKAGE)
    assert pairs.counts[0, 1] == pytest.approx(1) and pairs.counts[0, 2] == 0
    model = Cosines(3, SHRINKAGE)
    model.load(pairs)
    asked = (torch.tensor([[0]]), torch.tensor([[0, 0]]), torch.ones(1, 1))
    heavy, light = (torch.tensor([[0, 1, 2]]), torch.ones(1, 3)), (torch.tensor([[0, 1]]), torch.ones(1, 2))
    torch.testing.assert_close(said_by(model, *asked, heavy), said_by(model, *asked))  # what they did was never counted
    assert said_by(model, *asked)[1] and not said_by(model, *asked, light)[1]


@pytest.mark.parametrize("nearest", [100, 5])
def test_on_noise_the_cosines_are_not_trusted(nearest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosines, "NEAREST", nearest)
    log = random_log(NOISE_ITEMS, users=64, length=20, repeats=False)
    both = ("neighbours", "popularity")
    untrained = math.log1p(math.exp(-1))
    without, _ = train_on_noise(log, NOISE_ITEMS, ("popularity",))
    loss, weight = train_on_noise(log, NOISE_ITEMS, both, "neighbours_long", neighbour_items=1)
    assert loss > without - 0.005
    assert weight < untrained / 2
    leaked_loss, leaked_weight = train_on_noise(
        log, NOISE_ITEMS, both, "neighbours_long", held_out=False, neighbour_items=1
    )
    assert leaked_loss < loss - 0.1  # the leak wins in training: it knows the answers
    assert leaked_weight > untrained
