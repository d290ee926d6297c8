"""What every event log shares: the rows that go in, checked once, and the rule for how much a history may show."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from springtide.errors import SpringtideError

DAY_MS = 86_400_000
REMOVAL_DELAY_MS = DAY_MS
CHUNK = 20_000  # rows of one transaction in the background: short enough that live events are not kept waiting
LAST_TIMESTAMP = 2**53  # the greatest integer that a double, Redis' kind of number, holds exactly

EventRow = tuple[str, str, str, int, str | None, float | None]  # event_id, then as SeedRow
SeedRow = tuple[str, str, int, str | None, float | None]  # user_id, item_id, timestamp (ms), action, rating
HistoryRow = tuple[str, int, str | None, float | None]  # the same of one user


class AddedItem(TypedDict):
    """An item that came while the model was being served."""

    item_id: str
    title: str
    categories: list[str]
    text: str | None
    vector: bytes | None  # of the text: little-endian float32
    encoder: str | None  # identity of the one that made the vector; None: stored before it was told


class StoredItem(AddedItem):
    revision: int  # grows with every item put, over all of them


@dataclass(frozen=True)
class Retention:
    """How much of a user's history is kept. None keeps all.

    Histories never show more, from the moment a limit is passed. The rows themselves are removed in the background, and
    live ones at the earliest REMOVAL_DELAY_MS after their arrival: until then their event_id still makes a repeated
    call harmless, and whoever follows the log with `since` has time to read them.
    """

    events: int | None = None  # the most recent ones of each user
    days: float | None = None  # age by the event's own timestamp

    def most(self, limit: int) -> int:
        return limit if self.events is None else min(limit, self.events)

    def oldest(self, now_ms: int | None = None) -> int:
        """The earliest timestamp (ms) that may be shown."""
        if self.days is None:
            return -LAST_TIMESTAMP
        return milliseconds(now_ms) - round(self.days * DAY_MS)


def milliseconds(now_ms: int | None = None) -> int:
    """The time since 1970 UTC, or the one given."""
    return int(time.time() * 1000) if now_ms is None else now_ms


def event_rows(events: Sequence[dict[str, Any]]) -> list[EventRow]:
    """Check the events of one call. Raises SpringtideError that names the first one that cannot be stored."""
    return [_row(number, event) for number, event in enumerate(events)]


def _row(number: int, event: dict[str, Any]) -> EventRow:
    texts = [event.get(name) for name in ("event_id", "user_id", "item_id")]
    for name, text in zip(("event_id", "user_id", "item_id"), texts, strict=True):
        if not isinstance(text, str) or not text or not _is_unicode(text):
            raise _unfit(number, name, "text")
    timestamp, action, rating = event.get("timestamp"), event.get("action"), event.get("rating")
    if type(timestamp) is not int or abs(timestamp) > LAST_TIMESTAMP:
        raise _unfit(number, "timestamp", "a whole number of milliseconds")
    if action is not None and not (isinstance(action, str) and _is_unicode(action)):
        raise _unfit(number, "action", "text")
    if rating is not None and (isinstance(rating, bool) or not isinstance(rating, (int, float))):
        raise _unfit(number, "rating", "a number")
    event_id, user_id, item_id = (str(text) for text in texts)
    return event_id, user_id, item_id, timestamp, action, None if rating is None else float(rating)


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode("utf-8"))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _unfit(number: int, name: str, kind: str) -> SpringtideError:
    return SpringtideError(f"event {number} of the call: {name} must be {kind}; nothing of the call was stored")


def history_event(item_id: str, timestamp: int, action: str | None, rating: float | None) -> dict[str, Any]:
    """One event as histories show it: without what was not given."""
    event: dict[str, Any] = {"item_id": item_id, "timestamp": timestamp}
    if action is not None:
        event["action"] = action
    if rating is not None:
        event["rating"] = rating
    return event


def merged(read: Callable[[int], tuple[list[HistoryRow], list[HistoryRow]]], limit: int) -> list[dict[str, Any]]:
    """The most recent events of one user, at most `limit`, oldest first, of the imported log and of live events.

    read: a count -> so many of the most recent rows of each, oldest first. Live events that were exported, prepared and
    imported again are in both: a live one is left out whose item and time are among the imported ones.
    """
    count = limit
    while True:
        seeded, live = read(count)
        known = {row[:2] for row in seeded}
        fresh = [row for row in live if row[:2] not in known]
        # Rows not read matter in two cases: live ones, unless `limit` rows come after them for certain, and imported
        # ones of the earliest time read, which a live one may be.
        short = len(live) == count > 0 and len(fresh) + sum(row[1] > live[0][1] for row in seeded) < limit
        cut = len(seeded) == count > 0 and any(row[1] == seeded[0][1] for row in fresh)
        if not (short or cut):
            # An imported log came before live events, and the sort keeps the order of equal times.
            return [history_event(*row) for row in sorted([*seeded, *fresh], key=lambda row: row[1])[-limit:]]
        count *= 2
