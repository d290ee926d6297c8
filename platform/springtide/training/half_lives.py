"""How soon the popularity of yesterday is forgotten, told by the log's last fifth: what it was just before each event.

For newcomers, of whom nothing else is known, and for the channel of recent popularity. Films are favourites for years,
news for hours.
"""

from __future__ import annotations

import numpy as np

from springtide.model.decayed import decayed_table
from springtide.ranks import block_size, gains, places

TRIED = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # half-lives, as shares of the log's span
USUAL = 0.1  # of recent popularity
LATEST = 0.2  # share of the events, the last ones, that judge
MOST, LEAST = 2000, 20  # events that are ranked
MOMENTS = 64  # at which the counts are taken: an event is ranked by what they were shortly before
ERRORS = 2.0  # standard errors by which another half-life must be better than the usual one


def newcomers_half_life(items: np.ndarray, times: np.ndarray, first: np.ndarray, catalogue: int) -> float:
    """The half-life, as a share of the log's span, by which counts tell best what newcomers take first; inf = none.

    Of events that may be predicted: items [E] catalogue rows, times [E] ms, first [E] bool: the first of their users.
    """
    return _best(items, times, first, catalogue, float("inf"))


def recent_half_life(items: np.ndarray, times: np.ndarray, catalogue: int) -> float:
    """The same by which counts tell best what anybody takes; USUAL unless another is clearly better."""
    return _best(items, times, np.ones(len(items), bool), catalogue, USUAL)


def _best(items: np.ndarray, times: np.ndarray, asked: np.ndarray, catalogue: int, usual: float) -> float:
    """Of TRIED, the half-life with the best NDCG@10 over the last of the `asked` [E] bool events; or `usual`."""
    if not len(times) or times.max() == times.min():
        return usual
    chosen = np.flatnonzero(asked & (times >= np.quantile(times, 1 - LATEST, method="higher")))
    if len(chosen) < LEAST:
        return usual
    chosen = chosen[np.argsort(times[chosen], kind="stable")]
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(MOST, len(chosen))).astype(np.int64)]
    edges = np.unique(np.quantile(times[chosen], np.linspace(0, 1, MOMENTS), method="lower"))
    moment, span = np.searchsorted(edges, times[chosen], side="right") - 1, int(times.max() - times.min())

    def judged(share: float) -> np.ndarray:
        table = decayed_table(items, times, catalogue, share * span, edges)
        place, step = np.empty(len(chosen), np.int64), block_size(MOST, catalogue)
        for begin in range(0, len(chosen), step):
            some = slice(begin, begin + step)
            place[some] = places(table[moment[some]], items[chosen[some]])
        return np.where(place <= 10, gains(place), 0.0)

    as_usual = judged(usual)
    better = {share: judged(share) - as_usual for share in TRIED if share != usual}
    best = max(better, key=lambda share: better[share].mean())
    error = better[best].std() / len(chosen) ** 0.5
    return best if better[best].mean() > ERRORS * error else usual
