"""What users' own events added to the transition counts they are scored with, where distance alone does not tell.

A moment must be scored as if its owner's later events had never been counted. Where no item comes twice, what they
added from a recent item to the target is decay^(distance - 1), and the memory works that out by itself. Where the
target is taken again later, or a recent item stands there more than once, it is counted here.
"""

from __future__ import annotations

import numpy as np

BLOCK = 200_000  # events that are counted together; users are never split


def own_counts(
    items: np.ndarray, users: np.ndarray, wanted: np.ndarray, distances: int, decay: float, recent: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts that leave with the events from q on, for the events q for which that takes counting.

    items [E] int: histories laid end to end, each in time order; users [E]: whose they are, ascending; wanted [E]: what
    is not wanted is nobody's successor. Returns (row [E] int64 of q in the second, -1 = distance tells; [R, recent]
    float32: for the item that stands j + 1 events before q, the sum of decay^(d - 1) over all the owner's wanted events
    of q's item, from q on, that came d <= `distances` events after an event of that item).
    """
    row, counted = np.full(len(items), -1, np.int64), [np.zeros((0, recent), np.float32)]
    edges = np.flatnonzero(np.diff(users, prepend=-1))
    ends = np.append(edges[1:], len(items)) if len(edges) else edges
    begin, found = 0, 0
    while begin < len(items):
        end = int(max(ends[ends <= begin + BLOCK].max(initial=0), ends[ends > begin][0]))
        part = slice(begin, end)
        asking, counts = _block(items[part], users[part], wanted[part], distances, decay, recent)
        row[begin + asking] = found + np.arange(len(asking))
        counted.append(counts)
        begin, found = end, found + len(asking)
    return row, np.concatenate(counted)


def _block(
    items: np.ndarray, users: np.ndarray, wanted: np.ndarray, distances: int, decay: float, recent: int
) -> tuple[np.ndarray, np.ndarray]:
    """(events that take counting, ascending; their counts [R, recent])."""
    place, size = np.arange(len(items)), int(items.max(initial=0)) + 1
    first = np.searchsorted(users, users)  # of the owner
    _, taken = np.unique(users * size + items, return_inverse=True)  # whose item it is, as one number
    asking = np.flatnonzero(wanted & (place > first) & (_again(taken, wanted) | _repeats(items, first, distances)))
    if not len(asking):
        return asking, np.zeros((0, recent), np.float32)
    # Every pair (recent item, event of an item that is asked about), from the owner's last event backwards.
    after = np.flatnonzero(wanted & np.isin(taken, taken[asking]))
    pairs = [(after[after - d >= first[after]], d) for d in range(1, distances + 1)]
    event = np.concatenate([q for q, _ in pairs])
    key = np.concatenate([taken[q] * size + items[q - d] for q, d in pairs])
    share = np.concatenate([np.full(len(q), decay ** (d - 1)) for q, d in pairs])
    order = np.lexsort((-event, key))
    keys, starts = np.unique(key[order], return_index=True)
    total = np.concatenate([[0.0], np.cumsum(share[order])])
    span = len(items) + 1
    backwards = np.searchsorted(keys, key[order]) * span + len(items) - event[order]  # ascending
    counts = np.zeros((len(asking), recent), np.float32)
    for back in range(recent):
        there = np.flatnonzero(asking - 1 - back >= first[asking])
        event, before = asking[there], items[asking[there] - 1 - back]
        wanted_key = taken[event] * size + before
        number = np.searchsorted(keys, wanted_key).clip(max=len(keys) - 1)
        stop = np.searchsorted(backwards, number * span + len(items) - event, side="right")
        counts[there, back] = np.where(keys[number] == wanted_key, total[stop] - total[starts[number]], 0)
    return asking, counts


def _again(taken: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[E] bool: is the same item a wanted event of the same owner later?"""
    out = np.zeros(len(taken), bool)
    events = np.flatnonzero(wanted)
    events = events[np.lexsort((events, taken[events]))]
    out[events[:-1]] = taken[events[:-1]] == taken[events[1:]]
    return out


def _repeats(items: np.ndarray, first: np.ndarray, distances: int) -> np.ndarray:
    """[E] bool: do the `distances` events of the owner before this one hold an item twice?"""
    out, place = np.zeros(len(items), bool), np.arange(len(items))
    for near in range(1, distances):
        for far in range(near + 1, distances + 1):
            there = place - far >= first
            out[there] |= items[place[there] - near] == items[place[there] - far]
    return out
