"""A log in which nothing follows from anything: a counting channel that is trusted on it has seen the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from springtide.config import TrainConfig
from springtide.model.fusion import FusionModel
from springtide.training.loop import make_optimizer
from springtide.training.sampling import Sampling
from springtide.training.sequences import Sequences, epoch_batches, with_own_counts
from springtide.training.statistics import collect
from springtide.training.tabulate import HalfLives, tabulate
from toy import toy_settings

NOISE_ITEMS = 150
CHANNELS = ("memory", "neighbours", "text_neighbours", "popularity", "recent_popularity")


def random_log(items: int, users: int, length: int, repeats: bool = True) -> Sequences:
    """The only counts that tell of a target are those that it made itself."""
    rng = np.random.default_rng(5)
    start = np.arange(users) * length
    drawn = [rng.integers(0, items, length) if repeats else rng.permutation(items)[:length] for _ in range(users)]
    return Sequences(
        items=np.concatenate(drawn),
        actions=np.ones(users * length, np.int64),
        ratings=np.full(users * length, np.nan, np.float32),
        timestamps=np.arange(users * length) * 1000,
        targets=np.ones(users * length, bool),
        start=start,
        train_end=start + length,
        valid_target=np.full(users, -1),
    )


def train_on_noise(
    sequences: Sequences,
    items: int,
    channels: tuple[str, ...],
    weight_of: str = "popularity",
    held_out: bool = True,
    neighbour_items: int = NOISE_ITEMS,
) -> tuple[float, float]:
    """Train what weighs the channels alone. Returns the last epoch's loss and the mean weight of one channel.

    held_out: whether the batches say what their owners added to the neighbours.
    """
    chosen = {f"model__{name}": name in channels for name in CHANNELS}
    sizes = {"model__dropout": 0.0, "model__text_dim": 0, "model__dim": 8, "model__neighbour_l2": 5.0,
             "model__neighbour_items": neighbour_items}  # fmt: skip
    config = toy_settings(Path("none"), **sizes, **chosen).model
    statistics = collect(sequences, items, config)
    torch.manual_seed(0)
    popularity = torch.from_numpy(statistics.popularity)
    model = FusionModel(config, 3, torch.zeros(items, 0), popularity > 0, popularity)
    tabulate(statistics, config, HalfLives()).fill(model)
    for parameter in model.item_vectors.parameters():
        torch.nn.init.zeros_(parameter)  # no item vectors: nothing can be learned by heart
    optimizer = make_optimizer(model, TrainConfig(memory_learning_rate=0.1))
    sequences = with_own_counts(sequences, config)
    sampling = Sampling(sequences.train_end[0], 8, 10**6, config.memory_distances - 1)
    loss_sum = positions = 0.0
    for epoch in range(12):
        loss_sum = positions = 0.0
        for batch in epoch_batches(sequences, sampling, (0, epoch)):
            loss, count = model(batch if held_out else replace(batch, owned=None), exclude_seen=False)
            optimizer.zero_grad()
            (loss / count).backward()
            for parameter in model.item_vectors.parameters():
                parameter.grad = None
            optimizer.step()
            loss_sum, positions = loss_sum + loss.item(), positions + count
    batch = next(epoch_batches(sequences, sampling, (0, 0)))
    weights = model.interest(batch, model.item_vectors()).weights[..., model.channels.names.index(weight_of)]
    return loss_sum / positions, float(weights.detach().mean())
