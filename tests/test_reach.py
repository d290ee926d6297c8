"""Items that nobody's list holds: how far they are lifted, what that may cost, and where it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from springtide.model.batch import History, scoring_batch
from springtide.model.fusion import FusionModel
from springtide.ranks import gains, places, top_k
from springtide.training import reach
from springtide.training.listing import LIST, catalogue_scores
from springtide.training.reach import choose_reach, lift_items, lift_until, read_lists
from toy import ITEMS_IN_TOY, cases_of, popularity_model

torch.set_num_threads(1)
ITEMS = ITEMS_IN_TOY


def lists_of(scores: np.ndarray) -> reach.Lists:
    """As read_lists of a model that gives these scores [N, I]; all users are near, so nothing is approximate."""
    items = top_k(scores, LIST)
    best = np.take_along_axis(scores, items, 1)
    short = best[:, -1:] - scores
    np.put_along_axis(short, items, np.inf, 1)
    users = np.argsort(short, 0, kind="stable")
    own = np.where(np.isfinite(np.take_along_axis(short, users, 0)), np.take_along_axis(scores, users, 0), -np.inf)
    return reach.Lists(items, best, users, own.astype(np.float32), 1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(LIST + 1, 60), st.integers(1, 60))
def test_lists_hold_what_the_lifts_are_said_to_bring(seed: int, users: int, catalogue: int, enough: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=(users, catalogue)) + rng.normal(size=catalogue) * 2).astype(np.float32)
    before = np.unique(top_k(scores, LIST))
    lists = lists_of(scores)
    lift, reached = lift_items(lists, enough)
    after = top_k(scores + lift, LIST)
    assert (after == lists.items).all()
    assert len(np.unique(after)) == reached >= min(len(before), enough)
    assert reached == len(before) or reached <= enough  # no further than was asked
    assert not lift[before].any() and (lift >= 0).all()


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_it_costs_no_more_than_it_may(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    scores, targets = rng.normal(size=(8, 50)).astype(np.float32), rng.integers(0, 50, 8)

    def gained(of: np.ndarray) -> float:
        place = places(of, targets)
        return float((gains(place) * (place <= LIST)).sum())

    may_lose = share * gained(scores)
    lift, _ = lift_items(lists_of(scores), 50, targets, may_lose)
    assert gained(scores + lift) >= gained(scores) - may_lose - 1e-9


def test_the_nearest_come_first_and_only_as_far_as_needed() -> None:
    """Ten items lead every list; of the others each is one further behind, for both users."""
    scores = np.repeat(-np.arange(14.0, dtype=np.float32)[None], 2, 0)
    scores[1, 12] = -9.5
    lift, reached = lift_items(lists_of(scores), 11)
    assert reached == 11  # 12 takes the second user's last place
    assert np.flatnonzero(lift).tolist() == [12] and lift[12] == pytest.approx(0.5, abs=0.01)
    assert lift_items(lists_of(scores), 14)[1] == 11  # now each user's last place holds what is nowhere else


def spread() -> FusionModel:
    """The score is the popularity, which item 39, seen alone, does not tell from others; all is known."""
    return popularity_model()


def histories(*lengths: int) -> list[History]:
    return [
        History(np.full(n, ITEMS - 1), np.zeros(n, np.int64), np.zeros(n, np.float32), np.arange(n) + 1)
        for n in lengths
    ]


def scores_of(model: FusionModel, some: list[History]) -> np.ndarray:
    return np.concatenate([scores for scores, _, _ in catalogue_scores(model, some, None, False)])


def test_as_much_of_the_catalogue_as_is_asked_for_and_no_lift_for_short_histories() -> None:
    model, some = spread(), histories(*[3] * 5, *[6] * 45)
    plain = scores_of(model, histories(2, 6))
    assert lift_until(model, some, None, False, 0.27) == np.ceil(0.27 * ITEMS) == 11
    assert int(model.channels.lift_from) == 5
    assert model.channels.lift.nonzero().flatten().tolist() == [10]  # the first below the ten of everybody's list
    lifted = scores_of(model, histories(2, 6))
    assert (lifted[0] == plain[0]).all()
    assert np.allclose(lifted[1] - plain[1], model.channels.lift) and model.channels.lift[10] > 0


def test_blocks_of_users_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = spread(), histories(*range(1, 12))
    torch.nn.init.normal_(model.item_vectors.ids.weight)  # type: ignore[union-attr]
    whole = read_lists(model, some, None, True)
    monkeypatch.setattr("springtide.training.listing.BATCH", 3)
    parts = read_lists(model, some, None, True)
    near = whole.own > -np.inf
    assert near.any() and (near == (parts.own > -np.inf)).all()
    assert (parts.users[near] == whole.users[near]).all() and (parts.items == whole.items).all()
    assert np.allclose(parts.own[near], whole.own[near], atol=1e-5)
    assert np.allclose(parts.scores, whole.scores, atol=1e-5)


def test_what_may_not_be_listed_is_not_lifted() -> None:
    model, some = spread(), histories(*[4] * 20)
    model.item_vectors.known[10] = False  # neither trained nor described
    model.item_vectors.text = torch.zeros(ITEMS, 0)
    lift_until(model, some, None, True, 1.0)
    assert model.channels.lift[10] == 0 and model.channels.lift[ITEMS - 1] == 0  # the second all have seen
    assert model.channels.lift[11] > 0


def with_neighbours(width: int) -> FusionModel:
    """Whoever took the last item is told the `width` items before it by the neighbours."""
    model = popularity_model(neighbours=True)
    neighbours = model.channels.neighbours
    assert neighbours is not None
    inverse = np.eye(ITEMS, dtype=np.float32)
    inverse[-1, -1 - width : -1] = inverse[-1 - width : -1, -1] = -np.arange(1, width + 1) / 1000
    neighbours.load(inverse, np.arange(ITEMS), 1, float("inf"))
    return model


def test_what_the_neighbours_alone_would_list() -> None:
    model = with_neighbours(19)
    lists = read_lists(model, histories(1), None, False, neighbours=True)
    assert lists.neighbours == LIST
    assert read_lists(model, histories(1), None, False).neighbours is None
    assert read_lists(spread(), histories(1), None, False, neighbours=True).neighbours is None


def test_a_quarter_more_than_neighbours_reach_as_far_as_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "ENOUGH", 1.3)
    model = with_neighbours(19)
    best = top_k(scores_of(model, histories(1)), ITEMS)[0]
    hit, last, missed = ([item] * 30 for item in best[[0, LIST - 1, LIST + 5]])
    assert choose_reach(model, cases_of(*hit), None, False, 0.0) == 0
    assert choose_reach(model, [], None, False, 0.5) == 0
    assert choose_reach(spread(), cases_of(*hit), None, False, 0.5) == 0  # without neighbours
    assert choose_reach(model, cases_of(*missed), None, False, 0.5) == 0  # no case is in a list
    assert choose_reach(model, cases_of(*hit), None, False, 0.5) == 11 / ITEMS  # who are alike have one list
    assert choose_reach(model, cases_of(*last), None, False, 0.2) == LIST / ITEMS  # it would cost everything
    assert not model.channels.lift.any()


def test_it_is_in_the_scores_and_not_in_training() -> None:
    model = spread().eval()
    batch = scoring_batch(histories(2), 20)
    vectors, moments = model.item_vectors(), torch.tensor([[0, 0], [0, 1]])
    interest = model.interest(batch, vectors)
    with torch.no_grad():
        before = model.logits_at(batch, interest, vectors, moments)
        model.channels.lift[7], model.channels.lift_from[()] = 2.0, 2
        after = model.logits_at(batch, interest, vectors, moments)
        torch.testing.assert_close(after[0], before[0])
        torch.testing.assert_close(after[1], before[1] + model.channels.lift)
        torch.testing.assert_close(sum(model.scores_at(batch, interest, vectors, moments).values()), after)
        model.train()
        torch.testing.assert_close(model.logits_at(batch, interest, vectors, moments), before)
    assert {"channels.lift", "channels.lift_from"} <= model.state_dict().keys()
