"""How much popularity is damped: lists that reach more of the catalogue, for little in accuracy.

Subtracting d * log popularity from every score spreads recommendations over more items; those that nobody took yet
have none, and are left where they are. Up to a point that costs no accuracy, because a softmax learns to favour what is
popular more than a list of ten needs; validation shows the point.
"""

from __future__ import annotations

import numpy as np

from springtide.model.batch import History
from springtide.model.fusion import FusionModel
from springtide.ranks import LEAST, gains, places
from springtide.training.listing import LIST, catalogue_scores

TRIED = tuple(step / 20 for step in range(17))  # at 0.8 each of three logs lost 3 to 6 %


def choose_damping(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool, cost: float
) -> float:
    """The most of TRIED that costs no more than a share `cost` of the validation NDCG.

    The NDCG is that without a cut-off, which every rank tells and not the first ten alone. NDCG@10 has a say as well,
    but so few cases are in a list of ten that its difference is mostly chance (on a log of 900 users a standard error
    of 2 to 6 %): it must cost no more than the same share and two standard errors.

    Only items that training knows count here: those that nobody took yet rise with every damping of the others, which
    would hide what it costs. cases: (history, item that came next); asked_at: ms at which all of them are asked,
    None = with their last event. Returns 0 where there are too few cases to tell, and where none is in its list of ten.
    """
    known = model.item_vectors.known.tolist()
    cases = [(history, target) for history, target in cases if known[target]]
    if len(cases) < LEAST or not cost:
        return 0.0
    gained = _gains(model, cases, asked_at, exclude_seen)
    lost = gained[0] - gained
    loss, error = lost.mean(2), lost.std(2) / len(cases) ** 0.5
    base = gained[0].mean(1)
    if not base[0] > 0:
        return 0.0
    return TRIED[np.flatnonzero((loss - 2 * error * [1, 0] <= cost * base).all(1)).max()]


def _gains(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool
) -> np.ndarray:
    """NDCG@10 and NDCG without a cut-off of each of C cases at every damping: [len(TRIED), 2, C]."""
    histories, targets = [history for history, _ in cases], np.array([target for _, target in cases])
    excess, place, done = model.channels.excess.numpy(), np.empty((len(TRIED), len(cases)), np.int64), 0
    for scores, _, _ in catalogue_scores(model, histories, asked_at, exclude_seen):
        block = slice(done, done + len(scores))
        for number, damping in enumerate(TRIED):
            place[number, block] = places(scores - np.float32(damping) * excess, targets[block])
        done += len(scores)
    gain = gains(place)
    return np.stack([gain * (place <= LIST), gain], 1)
