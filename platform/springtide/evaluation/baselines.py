"""Counting baselines: popularity, item-KNN and transition counts. Each is fitted in seconds on numpy and scipy.sparse.

All three are fitted on the training part alone, as the model is, and are asked with the same histories as the model.
Settings are chosen on the validation part (history = training events, NDCG@10). Only events that may be predicted
count as destinations; every event counts as a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from scipy import sparse

from springtide.evaluation.ranking import WARM, Cases, FlatSequences, target_ranks
from springtide.schemas import TRAIN

if TYPE_CHECKING:
    from springtide.model.recommender import History

TUNING_USERS = 2000
_TUNING_CELLS = 40_000_000  # users times items ranked for one candidate setting
_PAIRS = 400_000_000  # item pairs that item-KNN may visit; longer histories are cut to their latest items
_ALL_NEIGHBOURS = 5_000  # catalogues up to this size keep every co-occurrence while tuning
_KEPT_NEIGHBOURS = 300  # larger ones this many for each item
_SEARCHED_EVENTS = 2_000_000  # above, the settings that change the counts themselves keep their defaults


Grid = dict[str, list[Any]]  # setting -> choices; those that are dear to change come first


class Baseline(Protocol):
    """Anything fitted that scores the whole catalogue for a batch of histories."""

    def score(self, histories: Sequence[History]) -> np.ndarray:
        """[B, I] float32, higher is better."""
        ...


@dataclass(frozen=True)
class TrainingLog:
    """Training events, user after user, oldest first."""

    users: np.ndarray  # [N] user numbers, ascending
    items: np.ndarray  # [N] catalogue rows
    targets: np.ndarray  # [N] bool
    catalogue: int


def training_log(events: FlatSequences) -> TrainingLog:
    """The training part of the sequences."""
    keep = events.parts == TRAIN
    return TrainingLog(events.users[keep], events.items[keep], events.targets[keep], events.catalogue)


# ---------------------------------------------------------------- popularity
@dataclass(frozen=True)
class Popularity:
    places: np.ndarray  # [I] float32: items in order of training events, the most popular highest, ties by row

    def score(self, histories: Sequence[History]) -> np.ndarray:
        return np.broadcast_to(self.places, (len(histories), len(self.places)))


def fit_popularity(log: TrainingLog) -> Popularity:
    places = np.empty(log.catalogue, dtype=np.float32)  # places, not counts: ranking is several times faster untied
    places[np.argsort(-_counts(log), kind="stable")] = np.arange(log.catalogue, 0, -1)
    return Popularity(places)


def _counts(log: TrainingLog) -> np.ndarray:
    return np.bincount(log.items[log.targets], minlength=log.catalogue)


# ---------------------------------------------------------------- item-KNN
@dataclass(frozen=True)
class ItemKnnSettings:
    neighbours: int = 200  # kept for each history item
    shrinkage: float = 10.0  # added to the denominator: pairs seen together rarely count less
    alpha: float = 0.5  # popularity penalty of the history item against that of the candidate; 0.5 is the cosine
    half_life: float = 10.0  # events after which a history item weighs half; inf = all alike


ITEM_KNN_GRID: Grid = {
    "alpha": [0.2, 0.35, 0.5, 0.65],
    "shrinkage": [0.0, 10.0, 50.0],
    "neighbours": [50, 200, 1000],
    "half_life": [2.0, 5.0, 10.0, 30.0, float("inf")],
}


@dataclass(frozen=True)
class CoOccurrence:
    """How many users took both items: pairs[a, b] with a as any event and b as a target."""

    pairs: sparse.csr_array  # [I, I]
    sources: np.ndarray  # [I] users who took the item at all
    destinations: np.ndarray  # [I] users who took it as a target


@dataclass(frozen=True)
class ItemKnn:
    """score(b) = sum over history items a of 0.5^(age / half_life) · similarity(a, b) (Sarwar et al. 2001)."""

    similarity: sparse.csr_array  # [I, I] float32
    half_life: float

    def score(self, histories: Sequence[History]) -> np.ndarray:
        weights = _history_weights(histories, self.similarity.shape[0], lambda ages, _: 0.5 ** (ages / self.half_life))
        return (weights @ self.similarity).toarray()


def co_occurrence(log: TrainingLog) -> CoOccurrence:
    """Pairs of items over users, in blocks of sources, never dense. Very long histories are cut to bound the work."""
    count = log.catalogue
    keep = _latest(log, _longest_history(log))
    users, items, targets = log.users[keep], log.items[keep], log.targets[keep]
    width = int(users.max(initial=0)) + 1
    taken, wanted = _incidence(users, items, width, count), _incidence(users[targets], items[targets], width, count)
    sources, destinations = np.asarray(taken.sum(axis=0)).ravel(), np.asarray(wanted.sum(axis=0)).ravel()
    by_item, blocks = sparse.csr_array(taken.T), []
    for start in range(0, count, 1000):
        block = sparse.csr_array(by_item[start : start + 1000] @ wanted)
        if count > _ALL_NEIGHBOURS:
            cosine = _normalised(block, sources[start : start + 1000], destinations, 0.5, 10.0)
            block = _where(block, _best_of_rows(cosine, _KEPT_NEIGHBOURS))
        blocks.append(block)
    pairs: Any = sparse.csr_array(sparse.vstack(blocks))
    row = np.repeat(np.arange(count), np.diff(pairs.indptr))
    return CoOccurrence(_where(pairs, row != pairs.indices), sources, destinations)  # nobody is their own neighbour


def fit_item_knn(counts: CoOccurrence, settings: ItemKnnSettings) -> ItemKnn:
    similarity = _normalised(counts.pairs, counts.sources, counts.destinations, settings.alpha, settings.shrinkage)
    kept = _where(similarity, _best_of_rows(similarity, settings.neighbours))
    return ItemKnn(kept, settings.half_life)


def _normalised(
    pairs: sparse.csr_array, sources: np.ndarray, destinations: np.ndarray, alpha: float, shrinkage: float
) -> sparse.csr_array:
    row = np.repeat(sources.astype(np.float64) ** alpha, np.diff(pairs.indptr))
    weights = pairs.data / (row * destinations.astype(np.float64)[pairs.indices] ** (1 - alpha) + shrinkage)
    return sparse.csr_array((weights.astype(np.float32), pairs.indices, pairs.indptr), shape=pairs.shape)


def _longest_history(log: TrainingLog) -> int:
    lengths = np.bincount(log.users).astype(np.float64)
    for longest in (2000, 1000, 500, 200, 100):
        if (np.minimum(lengths, longest) ** 2).sum() <= _PAIRS:
            return longest
    return 50


def _latest(log: TrainingLog, longest: int) -> np.ndarray:
    ends = np.cumsum(np.bincount(log.users)) if len(log.users) else np.zeros(1, dtype=np.int64)
    return ends[log.users] - np.arange(len(log.users)) <= longest


def _incidence(users: np.ndarray, items: np.ndarray, width: int, count: int) -> sparse.csr_array:
    cells = np.unique(users * count + items)
    ones = np.ones(len(cells), dtype=np.float32)
    return sparse.csr_array((ones, (cells // count, cells % count)), shape=(width, count))


def _best_of_rows(matrix: sparse.csr_array, keep: int) -> np.ndarray:
    """Mask over matrix.data of the `keep` largest values in each row."""
    mask = np.ones(matrix.nnz, dtype=bool)
    for row in np.flatnonzero(np.diff(matrix.indptr) > keep):
        cells = slice(matrix.indptr[row], matrix.indptr[row + 1])
        mask[cells][np.argpartition(-matrix.data[cells], keep)[keep:]] = False
    return mask


def _where(matrix: sparse.csr_array, mask: np.ndarray) -> sparse.csr_array:
    kept = np.concatenate([[0], np.cumsum(mask)])[matrix.indptr]
    return sparse.csr_array((matrix.data[mask], matrix.indices[mask], kept), shape=matrix.shape)


# ---------------------------------------------------------------- transition counts
@dataclass(frozen=True)
class TransitionSettings:
    distances: int = 4  # b counts as a successor of a up to this many events later,
    gamma: float = 0.7  # at distance d with weight gamma^(d - 1)
    smoothing: float = 100.0  # tau: pseudo-events spread evenly over the catalogue
    recent: int = 20  # history events that are asked for their successors,
    decay: float = 0.8  # the one j events before the last with weight decay^j
    tail: float = 0.0  # share of the weight spread evenly over those events
    popularity: float = 0.0  # lambda, in units of the mean count score; negative favours the less popular


TRANSITION_GRID: Grid = {
    "distances": [1, 4, 10, 20],
    "gamma": [0.5, 0.7, 0.9],
    "smoothing": [10.0, 100.0, 1000.0, 5000.0],
    "popularity": [-0.3, -0.1, -0.03, 0.0, 0.03, 0.1],
    "decay": [0.3, 0.6, 0.8, 0.9],
    "tail": [0.0, 0.2, 0.4],
    "recent": [5, 20, 50],
}


@dataclass(frozen=True)
class Transitions:
    """score(b) = sum_j w_j · log(1 + C[a_j, b] · I / tau) + lambda · log popularity(b).

    C holds smoothed multi-distance transition counts (PCTM, "sequential capacity probes", RecSys 2026); the logarithm
    is the log probability of b after a_j under Dirichlet smoothing, less what is the same for every b.
    """

    successors: sparse.csr_array  # [I, I] float32: the logarithms
    prior: np.ndarray  # [I] lambda · log popularity
    recent: int
    decay: float
    tail: float

    def score(self, histories: Sequence[History]) -> np.ndarray:
        weights = _history_weights(histories, len(self.prior), self._kernel, self.recent)
        return (weights @ self.successors).toarray() + self.prior

    def _kernel(self, ages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Weights of events by age (0 = last) in histories of these lengths; they sum to 1 over a history."""
        total = lengths if self.decay == 1 else (1 - self.decay**lengths) / (1 - self.decay)
        return (1 - self.tail) * self.decay**ages / total + self.tail / lengths


def transition_counts(log: TrainingLog, distances: int, gamma: float) -> sparse.csr_array:
    """C[a, b] = sum over d of gamma^(d-1) times how often target b came d events after a. [I, I] float32, sparse."""
    shape = (log.catalogue, log.catalogue)
    total: Any = sparse.csr_array(shape, dtype=np.float32)  # the stubs take a sum for one-dimensional
    for distance in range(1, distances + 1):
        follows = (log.users[distance:] == log.users[:-distance]) & log.targets[distance:]
        before, after = log.items[:-distance][follows], log.items[distance:][follows]
        weight = np.full(len(before), gamma ** (distance - 1), dtype=np.float32)
        total = total + sparse.coo_array((weight, (before, after)), shape=shape).tocsr()
    return total


def fit_transitions(log: TrainingLog, counts: sparse.csr_array, settings: TransitionSettings) -> Transitions:
    successors = counts.copy()
    successors.data = np.log1p(counts.data * (log.catalogue / settings.smoothing)).astype(np.float32)
    logs = np.log1p(_counts(log))
    # In units of the scores, or smoothing would change what a lambda is worth and neither could be searched alone.
    unit = (float(successors.data.mean()) if successors.nnz else 1.0) / max(float(logs.mean()), 1e-9)
    prior = settings.popularity * unit * logs
    return Transitions(successors, prior.astype(np.float32), settings.recent, settings.decay, settings.tail)


# ---------------------------------------------------------------- tuning
@dataclass(frozen=True)
class Fitted:
    """A baseline with the settings chosen for it."""

    baseline: Baseline
    settings: dict[str, Any]
    validation: float | None  # NDCG@10 on the users it was tuned on; None if nothing was tuned


S = TypeVar("S", ItemKnnSettings, TransitionSettings)


def fit_baselines(events: FlatSequences, validation: Cases, exclude_seen: bool) -> dict[str, Fitted]:
    """Fit all baselines on the training part, with settings chosen on the validation cases, if any.

    Returns them under `popularity`, `item_knn`, `transitions`. The search sees at most 2,000 validation
    users, fewer for large catalogues.
    """
    log = training_log(events)
    cases = _tuning_cases(validation)

    def judge(baseline: Baseline) -> float:
        ranks = target_ranks(cases, baseline.score, exclude_seen=exclude_seen, batch_size=256)
        hit = (ranks > 0) & (ranks <= 10)
        return float((hit / np.log2(np.maximum(ranks, 1) + 1)).mean())

    pairs = co_occurrence(log)
    counted: dict[tuple[int, float], sparse.csr_array] = {}

    def knn(settings: ItemKnnSettings) -> ItemKnn:
        return fit_item_knn(pairs, settings)

    def transitions(settings: TransitionSettings) -> Transitions:
        key = (settings.distances, settings.gamma)
        if key not in counted:
            counted.clear()
            counted[key] = transition_counts(log, *key)
        return fit_transitions(log, counted[key], settings)

    grid = TRANSITION_GRID
    if len(log.items) > _SEARCHED_EVENTS:
        grid = {name: choices for name, choices in grid.items() if name not in ("distances", "gamma")}
    tune = bool(len(cases))
    popularity = fit_popularity(log)
    found_knn = search(ItemKnnSettings(), ITEM_KNN_GRID, lambda s: judge(knn(s))) if tune else (ItemKnnSettings(), None)
    found_steps = (
        search(TransitionSettings(), grid, lambda s: judge(transitions(s))) if tune else (TransitionSettings(), None)
    )
    return {
        "popularity": Fitted(popularity, {}, judge(popularity) if tune else None),
        "item_knn": Fitted(knn(found_knn[0]), _plain(found_knn[0]), found_knn[1]),
        "transitions": Fitted(transitions(found_steps[0]), _plain(found_steps[0]), found_steps[1]),
    }


def search(start: S, grid: Grid, judge: Callable[[S], float], tries: int = 24, sweeps: int = 2) -> tuple[S, float]:
    """The best settings found by coordinate ascent, one at a time, from `start` and from the best random ones."""
    names = list(grid)
    values: dict[S, float] = {}

    def value(settings: S) -> float:
        if settings not in values:
            values[settings] = judge(settings)
        return values[settings]

    drawn = np.random.default_rng(0).integers([len(grid[name]) for name in names], size=(tries, len(names)))
    randoms = [replace(start, **{name: grid[name][i] for name, i in zip(names, row, strict=True)})
               for row in sorted(drawn.tolist())]  # fmt: skip
    for first in (start, max(randoms, key=value)):
        best: S = first
        for _ in range(sweeps):
            before = best
            for name, choices in grid.items():
                candidates: list[S] = [best] + [replace(best, **{name: choice}) for choice in choices]
                best = max(candidates, key=value)
            if best == before:
                break
    found = max(values, key=values.__getitem__)
    return found, values[found]


def _tuning_cases(validation: Cases) -> Cases:
    usable = np.flatnonzero((validation.slices == WARM) & (validation.lengths > 0))
    most = min(TUNING_USERS, max(200, _TUNING_CELLS // max(validation.events.catalogue, 1)))
    if len(usable) > most:
        usable = np.sort(np.random.default_rng(0).choice(usable, most, replace=False))
    return validation.take(usable)


def _plain(settings: ItemKnnSettings | TransitionSettings) -> dict[str, Any]:
    """Settings as JSON values; an endless half-life is null."""
    return {name: None if value == float("inf") else value for name, value in asdict(settings).items()}


def _history_weights(
    histories: Sequence[History],
    catalogue: int,
    kernel: Callable[[np.ndarray, np.ndarray], np.ndarray],
    recent: int | None = None,
) -> sparse.csr_array:
    """[B, I] sparse: kernel(age, length) of every history event, summed over repeats; only the last `recent` events."""
    items = [history.items if recent is None else history.items[-recent:] for history in histories]
    lengths = np.array([len(row) for row in items], dtype=np.int64)
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(items)), lengths)
    ages = ends[row] - 1 - np.arange(len(row))
    columns = np.concatenate(items) if items else np.zeros(0, dtype=np.int64)
    values = kernel(ages.astype(np.float32), lengths[row].astype(np.float32)).astype(np.float32)
    return sparse.coo_array((values, (row, columns)), shape=(len(items), catalogue)).tocsr()
