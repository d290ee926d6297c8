"""The HTTP application and its service over a hand-made recommender: contract, bounds, answers when parts fail."""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from springtide.errors import SpringtideError
from springtide.serving import bodies, limits
from springtide.serving import service as service_module
from springtide.serving.app import create_app
from springtide.serving.bodies import AT_ONCE, BodyRoute
from springtide.serving.engine import Engine, ScoreRequest
from springtide.serving.exposures import ExposureLog
from springtide.serving.exposures import read as read_exposures
from springtide.serving.given import recent_events
from springtide.serving.metrics import PrometheusMetrics
from springtide.serving.models import Failure, Told
from springtide.serving.options import AppOptions, ExposureOptions, Limits, TrafficOptions
from springtide.serving.policies import Policies
from springtide.serving.popular import PopularItems
from springtide.serving.query_cache import Encoded
from springtide.serving.reasons import sentence
from springtide.serving.replay import Log, replay
from springtide.serving.schemas import (
    HISTORY_USED,
    MAX_BODY_BYTES,
    MAX_HISTORY,
    ApiError,
    EncodeRequest,
    HistoryEvent,
    Identifier,
    ItemBody,
    RecommendRequest,
)
from springtide.serving.service import Service
from springtide.serving.store import SQLiteStore

ITEMS = 12
UNTAKEN = 8  # the item that nobody took
HERE = "http://127.0.0.1"
WIDTH = 4
AS_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class FakeHistory:
    items: np.ndarray
    actions: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.items)


class FakeRecommender:
    """Item n scores n; a history adds 100 to the item after its last one, a query 50 to item 3."""

    item_ids = [f"i{n}" for n in range(ITEMS)]
    titles = [f"Title {n}" for n in range(ITEMS)]
    categories = [["even" if n % 2 == 0 else "odd"] for n in range(ITEMS)]
    actions = ["<unknown>", "view", "buy"]
    index = {f"i{n}": n for n in range(ITEMS)}
    item_vectors = np.eye(ITEMS, dtype=np.float32)
    popularity = np.where(np.arange(ITEMS) == UNTAKEN, 0, 9)
    text_vectors: np.ndarray | None = np.ones((ITEMS, WIDTH), np.float32)
    retrieval = None  # an index, of a large catalogue alone

    def history(self, events: Sequence[Mapping[str, Any]]) -> tuple[FakeHistory, list[str]]:
        events = sorted(events, key=lambda e: e.get("timestamp", 0))
        known = [e for e in events if e["item_id"] in self.index]
        found = FakeHistory(
            np.asarray([self.index[e["item_id"]] for e in known], np.int64),
            np.asarray([1 if e.get("action") == "view" else 0 for e in known], np.int64),
            np.asarray([e.get("rating", np.nan) for e in known], np.float32),
            np.asarray([e.get("timestamp", 0) for e in known], np.int64),
        )
        return found, [e["item_id"] for e in events if e["item_id"] not in self.index]

    def score(self, histories: Sequence[FakeHistory], queries: np.ndarray | None, now: np.ndarray | None) -> Any:
        logits = np.tile(np.arange(ITEMS, dtype=np.float32), (len(histories), 1))
        for row, history in enumerate(histories):
            if len(history):
                logits[row, (history.items[-1] + 1) % ITEMS] += 100
            if queries is not None and not np.isnan(queries[row]).any():
                logits[row, 3] += 50
        gates = np.asarray([0.25 if len(h) else np.nan for h in histories])
        return SimpleNamespace(logits=logits, gate_short=gates)

    def top_k(
        self, logits: np.ndarray, k: int, exclude: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        logits = logits.copy()
        for row, rows in enumerate(exclude or []):
            logits[row, rows] = -np.inf
        order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(logits, order, axis=1)
        return np.where(np.isfinite(values), order, -1), values

    def interests(self, history: FakeHistory, now: int) -> Any:
        n = len(history)
        weights = np.arange(1, n + 1) / (n * (n + 1) / 2)
        return SimpleNamespace(
            attention_long=weights, attention_short=weights, gate_short=0.25,
            items_long=np.arange(10), items_short=np.arange(10)[::-1], channels={"transitions": 1.5},
        )  # fmt: skip

    def explain(self, history: FakeHistory, rows: np.ndarray, query: np.ndarray | None, now: int) -> Any:
        """All of a score is popularity, but for the history's 100, which came through its last event."""
        through = np.zeros((len(history), len(rows)))
        if len(history):
            through[-1, rows == (history.items[-1] + 1) % ITEMS] = 100
        return SimpleNamespace(shares={"memory": through.sum(0), "popularity": rows.astype(float)}, through=through)

    def similar(self, item: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray([r for r in range(ITEMS) if r != item][:k])
        return rows, np.linspace(1, 0, len(rows))


def engine() -> Engine:
    settings = SimpleNamespace(data=SimpleNamespace(exclude_seen=True), text=SimpleNamespace(encoder="bert"))
    metrics = {"ndcg@10": 0.1}
    bundle: Any = SimpleNamespace(version="abc", settings=settings, metrics=metrics, recommender=FakeRecommender())
    return Engine(bundle, "films")


@dataclass
class Parts:
    """The parts behind the service, each of which a test may break."""

    store: SQLiteStore
    engine: Engine = field(default_factory=engine)
    encoder: str = "ok"  # or "slow" or "dead"
    scorer: str = "ok"
    read_by: str = "bert@1"
    calls: list[str] = field(default_factory=list)

    async def encode(self, texts: list[str]) -> Encoded:
        await self._state(self.encoder)
        return Encoded(np.full((len(texts), WIDTH), 0.5, np.float32), self.read_by)

    async def call(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        await self._state(self.scorer)
        if method == "score":
            return self.engine.score([arguments[0]])[0]
        if method == "models":
            return {"models": [{**self.engine.describe(), "primary": True}]}
        return getattr(self.engine, method)(*arguments)

    @staticmethod
    async def _state(state: str) -> None:
        if state == "slow":
            await asyncio.sleep(60)
        if state == "dead":
            raise ConnectionError("replica died at 10.0.0.1")
        if state == "cancelled":  # as Ray does it to what a caller who left has asked of others
            raise asyncio.CancelledError


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    store = SQLiteStore(tmp_path / "events.sqlite3")
    yield Parts(store)
    store.close()


def limits_of(**options: Any) -> Limits:
    return AppOptions(store="log", **options).limits()


@pytest.fixture
def service(parts: Parts) -> Service:
    made = Service(
        parts.store,
        parts.encode,
        parts.call,
        limits_of(
            encoder_timeout_s=0.2, scorer_timeout_s=0.3, store_timeout_s=0.2, other_timeout_s=0.5, breaker_pause_s=0.4
        ),
    )
    made.popular = PopularItems(toy_items(), POPULARITY, "films@abc", exclude_seen=True)
    return made


POPULARITY = np.log1p(np.arange(ITEMS))  # as FakeRecommender: item n was taken n times


def toy_items() -> pa.Table:
    recommender = FakeRecommender
    return pa.table(
        {"item_id": recommender.item_ids, "title": recommender.titles, "categories": recommender.categories}
    )


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), HERE) as opened:
        yield opened


def ids(answer: Any) -> list[str]:
    return [item["item_id"] for item in answer.json()["items"]]


def recommend(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/recommend", json=body)


# ---------------------------------------------------------------- recommend
def test_by_history(client: TestClient) -> None:
    answer = recommend(client, history=[{"item_id": "i4"}, {"item_id": "no-such-item"}], k=3)
    assert answer.status_code == 200
    assert answer.json() == {
        "items": [
            {"item_id": "i5", "score": 105.0, "title": "Title 5"},
            {"item_id": "i11", "score": 11.0, "title": "Title 11"},
            {"item_id": "i10", "score": 10.0, "title": "Title 10"},
        ],
        "model": "films@abc",
        "source": "history",
        "gate": {"long": 0.75, "short": 0.25},
        "unknown_items": ["no-such-item"],
    }


def test_sources(client: TestClient) -> None:
    history = [{"item_id": "i4"}]
    assert recommend(client, query="love").json()["source"] == "query"
    assert ids(recommend(client, query="love"))[0] == "i3"
    assert recommend(client, query="love", history=history).json()["source"] == "history+query"
    assert recommend(client, query="love", user_id="stranger").json()["source"] == "query"
    unheard = recommend(client, query="love", history=[{"item_id": "gone"}]).json()
    assert (unheard["source"], unheard["unknown_items"]) == ("query", ["gone"])
    stranger = recommend(client, user_id="stranger").json()
    assert stranger["source"] == "popular"
    assert stranger["gate"] == {"long": None, "short": None}
    assert len(stranger["items"]) == 10
    assert recommend(client, history=[{"item_id": "??"}]).json()["source"] == "popular"


def test_an_event_changes_the_next_answer(client: TestClient) -> None:
    event = {"event_id": "1", "user_id": "u", "item_id": "i4", "timestamp": 100}
    assert client.post("/v1/events", json=event).status_code == 202
    assert ids(recommend(client, user_id="u"))[0] == "i5"
    later = [{**event, "event_id": "2", "item_id": "i7", "timestamp": "1970-01-01T00:02:00Z"}, event]
    assert client.post("/v1/events", json=later).json() == {"accepted": 1, "duplicates": 1}
    answer = ids(recommend(client, user_id="u", k=12))
    assert answer[0] == "i8"
    assert "i4" not in answer and "i7" not in answer
    assert ids(recommend(client, user_id="u", history=[{"item_id": "i1"}]))[0] == "i2"
    assert ids(recommend(client, user_id="u", history=[]))[0] == "i8"


def test_events_without_time_or_id_are_taken_as_now(client: TestClient, parts: Parts) -> None:
    event = {"user_id": "u", "item_id": "i4"}
    assert client.post("/v1/events", json=[event, event]).json() == {"accepted": 2, "duplicates": 0}
    assert parts.store.history("u")[0]["timestamp"] > 1_600_000_000_000


def test_exclusions(client: TestClient) -> None:
    history = [{"item_id": "i4"}, {"item_id": "i11"}]
    assert "i4" not in ids(recommend(client, history=history, k=12))
    assert len(ids(recommend(client, history=history, k=12, exclude_seen=False))) == ITEMS
    filters = {"categories": ["even"], "exclude_items": ["i0", "no such"]}
    evens = ids(recommend(client, history=history, k=12, filters=filters))
    assert evens == ["i10", "i8", "i6", "i2"]  # every item that passes, best first
    misspelt = recommend(client, user_id="u", filters={"categories": ["Even", "even", "Even"]}).json()
    assert misspelt.pop("unknown_categories") == ["Even"]
    assert misspelt == recommend(client, user_id="u", filters={"categories": ["even"]}).json()
    assert recommend(client, user_id="u", filters={"categories": ["no such"]}).json()["items"] == []


def test_k_beyond_the_catalogue(client: TestClient) -> None:
    assert len(ids(recommend(client, user_id="u", k=1000))) == ITEMS


def test_explanation(client: TestClient) -> None:
    body = recommend(client, history=[{"item_id": f"i{n}", "timestamp": n + 1} for n in range(6)], explain=True).json()
    explanation = body["explanation"]
    assert explanation["gate"] == body["gate"]
    assert [event["item_id"] for event in explanation["recent"]] == ["i5", "i4", "i3", "i2", "i1"]
    assert recommend(client, user_id="u", explain=True).json()["explanation"]["recent"] == []


def test_every_item_is_explained(client: TestClient) -> None:
    history = [{"item_id": "i2", "timestamp": 1}, {"item_id": "i4", "timestamp": 2, "action": "view"}]
    first, second = recommend(client, history=history, k=2, explain=True).json()["items"]
    assert first["explanation"] == {
        "shares": {"memory": 100.0, "popularity": 5.0},
        "because": [{"item_id": "i4", "title": "Title 4", "timestamp": 2000, "action": "view", "weight": 100.0}],
        "sentence": 'Because you took "Title 4", and people who did often take this too.',
    }
    assert second["explanation"]["because"] == []
    assert second["explanation"]["sentence"] == "Many people take it."
    assert "explanation" not in recommend(client, history=history).json()["items"][0]
    borrowed = recommend(client, history=[{"item_id": f"i{UNTAKEN - 1}"}], k=1, explain=True).json()["items"][0]
    assert borrowed["explanation"]["sentence"] == (
        f'Because you took "Title {UNTAKEN - 1}", and people who did often take what is like this.'
    )
    liked = {"memory": 0.0, "popularity": 2.0}
    assert sentence(liked, [], {}) == "Many people take it." and sentence(liked, [], {}, taken=False) == "It is new."


def test_an_allow_list(client: TestClient) -> None:
    allowed = {"allow_items": ["i9", "i2", "i3", "none"]}
    assert ids(recommend(client, user_id="u", filters=allowed)) == ["i9", "i3", "i2"]
    assert ids(recommend(client, user_id="u", filters=allowed | {"categories": ["odd"], "exclude_items": ["i3"]})) == [
        "i9"
    ]
    assert ids(recommend(client, user_id="u", filters={"allow_items": []})) == []


def test_diversity_keeps_the_count(client: TestClient) -> None:
    answer = ids(recommend(client, user_id="u", k=5, diversity=0.7))
    assert len(set(answer)) == 5
    assert answer[0] == "i11"


def test_requests_in_one_batch_do_not_touch_each_other() -> None:
    query = np.full(WIDTH, 0.5, np.float32)
    batch = [
        ScoreRequest(k=2),
        ScoreRequest([{"item_id": "i4"}], k=12),
        ScoreRequest(query=query, k=1, diversity=0.5),
        ScoreRequest(model="other"),
        ScoreRequest(query=np.ones(3, np.float32)),
        ScoreRequest(exclude_items=("i11",), k=1),
    ]
    together = engine().score(batch)
    assert together == [engine().score([request])[0] for request in batch]
    assert [getattr(a, "code", None) for a in together] == [None, None, None, "unknown_model", "encoder_mismatch", None]


def test_a_model_can_be_named(client: TestClient) -> None:
    assert recommend(client, user_id="u", model="films").status_code == 200
    assert recommend(client, user_id="u", model="films@abc").status_code == 200
    refused = recommend(client, user_id="u", model="films@old")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_model")


def test_a_catalogue_without_text_refuses_a_query(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRecommender, "text_vectors", None)
    refused = recommend(client, query="love")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_text")


def test_recent_events_are_ordered_and_cut() -> None:
    def made(*times: int | None) -> list[HistoryEvent]:
        return [HistoryEvent.model_construct(item_id=str(i), timestamp=t) for i, t in enumerate(times)]

    def order(*times: int | None) -> list[str]:
        return [event["item_id"] for event in recent_events(made(*times))]

    assert order(None, None) == ["0", "1"]
    assert order(3, 1, 2, 1) == ["1", "3", "2", "0"]
    assert order(None, 5, None, 4) == ["3", "0", "1", "2"]
    many = recent_events(made(*range(5 * HISTORY_USED, 0, -1)))
    assert len(many) == HISTORY_USED
    assert many[-1]["item_id"] == "0"


# ---------------------------------------------------------------- the other endpoints
def test_interests(client: TestClient) -> None:
    client.post("/v1/events", json=[{"user_id": "a/b", "item_id": f"i{n}", "timestamp": n + 1} for n in range(3)])
    client.post("/v1/events", json={"user_id": "a/b", "item_id": "gone", "timestamp": 9})
    body = client.get("/v1/users/a%2Fb/interests").json()
    assert (body["user_id"], body["model"], body["unknown_items"]) == ("a/b", "films@abc", ["gone"])
    assert [e["item_id"] for e in body["events"]] == ["i0", "i1", "i2"]
    assert body["gate"] == {"long": 0.75, "short": 0.25}
    assert body["long"]["categories"][0] == {"category": "even", "share": pytest.approx(4 / 6, abs=1e-6)}
    assert len(body["short"]["items"]) == 10
    assert body["channels"] == {"transitions": 1.5}
    unknown = client.get("/v1/users/nobody/interests")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_user")


def test_similar(client: TestClient) -> None:
    body = client.get("/v1/items/i3/similar", params={"k": 2}).json()
    assert [item["item_id"] for item in body["items"]] == ["i0", "i1"]
    assert client.get("/v1/items/none/similar").json()["error"]["code"] == "unknown_item"
    assert client.get("/v1/items/i3/similar", params={"k": 0}).status_code == 422
    assert client.get("/v1/items/a%00b/similar").status_code == 422


def test_encode(client: TestClient) -> None:
    assert client.post("/v1/encode", json={"text": "a"}).json() == {
        "dim": WIDTH, "vector": [0.5] * WIDTH, "encoder": "bert@1",
    }  # fmt: skip
    assert client.post("/v1/encode", json={"texts": ["a", "b"]}).json()["vectors"] == [[0.5] * WIDTH] * 2


def test_an_item_is_put_durably_with_its_vector(client: TestClient, parts: Parts) -> None:
    answer = client.put("/v1/items/a/b", json={"title": "Red umbrella", "categories": ["rain"]})
    assert answer.status_code == 200 and answer.json() == {"item_id": "a/b", "revision": parts.store.items_revision()}
    (kept,) = parts.store.items_since(0)
    assert (kept["item_id"], kept["title"], kept["categories"]) == ("a/b", "Red umbrella", ["rain"])
    assert kept["text"] == "Red umbrella. rain" and kept["vector"] == np.full(WIDTH, 0.5, "<f4").tobytes()
    again = client.put("/v1/items/a/b", json={"text": "another"}).json()
    assert again["revision"] > answer.json()["revision"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "text"),
        ({"title": "  "}, "text"),
        ({"txt": "a"}, "txt"),
        ({"text": " "}, "text"),
        ({"title": "a\nb"}, "title"),
    ],
)
def test_an_item_of_which_nothing_is_said_is_refused(
    client: TestClient, parts: Parts, body: dict[str, Any], where: str
) -> None:
    refused = client.put("/v1/items/a", json=body)
    assert refused.status_code == 422 and where in refused.json()["error"]["message"]
    assert not parts.store.items_since(0)


def test_a_log_is_replayed_through_the_application(client: TestClient) -> None:
    """The model recommends what comes after a user's last item, so only the live answer follows the user."""
    log = Log(
        [{"user_id": "u", "item_id": f"i{n}", "timestamp": 1000 * n} for n in (5, 6)],
        {"u": [{"item_id": "i4", "timestamp": 4000}]},
    )
    found = replay(client, log, k=3, exclude_seen=True)
    assert found.ranks["live"].tolist() == [1, 1]
    assert found.ranks["frozen"].tolist() == [1, 0]


def test_no_more_items_than_configured_are_put(client: TestClient, service: Service) -> None:
    service._limits = replace(service._limits, max_added_items=1)
    assert client.put("/v1/items/a", json={"text": "red"}).status_code == 200
    refused = client.put("/v1/items/b", json={"text": "red"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "too_many_items")
    assert client.put("/v1/items/a", json={"text": "blue"}).status_code == 200


def test_an_item_whose_text_cannot_be_read_is_not_half_put(client: TestClient, parts: Parts) -> None:
    parts.encoder = "dead"
    refused = client.put("/v1/items/a", json={"text": "red"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "encoder_unavailable")
    assert not parts.store.items_since(0)


def test_operations(client: TestClient, service: Service) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["ready"] is True
    assert client.get("/v1/models").json()["models"][0]["version"] == "abc"
    service.seeding = "the prepared log is being imported"
    waiting = client.get("/readyz")
    assert waiting.status_code == 503
    assert waiting.json()["checks"]["histories"] == "the prepared log is being imported"
    for state, ready in (("it failed", False), ("ok", True), ("a newer one failed", True)):
        service.note_import(state)
        assert client.get("/readyz").json()["ready"] is ready


def test_however_many_ask_whether_it_is_ready_parts_are_asked_once(parts: Parts, service: Service) -> None:
    async def run() -> None:
        answers = await asyncio.gather(*(service.ready() for _ in range(50)))
        assert all(answer["ready"] for answer in answers)
        assert parts.calls == ["describe"]
        assert (await service.ready())["ready"] and parts.calls == ["describe"]  # for a second
        service.health.found_until = 0.0
        assert (await service.ready())["ready"] and parts.calls == ["describe"] * 2

    asyncio.run(run())


def test_who_asks_whether_it_is_ready_costs_nobody_a_recommendation(parts: Parts, service: Service) -> None:
    """Failures that only /readyz saw open no circuit of `recommend`."""

    async def run() -> None:
        parts.scorer = parts.encoder = "dead"
        for _ in range(10):
            service.health.found_until = 0.0
            assert not (await service.ready())["ready"]
        parts.scorer = parts.encoder = "ok"
        assert "degraded" not in await service.recommend(RecommendRequest(user_id="u", query="love"))

    asyncio.run(run())


@pytest.mark.parametrize("part", ["scorer", "encoder"])
def test_a_cancelled_look_at_a_part_is_not_the_last_one(parts: Parts, service: Service, part: str) -> None:
    async def run() -> None:
        setattr(parts, part, "cancelled")
        answer = await service.ready()
        assert not answer["ready"] and answer["checks"][part] != "ok"
        setattr(parts, part, "ok")
        service.health.found_until = 0.0
        assert (await service.ready())["ready"]

    asyncio.run(run())


def test_who_asked_first_whether_it_is_ready_may_leave(parts: Parts, service: Service) -> None:
    """What is asked of the parts is not that request's: nothing of its context goes along."""
    mine: contextvars.ContextVar[str] = contextvars.ContextVar("mine", default="nobody's")
    seen: list[str] = []
    service.health._call = lambda method: (seen.append(mine.get()), parts.call(method))[1]

    async def first() -> None:
        mine.set("the first one's")
        await service.ready()

    async def run() -> None:
        parts.scorer = "slow"
        leaver = asyncio.create_task(first())
        await asyncio.sleep(0.05)
        other = asyncio.create_task(service.ready())
        leaver.cancel()
        assert not (await other)["ready"] and seen == ["nobody's"]

    asyncio.run(run())


def test_documentation_needs_no_other_host(client: TestClient) -> None:
    page = client.get("/")  # leads to the documentation until there is a console
    assert page.status_code == 200
    assert str(page.url).endswith("/docs")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) >= 2
    for link in links:
        assert link.startswith("/")
        assert client.get(link).status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/recommend", "/v1/events", "/v1/encode", "/v1/models", "/healthz", "/readyz"} <= set(paths)


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize("padding", [0, AT_ONCE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe{}", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        ('{"query":"∵","x":'.encode("utf-16-le") + "[".encode("utf-16-le") * 100_000, 400, "invalid_json"),
        ('{"query":"∵","x":'.encode("utf-16-be") + "[".encode("utf-16-be") * 60_000, 400, "invalid_json"),
        ('{"user_id": "u"}'.encode("utf-16-le"), 400, "invalid_json"),
        ('{"user_id": "u"}'.encode("utf-32-be"), 400, "invalid_json"),
        (b'{"user_id": "\xed\xa0\x80"}', 400, "invalid_json"),
        (b'{"k": ' + b"1" * 5000 + b"}", 400, "invalid_json"),
        (b"", 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b'{"user_id": "u", "k": 0}', 422, "invalid_request"),
        (b'{"user_id": "u", "k": 1000000000}', 422, "invalid_request"),
        (b'{"user_id": "u", "k": NaN}', 422, "invalid_request"),
        (b'{"user_id": "\\ud800"}', 422, "invalid_request"),
        (b'{"user_id": "u", "\\ud800": 1}', 422, "invalid_request"),
        (b'{"history": [{"item_id": "a", "rating": Infinity}]}', 422, "invalid_request"),
        (b'{"k": 5}', 422, "invalid_request"),
        (b'{"query": " \\n "}', 422, "invalid_request"),
    ],
)
def test_bad_bodies(client: TestClient, body: bytes, status: int, code: str, padding: int) -> None:
    """Whether it is parsed on the event loop or, for its size, apart from it."""
    if padding and not body:
        return
    answer = client.post("/v1/recommend", content=body + b" " * padding, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert set(answer.json()) == {"error"}
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "body",
    ["", "null", "{", "[]", "3", '"a"', '{"title": 3}', '{"title": "t", "x": 1}', '{"title": "t"} 1', '{"title": NaN}',
     '{"title": "t", "title": 3}', '{"title": "t", "categories": ["a", 1, null]}', '{"categories": 5}',
     '{"title": "t"}', "[" * 100_000],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["application/json", "application/ld+json; charset=utf-8", "text/plain", None])
def test_bodies_are_read_and_refused_as_fastapi_does(body: str, kind: str | None) -> None:
    async def put(item_id: Identifier, item: ItemBody) -> Any:
        return JSONResponse({"item_id": item_id, **item.model_dump()})

    async def told(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse([[one["type"], one["loc"], one["msg"]] for one in error.errors()], 422)

    def answered(route_class: type[APIRoute], item_id: str) -> tuple[int, Any]:
        router = APIRouter(route_class=route_class)
        router.put("/items/{item_id:path}")(put)
        app = FastAPI()
        app.include_router(router)
        app.add_exception_handler(RequestValidationError, told)
        answer = TestClient(app).put(f"/items/{item_id}", content=body, headers={"Content-Type": kind} if kind else {})
        return answer.status_code, answer.json() if answer.status_code != 400 else "in the application's own words"

    assert answered(BodyRoute, "a/b") == answered(APIRoute, "a/b")
    if body == '{"title": "t"}':  # a wrong path beside a good body
        assert answered(BodyRoute, "x" * 513) == answered(APIRoute, "x" * 513)


@pytest.mark.parametrize("large", [False, True])
def test_sentences_name_the_field(client: TestClient, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(bodies, "AT_ONCE", 1)

    def message(**body: Any) -> str:
        return str(recommend(client, **body).json()["error"]["message"])

    assert message(user_id="u", k=0).startswith("k: input should be greater than or equal to 1")
    assert message(user_id="u", dversity=1) == "dversity: unknown field; did you mean diversity?"
    assert message(user_id="u", xyz=1) == "xyz: unknown field"
    assert message(user_id="u", filters={"catgories": ["a"]}).startswith(
        "filters.catgories: unknown field; did you mean"
    )
    assert message(history=["a"]) == "history.0: must be an object"
    assert message(user_id="u", filters={"categories": "a"}) == "filters.categories: must be a list"
    assert message(history=[{"item_id": "a"}, {}]) == "history.1.item_id: field required"
    assert message(k=3) == "give at least one of user_id, history and query"
    posted = client.post("/v1/events", json=[{"user_id": "u"}])
    assert posted.json()["error"]["message"] == "0.item_id: field required"
    for body, start in (
        ([], "body: must not be empty"),
        (5, "body: must be an object"),
        ({"user": "u", "item": "i"}, "user: unknown field; did you mean user_id? (and 3 more)"),
        ([{"user_id": "u", "itm_id": "i"}], "0.itm_id: unknown field; did you mean item_id?"),
    ):
        told = client.post("/v1/events", json=body).json()["error"]["message"]
        assert told.startswith(start), told
    asked = b'{"user_id": "u"}'
    for kind, content in (("text/plain", asked), ("text/json", asked), ("application/json", b"")):
        bare = client.post("/v1/recommend", content=content, headers={"Content-Type": kind})
        assert bare.json()["error"]["message"] == "body: send JSON with Content-Type: application/json", kind
    # A field of another body is not the one that was meant.
    assert message(user_id="u", item_id="i") == "item_id: unknown field"
    assert message(user_id="u", categories=["a"]) == "categories: unknown field"
    assert message(history=[{"item": "a"}]) == "history.0.item: unknown field; did you mean item_id? (and 1 more)"


def test_a_long_history_is_answered_and_a_longer_one_refused(client: TestClient) -> None:
    events = [{"item_id": f"i{n % 3}", "timestamp": n} for n in range(MAX_HISTORY)]
    assert recommend(client, history=events).status_code == 200
    assert recommend(client, history=[*events, events[0]]).status_code == 422


def test_a_large_body_is_read_apart_from_the_event_loop(
    client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []
    for module, name in ((bodies, "parsed"), (limits, "too_deep")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real: [where.append(threading.current_thread().name),
                                                                 real(*a)][1])  # fmt: skip
    long = [{"item_id": f"i{n % 3}", "timestamp": n + 1} for n in range(6000)]
    small, large = recommend(client, history=long[-3:]), recommend(client, history=long)
    assert large.status_code == small.status_code == 200
    assert [name.startswith("large-bodies") for name in where] == [False, False, True, True]
    stored = client.post("/v1/events", json=[{"user_id": "u" * 150, "item_id": "i1"} for _ in range(1000)])
    assert stored.status_code == 202 and parts.store.count() == 1000


def test_many_small_values_are_read_apart_and_refused_at_the_first_wrong_one(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str] = []
    real = bodies.parsed
    monkeypatch.setattr(bodies, "parsed", lambda *a: [where.append(threading.current_thread().name), real(*a)][1])
    ids = [str(n) for n in range(9999)]
    for body, status, message in (
        (
            {"history": [0] * 9999},
            422,
            "history.0: must be an object",
        ),
        ({"history": [{}] * 9999}, 422, "history.0.item_id: field required"),
        ({"user_id": "u", "filters": {"exclude_items": [*ids, "a", "b"]}}, 422, "filters.exclude_items: list should"),
        ({"user_id": "u", "filters": {"exclude_items": [*ids, None]}}, 422, "filters.exclude_items.9999: input should"),
        ({"history": [{"item_id": one} for one in ids[:6500]]}, 200, ""),
    ):
        content = json.dumps(body, separators=(",", ":"))
        assert len(content) < AT_ONCE
        answer = client.post("/v1/recommend", content=content, headers=AS_JSON)
        assert answer.status_code == status and answer.json().get("error", {}).get("message", "").startswith(message)
        assert "more)" not in answer.text
    assert len(where) == 5 and all(name.startswith("large-bodies") for name in where)
    recommend(client, history=[{"item_id": one} for one in ids[:300]])
    assert not where[-1].startswith("large-bodies")


def test_the_largest_texts_are_read_apart_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    where: list[str] = []
    real = bodies.parsed
    monkeypatch.setattr(bodies, "parsed", lambda *a: [where.append(threading.current_thread().name), real(*a)][1])
    texts = json.dumps({"texts": ["ü" * 2000] * 64})  # six bytes a character
    assert len(client.post("/v1/encode", content=texts, headers=AS_JSON).json()["vectors"]) == 64
    item = json.dumps({"title": "ü" * 20_000, "text": "ü" * 20_000})
    put = client.put("/v1/items/new/one", content=item, headers=AS_JSON)
    assert (put.status_code, put.json()["item_id"]) == (200, "new/one")
    assert len(where) == 2 and all(name.startswith("large-bodies") for name in where)
    refused = [client.put(f"/v1/items/{'x' * 513}", content=c, headers=AS_JSON) for c in (item, '{"title": "t"}')]
    assert [answer.status_code for answer in refused] == [422, 422]
    assert refused[0].json() == refused[1].json()  # as for a small body


def test_a_large_body_is_refused_before_it_is_read(client: TestClient) -> None:
    json_type = {"Content-Type": "application/json"}
    declared = client.post("/v1/events", content=b" " * (MAX_BODY_BYTES + 1), headers=json_type)
    assert (declared.status_code, declared.json()["error"]["code"]) == (413, "too_large")

    def stream() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    undeclared = client.post("/v1/events", content=stream(), headers=json_type)
    assert (undeclared.status_code, undeclared.json()["error"]["code"]) == (413, "too_large")


def test_other_routes_and_methods(client: TestClient) -> None:
    none = "there is no such route; GET /docs tells all of them"
    assert client.get("/v2/none").json() == {"error": {"code": "not_found", "message": none}}
    wrong = client.get("/v1/recommend")
    assert wrong.status_code == 405 and wrong.headers["Allow"] == "POST"
    assert wrong.json()["error"] == {"code": "method_not_allowed", "message": "this route takes POST"}


def test_health_is_told_by_head_too(client: TestClient) -> None:
    for route in ("/healthz", "/readyz"):
        asked, whole = client.head(route), client.get(route)
        assert (asked.status_code, asked.headers["Content-Type"]) == (whole.status_code, whole.headers["Content-Type"])


def test_a_repeated_query_needs_no_encoder(client: TestClient, parts: Parts, service: Service) -> None:
    first = recommend(client, query="love").json()
    parts.encoder = "dead"
    assert recommend(client, query="love").json() == first
    assert recommend(client, query="hate").json()["degraded"] is True
    assert (service.queries.hits, service.queries.misses) == (1, 2)


# ---------------------------------------------------------------- parts that fail
@pytest.mark.parametrize("state", ["slow", "dead"])
def test_without_an_encoder_the_history_answers(client: TestClient, parts: Parts, state: str) -> None:
    parts.encoder = state
    answer = recommend(client, query="love", history=[{"item_id": "i4"}])
    assert answer.status_code == 200
    assert (answer.json()["source"], answer.json()["degraded"]) == ("history", True)
    assert recommend(client, query="love").json()["source"] == "popular"
    assert "degraded" not in recommend(client, history=[{"item_id": "i4"}]).json()
    refused = client.post("/v1/encode", json={"text": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "encoder_unavailable")


def test_what_another_encoder_read_is_no_query_of_this_model(client: TestClient, parts: Parts) -> None:
    """Vectors of two encoders of one width compare, and mean nothing: the answer is made without."""
    whole = recommend(client, query="love", history=[{"item_id": "i4"}]).json()
    assert whole["source"] == "history+query"
    parts.read_by = "gpt@9"
    assert recommend(client, query="love", history=[{"item_id": "i4"}]).json() == whole  # from the memory
    mixed = recommend(client, query="hate", history=[{"item_id": "i4"}]).json()
    assert (mixed["source"], mixed["degraded"], mixed["items"][0]["item_id"]) == ("history", True, "i5")
    assert client.post("/v1/encode", json={"text": "red"}).json()["encoder"] == "gpt@9"
    parts.read_by = "bert@1"
    assert recommend(client, query="love", history=[{"item_id": "i4"}]).json() == whole
    client.put("/v1/items/a", json={"text": "red"})
    assert parts.store.items_since()[0]["encoder"] == "bert@1"


def test_every_answer_is_an_exposure(client: TestClient, parts: Parts, service: Service, tmp_path: Path) -> None:
    service.direct(TrafficOptions(split={"films": 1}))
    service.exposures = ExposureLog(tmp_path / "exposures", ExposureOptions(pseudonymise=False))
    recommend(client, user_id="u", k=2)
    recommend(client, history=[{"item_id": "i4"}], model="films", k=1)
    parts.scorer = "dead"
    recommend(client, user_id="u", k=1)
    told = client.get("/v1/models")
    assert told.status_code == 503  # the models' part; the exposures go on
    service.exposures.close()
    lines = list(read_exposures(tmp_path / "exposures"))
    assert [(e["user"], e["arm"], e["by"], e["items"], e["degraded"]) for e in lines] == [
        ("u", "films", "split", ["i11", "i10"], False),
        (None, "films", "request", ["i5"], False),
        ("u", "films", "split", ["i11"], True),
    ]
    assert len({e["request_id"] for e in lines}) == 3


def test_a_caller_cannot_choose_what_exploration_shows(
    client: TestClient, parts: Parts, service: Service, tmp_path: Path
) -> None:
    """The same X-Request-ID draws anew; with the nonce of the log the same items come again."""
    explore = Policies.model_validate({"exploration": {"kind": "softmax", "temperature": 100, "candidates": 12}})
    parts.engine = Engine(parts.engine.bundle, "films", explore)
    service.exposures = ExposureLog(tmp_path / "exposures", ExposureOptions())
    shown = []
    for _ in range(5):
        answer = client.post("/v1/recommend", json={"user_id": "u", "k": 6}, headers={"X-Request-ID": "mine"})
        shown.append(ids(answer))
    assert len({tuple(items) for items in shown}) > 1
    service.exposures.close()
    for line, items in zip(read_exposures(tmp_path / "exposures"), shown, strict=True):
        again = parts.engine.score([ScoreRequest(k=6, chance=f"mine {line['nonce']}")])[0]
        assert isinstance(again, dict) and [item["item_id"] for item in again["items"]] == items


def test_models_tell_of_split_shadows_and_exposures(client: TestClient, service: Service, tmp_path: Path) -> None:
    assert set(client.get("/v1/models").json()) == {"models", "encoder"}
    service.direct(TrafficOptions(split={"films": 3, "b": 1}, shadow={"b": 1}))
    service.exposures = ExposureLog(tmp_path / "exposures", ExposureOptions())
    told = client.get("/v1/models").json()
    assert told["split"] == {"films": 0.75, "b": 0.25}
    assert told["shadows"] == []
    assert told["exposures"]["dropped"] == 0


@pytest.mark.parametrize("state", ["slow", "dead"])
def test_without_a_scorer_there_are_popular_items(client: TestClient, parts: Parts, state: str) -> None:
    parts.scorer = state
    filters = {"categories": ["even"], "exclude_items": ["i10"]}
    answer = recommend(client, history=[{"item_id": "i8"}], query="love", k=3, filters=filters)
    assert answer.status_code == 200
    assert answer.json() == {
        "items": [
            {"item_id": "i6", "score": pytest.approx(np.log1p(6)), "title": "Title 6"},
            {"item_id": "i4", "score": pytest.approx(np.log1p(4)), "title": "Title 4"},
            {"item_id": "i2", "score": pytest.approx(np.log1p(2)), "title": "Title 2"},
        ],
        "model": "films@abc",
        "source": "popular",
        "gate": {"long": None, "short": None},
        "degraded": True,
    }
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    assert client.post("/v1/events", json={"user_id": "u", "item_id": "i1"}).status_code == 202


@pytest.mark.parametrize("state", ["slow", "dead"])
def test_what_has_no_degraded_form_is_a_503(client: TestClient, parts: Parts, service: Service, state: str) -> None:
    parts.scorer, service.popular = state, None
    for answer in (recommend(client, user_id="u"), client.get("/v1/items/i1/similar")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "scorer_unavailable")
        assert answer.headers["Retry-After"] == "1"
        assert "10.0.0.1" not in answer.text


def test_a_refusal_of_the_model_is_no_fault_of_it(client: TestClient) -> None:
    """Callers who ask for a model that is not there must not open the circuit for the others."""
    for _ in range(10):
        assert recommend(client, user_id="u", model="no such").status_code == 404
    assert "degraded" not in recommend(client, user_id="u").json()


def test_metrics_tell_the_version_that_answers(parts: Parts) -> None:
    """As the Scorer says it, and not what popular items are named in its place."""
    metrics = PrometheusMetrics()
    service = Service(parts.store, parts.encode, parts.call, limits_of(), metrics=metrics)
    service.popular = PopularItems(toy_items(), POPULARITY, "films@next", exclude_seen=True)

    def served() -> dict[str, float]:
        found = re.findall(r'springtide_model{model="(.*)"} (.*)', metrics.text().decode())
        return {model: float(value) for model, value in found}

    async def run() -> None:
        await service.recommend(RecommendRequest(user_id="u"))
        assert served() == {"films@abc": 1}
        parts.engine.label, parts.scorer = "films@next", "dead"
        await service.recommend(RecommendRequest(user_id="u"))
        assert served() == {"films@abc": 1}
        parts.scorer = "ok"
        await service.recommend(RecommendRequest(user_id="u"))
        assert served() == {"films@abc": 0, "films@next": 1}

    asyncio.run(run())


def test_a_model_that_fails_costs_those_who_ask_another_nothing(
    client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A challenger's fault opens no circuit: the Scorer is well."""
    score = parts.engine.score
    monkeypatch.setattr(parts.engine, "score", lambda asked: [Failure("broken")] if asked[0].model else score(asked))
    for _ in range(10):
        answer = recommend(client, user_id="u", model="challenger").json()
        assert (answer["source"], answer["degraded"]) == ("popular", True)
    assert "degraded" not in recommend(client, user_id="u").json()


def test_lookups_cost_nobody_a_recommendation(parts: Parts, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by their failures, which open no circuit of `recommend`, nor by their number."""
    score, door = parts.call, asyncio.Event()

    async def call(method: str, *arguments: Any) -> Any:
        if method == "similar":
            await door.wait()
            raise ConnectionError("replica died")
        return await score(method, *arguments)

    async def run() -> None:
        service._call = call
        crowd = [asyncio.create_task(service.similar("i1", 3)) for _ in range(service_module.LOOKUPS)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="does not answer"):  # at once: it would wait for long
            await asyncio.wait_for(service.similar("i1", 3), 0.1)
        door.set()
        assert all(isinstance(found, ApiError) for found in await asyncio.gather(*crowd, return_exceptions=True))
        assert "degraded" not in await service.recommend(RecommendRequest(user_id="u"))

    asyncio.run(run())


def test_texts_to_encode_cost_nobody_a_query(parts: Parts, service: Service) -> None:
    """Neither by their failures, which open no circuit of queries, nor by their number."""
    read, door = parts.encode, asyncio.Event()

    async def encode(texts: list[str]) -> Encoded:
        if len(texts) > 1:
            await door.wait()
            raise ConnectionError("replica died")
        return await read(texts)

    async def run() -> None:
        service._encode, many = encode, EncodeRequest(texts=["a", "b"])
        crowd = [asyncio.create_task(service.encode(many)) for _ in range(service_module.TEXTS)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="does not answer"):  # at once: it would wait for long
            await asyncio.wait_for(service.encode(many), 0.1)
        assert "degraded" not in await service.recommend(RecommendRequest(query="love"))
        door.set()
        assert all(isinstance(found, ApiError) for found in await asyncio.gather(*crowd, return_exceptions=True))
        assert "degraded" not in await service.recommend(RecommendRequest(query="another"))

    asyncio.run(run())


def test_models_that_nobody_tells_of_cost_no_lookup(parts: Parts) -> None:
    """Every replica is asked for them, so a single one that hangs makes them fail, again and again."""

    async def nowhere(method: str) -> Told:
        raise TimeoutError

    async def run() -> None:
        service = Service(parts.store, parts.encode, parts.call, limits_of(breaker_failures=2), scorers=nowhere)
        for _ in range(5):
            with pytest.raises(ApiError, match="does not answer"):
                await service.models()
        assert (await service.similar("i1", 3))["items"]

    asyncio.run(run())


def test_a_hanging_scorer_is_not_waited_for_by_everyone(parts: Parts) -> None:
    """After the failures in a row that open the circuit, requests are answered at once; it closes again by itself."""
    parts.scorer = "slow"
    service = Service(parts.store, parts.encode, parts.call, limits_of(scorer_timeout_s=0.3, breaker_pause_s=2))
    service.popular = PopularItems(toy_items(), POPULARITY, "films@abc", exclude_seen=True)
    request = RecommendRequest(user_id="u", k=1)

    async def ask(times: int) -> list[Any]:
        return list(await asyncio.gather(*(service.recommend(request) for _ in range(times))))

    async def run() -> None:
        assert all(answer["degraded"] for answer in await ask(5))
        asked = len(parts.calls)
        assert all(answer["degraded"] for answer in await ask(100))
        assert len(parts.calls) == asked
        parts.scorer = "ok"
        await asyncio.sleep(2.1)
        assert "degraded" not in (await ask(1))[0]
        assert all("degraded" not in answer for answer in await ask(20))

    asyncio.run(run())


def test_a_store_that_hangs_is_not_waited_for(
    parts: Parts, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(parts.store, "history", lambda *_: release.wait(60) and [])
    try:
        began = time.monotonic()
        answers = [recommend(client, user_id="u").json() for _ in range(8)]
        assert time.monotonic() - began < 3  # five wait for 0.2 s, the others not at all
        assert all(answer["degraded"] and answer["items"] for answer in answers)
    finally:
        release.set()


def test_without_a_store_recommendations_go_on_and_events_are_refused(client: TestClient, parts: Parts) -> None:
    parts.store.close()
    answer = recommend(client, user_id="u", query="love").json()
    assert (answer["source"], answer["degraded"]) == ("query", True)
    event = client.post("/v1/events", json={"user_id": "u", "item_id": "i1"})
    assert (event.status_code, event.json()["error"]["code"]) == (503, "store_unavailable")
    assert client.get("/v1/users/u/interests").status_code == 503
    assert client.get("/readyz").status_code == 503


def test_without_a_store_the_history_read_last_is_used(client: TestClient, parts: Parts) -> None:
    client.post("/v1/events", json={"user_id": "u", "item_id": "i4"})
    before = recommend(client, user_id="u").json()
    parts.store.close()
    assert recommend(client, user_id="u").json() == {**before, "degraded": True}


def test_a_full_disk_acknowledges_nothing(client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(events: Any) -> int:
        raise SpringtideError("the event log cannot be used: database or disk is full") from sqlite3.OperationalError()

    monkeypatch.setattr(parts.store, "append", full)
    assert client.post("/v1/events", json={"user_id": "u", "item_id": "i1"}).status_code == 503


def test_a_fault_of_ours_shows_no_trace(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(user_id: str) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(service, "interests", broken)
    answer = client.get("/v1/users/u/interests")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in json.dumps(answer.json())


def test_one_hop_for_a_history(client: TestClient, parts: Parts) -> None:
    recommend(client, history=[{"item_id": "i4"}], explain=True)
    assert parts.calls == ["score"]
