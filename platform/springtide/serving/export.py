"""Export: the live event log as sharded Parquet that `prepare` reads beside the original logs."""

from __future__ import annotations

import fcntl
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from springtide.config import Settings
from springtide.errors import SpringtideError
from springtide.files import disk_error, replace_durably
from springtide.schemas import EXPORTED
from springtide.serving.deploy import store_of
from springtide.serving.lint import load_config
from springtide.serving.store import HistoryStore, file_of, open_store

log = logging.getLogger(__name__)
FOLDER = "exported"  # in the workspace
PAGE = 20_000  # events read at once
FILE_ROWS = 500_000
EARLIEST_MS = 100_000_000_000  # numbers below this are seconds to `prepare`


def run(settings: Settings) -> dict[str, Any]:
    """The export job: append what has arrived since the last export to `exported/`; returns counts.

    The event log is `serve.store`, or the one that `deploy` fills into `serve.config`. Raises SpringtideError if there
    is none, or while another export runs.
    """
    address = _address(settings)
    file = file_of(address)
    if file is not None and not file.exists():
        raise SpringtideError(f"there is no event log {file}; deploy first, or say with serve.store where it is")
    store = open_store(address, require_aof=False)  # it is only read
    folder = Path(settings.workspace) / FOLDER
    try:
        return {"folder": str(folder), **export_events(store, folder)}
    finally:
        store.close()


def _address(settings: Settings) -> str:
    if settings.serve.store is not None:
        return store_of(settings, settings.serve.store)
    config = load_config(settings.serve.config, allow_public=True)
    return store_of(settings, str(config["applications"][0]["args"]["store"]))


def export_events(store: HistoryStore, folder: Path) -> dict[str, Any]:
    """Append the events that no file of `folder` holds yet, as files of at most FILE_ROWS rows of EXPORTED.

    A file is named by the log's identity and the cursor after its last event, so the next export knows where to go on
    and logs of several stores live side by side. Each appears whole or not at all. A log that has lost its end (see
    `_still_valid`) is exported again from the last file that agrees with it. Returns {events, files, total,
    early}: events and files of this call, events of this log exported so far, and how many lie before March 1973.
    What arrives meanwhile is left to the next call, however busy the service is, but for a page at most. Raises
    SpringtideError if the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return _export(store, folder)
    except OSError as error:
        raise disk_error(error, folder) from error


def _export(store: HistoryStore, folder: Path) -> dict[str, Any]:
    identity = store.identity()
    for torn in folder.glob(".events-*.new"):  # of an export that was killed
        torn.unlink(missing_ok=True)
    done = _still_valid(store, folder, identity)
    end = store.cursor(0)
    cursor, events, files, early = max(done, default=0), 0, 0, 0
    while True:
        table, following = _next_events(store, cursor, end)
        if not len(table) and (done or files):  # a log without events gets a file too: `prepare` then finds the folder
            break
        path = folder / f"events-{identity}-{following:016d}.parquet"
        fresh = path.with_name(f".{path.name}.new")
        pq.write_table(table, fresh)
        replace_durably(fresh, path)  # the next export, and retention, rely on what has been exported
        cursor, events, files = following, events + len(table), files + 1
        early += sum(abs(time) < EARLIEST_MS for time in table["timestamp"].to_pylist())
        log.info("exported %d events", events)
    if early:
        log.warning("%d events lie before March 1973; prepare takes such small numbers for seconds", early)
    total = sum(pq.read_metadata(path).num_rows for path in _files_of(folder, identity).values())
    return {"events": events, "files": files, "total": total, "early": early}


def _next_events(store: HistoryStore, cursor: int, end: int) -> tuple[pa.Table, int]:
    """At most FILE_ROWS events after a cursor, as far as the page that holds the one of number `end`, and the cursor
    after them."""
    pages: list[pa.Table] = []
    rows = 0
    while rows < FILE_ROWS and cursor < end:
        events, cursor = store.since(cursor, min(PAGE, FILE_ROWS - rows))
        if not events:
            break
        pages.append(pa.Table.from_pylist(events, schema=EXPORTED))
        rows += len(events)
    return pa.concat_tables([EXPORTED.empty_table(), *pages]), cursor


def _still_valid(store: HistoryStore, folder: Path, identity: str) -> dict[int, Path]:
    """Exported files of one log that it agrees with, by the cursor after their last event.

    A Redis replica that takes over without the last events, or a log that comes back from a copy, gives their numbers
    to other events. Files from the first on whose last event is another one in the log now are put aside under another
    name: they hold acknowledged events that may be nowhere else, so `prepare` goes on reading them. What they share
    with the log is exported twice; `prepare` drops repeated rows.
    """
    done = _files_of(folder, identity)
    differing: list[int] = []
    for cursor in sorted(done, reverse=True):
        same = _agrees(store, cursor, done[cursor])
        if same:
            break
        if same is False:
            differing.append(cursor)
    if not differing:
        return done
    for cursor in [cursor for cursor in done if cursor >= min(differing)]:
        path = done.pop(cursor)
        names = (path.with_name(f"{path.stem}-before-{number}.parquet") for number in count(1))
        path.rename(next(name for name in names if not name.exists()))
    log.warning("the event log lost events that were exported before; they are kept, and what came since is exported")
    return done


def _agrees(store: HistoryStore, cursor: int, path: Path) -> bool | None:
    """Whether the last event of a file is the log's event of that number; None if retention has removed that one."""
    if cursor == 0:  # a log without events
        return True
    if store.cursor(0) < cursor:
        return False
    events, number = store.since(cursor - 1, 1)
    if number != cursor:
        return None
    last = pq.read_table(path, columns=["event_id"])["event_id"][-1].as_py()
    return bool(events[0]["event_id"] == last)


def _files_of(folder: Path, identity: str) -> dict[int, Path]:
    """Exported files of one log by the cursor after their last event."""
    name = re.compile(rf"events-{re.escape(identity)}-(\d+)\.parquet")
    return {int(found[1]): path for path in sorted(folder.iterdir()) if (found := name.fullmatch(path.name))}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two exports at once would write the same events twice."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpringtideError(f"another export into {folder} is running; wait for it to end") from None
        yield
