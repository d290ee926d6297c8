"""Damping of popularity: as strong as validation allows, part of every score, and no part of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from springtide.model.batch import History, scoring_batch
from springtide.model.fusion import FusionModel
from springtide.training import damping
from springtide.training.damping import TRIED, choose_damping
from toy import toy_settings

torch.set_num_threads(1)
ITEMS = 40
OFF = dict.fromkeys(("memory", "neighbours", "borrowing", "text_neighbours", "recent_popularity"), False)


def model_of(**values: bool) -> FusionModel:
    """Scores are the item's popularity alone, and it is the lower the later its row."""
    settings = toy_settings(Path("none"), **{f"model__{name}": value for name, value in (OFF | values).items()})
    popularity = torch.arange(ITEMS, 0, -1) * 10
    torch.manual_seed(0)
    model = FusionModel(settings.model, 2, torch.zeros(ITEMS, 0), popularity > 0, popularity)
    for parameter in model.item_vectors.parameters():
        torch.nn.init.zeros_(parameter)
    if model.channels.weigh is not None:
        torch.nn.init.zeros_(model.channels.weigh.weight)
        torch.nn.init.constant_(model.channels.weigh.bias, 0.42)
    return model


def cases_of(*targets: int) -> list[tuple[History, int]]:
    n = np.zeros(1, np.int64)
    return [(History(n + ITEMS - 1, n, n.astype(np.float32), n + 1), target) for target in targets]


def test_as_far_as_the_order_holds() -> None:
    """Up to 0.42 popularity still counts for an item, beyond it against."""
    assert choose_damping(model_of(), cases_of(0, 1, 2), None, False, 0.01) == 0.4
    assert choose_damping(model_of(), cases_of(0, 1, 2), None, False, 1.0) == TRIED[-1]


def test_what_it_may_cost_is_kept() -> None:
    """Two thirds of the gain come from items that damping beyond 0.42 would lose."""
    cases = cases_of(0, 0, ITEMS - 2)
    assert choose_damping(model_of(), cases, None, False, 0.5) == 0.4
    assert choose_damping(model_of(), cases, None, False, 0.7) == TRIED[-1]


def test_a_list_of_ten_may_lose_what_chance_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 cases 20 are in their list of ten. One that leaves it may be chance, twelve are none."""

    def chosen(leaving: int, elsewhere: float = 0.3) -> float:
        gains = np.full((len(TRIED), 2, 400), 0.3)
        gains[:, 0], gains[:, 0, :20], gains[1:, 0, :leaving], gains[1:, 1] = 0, 1, 0, elsewhere
        parts = iter(np.split(gains, range(damping.BATCH, 400, damping.BATCH), axis=2))
        never_enough = np.arange(len(TRIED) + 1)[:, None] == len(TRIED)
        monkeypatch.setattr(damping, "_judge", lambda *_: (next(parts), never_enough))
        return choose_damping(model_of(), cases_of(*[0] * 400), None, False, 0.01)

    assert chosen(0) == chosen(1) == TRIED[-1]
    assert chosen(12) == 0
    assert chosen(0, elsewhere=0.29) == 0  # what all ranks tell is no chance


@pytest.mark.parametrize(
    ("neighbours", "chosen"),
    [
        (0, 0.15),  # enough without any: what costs a quarter of the price is taken all the same
        (4, 0.25),  # half as many again are reached by a damping of 0.25
        (99, 0.45),  # more than any that may be paid for
    ],
)
def test_no_more_than_lets_lists_reach_what_neighbours_do(
    neighbours: int, chosen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each twentieth costs one of a hundred cases, up to four; and adds an item to the lists."""
    gains, listed = np.ones((len(TRIED), 2, 100)), np.zeros((len(TRIED) + 1, 120), bool)
    for number in range(len(TRIED)):
        gains[number, :, : number // 2] = 0
        listed[number, : number + 1] = True
    listed[-1, :neighbours] = True
    monkeypatch.setattr(damping, "BATCH", 100)
    monkeypatch.setattr(damping, "_judge", lambda *_: (gains, listed))
    assert choose_damping(model_of(), cases_of(*[0] * 100), None, False, 0.04) == chosen


def test_what_the_neighbours_alone_would_list() -> None:
    model = model_of(neighbours=True).eval()
    neighbours = model.channels.neighbours
    assert neighbours is not None
    inverse = np.eye(ITEMS, dtype=np.float32)
    inverse[-1, 20:-1] = inverse[20:-1, -1] = -np.arange(ITEMS - 21) / 100  # of the one item that the history holds
    neighbours.load(inverse, np.arange(ITEMS), 1, float("inf"))
    _, listed = damping._judge(model, cases_of(1), None, False)
    assert listed[-1].nonzero()[0].tolist() == list(range(ITEMS - 11, ITEMS - 1))


def test_items_that_nobody_took_yet_have_no_say() -> None:
    """They would be found the sooner the stronger the damping is."""
    model = model_of()
    model.item_vectors.known[ITEMS - 3 :] = False
    mixed = cases_of(0, 1, *[ITEMS - 2] * 50)
    assert choose_damping(model, mixed, None, False, 0.01) == choose_damping(model, cases_of(0, 1), None, False, 0.01)
    assert choose_damping(model, cases_of(ITEMS - 2), None, False, 1.0) == 0


def test_what_a_recommender_never_lists_is_no_competitor() -> None:
    model = model_of()
    model.item_vectors.known[0] = False  # neither trained nor described, though its score would be the best
    gains, listed = damping._judge(model.eval(), cases_of(1), None, False)
    assert gains[0].tolist() == [[1.0], [1.0]]
    assert listed[0].nonzero()[0].tolist() == list(range(1, 11)) and listed[-1].all()


def test_nothing_to_choose_by() -> None:
    assert choose_damping(model_of(), cases_of(ITEMS - 2), None, True, 0.5) == 0
    assert choose_damping(model_of(), [], None, True, 0.5) == 0
    assert choose_damping(model_of(), cases_of(0), None, True, 0.0) == 0


def test_what_nobody_took_is_left_where_it_is() -> None:
    model = model_of()
    model.channels.observe_popularity(np.array([0, 0, *range(1, ITEMS - 1)]))
    assert not model.channels.excess[:2].any()
    assert model.channels.excess[2:].mean().abs() < 1e-5 and (model.channels.excess[2:].diff() > 0).all()


def test_it_is_in_the_scores_and_not_in_training() -> None:
    model = model_of().eval()
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
