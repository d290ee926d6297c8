"""Popularity: how often an item was taken, of late or ever. The same for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from springtide.model.counting.log import TrainingLog

if TYPE_CHECKING:
    from springtide.model.batch import History


@dataclass(frozen=True)
class PopularitySettings:
    half_life: float = float("inf")  # share of the log's span after which an event counts half; inf = all alike


@dataclass(frozen=True)
class Popularity:
    places: np.ndarray  # [I] float32: items in order of their counts, the most popular highest, ties by row

    def score(self, histories: Sequence[History], now: np.ndarray | None = None) -> np.ndarray:
        return np.broadcast_to(self.places, (len(histories), len(self.places)))


def fit_popularity(log: TrainingLog, settings: PopularitySettings) -> Popularity:
    places = np.empty(log.catalogue, dtype=np.float32)  # places, not counts: ranking is several times faster untied
    places[np.argsort(-log.counts(settings.half_life), kind="stable")] = np.arange(log.catalogue, 0, -1)
    return Popularity(places)
