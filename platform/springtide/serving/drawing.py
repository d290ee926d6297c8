"""Where the items of an answer come from: the best of a batch's catalogue, as `choose` draws them rank by rank.

With an index (see model/retrieval.py) every draw is a search among the items that may still come, so filters and caps
of any width are kept; without one all items are scored once and drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from springtide.serving.choose import Draw
from springtide.serving.policies import damping_of

if TYPE_CHECKING:
    from springtide.model.question import Question
    from springtide.model.recommender import History, Recommender
    from springtide.model.retrieval import Retrieval


def draws_of(
    recommender: Recommender,
    histories: Sequence[History],
    queries: np.ndarray | None,
    now: np.ndarray,
    barred: Sequence[np.ndarray],
    first: Sequence[int],
    damping: float,
) -> tuple[list[Draw], np.ndarray]:
    """A draw for each of B requests, and the weight of the short branch [B], NaN for an empty history.

    queries: [B, D], NaN row = none; now: [B] ms; barred: [I] bool of each, rows that may not be drawn; first: how many
    each will ask for at first; damping: times log(1 + events) that is taken off every score.
    """
    draws: list[Draw | None] = [None] * len(histories)
    gate = np.full(len(histories), np.nan, np.float32)
    retrieval = recommender.retrieval
    if retrieval is not None:
        questions, gate = recommender.questions(histories, queries, now, damping)
        draws = [
            None if question is None else _by_index(retrieval, question, mask)
            for question, mask in zip(questions, barred, strict=True)
        ]
    rest = [row for row, draw in enumerate(draws) if draw is None]
    if rest:
        own = None if queries is None else queries[rest]
        scores = recommender.score([histories[row] for row in rest], own, now[rest])
        logits = scores.logits
        if damping:
            told = np.array([len(histories[row]) > 0 for row in rest]) | (own is not None and ~np.isnan(own).any(1))
            logits = logits + told[:, None] * damping_of(recommender.popularity, damping)  # else it is all there is
        for place, row in enumerate(rest):
            logits[place, barred[row]] = -np.inf
        gate[rest] = scores.gate_short
        # One call for the batch: the largest list, cut per request.
        rows, values = recommender.top_k(logits, max(first[row] for row in rest))
        for place, row in enumerate(rest):
            draws[row] = _from_all(recommender, logits[place : place + 1], rows[place], values[place])
    return [draw for draw in draws if draw is not None], gate


def _by_index(retrieval: Retrieval, question: Question, barred: np.ndarray) -> Draw:
    def draw(spent: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        mask = barred.copy()
        mask[spent] = True
        return retrieval.best(question, count, mask)

    return draw


def _from_all(recommender: Recommender, logits: np.ndarray, rows: np.ndarray, values: np.ndarray) -> Draw:
    """Draw the best `rows` and `values`, and only where those run out rank the others of logits [1, I]."""

    def draw(spent: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        if len(spent):
            found, their = recommender.top_k(logits, count, [spent])
            best, scores = found[0], their[0]
        else:
            best, scores = rows[:count], values[:count]
        keep = (best >= 0) & np.isfinite(scores)
        return best[keep], scores[keep]

    return draw
