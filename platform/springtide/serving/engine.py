"""Answers from one bundle, free of Ray and HTTP: batches of score requests, interests and similar items.

An Engine never changes after it is built, so a swap of models is a swap of one reference.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from springtide.bundle import Bundle
    from springtide.model.recommender import History, Interests

Json = dict[str, Any]
EXPLAINED_EVENTS = 5
TOP_CATEGORIES = 5
CANDIDATES_PER_ITEM = 4  # items that the diversity re-ranking chooses each answer from


@dataclass(frozen=True)
class ScoreRequest:
    """One recommendation to make: everything that the Scorer needs, in one message."""

    events: list[Json] = field(default_factory=list)  # {item_id, timestamp?, action?, rating?}, oldest first
    query: np.ndarray | None = None  # [D] float32, L2-normalised
    k: int = 10
    exclude_seen: bool | None = None
    categories: tuple[str, ...] = ()
    exclude_items: tuple[str, ...] = ()
    diversity: float = 0.0
    explain: bool = False
    model: str | None = None
    assigned: bool = False  # the model was drawn, not asked for: where it is missing the primary answers
    now: int | None = None  # ms; None: the scorer's clock


@dataclass(frozen=True)
class Refusal:
    """What an engine answers to a request that it cannot serve: an HTTP status, a code and a sentence."""

    status: int
    code: str
    message: str


class Engine:
    def __init__(self, bundle: Bundle, name: str) -> None:
        self.bundle = bundle
        self.name = name
        self.label = f"{name}@{bundle.version}"
        self.loaded_at = datetime.now(UTC).isoformat(timespec="seconds")
        self._recommender = bundle.recommender
        rows: dict[str, list[int]] = defaultdict(list)
        for row, categories in enumerate(self._recommender.categories):
            for category in categories:
                rows[category].append(row)
        self._rows_of_category = {category: np.asarray(found, np.int64) for category, found in rows.items()}

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
        if request.query.shape != (text.shape[1],):
            return Refusal(
                503, "encoder_mismatch", f"the query has {request.query.shape[-1]} dimensions and the items' texts "
                f"{text.shape[1]}; serve the encoder that the bundle was trained with"
            )  # fmt: skip
        return None

    def _answer(self, requests: list[ScoreRequest]) -> list[Json]:
        recommender = self._recommender
        pairs = [recommender.history(request.events) for request in requests]
        histories = [history for history, _ in pairs]
        now = np.asarray([request.now or int(time.time() * 1000) for request in requests], np.int64)
        scores = recommender.score(histories, _stack_queries(requests), now)
        exclude = [self._excluded(request, history) for request, history in zip(requests, histories, strict=True)]
        wanted = [
            request.k * (CANDIDATES_PER_ITEM if request.diversity else 1) for request in requests
        ]  # one call for the batch: the largest list, cut per request
        rows, values = recommender.top_k(scores.logits, min(max(wanted), len(recommender.item_ids)), exclude)
        return [
            self._compose(request, pairs[i], (rows[i, : wanted[i]], values[i, : wanted[i]]), scores.gate_short[i])
            for i, request in enumerate(requests)
        ]

    def _compose(
        self,
        request: ScoreRequest,
        pair: tuple[History, list[str]],
        best: tuple[np.ndarray, np.ndarray],
        gate_short: float,
    ) -> Json:
        """The answer to one request from its known history and unknown ids, and its best rows and their scores."""
        history, unknown = pair
        rows, values = best
        keep = (rows >= 0) & np.isfinite(values)
        rows, values = rows[keep], values[keep]
        if request.diversity:
            order = diversify(values, self._recommender.item_vectors[rows], request.k, request.diversity)
            rows, values = rows[order], values[order]
        known = len(history) > 0
        answer: Json = {
            "items": self._items(rows, values),
            "model": self.label,
            "source": "+".join(["history"] * known + ["query"] * (request.query is not None)) or "popular",
            "gate": _gate(gate_short if known else np.nan),
        }
        if unknown:
            answer["unknown_items"] = list(dict.fromkeys(unknown))
        if request.explain:
            answer["explanation"] = self._explain(history)
        return answer

    def _excluded(self, request: ScoreRequest, history: History) -> np.ndarray:
        """Catalogue rows that the answer must not hold."""
        index = self._recommender.index
        named = [index[item_id] for item_id in request.exclude_items if item_id in index]
        parts = [np.asarray(named, np.int64)]
        seen = self.bundle.settings.data.exclude_seen if request.exclude_seen is None else request.exclude_seen
        if seen:
            parts.append(history.items)
        if request.categories:
            outside = np.ones(len(self._recommender.item_ids), bool)
            for category in request.categories:
                outside[self._rows_of_category.get(category, np.empty(0, np.int64))] = False
            parts.append(np.flatnonzero(outside))
        return np.unique(np.concatenate(parts))

    def _explain(self, history: History) -> Json:
        if not len(history):
            return {"gate": _gate(np.nan), "recent": []}
        interests = self._recommender.interests(history)
        short = interests.gate_short if np.isfinite(interests.gate_short) else 0.5
        weights = short * interests.attention_short + (1 - short) * interests.attention_long
        heaviest = np.argsort(-weights, kind="stable")[:EXPLAINED_EVENTS]
        recent = [{**self._event(history, int(i)), "weight": _rounded(weights[i])} for i in heaviest if weights[i] > 0]
        return {"gate": _gate(interests.gate_short), "recent": recent}

    # ---------------------------------------------------------------- interests and similar items
    def interests(self, events: list[Json]) -> Json:
        """What each branch makes of a history of {item_id, timestamp?, action?, rating?}."""
        history, unknown = self._recommender.history(events)
        answer: Json
        if not len(history):
            nothing: Json = {"categories": [], "items": []}
            answer = {"gate": _gate(np.nan), "events": [], "long": nothing, "short": nothing}
        else:
            found = self._recommender.interests(history)
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
            }
        unknown_items = {"unknown_items": list(dict.fromkeys(unknown))} if unknown else {}
        return {"model": self.label, **answer, **unknown_items}

    def similar(self, item_id: str, k: int) -> Json | Refusal:
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


def diversify(scores: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """Positions of k candidates by maximal marginal relevance (Carbonell and Goldstein, 1998).

    scores: [C] best first; vectors: [C, d]. Each step takes the greatest (1 - diversity) * relevance
    - diversity * (greatest cosine to what is taken), with relevance the score scaled to 0..1 over the candidates.
    """
    if not len(scores):
        return np.empty(0, np.int64)
    spread = float(scores[0] - scores[-1])
    relevance = (scores - scores[-1]) / spread if spread > 0 else np.ones_like(scores)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    taken, nearest = [0], unit @ unit[0]
    free = np.ones(len(scores), bool)
    free[0] = False
    while len(taken) < min(k, len(scores)):
        value = np.where(free, (1 - diversity) * relevance - diversity * nearest, -np.inf)
        best = int(np.argmax(value))
        taken.append(best)
        free[best] = False
        nearest = np.maximum(nearest, unit @ unit[best])
    return np.asarray(taken[:k], np.int64)


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
