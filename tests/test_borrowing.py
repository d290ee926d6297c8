"""Borrowed counts: whose texts are nearest, who borrows how much, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.model.borrowing import BORROWERS_BELOW, LENDERS, Borrowing, nearest_by_text
from springtide.model.fusion import FusionModel
from springtide.training.sequences import training_batch, training_windows
from springtide.training.statistics import collect
from springtide.training.tabulate import HalfLives, tabulate
from toy import sequences_of, toy_settings

torch.set_num_threads(1)


# ---------------------------------------------------------------- whose text is nearest
@given(st.integers(0, 30), st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_nearest_are_those_of_a_plain_search(items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rng.normal(size=(items, 4)).astype(np.float32) * (rng.random((items, 1)) < 0.8)
    popularity = rng.integers(0, 3, items)
    rows, cosines = nearest_by_text(text, popularity)
    described = np.abs(text).sum(1) > 0
    lenders = np.flatnonzero(described & (popularity > 0))
    assert rows.shape == cosines.shape == (items, min(LENDERS, len(lenders)))
    unit = text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-12)
    for item in range(items):
        others = lenders[lenders != item]
        best = np.sort(unit[others] @ unit[item])[::-1][: rows.shape[1]] if described[item] else np.zeros(0)
        there = cosines[item] > -1
        assert there.sum() == len(best)
        np.testing.assert_allclose(np.sort(cosines[item][there])[::-1], best, atol=1e-5)
        assert item not in rows[item][there] and set(rows[item][there]) <= set(lenders)


# ---------------------------------------------------------------- what is borrowed
def lending(events: list[int], lenders: list[list[int]], cosines: list[list[float]]) -> Borrowing:
    """Scale 1, kappa 1, tau 0.5."""
    module = Borrowing(torch.tensor(events))
    module.load(np.array(lenders), np.array(cosines, np.float32))
    with torch.no_grad():
        module.log_scale.zero_()
        module.log_kappa.zero_()
        module.log_tau.fill_(np.log(0.5))
    return module


def test_by_hand() -> None:
    module = lending(
        [0, 100, 3, 200], [[1, 3], [3, 2], [1, 3], [1, 2]], [[1.0, 0.5], [0.9, 0.8], [0.5, -1.0], [0.9, 0]]
    )
    counted = torch.tensor([[0.0, 2.0, 1.0, 4.0]])
    found = module(counted, None, None, None)
    near = 1 + np.exp(-1)  # item 0 is new: all of what its two lenders say, as a share of them
    new = (2.0 + np.exp(-1) * 4.0) / near
    rare = 1.0 + np.exp(-1) * 2.0 / (1 + 3)  # less than one perfect lender; the other place is empty
    torch.testing.assert_close(found, torch.tensor([[new, 2.0, rare, 4.0]], dtype=torch.float32))


def test_an_item_treated_as_new_loses_its_own_counts_and_borrows_in_full() -> None:
    module = lending([50, 100], [[1], [0]], [[1.0], [1.0]])
    counted = torch.tensor([[3.0, 7.0]])
    torch.testing.assert_close(module(counted, None, None, None), counted)
    cold = torch.tensor([True, False])
    torch.testing.assert_close(module(counted, None, None, cold), torch.tensor([[7.0, 7.0]]))


@given(st.integers(2, 25), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_columns_are_columns_of_the_whole(items: int, seed: int, some_cold: bool) -> None:
    rng = np.random.default_rng(seed)
    popularity = rng.integers(0, 2 * BORROWERS_BELOW, items)
    module = Borrowing(torch.from_numpy(popularity))
    module.load(*nearest_by_text(rng.normal(size=(items, 3)).astype(np.float32), popularity))
    counted = torch.from_numpy(rng.random((5, items)).astype(np.float32))
    cold = torch.from_numpy(rng.random(items) < 0.3) if some_cold else None
    columns = torch.from_numpy(np.flatnonzero(rng.random(items) < 0.5))
    wider = module.needed(columns, cold)
    assert (wider.diff() > 0).all() and set(columns.tolist()) <= set(wider.tolist())
    whole = module(counted, None, None, cold)
    torch.testing.assert_close(module(counted[:, wider], wider, columns, cold), whole[:, columns])


# ---------------------------------------------------------------- in the model
ITEMS, NEW, TWIN = 12, 11, 3
ROWS = [np.random.default_rng(n).integers(0, NEW, 9).tolist() for n in range(40)]


def model_of(**values: object) -> FusionModel:
    """Counting channels alone; item 11 is new and its text is that of item 3."""
    config = toy_settings(Path("none"), **{f"model__{name}": value for name, value in values.items()}).model
    text = np.random.default_rng(0).normal(size=(ITEMS, config.text_dim)).astype(np.float32)
    text[NEW] = text[TWIN]
    tables = tabulate(collect(sequences_of(ROWS), ITEMS, config), config, HalfLives(), text)
    popularity = torch.from_numpy(tables.popularity)
    model = FusionModel(config, 2, torch.from_numpy(text), popularity > 0, popularity)
    for parameter in model.item_vectors.parameters():
        torch.nn.init.zeros_(parameter)
    tables.fill(model)
    return model.eval()


@pytest.mark.parametrize("channel", ["memory", "neighbours"])
def test_a_new_item_is_scored_by_the_counts_of_its_twin(channel: str) -> None:
    """The nearest lender says the most by far, so that the two rank alike over many moments."""
    only = dict.fromkeys(("memory", "neighbours", "text_neighbours", "recent_popularity", "popularity"), False)
    model, without = model_of(**only | {channel: True}), model_of(**only | {channel: True, "borrowing": False})
    batch = training_batch(sequences_of(ROWS), training_windows(sequences_of(ROWS), 20))
    moments = batch.mask.nonzero()
    with torch.no_grad():
        assert model.channels.borrowing is not None
        model.channels.borrowing.log_tau.fill_(-3)
        vectors = model.item_vectors()
        scores = model.logits_at(batch, model.interest(batch, vectors), vectors, moments)
        plain = without.logits_at(batch, without.interest(batch, vectors), vectors, moments)
    assert not plain[:, NEW].any()
    assert np.corrcoef(scores[:, NEW], scores[:, TWIN])[0, 1] > 0.9
    seen_often = torch.from_numpy(np.bincount(np.concatenate(ROWS), minlength=ITEMS) >= BORROWERS_BELOW)
    assert seen_often.sum() == NEW
    torch.testing.assert_close(scores[:, seen_often], plain[:, seen_often])


def test_what_an_owner_takes_later_lends_nothing_in_training() -> None:
    """Item 1 is new to the model, its text is that of item 2, and every owner takes 0, 1 and then 2.

    The counts of what follows 0 hold that very owner's 2. Whoever borrows it would know the answer.
    """
    config = toy_settings(Path("none"), model__neighbours=False, model__recent_popularity=False).model
    text = np.random.default_rng(0).normal(size=(8, config.text_dim)).astype(np.float32)
    text[1] = text[2]

    def borrowed(last: int) -> float:
        """What item 1 borrows at the moment that it is the target of, if its owner alone goes on with `last`."""
        log = sequences_of([[0, 1, last], [3, 4, 5, 6]])
        tables = tabulate(collect(log, 8, config), config, HalfLives(), text)
        popularity = torch.from_numpy(tables.popularity)
        model = FusionModel(config, 2, torch.from_numpy(text), popularity > 0, popularity)
        tables.fill(model)
        batch = training_batch(log, training_windows(log, 20))
        cold = torch.arange(8) == 1
        row = int((batch.items[:, 0] == 0).nonzero()[0, 0])
        vectors, moment = model.item_vectors(cold), torch.tensor([[row, 0]])
        interest = model.interest(batch, vectors)
        found = model._counted(batch, interest, moment, True, cold, None)
        return float(found[0, 1].detach())

    assert borrowed(2) == pytest.approx(borrowed(6), abs=1e-6)


def test_what_was_observed_since_is_no_longer_borrowed() -> None:
    model = model_of()
    assert model.channels.borrowing is not None
    counts = np.full(ITEMS, BORROWERS_BELOW)
    model.channels.observe_popularity(counts)
    counted = torch.rand(2, ITEMS)
    torch.testing.assert_close(model.channels.borrowing(counted, None, None, None), counted)


def test_nothing_to_borrow_without_text_or_counts() -> None:
    assert model_of(borrowing=False).channels.borrowing is None
    off = dict.fromkeys(("memory", "neighbours", "recent_popularity"), False)
    assert model_of(**off).channels.borrowing is None
