"""A frozen model scores as the model itself does, whatever channels it has, and follows what is observed and added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from springtide.bundle import load_bundle
from springtide.model.batch import History
from springtide.model.frozen import FrozenModel
from springtide.model.recommender import Recommender
from toy import ITEMS_IN_TOY, toy_bundle

torch.set_num_threads(1)


def history(items: list[int]) -> History:
    count = len(items)
    times = 10**12 + 10**6 * np.arange(count)
    return History(np.array(items), np.ones(count, np.int64), np.full(count, np.nan, np.float32), times)


def bundled(folder: Path, **values: Any) -> Recommender:
    """A toy in which half of the items are rare enough to borrow."""
    recommender = load_bundle(toy_bundle(folder, **values)).recommender
    borrowing = recommender.model.channels.borrowing
    if borrowing is not None:
        rng = np.random.default_rng(0)
        lenders = rng.integers(20, ITEMS_IN_TOY, (ITEMS_IN_TOY, 3))
        borrowing.load(lenders, rng.uniform(-1, 1, lenders.shape).astype(np.float32))
        borrowing.events[:20] = torch.arange(20) % 7
    return recommender


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    return bundled(tmp_path_factory.mktemp("toy"))


def both(recommender: Recommender, histories: list[History]) -> tuple[np.ndarray, np.ndarray]:
    """Logits by the frozen model and by the model."""
    with torch.inference_mode():
        batch, interest, last = recommender._read(histories, None)
        frozen = FrozenModel(recommender.model, recommender._vectors).logits(batch, interest, last)
        plain = recommender.model.logits_at(batch, interest, recommender._vectors, last)
    return frozen.numpy(), plain.numpy()


@given(st.lists(st.lists(st.integers(0, ITEMS_IN_TOY - 1), min_size=1, max_size=30), min_size=1, max_size=5))
@settings(max_examples=60)
def test_it_scores_as_the_model_does(recommender: Recommender, rows: list[list[int]]) -> None:
    assert recommender.model.channels.borrowing is not None
    frozen, plain = both(recommender, [history(items) for items in rows])
    np.testing.assert_allclose(frozen, plain, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "off",
    [
        {"model__memory": False, "model__neighbours": False, "model__recent_popularity": False},
        {"model__text_neighbours": False, "model__popularity": False},
        {"model__text_neighbours": False, "model__popularity": False, "model__memory": False,
         "model__neighbours": False, "model__recent_popularity": False},
        {"model__borrowing": False},
        {"model__neighbour_items": 12},
    ],
)  # fmt: skip
def test_whatever_channels_the_model_has(off: dict[str, Any], tmp_path: Path) -> None:
    frozen, plain = both(bundled(tmp_path, **off), [history([1, 2, 3]), history([39])])
    np.testing.assert_allclose(frozen, plain, atol=2e-5, rtol=1e-5)


def test_what_is_observed_counts_at_once(tmp_path: Path) -> None:
    recommender, asked = bundled(tmp_path), [history([5, 6])]
    before = recommender.score(asked).logits
    new = history([7] * 50)
    recommender.observe(asked, [replace(new, timestamps=new.timestamps + 10**9)])
    after = recommender.score(asked).logits
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, both(recommender, asked)[1], atol=2e-5, rtol=1e-5)
