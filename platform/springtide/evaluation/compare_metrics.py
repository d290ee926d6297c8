"""Figures of the comparison of presets beyond ranking: clicks and ratings.

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
