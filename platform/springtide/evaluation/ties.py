"""Events with equal times: how many there are, and what another order of them does to the figures.

The order within a tie is an accident of the log, yet it decides what is the last event and so, under leave-one-out,
what is the target. Nothing is trained again, so no training event may become a target and no target a training event:
ties are put in another order within each part, and a validation and a test target of the same moment may change places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from springtide.evaluation.metrics import SEED, user_metrics
from springtide.evaluation.ranking import (
    WARM,
    Cases,
    FlatSequences,
    Score,
    build_cases,
    headline_mask,
    target_ranks,
)
from springtide.schemas import TEST, VALID


def count(cases: Cases) -> dict[str, int]:
    """How many events of the log and how many targets share their time with a neighbour of the same user.

    `targets_with_history`: with the last event shown; `targets_with_next`: with the event right after the target.
    """
    events = cases.events
    equal = (np.diff(events.users) == 0) & (np.diff(events.timestamps) == 0)
    after, before = np.append(equal, False), np.append(False, equal)
    times = events.timestamps
    shown = cases.lengths > 0
    with_history = shown & (times[np.maximum(cases.ends - 1, 0)] == times[cases.rows])
    return {
        "events": len(times),
        "events_tied": int((before | after).sum()),
        "targets": len(cases),
        "targets_with_history": int(with_history.sum()),
        "targets_with_next": int(after[cases.rows].sum()),
        "targets_with_either": int((with_history | after[cases.rows]).sum()),
    }


def reorder(events: FlatSequences, keys: np.ndarray, swap: bool) -> FlatSequences:
    """The sequences with ties in ascending order of keys [N], one for each event; np.arange(N) is the order of the log.

    Only events of one user, time and part change places. With `swap`, so do a user's first validation target and first
    test target of the same time, if the former has the larger key: then that one is the target of the test.
    """
    users = events.users
    moved_on = (np.diff(users) != 0) | (np.diff(events.timestamps) != 0) | (np.diff(events.parts) != 0)
    group = np.cumsum(np.append(True, moved_on)[: len(users)])
    order = np.lexsort((keys, group))
    if swap:
        parts, targets = events.parts, events.targets[order]
        first = [_first_rows(users, (parts == part) & targets, len(events.user_ids)) for part in (VALID, TEST)]
        both = (first[0] >= 0) & (first[1] >= 0)
        valid, test = first[0][both], first[1][both]
        level = events.timestamps[valid] == events.timestamps[test]
        valid, test = valid[level], test[level]
        turn = keys[order[valid]] > keys[order[test]]
        order[valid[turn]], order[test[turn]] = order[test[turn]], order[valid[turn]]
    return replace(
        events, items=events.items[order], actions=events.actions[order], ratings=events.ratings[order],
        targets=events.targets[order],
    )  # fmt: skip


def effect(
    cases: Cases, part: int, split: str, scorers: Mapping[str, Score], item_order: np.ndarray, *, orders: int,
    swap: bool, exclude_seen: bool, batch_size: int,
) -> dict[str, Any]:  # fmt: skip
    """NDCG@10 of each scorer in the order of the log, in random orders of the ties, and with ties sorted by item.

    cases: those of `part`; item_order: [I] the place of each catalogue row when item ids are sorted; swap: see
    `reorder`. Nothing is fitted again. Returns {"orders", "changed_targets" (mean over orders), "scorers": {name:
    {"log", "mean", "min", "max", "by_item"}}}.
    """
    events, rng = cases.events, np.random.default_rng(SEED)

    def ndcg(asked: Cases, score: Score) -> np.ndarray:
        ranks = target_ranks(asked, score, exclude_seen=exclude_seen, batch_size=batch_size)
        return user_metrics(ranks, [10])["ndcg@10"]

    logged, about = headline_mask(cases)
    as_logged = {name: ndcg(cases, score) for name, score in scorers.items()}
    means: dict[str, list[float]] = {name: [] for name in scorers}
    changed = []
    for number in range(orders + 1):  # one at a time: each holds a copy of the log
        keys = rng.random(len(events.items)) if number < orders else item_order[events.items].astype(np.float64)
        other = build_cases(reorder(events, keys, swap), part, split)
        moved = _changed(cases, other)  # the others are asked the same question again, so the answer is known
        again, headline = other.take(moved), other.slices == WARM if about == WARM else np.ones(len(other), bool)
        for name, score in scorers.items():
            values = as_logged[name].copy()
            values[moved] = ndcg(again, score)
            means[name].append(float(values[headline].mean()))
        changed.append(float((other.targets != cases.targets).mean()))
    return {
        "orders": orders,
        "changed_targets": float(np.mean(changed[:-1])),
        "scorers": {
            name: {"log": float(as_logged[name][logged].mean()), "mean": float(np.mean(found[:-1])),
                   "min": min(found[:-1]), "max": max(found[:-1]), "by_item": found[-1]}
            for name, found in means.items()
        },
    }  # fmt: skip


def _changed(cases: Cases, other: Cases) -> np.ndarray:
    """Numbers of the cases whose history or target is not the same in both; their users are."""
    a, b = cases.events, other.events
    same = (a.items == b.items) & (a.actions == b.actions)
    same &= (a.ratings == b.ratings) | (np.isnan(a.ratings) & np.isnan(b.ratings))
    wrong = np.concatenate([[0], np.cumsum(~same)])
    history = wrong[cases.ends] > wrong[a.offsets[cases.users]]
    return np.flatnonzero(history | (cases.targets != other.targets))


def _first_rows(users: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """[count] each user's first row in the mask [N], -1 = none."""
    rows = np.flatnonzero(mask)[::-1]
    out = np.full(count, -1)
    out[users[rows]] = rows
    return out
