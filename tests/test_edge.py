"""The layers around the routes: request ids, log lines, counts, the crowd's limit, bodies bounded before parsing."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from springtide.serving.app import Edge, create_app
from springtide.serving.bodies import parsed
from springtide.serving.limits import MAX_COMMAS, MAX_DEPTH, MAX_OPENERS, Bodies, Crowd, is_utf8, too_deep
from springtide.serving.metrics import NoMetrics, PrometheusMetrics
from springtide.serving.replies import error_reply
from springtide.serving.schemas import MAX_BODY_BYTES, MAX_HISTORY, ApiError, RecommendRequest

HERE = "http://127.0.0.1"
SECRET = "user-4711 likes\nknitting"


class Backend:
    """Notes nothing and fails on demand."""

    async def recommend(self, request: Any) -> dict[str, Any]:
        if request.user_id == "refused":
            raise ApiError(503, "scorer_unavailable", "the model does not answer")
        if request.user_id == "broken":
            raise KeyError(SECRET)
        return {"items": [], "model": "m@1", "source": "popular", "gate": {"long": None, "short": None}}

    def close(self) -> None:
        pass


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    monkeypatch.setattr(logging.getLogger("springtide.access"), "info", written.append)
    return written


def client_of(**edge: Any) -> TestClient:
    return TestClient(create_app(Backend(), Edge(**edge)), HERE, raise_server_exceptions=False)  # type: ignore[arg-type]


# ---------------------------------------------------------------- ids, lines, counts
def test_a_plain_request_id_comes_back_and_another_is_replaced() -> None:
    with client_of() as client:
        assert client.get("/healthz", headers={"X-Request-ID": "shop-1.A_b"}).headers["X-Request-ID"] == "shop-1.A_b"
        for bad in ("a b", "x" * 65, 'a"b', "a\u00e9", ""):
            given_back = client.get("/healthz", headers={"X-Request-ID": bad.encode("latin-1")}).headers["X-Request-ID"]
            assert given_back != bad
            assert len(given_back) == 32


def test_an_id_that_the_server_adds_is_not_told_twice() -> None:
    with client_of(numbered=True) as client:
        assert "X-Request-ID" not in client.get("/healthz", headers={"X-Request-ID": "shop-1"}).headers
        assert len(client.get("/healthz", headers={"X-Request-ID": "a b"}).headers["X-Request-ID"]) == 32


def test_one_line_for_each_request_without_what_was_asked(lines: list[str]) -> None:
    with client_of(access_log=True) as client:
        client.post("/v1/recommend", json={"user_id": "user-4711", "query": SECRET}, headers={"X-Request-ID": "r1"})
        client.get("/v1/users/user-4711/interests")
        client.post("/v1/recommend", json={"user_id": "refused"})
        client.post("/v1/recommend", json={"user_id": "broken"})
        client.get("/user-4711")
    told = [json.loads(line) for line in lines]
    assert [(line["route"], line["status"]) for line in told] == [
        ("/v1/recommend", 200),
        ("/v1/users/{user_id:path}/interests", 500),
        ("/v1/recommend", 503),
        ("/v1/recommend", 500),
        ("unmatched", 404),
    ]
    assert told[0]["request_id"] == "r1"
    assert told[0]["ms"] > 0
    assert "4711" not in "".join(lines) and "knitting" not in "".join(lines)


def test_an_error_of_ours_is_logged_without_what_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    with client_of() as client:
        client.post("/v1/recommend", json={"user_id": "broken"}, headers={"X-Request-ID": "r1"})
    assert "knitting" not in caplog.text and "4711" not in caplog.text
    assert "unexpected error in request r1: KeyError at " in caplog.text and "test_edge.py:" in caplog.text


def test_an_error_of_ours_carries_the_headers_of_every_answer() -> None:
    with client_of() as client:
        fine, broken = (client.post("/v1/recommend", json={"user_id": user}) for user in ("u", "broken"))
    assert broken.status_code == 500 and set(broken.headers) == set(fine.headers)
    assert broken.headers.get_list("X-Content-Type-Options") == ["nosniff"]


def test_without_the_setting_no_line_is_written(lines: list[str]) -> None:
    with client_of() as client:
        client.get("/healthz")
    assert lines == []


def test_counts_by_route_and_status() -> None:
    with client_of() as client:
        for _ in range(3):
            client.post("/v1/recommend", json={"user_id": "u"})
        client.post("/v1/recommend", json={"user_id": "u", "k": 0})
        client.request("BREW", "/v1/recommend")
        text = client.get("/metrics").text
    counted = 'springtide_requests_total{method="%s",route="/v1/recommend",status="%s"} %s'
    assert counted % ("POST", 200, 3.0) in text
    assert counted % ("POST", 422, 1.0) in text
    assert counted % ("other", 405, 1.0) in text
    assert 'springtide_request_seconds_count{route="/v1/recommend"} 5.0' in text
    assert "springtide_in_flight 1.0" in text  # the one that asks


def test_registries_are_apart() -> None:
    one, other = PrometheusMetrics(), PrometheusMetrics()
    one.count("springtide_shed", 2)
    assert b"springtide_shed_total 2.0" in one.text()
    assert b"springtide_shed_total 0.0" in other.text()


# ---------------------------------------------------------------- the crowd
def test_a_crowd_is_refused_at_once_and_those_inside_are_answered() -> None:
    async def run() -> None:
        door = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await door.wait()
            await error_reply(200, "fine", "fine")(scope, receive, send)

        metrics = PrometheusMetrics()
        crowd = Crowd(slow, 3, metrics)

        async def ask(path: str = "/v1/recommend") -> tuple[int, dict[bytes, bytes]]:
            heads: list[Message] = []

            async def send(message: Message) -> None:
                heads.append(message)

            await crowd({"type": "http", "path": path}, _never, send)
            return heads[0]["status"], dict(heads[0]["headers"])

        inside = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0)
        refused = await ask()
        assert (refused[0], refused[1][b"retry-after"]) == (503, b"1")
        healthy = asyncio.create_task(ask("/healthz"))
        door.set()
        assert [status for status, _ in await asyncio.gather(*inside, healthy)] == [200] * 4
        assert (await ask())[0] == 200
        assert b"springtide_shed_total 1.0" in metrics.text()

    asyncio.run(run())


async def _never() -> Message:
    await asyncio.sleep(60)
    raise AssertionError


# ---------------------------------------------------------------- bodies
def test_a_caller_who_stalls_is_let_go() -> None:
    async def run() -> None:
        sent: list[Message] = []
        reached = False

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal reached
            reached = True

        async def half() -> Message:
            if half.given:  # type: ignore[attr-defined]
                await asyncio.sleep(60)
            half.given = True  # type: ignore[attr-defined]
            return {"type": "http.request", "body": b'{"user_id":', "more_body": True}

        half.given = False  # type: ignore[attr-defined]

        async def send(message: Message) -> None:
            sent.append(message)

        await Bodies(app, timeout_s=0.05)({"type": "http", "path": "/v1/events", "headers": []}, half, send)
        assert sent[0]["status"] == 408
        assert not reached

    asyncio.run(run())


def test_small_routes_take_small_bodies() -> None:
    with client_of() as client:
        assert client.post("/v1/encode", content=b" " * (2**20 + 1)).status_code == 413
        assert client.post("/v1/events", content=b" " * (2**20 + 1)).status_code == 422
        assert (
            client.put("/v1/items/a/v1/events", content=b" " * (2**20 + 1)).status_code == 413
        )  # an item's id is free


def test_limits_know_their_routes_below_a_prefix() -> None:
    app = create_app(Backend(), Edge(max_concurrent=0))  # type: ignore[arg-type]
    with TestClient(app, HERE, root_path="/shop") as client:
        assert client.get("/shop/healthz").status_code == 200  # answers under load
        assert client.post("/shop/v1/events", content=b" " * (2**20 + 1)).status_code == 503
        assert client.post("/shop/v1/encode", content=b" " * (2**20 + 1)).status_code == 413


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='[]{}"\\a\u00e9', max_size=60),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(alphabet='[{"\\', max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(value=JSON, levels=st.integers(0, 2 * MAX_DEPTH), ascii_only=st.booleans())
def test_depth_is_measured_outside_of_strings(value: Any, levels: int, ascii_only: bool) -> None:
    for level in range(levels):
        value = [value] if level % 2 else {"a": value, "[": ["]"]}

    def depth(value: Any) -> int:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert too_deep(json.dumps(value, ensure_ascii=ascii_only).encode()) == (depth(value) > MAX_DEPTH)


@pytest.mark.parametrize("text", [b"\\", b'"', b'\\"', b"[]", b'"["'])
def test_no_body_takes_long_to_look_through(text: bytes) -> None:
    """Processor seconds of the worst that fits into a body, four times as large."""
    body = b"[" * (MAX_DEPTH + 1) + text * (4 * MAX_BODY_BYTES // len(text))
    began = time.thread_time()
    too_deep(body)
    assert time.thread_time() - began < 1


@given(text=st.text(max_size=50))
def test_only_utf8_is_parsed(text: str) -> None:
    body = json.dumps(text, ensure_ascii=False)
    assert is_utf8(body.encode())
    for other in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        assert not is_utf8(body.encode(other))


def test_a_body_that_nests_beyond_the_parser_is_refused_by_it_too() -> None:
    with pytest.raises(HTTPException) as told:
        parsed(b"[" * 100_000, TypeAdapter(Any))
    assert told.value.status_code == 400


def test_width_is_bounded_too() -> None:
    assert not too_deep(b"[" + b",".join([b"[]"] * (MAX_OPENERS - 1)) + b"]")
    assert too_deep(b"[" + b",".join([b"[]"] * MAX_OPENERS) + b"]")


def test_commas_outside_of_strings_are_bounded() -> None:
    """So that the parser, which shares the interpreter with nobody, is done within some ten milliseconds."""
    assert not too_deep(b"[" + b",".join([b"1"] * (MAX_COMMAS + 1)) + b"]")
    assert too_deep(b"[" + b",".join([b"1"] * (MAX_COMMAS + 2)) + b"]")
    assert not too_deep(b'["' + b"," * (2 * MAX_COMMAS) + b'"]')
    with client_of() as client:
        answer = client.post("/v1/recommend", content=b"[" + b"1," * (MAX_BODY_BYTES // 2 - 2) + b"1]")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_the_fullest_request_is_within_the_bounds() -> None:
    event = {"item_id": "i", "timestamp": 1, "action": "buy", "rating": 1}
    lists = {"categories": ["c"] * 1000, "exclude_items": ["i"] * 10_000, "allow_items": ["i"] * 10_000}
    request = {"user_id": "u", "history": [event] * MAX_HISTORY, "filters": lists, "query": "q", "k": 1, "now": 1,
               "exclude_seen": True, "diversity": 0.5, "model": "m", "explain": True}  # fmt: skip
    assert set(request) == set(RecommendRequest.model_fields)
    RecommendRequest.model_validate(request)
    assert not too_deep(json.dumps(request).encode())


def test_no_metrics_takes_every_call() -> None:
    nothing = NoMetrics()
    nothing.count("springtide_shed")
    nothing.observe("springtide_gate_short", 0.5)
    nothing.set("springtide_in_flight", 1)
