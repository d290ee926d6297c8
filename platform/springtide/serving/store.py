"""The event log behind live histories: one small interface, and `open_store`, which opens the one that a URL names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from springtide.errors import SpringtideError
from springtide.serving.store_rows import AddedItem, Retention, SeedRow, StoredItem
from springtide.serving.store_sqlite import SQLiteStore

TIMEOUT_S = 10.0


class HistoryStore(Protocol):
    """Events by user. Every method may be called from several threads and processes at once and raises
    SpringtideError when the storage refuses."""

    retention: Retention

    def append(self, events: Sequence[dict[str, Any]]) -> int:
        """Store events durably, all or none, and return how many were new; a known `event_id` is ignored.

        Each event holds event_id, user_id, item_id, timestamp (int, ms) and optionally action and rating.
        The events are on disk when this returns and the next `history` shows them.
        """
        ...

    def history(self, user_id: str, limit: int = 1000) -> list[dict[str, Any]]:
        """The user's most recent events, oldest first; events of one instant in the order of their arrival.

        An appended event whose item and time are those of a seeded one is that one, and shown once.
        Each is {item_id, timestamp} with action and rating where they were given. Never more than `retention` keeps.
        """
        ...

    def version(self, user_id: str) -> int:
        """A number that changes with every event appended for this user and with every newly seeded log."""
        ...

    def since(self, cursor: int = 0, limit: int = 1000) -> tuple[list[dict[str, Any]], int]:
        """The appended (not the seeded) events after a cursor, in the order of their arrival, and the next cursor.

        Going on from each cursor shows every event exactly once, whoever writes meanwhile; 0 is the beginning. Each
        holds event_id, user_id, item_id, timestamp, action and rating, the last two None where they were not given.
        """
        ...

    def cursor(self, latest: int) -> int:
        """A cursor that `since` goes on from with the latest events, at most so many.

        cursor(0) is that of the last event ever stored: one above it comes from a log that has lost its end.
        """
        ...

    def seed(self, name: str, rows: Iterable[SeedRow]) -> int:
        """Import a prepared log under a name and return the rows imported; 0 if that name is the one in place.

        Another name replaces the log imported before, in one step for readers. Appended events are never touched.
        """
        ...

    def count(self) -> int:
        """Events stored: those appended and those of the log in place."""
        ...

    def retain(self, now_ms: int | None = None) -> int:
        """Remove what `retention` no longer keeps, in small steps, and return the rows removed.

        Returns 0 at once while another process does the same. now_ms: the time to judge by; None is now.
        """
        ...

    def put_item(self, item: AddedItem, most: int | None = None) -> int | None:
        """Add an item, or replace the one of that id, durably, and return its revision.

        most: with so many items in place another one is not added, and the answer is None.
        """
        ...

    def items_since(self, revision: int = 0, limit: int = 1000) -> list[StoredItem]:
        """The added items of a later revision, in that order, at most `limit`: go on from the last one's revision.

        An item that is put again meanwhile comes later, and no longer in its old place.
        """
        ...

    def items_revision(self) -> int:
        """The revision of the item added last; 0 if there is none."""
        ...

    def identity(self) -> str:
        """A name made up when the log was: whoever holds a cursor can tell whether it is of this log."""
        ...

    def close(self) -> None: ...


def file_of(url: str) -> Path | None:
    """The file of an event log in SQLite, given bare or as sqlite:///absolute/path; None if `url` names a Redis.

    Raises ValueError for any other kind of address.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Path(url)
    if scheme == "sqlite" and rest.startswith("/"):
        return Path(unquote(rest))
    parts = urlsplit(url)
    if scheme not in ("redis", "rediss") or not parts.hostname or not parts.path.removeprefix("/").isdigit():
        raise ValueError(
            "an event log is a file, sqlite:///absolute/path, redis://host:port/number or rediss://host:port/number"
        )
    return None


def open_store(
    url: str,
    retention: Retention | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    require_aof: bool = True,
    may_be_absent: bool = False,
) -> HistoryStore:
    """Open the event log that `url` names (see `file_of`).

    timeout_s: longest wait for a lock of another process, or for Redis. require_aof: refuse a Redis that could lose an
    event it has acknowledged. may_be_absent: open a Redis that does not answer yet; calls fail until it comes. Raises
    SpringtideError if the log cannot be used or the address is of no known kind.
    """
    try:
        path = file_of(url)
    except ValueError as error:
        raise SpringtideError(f"store {url.partition('://')[0]}://... cannot be opened: {error}") from None
    if path is not None:
        return SQLiteStore(path, retention, timeout_s=timeout_s)
    from springtide.serving.store_redis import RedisStore

    return RedisStore(url, retention, timeout_s=timeout_s, require_aof=require_aof, may_be_absent=may_be_absent)
