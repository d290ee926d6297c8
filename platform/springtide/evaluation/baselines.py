"""The counting models as baselines: which there are, and how their settings are chosen.

They are asked with the same histories as the model. Settings are chosen on the validation part (history = training
events, NDCG@10) with models fitted on the training part alone. The chosen ones are then fitted on the training part,
or on training and validation events where the model was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import product
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
from scipy import sparse

from springtide.evaluation.ranking import Cases, FlatSequences, headline_mask, target_ranks
from springtide.model.counting.ease import Ease, EaseSettings, fit_ease, gram
from springtide.model.counting.item_knn import (
    CoOccurrence,
    ItemKnn,
    ItemKnnSettings,
    co_occurrence,
    fit_item_knn,
    nearest,
)
from springtide.model.counting.log import CountingModel, TrainingLog
from springtide.model.counting.popularity import Popularity, PopularitySettings, fit_popularity
from springtide.model.counting.transitions import (
    Transitions,
    TransitionSettings,
    fit_transitions,
    transition_counts,
)
from springtide.ranks import gains
from springtide.schemas import TRAIN, VALID

TUNING_USERS = 2000
_TUNING_CELLS = 40_000_000  # users times items ranked for one candidate setting
_SEARCHED_EVENTS = 2_000_000  # above, the settings that change the counts themselves keep their defaults
_ENDLESS = float("inf")

Grid = dict[str, list[Any]]  # setting -> choices, in the order in which they are searched
S = TypeVar("S", PopularitySettings, ItemKnnSettings, EaseSettings, TransitionSettings)
Found = tuple[S, float | None]  # settings and what they reach on the validation part

RECENT_POPULARITY_GRID: Grid = {"half_life": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]}
ITEM_KNN_GRID: Grid = {"alpha": [0.35, 0.5, 0.7], "shrinkage": [10.0, 50.0], "neighbours": [20, 50, 100, 300]}
HALF_LIVES = [1.0, 2.0, 5.0, 10.0, 30.0, 100.0]  # of item-KNN with recency
EASE_GRID: Grid = {
    "half_life": [1.0, 2.0, 5.0, 10.0, 30.0, 100.0, _ENDLESS],
    "l2": [50.0, 200.0, 500.0, 1000.0],
    "log_half_life": [0.05, 0.15, 0.5, _ENDLESS],
}
TRANSITION_GRID: Grid = {
    "distances": [1, 3, 10, 20],
    "power": [0.0, 0.5, 1.0, 2.0],
    "log_half_life": [0.05, 0.15, 0.5, _ENDLESS],
    "smoothing": [10.0, 100.0, 1000.0, 5000.0, 20000.0],
    "popularity": [-0.3, -0.1, -0.03, 0.0, 0.03, 0.1, 0.3],
    "decay": [0.1, 0.3, 0.6, 0.8, 0.9, 0.95],
    "tail": [0.0, 0.1, 0.2, 0.4],
    "recent": [5, 20, 50, 200],
}
_OF_THE_COUNTS = ("distances", "power", "log_half_life")


@dataclass(frozen=True)
class Fitted:
    """A baseline with the settings chosen for it."""

    baseline: CountingModel
    settings: dict[str, Any]  # those that were searched
    validation: float | None  # NDCG@10 on the users it was tuned on; None if nothing was tuned


def training_log(events: FlatSequences, last: int = TRAIN) -> TrainingLog:
    """The events of the parts up to `last`."""
    keep = events.parts <= last
    return TrainingLog(
        events.users[keep], events.items[keep], events.targets[keep], events.timestamps[keep], events.catalogue
    )


class Fits:
    """Models fitted on one log. What is dear is kept until settings ask for something else."""

    def __init__(self, log: TrainingLog) -> None:
        self.log = log
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    def popularity(self, settings: PopularitySettings) -> Popularity:
        return fit_popularity(self.log, settings)

    def item_knn(self, settings: ItemKnnSettings) -> ItemKnn:
        alike = replace(settings, half_life=_ENDLESS)
        kind = (settings.alpha, settings.shrinkage)

        def near() -> sparse.csr_array:
            return self._keep("near", kind, lambda: nearest(self._pairs, *kind, max(ITEM_KNN_GRID["neighbours"])))

        model = self._keep("item_knn", alike, lambda: fit_item_knn(near(), alike))
        return replace(model, half_life=settings.half_life)

    def ease(self, settings: EaseSettings) -> Ease:
        alike = replace(settings, half_life=_ENDLESS)

        def fit() -> Ease:
            age = settings.log_half_life
            return fit_ease(self._keep("gram", age, lambda: gram(self.log, age)), alike)

        return replace(self._keep("ease", alike, fit), half_life=settings.half_life)

    def transitions(self, settings: TransitionSettings) -> Transitions:
        key = (settings.distances, settings.power, settings.log_half_life)
        counts = self._keep("transitions", key, lambda: transition_counts(self.log, *key))
        return fit_transitions(self.log, counts, settings)

    @cached_property
    def _pairs(self) -> CoOccurrence:
        return co_occurrence(self.log)

    def _keep(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        if self._kept.get(kind, (None,))[0] != key:
            self._kept.pop(kind, None)  # before the next one needs the memory
            self._kept[kind] = (key, make())
        return self._kept[kind][1]


def fit_baselines(
    events: FlatSequences, validation: Cases, exclude_seen: bool, refit: bool = False
) -> dict[str, Fitted]:
    """Choose settings on the validation cases, if any, and fit all baselines.

    With `refit` the chosen settings are fitted on training and validation events, else on the training part alone.
    The search sees at most 2,000 validation users, fewer for large catalogues. Returns the baselines under
    `popularity`, `recent_popularity`, `item_knn`, `item_knn_recency`, `ease` and `transitions`.
    """
    cases = _tuning_cases(validation)
    train = Fits(training_log(events))
    final = Fits(training_log(events, VALID)) if refit else train
    many = len(train.log.items) > _SEARCHED_EVENTS

    def judge(model: CountingModel) -> float:
        ranks = target_ranks(cases, model.score, exclude_seen=exclude_seen, batch_size=256)
        return float((gains(ranks) * (ranks <= 10)).mean())

    def fitted(fit: Callable[[Fits, S], CountingModel], found: Found[S], names: Iterable[str]) -> Fitted:
        settings, value = found
        return Fitted(fit(final, settings), _plain(settings, names), value)

    def tuned(fit: Callable[[Fits, S], CountingModel], start: S, grid: Grid, tries: int = 0) -> Fitted:
        searched = {name: choices for name, choices in grid.items() if not (many and name in _OF_THE_COUNTS)}
        untuned = (start, None)
        return fitted(
            fit, search(start, searched, lambda s: judge(fit(train, s)), tries) if len(cases) else untuned, grid
        )

    plain: Found[ItemKnnSettings] = (ItemKnnSettings(), None)
    recency: Found[ItemKnnSettings] = (ItemKnnSettings(half_life=2.0), None)
    if len(cases):
        plain, recency = search_item_knn(lambda settings: judge(train.item_knn(settings)))
    return {
        "popularity": tuned(Fits.popularity, PopularitySettings(), {}),
        "recent_popularity": tuned(Fits.popularity, PopularitySettings(half_life=0.1), RECENT_POPULARITY_GRID),
        "item_knn": fitted(Fits.item_knn, plain, ITEM_KNN_GRID),
        "item_knn_recency": fitted(Fits.item_knn, recency, [*ITEM_KNN_GRID, "half_life"]),
        "ease": tuned(Fits.ease, EaseSettings(), EASE_GRID),
        "transitions": tuned(Fits.transitions, TransitionSettings(distances=4 if many else 10), TRANSITION_GRID, 8),
    }


def search(start: S, grid: Grid, judge: Callable[[S], float], tries: int = 24, sweeps: int = 2) -> tuple[S, float]:
    """The best settings found by coordinate ascent, one at a time, from `start` and from the best of random ones."""
    names = list(grid)
    value = cache(judge)
    drawn = np.random.default_rng(0).integers([len(grid[name]) for name in names], size=(tries, len(names)))
    starts = [start]
    if tries:
        randoms = [replace(start, **{name: grid[name][i] for name, i in zip(names, row, strict=True)})
                   for row in sorted(drawn.tolist())]  # fmt: skip
        starts.append(max(randoms, key=value))
    found = []
    for first in starts:
        best = first
        for _ in range(sweeps):
            before = best
            for name, choices in grid.items():
                best = max([best] + [replace(best, **{name: choice}) for choice in choices], key=value)
            if best == before:
                break
        found.append(best)
    return max(((best, value(best)) for best in found), key=itemgetter(1))


def search_item_knn(
    judge: Callable[[ItemKnnSettings], float],
) -> tuple[Found[ItemKnnSettings], Found[ItemKnnSettings]]:
    """The best settings without and with recency. All similarities are tried, as their settings depend on each other.

    With each of them the half-life climbs from the best one so far: little changes it.
    """
    value, place = cache(judge), 1
    plain, recency = [], []
    for choice in product(*ITEM_KNN_GRID.values()):
        alike = ItemKnnSettings(**dict(zip(ITEM_KNN_GRID, choice, strict=True)))
        plain.append((alike, value(alike)))
        steps = [replace(alike, half_life=half_life) for half_life in HALF_LIVES]
        before = -1
        while place != before:
            before = place
            place = max(range(max(place - 1, 0), min(place + 2, len(steps))), key=lambda n: value(steps[n]))
        recency.append((steps[place], value(steps[place])))
    return max(plain, key=itemgetter(1)), max(recency, key=itemgetter(1))


def _tuning_cases(validation: Cases) -> Cases:
    usable = np.flatnonzero(headline_mask(validation)[0] & (validation.lengths > 0))
    most = min(TUNING_USERS, max(200, _TUNING_CELLS // max(validation.events.catalogue, 1)))
    if len(usable) > most:
        usable = np.sort(np.random.default_rng(0).choice(usable, most, replace=False))
    return validation.take(usable)


def _plain(settings: S, names: Iterable[str]) -> dict[str, Any]:
    """Settings as JSON values; an endless half-life is null."""
    values = asdict(settings)
    return {name: None if values[name] == _ENDLESS else values[name] for name in names}
