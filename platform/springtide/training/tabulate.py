"""From merged statistics to the tables that a model starts from: what can be counted of the whole log only."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from springtide.config import ModelConfig
from springtide.model.batch import History, scoring_batch
from springtide.model.borrowing import nearest_by_text
from springtide.model.cosines import Pairs, count_pairs, no_pairs
from springtide.model.counting.ease import regularised_inverse
from springtide.model.decayed import DecayedCounts, decayed_table
from springtide.model.neighbours import Neighbours
from springtide.model.tables import Tables
from springtide.ranks import block_size, gains, hide, places
from springtide.training.half_lives import USUAL, newcomers_half_life, recent_half_life
from springtide.training.statistics import Statistics

RECENT_ROWS = 64  # moments, at least, at which recent popularity is tabulated: two in a half-life,
RECENT_CELLS = 8_000_000  # as far as the table has no more cells than this
TRIED_SHARES = (None, 0.4)  # half-lives of the neighbours' log, as shares of its span; None = every event alike
JUDGED_USERS = 1000


def tabulate(
    statistics: Statistics,
    config: ModelConfig,
    share: float | None,
    text: np.ndarray | None = None,
    recent_share: float = USUAL,
) -> Tables:
    """The Tables of a log. share: half-life of the neighbours' log as a share of its span; None = no decay.

    text: [I, D] the items' whitened text vectors, if they have any; recent_share: half-life of recent popularity, as a
    share of the same.
    """
    start, end = _span(statistics)
    items, inverse, half_life = _neighbours(statistics, config, share)
    recent, edges = np.zeros((1, len(statistics.popularity)), np.float32), np.array([end + 1])
    if config.recent_popularity:
        recent, edges = recent_popularity(
            statistics.wanted, statistics.wanted_at, len(statistics.popularity), recent_share
        )
    no_text = np.zeros((len(statistics.popularity), 0), np.float32)
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
        recent_share * (end - start) or float("inf"),
        lenders,
        cosines,
        popular(statistics),
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


def recent_popularity(
    items: np.ndarray, times: np.ndarray, catalogue: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """(table [T, I] float32, edges [T] int64 ms) of channels.RecentPopularity, from events (items, times in ms).

    share: half-life over the log's span.
    """
    start, end = (int(times.min()), int(times.max())) if len(times) else (0, 0)
    if end == start:
        return np.zeros((1, catalogue), np.float32), np.array([end + 1])
    rows = max(RECENT_ROWS, min(round(2 / share), RECENT_CELLS // catalogue))
    edges = np.unique(np.append(np.quantile(times, np.linspace(0, 1, rows)[1:-1]).astype(np.int64), end + 1))
    return decayed_table(items, times, catalogue, share * (end - start), edges).astype(np.float32), edges


def popular(statistics: Statistics) -> DecayedCounts:
    """What newcomers are offered, at the end of the log."""
    items, times, catalogue = statistics.wanted, statistics.wanted_at, len(statistics.popularity)
    share = newcomers_half_life(items, times, statistics.wanted_first, catalogue)
    half_life = share * int(np.ptp(times)) if np.isfinite(share) else share
    return DecayedCounts(np.zeros(catalogue), int(times.max(initial=0)), half_life).after(items, times)


def choose_recent_share(statistics: Statistics, config: ModelConfig) -> float:
    """The half-life of recent popularity: as it is set, or as the log tells."""
    if config.recent_half_life is not None:
        return config.recent_half_life
    return recent_half_life(statistics.wanted, statistics.wanted_at, len(statistics.popularity))


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
