"""The yardstick of benchmarks/serve.py: one bundle behind FastAPI and uvicorn in one process, as one writes it by hand.

    python benchmarks/serve_bare.py BUNDLE PORT [--inline]
    python benchmarks/serve_bare.py BUNDLE --loop BODIES.jsonl BATCH SECONDS

Answers POST /v1/recommend by history, with or without a query: no users, no event log, no policies, no limits, no
metrics, no swap of models. What waits is scored together in one worker thread; --inline scores each request on the
event loop instead. --loop has no HTTP at all: it scores parsed requests in batches and prints one JSON line as load.py
does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "platform"))

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from springtide.bundle import load_bundle
from springtide.serving.engine import Engine, ScoreRequest
from springtide.text.encoder import load_encoder

MOST = 32  # requests scored together, as the Scorer's max_batch
MOST_KNOWN = 10_000  # vectors of queries that are remembered
Score = Callable[[Sequence["Request"]], list[Any]]


class Event(BaseModel):
    """One event of a history."""

    item_id: str
    timestamp: int | None = None
    action: str | None = None
    rating: float | None = None


class Request(BaseModel):
    """The part of the contract that the benchmark uses."""

    history: list[Event] = Field(min_length=1, max_length=1_000)
    query: str | None = Field(None, max_length=2_000)
    k: int = Field(10, ge=1, le=1_000)


class Together:
    """Calls that wait while the worker thread is busy are its next batch."""

    def __init__(self, work: Score) -> None:
        self._work, self._thread = work, ThreadPoolExecutor(1)
        self._waiting: list[tuple[Request, asyncio.Future[Any]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._drain())
        return await answer

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            some, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            try:
                found = await loop.run_in_executor(self._thread, self._work, [request for request, _ in some])
            except Exception as error:
                for _, answer in some:
                    answer.set_exception(error)
                continue
            for (_, answer), one in zip(some, found, strict=True):
                answer.set_result(one)


def scorer(bundle_path: str) -> Score:
    """Requests -> answers, in one process; vectors of queries are remembered."""
    engine = Engine(load_bundle(bundle_path), "benchmark")
    engine.warm_up()
    text = engine.bundle.settings.text
    encoder = load_encoder(text.encoder, text.max_tokens)
    known: dict[str, np.ndarray] = {}

    def score(requests: Sequence[Request]) -> list[Any]:
        if len(known) > MOST_KNOWN:
            known.clear()
        new = list({request.query for request in requests if request.query} - known.keys())
        known.update(zip(new, encoder.encode(new), strict=True))
        wanted = [
            ScoreRequest(
                [event.model_dump(exclude_none=True) for event in request.history],
                query=known[request.query] if request.query else None,
                k=request.k,
            )
            for request in requests
        ]
        return engine.score(wanted)

    return score


def create(score: Score, inline: bool) -> FastAPI:
    app = FastAPI()
    together = Together(score)

    @app.post("/v1/recommend")
    async def recommend(request: Request) -> Any:
        return JSONResponse(score([request])[0] if inline else await together(request))

    @app.get("/readyz")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


def in_a_loop(score: Score, bodies: Path, batch: int, seconds: float) -> dict[str, Any]:
    """Score requests one batch after the other; a request takes as long as its batch."""
    requests = [Request.model_validate_json(line) for line in bodies.read_bytes().splitlines()]
    took: list[float] = []
    begin, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        first = len(took) * batch
        started = time.perf_counter()
        score([requests[(first + n) % len(requests)] for n in range(batch)])
        took.append((time.perf_counter() - started) * 1e3)
    done = len(took) * batch
    cpu_ms = (time.process_time() - cpu) * 1e3 / done
    p50, p99 = np.percentile(took, [50, 99])
    return {"requests": done, "seconds": time.perf_counter() - begin, "errors": 0, "p50_ms": p50, "p99_ms": p99,
            "max_ms": max(took), "cpu_ms_per_request": cpu_ms}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("port", type=int, nargs="?")
    parser.add_argument("--inline", action="store_true")
    parser.add_argument("--loop", nargs=3, metavar=("BODIES", "BATCH", "SECONDS"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    score = scorer(args.bundle)
    if args.loop:
        bodies, batch, seconds = args.loop
        in_a_loop(score, Path(bodies), int(batch), 0.5)
        print(json.dumps(in_a_loop(score, Path(bodies), int(batch), float(seconds))))
        return
    uvicorn.run(create(score, args.inline), host="127.0.0.1", port=args.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
