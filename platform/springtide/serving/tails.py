"""What users did last, held while the event log is followed: a store shows no longer what came before old events."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

USERS = 10_000
EVENTS = 10  # of each
Json = dict[str, Any]


class Tails:
    """The latest events of the users who were seen last."""

    def __init__(self, users: int = USERS, events: int = EVENTS) -> None:
        self._users, self._events = users, events
        self._of: OrderedDict[str, list[Json]] = OrderedDict()

    def __contains__(self, user: str) -> bool:
        return user in self._of

    def of(self, user: str) -> list[Json]:
        """The user's events, {item_id, timestamp}, oldest first; none of a user who is not held."""
        return self._of.get(user, [])

    def add(self, user: str, events: Iterable[Json]) -> None:
        """Hold further events of a user; whoever was seen least lately makes room."""
        both = [*self.of(user), *({"item_id": e["item_id"], "timestamp": e["timestamp"]} for e in events)]
        self._of[user] = sorted(both, key=lambda event: event["timestamp"])[-self._events :]
        self._of.move_to_end(user)
        if len(self._of) > self._users:
            self._of.popitem(last=False)
