"""Histories read lately, so that a repeated recommendation does not read a user's thousand events again."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from typing import Any

from springtide.serving.metrics import Metrics, NoMetrics
from springtide.serving.store import HistoryStore

History = list[dict[str, Any]]


class HistoryCache:
    """`read` is the store's `history` at the cost of its `version`, as long as the user's events are the same.

    Bounded by the events held, over all users; those of the user read longest ago go first. May be called from several
    threads. hits and misses count the reads so far.
    """

    def __init__(self, store: HistoryStore, limit: int, max_events: int, metrics: Metrics | None = None) -> None:
        """limit: events of one history. max_events: events held in all, about 0.4 KB each; 0 holds none."""
        self._store, self._limit, self._max_events = store, limit, max_events
        self._metrics = metrics or NoMetrics()
        self._lock = threading.Lock()
        self._held: OrderedDict[str, tuple[int, History]] = OrderedDict()
        self._weight = 0
        self.hits = self.misses = 0

    def read(self, user_id: str) -> History:
        """The user's most recent events, oldest first, for reading only. Raises SpringtideError as the store does."""
        # The version comes first: events that arrive between the two calls are then read again, never missed.
        version = self._store.version(user_id)
        held = self._find(user_id, version)
        self._metrics.count("springtide_cache", cache="history", result="miss" if held is None else "hit")
        if held is not None:
            return self._kept(held)
        history = self._store.history(user_id, self._limit)
        if len(history) < self._max_events:
            self._hold(user_id, version, history)
        return history

    def last(self, user_id: str) -> History:
        """What was read of this user last, without asking the store; empty if that is not held."""
        with self._lock:
            return self._kept(self._held.get(user_id, (0, []))[1])

    def _find(self, user_id: str, version: int) -> History | None:
        with self._lock:
            held = self._held.get(user_id)
            if held is None or held[0] != version:
                self.misses += 1
                return None
            self._held.move_to_end(user_id)
            self.hits += 1
            return held[1]

    def _kept(self, history: History) -> History:
        """Without the events that have grown too old since they were read."""
        if self._store.retention.days is None:
            return history
        return history[bisect.bisect_left(history, self._store.retention.oldest(), key=lambda e: e["timestamp"]) :]

    def _hold(self, user_id: str, version: int, history: History) -> None:
        with self._lock:
            if (before := self._held.pop(user_id, None)) is not None:
                self._weight -= 1 + len(before[1])
            self._held[user_id] = version, history
            self._weight += 1 + len(history)  # a user without events takes space too
            while self._weight > self._max_events:
                _, (_, dropped) = self._held.popitem(last=False)
                self._weight -= 1 + len(dropped)
