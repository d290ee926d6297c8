"""The exposure log: what was shown to whom, by which model, as lines of JSON in parts below a folder.

Written by one background thread behind a bounded queue, so that a slow or full disk costs exposures, which are
counted, and never a request. The outcomes are the events that follow; `springtide ab-report` joins the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import queue
import re
import secrets
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from springtide.errors import SpringtideError
from springtide.serving.options import ExposureOptions
from springtide.serving.traffic import Choice

log = logging.getLogger("springtide.serving")
Json = dict[str, Any]
FOLDER = "exposures"  # in the workspace
SALT = "salt"  # in that folder: what makes the pseudonyms, and what joins them to events
_PSEUDONYM = re.compile("[0-9a-f]{32}")
_LOOK_S = 0.5  # least pause between two looks at the age of a part to which nothing is added
_RETRY_S = 1.0  # after the disk refused
_PAUSE_S = 0.05  # after each write: waking the writer for every request takes longer than what it writes


def exposure(
    request_id: str, user_id: str | None, choice: Choice, answer: Json, now: int, nonce: str | None = None
) -> Json:
    """One line of the log; now: ms. The rank of an item is its place in `items`, from 1.

    nonce: which, after the request's id and a space, was the chance of exploration; only noted where there was some.
    """
    row: Json = {
        "request_id": request_id,
        "time": now,
        "user": user_id,
        "model": answer["model"],  # that answered, as name@version
        "arm": choice.model,  # that was chosen, or null for the primary
        "by": choice.by,
        "share": choice.share,
        "test": choice.test,
        "source": answer["source"],
        "degraded": bool(answer.get("degraded", False)),
        "items": [item["item_id"] for item in answer["items"]],
    }
    if any("propensity" in item for item in answer["items"]):
        row["propensities"] = [item.get("propensity") for item in answer["items"]]
        row["nonce"] = nonce
    return row


class ExposureLog:
    """Parts of at most max_mb or max_age_s each, named by the time of their first line and their process.

    `record` may be called from any thread and never waits. Lines go to the file twenty times a second, if the disk has
    taken those before, so a killed process loses at most what waits for it; a torn last line is left out by `read`.
    """

    def __init__(self, folder: Path, options: ExposureOptions) -> None:
        """Raises SpringtideError if the folder cannot be written."""
        self._folder, self._options = folder, options
        self._salt = salt_of(folder, create=True) if options.pseudonymise else None
        self._queue: queue.Queue[Json | None] = queue.Queue(options.queue)
        self._file: IO[str] | None = None
        self._opened = 0.0
        self.written = self.dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="exposures", daemon=True)
        self._thread.start()

    def record(self, row: Json) -> None:
        """Queue one exposure; it is dropped and counted if the disk does not keep up."""
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self.dropped += 1

    def told(self) -> Json:
        return {"written": self.written, "dropped": self.dropped, "waiting": self._queue.qsize()}

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, within a time limit."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            log.error("exposures left unwritten: the disk does not keep up")
            return
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while True:
            rows, last = self._next()
            pause_s = _PAUSE_S if rows and 2 * len(rows) < self._options.queue else 0.0  # none where it may overflow
            try:
                self._write(rows)
                self.written += len(rows)
            except OSError as error:
                self.dropped += len(rows)
                self._close_file()
                log.error("%d exposures not written: %s", len(rows), error.strerror or error)
                pause_s = _RETRY_S
            if last:
                self._close_file()
                return
            time.sleep(pause_s)

    def _next(self) -> tuple[list[Json], bool]:
        """Everything that waits, after waiting for something, and whether it is the last."""
        rows: list[Json] = []
        try:
            row = self._queue.get(timeout=max(_LOOK_S, self._options.max_age_s / 10))
            while row is not None:
                rows.append(row)
                if len(rows) == self._options.queue:  # before another one is taken out
                    return rows, False
                row = self._queue.get_nowait()
        except queue.Empty:
            return rows, False
        return rows, True

    def _write(self, rows: list[Json]) -> None:
        if self._file is not None and time.monotonic() - self._opened > self._options.max_age_s:
            self._close_file()
        if not rows:
            return
        for row in rows:
            if self._file is None:
                self._file = self._open()
            self._file.write(json.dumps(self._hidden(row), ensure_ascii=False, separators=(",", ":")) + "\n")
            if self._file.tell() > self._options.max_mb * 2**20:
                self._close_file()
        if self._file is not None:
            self._file.flush()

    def _open(self) -> IO[str]:
        self._drop_old()
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._opened = time.monotonic()
        return (self._folder / name).open("x", encoding="utf-8")

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                log.error("a part of the exposures may be torn: %s", error.strerror or error)

    def _drop_old(self) -> None:
        if self._options.keep_days is None:
            return
        before = time.time() - self._options.keep_days * 86_400
        for path in self._folder.glob("*.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # another replica removes them too
                if path.stat().st_mtime < before:
                    path.unlink()

    def _hidden(self, row: Json) -> Json:
        """As it is written; `hidden` tells which way, as the setting may change while the log goes on."""
        if row["user"] is None:
            return row
        if self._salt is None:
            return {**row, "hidden": False}
        return {**row, "user": pseudonym(self._salt, row["user"]), "hidden": True}


def pseudonym(salt: bytes, user_id: str) -> str:
    """32 hex digits of a keyed hash: the same for the same user, of no use without the salt."""
    return hmac.new(salt, user_id.encode(), hashlib.sha256).hexdigest()[:32]


def hidden(row: Json) -> bool:
    """Whether the user of a line is a pseudonym."""
    if "hidden" in row or row["user"] is None:
        return bool(row.get("hidden"))
    return _PSEUDONYM.fullmatch(row["user"]) is not None  # a line of a version that did not say


def salt_of(folder: Path, create: bool = False) -> bytes | None:
    """The secret of a folder of exposures, made with its first use, readable by its owner; None if there is none.

    Raises SpringtideError if it cannot be read or made.
    """
    path = folder / SALT
    try:
        if create and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / f".{SALT}.{uuid.uuid4().hex[:8]}"
            fresh.touch(mode=0o600)
            fresh.write_text(secrets.token_hex(32), encoding="ascii")
            try:
                os.link(fresh, path)  # whole or not at all; of two replicas that make one, the first wins
            except FileExistsError:
                pass
            finally:
                fresh.unlink(missing_ok=True)
        return path.read_bytes().strip() if path.exists() else None
    except OSError as error:
        raise SpringtideError(
            f"the exposure log {folder} cannot be used: {error.strerror or error}; check the folder and its owner"
        ) from error


def read(folder: Path) -> Iterator[Json]:
    """Every exposure below a folder, part by part in order of time. A torn last line of a part is left out.

    Raises SpringtideError for a folder without parts and for a damaged line elsewhere.
    """
    parts = sorted(folder.glob("*.jsonl"))
    if not parts:
        raise SpringtideError(f"there are no exposures in {folder}; turn `exposures` on in Ingress' user_config")
    for part in parts:
        with part.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    break
                try:
                    yield json.loads(line)
                except ValueError:
                    raise SpringtideError(f"{part}, line {number}, is not JSON; remove the line or the part") from None
