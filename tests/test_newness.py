"""What nobody took yet is favoured where validation users took mostly that, in every score but those of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from springtide.bundle import load_bundle
from springtide.model.answers import NewItem
from springtide.model.batch import EMPTY, History, scoring_batch
from springtide.model.fusion import FusionModel
from springtide.model.question import key_parts, part_names, query_parts
from springtide.model.recommender import Recommender
from springtide.training.newness import TRIED, choose_newness
from toy import ITEMS_IN_TOY, cases_of, popularity_model, toy_bundle

torch.set_num_threads(1)
ITEMS = ITEMS_IN_TOY
NEW = ITEMS - 3  # the first of three that nobody took


def model_with_new_items() -> FusionModel:
    model = popularity_model().eval()
    model.channels.observe_popularity(np.array([*range(ITEMS, 3, -1), 0, 0, 0]))
    model.channels.untaken[NEW:] = 1
    return model


# ---------------------------------------------------------------- the choice
def test_where_what_is_taken_is_new_it_comes_first() -> None:
    model = model_with_new_items()
    assert choose_newness(model, cases_of(*[NEW] * 40, *[0] * 5), 1, False) > 1
    assert choose_newness(model, cases_of(*[0] * 40), 1, False) == 0
    assert choose_newness(model, [], 1, False) == 0
    assert choose_newness(model, cases_of(*[NEW] * 40), None, False) == 0  # what is untaken is what is held out


def test_a_few_new_ones_are_no_habit_and_may_be_chance() -> None:
    """They would gain by it, and nobody else would lose."""
    model = model_with_new_items()
    assert choose_newness(model, cases_of(*[NEW] * 40, *[ITEMS - 10] * 160), 1, False) == 0
    assert choose_newness(model, cases_of(NEW, NEW, *[ITEMS - 10] * 4), 1, False) == 0
    assert choose_newness(model, cases_of(*[NEW] * 60, *[ITEMS - 10] * 120), 1, False) > 0


def test_no_more_than_is_best() -> None:
    """What all the others took lies within reach of the new items, and would be pushed out of the list."""
    model = model_with_new_items()
    mixed = choose_newness(model, cases_of(*[NEW] * 60, *[9] * 60), 1, False)
    alone = model.channels.log_popularity
    assert 0 < mixed < TRIED[-1]
    assert mixed <= float(0.42 * (alone[0] - alone[NEW])) + 1.0


# ---------------------------------------------------------------- in use
def test_it_is_in_the_scores_and_not_in_training() -> None:
    model = model_with_new_items()
    batch = scoring_batch([history for history, _ in cases_of(0)], 20)
    vectors, moments = model.item_vectors(), torch.tensor([[0, 0]])
    interest = model.interest(batch, vectors)
    with torch.no_grad():
        before = model.logits_at(batch, interest, vectors, moments)
        model.channels.newness.fill_(1.5)
        after = model.logits_at(batch, interest, vectors, moments)
        expected = before.clone()
        expected[:, NEW:] += 1.5
        torch.testing.assert_close(after, expected)
        model.train()
        torch.testing.assert_close(model.logits_at(batch, interest, vectors, moments), before)


def recommender_with(tmp_path: Path, newness: float) -> Recommender:
    """A bundle in which three items have no events."""
    recommender = load_bundle(toy_bundle(tmp_path)).recommender
    recommender.popularity = recommender.popularity.copy()
    recommender.popularity[NEW:] = 0
    recommender.model.channels.observe_popularity(recommender.popularity)
    recommender.model.channels.untaken[NEW:] = 1
    recommender.model.channels.newness.fill_(newness)
    recommender._read_catalogue()
    return recommender


def history(recommender: Recommender, item: int, length: int = 1) -> History:
    times = 1_600_000_000_000 + 1000 * np.arange(length)
    return History(np.full(length, item), np.ones(length, np.int64), np.full(length, np.nan, np.float32), times)


@pytest.mark.parametrize("length", [1, 7])
def test_every_way_to_a_score_has_it(tmp_path: Path, length: int) -> None:
    plain, favoured = recommender_with(tmp_path / "a", 0.0), recommender_with(tmp_path / "b", 1.5)
    past = history(plain, 2, length)
    before, after = (each.score([past]).logits[0] for each in (plain, favoured))
    np.testing.assert_allclose(after[NEW:], before[NEW:] + 1.5, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after[:NEW], before[:NEW], rtol=1e-5, atol=1e-5)
    rows = np.arange(ITEMS)
    told = favoured.explain(past, rows).shares
    np.testing.assert_allclose(sum(told.values()), after, rtol=1e-4, atol=1e-4)
    question = favoured.questions([past])[0][0]
    assert question is not None and "newness" in part_names(favoured.model)
    keys = key_parts(favoured.model, favoured.vectors)
    place = part_names(favoured.model).index("newness")
    query = query_parts(question, part_names(favoured.model), [key.shape[1] for key in keys])[place]
    assert (keys[place] @ query).tolist() == [0.0] * NEW + [1.5] * 3


def test_what_was_new_in_training_stays_so_and_an_added_item_is_new(tmp_path: Path) -> None:
    """An article that is taken is no worse for it: validation counted all that was untaken in training alike."""
    plain, favoured = recommender_with(tmp_path / "a", 0.0), recommender_with(tmp_path / "b", 1.5)
    width = plain.model.item_vectors.text.shape[1]
    added = NewItem("new", "New", [], np.full(384, 384**-0.5, np.float32), np.ones(width, np.float32))
    for each in (plain, favoured):
        each.put_items([added])
        each.observe([EMPTY], [history(each, NEW)])
    past = history(plain, 2)
    more = favoured.score([past]).logits[0] - plain.score([past]).logits[0]
    np.testing.assert_allclose(more[[0, NEW, NEW + 1, ITEMS]], [0, 1.5, 1.5, 1.5], atol=1e-4)


def test_a_bundle_of_before_has_none(tmp_path: Path) -> None:
    path = toy_bundle(tmp_path)
    state = load_file(path / "model.safetensors")
    del state["channels.newness"]
    save_file(state, path / "model.safetensors")
    assert float(load_bundle(path, verify=False).recommender.model.channels.newness) == 0
