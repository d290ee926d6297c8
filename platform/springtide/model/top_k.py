"""Selecting the best K of each row of scores, exact under ties."""

from __future__ import annotations

import numpy as np


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best columns of each row of scores [B, I]: [B, min(k, I)] int64, best first, ties by column, -1 for -inf.

    Selects instead of sorting the catalogue; exact under ties, which plain argpartition is not.
    """
    k = min(k, scores.shape[1])
    if k < 1:
        return np.empty((len(scores), 0), np.int64)
    threshold = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    above = scores > threshold
    level = scores == threshold
    room = k - above.sum(axis=1)
    crowded = np.flatnonzero(level.sum(axis=1) > room)
    if crowded.size:
        contested = level[crowded]
        level[crowded] = contested & (np.cumsum(contested, axis=1) <= room[crowded, None])
    chosen = np.nonzero(above | level)[1].reshape(len(scores), k)
    values = np.take_along_axis(scores, chosen, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    chosen = np.take_along_axis(chosen, order, axis=1)
    chosen[np.take_along_axis(values, order, axis=1) == -np.inf] = -1
    return chosen
