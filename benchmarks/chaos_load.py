"""Load for benchmarks/chaos.py, from a process of its own: what each request became, which events were acknowledged.

    python benchmarks/chaos_load.py URL OUT.json --seconds 180 [--clients 8 --pause 0.05 | --stall 200]

Clients ask for recommendations, some with a query, and send events. An event that was not acknowledged is sent again
with the same event_id, as a caller should. With --stall connections send half a request each and wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import signal
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

PATIENCE_S = 10.0  # then a request has failed
USERS = 40
Json = dict[str, Any]


def outcome_of(status: int, retry_after: bool, answer: Any) -> str:
    """ok, degraded, shed (too many requests), refused (events that are to be sent again) or failed."""
    if status < 300:
        return "degraded" if isinstance(answer, dict) and answer.get("degraded") else "ok"
    if status == 503 and retry_after:
        code = answer.get("error", {}).get("code", "") if isinstance(answer, dict) else ""
        if code == "store_unavailable":
            return "refused"
        return "failed" if code in ("scorer_unavailable", "unavailable") else "shed"
    return "failed"


@dataclass
class Log:
    """What happened: [begin (time.monotonic), seconds, kind, outcome, what was said] of each request."""

    requests: list[tuple[float, float, str, str, str]] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)


class Caller:
    """Requests one after the other, of the three kinds in turn by chance."""

    def __init__(self, session: aiohttp.ClientSession, url: str, log: Log) -> None:
        self._session, self._url, self._log = session, url, log
        self._unsent: Json | None = None  # an event that was not acknowledged

    async def ask(self) -> None:
        kind = random.choices(["recommend", "query", "events"], [7, 1, 2])[0]
        user = f"u{random.randrange(USERS)}"
        if kind == "events":
            await self._send_event(user)
        elif kind == "query":
            await self._post(kind, "/v1/recommend", {"user_id": user, "query": f"item number {random.random():.6f}"})
        else:
            await self._post(kind, "/v1/recommend", {"user_id": user, "k": 10})

    async def _send_event(self, user: str) -> None:
        event = self._unsent or {
            "event_id": uuid.uuid4().hex,
            "user_id": user,
            "item_id": f"i{random.randrange(40):02}",
        }
        self._unsent = event
        if await self._post("events", "/v1/events", event) in ("ok", "degraded"):
            self._log.acknowledged.append(event["event_id"])
            self._unsent = None

    async def _post(self, kind: str, path: str, body: Json) -> str:
        begin, said = time.monotonic(), ""
        try:
            async with self._session.post(self._url + path, json=body) as answer:
                text = await answer.text()
                try:
                    content = json.loads(text)
                except ValueError:
                    content = None
                outcome = outcome_of(answer.status, "Retry-After" in answer.headers, content)
                if answer.status >= 300:
                    said = f"{answer.status} {text[:150]}"
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            outcome, said = "failed", type(error).__name__
        self._log.requests.append((begin, time.monotonic() - begin, kind, outcome, said))
        return outcome


async def steady(url: str, log: Log, clients: int, pause: float, seconds: float) -> None:
    """`clients` callers, each with a pause after every answer, until SIGTERM or for so long."""
    end, over = time.monotonic() + seconds, asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    async with _session() as session:

        async def client() -> None:
            caller = Caller(session, url, log)
            while time.monotonic() < end and not over.is_set():
                await caller.ask()
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))

        await asyncio.gather(*(client() for _ in range(clients)))


async def stall(url: str, connections: int, seconds: float) -> None:
    """Connections that send half a request, half of them within the headers, and then nothing."""
    parts = urlsplit(url)
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: 500\r\n\r\n" + '{"user_id": '
    writers = []
    for number in range(connections):
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write((head if number % 2 else whole).encode())
        writers.append(writer)
    await asyncio.sleep(seconds)
    for writer in writers:
        writer.close()


def _session() -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(PATIENCE_S))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between an answer and the next request")
    parser.add_argument("--stall", type=int, help="connections that send half a request, in place of clients")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    log = Log()
    if args.stall is not None:
        asyncio.run(stall(args.url, args.stall, args.seconds))
    else:
        asyncio.run(steady(args.url, log, args.clients, args.pause, args.seconds))
    args.out.write_text(json.dumps({"requests": log.requests, "acknowledged": log.acknowledged}))


if __name__ == "__main__":
    main()
