"""Odd logs that no test data looks like: training on each stays finite, or says what is wrong with which batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from springtide.config import TrainConfig
from springtide.errors import SpringtideError
from springtide.model.batch import History
from springtide.model.fusion import FusionModel
from springtide.model.recommender import Recommender
from springtide.schemas import SEQUENCES, TRAIN, VALID
from springtide.text.whitening import fit_whitening
from springtide.training.loop import Progress, fit, make_optimizer
from springtide.training.statistics import collect
from springtide.training.tabulate import HalfLives, choose_share, tabulate
from springtide.training.worker import ShardFeed
from toy import sequences_of, toy_settings

torch.set_num_threads(1)
ITEMS = 25
CONFIG = TrainConfig(epochs=1, rating_weight=0.3, click_weight=0.3, crop=0.3, mask=0.1, reorder=0.3, average=0.5)


class Shard:
    """Stands for Ray Data's: the whole table at once."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, **_: Any) -> Any:
        yield self.table


def table_of(rows: list[list[int]], ratings: list[list[float]] | None = None, gap: int = 10**6) -> pa.Table:
    """Histories with the last event of each held out, where there are more than two."""
    return pa.Table.from_pydict(
        {
            "user_id": [f"u{n:03d}" for n in range(len(rows))],
            "items": rows,
            "actions": [[1] * len(row) for row in rows],
            "ratings": ratings or [[4.0] * len(row) for row in rows],
            "timestamps": [[10**12 + gap * place + n for place in range(len(row))] for n, row in enumerate(rows)],
            "parts": [[TRAIN] * (len(row) - (len(row) > 2)) + [VALID] * (len(row) > 2) for row in rows],
            "targets": [[True] * len(row) for row in rows],
        },
        SEQUENCES,
    )


def train(table: pa.Table, text: np.ndarray | None = None, exclude_seen: bool = False, **values: Any) -> FusionModel:
    """What the train stage does in a worker, in this process. Every figure on the way must be finite."""
    settings = toy_settings(Path("none"), **{f"model__{name}": value for name, value in values.items()})
    feed = ShardFeed(Shard(table), settings.model, CONFIG, 0.0, False, None)
    list(feed.epoch(0))  # reads the shard
    assert feed._cached is not None
    statistics = collect(feed._cached, ITEMS, settings.model)
    assert np.isfinite(statistics.rating_stats).all() and statistics.rating_stats[1] > 0
    decay = choose_share(statistics, settings.model, feed.cases(), exclude_seen)
    tables = tabulate(statistics, settings.model, HalfLives(decay))
    for name, array in tables.arrays().items():
        assert name in ("times", "popular_at") or np.isfinite(array).all(), name  # half-lives may be endless
    popularity = torch.from_numpy(tables.popularity)
    features = np.zeros((ITEMS, 0), np.float32) if text is None else text
    torch.manual_seed(0)
    model = FusionModel(
        settings.model, 2, torch.from_numpy(features), popularity > 0, popularity, tables.rating_stats, CONFIG.heads
    )
    tables.fill(model)
    progress = fit(model, make_optimizer(model, CONFIG), feed, CONFIG, exclude_seen, Progress(), lambda _: None)
    (record,) = progress.epochs
    assert record["steps"] > 0 and np.isfinite(record["loss"]) and 0 <= record["ndcg@10"] <= 1
    assert all(value.isfinite().all() for value in model.state_dict().values())
    names = [str(n) for n in range(ITEMS)]
    recommender = Recommender(model, names, names, [[]] * ITEMS, ["", ""], tables.popularity, None, tables)
    first = table["items"].to_pylist()[0]
    past = History(
        np.array(first), np.ones(len(first), np.int64), np.full(len(first), np.nan, np.float32), np.arange(len(first))
    )
    assert np.isfinite(recommender.score([past]).logits[0, recommender.recommendable]).all()
    return model


def random_rows(users: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, ITEMS, int(rng.integers(2, 30))).tolist() for _ in range(users)]


TEXT = np.random.default_rng(1).normal(size=(ITEMS, 8)).astype(np.float32)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_half_of_the_histories_hold_one_event(exclude_seen: bool) -> None:
    train(table_of([row[:1] if n % 2 else row for n, row in enumerate(random_rows())]), TEXT, exclude_seen)


def test_items_with_one_and_the_same_text() -> None:
    vector = np.ones((ITEMS, 384), np.float32) / 384**0.5
    text = fit_whitening(vector, 8).apply(vector)
    assert np.isfinite(text).all()
    train(table_of(random_rows()), np.ascontiguousarray(text, np.float32))


def test_one_item_alone_and_two_users() -> None:
    train(table_of([[3, 3, 3, 3], [3, 3]]), TEXT)


@pytest.mark.parametrize("given", ["half", "none", "equal", "one"])
def test_ratings_that_are_missing_or_all_alike(given: str) -> None:
    rng = np.random.default_rng(2)
    rows = random_rows()
    ratings = [rng.integers(1, 6, len(row)).astype(float) for row in rows]
    for row in ratings:
        if given == "half":
            row[rng.random(len(row)) < 0.5] = np.nan
        elif given == "equal":
            row[:] = 4
        else:
            row[:] = np.nan
    if given == "one":
        ratings[0][0] = 2
    train(table_of(rows, [row.tolist() for row in ratings]), TEXT)


def test_one_user_with_a_hundred_thousand_events() -> None:
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, ITEMS, 100_000).tolist(), *random_rows(5)]
    model = train(table_of(rows, gap=1000), TEXT)
    assert model.channels.neighbours is not None and model.channels.neighbours.inverse.isfinite().all()


@pytest.mark.parametrize("gap", [0, 10**10])
def test_events_at_one_moment_or_months_apart(gap: int) -> None:
    train(table_of(random_rows(), gap=gap), TEXT, request_time=True)


def test_a_user_who_alone_took_everything_and_hardly_any_regularisation() -> None:
    """Without them nothing is left of their items' rows, and the inverse without them is all but singular."""
    train(table_of([list(range(ITEMS)), [0, 1, 2]]), TEXT, neighbour_l2=1e-3)


@pytest.mark.parametrize("preset", ["lstm", "dynamic_mlp", "bert_lstm", "multimodal_attention", "cnn_lstm_attention"])
def test_every_kind_of_model_on_an_odd_log(preset: str) -> None:
    rows = [row[:1] if n % 2 else row for n, row in enumerate(random_rows())]
    ratings = [[float("nan")] * len(row) for row in rows]
    train(table_of(rows, ratings, gap=0), TEXT if preset not in ("lstm",) else None, preset=preset)


# ---------------------------------------------------------------- what cannot be trained on
def test_a_loss_that_is_not_finite_names_the_batch() -> None:
    table = table_of([[5, 6, 7, 8], [1, 2, 9, 4]], [[1.0] * 4, [float("inf"), 2.0, 3.0, 1.0]])
    with pytest.raises(SpringtideError) as caught:
        settings = toy_settings(Path("none"))
        feed = ShardFeed(Shard(table), settings.model, TrainConfig(epochs=1), 0.0, False, None)
        popularity = torch.ones(ITEMS)
        model = FusionModel(settings.model, 2, torch.from_numpy(TEXT), popularity > 0, popularity, (2.0, 1.0))
        tabulate(collect(sequences_of([[0, 1]]), ITEMS, settings.model), settings.model, HalfLives()).fill(model)
        fit(model, make_optimizer(model, CONFIG), feed, CONFIG, False, Progress(), lambda _: None)
    said = str(caught.value)
    for part in ("not finite in epoch 1, step 1", "worker 0", "over 2 sequences of up to 2 events", "items 1 to 6",
                 "times 1000000000000 to 1000001000001 ms", "ratings 1 to inf", "train.learning_rate"):  # fmt: skip
        assert part in said, part
