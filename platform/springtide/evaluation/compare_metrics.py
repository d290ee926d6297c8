"""Figures of the comparison of presets beyond ranking: clicks, ratings, and how varied and unusual the lists are.

Arrays in, arrays out; no files, no Ray.
"""

from __future__ import annotations

import numpy as np

from springtide.evaluation.ranking import Cases
from springtide.schemas import TRAIN

SEED = 20240607  # of the negatives: every model is asked about the same pairs
TRIES = 100  # draws before a user counts as one who has everything


def draw_negatives(cases: Cases) -> np.ndarray:
    """[C] one catalogue row per case, at random among trained items that the user neither has nor goes on to take.

    -1 where there is none, or where there is no history to judge by.
    """
    events = cases.events
    pool = np.unique(events.items[events.parts == TRAIN])
    out = np.full(len(cases), -1, np.int64)
    rng = np.random.default_rng(SEED)
    for case in np.flatnonzero(cases.lengths > 0).tolist() if len(pool) else ():
        begin, end = cases.all_offsets[case : case + 2]
        taken = {*cases.history(case).items.tolist(), *cases.all_targets[begin:end].tolist()}
        drawn = pool[rng.integers(len(pool), size=TRIES)].tolist()
        out[case] = next((item for item in drawn if item not in taken), -1)
    return out


def target_ratings(cases: Cases, part: int) -> np.ndarray:
    """[C] float32: what each case's target was rated, NaN where it was not."""
    events = cases.events
    wanted = np.flatnonzero((events.parts == part) & events.targets)
    _, first = np.unique(events.users[wanted], return_index=True)
    return events.ratings[wanted[first]]


def click_figures(taken: np.ndarray, refused: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of the click probabilities of items taken and of items not, [n] each."""
    hits, alarms = int((taken >= threshold).sum()), int((refused >= threshold).sum())
    precision, recall = hits / max(1, hits + alarms), hits / max(1, len(taken))
    return {
        "accuracy": (hits + len(refused) - alarms) / max(1, len(taken) + len(refused)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(1e-12, precision + recall),
    }


def mean_absolute_error(predicted: np.ndarray, ratings: np.ndarray) -> float | None:
    """Over the cases with a rating [C]; None if there is none."""
    given = ~np.isnan(ratings)
    return float(np.abs(predicted[given] - ratings[given]).mean()) if given.any() else None


def novelty(lists: np.ndarray, popularity: np.ndarray, k: int) -> float | None:
    """Mean of -log2(share of the training events) over the first k of every list; None without any list.

    lists: [U, K] catalogue rows, -1 = no more; popularity: [I] training events. An item without any counts as one.
    """
    shown = lists[:, :k]
    bits = -np.log2(np.maximum(popularity, 1) / max(1, popularity.sum()))
    return float(bits[shown[shown >= 0]].mean()) if (shown >= 0).any() else None


def diversity(lists: np.ndarray, vectors: np.ndarray, k: int) -> float | None:
    """1 - the mean cosine between two items of a list, over the first k of every list; None without any pair.

    vectors: [I, d]. Lists of fewer than two items with a vector do not count.
    """
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-9)
    shown = lists[:, :k]
    there = (shown >= 0) & (np.abs(unit).sum(1) > 0)[shown]  # [U, k]
    total = np.zeros((len(lists), unit.shape[1]))
    for column in range(shown.shape[1]):  # |sum of unit vectors|^2 = n + twice the sum over pairs
        total += unit[shown[:, column]] * there[:, column, None]
    count = there.sum(1)
    pairs = count > 1
    if not pairs.any():
        return None
    n = count[pairs]
    return float(1 - (((total[pairs] ** 2).sum(1) - n) / (n * (n - 1))).mean())
