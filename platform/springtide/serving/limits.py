"""Bounds that hold before anything is parsed: how many requests at once, how large, how late and how deep a body.

A body is UTF-8, or nothing here would tell how deep it is.
"""

from __future__ import annotations

import asyncio

import numpy as np
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from springtide.serving.bodies import read_apart
from springtide.serving.metrics import Metrics
from springtide.serving.replies import error_reply
from springtide.serving.schemas import MAX_BODY_BYTES, MAX_HISTORY
from springtide.serving.security import route_path

MAX_DEPTH = 32  # the deepest request of ours is 4
MAX_OPENERS = 2 * MAX_HISTORY  # lists and objects in one body
MAX_COMMAS = 7 * MAX_HISTORY  # the fullest request of ours has 61,000; the parser lets nobody else run meanwhile
BODY_TIMEOUT_S = 15.0  # for the whole body: a caller who stalls holds nothing for longer
SMALL_BODY_BYTES = 2**20
_LARGE_PATHS = ("/v1/recommend", "/v1/events")  # which take lists of events
_UNBOUNDED = ("/healthz", "/readyz", "/metrics")  # which must answer under load too
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


class Crowd:
    """Refuses requests beyond `limit` at once, with 503 and Retry-After: those under way are then answered in time."""

    def __init__(self, app: ASGIApp, limit: int, metrics: Metrics) -> None:
        self._app, self._limit, self._metrics = app, limit, metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) in _UNBOUNDED:
            await self._app(scope, receive, send)
            return
        if self._inside >= self._limit:
            self._metrics.count("springtide_shed")
            reply = error_reply(503, "overloaded", "too many requests are under way; try again", {"Retry-After": "1"})
            await reply(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1


class Bodies:
    """Reads the whole body within the limits and hands it on in one piece, or refuses it."""

    def __init__(self, app: ASGIApp, timeout_s: float = BODY_TIMEOUT_S) -> None:
        self._app, self._timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = MAX_BODY_BYTES if route_path(scope) in _LARGE_PATHS else SMALL_BODY_BYTES
        declared = Headers(scope=scope).get("content-length")
        try:
            body = await asyncio.wait_for(_read(receive, declared, limit), self._timeout_s)
        except _TooLarge:
            reply = error_reply(413, "too_large", f"the body is larger than {limit // 2**20} MiB; send less at once")
        except TimeoutError:
            reply = error_reply(408, "body_timeout", "the body did not arrive in time", {"Connection": "close"})
        else:
            if body is None:  # the caller has gone
                return
            fault = await read_apart(len(body), lambda: _fault(body))
            if fault is None:
                await self._app(scope, _replay(body, receive), send)
                return
            reply = error_reply(400, "invalid_json", fault)
        await reply(scope, receive, send)


class _TooLarge(Exception):
    pass


async def _read(receive: Receive, declared: str | None, limit: int) -> bytes | None:
    """The whole body; None if the caller left. Raises _TooLarge as soon as that is known."""
    if declared is not None and declared.isdecimal() and int(declared[:20]) > limit:
        raise _TooLarge
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _TooLarge
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever else comes (the caller's leaving)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _fault(body: bytes) -> str | None:
    """Why no body like this one is parsed, or None."""
    if not is_utf8(body):
        return "the body is not JSON in UTF-8"
    if too_deep(body):
        return "the body nests too deep or holds too many values"
    return None


def is_utf8(body: bytes) -> bool:
    """Whether a body is what JSON in UTF-8 can be: UTF-8 without zero bytes.

    Python's parser takes zero bytes for UTF-16 or UTF-32, in which brackets and quotes are not the bytes counted here.
    """
    if b"\0" in body:
        return False
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def too_deep(body: bytes) -> bool:
    """Whether JSON in UTF-8 nests deeper than MAX_DEPTH, or holds more than MAX_OPENERS lists and objects or MAX_COMMAS
    commas.

    Those within strings do not count. Of text that is no JSON the answer means nothing; its parser refuses it.
    """
    openers = body.count(b"[") + body.count(b"{")
    if openers <= MAX_DEPTH and body.count(b",") <= MAX_COMMAS:
        return False
    if b"\\" in body:  # pairs first: what is left of a run then tells whether it escapes a quote
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    text = np.frombuffer(body, np.uint8)
    within = np.bitwise_xor.accumulate((text == ord('"')).view(np.uint8))  # 1 from each quote that opens a string
    if np.count_nonzero((text == ord(",")) & (within == 0)) > MAX_COMMAS:
        return True
    steps = _STEPS[text] * (1 - within).astype(np.int8)
    return bool((steps > 0).sum() > MAX_OPENERS or np.cumsum(steps, dtype=np.int32).max(initial=0) > MAX_DEPTH)
