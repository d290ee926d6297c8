"""Which model answers whom: splits that are stable per user, and shadow copies that are scored but never shown."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from springtide.serving.engine import ScoreRequest
from springtide.serving.options import TrafficOptions

log = logging.getLogger("springtide.serving")
Json = dict[str, Any]
BUCKETS = 10_000  # of shadows: shares finer than a hundredth of a percent are rounded


@dataclass(frozen=True)
class Choice:
    """The model of one request (None: the primary), how it came to it, and the share of traffic that goes there."""

    model: str | None
    by: str  # request: the caller named it; split: drawn by the user's hash; default: nothing to choose from
    share: float | None = None  # of a split, 0..1
    test: str | None = None  # of a split: a short name of its weights and salt, another one where these change


def choose(options: TrafficOptions, model: str | None, user_id: str | None, request_id: str) -> Choice:
    """The model for a request. The same user gets the same one for as long as salt and split stay the same.

    A request without a user is drawn by its own id. Each model has a chance of its own for the same user, and the best
    one wins (weighted rendezvous hashing): the order of the configuration says nothing, and a model that is added or
    weighed otherwise moves no user between two others.
    """
    if model is not None:
        return Choice(model, "request")
    if not options.split:
        return Choice(None, "default")
    key = f"user {user_id}" if user_id is not None else f"request {request_id}"
    weights = shares(options)
    name = min(weights, key=lambda name: _waits(options.salt, name, key) / weights[name])
    return Choice(name, "split", weights[name], _test(options.salt, weights))


def _waits(salt: str, model: str, key: str) -> float:
    """Exponentially distributed over keys, independent from model to model and from salt to salt."""
    drawn = int.from_bytes(_digest(f"{salt}\0{model}", key)[:8], "big")
    return -math.log((drawn + 1) / 2**64)


def shares(options: TrafficOptions) -> dict[str, float]:
    """The split with its weights scaled to 1 in all, without models of weight 0."""
    total = sum(options.split.values())
    return {name: weight / total for name, weight in options.split.items() if weight > 0}


def bucket(salt: str, key: str) -> int:
    """0 to BUCKETS - 1, evenly over keys and independent from salt to salt."""
    return int.from_bytes(_digest(salt, key)[:8], "big") % BUCKETS


def _test(salt: str, weights: dict[str, float]) -> str:
    told = json.dumps(sorted((name, round(share, 9)) for name, share in weights.items()))
    return _digest(salt, told).hex()[:12]


def _digest(salt: str, key: str) -> bytes:
    return hashlib.sha256(f"{salt}\0{key}".encode()).digest()


# ---------------------------------------------------------------- shadows
@dataclass
class Comparison:
    """How a shadow's answers compare with those that were shown, summed over requests."""

    requests: int = 0
    failed: int = 0
    skipped: int = 0  # too many copies were under way
    overlap: list[float] = field(default_factory=lambda: [0.0, 0.0])  # sum, sum of squares
    correlation: list[float] = field(default_factory=lambda: [0.0, 0.0])
    drift: list[float] = field(default_factory=lambda: [0.0, 0.0])
    drift_requests: int = 0  # those with an item in common

    def add(self, shown: Sequence[Json], shadow: Sequence[Json]) -> None:
        """One pair of answers, as lists of {item_id, score}, best first."""
        first, second = [item["item_id"] for item in shown], [item["item_id"] for item in shadow]
        self.requests += 1
        _note(self.overlap, overlap(first, second))
        _note(self.correlation, rank_correlation(first, second))
        scores = {item["item_id"]: item["score"] for item in shown}
        common = [item["score"] - scores[item["item_id"]] for item in shadow if item["item_id"] in scores]
        if common:
            self.drift_requests += 1
            _note(self.drift, sum(common) / len(common))

    def told(self) -> Json:
        return {
            "requests": self.requests,
            "failed": self.failed,
            "skipped": self.skipped,
            "overlap": _mean(self.overlap, self.requests),
            "rank_correlation": _mean(self.correlation, self.requests),
            "score_drift": _mean(self.drift, self.drift_requests),
        }


class Traffic:
    """The choices of one configuration, and what its shadows have shown so far.

    score: scores one request apart from those that somebody waits for. Not thread-safe: for one event loop.
    """

    def __init__(self, options: TrafficOptions, score: Callable[[ScoreRequest], Awaitable[Json]]) -> None:
        self.options = options
        self._score = score
        self._compared: dict[tuple[str, str], Comparison] = {}
        self._running: set[asyncio.Task[None]] = set()

    def choose(self, model: str | None, user_id: str | None, request_id: str) -> Choice:
        return choose(self.options, model, user_id, request_id)

    def shadow(self, request: ScoreRequest, answer: Json, request_id: str) -> None:
        """Start scoring the copies that fall to this request, and return at once."""
        for name, share in self.options.shadow.items():
            if answer["model"].split("@")[0] == name or bucket(f"{self.options.salt} {name}", request_id) >= round(
                share * BUCKETS
            ):
                continue
            compared = self._compared.setdefault((answer["model"], name), Comparison())
            if len(self._running) >= self.options.shadow_concurrency:
                compared.skipped += 1
                continue
            copy = replace(request, model=name, assigned=False, explain=False)
            task = asyncio.get_running_loop().create_task(self._compare(compared, copy, answer["items"]))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def finished(self) -> None:
        """Wait for the copies under way."""
        await asyncio.gather(*self._running)

    def report(self) -> list[Json]:
        """Per answering model and shadow, since the last change of this configuration."""
        return [
            {"model": model, "shadow": shadow, **compared.told()}
            for (model, shadow), compared in sorted(self._compared.items())
        ]

    async def _compare(self, compared: Comparison, copy: ScoreRequest, shown: list[Json]) -> None:
        try:
            compared.add(shown, (await self._score(copy))["items"])
        except Exception as error:  # a shadow may be absent, slow or wrong: nobody waits for it
            compared.failed += 1
            log.debug("shadow %s not compared: %r", copy.model, error)


def overlap(first: Sequence[str], second: Sequence[str]) -> float:
    """Items in both lists as a share of the longer one; 1 for two empty lists."""
    longest = max(len(first), len(second))
    return len(set(first) & set(second)) / longest if longest else 1.0


def rank_correlation(first: Sequence[str], second: Sequence[str]) -> float:
    """Spearman's correlation over the items of either list; one that a list lacks stands just below its end.

    1: the same list; below 0: little in common. 0 where one list is empty and the other not.
    """
    if list(first) == list(second):
        return 1.0
    union = list(dict.fromkeys([*first, *second]))
    ranks = np.empty((2, len(union)))
    for row, items in enumerate((first, second)):
        place = {item: rank for rank, item in enumerate(items)}
        ranks[row] = [place.get(item, len(items)) for item in union]
    centred = ranks - ranks.mean(1, keepdims=True)
    scale = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else 0.0


def _note(sums: list[float], value: float) -> None:
    sums[0] += value
    sums[1] += value * value


def _mean(sums: list[float], count: int) -> Json | None:
    """{mean, deviation}; None before the first value."""
    if not count:
        return None
    mean = sums[0] / count
    return {"mean": round(mean, 6), "deviation": round(math.sqrt(max(0.0, sums[1] / count - mean**2)), 6)}
