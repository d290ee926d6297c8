"""What to offer somebody of whom nothing is known: what is popular, and how soon that of yesterday is forgotten."""

from __future__ import annotations

import numpy as np

from springtide.model.decayed import decayed_table
from springtide.ranks import block_size, gains, places

TRIED = (0.3, 0.1, 0.03, 0.01, 0.003)  # half-lives, as shares of the log's span
LATEST = 0.2  # share of the events, the last ones, whose newcomers are asked
MOST, LEAST = 1000, 20  # newcomers
MOMENTS = 64  # at which the counts are taken: a newcomer is offered what they were shortly before


def newcomers_half_life(items: np.ndarray, times: np.ndarray, first: np.ndarray, catalogue: int) -> float:
    """The half-life in ms by which the counts before them tell best (NDCG@10) what newcomers take first.

    Of events that may be predicted: items [E] catalogue rows, times [E] ms, first [E] bool: the first of their users.
    inf = every event alike, also where nothing else is better by more than the standard error of the difference.
    """
    if not len(times) or times.max() == times.min():
        return float("inf")
    span = int(times.max() - times.min())
    asked = np.flatnonzero(first & (times >= np.quantile(times, 1 - LATEST, method="higher")))
    if len(asked) < LEAST:
        return float("inf")
    asked = asked[np.argsort(times[asked], kind="stable")][-MOST:]
    edges = np.unique(np.quantile(times[asked], np.linspace(0, 1, MOMENTS), method="lower"))

    def judged(half_life: float) -> np.ndarray:
        table = decayed_table(items, times, catalogue, half_life, edges)
        place, step = np.empty(len(asked), np.int64), block_size(MOST, catalogue)
        for begin in range(0, len(asked), step):
            some = asked[begin : begin + step]
            rows = np.searchsorted(edges, times[some], side="right") - 1
            place[begin : begin + step] = places(table[rows], items[some])
        return np.where(place <= 10, gains(place), 0.0)

    alike = judged(float("inf"))
    better = {share * span: judged(share * span) - alike for share in TRIED}
    best = max(better, key=lambda half_life: better[half_life].mean())
    error = better[best].std() / len(asked) ** 0.5
    return best if better[best].mean() > error else float("inf")
