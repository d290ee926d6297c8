"""Requests of HTTP version 1, with their bounds, and the one rule that reads a timestamp."""

from __future__ import annotations

import math
import time
import unicodedata
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

MAX_BODY_BYTES = 4 * 2**20
MAX_K = 1000
MAX_HISTORY = 10_000  # events accepted in one request
HISTORY_USED = 1000  # most recent events that a recommendation reads
MAX_QUERY = 2000  # characters
MAX_ID = 512
MAX_EVENTS = 1000  # in one call of POST /v1/events
MAX_TEXTS = 64
MAX_ITEM_TEXT = 20_000  # characters
MAX_AHEAD_MS = 86_400_000  # of an event, after this clock: a later one would stay the user's last for as long
_MILLISECONDS_FROM = 1e11  # numbers at or above this are milliseconds, below it seconds
_LAST_MS = 253_402_300_799_999  # the end of the year 9999
_FIRST_MS = -62_135_596_800_000  # the start of the year 1


def parse_timestamp(value: Any) -> int:
    """Milliseconds since 1970 UTC from epoch seconds, epoch milliseconds (numbers from 1e11 on) or ISO-8601 text.

    Text without an offset is UTC. Raises ValueError for anything else and for times outside the years 1 to 9999.
    """
    if type(value) is int and _MILLISECONDS_FROM <= value <= _LAST_MS:  # nearly every event of a long history
        return value
    if isinstance(value, str):
        text = value.strip()[:64]  # longer than any time; the ISO reader would accept endless fractions of a second
        try:
            value = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                raise ValueError("give epoch seconds, epoch milliseconds or ISO-8601 text") from None
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            return _in_range(round((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1000))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        raise ValueError("give epoch seconds, epoch milliseconds or ISO-8601 text")
    return _in_range(round(value if abs(value) >= _MILLISECONDS_FROM else value * 1000))


def _in_range(ms: int) -> int:
    if not _FIRST_MS <= ms <= _LAST_MS:
        raise ValueError("the time must lie in the years 1 to 9999 of UTC (if it is a number, is it in microseconds?)")
    return ms


def _not_ahead(ms: int) -> int:
    if ms > time.time() * 1000 + MAX_AHEAD_MS:
        raise ValueError("the time lies more than a day after this server's clock; check the clock of the sender")
    return ms


def _finite(value: int | float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _number_to_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _plain(text: str) -> str:
    """Refuse what could break a log line, a file or a database: control characters and half surrogate pairs."""
    if not (text.isascii() and text.isprintable()) and any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError("must not hold control characters")
    return text


def _speaking(text: str) -> str:
    if not text.strip():
        raise ValueError("must hold more than white space")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode text") from None
    return text


Identifier = Annotated[
    str,  # its bounds come first here, though second in effect: pydantic checks them itself then, and not in Python
    StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_ID),  # stripped as `prepare` does
    BeforeValidator(_number_to_text),
    AfterValidator(_plain),
]
Timestamp = Annotated[
    int,
    BeforeValidator(parse_timestamp, json_schema_input_type=int | float | str),
    Field(description="epoch seconds, epoch milliseconds (from 1e11 on) or ISO-8601"),
]
Rating = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Query = Annotated[str, Field(min_length=1, max_length=MAX_QUERY), AfterValidator(_speaking)]
Count = Annotated[int, Field(ge=1, le=MAX_K)]
Part = TypeVar("Part")
# To its first error: the others would cost more than the whole list.
Several = Annotated[list[Part], Field(fail_fast=True)]


class Request(BaseModel):
    """Unknown fields are refused, so that a misspelt one is never silently without effect."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class HistoryEvent(Request):
    item_id: Identifier
    timestamp: Timestamp | None = None
    action: Identifier | None = None
    rating: Rating | None = None


class Event(HistoryEvent):
    user_id: Identifier
    event_id: Identifier | None = Field(
        None, description="makes the call safe to repeat: an event with a known event_id is ignored"
    )
    timestamp: Annotated[Timestamp, AfterValidator(_not_ahead)] | None = Field(
        None, description="absent: the time of arrival; more than a day after it: refused"
    )


class Filters(Request):
    categories: Several[Identifier] = Field(default=[], max_length=1000, description="keep items of any of these")
    exclude_items: Several[Identifier] = Field(default=[], max_length=10_000)
    allow_items: Several[Identifier] | None = Field(None, max_length=10_000, description="keep these items only")


class RecommendRequest(Request):
    """At least one of user_id, history and query. A non-empty `history` is used in place of the user's stored one."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": "42", "k": 5}, {"history": [{"item_id": "50"}], "k": 5}]}
    )

    user_id: Identifier | None = None
    history: Several[HistoryEvent] | None = Field(
        None,
        max_length=MAX_HISTORY,
        description=f"oldest first unless timestamps say otherwise; the most recent {HISTORY_USED} events are used",
    )
    query: Query | None = Field(None, description="free text, in any language that the encoder knows")
    k: Count = 10
    exclude_seen: bool | None = Field(None, description="leave out items of the history; absent: as configured")
    filters: Filters = Field(default_factory=Filters)  # a default would be copied deep for each request
    diversity: float | None = Field(
        None, ge=0, le=1, description="0: by score alone; towards 1: unlike one another; absent: as configured"
    )
    model: Identifier | None = Field(None, description="a model's name or name@version; absent: the one that is served")
    now: Timestamp | None = Field(None, description="the time to answer for, as when a log is replayed; absent: now")
    explain: bool = False

    @model_validator(mode="after")
    def _someone(self) -> RecommendRequest:
        if self.user_id is None and self.history is None and self.query is None:
            raise ValueError("give at least one of user_id, history and query")
        return self


class EncodeRequest(Request):
    """`text` for one vector, `texts` for several."""

    text: Query | None = None
    texts: Several[Query] | None = Field(None, min_length=1, max_length=MAX_TEXTS)

    @model_validator(mode="after")
    def _one_of(self) -> EncodeRequest:
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either text or texts")
        return self


class ItemBody(Request):
    """An item as the catalogue would have it. Its text says what it is like; absent: title and categories."""

    title: Annotated[str, Field(max_length=MAX_ITEM_TEXT), AfterValidator(_plain)] = ""
    categories: Several[Identifier] = Field(default=[], max_length=100)
    text: Annotated[str, Field(min_length=1, max_length=MAX_ITEM_TEXT), AfterValidator(_speaking)] | None = None

    @model_validator(mode="after")
    def _something(self) -> ItemBody:
        if not self.told:
            raise ValueError("give a text, a title or categories: nothing else is known of a new item")
        return self

    @property
    def told(self) -> str:
        """What the encoder reads."""
        return self.text or ". ".join(part for part in (self.title.strip(), ", ".join(self.categories)) if part)


def _one_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "event"


EventsBody = Annotated[
    Annotated[Event, Tag("event")] | Annotated[Several[Event], Field(min_length=1, max_length=MAX_EVENTS), Tag("list")],
    Discriminator(_one_or_list),
]


BODIES: dict[str, type[Request]] = {  # of the routes, by the names of their functions
    "recommend": RecommendRequest,
    "events": Event,
    "put_item": ItemBody,
    "encode": EncodeRequest,
}
PARTS: dict[str, type[Request]] = {"filters": Filters, "history": HistoryEvent}  # what is within a body


class ApiError(Exception):
    """An error that a caller sees: an HTTP status, a short code and one sentence."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
