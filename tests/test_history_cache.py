"""Cached histories: never other than the store's, bounded, and read once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redis_server import RedisServer
from springtide.serving.history_cache import HistoryCache
from springtide.serving.store import open_store
from springtide.serving.store_rows import Retention
from springtide.serving.store_sqlite import SQLiteStore

DAY = 86_400_000


def event(event_id: Any, user: str = "u", timestamp: int = 1) -> dict[str, Any]:
    return {"event_id": str(event_id), "user_id": user, "item_id": f"i{event_id}", "timestamp": timestamp}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    opened = SQLiteStore(tmp_path / "log")
    yield opened
    opened.close()


def test_a_history_is_read_once_until_an_event_comes(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    whole = store.history
    monkeypatch.setattr(store, "history", lambda user, limit: [reads.append(user), whole(user, limit)][1])
    cache = HistoryCache(store, 10, 100)
    store.append([event(1), event(2, "v")])
    for _ in range(3):
        assert [e["item_id"] for e in cache.read("u")] == ["i1"]
    store.append([event(3, "v")])
    cache.read("u")
    assert reads == ["u"]
    store.append([event(4)])
    assert [e["item_id"] for e in cache.read("u")] == ["i1", "i4"]
    store.seed("log", [("x", "y", 1, None, None)])
    cache.read("u")
    assert reads == ["u", "u", "u"]
    assert (cache.hits, cache.misses) == (3, 3)


def test_events_that_a_failover_lost_are_not_shown_for_their_successors(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    store = open_store(server.url)
    cache = HistoryCache(store, 10, 100)
    for lost in (True, False):
        store.append([event(1), event(2, "v")])
        store.append([event(3) if lost else event(4)])
        assert [e["item_id"] for e in cache.read("u")] == (["i1", "i3"] if lost else ["i1", "i4"])
        redis.Redis(port=server.port).flushdb()
    store.close()
    server.stop()


def test_no_more_events_are_held_than_allowed(store: SQLiteStore) -> None:
    store.append([event(f"{user}-{n}", str(user)) for user in range(20) for n in range(user)])
    cache = HistoryCache(store, 15, 50)
    for user in [*range(20), *map(str, range(20)), *(f"nobody-{n}" for n in range(200))]:
        assert cache.read(str(user)) == store.history(str(user), 15)
        assert sum(1 + len(history) for _, history in cache._held.values()) == cache._weight <= 50
    assert len(cache._held) == 50
    nothing = HistoryCache(store, 15, 0)
    assert nothing.read("3") == nothing.read("3") == store.history("3")
    assert (nothing.hits, nothing.misses) == (0, 2)


def test_what_grows_too_old_while_held_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SQLiteStore(tmp_path / "log", Retention(days=1))
    now = int(time.time() * 1000)
    store.append([event(1, timestamp=now - DAY + 60_000), event(2, timestamp=now)])
    cache = HistoryCache(store, 10, 100)
    assert len(cache.read("u")) == 2
    monkeypatch.setattr("springtide.serving.store_rows.time.time", lambda: now / 1000 + 120)
    assert [e["item_id"] for e in cache.read("u")] == ["i2"]
    assert cache.hits == 1
    store.close()


def test_what_was_read_last_is_there_without_the_store(store: SQLiteStore) -> None:
    store.append([event(1)])
    cache = HistoryCache(store, 10, 100)
    assert cache.last("u") == []
    read = cache.read("u")
    store.close()
    assert cache.last("u") == read


USERS = st.sampled_from("uvw")
STEPS = st.lists(st.one_of(USERS, st.tuples(USERS, st.integers(0, 9)), st.integers(0, 2)), max_size=40)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, bound=st.integers(0, 12))
def test_the_cache_says_what_the_store_says(tmp_path: Path, steps: list[Any], bound: int) -> None:
    for file in tmp_path.glob("log*"):
        file.unlink()
    store = SQLiteStore(tmp_path / "log")
    cache = HistoryCache(store, 4, bound)
    for number, step in enumerate(steps):
        if isinstance(step, str):
            assert cache.read(step) == store.history(step, 4)
        elif isinstance(step, int):
            store.seed(str(step), [("u", f"s{number}", 1, None, None)])
        else:
            store.append([event(number, *step)])
    store.close()
