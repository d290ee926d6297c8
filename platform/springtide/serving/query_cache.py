"""Vectors of the queries asked lately, kept in the Ingress: a repeated query costs no hop to the TextEncoder."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import numpy as np

from springtide.serving.metrics import Metrics, NoMetrics

Encode = Callable[[str], Awaitable[np.ndarray]]  # a text -> [D] float32


class QueryCache:
    """`encode` with a memory: call it the same way, from one event loop.

    capacity: most texts kept, the least recently asked go first; ttl_s: how long a vector is believed, because the
    encoder may have been swapped. `hits` and `misses` count calls. What `encode` raises is raised and not kept.
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
        self._kept: OrderedDict[str, tuple[float, np.ndarray]] = OrderedDict()  # text -> (when it was encoded, vector)
        self._generation = 0
        self._metrics = metrics or NoMetrics()

    async def __call__(self, text: str) -> np.ndarray:
        entry = self._kept.pop(text, None)
        if entry is not None and self._clock() - entry[0] < self._ttl_s:
            self.hits += 1
            self._metrics.count("springtide_cache", cache="query", result="hit")
            self._kept[text] = entry  # the last one again
            return entry[1]
        self.misses += 1
        self._metrics.count("springtide_cache", cache="query", result="miss")
        generation = self._generation
        vector = np.array(await self._encode(text), np.float32)  # a copy: a row of a batch would keep the whole batch
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
