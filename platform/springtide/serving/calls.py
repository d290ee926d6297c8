"""How an Ingress reaches the other deployments: few calls, shared by the requests that wait, and each tried twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from springtide.serving.batching import Batches, Seen
from springtide.serving.engine import Json, Refusal, ScoreRequest
from springtide.serving.metrics import Metrics, NoMetrics
from springtide.serving.models import Failure, Told
from springtide.serving.options import CALLS_PER_REPLICA
from springtide.serving.query_cache import Encoded

log = logging.getLogger("ray.serve")
EVENTS_IN_A_CALL, QUERIES_IN_A_CALL = 2048, 16
LEAST_EVENTS = 64  # that a request counts for: 32 requests share a call, and fewer with long histories
Found = TypeVar("Found")


@dataclass(frozen=True)
class Answered(Generic[Found]):
    """An answer, and the replica that gave it."""

    replica: str
    answer: Found


class Encoders:
    """The TextEncoder behind its handle. timeout_s: of a call with texts, which is shared: who asks has a limit of its
    own; other_timeout_s: of all others."""

    def __init__(self, handle: Any, timeout_s: float, other_timeout_s: float, metrics: Metrics | None = None) -> None:
        self._handle, self._timeout_s, self._other_timeout_s, self._seen = handle, timeout_s, other_timeout_s, Seen()
        self._queries = Batches(
            self._each,
            QUERIES_IN_A_CALL,
            at_once=lambda: CALLS_PER_REPLICA * self._seen.count(),
            tell=_telling("encoder", metrics),
        )
        # Lists of texts go a few at a time, so that a query finds at most one such call of this Ingress before it.
        self._lists = Batches(self._each, QUERIES_IN_A_CALL, at_once=self._seen.count, tell=_telling("texts", metrics))

    async def encode(self, texts: list[str]) -> Encoded:
        """[n, D] float32 of n texts, all of one encoder."""
        if len(texts) == 1:
            one = await self._queries(texts[0])
            return Encoded(one.vectors[None], one.encoder)
        while True:
            found = await asyncio.gather(*map(self._lists, texts))
            encoders = {one.encoder for one in found}
            if len(encoders) == 1:  # else it was swapped in between
                return Encoded(np.stack([one.vectors for one in found]), encoders.pop())

    async def everywhere(self, method: str) -> Told:
        """Of every replica, if all answer in time; of none where none runs, which starts none."""
        return await everywhere(self._handle, method, self._other_timeout_s / 2)

    async def _each(self, texts: list[str]) -> list[Encoded]:
        async with asyncio.timeout(self._timeout_s):
            found: Answered[Encoded] = await again_if_died(lambda: self._handle.encode.remote(texts))
        self._seen.note(found.replica)
        return [Encoded(vector, found.answer.encoder) for vector in found.answer.vectors]


class Scorers:
    """The Scorer behind its handle. timeout_s: of a call with requests to score; other_timeout_s: of all others."""

    def __init__(self, handle: Any, timeout_s: float, other_timeout_s: float, metrics: Metrics | None = None) -> None:
        self._handle, self._timeout_s, self._other_timeout_s, self._seen = handle, timeout_s, other_timeout_s, Seen()
        self._requests = Batches(
            self._score,
            EVENTS_IN_A_CALL,
            _events,
            at_once=lambda: CALLS_PER_REPLICA * self._seen.count(),
            tell=_telling("scorer", metrics),
        )

    async def call(self, method: str, *arguments: Any) -> Any:
        """A method of one replica."""
        if method == "score":
            return await self._requests(*arguments)
        return await again_if_died(lambda: getattr(self._handle, method).remote(*arguments))

    async def everywhere(self, method: str) -> Told:
        """Of every replica; of one for all, where some do not answer in half the time there is."""
        told = await everywhere(self._handle, method, self._other_timeout_s / 2)
        return told if told.answers else Told([await self.call(method)], None)

    async def _score(self, requests: list[ScoreRequest]) -> list[Json | Refusal | Failure]:
        async with asyncio.timeout(self._timeout_s):
            found: Answered[list[Json | Refusal | Failure]]
            found = await again_if_died(lambda: self._handle.score.remote(requests))
        self._seen.note(found.replica)
        return found.answer


def _telling(part: str, metrics: Metrics | None) -> Callable[[int], None]:
    counted = metrics or NoMetrics()
    return lambda waiting: counted.set("springtide_waiting", waiting, part=part)


def _events(requests: list[ScoreRequest]) -> int:
    return sum(max(LEAST_EVENTS, len(request.events)) for request in requests)


async def everywhere(handle: Any, method: str, timeout_s: float) -> Told:
    """What each replica answers that runs. Ray tells nothing of those that answered while another is too slow."""
    try:
        found = await handle.broadcast(method).results_async(timeout_s=timeout_s, return_exceptions=True)
    except DeploymentUnavailableError:
        return Told([], 0)
    except Exception as error:
        log.warning("not every replica answered %s: %r", method, error)
        return Told([], None)
    return Told([one for one in found if not isinstance(one, BaseException)], len(found))


async def again_if_died(send: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again, once, when the replica asked died meanwhile: Serve then sends to another one. All calls are reads."""
    try:
        return await send()
    except RayActorError:
        return await send()
