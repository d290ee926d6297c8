"""The tables of an event log in SQLite, and the way there from an older format."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from springtide.errors import SpringtideError
from springtide.serving.store_rows import milliseconds

FORMAT = 2

# AUTOINCREMENT never gives a number twice, not even after the last row was removed: readers that follow the log, and
# caches, rely on it.
_TABLES = """
CREATE TABLE log (identity TEXT NOT NULL);
INSERT INTO log VALUES (LOWER(HEX(RANDOMBLOB(8))));
CREATE TABLE IF NOT EXISTS seeds (id INTEGER PRIMARY KEY, name TEXT NOT NULL, active INTEGER NOT NULL DEFAULT 0);
CREATE TABLE live (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT UNIQUE NOT NULL,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    timestamp INTEGER NOT NULL,
    action TEXT,
    rating REAL,
    arrived INTEGER NOT NULL
);
CREATE INDEX live_of_user ON live (user_id, timestamp);
CREATE INDEX last_of_user ON live (user_id, seq);
CREATE TABLE seeded (
    seq INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    timestamp INTEGER NOT NULL,
    action TEXT,
    rating REAL,
    seed INTEGER NOT NULL
);
CREATE INDEX seeded_of_user ON seeded (user_id, timestamp);
CREATE TABLE items (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    item_id TEXT UNIQUE NOT NULL,
    title TEXT NOT NULL,
    categories TEXT NOT NULL,
    text TEXT,
    vector BLOB,
    encoder TEXT
);
"""
_FROM_1 = """
INSERT INTO live SELECT seq, COALESCE(event_id, 'event-' || seq), user_id, item_id, timestamp, action, rating, {now}
    FROM events WHERE seed IS NULL ORDER BY seq;
INSERT INTO seeded SELECT seq, user_id, item_id, timestamp, action, rating, seed
    FROM events WHERE seed IS NOT NULL ORDER BY seq;
DROP TABLE events;
"""


def create(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file, or bring those of an older one up to date, in one transaction.

    Raises SpringtideError for a file of a later format.
    """
    if db.execute("PRAGMA user_version").fetchone()[0] == FORMAT and _has_encoder(db):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        found = db.execute("PRAGMA user_version").fetchone()[0]  # again: another process may have done it meanwhile
        if found not in (0, 1, FORMAT):
            raise SpringtideError(
                f"{path} holds an event log of format {found}, this version reads {FORMAT}; choose another file"
            )
        if found != FORMAT:
            for statement in (_TABLES + (_FROM_1.format(now=milliseconds()) if found == 1 else "")).split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {FORMAT}")
        if not _has_encoder(db):  # came later, and versions that do not know it pass it by: no other format
            db.execute("ALTER TABLE items ADD COLUMN encoder TEXT")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _has_encoder(db: sqlite3.Connection) -> bool:
    return any(column[1] == "encoder" for column in db.execute("PRAGMA table_info(items)"))
