"""Who may ask: bearer tokens with scopes, rates and quotas, and the headers that keep browsers from mischief.

Rates and quotas are counted in each Ingress replica by itself: with n replicas a token may pass up to n times as often.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from springtide.serving.context import current_note
from springtide.serving.replies import error_reply
from springtide.serving.tokens import TokenBook

OPEN = ("/healthz", "/readyz")  # what load balancers ask; no more than yes, no and which check
DOCUMENTATION = ("/", "/docs", "/openapi.json", "/static-offline-docs")  # of the interface alone, which is no secret
_READS = ("/v1/recommend", "/v1/encode")  # POST for their bodies, yet they change nothing
_COMMON = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
_ANSWERS = [
    *_COMMON,
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]
# The page has one inline script and style, and talks to this host alone.
_PAGES = [
    *_COMMON,
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    ),
]


def route_path(scope: Scope) -> str:
    """The path below the prefix that the application is mounted at, as the router reads it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path


def needed_scope(method: str, path: str) -> str | None:
    """read, write or admin; None where no token is needed. What is not known here needs admin."""
    if path in OPEN or _is_documentation(path):
        return None
    if path == "/metrics" or path in _READS:
        return "read"
    if path.startswith("/v1/"):
        return "read" if method in ("GET", "HEAD") else "write"
    return "admin"


def _is_documentation(path: str) -> bool:
    return path in DOCUMENTATION or path.startswith(DOCUMENTATION[-1] + "/")


class Authorised:
    """Lets a request pass whose bearer token has the scope that its route needs, within the token's rate and quota."""

    def __init__(self, app: ASGIApp, book: TokenBook) -> None:
        self._app, self._book = app, book

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing of ours speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        needed = needed_scope(scope["method"], route_path(scope))
        if needed is None:
            await self._app(scope, receive, send)
            return
        kind, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        token = self._book.find(secret.strip()) if kind.lower() == "bearer" else None
        if token is None:
            challenge = 'Bearer realm="springtide"' + (', error="invalid_token"' if secret else "")
            message = "the token is not known" if secret else "send a token: Authorization: Bearer ..."
            reply = error_reply(401, "unauthorized", message, {"WWW-Authenticate": challenge})
        elif not token.may(needed):
            challenge = f'Bearer realm="springtide", error="insufficient_scope", scope="{needed}"'
            reply = error_reply(
                403, "forbidden", f"the token lacks the scope {needed}", {"WWW-Authenticate": challenge}
            )
        else:
            current_note().token = token.name
            wait_s = self._book.wait_s(token)
            if wait_s == 0:
                await self._app(scope, receive, send)
                return
            reply = error_reply(
                429,
                "too_many_requests",
                f"the token's rate or daily quota is used up; it may ask again in {wait_s} s",
                {"Retry-After": str(wait_s)},
            )
        await reply(scope, receive, send)


class OwnHosts:
    """Lets a request pass that names this service by an IP address, as localhost or by one of `names`.

    Where nobody is asked for a token, listening on loopback keeps strangers out, but not a web page that this machine's
    browser shows and whose name has come to mean 127.0.0.1: such a request carries that name.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app, self._names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._own(Headers(scope=scope).get("host")):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            message = "this service goes by another name; ask for it by its address, or add the name to allowed_hosts"
            await error_reply(421, "wrong_host", message)(scope, receive, send)

    def _own(self, host: str | None) -> bool:
        if not host:  # no browser
            return True
        name = (host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]).lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


class SafeHeaders:
    """Headers on every answer: no sniffing, no caching of answers, no framing, a content policy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        added = _PAGES if _is_documentation(route_path(scope)) else _ANSWERS

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        await self._app(scope, receive, safe)
