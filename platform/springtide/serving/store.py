"""The event log behind live histories: one small interface and its embedded form, SQLite in write-ahead mode."""

from __future__ import annotations

import fcntl
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from springtide.errors import SpringtideError

FORMAT = 1
BUSY_TIMEOUT_S = 10.0
SEED_CHUNK = 20_000  # rows in one transaction: short enough that live events are not kept waiting
SeedRow = tuple[str, str, int, str | None, float | None]  # user_id, item_id, timestamp (ms), action, rating
Result = TypeVar("Result")


class HistoryStore(Protocol):
    """Events by user. Every method may be called from several threads and processes at once and raises
    SpringtideError when the storage refuses."""

    def append(self, events: Sequence[dict[str, Any]]) -> int:
        """Store events durably, all or none, and return how many were new; a known `event_id` is ignored.

        Each event holds event_id, user_id, item_id, timestamp (int, ms) and optionally action and rating.
        The events are on disk when this returns and the next `history` shows them.
        """
        ...

    def history(self, user_id: str, limit: int = 1000) -> list[dict[str, Any]]:
        """The user's most recent events, oldest first; events of one instant in the order of their arrival.

        Each is {item_id, timestamp} with action and rating where they were given.
        """
        ...

    def seed(self, name: str, rows: Iterable[SeedRow]) -> int:
        """Import a prepared log under a name and return the rows imported; 0 if that name is the one in place.

        Another name replaces the log imported before, in one step for readers. Appended events are never touched.
        """
        ...

    def count(self) -> int:
        """Events that histories can show."""
        ...

    def close(self) -> None: ...


_SCHEMA = """
CREATE TABLE IF NOT EXISTS seeds (id INTEGER PRIMARY KEY, name TEXT NOT NULL, active INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY,
    event_id TEXT UNIQUE,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    timestamp INTEGER NOT NULL,
    action TEXT,
    rating REAL,
    seed INTEGER
);
CREATE INDEX IF NOT EXISTS events_of_user ON events (user_id, timestamp);
"""
_VISIBLE = "(seed IS NULL OR seed = (SELECT id FROM seeds WHERE active = 1))"


class SQLiteStore:
    """A HistoryStore in one SQLite file, shared by the processes of one machine.

    synchronous=FULL makes each commit reach the disk before `append` returns, so an acknowledged event survives
    `kill -9` and a power cut.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._write_lock = threading.Lock()
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._closed = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        self._run(self._create)

    def _create(self, db: sqlite3.Connection) -> None:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, FORMAT):
            raise SpringtideError(
                f"{self._path} holds an event log of format {found}, this version reads {FORMAT}; choose another file"
            )
        if found == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")

    def append(self, events: Sequence[dict[str, Any]]) -> int:
        names = ("event_id", "user_id", "item_id", "timestamp", "action", "rating")
        rows = [tuple(event.get(name) for name in names) for event in events]
        statement = (
            "INSERT INTO events (event_id, user_id, item_id, timestamp, action, rating) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (event_id) DO NOTHING"
        )

        def insert(db: sqlite3.Connection) -> int:
            with self._transaction(db):
                before = db.total_changes
                db.executemany(statement, rows)
                return db.total_changes - before

        return self._run(insert)

    def history(self, user_id: str, limit: int = 1000) -> list[dict[str, Any]]:
        query = (
            f"SELECT item_id, timestamp, action, rating FROM events WHERE user_id = ? AND {_VISIBLE} "
            "ORDER BY timestamp DESC, seed IS NULL DESC, seq DESC LIMIT ?"  # an imported log came before live events
        )
        rows = self._run(lambda db: db.execute(query, (user_id, limit)).fetchall())
        names = ("item_id", "timestamp", "action", "rating")
        return [{n: v for n, v in zip(names, row, strict=True) if v is not None} for row in reversed(rows)]

    def seed(self, name: str, rows: Iterable[SeedRow]) -> int:
        with self._only_seeder():
            return self._run(lambda db: self._seed(db, name, rows))

    def _seed(self, db: sqlite3.Connection, name: str, rows: Iterable[SeedRow]) -> int:
        if db.execute("SELECT 1 FROM seeds WHERE name = ? AND active = 1", (name,)).fetchone():
            return 0
        self._drop_unseen(db)  # an import that was cut short leaves rows that nobody sees
        with self._transaction(db):
            number = db.execute("INSERT INTO seeds (name) VALUES (?)", (name,)).lastrowid
        statement = (
            "INSERT INTO events (user_id, item_id, timestamp, action, rating, seed) "
            f"VALUES (?, ?, ?, ?, ?, {int(number or 0)})"
        )
        imported, rest = 0, iter(rows)
        while chunk := list(islice(rest, SEED_CHUNK)):
            with self._transaction(db):
                db.executemany(statement, chunk)
            imported += len(chunk)
        with self._transaction(db):
            db.execute("UPDATE seeds SET active = (id = ?)", (number,))
        self._drop_unseen(db)
        return imported

    def _drop_unseen(self, db: sqlite3.Connection) -> None:
        """Remove imported rows that are not of the log in place, a part at a time."""
        first, last = db.execute("SELECT MIN(seq), MAX(seq) FROM events").fetchone()
        unseen = "seed IS NOT NULL AND seed NOT IN (SELECT id FROM seeds WHERE active)"
        for start in range(first, last + 1, SEED_CHUNK) if first is not None else ():
            with self._transaction(db):
                db.execute(
                    f"DELETE FROM events WHERE seq BETWEEN ? AND ? AND {unseen}", (start, start + SEED_CHUNK - 1)
                )
        with self._transaction(db):
            db.execute("DELETE FROM seeds WHERE active = 0")

    def count(self) -> int:
        return int(self._run(lambda db: db.execute(f"SELECT COUNT(*) FROM events WHERE {_VISIBLE}").fetchone()[0]))

    def close(self) -> None:
        with self._write_lock:
            self._closed = True
            for connection in self._all:
                connection.close()
            self._all.clear()

    @contextmanager
    def _transaction(self, db: sqlite3.Connection) -> Iterator[None]:
        with self._write_lock:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def _only_seeder(self) -> Iterator[None]:
        """One import at a time over all processes; the lock goes with its process."""
        try:
            with self._path.with_name(self._path.name + ".seed-lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise self._refused(error) from error

    def _run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return work(self._connection())
        except sqlite3.Error as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> SpringtideError:
        return SpringtideError(f"the event log {self._path} cannot be used: {error}; check the disk and the folder")

    def _connection(self) -> sqlite3.Connection:
        """This thread's own connection: SQLite lets readers go on beside a writer, but not over one connection."""
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if self._closed:
            raise SpringtideError(f"the event log {self._path} is closed")
        if found is None:
            found = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=32
            )
            self._enter_wal(found)
            found.execute("PRAGMA synchronous = FULL")
            self._local.connection = found
            with self._write_lock:
                self._all.append(found)
        return found

    @staticmethod
    def _enter_wal(db: sqlite3.Connection) -> None:
        """Changing the journal mode ignores the busy timeout, so wait here while another process does the same."""
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
