"""What counting models are fitted on, and how they read a history. Arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from springtide.model.batch import History

_PAIRS = 400_000_000  # item pairs within users that a count may visit; longer histories are cut to their latest items

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # ages (0 = last), lengths of the histories -> weights


class CountingModel(Protocol):
    """Anything fitted that scores the whole catalogue for a batch of histories."""

    def score(self, histories: Sequence[History], now: np.ndarray | None = None) -> np.ndarray:
        """[B, I] float32, higher is better. now: [B] int64 ms, when each is asked."""
        ...


@dataclass(frozen=True)
class TrainingLog:
    """Events to count, user after user, oldest first. N events.

    Every event counts as a source; only what may be predicted counts as a destination.
    """

    users: np.ndarray  # [N] user numbers, ascending
    items: np.ndarray  # [N] catalogue rows
    targets: np.ndarray  # [N] bool: may this event be predicted?
    timestamps: np.ndarray  # [N] int64 ms
    catalogue: int  # I

    def weights(self, half_life: float) -> np.ndarray:
        """[N] float64: 0.5^(age / (half_life · span)), the age being that at the log's last event; inf = 1 for all."""
        if not len(self.timestamps):
            return np.ones(0)
        age = (self.timestamps.max() - self.timestamps).astype(np.float64)
        return 0.5 ** (age / (half_life * max(float(age.max()), 1.0)))

    def counts(self, half_life: float = float("inf")) -> np.ndarray:
        """[I] float64: how often each item was taken as a target, in events of weight 1."""
        weights = self.weights(half_life)[self.targets]
        return np.bincount(self.items[self.targets], weights=weights, minlength=self.catalogue)

    @cached_property
    def within_bounds(self) -> np.ndarray:
        """[N] bool: the latest events of every user, so many that counting pairs of them stays affordable."""
        if not len(self.users):
            return np.zeros(0, dtype=bool)
        lengths = np.bincount(self.users)
        for longest in (2000, 1000, 500, 200, 100, 50):
            if (np.minimum(lengths, longest).astype(np.float64) ** 2).sum() <= _PAIRS:
                break
        return np.cumsum(lengths)[self.users] - np.arange(len(self.users)) <= longest

    def incidence(self, mask: np.ndarray, half_life: float = float("inf")) -> sparse.csr_array:
        """[U, I] float32: the weight of each user's latest event in the mask with each item."""
        rows = np.flatnonzero(mask)[::-1]  # of equal cells the first one is kept, which is the latest event
        cells, first = np.unique(self.users[rows] * self.catalogue + self.items[rows], return_index=True)
        weights = self.weights(half_life)[rows[first]].astype(np.float32)
        shape = (int(self.users.max(initial=0)) + 1, self.catalogue)
        return sparse.csr_array((weights, (cells // self.catalogue, cells % self.catalogue)), shape=shape)


def history_weights(
    histories: Sequence[History], catalogue: int, kernel: Kernel, recent: int | None = None
) -> sparse.csr_array:
    """[B, I] float32: kernel(age, length) of a history's last `recent` events (None = all), summed over repeats."""
    items = [history.items if recent is None else history.items[-recent:] for history in histories]
    lengths = np.array([len(row) for row in items], dtype=np.int64)
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(items)), lengths)
    ages = ends[row] - 1 - np.arange(len(row))
    columns = np.concatenate(items) if items else np.zeros(0, dtype=np.int64)
    values = kernel(ages.astype(np.float32), lengths[row].astype(np.float32)).astype(np.float32)
    return sparse.coo_array((values, (row, columns)), shape=(len(items), catalogue)).tocsr()


def halving(half_life: float) -> Kernel:
    """Weights that halve every `half_life` events into the past; inf = 1 for all."""
    return lambda ages, _: 0.5 ** (ages / half_life)
