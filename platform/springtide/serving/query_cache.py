"""Vectors of the queries asked lately, kept in the Ingress: a repeated query costs no hop to the TextEncoder."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np

from springtide.serving.metrics import Metrics, NoMetrics


class Encoded(NamedTuple):
    """Vectors, and of which encoder: those of two never compare."""

    vectors: np.ndarray  # [n, D] float32, or [D] of one text
    encoder: str | None = None  # see Encoder.identity; None: not told


Encode = Callable[[str], Awaitable[Encoded]]  # a text -> its [D]


class QueryCache:
    """`encode` with a memory: call it the same way, from one event loop.

    capacity: most texts kept, the least recently asked go first; ttl_s: how long a vector is believed. The first vector
    of another encoder forgets all others. `hits` and `misses` count calls. What `encode` raises is raised and not kept.
    """

    def __init__(
        self,
        encode: Encode,
        capacity: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        metrics: Metrics | None = None,
    ) -> None:
        self.hits = 0
        self.misses = 0
        self._encode, self._capacity, self._ttl_s, self._clock = encode, capacity, ttl_s, clock
        self._kept: OrderedDict[str, tuple[float, Encoded]] = OrderedDict()  # text -> (when it was encoded, vector)
        self._generation = 0
        self.encoder: str | None = None  # of the vectors that are kept
        self._metrics = metrics or NoMetrics()

    async def __call__(self, text: str) -> Encoded:
        entry = self._kept.pop(text, None)
        if entry is not None and self._clock() - entry[0] < self._ttl_s:
            self.hits += 1
            self._metrics.count("springtide_cache", cache="query", result="hit")
            self._kept[text] = entry  # the last one again
            return entry[1]
        self.misses += 1
        self._metrics.count("springtide_cache", cache="query", result="miss")
        generation = self._generation
        found, encoder = await self._encode(text)
        vector = Encoded(np.array(found, np.float32), encoder)  # a copy: a row of a batch would keep the whole batch
        if encoder != self.encoder:
            self._kept.clear()
            self.encoder = encoder
        if generation == self._generation:  # else it may be of the encoder before
            self._kept[text] = self._clock(), vector
            self._kept.move_to_end(text)
            while len(self._kept) > self._capacity:
                self._kept.popitem(last=False)
        return vector

    def clear(self) -> None:
        """Forget every vector, also those that are being made."""
        self._generation += 1
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)
