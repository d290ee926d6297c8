"""How much items are favoured that nobody took yet: where what is taken is mostly new, as news or vacancies are.

Training makes such an item as likely as any other of its text. In a log in which most of what users take next has just
appeared it is far more likely, and validation users, most of whom took what training never saw, tell by how much.
"""

from __future__ import annotations

import numpy as np

from springtide.model.batch import History
from springtide.model.fusion import FusionModel
from springtide.ranks import clearly_best, gains, places
from springtide.training.listing import LIST, catalogue_scores

TRIED = tuple(step / 2 for step in range(17))  # logits
OFTEN = 0.25  # share of the cases from which on taking what is new is a habit of the log


def choose_newness(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool
) -> float:
    """What to add to the scores of items without an event: as much of TRIED as clearly gives a better NDCG@10.

    cases: (history, item that came next); asked_at: ms at which all of them are asked. None, with their last
    event each: then what is untaken is what is held out, which tells nothing of later, and nothing is added.
    """
    untaken = model.channels.untaken.numpy()
    targets = np.array([target for _, target in cases], np.int64)
    if asked_at is None or not len(cases) or untaken[targets].mean() < OFTEN:
        return 0.0
    place, done = np.empty((len(TRIED), len(cases)), np.int64), 0
    for scores, _, _ in catalogue_scores(model, [history for history, _ in cases], asked_at, exclude_seen):
        block = slice(done, done + len(scores))
        for number, more in enumerate(TRIED):
            place[number, block] = places(scores + np.float32(more) * untaken, targets[block])
        done += len(scores)
    gained = np.where(place <= LIST, gains(place), 0.0)
    best = gained[TRIED.index(clearly_best(lambda more: gained[TRIED.index(more)], TRIED, 0.0))]
    # The least that is as good but for a standard error: what is known already should not be pushed out for chance.
    lost = best - gained
    return TRIED[int(np.argmax(lost.mean(1) <= lost.std(1) / len(cases) ** 0.5))]
