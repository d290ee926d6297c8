"""Items that nobody's list holds: how far they are lifted, what that may cost, and where it counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from springtide.model.batch import History, scoring_batch
from springtide.model.fusion import FusionModel
from springtide.ranks import LEAST, gains, places, top_k
from springtide.training import reach
from springtide.training.listing import LIST, catalogue_scores
from springtide.training.reach import NEAREST, choose_reach, lift_items, lift_until, read_lists, users_read
from toy import ITEMS_IN_TOY, popularity_model

torch.set_num_threads(1)
ITEMS = ITEMS_IN_TOY


def lists_of(scores: np.ndarray) -> reach.Lists:
    """As read_lists of a model that gives these scores [N, I]."""
    items = top_k(scores, LIST)
    best = np.take_along_axis(scores, items, 1)
    short = best[:, -1:] - scores
    np.put_along_axis(short, items, np.inf, 1)
    users = np.argsort(short, 0, kind="stable")[:NEAREST]
    own = np.where(np.isfinite(np.take_along_axis(short, users, 0)), np.take_along_axis(scores, users, 0), -np.inf)
    return reach.Lists(items, best, users, own.astype(np.float32), 1)


@given(
    seed=st.integers(0, 2**32 - 1),
    users=st.integers(2, 60),
    alike=st.sampled_from([1, 2, 9, 30]),
    catalogue=st.integers(LIST + 1, 80),
    enough=st.integers(1, 80),
    most=st.integers(0, 80),
)
def test_lists_hold_what_the_lifts_are_said_to_bring(
    seed: int, users: int, alike: int, catalogue: int, enough: int, most: int
) -> None:
    """Also of users with the same scores, of whom more come near an item than are remembered."""
    rng = np.random.default_rng(seed)
    scores = (rng.normal(size=(users, catalogue)) + rng.normal(size=catalogue) * 2).astype(np.float32)
    scores = scores.repeat(alike, 0)
    before = np.unique(top_k(scores, LIST))
    lists = lists_of(scores)
    lift, reached = lift_items(lists, enough, most)
    after = top_k(scores + lift, LIST)
    assert (after == lists.items).all()
    assert len(np.unique(after)) == reached >= min(len(before), enough)
    assert reached == len(before) or reached <= enough  # no further than was asked
    assert not lift[before].any() and (lift >= 0).all() and np.count_nonzero(lift) <= most


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from([1, 2, 20]))
def test_it_costs_no_more_than_it_may(seed: int, share: float, alike: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(20, 50)).astype(np.float32).repeat(alike, 0)
    targets = rng.integers(0, 50, 20 * alike)

    def gained(of: np.ndarray) -> float:
        place = places(of, targets)
        return float((gains(place) * (place <= LIST)).sum())

    may_lose = share * gained(scores)
    lift, _ = lift_items(lists_of(scores), 50, 50, targets, may_lose)
    assert gained(scores + lift) >= gained(scores) - may_lose - 1e-9


def test_the_nearest_come_first_and_only_as_far_as_needed() -> None:
    """Ten items lead every list; of the others each is one further behind, for both users."""
    scores = np.repeat(-np.arange(14.0, dtype=np.float32)[None], 2, 0)
    scores[1, 12] = -9.5
    lift, reached = lift_items(lists_of(scores), 11, 9)
    assert reached == 11  # 12 takes the second user's last place
    assert np.flatnonzero(lift).tolist() == [12] and lift[12] == pytest.approx(0.5, abs=0.01)
    assert lift_items(lists_of(scores), 14, 9)[1] == 11  # now each user's last place holds what is nowhere else


def spread(**values: bool) -> FusionModel:
    """What a history holds tells which items it is near: users have lists of their own."""
    model = popularity_model(popularity=False, **values)
    torch.nn.init.normal_(model.item_vectors.ids.weight, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    return model


def histories(*lengths: int) -> list[History]:
    rng = np.random.default_rng(0)
    return [
        History(rng.integers(ITEMS, size=n), np.zeros(n, np.int64), np.zeros(n, np.float32), np.arange(n) + 1)
        for n in lengths
    ]


def scores_of(model: FusionModel, some: list[History]) -> np.ndarray:
    return np.concatenate([scores for scores, _, _ in catalogue_scores(model, some, None, False)])


def held(model: FusionModel, some: list[History]) -> int:
    return len(np.unique(top_k(scores_of(model, some), LIST)))


def test_as_much_of_the_catalogue_as_is_asked_for_and_no_lift_for_short_histories() -> None:
    model, some = spread(), histories(3, *[6] * 8)
    plain, before = scores_of(model, some), held(model, some)
    assert before < ITEMS - 4
    reached = lift_until(model, some, None, False, (before + 3) / ITEMS, 1.0)
    assert reached == before + 3 == held(model, some)
    assert int(model.channels.lift_from) == 5 and model.channels.lift.count_nonzero() == 3
    lifted = scores_of(model, some)
    assert np.allclose(lifted[0], plain[0], atol=1e-6)
    assert np.allclose(lifted[1:] - plain[1:], model.channels.lift, atol=1e-5)


def test_no_more_items_than_twice_what_was_worth_its_price() -> None:
    model, some = spread(), histories(*[6] * 10)
    assert lift_until(model, some, None, False, 1.0, 0.1) == held(model, some)
    assert model.channels.lift.count_nonzero() == 2


def test_blocks_of_users_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = spread(), histories(*range(1, 12))
    whole = read_lists(model, some, None, True)
    monkeypatch.setattr("springtide.training.listing.BATCH", 3)
    parts = read_lists(model, some, None, True)
    near = whole.own > -np.inf
    assert near.any() and (near == (parts.own > -np.inf)).all()
    assert (parts.users[near] == whole.users[near]).all() and (parts.items == whole.items).all()
    assert np.allclose(parts.own[near], whole.own[near], atol=1e-5)
    assert np.allclose(parts.scores, whole.scores, atol=1e-5)


def test_a_part_of_many_users_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert users_read(1000) == reach.USERS and users_read(10**6) == 1000 and users_read(10**12) == 1
    monkeypatch.setattr(reach, "WORK", 5 * ITEMS)
    assert len(read_lists(spread(), histories(*[4] * 9), None, False).items) == 5


def test_what_may_not_be_listed_is_not_lifted() -> None:
    model, some = spread(), histories(*[6] * 12)
    nowhere = np.setdiff1d(np.arange(ITEMS), top_k(scores_of(model, some), LIST))[:2]
    model.item_vectors.known[nowhere[0]] = False  # neither trained nor described
    for history in some:
        history.items[-1] = nowhere[1]  # all have seen it
    lift_until(model, some, None, True, 1.0, 9.0)
    assert model.channels.lift.any() and not model.channels.lift[nowhere].any()


def with_neighbours() -> FusionModel:
    """Whose neighbours of every item are the nineteen before it, the nearer the more."""
    model = spread(neighbours=True)
    neighbours = model.channels.neighbours
    assert neighbours is not None
    gap = np.subtract.outer(np.arange(ITEMS), np.arange(ITEMS))
    inverse = np.where((abs(gap) < 20) & (gap != 0), -1e-4 / np.maximum(abs(gap), 1), np.eye(ITEMS)).astype(np.float32)
    neighbours.load(inverse, np.arange(ITEMS), 1, float("inf"))
    return model


def test_what_the_neighbours_alone_would_list() -> None:
    model, some = with_neighbours(), histories(1, 1)
    lists = read_lists(model, some, None, False, neighbours=True)
    near = [set(np.argsort(abs(np.arange(ITEMS) - history.items[0]), kind="stable")[1 : LIST + 1]) for history in some]
    assert lists.neighbours is not None and abs(lists.neighbours - len(near[0] | near[1])) <= 2  # ties at the end
    assert read_lists(model, some, None, False).neighbours is None
    assert read_lists(spread(), some, None, False, neighbours=True).neighbours is None


def test_a_quarter_more_than_neighbours_reach_as_far_as_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = with_neighbours(), histories(*[6] * 24)
    lists = top_k(scores_of(model, some), LIST)
    before = len(np.unique(lists))
    alone = read_lists(model, some, None, False, neighbours=True).neighbours
    assert alone is not None
    monkeypatch.setattr(reach, "ENOUGH", (before + 2) / alone)

    def chosen(place: int, cost: float, of: FusionModel = model) -> tuple[float, float]:
        cases = [(history, int(best[place])) for history, best in zip(some, lists, strict=True)]
        return choose_reach(of, cases, None, False, cost)

    assert chosen(0, 0.5) == ((before + 2) / ITEMS, 2 / 24)  # one took the place of an item that is nowhere else
    assert chosen(LIST - 1, 0.01) == (before / ITEMS, 0)  # each lift costs somebody's last place
    assert chosen(LIST - 1, 0.5) == chosen(0, 0.5)
    assert chosen(0, 0.0) == chosen(0, 0.5, spread()) == choose_reach(model, [], None, False, 0.5) == (0, 0)
    nowhere = int(np.setdiff1d(np.arange(ITEMS), lists)[0])
    assert choose_reach(model, [(history, nowhere) for history in some], None, False, 0.5) == (0, 0)
    few = [(history, int(best[0])) for history, best in zip(some, lists, strict=True)][: LEAST - 1]
    assert choose_reach(model, few, None, False, 0.5) == (0, 0)
    assert not model.channels.lift.any()


def test_it_is_in_the_scores_and_not_in_training() -> None:
    model = popularity_model().eval()
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
