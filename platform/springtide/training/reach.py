"""Lists that reach more of the catalogue: an item in nobody's list is lifted until the user it comes nearest sees it.

"Nobody" is none of the users whose lists are read: those that a model is validated on, and of a large log a part.

One number is added to the item's score, for all users. That is a cheap way to a wider reach: each lifted item takes the
last place of a list or two, where little is lost, while damping popularity changes every list. Where the best user is
far, the lift would be large, and some request that is like nobody's history might get a list full of such items. So the
nearest come first, and histories shorter than nearly all that the lists are of get no lift at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from springtide.model.batch import Batch, History
from springtide.model.fusion import FusionModel
from springtide.ranks import LEAST, gains, top_k
from springtide.training.listing import LIST, catalogue_scores, exclude

# Times as many items as the neighbours' own lists hold, which are narrow: they favour what is popular too.
ENOUGH = 1.25
NEAREST = 16  # users that are remembered of each item, in case the lists of the first are taken
MARGIN = 1e-3  # in logits, above the score that is to be passed: a product of another shape rounds otherwise
SHORT = 0.1  # share of the histories, the shortest, that get no lift, nor any that is as short
WORK, USERS = 10**9, 50_000  # most scores and users that are read


@dataclass
class Lists:
    """Of N users and I items: the lists of LIST, and the users of whose lists each item came nearest."""

    items: np.ndarray  # [N, LIST] int64, best first
    scores: np.ndarray  # [N, LIST] float32
    users: np.ndarray  # [NEAREST, I] int64, the nearest first
    own: np.ndarray  # [NEAREST, I] float32, the item's score for that user; -inf: there is none
    lift_from: int  # events of a history from which on it may be lifted for
    neighbours: int | None = None  # items in lists made of what the neighbours of the last events say alone


def read_lists(
    model: FusionModel,
    histories: Sequence[History],
    asked_at: int | None,
    exclude_seen: bool,
    neighbours: bool = False,
) -> Lists:
    """The lists of histories, as many as WORK allows. neighbours: those of the neighbours alone too, if it has any.

    asked_at: ms at which all of them are asked, None = with their last event.
    """
    catalogue = len(model.item_vectors.known)
    histories = histories[: users_read(catalogue)]
    lengths = np.array([len(history) for history in histories])
    lists = Lists(
        items=np.full((len(histories), LIST), -1, np.int64),
        scores=np.full((len(histories), LIST), -np.inf, np.float32),
        users=np.zeros((0, catalogue), np.int64),
        own=np.zeros((0, catalogue), np.float32),
        lift_from=min(max(1, int(np.quantile(lengths, SHORT))), model.config.long_window),
    )
    gap = np.zeros((0, catalogue), np.float32)  # by which `own` falls short of the last score of that user's list
    alone, done = np.zeros(catalogue, bool), 0
    neighbours &= model.channels.neighbours is not None and len(model.channels.neighbours.items) > 0
    for scores, batch, moments in catalogue_scores(model, histories, asked_at, exclude_seen):
        block = slice(done, done + len(scores))
        best = top_k(scores, LIST)
        lists.items[block, : best.shape[1]] = best
        lists.scores[block, : best.shape[1]] = np.take_along_axis(scores, best, 1)
        with np.errstate(invalid="ignore"):  # -inf less -inf
            short = lists.scores[block, -1:] - scores
        short[(lists.items[block, -1] < 0) | (lengths[block] < lists.lift_from)] = np.inf  # no place that can be taken
        np.put_along_axis(short, best, np.inf, 1)
        near = np.argpartition(short, min(NEAREST, len(short)) - 1, axis=0)[:NEAREST]
        gap = np.concatenate([gap, np.take_along_axis(short, near, 0)])
        users, own = (
            np.concatenate([lists.users, near + done]),
            np.concatenate([lists.own, np.take_along_axis(scores, near, 0)]),
        )
        order = np.argsort(gap, axis=0, kind="stable")[:NEAREST]
        gap, lists.users, lists.own = (np.take_along_axis(array, order, 0) for array in (gap, users, own))
        if neighbours:
            alone |= _listed_by_neighbours(model, batch, moments, histories[block], exclude_seen)
        done += len(scores)
    lists.own[np.isinf(gap)] = -np.inf
    lists.neighbours = int(alone.sum()) if neighbours else None
    return lists


def users_read(catalogue: int) -> int:
    """How many users' lists are looked at, of a catalogue of so many items."""
    return max(1, min(USERS, WORK // max(catalogue, 1)))


@torch.inference_mode()
def _listed_by_neighbours(
    model: FusionModel, batch: Batch, moments: torch.Tensor, histories: Sequence[History], exclude_seen: bool
) -> np.ndarray:
    """[I] bool: what is in lists made of what the neighbours of the last events say alone."""
    assert model.channels.neighbours is not None
    said = model.channels.neighbours(batch.items, moments, torch.tensor([1.0, 0.0]).expand(len(moments), 2)).numpy()
    exclude(said, model, histories, exclude_seen)
    best = top_k(said, LIST)
    listed = np.zeros(said.shape[1], bool)
    listed[best[best >= 0]] = True
    return listed


def lift_items(
    lists: Lists, enough: int, most: int, targets: np.ndarray | None = None, may_lose: float = 0.0
) -> tuple[np.ndarray, int]:
    """Lift items that are in no list, the nearest first, until lists hold `enough` of them: (lifts [I], items held).

    At most so many are lifted. An item is lifted over a last place that holds what is in another list as well; on the
    way to it one other item may leave its only list, as what is last there then may be in more (without that it ends
    early: on Online Retail with 35 % of the items held, and not 42 %). None is lifted that would come into lists of
    users beyond its NEAREST, who are not counted here. targets: [N] what each user took next; then it ends before the
    NDCG@10, summed over the users, has lost more than `may_lose`. Changes `lists`.
    """
    items, scores = lists.items, lists.scores
    held = np.bincount(items[items >= 0], minlength=lists.own.shape[1])
    reached, lost, lift = int((held > 0).sum()), 0.0, np.zeros(lists.own.shape[1], np.float32)
    beyond = np.full(lists.own.shape[1], np.inf)  # a lift that users who were not remembered may see
    if len(lists.own) == NEAREST:
        beyond = np.where(lists.own[-1] > -np.inf, scores[lists.users[-1], -1] - lists.own[-1], np.inf)
    waiting = np.flatnonzero((held == 0) & (lists.own[0] > -np.inf))
    waiting = waiting[np.argsort((scores[lists.users[0], -1] - lists.own[0])[waiting], kind="stable")]
    for item in waiting:
        if reached >= enough or not most:
            break
        users, own = lists.users[:, item], lists.own[:, item]
        last = scores[users, -1]
        free = (own > -np.inf) & (held[items[users, -1]] > 1)
        if not free.any():
            continue
        needed = max(0.0, float((last - own)[free].min())) + MARGIN
        if needed >= beyond[item]:
            continue
        enters = own + needed > last
        taken, lifted = users[enters], (own + needed)[enters]
        dropped, times = np.unique(items[taken, -1], return_counts=True)
        gone = int((held[dropped] <= times).sum())
        if gone > 1:
            continue
        if targets is not None:
            lost += sum(_gain(items[user], targets[user]) for user in taken)
        held[dropped] -= times
        for user, score in zip(taken, lifted, strict=True):
            place = int((scores[user] >= score).sum())
            for row, value in ((items[user], item), (scores[user], score)):
                row[place + 1 :] = row[place:-1].copy()
                row[place] = value
        if targets is not None:
            lost -= sum(_gain(items[user], targets[user]) for user in taken)
            if lost > may_lose:
                break
        lift[item] = needed
        held[item] += len(taken)
        reached, most = reached + 1 - gone, most - 1
    return lift, reached


def _gain(items: np.ndarray, target: int) -> float:
    """What a target adds to NDCG@10 with this list."""
    return float(gains(np.flatnonzero(items == target) + 1).sum())


def choose_reach(
    model: FusionModel, cases: list[tuple[History, int]], asked_at: int | None, exclude_seen: bool, cost: float
) -> tuple[float, float]:
    """The share of the catalogue that lists shall hold: ENOUGH times what those of the neighbours alone hold.

    Less, if lifting so far costs more than a share `cost` of the validation NDCG@10. And the items that were lifted
    for it, per user. cases: (history, item that came next), of users as many as will be read of the trained model;
    asked_at: ms at which all of them are asked, None = with their last event. 0, 0 = lists stay as they are: without
    neighbours, where there are too few cases to tell, and where none is in its list of ten.
    """
    if len(cases) < LEAST or not cost:
        return 0.0, 0.0
    lists = read_lists(model, [history for history, _ in cases], asked_at, exclude_seen, neighbours=True)
    targets = np.array([target for _, target in cases[: len(lists.items)]])
    gained = sum(_gain(items, target) for items, target in zip(lists.items, targets, strict=True))
    if lists.neighbours is None or not gained:
        return 0.0, 0.0
    enough = int(np.ceil(ENOUGH * lists.neighbours))
    lift, reached = lift_items(lists, enough, lists.own.shape[1], targets, cost * gained)
    return min(reached, enough) / lists.own.shape[1], np.count_nonzero(lift) / len(lists.items)


def lift_until(
    model: FusionModel,
    histories: Sequence[History],
    asked_at: int | None,
    exclude_seen: bool,
    share: float,
    lifted: float,
) -> int:
    """Have a model lift items until lists of these histories hold a share of the catalogue: of so many items now.

    lifted: items per history for which that was worth its price; twice as many may be lifted.
    """
    lists = read_lists(model, histories, asked_at, exclude_seen)
    most = math.ceil(2 * lifted * len(lists.items))
    lift, reached = lift_items(lists, round(share * lists.own.shape[1]), most)
    if lift.any():
        model.channels.lift.copy_(torch.from_numpy(lift))
        model.channels.lift_from.fill_(lists.lift_from)
    return reached
