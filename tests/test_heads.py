"""The rating and the click head: what they are trained on, what they leave out, and that shares of the data add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from springtide.config import TrainConfig
from springtide.model import heads
from springtide.model.batch import Batch
from springtide.model.fusion import FusionModel
from springtide.model.heads import PairHead, click_loss, rating_loss
from springtide.training.loop import make_optimizer
from springtide.training.sequences import Sequences, training_batch, training_windows
from toy import toy_settings

torch.set_num_threads(1)
ITEMS, DIM, MEAN, DEVIATION = 20, 16, 3.0, 1.5


def model_of(weights: tuple[float, float], seed: int = 0) -> FusionModel:
    config = toy_settings(Path("none"), model__text_dim=0, model__memory=False, model__neighbours=False).model
    torch.manual_seed(seed)
    known = torch.ones(ITEMS, dtype=torch.bool)
    return FusionModel(config, 2, torch.zeros(ITEMS, 0), known, torch.ones(ITEMS), (MEAN, DEVIATION), weights).eval()


def sequences(users: int = 6, seed: int = 0) -> Sequences:
    """Users of 8 events; items below 10 are rated 1 or 2, others 4 or 5, and every third event is not rated."""
    rng = np.random.default_rng(seed)
    count = users * 8
    items = rng.integers(0, ITEMS, count)
    ratings = np.where(items < 10, 1, 4) + rng.integers(0, 2, count).astype(np.float32)
    ratings[::3] = np.nan
    start = np.arange(users) * 8
    return Sequences(items, np.ones(count, np.int64), ratings.astype(np.float32), np.arange(count) * 1000,
                     np.ones(count, bool), start, start + 8, np.full(users, -1))  # fmt: skip


def batch_of(events: Sequences, rows: slice = slice(None)) -> Batch:
    return training_batch(events, training_windows(events, 20)[rows])


def head_loss(weights: tuple[float, float], batch: Batch) -> torch.Tensor:
    """What the heads add to the next-item loss."""
    with_heads, without = model_of(weights), model_of((0, 0))
    without.load_state_dict(with_heads.state_dict(), strict=False)
    return with_heads(batch, False)[0] - without(batch, False)[0]


def test_a_batch_holds_the_rating_of_the_next_event() -> None:
    events = sequences()
    batch = batch_of(events)
    assert batch.target_ratings is not None
    np.testing.assert_array_equal(batch.target_ratings[0].numpy(), events.ratings[1:8])
    moved = batch.to(torch.device("cpu"))
    assert moved.target_ratings is not None and replace(batch, target_ratings=None).to(torch.device("cpu")) is not None


def test_the_rating_loss_is_the_squared_error_of_the_ratings_given() -> None:
    model, batch = model_of((0.7, 0)), batch_of(sequences())
    assert batch.target_ratings is not None
    vectors = model.item_vectors()
    user = model.interest(batch, vectors).user
    expected = 0.0
    for row, place in (~batch.target_ratings.isnan()).nonzero().tolist():
        said = model.rate(user[row, place][None], batch.targets[row, place][None]).item()
        expected += ((said - batch.target_ratings[row, place].item()) / DEVIATION) ** 2
    assert head_loss((0.7, 0), batch).item() == pytest.approx(0.7 * expected, rel=1e-3)


def test_missing_ratings_change_nothing_and_none_at_all_is_no_loss() -> None:
    batch = batch_of(sequences())
    assert batch.target_ratings is not None
    targets = torch.where(batch.target_ratings.isnan(), 0, batch.targets)  # whatever an unrated target is
    head, user = PairHead(DIM, ITEMS, 0.0), torch.randn(*targets.shape, DIM)
    vectors = torch.randn(ITEMS, DIM)

    def loss(items: torch.Tensor) -> float:
        return rating_loss(
            head, user.flatten(0, 1), items.flatten(), batch.target_ratings.flatten(), vectors  # type: ignore[union-attr]
        ).item()  # fmt: skip

    assert loss(targets) == loss(batch.targets) > 0
    for ratings in (None, torch.full_like(batch.target_ratings, torch.nan)):
        bare = replace(batch, target_ratings=ratings)
        assert head_loss((5, 0), bare).item() == 0
        model = model_of((5, 0)).train()
        model(bare, True)[0].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_shares_of_a_batch_add_up() -> None:
    """Each worker sums over its own positions, so many workers make the same step as one."""
    events = sequences()
    model = model_of((0.5, 0))

    def gradients(*shares: slice) -> list[torch.Tensor]:
        model.zero_grad()
        for share in shares:
            model(batch_of(events, share), True)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for whole, parts in zip(gradients(slice(None)), gradients(slice(0, 1), slice(1, None)), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_clicks_against_others_that_the_user_never_had(monkeypatch: pytest.MonkeyPatch) -> None:
    head, vectors, user = PairHead(DIM, 5, 0.0), torch.randn(5, DIM), torch.randn(2, DIM)
    known = torch.tensor([True, True, True, True, False])
    seen = torch.tensor([[0, 1, 0, -1]])
    target, row = torch.tensor([2, 3]), torch.zeros(2, dtype=torch.int64)
    monkeypatch.setattr(heads, "NEGATIVES", 200)
    loss = click_loss(head, user, target, vectors, known, seen, row)
    probability = torch.sigmoid(head(user, target, vectors))
    other = torch.sigmoid(head(user, torch.tensor([3, 2]), vectors))  # all that is left: known, unseen, not the target
    torch.testing.assert_close(loss, -(probability.log() + (1 - other).log()).sum() / 2)
    seen[:] = torch.arange(4)  # nobody to compare with: the item taken still counts
    loss = click_loss(head, user, target, vectors, known, seen, row)
    torch.testing.assert_close(loss, F.binary_cross_entropy(probability, torch.ones(2), reduction="sum") / 2)


def test_heads_learn_who_rates_what_and_takes_what() -> None:
    events = sequences(60)
    model = model_of((1.0, 1.0)).train()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.01))
    batch = batch_of(events)
    for _ in range(60):
        loss, count = model(batch, False)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    model.eval()
    user = model.interest(batch, model.item_vectors()).user[:2, -1]
    low, high = (model.rate(user, torch.tensor(items)) for items in ([2, 5], [12, 15]))
    assert (low < 2.5).all() and (high > 3.5).all()
    assert ((model.click_probability(user, torch.tensor([2, 5])) > 0) & (low.isfinite())).all()


def test_no_weight_no_head() -> None:
    assert not [name for name in model_of((0, 0)).state_dict() if "head" in name]
    assert TrainConfig().heads == (0, 0) and TrainConfig(click_weight=0.5).heads == (0, 0.5)
