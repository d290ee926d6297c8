"""From merged statistics to the tables that a model starts from: what can be counted of the whole log only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from springtide.config import ModelConfig
from springtide.model.batch import History, scoring_batch
from springtide.model.borrowing import nearest_by_text
from springtide.model.cosines import Pairs, count_pairs, no_pairs
from springtide.model.counting.ease import regularised_inverse
from springtide.model.decayed import DecayedCounts
from springtide.model.neighbours import Neighbours
from springtide.model.tables import Tables
from springtide.ranks import block_size, gains, hide, places
from springtide.training.popularity import (
    USUAL,
    newcomers_half_life,
    recent_half_life,
    recent_popularity,
    span_of,
)
from springtide.training.statistics import Statistics

TRIED_SHARES = (None, 0.4)  # half-lives of the neighbours' log, as shares of its span; None = every event alike
JUDGED_USERS = 1000


@dataclass(frozen=True)
class HalfLives:
    """After how much of the log's span an event counts half."""

    neighbours: float | None = None  # of the neighbours' log; None = every event alike
    recent: float = USUAL  # of recent popularity
    newcomers: float | None = None  # of what is popular for whom nothing is known of; None = every event alike


def tabulate(
    statistics: Statistics, config: ModelConfig, half_lives: HalfLives, text: np.ndarray | None = None
) -> Tables:
    """The Tables of a log. text: [I, D] the items' whitened text vectors, if they have any."""
    end, catalogue = _span(statistics)[1], len(statistics.popularity)
    items, inverse, half_life = _neighbours(statistics, config, half_lives.neighbours)
    recent, edges = np.zeros((1, catalogue), np.float32), np.array([end + 1])
    if config.recent_popularity:
        recent, edges = recent_popularity(statistics.wanted, statistics.wanted_at, catalogue, half_lives.recent)
    no_text = np.zeros((catalogue, 0), np.float32)
    text = no_text if text is None or not config.borrowing else text
    lenders, cosines = nearest_by_text(text, statistics.popularity)
    return Tables(
        statistics.popularity,
        statistics.rating_stats,
        statistics.transitions,
        inverse,
        items,
        _pairs(statistics, config, items, half_life),
        end,
        half_life,
        recent,
        edges,
        half_lives.recent * span_of(statistics.wanted_at) or float("inf"),
        lenders,
        cosines,
        _popular(statistics, half_lives.newcomers),
    )


def _span(statistics: Statistics) -> tuple[int, int]:
    """Times in ms of the first and the last event that a user's row holds; (0, 0) without any."""
    times = statistics.taken.data - 1
    return (int(times.min()), int(times.max())) if len(times) else (0, 0)


def _neighbours(
    statistics: Statistics, config: ModelConfig, share: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The M most popular items [M], (X'X + l2)^-1 over them [M, M] float32, X's half-life in ms. See Neighbours."""
    start, end = _span(statistics)
    half_life = float("inf") if share is None or end == start else share * (end - start)
    if not config.neighbours:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32), half_life
    ranked = np.argsort(-statistics.popularity, kind="stable")[: config.neighbour_items]
    items = np.sort(ranked[statistics.popularity[ranked] > 0])
    if not len(items):
        return items, np.zeros((0, 0), np.float32), half_life
    rows = _weighed(statistics.taken[:, items], end, half_life)
    return items, regularised_inverse(rows, config.neighbour_l2).astype(np.float32), half_life


def _pairs(statistics: Statistics, config: ModelConfig, items: np.ndarray, half_life: float) -> Pairs:
    """The pairs with one of the items that were taken, but are not among the M; as X weighs them."""
    if not config.neighbours or len(items) == np.count_nonzero(statistics.popularity):
        return no_pairs(len(statistics.popularity))
    rows = _weighed(statistics.taken, _span(statistics)[1], half_life)
    return count_pairs(rows, items, config.neighbour_shrinkage)


def _weighed(taken: sp.csr_array, end: int, half_life: float) -> sp.csr_array:
    """X of items that were last taken at `taken` - 1 ms."""
    return sp.csr_array((0.5 ** ((end + 1 - taken.data) / half_life), taken.indices, taken.indptr), shape=taken.shape)


def _popular(statistics: Statistics, share: float | None) -> DecayedCounts:
    """What newcomers are offered, at the end of the log."""
    items, times = statistics.wanted, statistics.wanted_at
    none = np.zeros(len(statistics.popularity))
    if not len(times):
        return DecayedCounts(none, 0, float("inf"))
    half_life = float("inf") if share is None else share * span_of(times) or float("inf")
    return DecayedCounts(none, int(times.max()), half_life).after(items, times)


def choose_half_lives(
    statistics: Statistics,
    config: ModelConfig,
    cases: list[tuple[History, int]],
    exclude_seen: bool,
    asked_at: int | None = None,
) -> HalfLives:
    """Those that tell best what was taken, where they are not set.

    cases: of validation, (history, item that came next); asked_at: ms when all of them are asked, None = with the last
    event of each.
    """
    events, catalogue = (statistics.wanted, statistics.wanted_at), len(statistics.popularity)
    recent = config.recent_half_life or USUAL
    if config.recent_popularity and config.recent_half_life is None:
        recent = recent_half_life(*events, catalogue, cases[:JUDGED_USERS], asked_at, exclude_seen)
    newcomers = newcomers_half_life(*events, statistics.wanted_first, catalogue)
    return HalfLives(choose_share(statistics, config, cases, exclude_seen), recent, newcomers)


def choose_share(
    statistics: Statistics, config: ModelConfig, cases: list[tuple[History, int]], exclude_seen: bool
) -> float | None:
    """The half-life of the neighbours' log, of those tried, that ranks the validation targets best on its own.

    cases: (history, item that came next). A log with a trend wants old events to count less; one that was gathered user
    by user does not.
    """
    if not config.neighbours or not cases or not len(statistics.taken.data):
        return None
    found = {share: _judge(statistics, config, share, cases[:JUDGED_USERS], exclude_seen) for share in TRIED_SHARES}
    return max(TRIED_SHARES, key=lambda share: found[share])


@torch.no_grad()
def _judge(
    statistics: Statistics, config: ModelConfig, share: float | None, cases: list[tuple[History, int]], hide_seen: bool
) -> float:
    """NDCG@10 of the better of the two readings."""
    items, inverse, half_life = _neighbours(statistics, config, share)
    model = Neighbours(len(statistics.popularity), config.neighbour_shrinkage)
    model.load(inverse, items, _span(statistics)[1], half_life)
    total = np.zeros(2)
    step = block_size(64, len(statistics.popularity))
    for begin in range(0, len(cases), step):
        some = cases[begin : begin + step]
        histories = [history for history, _ in some]
        batch = scoring_batch(histories, config.long_window)
        last = torch.stack([torch.arange(len(some)), batch.mask.sum(1) - 1], 1)
        for reading in range(2):
            weights = torch.zeros(len(some), 2)
            weights[:, reading] = 1
            scores = model(batch.items, last, weights).numpy()
            if hide_seen:
                hide(scores, [history.items for history in histories])
            place = places(scores, np.array([target for _, target in some]))
            total[reading] += gains(place)[place <= 10].sum()
    return float(total.max())
