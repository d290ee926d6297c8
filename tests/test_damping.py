"""Damping of popularity: as strong as validation allows, part of every score, and no part of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from springtide.model.batch import scoring_batch
from springtide.ranks import LEAST
from springtide.training import damping
from springtide.training.damping import TRIED, choose_damping
from toy import ITEMS_IN_TOY, cases_of, popularity_model

torch.set_num_threads(1)
ITEMS = ITEMS_IN_TOY


def test_as_far_as_the_order_holds() -> None:
    """Up to 0.42 popularity still counts for an item, beyond it against."""
    cases = cases_of(*[0, 1, 2] * 7)
    assert choose_damping(popularity_model(), cases, None, False, 0.01) == 0.4
    assert choose_damping(popularity_model(), cases, None, False, 1.0) == TRIED[-1]


def test_what_it_may_cost_is_kept() -> None:
    """Two thirds of the gain come from items that damping beyond 0.42 would lose."""
    cases = cases_of(*[0, 0, ITEMS - 2] * 7)
    assert choose_damping(popularity_model(), cases, None, False, 0.5) == 0.4
    assert choose_damping(popularity_model(), cases, None, False, 0.7) == TRIED[-1]


def test_a_list_of_ten_may_lose_what_chance_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 cases 20 are in their list of ten. One that leaves it may be chance, twelve are none."""

    def chosen(leaving: int, elsewhere: float = 0.3) -> float:
        gains = np.full((len(TRIED), 2, 400), 0.3)
        gains[:, 0], gains[:, 0, :20], gains[1:, 0, :leaving], gains[1:, 1] = 0, 1, 0, elsewhere
        monkeypatch.setattr(damping, "_gains", lambda *_: gains)
        return choose_damping(popularity_model(), cases_of(*[0] * 400), None, False, 0.01)

    assert chosen(0) == chosen(1) == TRIED[-1]
    assert chosen(12) == 0
    assert chosen(0, elsewhere=0.29) == 0  # what all ranks tell is no chance


def test_items_that_nobody_took_yet_have_no_say() -> None:
    """They would be found the sooner the stronger the damping is."""
    model = popularity_model()
    model.item_vectors.known[ITEMS - 3 :] = False
    known = [0, 1] * 10
    chosen = choose_damping(model, cases_of(*known), None, False, 0.01)
    assert 0 < chosen == choose_damping(model, cases_of(*known, *[ITEMS - 2] * 50), None, False, 0.01)
    assert choose_damping(model, cases_of(*[ITEMS - 2] * 50), None, False, 1.0) == 0


def test_what_a_recommender_never_lists_is_no_competitor() -> None:
    model = popularity_model()
    model.item_vectors.known[0] = False  # neither trained nor described, though its score would be the best
    assert damping._gains(model, cases_of(1), None, False)[0].tolist() == [[1.0], [1.0]]


def test_nothing_to_choose_by() -> None:
    many, few = cases_of(*[0] * LEAST), cases_of(*[0] * (LEAST - 1))
    assert choose_damping(popularity_model(), many, None, False, 0.5) > 0
    assert choose_damping(popularity_model(), cases_of(*[ITEMS - 2] * LEAST), None, True, 0.5) == 0
    assert choose_damping(popularity_model(), few, None, False, 0.5) == 0  # the most would be as good by chance
    assert choose_damping(popularity_model(), [], None, True, 0.5) == 0
    assert choose_damping(popularity_model(), many, None, True, 0.0) == 0


def test_what_nobody_took_is_left_where_it_is() -> None:
    model = popularity_model()
    model.channels.observe_popularity(np.array([0, 0, *range(1, ITEMS - 1)]))
    assert not model.channels.excess[:2].any()
    assert model.channels.excess[2:].mean().abs() < 1e-5 and (model.channels.excess[2:].diff() > 0).all()


def test_it_is_in_the_scores_and_not_in_training() -> None:
    model = popularity_model().eval()
    batch = scoring_batch([history for history, _ in cases_of(0)], 20)
    vectors, moments = model.item_vectors(), torch.tensor([[0, 0]])
    interest = model.interest(batch, vectors)
    with torch.no_grad():
        before = model.logits_at(batch, interest, vectors, moments)
        model.channels.damping.fill_(0.3)
        after = model.logits_at(batch, interest, vectors, moments)
        torch.testing.assert_close(after, before - 0.3 * model.channels.excess)
        torch.testing.assert_close(sum(model.scores_at(batch, interest, vectors, moments).values()), after)
        model.train()
        torch.testing.assert_close(model.logits_at(batch, interest, vectors, moments), before)
    assert "channels.damping" in model.state_dict()
