"""Answers from one bundle, free of Ray and HTTP: batches of score requests, interests and similar items.

An Engine changes only by items put into its catalogue and events counted, so a swap of models is a swap of one
reference.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from springtide.serving.choose import Chosen, Draw, Rules, choose
from springtide.serving.drawing import draws_of
from springtide.serving.filters import barred, barred_by, index_catalogue
from springtide.serving.policies import Policies, counting_events, damping_of, items_of
from springtide.serving.reasons import explain_items
from springtide.serving.sharing import SharedLock
from springtide.text.encoder import name_in

if TYPE_CHECKING:
    from springtide.bundle import Bundle
    from springtide.model.recommender import History, Interests, NewItem

Json = dict[str, Any]
EXPLAINED_EVENTS = 5
ENCODER_MISMATCH = "encoder_mismatch"  # code of a refusal: the answer can be had without the query
TOP_CATEGORIES = 5


@dataclass(frozen=True)
class ScoreRequest:
    """One recommendation to make: everything that the Scorer needs, in one message."""

    events: list[Json] = field(default_factory=list)  # {item_id, timestamp?, action?, rating?}, oldest first
    query: np.ndarray | None = None  # [D] float32, L2-normalised
    encoder: str | None = None  # identity of the one that made it; None: not told
    k: int = 10
    exclude_seen: bool | None = None
    categories: tuple[str, ...] = ()
    exclude_items: tuple[str, ...] = ()
    allow_items: tuple[str, ...] | None = None
    diversity: float | None = None  # None: as the policies say
    explain: bool = False
    model: str | None = None
    assigned: bool = False  # the model was drawn, not asked for: where it is missing the primary answers
    now: int | None = None  # ms; None: the scorer's clock
    chance: str | None = None  # seeds exploration: the same one draws the same items again; None: fresh


@dataclass(frozen=True)
class Refusal:
    """What an engine answers to a request that it cannot serve: an HTTP status, a code and a sentence."""

    status: int
    code: str
    message: str


class Engine:
    def __init__(self, bundle: Bundle, name: str, policies: Policies | None = None) -> None:
        self.bundle = bundle
        self.name = name
        self.label = f"{name}@{bundle.version}"
        self.loaded_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._recommender = bundle.recommender
        self._policies = policies or Policies()
        self._lock = SharedLock()
        self._changing = threading.Lock()  # one change at a time, from its first look to its last write
        self._index_catalogue()

    @property
    def takes_new_items(self) -> bool:
        """Whether the model can tell from a text what an item is like."""
        return self._recommender.text_vectors is not None

    @property
    def text_width(self) -> int:
        """Width of the encoder's vectors; 0 for a model without texts."""
        texts = self._recommender.text_vectors
        return 0 if texts is None else int(texts.shape[1])

    @property
    def encoder(self) -> str:
        """Name of the text encoder that the items' vectors are of."""
        return self.bundle.settings.text.encoder

    @property
    def log_end(self) -> int:
        """Time in ms of the last event that the model was trained on."""
        return self._recommender.log_end or 0

    @property
    def distances(self) -> int:
        """How many events after another one an item still counts as following it; 0 for a model without transitions."""
        memory = self._recommender.model.channels.memory
        return 0 if memory is None else memory.distances

    def put_items(self, items: Sequence[NewItem]) -> None:
        """Add items to the catalogue or replace what is known of them. Raises ValueError if the model has no texts."""
        with self._changing, self._lock.writing():
            self._recommender.put_items(items)
            self._index_catalogue()

    def observe(self, users: Sequence[tuple[list[Json], list[Json]]]) -> None:
        """Count new events without training: of each user what came before, and the new ones.

        Scoring waits only while what was counted is put in its place.
        """
        with self._changing:
            histories = [self._recommender.history(before)[0] for before, _ in users]
            events = [self._recommender.history(new)[0] for _, new in users]
            counted = self._recommender.count(histories, events)
            with self._lock.writing():
                self._recommender.take(counted)

    def _index_catalogue(self) -> None:
        self._catalogue = index_catalogue(self._recommender.index, self._recommender.categories)
        self._barred = barred_by(self._catalogue, self._policies)  # [I] bool

    def describe(self) -> Json:
        return {
            "model": self.label,
            "name": self.name,
            "version": self.bundle.version,
            "items": len(self._recommender.item_ids),
            "text": self._recommender.text_vectors is not None,
            "loaded_at": self.loaded_at,
            "metrics": self.bundle.metrics,
        }

    def warm_up(self) -> None:
        """Answer once of each kind, so that no caller pays for lazy set-up. Raises what scoring raises."""
        one: list[Json] = [{"item_id": item_id} for item_id in self._recommender.item_ids[:2]]
        text = self._recommender.text_vectors
        query = None if text is None else np.zeros(text.shape[1], np.float32)
        for request in (ScoreRequest(), ScoreRequest(one, explain=True), ScoreRequest(one, query)):
            for answer in self.score([request, request]):
                if isinstance(answer, Refusal):
                    raise RuntimeError(f"the warm-up request was refused: {answer.message}")

    # ---------------------------------------------------------------- recommend
    def score(self, requests: Sequence[ScoreRequest]) -> list[Json | Refusal]:
        """One answer per request, in order. A request that is refused costs the others nothing."""
        with self._lock.reading():
            return self._score(requests)

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Json | Refusal]:
        answers: list[Json | Refusal | None] = [self._refuse(request) for request in requests]
        open_ = [i for i, answer in enumerate(answers) if answer is None]
        if open_:
            for i, answer in zip(open_, self._answer([requests[i] for i in open_]), strict=True):
                answers[i] = answer
        return [answer for answer in answers if answer is not None]

    def _refuse(self, request: ScoreRequest) -> Refusal | None:
        if request.model is not None and request.model not in (self.name, self.label):
            return Refusal(404, "unknown_model", f"there is no model {request.model!r} here; {self.label} is served")
        if request.query is None:
            return None
        text = self._recommender.text_vectors
        if text is None:
            return Refusal(422, "no_text", "this model's items have no text, so it cannot answer a query; leave it out")
        if request.encoder is not None and name_in(request.encoder) != self.encoder:
            return Refusal(
                503, ENCODER_MISMATCH, f"the query was read by the encoder {request.encoder} and the items by "
                f"{self.encoder}; serve that one"
            )  # fmt: skip
        if request.query.shape != (text.shape[1],):
            return Refusal(
                503, ENCODER_MISMATCH, f"the query has {request.query.shape[-1]} dimensions and the items' texts "
                f"{text.shape[1]}; serve the encoder that the bundle was trained with"
            )  # fmt: skip
        return None

    def _answer(self, requests: list[ScoreRequest]) -> list[Json]:
        recommender = self._recommender
        pairs = [self._history(request.events) for request in requests]
        histories = [history for history, _ in pairs]
        now = np.asarray([_clock() if request.now is None else request.now for request in requests], np.int64)
        rules = [self._rules(request) for request in requests]
        barred = [self._barred_from(*pair) for pair in zip(requests, histories, strict=True)]
        first, damping = [rule.candidates for rule in rules], self._policies.popularity_damping
        draws, gate = draws_of(recommender, histories, _stack_queries(requests), now, barred, first, damping)
        return [
            self._compose(request, pairs[i], self._choose(request, rules[i], draws[i]), float(gate[i]), int(now[i]))
            for i, request in enumerate(requests)
        ]

    def _rules(self, request: ScoreRequest) -> Rules:
        policies = self._policies
        diversity = policies.diversity if request.diversity is None else request.diversity
        return Rules(request.k, diversity, policies.caps, policies.exploration)

    def _choose(self, request: ScoreRequest, rules: Rules, draw: Draw) -> Chosen:
        vectors, catalogue = self._recommender.item_vectors, self._catalogue
        return choose(draw, rules, vectors, catalogue.categories, catalogue.in_any, request.chance)

    def _compose(
        self, request: ScoreRequest, pair: tuple[History, list[str]], chosen: Chosen, gate_short: float, now: int
    ) -> Json:
        """The answer to one request from its known history, its unknown ids and what was chosen."""
        history, unknown = pair
        known = len(history) > 0
        rows = np.asarray(chosen.rows, np.int64)
        items = self._items(rows, np.asarray(chosen.scores))
        if self._policies.exploration.kind != "off":
            for item, propensity in zip(items, chosen.propensities, strict=True):
                item["propensity"] = float(f"{propensity:.6g}")
        answer: Json = {
            "items": items,
            "model": self.label,
            "source": "+".join(["history"] * known + ["query"] * (request.query is not None)) or "popular",
            "gate": _gate(gate_short if known else np.nan),
        }
        if unknown:
            answer["unknown_items"] = list(dict.fromkeys(unknown))
        if unheard := [name for name in request.categories if name not in self._catalogue.rows_of]:
            answer["unknown_categories"] = list(dict.fromkeys(unheard))
        if request.explain:
            interests = self._recommender.interests(history, now) if known else None
            reasons = self._recommender.explain(history, rows, request.query, now)
            damping = self._policies.popularity_damping
            damped = damping and (known or request.query is not None)
            added = damping_of(self._recommender.popularity[rows], damping) if damped else None
            taken = self._recommender.popularity[rows] > 0
            told = explain_items(reasons, interests, lambda place: self._event(history, place), taken, added)
            for item, explanation in zip(items, told, strict=True):
                item["explanation"] = explanation
            answer["explanation"] = self._explain(history, interests)
        return answer

    def _history(self, events: list[Json]) -> tuple[History, list[str]]:
        """The events that count, and the unknown item ids among them."""
        return self._recommender.history(counting_events(events, self._policies.action_weights))

    def _barred_from(self, request: ScoreRequest, history: History) -> np.ndarray:
        """[I] bool: what the answer must not hold."""
        out = self._barred.copy()
        if request.categories or request.exclude_items or request.allow_items is not None:
            out |= barred(
                self._catalogue,
                categories=request.categories,
                allow_items=request.allow_items,
                block_items=request.exclude_items,
            )
        seen = (request.exclude_seen, self._policies.exclude_seen, self.bundle.settings.data.exclude_seen)
        if next(choice for choice in seen if choice is not None):
            actions = self._policies.seen_actions
            out[history.items if actions is None else self._catalogue.rows(items_of(request.events, actions))] = True
        return out

    def _explain(self, history: History, interests: Interests | None) -> Json:
        if interests is None:
            return {"gate": _gate(np.nan), "recent": []}
        short = interests.gate_short if np.isfinite(interests.gate_short) else 0.5
        weights = short * interests.attention_short + (1 - short) * interests.attention_long
        heaviest = np.argsort(-weights, kind="stable")[:EXPLAINED_EVENTS]
        recent = [{**self._event(history, int(i)), "weight": _rounded(weights[i])} for i in heaviest if weights[i] > 0]
        return {"gate": _gate(interests.gate_short), "recent": recent}

    # ---------------------------------------------------------------- interests and similar items
    def interests(self, events: list[Json]) -> Json:
        """What each branch makes of a history of {item_id, timestamp?, action?, rating?} at this moment."""
        with self._lock.reading():
            return self._interests(events)

    def _interests(self, events: list[Json]) -> Json:
        history, unknown = self._history(events)
        answer: Json
        if not len(history):
            nothing: Json = {"categories": [], "items": []}
            answer = {"gate": _gate(np.nan), "events": [], "long": nothing, "short": nothing, "channels": {}}
        else:
            found = self._recommender.interests(history, _clock())
            answer = {
                "gate": _gate(found.gate_short),
                "events": [
                    {
                        **self._event(history, i),
                        "attention_long": _rounded(found.attention_long[i]),
                        "attention_short": _rounded(found.attention_short[i]),
                    }
                    for i in range(len(history))
                ],
                "long": self._branch(history, found, "long"),
                "short": self._branch(history, found, "short"),
                "channels": {name: _rounded(weight) for name, weight in found.channels.items()},
            }
        unknown_items = {"unknown_items": list(dict.fromkeys(unknown))} if unknown else {}
        return {"model": self.label, **answer, **unknown_items}

    def similar(self, item_id: str, k: int) -> Json | Refusal:
        """The nearest items by the model's item vectors."""
        with self._lock.reading():
            return self._similar(item_id, k)

    def _similar(self, item_id: str, k: int) -> Json | Refusal:
        row = self._recommender.index.get(item_id)
        if row is None:
            return Refusal(404, "unknown_item", "the model does not know this item_id")
        rows, values = self._recommender.similar(row, min(k, len(self._recommender.item_ids)))
        keep = (rows >= 0) & np.isfinite(values)
        return {
            "item_id": item_id,
            "title": self._recommender.titles[row],
            "model": self.label,
            "items": self._items(rows[keep], values[keep]),
        }

    def _branch(self, history: History, found: Interests, branch: str) -> Json:
        attention = found.attention_long if branch == "long" else found.attention_short
        nearest = found.items_long if branch == "long" else found.items_short
        shares: dict[str, float] = defaultdict(float)
        for row, weight in zip(history.items.tolist(), attention.tolist(), strict=True):
            categories = self._recommender.categories[row]
            for category in categories:
                shares[category] += weight / len(categories)
        top = sorted(((s, c) for c, s in shares.items() if s > 0), key=lambda pair: (-pair[0], pair[1]))
        rows = nearest[nearest >= 0]
        return {
            "categories": [{"category": c, "share": _rounded(s)} for s, c in top[:TOP_CATEGORIES]],
            "items": self._items(rows, 1.0 / np.arange(1, len(rows) + 1)),
        }

    def _items(self, rows: np.ndarray, values: np.ndarray) -> list[Json]:
        ids, titles = self._recommender.item_ids, self._recommender.titles
        return [
            {"item_id": ids[row], "score": _rounded(value), "title": titles[row]}
            for row, value in zip(rows.tolist(), values.tolist(), strict=True)
        ]

    def _event(self, history: History, position: int) -> Json:
        row = int(history.items[position])
        event: Json = {"item_id": self._recommender.item_ids[row], "title": self._recommender.titles[row]}
        if history.timestamps[position] > 0:
            event["timestamp"] = int(history.timestamps[position])
        if history.actions[position] > 0:
            event["action"] = self._recommender.actions[history.actions[position]]
        if np.isfinite(history.ratings[position]):
            event["rating"] = float(history.ratings[position])
        return event


def _clock() -> int:
    return int(time.time() * 1000)


def _stack_queries(requests: Sequence[ScoreRequest]) -> np.ndarray | None:
    """[B, D] with a NaN row where a request has no query; None if none has."""
    width = next((request.query.shape[0] for request in requests if request.query is not None), None)
    if width is None:
        return None
    stacked = np.full((len(requests), width), np.nan, np.float32)
    for i, request in enumerate(requests):
        if request.query is not None:
            stacked[i] = request.query
    return stacked


def _gate(short: float) -> Json:
    if not np.isfinite(short):
        return {"long": None, "short": None}
    return {"long": _rounded(1 - short), "short": _rounded(short)}


def _rounded(value: float) -> float:
    return round(float(value), 6)
