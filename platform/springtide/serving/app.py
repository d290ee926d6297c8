"""The HTTP application, version 1: routes, limits and error bodies over a Backend. Knows nothing of Ray."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from springtide.serving.schemas import (
    MAX_BODY_BYTES,
    ApiError,
    Count,
    EncodeRequest,
    EncodeResponse,
    ErrorBody,
    EventsBody,
    EventsResponse,
    Identifier,
    InterestsResponse,
    ModelsResponse,
    Readiness,
    RecommendRequest,
    RecommendResponse,
    SimilarResponse,
)
from springtide.serving.service import Backend

log = logging.getLogger("springtide.serving")

_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the body is not JSON"},
    404: {"model": ErrorBody, "description": "an unknown user, item or model"},
    413: {"model": ErrorBody, "description": f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB"},
    422: {"model": ErrorBody, "description": "a field is missing, misspelt or out of bounds"},
    503: {"model": ErrorBody, "description": "a part does not answer; try again"},
}


def create_app(backend: Backend) -> FastAPI:
    """The application over one backend. `/docs` is served from files of the fastapi-offline package, not a CDN."""
    app = FastAPIOffline(
        redoc_url=None,
        title="Springtide",
        version="1",
        description="Recommendations that fuse long-term and short-term interest. "
        'Errors are `{"error": {"code", "message"}}`.',
        responses=_ERRORS,
    )
    app.add_middleware(_Limits)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    _add_recommending(app, backend)
    _add_operations(app, backend)
    return app


def _add_recommending(app: FastAPI, backend: Backend) -> None:
    @app.post("/v1/recommend", response_model=RecommendResponse, tags=["recommend"])
    async def recommend(request: RecommendRequest) -> Any:
        """The best items for a known user, a history, a free text, or several of these together."""
        return JSONResponse(await backend.recommend(request))

    @app.post("/v1/events", status_code=202, response_model=EventsResponse, tags=["events"])
    async def events(body: Annotated[EventsBody, Body()]) -> Any:
        """Append one event or up to 1,000. Answered once they are durable; the next `recommend` knows them."""
        return JSONResponse(await backend.events(body if isinstance(body, list) else [body]), status_code=202)

    @app.get("/v1/users/{user_id:path}/interests", response_model=InterestsResponse, tags=["recommend"])
    async def interests(user_id: Identifier) -> Any:
        """A user's history with the attention of both branches, the gate, and each branch's categories and items."""
        return JSONResponse(await backend.interests(user_id))

    @app.get("/v1/items/{item_id:path}/similar", response_model=SimilarResponse, tags=["recommend"])
    async def similar(item_id: Identifier, k: Annotated[Count, Query()] = 10) -> Any:
        """The nearest items by the model's item vectors."""
        return JSONResponse(await backend.similar(item_id, k))

    @app.post("/v1/encode", response_model=EncodeResponse, tags=["text"])
    async def encode(request: EncodeRequest) -> Any:
        """Normalised text vectors, as the model sees a query."""
        return JSONResponse(await backend.encode(request))


def _add_operations(app: FastAPI, backend: Backend) -> None:
    @app.get("/v1/models", response_model=ModelsResponse, tags=["operations"])
    async def models() -> Any:
        """The models served, with their versions and metrics."""
        return JSONResponse(await backend.models())

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}}, tags=["operations"])
    async def readyz() -> Any:
        """Every part that a recommendation needs answers, and the users' histories are in place."""
        state = await backend.ready()
        return JSONResponse(state, status_code=200 if state["ready"] else 503)

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> RedirectResponse:
        return RedirectResponse(request.scope.get("root_path", "") + "/docs")


# ---------------------------------------------------------------- errors and limits
def _body(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(_body(error.code, error.message), error.status, headers)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    code = _CODES.get(error.status_code, "error")
    message = "the body cannot be read as JSON" if error.status_code == 400 else str(error.detail)
    return JSONResponse(_body(code, message), error.status_code, error.headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """The first problem, by its place in the request; the values sent are not repeated."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return JSONResponse(_body("invalid_json", f"the body is not JSON (at character {first['loc'][-1]})"), 400)
    where = ".".join(str(part) for part in first["loc"][1:] if part not in ("event", "list"))
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    if first["type"] == "missing" and not where:
        where, message = "body", "send a JSON body with Content-Type: application/json"
    if first["type"] in ("model_attributes_type", "dict_type") and not where:
        where, message = "body", "send a JSON object with Content-Type: application/json"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    sentence = f"{where}: {message[0].lower()}{message[1:]}{more}" if where else f"{message}{more}"
    return JSONResponse(_body("invalid_request", _printable(sentence)), 422)


def _printable(text: str) -> str:
    """Names of unknown fields come from the caller: keep the sentence short and free of what JSON cannot carry."""
    return text.encode("utf-8", "replace").decode("utf-8")[:500]


class _Limits:
    """Refuses a body over the limit before it is read whole, and turns what nobody caught into an error body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, size = False, 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        declared = Headers(scope=scope).get("content-length", "0")
        try:
            if declared.isdecimal() and int(declared[:20]) > MAX_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            await self._app(scope, counted, noted)
        except Exception as error:
            if started:
                raise
            if isinstance(error, HTTPException):
                response = JSONResponse(_body("too_large", str(error.detail)), error.status_code)
            else:
                log.exception("unexpected error in %s", json.dumps(scope["path"]))
                status = HTTPStatus.INTERNAL_SERVER_ERROR
                response = JSONResponse(_body("internal", "an internal error; the server's log tells more"), status)
            await response(scope, receive, send)


_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB; send fewer events at once"
