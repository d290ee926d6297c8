"""The load of benchmarks/serve.py: what it sends, and that a server which stalls is charged for those who waited."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from load import by_aiohttp, wrk
from serve_bare import Request, Together
from serve_requests import Requests
from write_workspace import write_workspace


def test_queries_are_new_or_repeat_as_asked_and_are_the_same_in_every_run(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path)

    def queries(kind: str, number: int) -> list[str]:
        return [body["query"] for body in Requests(workspace, 40).recommend(kind, number)]

    assert queries("query", 0) == queries("query", 0)
    assert not set(queries("query", 0)) & set(queries("query", 1))
    assert len(set(queries("query", 0))) == len(queries("query", 0)) == 160
    assert len(set(queries("repeated", 0))) == 50


def test_bodies_hold_what_their_kind_says(tmp_path: Path) -> None:
    requests = Requests(write_workspace(tmp_path), 7)
    by_history, by_user = list(requests.recommend("history", 0)), list(requests.recommend("user", 0))
    assert [body["user_id"] for body in by_user] == requests.users
    assert len(by_history) == 7 and all(body["history"] for body in by_history)
    assert [len(body) for body in requests.events(100, 3)] == [100, 100, 100]
    assert all(isinstance(body, dict) for body in requests.events(1, 3))


@asynccontextmanager
async def answering(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def test_at_a_fixed_rate_time_runs_from_when_a_request_was_due() -> None:
    async def run() -> dict[str, float]:
        first = True

        async def stall(_: web.Request) -> web.Response:
            nonlocal first
            waits, first = first, False
            await asyncio.sleep(0.5 if waits else 0)
            return web.Response()

        async with answering(stall) as url:
            return await by_aiohttp(url, [b"{}"], 1, 0.8, rate=50)

    found = asyncio.run(run())
    assert 39 <= found["requests"] <= 41  # 0.8 s at 50 a second, with one more or less at the ends
    assert found["errors"] == 0
    assert found["p50_ms"] > 100  # one request was slow, and half of them were due while it was


@pytest.mark.parametrize("tool", ["wrk", "aiohttp"])
def test_answers_that_are_not_whole_are_errors(tool: str, tmp_path: Path) -> None:
    if tool == "wrk" and shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    answers = [
        (200, {"items": [], "degraded": True}),
        (202, {"items": [{"title": 'the "degraded": true story'}]}),
        (200, {"items": [], "degraded": False}),
        (503, {"error": {}}),
        (302, {}),
    ]
    bodies = [json.dumps(number).encode() for number in range(len(answers))]
    file = tmp_path / "bodies.jsonl"
    file.write_bytes(b"\n".join(bodies))

    async def run() -> dict[str, float]:
        async def answer(request: web.Request) -> web.Response:
            status, told = answers[await request.json()]
            return web.json_response(told, status=status)

        async with answering(answer) as url:
            if tool == "wrk":
                return await asyncio.to_thread(wrk, url, file, 1, 1)
            return await by_aiohttp(url, bodies, 1, 1)

    found = asyncio.run(run())
    assert found["whole"] + found["errors"] == found["requests"] > 10
    assert found["whole"] == pytest.approx(found["requests"] * 2 / 5, abs=2)


def test_requests_that_wait_for_the_model_are_scored_together() -> None:
    sizes: list[int] = []

    def score(requests: list[Request]) -> list[int]:
        sizes.append(len(requests))
        return [request.k for request in requests]

    async def run() -> list[int]:
        together = Together(score)  # type: ignore[arg-type]
        return await asyncio.gather(*(together(_asking(k)) for k in range(1, 51)))

    assert asyncio.run(run()) == list(range(1, 51))
    assert sizes == [32, 18]


def _asking(k: int) -> Request:
    return Request.model_validate({"history": [{"item_id": "a"}], "k": k})
