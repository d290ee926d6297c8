"""The layer around all that answers: request ids, counts, one log line per request, and faults of ours."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from springtide.errors import without_data
from springtide.serving.context import CURRENT, Note, request_id_from
from springtide.serving.metrics import Metrics
from springtide.serving.replies import error_reply

log = logging.getLogger("springtide.serving")
access = logging.getLogger("springtide.access")
CLOSED_BY_CALLER = 499  # as nginx logs it


class Observed:
    """Every answer carries an X-Request-ID, the caller's own if it is plain. access_log: write a line of JSON for each
    request, free of ids and texts of users and items. numbered: what is around it adds the id that the request came
    with."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool, numbered: bool = False) -> None:
        self._app, self._metrics, self._access_log, self._numbered = app, metrics, access_log, numbered
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        note = Note(request_id_from(given))
        told = self._numbered and given == note.request_id
        began, status, header = time.perf_counter(), CLOSED_BY_CALLER, (b"x-request-id", note.request_id.encode())
        started = False

        async def noted(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                if not told:
                    message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        self._flying(+1)
        token = CURRENT.set(note)
        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            log.error("unexpected error in request %s: %s", note.request_id, without_data(error))
            if started:  # the server logs what it is told, so it is not told what the error says
                raise RuntimeError("an error after the answer had begun; the line above tells where") from None
            reply = error_reply(500, "internal", "an internal error; the server's log tells more")
            await reply(scope, receive, noted)
        finally:
            CURRENT.reset(token)
            self._flying(-1)
            self._tell(scope, note, status, time.perf_counter() - began)

    def _flying(self, change: int) -> None:
        self._in_flight += change
        self._metrics.set("springtide_in_flight", self._in_flight)

    def _tell(self, scope: Scope, note: Note, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")  # the template: a path would tell ids
        self._metrics.count("springtide_requests", route=route, method=_method(scope), status=str(status))
        self._metrics.observe("springtide_request_seconds", seconds, route=route)
        if self._access_log:
            access.info(_line(scope, note, route, status, seconds))


def _method(scope: Scope) -> str:
    """Of a closed set: a caller may send any word, and each would become a label for ever."""
    method = scope["method"]
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"


def _line(scope: Scope, note: Note, route: str, status: int, seconds: float) -> str:
    told = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": note.request_id,
        "method": _method(scope),
        "route": route,
        "status": status,
        "ms": round(seconds * 1000, 2),
        "token": note.token,
        "model": note.model,
        "source": note.source,
        "degraded": note.degraded,
    }
    return json.dumps({key: value for key, value in told.items() if value is not None})


def start_access_log() -> None:
    """Send access lines to standard output, which Ray keeps in the replica's log files."""
    if not access.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
