"""What is noted of the request under way, for its log line: by any code that it runs through, without passing it on."""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


@dataclass
class Note:
    """Nothing here tells who the user is or what they did."""

    request_id: str
    token: str | None = None  # name of the bearer token
    model: str | None = None  # that made the answer
    source: str | None = None
    degraded: bool = False


CURRENT: ContextVar[Note | None] = ContextVar("springtide_request", default=None)


def current_note() -> Note:
    """The note of the request under way; outside of one, a new note that nobody reads."""
    return CURRENT.get() or Note(new_request_id())


def request_id_from(header: str | None) -> str:
    """The caller's X-Request-ID if it is short and plain, so that it can stand in a log; else a new one."""
    return header if header is not None and _PLAIN.match(header) else new_request_id()


def new_request_id() -> str:
    return uuid.uuid4().hex
