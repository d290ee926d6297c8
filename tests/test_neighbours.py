"""Long-term neighbours: nobody is scored by what they added themselves, in whichever way the scores are computed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from noise import NOISE_ITEMS, random_log, train_on_noise
from springtide.config import ModelConfig
from springtide.model.neighbours import SHORT_DECAY, Neighbours
from springtide.model.running import BLOCK, running_sum
from springtide.training.sequences import training_batch, training_windows
from springtide.training.statistics import collect
from springtide.training.tabulate import HalfLives, tabulate
from toy import sequences_of

torch.set_num_threads(1)
ITEMS, L2, SHRINKAGE = 8, 3.0, 2.0
HOUR = 3_600_000

rows_of_items = st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=2, max_size=9), min_size=2, max_size=5)


def fitted_without(rows: list[list[int]], owner: int, items: np.ndarray, half_life: float, end: int) -> np.ndarray:
    """(X'X + l2)^-1 over `items`, of everybody but the owner, by the definition."""
    x = np.zeros((len(rows), ITEMS))
    for user, row in enumerate(rows):
        for place, item in enumerate(row):  # the last time counts
            x[user, item] = 0.5 ** ((end - time_of(user, place)) / half_life)
    x = np.delete(x, owner, 0)[:, items]
    return np.linalg.inv(x.T @ x + L2 * np.eye(len(items)))  # type: ignore[no-any-return]


def time_of(user: int, place: int) -> int:
    return 10**12 + HOUR * (3 * place + user)


def naive_scores(
    inverse: np.ndarray, items: np.ndarray, past: list[int], weights: list[float], unit: float
) -> np.ndarray:
    """What the history says for each item of the catalogue; none speaks for itself."""
    strength = -inverse / np.diag(inverse)[None]
    np.fill_diagonal(strength, 0)
    place = {int(item): number for number, item in enumerate(items)}
    score = np.zeros(len(items))
    for age, item in enumerate(past[::-1]):
        if item in place:
            read = weights[0] * SHORT_DECAY**age + weights[1] * len(past) ** -0.5
            score += read * strength[place[item]] / unit
    return score


@given(rows_of_items, st.integers(1, ITEMS), st.sampled_from([None, 0.4]), st.booleans())
@settings(max_examples=50)
def test_an_owner_is_scored_as_if_the_inverse_had_been_fitted_without_them(
    rows: list[list[int]], kept: int, share: float | None, every_moment: bool
) -> None:
    """Short and long reading, all moments together or one by one, items of the history and outside the M too."""
    times = [[time_of(user, place) for place in range(len(row))] for user, row in enumerate(rows)]
    log = sequences_of(rows, timestamps=times)
    config = ModelConfig(neighbour_items=kept, neighbour_l2=L2)
    tables = tabulate(collect(log, ITEMS, config), config, HalfLives(share))
    items, model = tables.neighbour_items, Neighbours(ITEMS, SHRINKAGE)
    model.load(tables.inverse, items, tables.end, tables.half_life)
    unit = float(model.unit)
    assume(unit > 1e-3)  # where nothing is near anything there is nothing to compare but rounding
    batch = training_batch(log, training_windows(log, 20))
    assert batch.owned is not None and batch.owned_at is not None
    moments = batch.mask.nonzero()
    weights = torch.rand(len(moments), 2, generator=torch.Generator().manual_seed(1))
    owned = (batch.owned, batch.owned_at)
    if every_moment:
        found = model(batch.items, moments, weights, owned)
    else:
        each = [model(batch.items, moments[n : n + 1], weights[n : n + 1], owned) for n in range(len(moments))]
        found = torch.cat(each)
    for (row, place), weight, score in zip(moments.tolist(), weights.tolist(), found.tolist(), strict=True):
        past = rows[row][: place + 1]
        inverse = fitted_without(rows, row, items, tables.half_life, tables.end)
        expected = naive_scores(inverse, items, past, weight, unit)
        np.testing.assert_allclose(np.array(score)[items], expected, atol=1e-4)
        assert not np.delete(score, items).any()  # nothing is known of the others


def test_the_two_ways_of_reading_a_history_agree() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, ITEMS, 300).tolist() for _ in range(4)]  # longer than a block of running sums
    log = sequences_of(rows)
    config = ModelConfig(neighbour_items=ITEMS - 1, neighbour_l2=L2)
    tables = tabulate(collect(log, ITEMS, config), config, HalfLives())
    model = Neighbours(ITEMS, SHRINKAGE)
    model.load(tables.inverse, tables.neighbour_items, tables.end, tables.half_life)
    batch = training_batch(log, training_windows(log, 300))
    moments = batch.mask.nonzero()
    weights = torch.rand(len(moments), 2, generator=torch.Generator().manual_seed(1))
    whole = model(batch.items, moments, weights)
    for few in (torch.arange(3, len(moments), 31), torch.tensor([5, len(moments) - 1])):  # shared histories, and not
        some = model(batch.items, moments[few], weights[few])
        torch.testing.assert_close(whole[few], some, rtol=1e-4, atol=1e-4)
        assert some.abs().max() > 0.01


def test_a_user_who_is_not_in_the_log_is_scored_by_all_of_it() -> None:
    rows = [[0, 1, 2], [0, 1, 3], [4, 5, 6]]
    log = sequences_of(rows)
    config = ModelConfig(neighbour_l2=L2)
    tables = tabulate(collect(log, ITEMS, config), config, HalfLives())
    model = Neighbours(ITEMS, SHRINKAGE)
    model.load(tables.inverse, tables.neighbour_items, tables.end, tables.half_life)
    none = (torch.full((1, 3), -1), torch.zeros(1, 3, dtype=torch.int64))
    asked = (torch.tensor([[0]]), torch.tensor([[0, 0]]), torch.ones(1, 2))
    torch.testing.assert_close(model(*asked, none), model(*asked))
    scores = model(*asked)[0].tolist()
    assert scores.index(max(scores)) == 1 and scores[7] == 0  # item 7 never occurs
    assert float(model.unit) == pytest.approx(np.mean([s for s in _best(tables.inverse)]), rel=1e-5)


def _best(inverse: np.ndarray) -> list[float]:
    strength = -inverse / np.diag(inverse)[None]
    np.fill_diagonal(strength, 0)
    return strength.max(1).tolist()  # type: ignore[no-any-return]


# ---------------------------------------------------------------- what a leak would do
def test_on_noise_the_neighbours_are_not_trusted() -> None:
    log = random_log(NOISE_ITEMS, users=64, length=20, repeats=False)
    both = ("neighbours", "popularity")
    untrained = math.log1p(math.exp(-1))
    without, _ = train_on_noise(log, NOISE_ITEMS, ("popularity",))
    loss, weight = train_on_noise(log, NOISE_ITEMS, both, "neighbours_long")
    assert loss > without - 0.005
    assert weight < untrained / 5
    leaked_loss, leaked_weight = train_on_noise(log, NOISE_ITEMS, both, "neighbours_long", held_out=False)
    assert leaked_loss < loss - 1  # the leak wins in training: it knows the answers
    assert leaked_weight > 2 * untrained


# ---------------------------------------------------------------- running sums
@given(st.integers(1, 3 * BLOCK + 5), st.sampled_from([1.0, SHORT_DECAY, 0.95]), st.booleans())
@settings(max_examples=40)
def test_running_sums_equal_a_loop(length: int, decay: float, flat: bool) -> None:
    shape = (2, length) if flat else (2, length, 3)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(length))
    found = running_sum(values, decay)
    assert found.shape == values.shape
    total = torch.zeros_like(values[:, 0], dtype=torch.float64)
    for place in range(length):
        total = values[:, place].double() + decay * total
        torch.testing.assert_close(found[:, place].double(), total, rtol=1e-4, atol=1e-4)


def test_some_columns_are_those_of_all() -> None:
    rng = np.random.default_rng(0)
    log = sequences_of([rng.integers(0, ITEMS, 12).tolist() for _ in range(5)])
    for kept in (ITEMS, 5):
        config = ModelConfig(neighbour_items=kept, neighbour_l2=L2)
        tables = tabulate(collect(log, ITEMS, config), config, HalfLives())
        model = Neighbours(ITEMS, SHRINKAGE)
        model.load(tables.inverse, tables.neighbour_items, tables.end, tables.half_life)
        batch = training_batch(log, training_windows(log, 20))
        moments, columns = batch.mask.nonzero(), torch.tensor([0, 2, 3, 7])
        asked = (batch.items, moments, torch.rand(len(moments), 2), (batch.owned, batch.owned_at))
        torch.testing.assert_close(model(*asked, columns), model(*asked)[:, columns])  # type: ignore[arg-type]


def test_windows_of_one_user_are_all_scored_without_them() -> None:
    """What is taken out is the owner's whole row, not only the window's part of it."""
    rng = np.random.default_rng(1)
    rows = [rng.permutation(ITEMS).tolist() for _ in range(4)]
    log = sequences_of(rows)
    batch = training_batch(log, training_windows(log, 3))
    assert batch.owned is not None and len(batch.items) > len(rows)
    for owned, actions in zip(batch.owned.tolist(), batch.items.tolist(), strict=True):
        assert sorted(owned) == list(range(ITEMS)) and set(actions) <= set(owned)
    for repeated in ([2, 3, 2], [2, 2, 2]):  # an item counts once, when it was taken last
        log_of_one = sequences_of([repeated])
        batch = training_batch(log_of_one, training_windows(log_of_one, 20))
        assert batch.owned is not None and batch.owned_at is not None
        last = {item: 10**12 + 1000 * place for place, item in enumerate(repeated)}
        owned = list(zip(batch.owned[0].tolist(), batch.owned_at[0].tolist(), strict=True))
        assert sorted(pair for pair in owned if pair[0] >= 0) == sorted(last.items())
    shorter = replace(log, train_end=log.train_end - 1)  # what is held out is nobody's
    batch = training_batch(shorter, training_windows(shorter, 20))
    assert batch.owned is not None
    assert all(row[-1] not in owned for row, owned in zip(rows, batch.owned.tolist(), strict=True))
