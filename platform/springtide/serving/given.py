"""The history that a request brings with it, as the events that a recommendation is made from."""

from __future__ import annotations

from typing import Any

from springtide.serving.schemas import HISTORY_USED, HistoryEvent

Json = dict[str, Any]


def recent_events(history: list[HistoryEvent]) -> list[Json]:
    """The most recent HISTORY_USED events of a request, oldest first; equal times keep the order given.

    An event without a timestamp is taken to follow the one before it at once; those before the first known time share
    it.
    """
    known = next((event.timestamp for event in history if event.timestamp is not None), None)
    if known is None:
        return [_given(event) for event in history[-HISTORY_USED:]]
    times = [known := known if event.timestamp is None else event.timestamp for event in history]
    order = sorted(range(len(history)), key=times.__getitem__)[-HISTORY_USED:]
    return [{**_given(history[i]), "timestamp": times[i]} for i in order]


def _given(event: HistoryEvent) -> Json:
    """What an event says, by hand: pydantic's own dump takes several times as long, for each event of a history."""
    told: Json = {"item_id": event.item_id}
    if event.timestamp is not None:
        told["timestamp"] = event.timestamp
    if event.action is not None:
        told["action"] = event.action
    if event.rating is not None:
        told["rating"] = event.rating
    return told
