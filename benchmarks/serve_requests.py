"""The requests of benchmarks/serve.py as files of JSON lines: the same for every system, the same in every run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

KINDS = ("history", "user", "query", "repeated")  # what a recommendation is asked by
LONGEST = 100  # events of a history that is sent
REPEATED = 50  # queries, where they repeat
HOLDERS = 5_000  # users that events are sent of
WORDS = [
    "red", "blue", "green", "quiet", "bright", "small", "wooden", "steel", "soft", "warm", "cheap", "rare", "modern",
    "vintage", "lamp", "chair", "kettle", "poster", "book", "violin", "jacket", "tent", "bottle", "camera", "garden",
    "winter", "travel", "children", "kitchen", "office", "music", "gift", "with", "for", "and", "without",
]  # fmt: skip
Json = dict[str, Any]


class Requests:
    """Random users of a prepared workspace with their histories, and bodies made of them.

    requests: at most so many users. Bodies of one kind and number are the same in every run.
    """

    def __init__(self, workspace: Path, requests: int, seed: int = 0) -> None:
        prepared = workspace / "prepared"
        self.items = pl.read_parquet(prepared / "items" / "*.parquet").sort("item")["item_id"].to_list()
        actions = json.loads((prepared / "vocabulary.json").read_text())["actions"]
        columns = ("user_id", "items", "actions", "timestamps")
        users = pl.read_parquet(prepared / "sequences" / "*.parquet").select(columns).sort("user_id")
        chosen = np.random.default_rng(seed).choice(len(users), min(requests, len(users)), replace=False)
        self.users: list[str] = []
        self.histories: list[list[Json]] = []
        for user, items, kinds, times in users[np.sort(chosen).tolist()].iter_rows():
            own = zip(items[-LONGEST:], kinds[-LONGEST:], times[-LONGEST:], strict=True)
            self.users.append(user)
            self.histories.append([{"item_id": self.items[i], "action": actions[a], "timestamp": t} for i, a, t in own])

    def recommend(self, kind: str, number: int) -> Iterable[Json]:
        """Bodies of a kind. Queries of another `number` are other texts, so that no cache has seen them."""
        if kind == "history":
            return [{"history": history, "k": 10} for history in self.histories]
        if kind == "user":
            return [{"user_id": user, "k": 10} for user in self.users]
        rng = np.random.default_rng([number, KINDS.index(kind)])
        queries = texts(rng, REPEATED) if kind == "repeated" else texts(rng, 4 * len(self.histories))
        many = max(len(queries), len(self.histories))
        return [
            {"history": self.histories[n % len(self.histories)], "query": queries[n % len(queries)], "k": 10}
            for n in range(many)
        ]

    def events(self, batch: int, bodies: int) -> Iterable[Json | list[Json]]:
        """Events of users that nothing else asks for; without an event_id each one sent is a new one."""
        rng = np.random.default_rng(batch)
        for _ in range(bodies):
            rows = zip(rng.integers(HOLDERS, size=batch), rng.integers(len(self.items), size=batch), strict=True)
            some = [{"user_id": f"load-{user}", "item_id": self.items[item], "action": "view"} for user, item in rows]
            yield some if batch > 1 else some[0]


def texts(rng: np.random.Generator, count: int, words: int = 6) -> list[str]:
    """Distinct queries of so many words and a number."""
    drawn = rng.choice(WORDS, (count, words))
    return [f"{' '.join(row)} {number}" for row, number in zip(drawn, rng.integers(10**6, size=count), strict=True)]


def write_lines(path: Path, bodies: Iterable[Any]) -> Path:
    """A body in each line."""
    path.write_text("".join(json.dumps(body, separators=(",", ":")) + "\n" for body in bodies))
    return path
