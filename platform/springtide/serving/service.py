"""What the Ingress does with a request, free of Ray and HTTP: reads the history, encodes the query, asks the scorer.

A part that is down or slow costs its share of the answer, never the caller's patience: every call has a time limit and
a circuit breaker. Without the encoder or the store an answer is `degraded`, without the scorer it holds popular items;
what has no degraded form is refused with 503.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import Any, Protocol

import numpy as np

from springtide.errors import SpringtideError
from springtide.serving.context import current_note
from springtide.serving.engine import ENCODER_MISMATCH, Refusal, ScoreRequest
from springtide.serving.exposures import ExposureLog, exposure
from springtide.serving.given import recent_events
from springtide.serving.guard import Breaker, Guard, Unavailable, log_failure
from springtide.serving.health import Health
from springtide.serving.history_cache import HistoryCache
from springtide.serving.metrics import Metrics, NoMetrics
from springtide.serving.models import Failure, Told, merged_encoders, merged_models
from springtide.serving.options import Limits, TrafficOptions
from springtide.serving.popular import PopularItems
from springtide.serving.query_cache import Encoded, QueryCache
from springtide.serving.retaining import retain_in_background
from springtide.serving.schemas import (
    HISTORY_USED,
    ApiError,
    EncodeRequest,
    Event,
    ItemBody,
    RecommendRequest,
)
from springtide.serving.store import HistoryStore
from springtide.serving.store_rows import AddedItem
from springtide.serving.traffic import Traffic, shares

log = logging.getLogger("springtide.serving")
LOOKUPS = 16  # calls of a Scorer under way at once, but for recommendations
TEXTS = 16  # requests to encode under way at once, but for queries of recommendations
STORE_THREADS = 16  # a store that hangs holds these, not the threads that everything else shares
WRITE_THREADS = 64  # of their own, so that writes that wait keep no read waiting; they share commits
Json = dict[str, Any]
Encode = Callable[[list[str]], Awaitable[Encoded]]  # texts -> [n, D] float32, L2-normalised
Call = Callable[..., Awaitable[Any]]  # (method of the scorer, its arguments) -> its answer
Everywhere = Callable[[str], Awaitable[Told]]  # method of a deployment -> the answer of each of its replicas


class Backend(Protocol):
    """What the HTTP application needs. Each method raises ApiError for what the caller should be told."""

    async def recommend(self, request: RecommendRequest) -> Json: ...
    async def events(self, events: list[Event]) -> Json: ...
    async def interests(self, user_id: str) -> Json: ...
    async def similar(self, item_id: str, k: int) -> Json: ...
    async def put_item(self, item_id: str, item: ItemBody) -> Json: ...
    async def encode(self, request: EncodeRequest) -> Json: ...
    async def models(self) -> Json: ...
    async def ready(self) -> Json: ...
    def close(self) -> None: ...


class Service:
    """The Backend in use. `encode` and `call` reach the TextEncoder and the Scorer; tests hand in plain coroutines."""

    def __init__(
        self,
        store: HistoryStore,
        encode: Encode,
        call: Call,
        limits: Limits,
        *,
        metrics: Metrics | None = None,
        scorers: Everywhere | None = None,
        encoders: Everywhere | None = None,
    ) -> None:
        """scorers, encoders: reach every replica; absent: `call` speaks for the Scorer, and nobody for the encoder."""
        self.store = store
        self._stop_retaining = retain_in_background(store)
        self.histories = HistoryCache(store, HISTORY_USED, limits.history_cache_events, metrics)
        self.seeding = "ok"  # or why the stored histories are not complete yet
        self.popular: PopularItems | None = None  # the answer while the scorer is down
        self._encode, self._call = encode, call
        self._scorers, self._encoders = scorers or self._one, encoders or _nobody
        self._limits = limits
        self._metrics = metrics or NoMetrics()
        self._secret, self._asked = secrets.token_hex(8), count()  # of nonces: asking the system for each takes longer
        self._answering: dict[str, str] = {}  # name of a model -> name@version that answered last

        def guard(name: str, timeout_s: float, at_once: int | None = None) -> Guard:
            return Guard(name, timeout_s, Breaker(limits.breaker_failures, limits.breaker_pause_s), metrics, at_once)

        self._encoder = guard("encoder", limits.encoder_timeout_s)
        self._scorer = guard("scorer", limits.scorer_timeout_s)
        # Similar items, interests and what is asked of models: their failures are no reason to answer recommendations
        # with popular items, and a crowd of them takes no place in the Scorer from those.
        self._lookups = guard("lookups", limits.other_timeout_s, LOOKUPS)
        # Texts to encode stand to queries in the same way.
        self._texts = guard("texts", limits.other_timeout_s, TEXTS)
        # What is asked of every replica fails with any one of them, which is no reason to refuse what one can answer.
        self._inventory = guard("models", limits.other_timeout_s)
        self._reads = guard("store", limits.store_timeout_s)
        self._writes = guard("store_writes", limits.other_timeout_s)
        self.health = Health(store, self._encode, self._call, limits)
        self.queries = QueryCache(self._encode_query, limits.query_cache, limits.query_cache_s, metrics=metrics)
        self._store_threads = ThreadPoolExecutor(STORE_THREADS, "store")
        self._write_threads = ThreadPoolExecutor(WRITE_THREADS, "store-writes")
        self.exposures: ExposureLog | None = None
        self.traffic = Traffic(TrafficOptions(), self._score_apart)

    def direct(self, options: TrafficOptions) -> None:
        """Choose models by `options` from the next request on; what shadows showed before is forgotten."""
        if options != self.traffic.options:
            self.traffic = Traffic(options, self._score_apart)

    def close(self) -> None:
        """Give the store back. No request may be under way."""
        if self.exposures is not None:
            self.exposures.close()
        self._stop_retaining()
        self.health.close()
        for threads in (self._store_threads, self._write_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    async def recommend(self, request: RecommendRequest) -> Json:
        # A caller names the request, and must not choose by that what exploration shows: so does the nonce, which
        # nobody can tell beforehand who does not read the log of exposures.
        request_id, nonce = current_note().request_id, f"{self._secret}-{next(self._asked)}"
        choice = self.traffic.choose(request.model, request.user_id, request_id)
        if request.query is None:
            (events, history_lost), query, query_lost = await self._history_of(request), None, False
        else:
            (events, history_lost), (query, query_lost) = await asyncio.gather(
                self._history_of(request), self._vector_of(request.query)
            )
        now = int(time.time() * 1000)
        wanted = ScoreRequest(
            events=events,
            query=None if query is None else query.vectors,
            encoder=None if query is None else query.encoder,
            k=request.k,
            exclude_seen=request.exclude_seen,
            categories=tuple(request.filters.categories),
            exclude_items=tuple(request.filters.exclude_items),
            allow_items=None if request.filters.allow_items is None else tuple(request.filters.allow_items),
            diversity=request.diversity,
            explain=request.explain,
            model=choice.model,
            assigned=choice.by == "split",
            now=now if request.now is None else request.now,
            chance=f"{request_id} {nonce}",
        )
        answer = await self._score(wanted)
        if history_lost or query_lost:
            answer["degraded"] = True
        told_of(answer, self._metrics)
        if "degraded" not in answer:
            self.traffic.shadow(wanted, answer, request_id)
        if self.exposures is not None:
            self.exposures.record(exposure(request_id, request.user_id, choice, answer, now, nonce))
        return answer

    async def events(self, events: list[Event]) -> Json:
        now = int(time.time() * 1000)
        rows = [
            {
                "event_id": event.event_id or uuid.uuid4().hex,
                "user_id": event.user_id,
                "item_id": event.item_id,
                "timestamp": now if event.timestamp is None else event.timestamp,
                "action": event.action,
                "rating": event.rating,
            }
            for event in events
        ]
        try:
            accepted = await self._writes.run(self._in_threads, self._write_threads, self.store.append, rows)
        except (SpringtideError, TimeoutError, Unavailable) as error:
            log_failure("events not stored", error)
            raise ApiError(
                503, "store_unavailable", "the events may not be stored; send them again with the same event_id"
            ) from None
        return {"accepted": accepted, "duplicates": len(rows) - accepted}

    async def interests(self, user_id: str) -> Json:
        try:
            events = await self._stored(self.histories.read, user_id)
        except (SpringtideError, TimeoutError, Unavailable) as error:
            log_failure("history not read", error)
            raise ApiError(503, "store_unavailable", "the event log cannot be read at the moment") from None
        if not events:
            raise ApiError(404, "unknown_user", "no event of this user is known")
        return {"user_id": user_id, **await self._ask("interests", events)}

    async def similar(self, item_id: str, k: int) -> Json:
        return await self._ask("similar", item_id, k)

    async def encode(self, request: EncodeRequest) -> Json:
        texts = [request.text] if request.text is not None else list(request.texts or [])
        found = await self._encoded(texts)
        rows = np.asarray(found.vectors, np.float64).round(7).tolist()
        one = {"vector": rows[0]} if request.text is not None else {"vectors": rows}
        return {"dim": len(rows[0]), **one, "encoder": found.encoder}

    async def put_item(self, item_id: str, item: ItemBody) -> Json:
        """Raises ApiError 422 if the model reads no texts, 503 if this one cannot be encoded or stored; nothing is half
        done then."""
        if not (await self._ask("describe"))["text"]:
            raise ApiError(
                422, "no_text", "this model's items have no text, so it cannot take a new item; train it again"
            )
        vectors, encoder = await self._encoded([item.told])
        added: AddedItem = {
            "item_id": item_id,
            "title": item.title,
            "categories": item.categories,
            "text": item.told,
            "vector": np.asarray(vectors[0], "<f4").tobytes(),
            "encoder": encoder,
        }
        try:
            most = self._limits.max_added_items
            revision = await self._writes.run(self._in_threads, self._write_threads, self.store.put_item, added, most)
        except (SpringtideError, TimeoutError, Unavailable) as error:
            log_failure("item not stored", error)
            raise ApiError(503, "store_unavailable", "the item may not be stored; send it again") from None
        if revision is None:
            raise ApiError(
                409, "too_many_items", f"{most} items have been added, as many as max_added_items allows; raise it"
            )
        return {"item_id": item_id, "revision": revision}

    async def _encoded(self, texts: list[str]) -> Encoded:
        """[n, D]. Raises ApiError 503 if the encoder does not answer."""
        try:
            return await self._texts.run(self._encode, texts)
        except Exception as error:
            log_failure("texts not encoded", error)
            raise ApiError(503, "encoder_unavailable", "the text encoder does not answer at the moment") from None

    async def models(self) -> Json:
        """As every replica of the Scorer has it, and which encoders read texts."""
        try:
            scorers, encoders = await self._inventory.run(self._everywhere)
            answer = {**merged_models(scorers), "encoder": merged_encoders(encoders)}
        except Exception as error:
            raise _no_scorer("models", error) from None
        if split := shares(self.traffic.options):
            answer["split"] = split
        if self.traffic.options.shadow:
            answer["shadows"] = self.traffic.report()
        if self.exposures is not None:
            answer["exposures"] = self.exposures.told()
        return answer

    def note_import(self, state: str) -> None:
        """Take "ok", or why the prepared log is not imported. Once one is, its histories are in place, whatever becomes
        of a newer one."""
        if self.seeding != "ok":
            self.seeding = state

    async def ready(self) -> Json:
        """True only when a `recommend` would be answered whole: histories in place, and all parts well (see Health)."""
        checks = {"histories": self.seeding, **await self.health.checks()}
        return {"ready": all(state == "ok" for state in checks.values()), "checks": checks}

    async def _history_of(self, request: RecommendRequest) -> tuple[list[Json], bool]:
        """The events to recommend from, and whether stored ones could not be read."""
        if request.history:
            return recent_events(request.history), False
        if request.user_id is None:
            return [], False
        try:
            return await self._stored(self.histories.read, request.user_id), False
        except (SpringtideError, TimeoutError, Unavailable) as error:
            log_failure("history not read, answering from what was read last", error)
            return self.histories.last(request.user_id), True

    async def _vector_of(self, query: str) -> tuple[Encoded | None, bool]:
        """The query's vector, and whether it could not be had."""
        try:
            return await self.queries(query), False
        except Exception as error:  # a dead replica, a full queue, a time-out: the answer does without the query
            log_failure("query not encoded, answering without", error)
            return None, True

    async def _encode_query(self, query: str) -> Encoded:
        vectors, encoder = await self._encoder.run(self._encode, [query])
        return Encoded(vectors[0], encoder)

    async def _score(self, wanted: ScoreRequest) -> Json:
        """The scorer's answer, without the query if another encoder read that, or popular items where it has none."""
        try:
            answer = await self._ask("score", wanted, guard=self._scorer)
            self._answered_by(answer["model"])
            return answer
        except ApiError as error:
            if error.code == ENCODER_MISMATCH:
                log.error("answering without the query: %s", error.message)
                self.queries.clear()
                return {**await self._score(replace(wanted, query=None, encoder=None)), "degraded": True}
            if error.status != 503 or self.popular is None:
                raise
        return self.popular.answer(wanted)

    def _answered_by(self, model: str) -> None:
        """Tell the version that answers under a name, as the Scorer says it: it may differ from what is configured."""
        name = model.partition("@")[0]
        before = self._answering.get(name)
        if before != model:
            self._answering[name] = model
            self._metrics.set("springtide_model", 1, model=model)
            if before is not None:
                self._metrics.set("springtide_model", 0, model=before)

    async def _score_apart(self, request: ScoreRequest) -> Json:
        """For copies that nobody waits for: outside the batches, and past the circuit breaker of those that count."""
        answer = await asyncio.wait_for(self._call("score_apart", request), self._limits.other_timeout_s)
        if isinstance(answer, (Refusal, Failure)):
            raise SpringtideError(answer.message)
        return dict(answer)

    async def _ask(self, method: str, *arguments: Any, guard: Guard | None = None) -> Json:
        """The Scorer's answer; guard: absent, that of lookups."""
        try:
            answer = await (guard or self._lookups).run(self._call, method, *arguments)
        except Exception as error:
            raise _no_scorer(method, error) from None
        if isinstance(answer, Failure):  # of one model: the Scorer is well, and others are answered by it
            self._metrics.count("springtide_part_failures", part="scorer", reason="model")
            raise _no_scorer(method, SpringtideError(answer.message))
        if isinstance(answer, Refusal):
            raise ApiError(answer.status, answer.code, answer.message)
        return dict(answer)

    async def _everywhere(self) -> tuple[Told, Told]:
        return await asyncio.gather(self._scorers("models"), self._encoders("describe"))

    async def _one(self, method: str) -> Told:
        return Told([await self._call(method)], 1)

    async def _stored(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await self._reads.run(self._in_threads, self._store_threads, work, *arguments)

    @staticmethod
    async def _in_threads(threads: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


async def _nobody(method: str) -> Told:
    return Told([], 0)


def _no_scorer(method: str, error: Exception) -> ApiError:
    log_failure(f"scorer.{method} failed", error)
    return ApiError(503, "scorer_unavailable", "the model does not answer at the moment; try again")


def told_of(answer: Json, metrics: Metrics) -> None:
    """Count an answer to `recommend` and note it for the request's log line."""
    degraded = bool(answer.get("degraded"))
    note = current_note()
    note.model, note.source, note.degraded = answer["model"], answer["source"], degraded
    metrics.count(
        "springtide_answers",
        model=answer["model"],
        source=answer["source"],
        degraded=str(degraded).lower(),
        empty=str(not answer["items"]).lower(),
    )
    short = answer["gate"]["short"]
    if short is not None:
        metrics.observe("springtide_gate_short", short)
