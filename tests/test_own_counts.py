"""What leaves the transition counts with a moment's own and later events, against loops that a reader can check."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noise import NOISE_ITEMS, random_log, train_on_noise
from springtide.config import ModelConfig
from springtide.model.channels import later_items
from springtide.model.memory import TransitionMemory, count_transitions
from springtide.training import own_counts as module
from springtide.training.own_counts import own_counts
from springtide.training.sequences import Sequences, concatenate, training_batch, training_windows, with_own_counts

torch.set_num_threads(1)
ITEMS = 5

Rows = list[list[tuple[int, bool]]]
logs = st.lists(st.lists(st.tuples(st.integers(0, ITEMS - 1), st.booleans()), min_size=1, max_size=12), max_size=5)


def sequences_of(rows: Rows) -> Sequences:
    lengths = np.array([len(row) for row in rows], np.int64)
    start = np.cumsum(lengths) - lengths
    flat = [event for row in rows for event in row]
    return Sequences(
        items=np.array([item for item, _ in flat], np.int64),
        actions=np.ones(len(flat), np.int64),
        ratings=np.full(len(flat), np.nan, np.float32),
        timestamps=np.arange(len(flat)) * 1000,
        targets=np.array([wanted for _, wanted in flat], bool),
        start=start,
        train_end=start + lengths,
        valid_target=np.full(len(rows), -1),
    )


def naive(row: list[tuple[int, bool]], place: int, back: int, distances: int, decay: float) -> float:
    """What the events of `row` from `place` on added to the count from the item `back` + 1 before it to its item."""
    item, recent = row[place][0], row[place - 1 - back][0]
    return sum(
        decay ** (distance - 1)
        for later in range(place, len(row))
        for distance in range(1, min(distances, later) + 1)
        if row[later] == (item, True) and row[later - distance][0] == recent
    )


@given(logs, st.integers(1, 4), st.integers(1, 4), st.sampled_from([1.0, 0.8]), st.sampled_from([3, 10**6]))
@settings(max_examples=200)
def test_equal_a_loop(rows: Rows, distances: int, recent: int, decay: float, block: int) -> None:
    """Also where distance is said to tell, and whatever is counted together."""
    log = sequences_of(rows)
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        row_of, counted = own_counts(log.items, users, log.targets, distances, decay, recent)
    assert counted.shape == (int((row_of >= 0).sum()), recent)
    for number, row in enumerate(rows):
        for place in range(1, len(row)):
            if not row[place][1]:
                assert row_of[log.start[number] + place] == -1
                continue
            at = row_of[log.start[number] + place]
            for back in range(min(recent, place)):
                near = [n for n in range(min(distances, place)) if row[place - 1 - n][0] == row[place - 1 - back][0]]
                by_distance = sum(decay**n for n in near)
                found = counted[at, back] if at >= 0 else by_distance
                assert found == pytest.approx(naive(row, place, back, distances, decay), abs=1e-6)


@given(logs, st.integers(1, 4), st.integers(1, 4), st.integers(2, 6))
@settings(max_examples=150)
def test_a_target_is_scored_as_if_its_owner_had_not_gone_on_to_take_it(
    rows: Rows, distances: int, recent: int, window: int
) -> None:
    """However often it comes again, and wherever a training window begins."""
    log = sequences_of(rows)
    config = ModelConfig(memory_distances=distances, memory_decay=0.8, memory_recent=recent)
    counted = with_own_counts(log, config)
    windows = training_windows(counted, window)
    if not len(windows):
        return
    batch = training_batch(counted, windows, distances - 1)
    for row, (first, _, offset) in enumerate(windows):
        for at in range(int(batch.mask[row].sum())):
            target = int(batch.targets[row, at])
            if target < 0:
                continue
            owner = int(np.searchsorted(log.start, first, side="right")) - 1
            begin = int(log.start[owner])
            wanted = log.targets.copy()
            after = np.arange(first + at + 1, begin + len(rows[owner]))
            wanted[after[log.items[after] == target]] = False
            assert offset + begin == first
            assert _score(log, log.targets, config, batch, row, at, held_out=True)[target].item() == pytest.approx(
                _score(log, wanted, config, batch, row, at, held_out=False)[target].item(), rel=1e-4, abs=1e-5
            )


def _score(
    log: Sequences, wanted: np.ndarray, config: ModelConfig, batch: object, row: int, at: int, held_out: bool
) -> torch.Tensor:
    """[I] the memory's scores after event `at` of a row, with the events `wanted` counted as successors."""
    memory = TransitionMemory(ITEMS, config.memory_distances, config.memory_decay, config.memory_recent, ITEMS)
    ends = [*log.start[1:], len(log.items)]
    spans = [slice(a, b) for a, b in zip(log.start, ends, strict=True)]
    pairs = [(log.items[s], wanted[s]) for s in spans]
    memory.load_counts(count_transitions(pairs, ITEMS, config.memory_distances, config.memory_decay))
    moments = torch.tensor([[row, at]])
    back = at - torch.arange(max(config.memory_recent, config.memory_distances))
    recent = batch.items[row, back.clamp(min=0)][None]  # type: ignore[attr-defined]
    later = later_items(batch, moments, config.memory_distances) if held_out else None  # type: ignore[arg-type]
    own = batch.own[row, at][None] if held_out and batch.own is not None else None  # type: ignore[attr-defined]
    with torch.no_grad():
        return memory(recent, (back >= 0)[None], torch.ones(1, 2), later, None, own)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("window", [4, 30])
def test_what_comes_after_the_target_leaves_as_well(window: int) -> None:
    """Or what a user goes on to take would be told apart from what nobody takes: as if it were wrong."""
    rng = np.random.default_rng(0)
    rows: Rows = [[(int(item), bool(rng.random() < 0.8)) for item in rng.permutation(ITEMS)] for _ in range(6)]
    log, config = sequences_of(rows), ModelConfig(memory_distances=3, memory_recent=3)
    batch = training_batch(log, training_windows(log, window), config.memory_distances - 1)
    moments = (batch.targets >= 0).nonzero()
    assert len(moments) > 10
    for row, at in moments.tolist():
        end = int(training_windows(log, window)[row, 0]) + at + 1
        owner = int(np.searchsorted(log.start, end - 1, side="right")) - 1
        wanted = log.targets.copy()
        wanted[end : int(log.train_end[owner])] = False
        known = _score(log, log.targets, config, batch, row, at, held_out=True)
        torch.testing.assert_close(known, _score(log, wanted, config, batch, row, at, held_out=False))


def test_blocks_keep_their_own_counts_when_joined() -> None:
    rng = np.random.default_rng(1)
    rows: Rows = [[(int(item), True) for item in rng.integers(0, 3, 8)] for _ in range(4)]
    alone: Rows = [[(item, True) for item in range(3)]]  # needs none
    config = ModelConfig(memory_distances=3, memory_recent=3)
    whole = with_own_counts(sequences_of([*rows[:2], *alone, *rows[2:]]), config)
    joined = concatenate([with_own_counts(sequences_of(part), config) for part in (rows[:2], alone, rows[2:])])
    asks = whole.own_row >= 0
    assert asks.any() and not asks.all()
    np.testing.assert_array_equal(asks, joined.own_row >= 0)
    np.testing.assert_array_equal(whole.own[whole.own_row[asks]], joined.own[joined.own_row[asks]])


def test_logs_without_repeats_need_no_counting() -> None:
    log = random_log(NOISE_ITEMS, users=20, length=20, repeats=False)
    assert with_own_counts(log, ModelConfig()) is log
    assert training_batch(log, training_windows(log, 20)).own is None
    off = with_own_counts(random_log(NOISE_ITEMS, users=20, length=20), ModelConfig(memory=False))
    assert not len(off.own)


def test_on_noise_that_comes_twice_the_memory_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item is an event twice in a row, seen and bought: the first must not tell that the second is to come.

    Half of the moments ask for what was just seen, which the memory may know; the other half cannot be known.
    """
    log = random_log(NOISE_ITEMS, users=64, length=10, repeats=False)
    counted = replace(
        log,
        **{name: np.repeat(getattr(log, name), 2) for name in ("items", "actions", "ratings", "targets")},
        timestamps=np.arange(2 * len(log.items)) * 1000,
        start=log.start * 2,
        train_end=log.train_end * 2,
    )

    def losses(held_out: bool) -> tuple[float, float]:
        if not held_out:  # of each item that is taken later only the first time leaves
            own = TransitionMemory._own_counts
            monkeypatch.setattr("noise.with_own_counts", lambda sequences, _: sequences)
            monkeypatch.setattr(
                TransitionMemory,
                "_own_counts",
                lambda self, recent, valid, later: own(
                    self, recent, valid, torch.arange(later.shape[1]).expand_as(later)
                ),
            )
        return train_on_noise(counted, NOISE_ITEMS, ("memory", "popularity"), "transitions_short")

    honest, _ = losses(held_out=True)
    leaked, _ = losses(held_out=False)
    assert leaked < honest - 0.5
    assert honest > 0.4 * math.log(NOISE_ITEMS)
