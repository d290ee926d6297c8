"""Ranking rows of scores, exact under ties: the best K, and the place of one column."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

CELLS = 8_000_000  # most scores that are ranked at once
ERRORS = 3.0  # standard errors of the difference by which a choice must be better than the usual one,
LEAST = 20  # cases to tell a standard error by


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best columns of each row of scores [B, I]: [B, min(k, I)] int64, best first, ties by column, -1 for -inf.

    Selects instead of sorting the catalogue; exact under ties, which plain argpartition is not. Raises ValueError where
    fewer than k scores of a row are numbers.
    """
    k = min(k, scores.shape[1])
    if k < 1 or not len(scores):
        return np.empty((len(scores), max(k, 0)), np.int64)
    return np.stack([_best(row, k) for row in scores])


def _best(row: np.ndarray, k: int) -> np.ndarray:
    chosen = np.flatnonzero(row >= -np.partition(-row, k - 1)[k - 1])  # by column, so a stable sort keeps ties so
    values = row[chosen]
    order = np.argsort(-values, kind="stable")[:k]
    if len(order) < k:
        raise ValueError("scores that are no numbers cannot be ranked")
    return np.where(values[order] == -np.inf, -1, chosen[order])


def places(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[B] int64 the place of column targets[b] in row b of scores [B, I], from 1. Ties by column.

    0 = excluded, or scored by what is no number.
    """
    own = scores[np.arange(len(scores)), targets][:, None]
    better = (scores > own).sum(axis=1)
    level = scores == own
    for row in np.flatnonzero(level.sum(axis=1) > 1):
        better[row] += level[row, : targets[row]].sum()
    return np.where(own[:, 0] > -np.inf, better + 1, 0)


def gains(place: np.ndarray) -> np.ndarray:
    """What a target at these places adds to NDCG without a cut-off; 0 for one that is excluded."""
    return np.where(place > 0, 1 / np.log2(np.maximum(place, 1) + 1), 0.0)


def hide(scores: np.ndarray, items: Sequence[np.ndarray]) -> None:
    """Exclude the columns items[b] from row b of scores [B, I], in place."""
    if len(items):
        scores[np.repeat(np.arange(len(items)), [len(row) for row in items]), np.concatenate(items)] = -np.inf


def block_size(wanted: int, catalogue: int) -> int:
    """How many rows to score at once: `wanted`, fewer for large catalogues."""
    return max(1, min(wanted, CELLS // max(catalogue, 1)))


def clearly_best(judged: Callable[[float], np.ndarray], tried: Sequence[float], usual: float) -> float:
    """Of the values tried, the one with the best mean of `judged` (one figure a case); or `usual`, if that is as good.

    "As good" is up to ERRORS standard errors of the difference, because the best of several is better by chance too.
    """
    as_usual = judged(usual)
    if len(as_usual) < LEAST:
        return usual
    better = {value: judged(value) - as_usual for value in tried if value != usual}
    best = max(better, key=lambda value: better[value].mean())
    error = better[best].std(ddof=1) / len(as_usual) ** 0.5
    return best if better[best].mean() > ERRORS * error else usual
