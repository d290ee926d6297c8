"""What is popular, and how soon that of yesterday is forgotten: films are favourites for years, news for hours.

For the channel of recent popularity, and for newcomers, of whom nothing else is known. Half-lives are shares of the
log's span; a usual one stays unless another is clearly better, on its own, at telling what was taken.
"""

from __future__ import annotations

import numpy as np

from springtide.model.batch import History
from springtide.model.decayed import decayed_table
from springtide.ranks import LEAST, block_size, clearly_best, gains, hide, places

TRIED = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
USUAL = 0.1  # of recent popularity
RECENT_ROWS = 64  # moments, at least, at which recent popularity is tabulated: two in a half-life,
RECENT_CELLS = 4_000_000  # as far as the table has no more cells than this
LATEST = 0.2  # share of the events, the last ones, whose newcomers are asked:
MOST = 1000  # so many of them,
MOST_SCORES = 500_000_000  # fewer of a large catalogue,
MOMENTS = 64  # by the counts at so many moments, each by those shortly before


def recent_popularity(
    items: np.ndarray, times: np.ndarray, catalogue: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """(table [T, I] float32, edges [T] int64 ms) of channels.RecentPopularity, from events (items, times in ms)."""
    span = span_of(times)
    if not span:
        return np.zeros((1, catalogue), np.float32), np.array([times.max(initial=0) + 1])
    rows = max(RECENT_ROWS, min(round(2 / share), RECENT_CELLS // catalogue))
    inner = np.quantile(times, np.linspace(0, 1, rows)[1:-1]).astype(np.int64)
    edges = np.unique(np.append(inner, times.max() + 1))
    return decayed_table(items, times, catalogue, share * span, edges).astype(np.float32), edges


def span_of(times: np.ndarray) -> int:
    """From the first to the last, ms; 0 without any."""
    return int(times.max() - times.min()) if len(times) else 0


def recent_half_life(
    items: np.ndarray,
    times: np.ndarray,
    catalogue: int,
    cases: list[tuple[History, int]],
    asked_at: int | None,
    exclude_seen: bool,
) -> float:
    """The half-life by which the table of `recent_popularity` ranks validation targets best, as the channel reads it.

    cases: (history, item that came next); asked_at: ms when all of them are asked; None = with the last event of each.
    """
    if not cases or not span_of(times):
        return USUAL
    now = np.array([history.timestamps[-1] if asked_at is None else asked_at for history, _ in cases], np.int64)
    targets = np.array([target for _, target in cases])

    def judged(share: float) -> np.ndarray:
        table, edges = recent_popularity(items, times, catalogue, share)
        row = np.searchsorted(edges, now, side="right")
        table = np.concatenate([np.zeros((1, catalogue), np.float32), table])  # before the first edge nothing is known
        seen = [history.items for history, _ in cases] if exclude_seen else None
        return _gains(table, row, targets, seen)

    return clearly_best(judged, TRIED, USUAL)


def newcomers_half_life(items: np.ndarray, times: np.ndarray, first: np.ndarray, catalogue: int) -> float | None:
    """The half-life by which the counts before them tell best what newcomers take first; None = every event alike.

    Of events that may be predicted: items [E] catalogue rows, times [E] ms, first [E] bool: the first of their users.
    """
    span = span_of(times)
    latest = first & (times >= np.quantile(times, 1 - LATEST, method="higher")) if span else first[:0]
    asked = np.flatnonzero(latest)
    if len(asked) < LEAST:
        return None
    asked = asked[np.argsort(times[asked], kind="stable")]
    most = max(LEAST, min(MOST, MOST_SCORES // catalogue, len(asked)))
    asked = asked[np.linspace(0, len(asked) - 1, most).astype(np.int64)]
    edges = np.unique(np.quantile(times[asked], np.linspace(0, 1, MOMENTS), method="lower"))
    row = np.searchsorted(edges, times[asked], side="right") - 1

    def judged(share: float) -> np.ndarray:
        table = decayed_table(items, times, catalogue, share * span, edges)
        return _gains(table, row, items[asked])

    best = clearly_best(judged, TRIED, float("inf"))
    return best if np.isfinite(best) else None


def _gains(table: np.ndarray, row: np.ndarray, targets: np.ndarray, seen: list[np.ndarray] | None = None) -> np.ndarray:
    """[C] what each target adds to NDCG@10 where its row of the table orders the catalogue, but for what was seen."""
    place, step = np.empty(len(targets), np.int64), block_size(len(targets), table.shape[1])
    for begin in range(0, len(targets), step):
        some = slice(begin, begin + step)
        scores = table[row[some]]
        if seen is not None:
            hide(scores, seen[some])
        place[some] = places(scores, targets[some])
    return np.where(place <= 10, gains(place), 0.0)
