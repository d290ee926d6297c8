"""What is stored while a model is served reaches the model: items added before the next answer, events soon after.

Every Scorer reads the store by itself, so that all replicas come to know the same. One that cannot read it goes on with
what it knows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from springtide.errors import SpringtideError
from springtide.model.recommender import NewItem
from springtide.serving.engine import Engine
from springtide.serving.store import HistoryStore
from springtide.serving.store_rows import StoredItem
from springtide.serving.tails import Tails
from springtide.text.encoder import name_in

log = logging.getLogger("ray.serve")
Json = dict[str, Any]
PAGE = 2000  # events counted in one go
ITEMS_PAGE = 500  # added items read in one go, some 3 KB each: a store answers within a Scorer's short patience
REST_S = 1.0  # after the store has failed, before it is asked again
PREPARE_S = 10.0  # longest that a new model counts before it serves
AHEAD_MS = 3_600_000  # events later than now by more are not counted
PRECEDING = 50  # events of a user not seen lately that are read to find what came before new ones


class NoLogHere(SpringtideError):
    """The event log is a file that this node does not have: nothing is wrong, and nothing can be known of it."""


@dataclass
class Place:
    """How far one engine has come."""

    log: str | None = None  # identity of the event log that this is of
    revision: int = 0  # of the items added
    cursor: int | None = None  # in the event log; None before the first look
    observed: int = 0  # events counted
    at: float = 0.0  # when it knew all that was stored, seconds since 1970
    tails: Tails = field(default_factory=Tails)


class Live:
    """Brings engines up to date. May be called from several threads at once."""

    def __init__(self, open_store: Callable[[], HistoryStore]) -> None:
        """open_store is called when the store is needed first, and again after it failed to open."""
        self.observe_at_most = 200_000  # of the latest events, by an engine that begins
        self._open = open_store
        self._store: HistoryStore | None = None
        self._adding, self._observing = threading.Lock(), threading.Lock()  # items never wait for events to be read
        self._places: WeakKeyDictionary[Engine, Place] = WeakKeyDictionary()
        self._rest_until = 0.0
        self._none_here = False

    def place(self, engine: Engine) -> Place:
        return self._places.setdefault(engine, Place())

    def prepare(self, engine: Engine, count: bool = True) -> None:
        """Bring an engine that nobody uses yet up to date. A store that fails is logged and left for later.

        count: whether events are counted too, as far as PREPARE_S allow; the rest follows while it serves.
        """
        self.add_items([engine])
        until = time.monotonic() + PREPARE_S
        while count and self.observe([engine]) and time.monotonic() < until:
            pass

    def add_items(self, engines: Iterable[Engine]) -> bool:
        """Give engines the items added since they last looked; one question to the store if there are none.

        Returns whether they know all of them, False where the store does not tell. Where there is none, they do.
        """
        engines = list(engines)
        store = self._reachable()
        if store is None:
            return self._none_here
        try:
            newest = store.items_revision()
            if any(self.place(engine).revision > newest for engine in engines):
                newest = self._newest_for_sure(engines, store)
            if any(self.place(engine).revision < newest for engine in engines):
                for engine in engines:
                    self._add_to(engine, store)
        except Exception as error:  # whatever is wrong with an item, answers go on without it
            self._rest("added items not read", error)
            return False
        return True

    def observe(self, engines: Iterable[Engine]) -> bool:
        """Let engines count the next PAGE of events, those after the end of the log that each was trained on.

        Returns whether there may be more.
        """
        store, more = self._reachable(), False
        if store is None:
            return False
        try:
            with self._observing:
                for engine in engines:
                    more |= self._observe_with(engine, store)
        except SpringtideError as error:
            self._rest("events not counted", error)
            return False
        return more

    def told(self, engine: Engine) -> Json:
        """How far an engine has come, for /v1/models."""
        place = self.place(engine)
        behind = {"seconds_behind": round(time.time() - place.at, 1)} if place.at else {}
        cursor = {"cursor": place.cursor} if place.cursor is not None else {}
        return {"observed_events": place.observed, "items_revision": place.revision, **cursor, **behind}

    def _add_to(self, engine: Engine, store: HistoryStore) -> None:
        with self._adding:
            place = self.place(engine)
            # Page by page, each noted: what a store that fails in between has told is not asked for again.
            while found := store.items_since(place.revision, ITEMS_PAGE):
                if engine.takes_new_items:
                    engine.put_items(new_items(engine, found))
                place.revision = found[-1]["revision"]
                if len(found) < ITEMS_PAGE:
                    break

    def _newest_for_sure(self, engines: Iterable[Engine], store: HistoryStore) -> int:
        """The store's last revision, while no other thread adds items of a later one.

        A place beyond it then is of a store that lost the last ones (see `_begin_anew`), and begins anew.
        """
        with self._adding:
            newest = store.items_revision()
            for engine in engines:
                if self.place(engine).revision > newest:
                    self.place(engine).revision = 0
        return newest

    def _observe_with(self, engine: Engine, store: HistoryStore) -> bool:
        place = self.place(engine)
        self._begin_anew(place, store)
        if place.cursor is None:
            place.cursor, place.tails = store.cursor(self.observe_at_most), Tails(events=max(1, engine.distances))
        began = time.time()
        rows, cursor = store.since(place.cursor, PAGE)
        self._add_to(engine, store)  # events of an item that was just added are known, whoever asked for what before
        # One event of a clock that is years ahead would make everything else old for recent popularity.
        latest = time.time() * 1000 + AHEAD_MS
        fresh = [row for row in rows if engine.log_end < row["timestamp"] <= latest]
        by_user: dict[str, list[Json]] = defaultdict(list)
        for row in fresh:
            by_user[row["user_id"]].append(row)
        tails = place.tails
        pasts = {
            user: tails.of(user) if user in tails else store.history(user, PRECEDING + len(new))
            for user, new in by_user.items()
        }
        before = {user: _before(pasts[user], new) for user, new in by_user.items()}
        if by_user:
            engine.observe([(before[user], new) for user, new in by_user.items()])
        for user, past in before.items():
            tails.add(user, by_user[user] if user in tails else [*past, *by_user[user]])
        place.cursor, place.observed = cursor, place.observed + len(fresh)
        if len(rows) < PAGE:
            place.at = began
        return len(rows) == PAGE

    def _begin_anew(self, place: Place, store: HistoryStore) -> None:
        """Leave a place that is not of the log as it is now: another log, or one that lost its end in a failover."""
        identity, end = store.identity(), store.cursor(0)
        if place.log not in (None, identity):
            log.warning("the event log is another one now; its events are counted from its beginning")
            with self._adding:
                place.cursor, place.revision = None, 0
        elif place.cursor is not None and place.cursor > end:
            log.warning("the event log ends before what was read of it; events that come from now on are counted")
            place.cursor = end  # all before it was counted already
        place.log = identity

    def _reachable(self) -> HistoryStore | None:
        if time.monotonic() < self._rest_until:
            return None
        if self._store is None:
            try:
                with self._adding:
                    self._store = self._store or self._open()
                self._none_here = False
            except NoLogHere as error:  # looked for again: on one machine the Ingress may make it any moment
                self._rest_until = time.monotonic() + REST_S
                if not self._none_here:
                    log.warning("%s", error)
                self._none_here = True
            except SpringtideError as error:
                self._rest("the event log cannot be opened", error)
        return self._store

    def _rest(self, what: str, error: Exception) -> None:
        self._rest_until = time.monotonic() + REST_S
        log.error("%s: %r", what, error)


def new_items(engine: Engine, stored: list[StoredItem]) -> list[NewItem]:
    """Stored items as a model takes them. A vector of another encoder, or of its width, says nothing to this model."""
    width = engine.text_width
    vectors, others = np.zeros((len(stored), width), np.float32), 0
    for row, item in enumerate(stored):
        vector = np.frombuffer(item["vector"] or b"", "<f4")
        known = item["encoder"] is None or name_in(item["encoder"]) == engine.encoder
        if known and len(vector) == width:
            vectors[row] = vector
        else:
            others += bool(len(vector))
    if others:
        log.warning("%d added items were read by another encoder than %s's; put them again", others, engine.label)
    texts = [item["text"] or "" for item in stored]
    features = engine.bundle.features.apply(vectors, texts)
    return [
        NewItem(item["item_id"], item["title"], item["categories"], vectors[row], features[row])
        for row, item in enumerate(stored)
    ]


def _before(history: list[Json], new: list[Json]) -> list[Json]:
    """The events of a history that came before the first of the new ones."""
    first = min(row["timestamp"] for row in new)
    own = {(row["item_id"], row["timestamp"]) for row in new}
    return [e for e in history if e["timestamp"] <= first and (e["item_id"], e["timestamp"]) not in own]
