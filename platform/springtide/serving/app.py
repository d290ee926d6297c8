"""The HTTP application, version 1: routes, limits and error bodies over a Backend. Knows nothing of Ray."""

from __future__ import annotations

import difflib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException

from springtide.serving.bodies import BodyRoute, is_json
from springtide.serving.haproxy_config import MAX_CONCURRENT
from springtide.serving.limits import Bodies, Crowd
from springtide.serving.metrics import Metrics, PrometheusMetrics, SeveralMetrics
from springtide.serving.observe import Observed, start_access_log
from springtide.serving.replies import error_reply
from springtide.serving.responses import (
    EncodeResponse,
    ErrorBody,
    EventsResponse,
    InterestsResponse,
    ItemResponse,
    ModelsResponse,
    Readiness,
    RecommendResponse,
    SimilarResponse,
)
from springtide.serving.schemas import (
    BODIES,
    MAX_BODY_BYTES,
    PARTS,
    ApiError,
    Count,
    EncodeRequest,
    EventsBody,
    Identifier,
    ItemBody,
    RecommendRequest,
)
from springtide.serving.security import Authorised, OwnHosts, SafeHeaders, needed_scope
from springtide.serving.service import Backend
from springtide.serving.tokens import TokenBook

_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "the body is not JSON"},
    401: {"model": ErrorBody, "description": "no token, or an unknown one, where tokens are asked for"},
    403: {"model": ErrorBody, "description": "the token lacks the scope of this route"},
    404: {"model": ErrorBody, "description": "an unknown user, item or model"},
    408: {"model": ErrorBody, "description": "the body did not arrive in time"},
    409: {"model": ErrorBody, "description": "as many items were added as the service takes"},
    413: {"model": ErrorBody, "description": f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB"},
    421: {
        "model": ErrorBody,
        "description": "without tokens: the Host is neither an address nor a name of this service",
    },
    422: {"model": ErrorBody, "description": "a field is missing, misspelt or out of bounds"},
    429: {"model": ErrorBody, "description": "the token's rate or daily quota is used up; see Retry-After"},
    503: {"model": ErrorBody, "description": "a part does not answer, or too many requests at once; see Retry-After"},
}


@dataclass(frozen=True)
class Edge:
    """What stands between callers and the routes."""

    tokens: TokenBook | None = None  # None: everybody may ask, so listen on loopback alone
    hosts: tuple[str, ...] = ()  # names of this service beside localhost, looked at where there are no tokens
    metrics: PrometheusMetrics = field(default_factory=PrometheusMetrics)  # what GET /metrics shows
    also: Metrics | None = None  # counted there too
    access_log: bool = False
    numbered: bool = False  # what serves the application adds X-Request-ID to every answer
    max_concurrent: int = MAX_CONCURRENT  # requests under way at once; more are refused with 503

    @property
    def counted(self) -> Metrics:
        """Where to count, so that it is seen in every place."""
        return self.metrics if self.also is None else SeveralMetrics([self.metrics, self.also])


def create_app(backend: Backend, edge: Edge | None = None) -> FastAPI:
    """The application over one backend, which it closes in the end. `/docs` needs no other host."""
    edge = edge or Edge()
    metrics = edge.counted

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        backend.close()

    app = FastAPIOffline(
        lifespan=lifespan,
        redoc_url=None,
        title="Springtide",
        version="1",
        description="Recommendations that fuse long-term and short-term interest. "
        'Errors are `{"error": {"code", "message"}}`.',
        responses=_ERRORS,
    )
    app.add_middleware(Crowd, limit=edge.max_concurrent, metrics=metrics)  # the innermost
    app.add_middleware(Bodies)  # a caller who stalls takes no place in the crowd
    if edge.tokens is not None:
        app.add_middleware(Authorised, book=edge.tokens)
    else:
        app.add_middleware(OwnHosts, names=edge.hosts)
    if edge.access_log:
        start_access_log()
    app.add_middleware(Observed, metrics=metrics, access_log=edge.access_log, numbered=edge.numbered)
    app.add_middleware(SafeHeaders)  # the outermost: answers to faults of ours carry them too
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    _add_recommending(app, backend)
    _add_operations(app, backend)
    _add_metrics(app, edge.metrics)
    if edge.tokens is not None:
        _describe_tokens(app)
    return app


def _describe_tokens(app: FastAPI) -> None:
    """Say in the OpenAPI document that the routes take a bearer token, so that `/docs` can send one."""
    described = app.openapi

    def with_tokens() -> dict[str, Any]:
        document = described()
        document.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                if needed_scope(method.upper(), path) is None:
                    operation["security"] = []
        return document

    app.openapi = with_tokens  # type: ignore[method-assign]


def _add_recommending(app: FastAPI, backend: Backend) -> None:
    router = APIRouter(route_class=BodyRoute)

    @router.post("/v1/recommend", response_model=RecommendResponse, tags=["recommend"])
    async def recommend(request: RecommendRequest) -> Any:
        """The best items for a known user, a history, a free text, or several of these together."""
        return JSONResponse(await backend.recommend(request))

    @router.post("/v1/events", status_code=202, response_model=EventsResponse, tags=["events"])
    async def events(body: Annotated[EventsBody, Body()]) -> Any:
        """Append one event or up to 1,000. Answered once they are durable; the next `recommend` knows them."""
        return JSONResponse(await backend.events(body if isinstance(body, list) else [body]), status_code=202)

    @router.put("/v1/items/{item_id:path}", response_model=ItemResponse, tags=["items"])
    async def put_item(item_id: Identifier, item: ItemBody) -> Any:
        """Add an item, or replace what is known of it. Durable when answered; the next `recommend` can hold it."""
        return JSONResponse(await backend.put_item(item_id, item))

    @router.post("/v1/encode", response_model=EncodeResponse, tags=["text"])
    async def encode(request: EncodeRequest) -> Any:
        """Normalised text vectors, as the model sees a query."""
        return JSONResponse(await backend.encode(request))

    app.include_router(router)

    @app.get("/v1/users/{user_id:path}/interests", response_model=InterestsResponse, tags=["recommend"])
    async def interests(user_id: Identifier) -> Any:
        """A user's history with the attention of both branches, the gate, and each branch's categories and items."""
        return JSONResponse(await backend.interests(user_id))

    @app.get("/v1/items/{item_id:path}/similar", response_model=SimilarResponse, tags=["recommend"])
    async def similar(item_id: Identifier, k: Annotated[Count, Query()] = 10) -> Any:
        """The nearest items by the model's item vectors."""
        return JSONResponse(await backend.similar(item_id, k))


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

    for path, endpoint in (("/healthz", healthz), ("/readyz", readyz)):  # some load balancers ask by HEAD
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> RedirectResponse:
        return RedirectResponse(request.scope.get("root_path", "") + "/docs")


def _add_metrics(app: FastAPI, metrics: PrometheusMetrics) -> None:
    @app.get("/metrics", response_class=Response, tags=["operations"])
    async def exposition() -> Response:
        """What this process has counted, for Prometheus. Behind several Ingress replicas scrape Ray's metrics."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


# ---------------------------------------------------------------- errors
async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return error_reply(error.status, error.code, error.message, headers)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    code, message = _CODES.get(error.status_code, "error"), str(error.detail)
    if error.status_code == 400:
        message = "the body cannot be read as JSON"
    elif error.status_code == 404:
        message = "there is no such route; GET /docs tells all of them"
    elif error.status_code == 405:
        message = f"this route takes {(error.headers or {}).get('Allow', 'another method')}"
    return error_reply(error.status_code, code, message, error.headers)


_SAID = {
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "too_short": "must not be empty",
}


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """The first problem, by its place in the request; the values sent are not repeated."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return error_reply(400, "invalid_json", f"the body is not JSON (at character {first['loc'][-1]})")
    where = ".".join(str(part) for part in first["loc"][1:] if part not in ("event", "list"))
    message = _SAID.get(first["type"], str(first["msg"]).removeprefix("Value error, "))
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown and first["type"] in ("extra_forbidden", "missing"):  # a misspelt field is also missing
        place = [str(part) for part in unknown[0]["loc"][1:] if part not in ("event", "list")]
        near = difflib.get_close_matches(place[-1], _fields_at(request, place), n=1)
        where, message = ".".join(place), f"unknown field{f'; did you mean {near[0]}?' if near else ''}"
    if not where and first["type"] in ("missing", *_SAID):
        where = "body"
        if first["type"] == "missing" or not is_json(request.headers):
            message = "send JSON with Content-Type: application/json"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    sentence = f"{where}: {message[0].lower()}{message[1:]}{more}" if where else f"{message}{more}"
    return error_reply(422, "invalid_request", _printable(sentence))


def _fields_at(request: Request, place: list[str]) -> list[str]:
    """The fields of the object in which a field is, whose path in the body is `place`."""
    body = BODIES.get(getattr(request.scope.get("route"), "name", ""))
    within = PARTS.get(place[0]) if len(place) > 1 else None
    return [] if body is None else list((within or body).model_fields)


def _printable(text: str) -> str:
    """Names of unknown fields come from the caller: keep the sentence short and free of what JSON cannot carry."""
    return text.encode("utf-8", "replace").decode("utf-8")[:500]
