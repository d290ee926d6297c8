"""The event log in one SQLite file in write-ahead mode, shared by the processes of one machine."""

from __future__ import annotations

import fcntl
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from springtide.errors import SpringtideError
from springtide.serving.group_commit import GroupCommit
from springtide.serving.sqlite_schema import create
from springtide.serving.store_rows import (
    CHUNK,
    REMOVAL_DELAY_MS,
    AddedItem,
    EventRow,
    HistoryRow,
    Retention,
    SeedRow,
    StoredItem,
    event_rows,
    merged,
    milliseconds,
)

USERS_TOGETHER = 100  # users whose surplus is removed in one transaction
_OF_ACTIVE = "seed = (SELECT id FROM seeds WHERE active)"  # rows of the log in place
Result = TypeVar("Result")


class SQLiteStore:
    """A HistoryStore in one SQLite file.

    synchronous=FULL makes each commit reach the disk before `append` returns, so an acknowledged event survives
    `kill -9` and a power cut. Calls of `append` that wait at the same time share one commit, each still whole or not at
    all. timeout_s: longest wait for a writer of another process.
    """

    def __init__(self, path: str | Path, retention: Retention | None = None, *, timeout_s: float = 10.0) -> None:
        self.retention = retention or Retention()
        self._path, self._timeout_s = Path(path), timeout_s
        self._write_lock = threading.Lock()
        self._all_lock = threading.Lock()  # never held while waiting for another process, as a writer does
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        self._closed = False
        self._appends = GroupCommit(self._append_together, f"the event log {self._path}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from error
        self._run(lambda db: create(db, self._path))

    # ---------------------------------------------------------------- live events
    def append(self, events: Sequence[dict[str, Any]]) -> int:
        rows = event_rows(events)
        return self._appends.do(rows) if rows else 0

    def _append_together(self, calls: Sequence[list[EventRow]]) -> list[int | Exception]:
        def insert_all(db: sqlite3.Connection) -> list[int | Exception]:
            arrived = milliseconds()
            with self._transaction(db):
                return [self._insert(db, rows, arrived) for rows in calls]

        return self._run(insert_all)

    def _insert(self, db: sqlite3.Connection, rows: list[EventRow], arrived: int) -> int | Exception:
        """One call's events within the transaction of a group: a refusal undoes this call alone."""
        before = db.total_changes
        db.execute("SAVEPOINT call")
        try:
            db.executemany(
                "INSERT INTO live (event_id, user_id, item_id, timestamp, action, rating, arrived) "
                f"VALUES (?, ?, ?, ?, ?, ?, {arrived}) ON CONFLICT (event_id) DO NOTHING",
                rows,
            )
        except sqlite3.Error as error:
            if not db.in_transaction:  # SQLite has undone the whole group
                raise
            db.execute("ROLLBACK TO call")
            db.execute("RELEASE call")
            return self._refused(error)
        db.execute("RELEASE call")
        return db.total_changes - before

    def since(self, cursor: int = 0, limit: int = 1000) -> tuple[list[dict[str, Any]], int]:
        # Writers take turns and the numbers are never used again, so nothing can appear behind a number already read.
        names = ("event_id", "user_id", "item_id", "timestamp", "action", "rating")
        query = f"SELECT seq, {', '.join(names)} FROM live WHERE seq > ? ORDER BY seq LIMIT ?"
        rows = self._all_rows(query, cursor, limit)
        return [dict(zip(names, row[1:], strict=True)) for row in rows], rows[-1][0] if rows else cursor

    def cursor(self, latest: int) -> int:
        # The last number given, whether or not retention has removed its event: a lower one means a lost end.
        last = self._all_rows("SELECT MAX(seq) FROM sqlite_sequence WHERE name = 'live'")[0][0]
        return max(0, int(last or 0) - latest)

    def history(self, user_id: str, limit: int = 1000) -> list[dict[str, Any]]:
        limit, oldest = self.retention.most(limit), self.retention.oldest()
        query = (
            "SELECT item_id, timestamp, action, rating FROM {} WHERE user_id = ? AND timestamp >= ? {} "
            "ORDER BY timestamp DESC, seq DESC LIMIT ?"
        )

        def read(count: int) -> tuple[list[HistoryRow], list[HistoryRow]]:
            live = self._all_rows(query.format("live", ""), user_id, oldest, count)
            seeded = self._all_rows(query.format("seeded", f"AND {_OF_ACTIVE}"), user_id, oldest, count)
            return seeded[::-1], live[::-1]

        return merged(read, limit)

    def version(self, user_id: str) -> int:
        query = (
            "SELECT (SELECT seq FROM live WHERE user_id = ? ORDER BY seq DESC LIMIT 1), "
            "(SELECT id FROM seeds WHERE active)"
        )
        last, seed = self._all_rows(query, user_id)[0]
        return int(last or 0) + (int(seed or 0) << 48)

    def count(self) -> int:
        query = f"SELECT (SELECT COUNT(*) FROM live) + (SELECT COUNT(*) FROM seeded WHERE {_OF_ACTIVE})"
        return int(self._all_rows(query)[0][0])

    # ---------------------------------------------------------------- the imported log
    def seed(self, name: str, rows: Iterable[SeedRow]) -> int:
        try:
            with self._alone("seed"):
                return self._run(lambda db: self._seed(db, name, rows))
        finally:
            self._disconnect()  # an import runs in a thread of its own, which ends after it

    def _seed(self, db: sqlite3.Connection, name: str, rows: Iterable[SeedRow]) -> int:
        if db.execute("SELECT 1 FROM seeds WHERE name = ? AND active", (name,)).fetchone():
            return 0
        self._drop_unseen(db)  # an import that was cut short leaves rows that nobody sees
        with self._transaction(db):
            number = db.execute("INSERT INTO seeds (name) VALUES (?)", (name,)).lastrowid
        statement = (
            "INSERT INTO seeded (user_id, item_id, timestamp, action, rating, seed) "
            f"VALUES (?, ?, ?, ?, ?, {int(number or 0)})"
        )
        imported, rest = 0, iter(rows)
        while chunk := list(islice(rest, CHUNK)):
            with self._transaction(db):
                db.executemany(statement, chunk)
            imported += len(chunk)
        with self._transaction(db):
            db.execute("UPDATE seeds SET active = (id = ?)", (number,))
        self._drop_unseen(db)
        return imported

    def _drop_unseen(self, db: sqlite3.Connection) -> None:
        """Remove imported rows that are not of the log in place."""
        self._delete_in_parts(db, "seeded", "seed NOT IN (SELECT id FROM seeds WHERE active)")
        with self._transaction(db):
            db.execute("DELETE FROM seeds WHERE NOT active")

    # ---------------------------------------------------------------- retention
    def retain(self, now_ms: int | None = None) -> int:
        with self._alone("retain", wait=False) as alone:
            return self._run(lambda db: self._retain(db, milliseconds(now_ms))) if alone else 0

    def _retain(self, db: sqlite3.Connection, now: int) -> int:
        removed, arrived = 0, f"arrived < {now - REMOVAL_DELAY_MS}"
        # An import that goes on meanwhile fills `seeded` with rows that are not a user's history yet.
        for table, shown, also in (("live", "TRUE", arrived), ("seeded", _OF_ACTIVE, "TRUE")):
            if self.retention.days is not None:
                old = f"timestamp < {self.retention.oldest(now)} AND {shown} AND {also}"
                removed += self._delete_in_parts(db, table, old)
            if self.retention.events is not None:
                removed += self._delete_surplus(db, table, self.retention.events, shown, also)
        return removed

    def _delete_surplus(self, db: sqlite3.Connection, table: str, most: int, shown: str, also: str) -> int:
        """Remove the oldest rows that each user has beyond `most` of those `shown`, some users at a time."""
        crowded = (
            f"SELECT user_id FROM {table} WHERE user_id > ? AND {shown} GROUP BY user_id HAVING COUNT(*) > {most} "
            f"ORDER BY user_id LIMIT {USERS_TOGETHER}"
        )
        delete = (
            f"DELETE FROM {table} WHERE {also} AND seq IN (SELECT seq FROM {table} WHERE user_id = ? AND {shown} "
            f"ORDER BY timestamp DESC, seq DESC LIMIT -1 OFFSET {most})"
        )
        before, last = db.total_changes, ""
        while users := db.execute(crowded, (last,)).fetchall():
            with self._transaction(db):
                db.executemany(delete, users)
            last = users[-1][0]
        return db.total_changes - before

    def _delete_in_parts(self, db: sqlite3.Connection, table: str, condition: str) -> int:
        before = db.total_changes
        first, last = db.execute(f"SELECT MIN(seq), MAX(seq) FROM {table}").fetchone()
        for start in range(first, last + 1, CHUNK) if first is not None else ():
            with self._transaction(db):
                db.execute(f"DELETE FROM {table} WHERE seq BETWEEN {start} AND {start + CHUNK - 1} AND {condition}")
        return db.total_changes - before

    # ---------------------------------------------------------------- items added while serving
    def put_item(self, item: AddedItem, most: int | None = None) -> int | None:
        row = (
            item["item_id"],
            item["title"],
            json.dumps(item["categories"], ensure_ascii=False),
            item["text"],
            item["vector"],
            item["encoder"],
        )

        def replace(db: sqlite3.Connection) -> int | None:
            statement = (
                "INSERT OR REPLACE INTO items (item_id, title, categories, text, vector, encoder) "
                "VALUES (?, ?, ?, ?, ?, ?)"
            )
            with self._transaction(db):
                known = db.execute("SELECT 1 FROM items WHERE item_id = ?", row[:1]).fetchone()
                if most is not None and not known and db.execute("SELECT COUNT(*) FROM items").fetchone()[0] >= most:
                    return None
                return int(db.execute(statement, row).lastrowid or 0)

        return self._run(replace)

    def items_since(self, revision: int = 0, limit: int = 1000) -> list[StoredItem]:
        query = (
            "SELECT revision, item_id, title, categories, text, vector, encoder FROM items "
            "WHERE revision > ? ORDER BY revision LIMIT ?"
        )
        return [
            StoredItem(
                item_id=i, title=t, categories=json.loads(c), text=text, vector=vector, encoder=by, revision=number
            )
            for number, i, t, c, text, vector, by in self._all_rows(query, revision, limit)
        ]

    def items_revision(self) -> int:
        return int(self._all_rows("SELECT MAX(revision) FROM items")[0][0] or 0)

    def identity(self) -> str:
        return str(self._all_rows("SELECT identity FROM log")[0][0])

    def close(self) -> None:
        self._appends.close()
        with self._write_lock, self._all_lock:
            self._closed = True
            for connection in self._all:
                connection.close()
            self._all.clear()

    # ---------------------------------------------------------------- connections, locks, refusals
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
    def _alone(self, task: str, wait: bool = True) -> Iterator[bool]:
        """One process at a time does this task; False if one does and `wait` is not set. The lock dies with it."""
        try:
            file = self._path.with_name(f"{self._path.name}.{task}-lock").open("w")
        except OSError as error:
            raise self._refused(error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                alone = False
            except OSError as error:
                raise self._refused(error) from error
            yield alone

    def _all_rows(self, query: str, *values: Any) -> list[Any]:
        return self._run(lambda db: db.execute(query, values).fetchall())

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
                self._path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False, cached_statements=32
            )
            self._enter_wal(found)
            found.execute("PRAGMA synchronous = FULL")
            self._local.connection = found
            with self._all_lock:
                self._all.append(found)
        return found

    def _disconnect(self) -> None:
        """Close this thread's connection; its next call opens another one."""
        found: sqlite3.Connection | None = self._local.__dict__.pop("connection", None)
        with self._all_lock:
            if found in self._all:  # else `close` has closed it
                self._all.remove(found)
                found.close()

    def _enter_wal(self, db: sqlite3.Connection) -> None:
        """Changing the journal mode ignores the busy timeout, so wait here while another process does the same."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
