"""The event log: durable, idempotent, ordered, shared by processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from springtide.errors import SpringtideError
from springtide.serving.store import SQLiteStore

WRITER = """
import sys
from springtide.serving.store import SQLiteStore
store = SQLiteStore(sys.argv[1])
for i in range(int(sys.argv[3])):
    store.append([{"event_id": f"{sys.argv[2]}-{i}", "user_id": "u", "item_id": str(i), "timestamp": i}])
    print(i, flush=True)
if sys.argv[4] == "stay":
    sys.stdin.read()
"""


def event(event_id: str, item: str = "a", timestamp: int = 1, user: str = "u", **more: Any) -> dict[str, Any]:
    return {"event_id": event_id, "user_id": user, "item_id": item, "timestamp": timestamp, **more}


def items(store: SQLiteStore, user: str = "u", **more: Any) -> list[str]:
    return [e["item_id"] for e in store.history(user, **more)]


def writer(path: Path, name: str, count: int, end: str = "leave") -> subprocess.Popen[str]:
    import springtide

    source = str(Path(springtide.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count), end],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source},
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SQLiteStore]:
    opened = SQLiteStore(tmp_path / "new folder" / "events.sqlite3")
    yield opened
    opened.close()


def test_an_event_id_counts_once(store: SQLiteStore) -> None:
    assert store.append([event("1", "a"), event("2", "b"), event("1", "c")]) == 2
    assert store.append([event("2", "d"), event("3", "e", 2)]) == 1
    assert items(store) == ["a", "b", "e"]
    assert store.count() == 3


def test_oldest_first_and_ties_in_order_of_arrival(store: SQLiteStore) -> None:
    store.append([event("1", "late", 9), event("2", "x", 5), event("3", "early", 1)])
    store.append([event("4", "y", 5)])
    assert items(store) == ["early", "x", "y", "late"]
    assert items(store, limit=2) == ["y", "late"]
    assert items(store, "nobody") == []


def test_action_and_rating_come_back(store: SQLiteStore) -> None:
    store.append([event("1", action="buy", rating=4.5), event("2", "b")])
    assert store.history("u") == [
        {"item_id": "a", "timestamp": 1, "action": "buy", "rating": 4.5},
        {"item_id": "b", "timestamp": 1},
    ]


def test_a_call_is_stored_whole_or_not_at_all(store: SQLiteStore) -> None:
    with pytest.raises(SpringtideError, match="cannot be used"):
        store.append([event("1"), {**event("2"), "item_id": None}])
    assert store.count() == 0
    assert store.append([event("1")]) == 1


def test_seed_is_idempotent_and_replaced_by_another(store: SQLiteStore) -> None:
    store.append([event("1", "live", 5)])
    rows = [("u", "old", 1, None, None), ("u", "tie", 5, "view", 3.0), ("v", "z", 1, None, None)]
    assert store.seed("log-1", iter(rows)) == 3
    assert store.seed("log-1", iter(rows)) == 0
    assert items(store) == ["old", "tie", "live"]
    assert store.seed("log-2", iter([("u", "other", 2, None, None)])) == 1
    assert items(store) == ["other", "live"]
    assert items(store, "v") == []


def test_a_replaced_log_leaves_no_rows_behind(store: SQLiteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("springtide.serving.store.SEED_CHUNK", 3)
    store.seed("log-1", (("u", f"one-{i}", i, None, None) for i in range(10)))
    store.append([event("1", "live", 20)])
    store.seed("log-2", (("u", f"two-{i}", i, None, None) for i in range(7)))
    assert items(store) == [f"two-{i}" for i in range(7)] + ["live"]
    with sqlite3.connect(store._path) as db:
        assert db.execute("SELECT COUNT(*) FROM events").fetchone() == (8,)
        assert db.execute("SELECT name, active FROM seeds").fetchall() == [("log-2", 1)]


def test_an_interrupted_seed_is_invisible_and_done_again(store: SQLiteStore) -> None:
    def broken() -> Iterator[tuple[str, str, int, None, None]]:
        for i in range(25_000):
            yield ("u", str(i), i, None, None)
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        store.seed("log", broken())
    assert store.count() == 0
    assert store.seed("log", iter([("u", "a", 1, None, None)])) == 1
    assert store.count() == 1


def test_threads_write_and_read_at_once(store: SQLiteStore) -> None:
    def work(number: int) -> None:
        for i in range(20):
            store.append([event(f"{number}-{i}", f"{number}-{i}", i)])
            assert store.history("u")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count() == 80


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    processes = [writer(path, name, 50) for name in ("a", "b")]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    store = SQLiteStore(path)
    assert store.count() == 100
    assert [e["timestamp"] for e in store.history("u")] == sorted(list(range(50)) * 2)
    store.close()


def test_an_acknowledged_event_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite3"
    process = writer(path, "a", 5, "stay")
    assert process.stdout is not None
    for expected in range(5):
        assert process.stdout.readline().strip() == str(expected)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    store = SQLiteStore(path)
    assert items(store) == ["0", "1", "2", "3", "4"]
    store.close()


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is not a database, " * 100)
    with pytest.raises(SpringtideError, match="text cannot be used"):
        SQLiteStore(tmp_path / "text")
    with pytest.raises(SpringtideError, match="cannot be used"):
        SQLiteStore(tmp_path / "text" / "below-a-file")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    store.close()
    with pytest.raises(SpringtideError, match="closed"):
        store.count()
