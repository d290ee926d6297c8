"""The event log, in SQLite and in a real Redis: durable, idempotent, ordered, shared by processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import springtide
from redis_server import RedisServer
from springtide.errors import SpringtideError
from springtide.serving import store_redis, store_sqlite
from springtide.serving.retaining import retain_in_background
from springtide.serving.service import WRITE_THREADS
from springtide.serving.store import HistoryStore, open_store
from springtide.serving.store_rows import AddedItem, Retention

# Appends events one by one, each acknowledged by a line on standard output.
WRITER = """
import sys
from springtide.serving.store import open_store
store = open_store(sys.argv[1])
for i in range(int(sys.argv[3])):
    store.append([{"event_id": f"{sys.argv[2]}-{i}", "user_id": "u", "item_id": str(i), "timestamp": i}])
    print(i, flush=True)
"""
DAY = 86_400_000


def event(event_id: str, item: str = "a", timestamp: int = 1, user: str = "u", **more: Any) -> dict[str, Any]:
    return {"event_id": event_id, "user_id": user, "item_id": item, "timestamp": timestamp, **more}


def items(store: HistoryStore, user: str = "u", **more: Any) -> list[str]:
    return [e["item_id"] for e in store.history(user, **more)]


def added(item_id: str, title: str = "", vector: bytes | None = None) -> AddedItem:
    return {
        "item_id": item_id,
        "title": title,
        "categories": ["x", "ü"],
        "text": None,
        "vector": vector,
        "encoder": "bert@1",
    }


def writer(url: str, name: str, count: int) -> subprocess.Popen[str]:
    source = str(Path(springtide.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(count)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip


def in_threads(count: int, work: Any) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def followed(store: HistoryStore, limit: int = 7) -> list[dict[str, Any]]:
    """Everything that `since` shows, page by page."""
    cursor, found = 0, []
    while page := store.since(cursor, limit):
        if page[1] == cursor:
            return found
        found, cursor = [*found, *page[0]], page[1]
    return found


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty event log of either kind."""
    if request.param == "sqlite":
        return f"sqlite://{tmp_path}/new%20folder/events.sqlite3"
    server: RedisServer = request.getfixturevalue("redis_server")
    redis.Redis(port=server.port).flushdb()
    return server.url


@pytest.fixture
def store(url: str) -> Iterator[HistoryStore]:
    opened = open_store(url)
    yield opened
    opened.close()


# ---------------------------------------------------------------- live events
def test_an_event_id_counts_once(store: HistoryStore) -> None:
    assert store.append([event("1", "a"), event("2", "b"), event("1", "c")]) == 2
    assert store.append([event("2", "d"), event("3", "e", 2)]) == 1
    assert items(store) == ["a", "b", "e"]
    assert store.count() == 3
    assert store.append([]) == 0


def test_oldest_first_and_ties_in_order_of_arrival(store: HistoryStore) -> None:
    store.append([event("1", "late", 9), event("2", "x", 5), event("3", "early", -1)])
    store.append([event("4", "y", 5)])
    assert items(store) == ["early", "x", "y", "late"]
    assert items(store, limit=2) == ["y", "late"]
    assert items(store, limit=0) == []
    assert items(store, "nobody") == []


def test_ties_keep_their_order_beyond_a_change_of_digits(store: HistoryStore) -> None:
    store.append([event(str(n), str(n)) for n in range(120)])
    assert items(store) == [str(n) for n in range(120)]


def test_action_and_rating_come_back(store: HistoryStore) -> None:
    store.append([event("1", action="buy", rating=4.5), event("2", "b\n‰ 𝄞")])
    assert store.history("u") == [
        {"item_id": "a", "timestamp": 1, "action": "buy", "rating": 4.5},
        {"item_id": "b\n‰ 𝄞", "timestamp": 1},
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"item_id": None}, {"user_id": ""}, {"event_id": 5}, {"timestamp": 1.5}, {"timestamp": 2**60},
        {"action": "half \ud800"}, {"rating": "5"},
    ],
    ids=str,
)  # fmt: skip
def test_a_call_is_stored_whole_or_not_at_all(store: HistoryStore, wrong: dict[str, Any]) -> None:
    with pytest.raises(SpringtideError, match=f"event 1 of the call: {next(iter(wrong))} must be"):
        store.append([event("1"), {**event("2"), **wrong}])
    assert store.count() == 0
    assert store.append([event("1")]) == 1


def test_threads_write_and_read_at_once(store: HistoryStore) -> None:
    new = [0] * 4

    def work(number: int) -> None:
        for i in range(20):
            new[number] += store.append([event(f"{number}-{i}", f"{number}-{i}", i), event(f"shared-{i}", "s", i)])
            assert store.history("u")

    in_threads(4, work)
    assert store.count() == sum(new) == 4 * 20 + 20


def test_each_call_of_a_group_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that share a commit: a refused one takes nobody with it, each gets its own count."""
    store = open_store(str(tmp_path / "log"))
    assert isinstance(store, store_sqlite.SQLiteStore)
    monkeypatch.setattr(store_sqlite, "event_rows", lambda events: [tuple(e.values()) for e in events])
    good = ("1", "u", "a", 1, None, None)
    outcomes = store._append_together([[good, good], [("2", "u", "b", 1, None, None), ("3", "u", None, 1, None, None)],
                                       [good, ("4", "u", "d", 1, None, None)]])  # type: ignore[list-item]  # fmt: skip
    assert outcomes[0] == 1 and outcomes[2] == 1
    assert isinstance(outcomes[1], SpringtideError)
    assert items(store) == ["a", "d"]
    store.close()


def test_processes_write_at_once(url: str) -> None:
    store = open_store(url)
    processes = [writer(url, name, 60) for name in "abc"]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert store.count() == 180
    assert [e["timestamp"] for e in store.history("u")] == sorted(list(range(60)) * 3)
    assert sorted(e["event_id"] for e in followed(store)) == sorted(f"{n}-{i}" for n in "abc" for i in range(60))
    store.close()


def test_an_acknowledged_event_survives_kill_9_of_its_writer(url: str) -> None:
    process = writer(url, "a", 100_000)
    assert process.stdout is not None
    for expected in range(25):
        assert process.stdout.readline().strip() == str(expected)
    os.kill(process.pid, signal.SIGKILL)
    acknowledged = 25 + len(process.communicate(timeout=60)[0].split())
    store = open_store(url)
    found = items(store, limit=1_000_000)
    assert found == [str(i) for i in range(len(found))]
    assert acknowledged <= len(found) <= acknowledged + 1  # one may have been stored and not yet told
    store.close()


def test_an_acknowledged_event_survives_kill_9_of_redis(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    acknowledged: list[int] = []
    store = open_store(server.url, timeout_s=1)

    def write_until_it_fails(number: int) -> None:
        try:
            for i in range(number, 1_000_000, 4):
                store.append([event(f"{i}-{part}", str(i), i) for part in range(3)])
                acknowledged.append(i)
        except SpringtideError:
            pass

    killer = threading.Timer(0.5, server.kill)
    killer.start()
    in_threads(4, write_until_it_fails)
    killer.join()
    server.start()
    found = [e["item_id"] for e in followed(store, 1000)]
    assert len(acknowledged) > 10
    assert set(map(str, acknowledged)) <= set(found)
    assert all(found.count(item) == 3 for item in set(found))  # each call whole
    assert store.append([event(f"{acknowledged[0]}-0")]) == 0
    store.close()
    server.stop()


# ---------------------------------------------------------------- following the log
def test_since_shows_every_event_once_while_others_write(store: HistoryStore) -> None:
    store.seed("log", [("u", "seeded", 1, None, None)])
    seen: list[str] = []
    done = threading.Event()

    def follow() -> None:
        cursor = 0
        while True:
            last = done.is_set()
            page, cursor = store.since(cursor, 5)
            seen.extend(e["event_id"] for e in page)
            if last and not page:
                return

    reader = threading.Thread(target=follow)
    reader.start()
    in_threads(6, lambda number: [store.append([event(f"{number}-{i}", timestamp=-i)]) for i in range(40)])
    done.set()
    reader.join()
    assert sorted(seen) == sorted(f"{number}-{i}" for number in range(6) for i in range(40))
    assert [e["event_id"] for e in followed(store)] == seen
    for number in range(6):
        assert [e for e in seen if e.startswith(f"{number}-")] == [f"{number}-{i}" for i in range(40)]


def test_a_version_is_another_one_where_a_lost_end_was_written_otherwise(redis_server: RedisServer) -> None:
    """A replica that took over without the last events gives their numbers again; a cache must tell them apart."""
    client, store = redis.Redis(port=redis_server.port), open_store(redis_server.url)

    def version_after(*ends: list[str]) -> int:
        client.flushdb()
        store.append([event("first")])
        for end in ends:
            store.append([event(event_id, event_id) for event_id in end])
        return store.version("u")

    versions = [
        version_after(["a", "b"]), version_after(["a", "c"]), version_after(["c", "b"]), version_after(["a"]),
        version_after([]),
    ]  # fmt: skip
    assert len(set(versions)) == 5
    assert version_after(["a"], ["b", "a"]) == versions[0]  # the same events
    store.close()


def test_a_lost_item_gives_its_revision_to_no_other(redis_server: RedisServer) -> None:
    """Of a replica that took over without the last item, a Scorer that knows it must still learn the next."""
    client, store = redis.Redis(port=redis_server.port), open_store(redis_server.url)
    first = store.put_item(added("a"))
    before = {key: client.dump(key) for key in client.scan_iter()}
    known = store.put_item(added("lost"))
    client.flushdb()
    for key, value in before.items():
        client.restore(key, 0, value)
    assert store.items_revision() == first
    time.sleep(0.002)  # a failover takes longer
    again = store.put_item(added("b"))
    assert first is not None and known is not None and again is not None and first < known < again
    assert [item["item_id"] for item in store.items_since(known)] == ["b"]
    store.close()


def test_since_tells_everything_of_an_event(store: HistoryStore) -> None:
    store.append([event("1", "a", 5, "ü", action="buy", rating=2.0), event("2")])
    whole = {"event_id": "2", "user_id": "u", "item_id": "a", "timestamp": 1, "action": None, "rating": None}
    page, cursor = store.since()
    assert page == [event("1", "a", 5, "ü", action="buy", rating=2.0), whole]
    assert store.since(cursor) == ([], cursor)
    store.append([event("3"), event("1")])
    assert [e["event_id"] for e in store.since(cursor)[0]] == ["3"]


def test_a_cursor_before_the_latest_events(store: HistoryStore) -> None:
    assert store.cursor(5) == 0
    store.append([event(str(number)) for number in range(10)])
    for latest, first in ((0, 10), (3, 7), (10, 0), (99, 0)):
        found = store.since(store.cursor(latest))[0]
        assert [e["event_id"] for e in found] == [str(number) for number in range(first, 10)]


def test_a_version_changes_with_what_a_history_shows(store: HistoryStore) -> None:
    versions = [store.version("u")]
    for step in (
        lambda: store.append([event("1")]),
        lambda: store.append([event("2", timestamp=-5)]),
        lambda: store.seed("log-1", [("v", "a", 1, None, None)]),
        lambda: store.seed("log-2", [("v", "a", 1, None, None)]),
    ):
        step()
        versions.append(store.version("u"))
    assert len(set(versions)) == 5
    store.append([event("1"), event("other", user="v")])  # nothing new of this user
    assert store.version("u") == versions[-1]


# ---------------------------------------------------------------- the imported log
def test_seed_is_idempotent_and_replaced_by_another(store: HistoryStore) -> None:
    store.append([event("1", "live", 5)])
    rows = [("u", "old", 1, None, None), ("u", "tie", 5, "view", 3.0), ("v", "z", 1, None, None)]
    assert store.seed("log-1", iter(rows)) == 3
    assert store.seed("log-1", iter(rows)) == 0
    assert store.history("u")[1] == {"item_id": "tie", "timestamp": 5, "action": "view", "rating": 3.0}
    assert items(store) == ["old", "tie", "live"]
    assert items(store, limit=2) == ["tie", "live"]
    assert store.seed("log-2", iter([("u", "other", 2, None, None)])) == 1
    assert items(store) == ["other", "live"]
    assert items(store, "v") == []
    assert store.count() == 2


def test_a_replaced_log_leaves_nothing_behind(store: HistoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_sqlite, "CHUNK", 3)
    monkeypatch.setattr(store_redis, "SEED_ROWS", 3)
    monkeypatch.setattr(store_redis, "USERS_AT_ONCE", 2)
    store.seed("log-1", ((f"user-{i % 5}", f"one-{i}", i, None, None) for i in range(20)))
    store.append([event("1", "live", 20, "user-1")])
    store.seed("log-2", (("user-1", f"two-{i}", i, None, None) for i in range(7)))
    assert items(store, "user-1") == [*(f"two-{i}" for i in range(7)), "live"]
    assert store.count() == 8
    if isinstance(store, store_redis.RedisStore):
        keys = {key.decode() for key in store._redis.keys("*seeded*")}
        assert keys == {f"springtide:{name}" for name in ("seeded:2:user-1", "seeded-users:2", "seeded-count:2")}
    elif isinstance(store, store_sqlite.SQLiteStore):
        assert store._all_rows("SELECT COUNT(*) FROM seeded") == [(7,)]
        assert store._all_rows("SELECT name, active FROM seeds") == [("log-2", 1)]


def test_an_event_that_came_back_with_the_imported_log_is_shown_once(store: HistoryStore) -> None:
    store.append([event("1", "a", 5), event("2", "b", 6, action="view"), event("3", "new", 7)])
    store.seed("log", [("u", "old", 1, None, None), ("u", "a", 5, None, None), ("u", "b", 6, "view", 2.0)])
    assert store.history("u") == [
        {"item_id": "old", "timestamp": 1},
        {"item_id": "a", "timestamp": 5},
        {"item_id": "b", "timestamp": 6, "action": "view", "rating": 2.0},
        {"item_id": "new", "timestamp": 7},
    ]
    store.append([event("4", "a", 8)])  # taken again, later
    assert items(store) == ["old", "a", "b", "new", "a"]
    store.seed("another", [("v", "x", 1, None, None)])
    assert items(store) == ["a", "b", "new", "a"]


def test_replicas_that_seed_at_once_import_one_log(url: str) -> None:
    stores = [open_store(url) for _ in range(3)]
    imported = [-1] * 3
    log = [("u", str(i), i, None, None) for i in range(2000)]

    def work(number: int) -> None:
        imported[number] = stores[number].seed("log", iter(log))

    in_threads(3, work)
    assert sorted(imported) == [0, 0, 2000]
    assert stores[0].count() == 2000
    for store in stores:
        store.close()


def test_an_interrupted_seed_is_invisible_and_done_again(store: HistoryStore) -> None:
    def broken() -> Iterator[tuple[str, str, int, None, None]]:
        for i in range(25_000):
            yield ("u", str(i), i, None, None)
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        store.seed("log", broken())
    assert store.count() == 0
    assert store.seed("log", iter([("u", "a", 1, None, None)])) == 1
    assert store.count() == 1


# ---------------------------------------------------------------- retention
def test_rows_that_cannot_be_read_are_no_fault_of_the_log(store: HistoryStore) -> None:
    def rows() -> Iterator[Any]:
        yield ("u", "a", 1, None, None)
        raise FileNotFoundError("prepared/sequences is gone")

    with pytest.raises(FileNotFoundError, match="prepared/sequences is gone"):
        store.seed("log", rows())
    assert store.seed("log", [("u", "a", 1, None, None)]) == 1


def test_a_lock_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    (tmp_path / "log.seed-lock").mkdir()
    store = open_store(str(tmp_path / "log"))
    with pytest.raises(SpringtideError, match="log cannot be used: .*check the disk and the folder"):
        store.seed("log", [])
    store.close()


def test_histories_never_show_more_than_is_kept(url: str) -> None:
    now = int(time.time() * 1000)
    store = open_store(url, Retention(events=3, days=2))
    store.seed("log", [("u", "seeded", now - DAY, None, None), ("u", "too old", now - 3 * DAY, None, None)])
    store.append([event("0", "ancient", now - 5 * DAY)])
    assert items(store) == ["seeded"]
    store.append([event(str(n), str(n), now - 10 + n) for n in range(1, 3)])
    assert items(store) == ["seeded", "1", "2"]
    store.append([event("3", "3", now)])
    assert items(store) == ["1", "2", "3"]
    assert items(store, limit=2) == ["2", "3"]
    store.close()


def test_what_is_not_kept_is_removed_a_day_after_its_arrival(url: str) -> None:
    now = int(time.time() * 1000)
    store = open_store(url, Retention(events=2, days=2))
    rows = [("u", str(n), now - 1000 + n, None, None) for n in range(4)]
    store.seed("log", [*rows, ("v", "old", now - 3 * DAY, None, None), ("v", "new", now, None, None)])
    store.append([event(f"{user}-{n}", str(n), now - 10 + n, user) for user in "ab" for n in range(4)])
    store.append([event("old", "old", now - 3 * DAY, "c")])
    before = {user: (store.history(user), store.version(user)) for user in "uvabc"}
    assert store.retain() == 3  # imported rows go at once: they have no event_id that a caller could repeat
    assert store.append([event("old", "again", now, "c"), event("a-0", "again", now, "a")]) == 0
    assert len(followed(store)) == 9
    assert store.retain(now + DAY + 60_000) == 5
    assert [e["event_id"] for e in followed(store)] == ["a-2", "a-3", "b-2", "b-3"]
    assert store.retain(now + DAY + 60_000) == 0
    assert {user: (store.history(user), store.version(user)) for user in "uvab"} == {k: before[k] for k in "uvab"}
    assert store.count() == 2 + 1 + 4
    assert store.append([event("new", "new", now, "c")]) == 1
    assert store.version("c") > before["c"][1]  # a number is never used again
    store.close()


def test_removal_during_an_import_takes_only_what_the_log_in_place_has_too_much(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_sqlite, "CHUNK", 4)
    monkeypatch.setattr(store_redis, "SEED_ROWS", 4)
    store = open_store(url, Retention(events=10))
    log = [("u", str(n), n, None, None) for n in range(10)]
    crowded = [("v", str(n), n, None, None) for n in range(12)]
    removed: list[int] = []

    def newer() -> Iterator[Any]:
        for place, row in enumerate([*log, *crowded]):
            if place in (8, 12, 20):
                removed.append(store.retain())
            yield row
        if len(removed) < 4:
            removed.append(0)
            raise SpringtideError("the disk failed")  # cut short: the rows stay where nobody sees them

    assert store.seed("A", iter([*log, *crowded])) == 22
    with pytest.raises(SpringtideError, match="the disk failed"):
        store.seed("B", newer())
    assert removed == [2, 0, 0, 0] and store.retain() == 0
    assert items(store) == [str(n) for n in range(10)]
    assert items(store, "v") == [str(n) for n in range(2, 12)]
    assert store.seed("B", newer()) == 22
    assert removed[4:] == [0, 0, 0] and store.retain() == 2
    assert items(store) == [str(n) for n in range(10)]
    assert items(store, "v") == [str(n) for n in range(2, 12)]
    store.close()


def test_one_process_removes_at_a_time(url: str) -> None:
    store, other = open_store(url, Retention(days=1)), open_store(url, Retention(days=1))
    assert isinstance(other, (store_sqlite.SQLiteStore, store_redis.RedisStore))
    store.append([event("1")])
    later = int(time.time() * 1000) + 2 * DAY
    with other._alone("retain"):
        assert store.retain(later) == 0
    assert store.retain(later) == 1
    store.close()
    other.close()


def test_the_background_removes_and_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path / "log"), Retention(events=1))
    calls: list[int] = []
    twice = threading.Event()

    def retain() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise SpringtideError("the disk is full")
        twice.set()
        return 1

    monkeypatch.setattr(store, "retain", retain)
    stop = retain_in_background(store, 0.01)
    assert twice.wait(10)
    stop()
    keeper, before = open_store(str(tmp_path / "log")), set(threading.enumerate())
    retain_in_background(keeper, 0.01)
    assert not set(threading.enumerate()) - before, "a store that keeps all needs no thread"
    store.close()
    keeper.close()


def test_a_log_keeps_its_identity(url: str, tmp_path: Path) -> None:
    stores = [open_store(url), open_store(url), open_store(str(tmp_path / "another"))]
    names = [store.identity() for store in stores]
    assert names[0] == names[1] != names[2]
    for store in stores:
        store.close()


# ---------------------------------------------------------------- added items
def test_added_items_by_revision(store: HistoryStore, url: str) -> None:
    assert store.items_revision() == 0
    assert store.items_since() == []
    first = store.put_item(added("a", "A"))
    second = store.put_item(added("b", "B", b"\x00\x01\xff\xfe"))
    assert first < second == store.items_revision()
    third = store.put_item(added("a", "A again"))
    other = open_store(url)
    assert other.items_since(first) == [
        {**added("b", "B", b"\x00\x01\xff\xfe"), "revision": second},
        {**added("a", "A again"), "revision": third},
    ]
    assert other.items_since(second) == [{**added("a", "A again"), "revision": third}]
    assert len(other.items_since()) == 2
    other.close()


def test_added_items_come_in_pages(store: HistoryStore) -> None:
    revisions = [store.put_item(added(name)) for name in "abcde"]
    assert [item["item_id"] for item in store.items_since(0, 2)] == ["a", "b"]
    assert store.put_item(added("c", "C again"))  # while somebody reads
    page = store.items_since(revisions[1], 2)
    assert [item["item_id"] for item in page] == ["d", "e"]
    assert [item["title"] for item in store.items_since(page[-1]["revision"], 2)] == ["C again"]
    assert store.items_since(store.items_revision(), 2) == []


def test_no_more_items_than_wanted_are_added(store: HistoryStore) -> None:
    assert store.put_item(added("a", "A"), 2) and store.put_item(added("b", "B"), 2)
    before = store.items_revision()
    assert store.put_item(added("c", "C"), 2) is None
    assert store.items_revision() == before and [item["item_id"] for item in store.items_since()] == ["a", "b"]
    assert (store.put_item(added("a", "A again"), 2) or 0) > before  # it is there already
    assert store.put_item(added("c", "C"))


# ---------------------------------------------------------------- connections
def test_imports_in_threads_of_their_own_leave_no_connection_behind(tmp_path: Path) -> None:
    store = store_sqlite.SQLiteStore(tmp_path / "log")
    opened = []
    for number in range(5):
        in_threads(1, lambda _, number=number: store.seed(f"log-{number}", [("u", str(number), 1, None, None)]))
        opened.append(len(os.listdir("/proc/self/fd")))
    assert len(set(opened)) == 1 and len(store._all) == 1
    assert store.seed("own", [("u", "own", 1, None, None)]) == 1 and items(store) == ["own"]  # in this thread
    store.close()


def test_reads_of_redis_do_not_wait_for_as_many_writes_as_an_ingress_has_under_way(redis_server: RedisServer) -> None:
    admin, store = redis.Redis(port=redis_server.port), open_store(redis_server.url, timeout_s=30)
    admin.flushdb()
    admin.client_pause(60_000, all=False)  # writes alone
    threads = [
        threading.Thread(target=store.append, args=([event(str(number))],), daemon=True)
        for number in range(WRITE_THREADS)
    ]
    try:
        for thread in threads:
            thread.start()
        until = time.monotonic() + 5
        while int(admin.info("clients")["blocked_clients"]) < WRITE_THREADS and time.monotonic() < until:
            time.sleep(0.01)
        began = time.monotonic()
        assert store.version("u") == 0
        assert time.monotonic() - began < 10
    finally:
        admin.client_unpause()
    for thread in threads:
        thread.join()
    assert store.count() == WRITE_THREADS
    store.close()


# ---------------------------------------------------------------- both alike
rows = st.tuples(st.integers(0, 12), st.sampled_from("uv"), st.integers(-3, 3))
steps = st.lists(st.one_of(st.lists(rows, max_size=4), st.tuples(st.integers(0, 3), st.lists(rows, max_size=4))))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps, most=st.none() | st.integers(1, 4))
def test_both_follow_a_model_in_memory(url: str, tmp_path: Path, steps: list[Any], most: int | None) -> None:
    if url.startswith("sqlite"):
        (tmp_path / "log").unlink(missing_ok=True)
        url = str(tmp_path / "log")
    else:
        redis.Redis.from_url(url).flushdb()
    store = open_store(url, Retention(events=most))
    live: list[tuple[int, str, str, int]] = []
    name, seeded = -1, []
    for number, step in enumerate(steps):
        if isinstance(step, tuple):
            log = [(user, f"s{number}-{i}-{place}", time) for place, (i, user, time) in enumerate(step[1])]
            assert store.seed(str(step[0]), [(*row, None, None) for row in log]) == (step[0] != name) * len(log)
            name, seeded = (step[0], log) if step[0] != name else (name, seeded)
            continue
        new = []
        for place, (event_id, user, at) in enumerate(step):
            if event_id not in {row[0] for row in [*live, *new]}:
                new.append((event_id, user, f"{number}-{place}", at))
        calls = [event(str(i), f"{number}-{place}", at, user) for place, (i, user, at) in enumerate(step)]
        assert store.append(calls) == len(new)
        live += new
    for user in "uv":
        expected = [(row[2], row[1]) for row in seeded if row[0] == user] + [(r[3], r[2]) for r in live if r[1] == user]
        kept = [item for _, item in sorted(expected, key=lambda row: row[0])]
        assert items(store, user) == (kept if most is None else kept[-most:])
    assert [(e["event_id"], e["item_id"]) for e in followed(store, 2)] == [(str(r[0]), r[2]) for r in live]
    store.close()


taken = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8)  # item, time


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeded=taken, live=taken, limit=st.integers(0, 9))
def test_both_show_what_is_in_both_once(
    url: str, tmp_path: Path, seeded: list[tuple[int, int]], live: list[tuple[int, int]], limit: int
) -> None:
    """However few rows are asked for: those that fall away make room for earlier ones, and ties are told apart."""
    if url.startswith("sqlite"):
        for old in tmp_path.glob("log*"):
            old.unlink()
        url = str(tmp_path / "log")
    else:
        redis.Redis.from_url(url).flushdb()
    store = open_store(url)
    store.seed("log", [("u", str(item), time, None, None) for item, time in seeded])
    store.append([event(f"{number}", str(item), time) for number, (item, time) in enumerate(live)])
    both = [*seeded, *(row for row in live if row not in seeded)]
    kept = [str(item) for item, _ in sorted(both, key=lambda row: row[1])]
    assert items(store, limit=limit) == kept[len(kept) - min(limit, len(kept)) :]
    store.close()


# ---------------------------------------------------------------- older files
FORMAT_1 = """
CREATE TABLE seeds (id INTEGER PRIMARY KEY, name TEXT NOT NULL, active INTEGER NOT NULL DEFAULT 0);
CREATE TABLE events (seq INTEGER PRIMARY KEY, event_id TEXT UNIQUE, user_id TEXT NOT NULL, item_id TEXT NOT NULL,
                     timestamp INTEGER NOT NULL, action TEXT, rating REAL, seed INTEGER);
CREATE INDEX events_of_user ON events (user_id, timestamp);
INSERT INTO seeds VALUES (1, 'log', 1);
INSERT INTO events VALUES (1, NULL, 'u', 'seeded', 5, NULL, 4.0, 1), (2, 'e-2', 'u', 'tie', 5, 'buy', NULL, NULL),
                          (3, NULL, 'u', 'first', 1, NULL, NULL, 1), (7, 'e-7', 'u', 'last', 9, NULL, 1.5, NULL);
PRAGMA user_version = 1;
"""


def test_a_file_of_the_first_format_is_taken_over(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "log") as old:
        old.executescript(FORMAT_1)
    old.close()
    for _ in range(2):
        store = open_store(str(tmp_path / "log"))
        assert items(store) == ["first", "seeded", "tie", "last"]
        assert [e["event_id"] for e in followed(store)] == ["e-2", "e-7"]
        assert store.append([event("e-7")]) == 0
        assert store.seed("log", []) == 0
        store.close()
    with sqlite3.connect(tmp_path / "log") as later:
        later.execute("PRAGMA user_version = 99")
    with pytest.raises(SpringtideError, match="format 99, this version reads 2"):
        open_store(str(tmp_path / "log"))


def test_items_of_a_file_from_before_encoders_were_told_are_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "log"))
    store.put_item(added("a", "A", b"\x00"))
    store.close()
    with sqlite3.connect(tmp_path / "log") as old:
        old.execute("ALTER TABLE items DROP COLUMN encoder")
    old.close()
    for _ in range(2):
        store = open_store(str(tmp_path / "log"))
        assert store.items_since()[0] == {**added("a", "A", b"\x00"), "encoder": None, "revision": 1}
        store.close()


# ---------------------------------------------------------------- refusals
def test_a_full_disk_refuses_whole_calls_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the file is limited in place of the disk's: SQLite then fails in the same way."""
    store = open_store(str(tmp_path / "log"))
    assert isinstance(store, store_sqlite.SQLiteStore)
    pages = 60
    connect = store._connection

    def limited() -> sqlite3.Connection:
        db = connect()
        db.execute(f"PRAGMA max_page_count = {pages}")
        return db

    monkeypatch.setattr(store, "_connection", limited)
    stored: list[str] = []

    def work(number: int) -> None:
        for call in range(40):
            ids = [f"{number}-{call}-{n}" for n in range(20)]
            try:
                assert store.append([event(name, "x" * 40) for name in ids]) == 20
                stored.extend(ids)
            except SpringtideError as error:
                assert "full" in str(error)

    in_threads(4, work)
    assert 0 < len(stored) < 4 * 40 * 20
    assert sorted(e["event_id"] for e in followed(store, 1000)) == sorted(stored)
    pages = 100_000
    assert store.append([event("at last")]) == 1
    store.close()


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is not a database, " * 100)
    with pytest.raises(SpringtideError, match="text cannot be used"):
        open_store(str(tmp_path / "text"))
    with pytest.raises(SpringtideError, match="cannot be used"):
        open_store(str(tmp_path / "text" / "below-a-file"))


def test_addresses_of_no_known_kind_are_refused() -> None:
    for wrong in ("mysql://user:secret@host/1", "sqlite://relative/file", "redis://host:6379", "redis:///0"):
        with pytest.raises(SpringtideError, match="redis://host:port/number") as told:
            open_store(wrong)
        assert "secret" not in str(told.value)


def test_a_closed_store_says_so(store: HistoryStore) -> None:
    store.append([event("1")])
    store.close()
    with pytest.raises(SpringtideError, match="closed"):
        store.count()
    with pytest.raises(SpringtideError, match="closed"):
        store.append([event("2")])


def test_a_redis_that_may_lose_events_is_refused(tmp_path: Path) -> None:
    cases = {
        "appendonly no": ("--appendonly", "no"),
        "appendfsync everysec": ("--appendfsync", "everysec"),
        "no-appendfsync-on-rewrite yes": ("--no-appendfsync-on-rewrite", "yes"),
        "maxmemory-policy allkeys-lru": ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"),
        "does not tell its settings": ("--rename-command", "CONFIG", ""),
    }
    for number, (sentence, options) in enumerate(cases.items()):
        server = RedisServer(tmp_path / str(number)).start(*options)
        with pytest.raises(SpringtideError, match=sentence):
            open_store(server.url)
        open_store(server.url, require_aof=False).close()
        server.stop()


def test_a_password_may_stand_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RedisServer(tmp_path).start("--requirepass", "over the hills")
    with pytest.raises(SpringtideError, match="cannot be used"):
        open_store(server.url)
    monkeypatch.setenv(store_redis.PASSWORD_VARIABLE, "over the hills")
    open_store(server.url).close()
    with pytest.raises(SpringtideError, match="cannot be used") as told:  # who refuses a password is there
        open_store(server.url.replace("redis://", "redis://:mistaken@"), may_be_absent=True)
    assert "mistaken" not in str(told.value)
    server.stop()


def test_a_refusal_of_redis_names_no_user(tmp_path: Path) -> None:
    row = ("alice@example.org", "a film", 1, None, None)
    server = RedisServer(tmp_path).start()
    store = open_store(server.url)
    redis.Redis(port=server.port).set("springtide:seeded:1:alice@example.org", "of another type")
    with pytest.raises(SpringtideError, match="cannot be used: WRONGTYPE") as first:
        store.seed("log", [row])
    server.stop()
    server.start("--rename-command", "ZADD", "")  # a Redis repeats what came with a command that it does not know
    with pytest.raises(SpringtideError, match="cannot be used: unknown command") as second:
        store.seed("log", [row])
    for told in (first, second):
        assert "alice" not in str(told.value) and "film" not in str(told.value)
    store.close()
    server.stop()


def test_a_dead_redis_is_told_in_time_and_comes_back(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    secret = server.url.replace("redis://", "redis://:secret@")
    with pytest.raises(SpringtideError, match="cannot be used") as told:
        open_store(secret, timeout_s=0.2)
    assert "secret" not in str(told.value)
    store = open_store(server.start().url, timeout_s=0.2)
    store.append([event("1")])
    server.kill()
    for work in (lambda: store.history("u"), lambda: store.append([event("2")]), lambda: store.seed("log", [])):
        started = time.monotonic()
        with pytest.raises(SpringtideError, match="cannot be used"):
            work()
        assert time.monotonic() - started < 2
    server.start()
    assert items(store) == ["a"]
    assert store.append([event("2")]) == 1
    store.close()
    server.stop()


def test_a_redis_that_comes_later_is_taken_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(tmp_path)
    store = open_store(server.url, timeout_s=0.2, may_be_absent=True)
    assert "answers go on without it until it comes" in caplog.text
    for work in (lambda: store.history("u"), lambda: store.append([event("1")])):
        with pytest.raises(SpringtideError, match="cannot be used"):
            work()
    server.start()
    assert store.append([event("1")]) == 1 and items(store) == ["a"]
    store.close()
    server.stop()


def test_a_redis_that_comes_later_and_may_lose_events_acknowledges_none(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    strict, lenient = (
        open_store(server.url, timeout_s=0.2, may_be_absent=True, require_aof=aof) for aof in (True, False)
    )
    server.start("--appendfsync", "everysec")
    for work in (lambda: strict.append([event("1")]), lambda: strict.put_item(added("a"))):
        for _ in range(2):
            with pytest.raises(SpringtideError, match="appendfsync everysec and may lose events"):
                work()
    assert strict.history("u") == [] and strict.items_since() == []
    assert lenient.append([event("1")]) == 1
    redis.Redis(port=server.port).config_set("appendfsync", "always")
    assert strict.append([event("2")]) == 1  # it was set right
    strict.close()
    lenient.close()
    server.stop()


def test_a_redis_that_is_there_and_may_lose_events_is_refused_though_it_might_be_absent(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start("--appendfsync", "everysec")
    with pytest.raises(SpringtideError, match="appendfsync everysec and may lose events"):
        open_store(server.url, may_be_absent=True)
    server.stop()


def test_a_redis_that_hangs_is_told_in_time(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    store = open_store(server.url, timeout_s=0.3)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        started = time.monotonic()
        with pytest.raises(SpringtideError, match="cannot be used"):
            store.history("u")
        assert time.monotonic() - started < 2
    finally:
        os.kill(server.pid, signal.SIGCONT)
    store.close()
    server.stop()
