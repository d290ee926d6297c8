"""Which moments an epoch learns from, when each is asked, and how its inputs are disturbed. All drawn from one seed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from springtide.config import ModelConfig, TrainConfig
from springtide.model.batch import Batch
from springtide.model.inputs import SESSION_MS

STRETCH = 5  # most events that `reorder` turns round


@dataclass(frozen=True)
class Since:
    """What a model that goes on learning knows already."""

    time: int  # ms, of the last event that it learned from
    held_out: int = 0  # events at the end of every history that it could not learn from, whenever they were


@dataclass(frozen=True)
class Sampling:
    """How one epoch is drawn from the training windows."""

    length: int  # most inputs of a window
    sequences: int  # most windows in a batch
    positions: int  # most events in a batch, padding included, unless a single window has more
    ahead: int = 0  # events after a window that a batch knows as well, to hold them out of the transition counts
    since: Since | None = None  # only windows with an event that is new since then; None: all
    request_time: bool = False  # the model is told when it is asked; else each moment is asked with its last event
    within_session: float = 1.0  # share of the moments within a session that are learned from; its starts always are
    crop: float = 0.0  # share of the windows cut to a random stretch of at least half
    mask: float = 0.0  # share of the events that the network does not see
    reorder: float = 0.0  # share of the windows in which the network sees a short stretch turned round


def sampling_of(model: ModelConfig, config: TrainConfig, workers: int, since: Since | None = None) -> Sampling:
    """What the settings say, for one of so many workers: they share a batch."""
    return Sampling(
        model.long_window, -(-config.batch_size // workers), -(-config.batch_positions // workers),
        model.memory_distances - 1 if model.memory else 0, since, bool(model.request_time),
        1.0 if config.within_session is None else config.within_session, config.crop, config.mask, config.reorder,
    )  # fmt: skip


def crop(windows: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Cut a share of the windows [W, 3] (first, end, offset) to a random stretch of at least half their length."""
    if not share:
        return windows
    first, end, offset = windows.T
    length = end - first
    kept = np.maximum(1, (length * rng.uniform(0.5, 1, len(windows))).astype(np.int64))
    kept = np.where(rng.random(len(windows)) < share, kept, length)
    skip = (rng.random(len(windows)) * (length - kept + 1)).astype(np.int64)
    return np.stack([first + skip, first + skip + kept, offset + skip], 1)


def disturb(batch: Batch, sampling: Sampling, rng: np.random.Generator) -> Batch:
    """Choose the moments to learn from, say when each is asked, and hide or turn round what the network sees.

    If the model is told the time, a moment between two sessions is asked at a random time in the pause, because that is
    when a request would come, and one within a session when the next event comes. Counting channels always read the
    true history: what a moment must hold out of the counts depends on it.
    """
    shape = tuple(batch.items.shape)
    pause = batch.now - batch.timestamps
    between = pause > SESSION_MS
    asked = batch.timestamps + (pause * torch.from_numpy(rng.random(shape))).long()
    now = torch.where(between, asked, batch.now) if sampling.request_time else batch.timestamps
    targets, shown = batch.targets, None
    if sampling.within_session < 1:
        drawn = torch.from_numpy(rng.random(shape) < sampling.within_session)
        targets = targets.masked_fill(~(between | drawn), -1)
    if sampling.reorder:
        shown, targets = _reorder(batch, targets, sampling.reorder, rng)
    if sampling.mask:
        hidden = torch.from_numpy(rng.random(shape) < sampling.mask)
        shown = (batch.items if shown is None else shown).masked_fill(hidden, -1)
    return replace(batch, now=now, targets=targets, shown=shown)


def _reorder(
    batch: Batch, targets: torch.Tensor, share: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Items with a stretch turned round in a share of the rows, and the targets less those that it would give away."""
    shown, targets = batch.items.clone(), targets.clone()
    lengths = batch.mask.sum(1).tolist()
    for row in np.flatnonzero(rng.random(len(shown)) < share):
        first = int(rng.integers(0, max(1, lengths[row] - STRETCH + 1)))
        last = min(lengths[row], first + STRETCH)
        shown[row, first:last] = shown[row, first:last].flip(0)
        targets[row, first : last - 1] = -1  # these moments would have seen what comes next
    return shown, targets
