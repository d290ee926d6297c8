"""The same counts through Ray's metrics agent: Prometheus scrapes each node and tells every replica apart."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from springtide.serving.metrics import INSTRUMENTS

log = logging.getLogger("springtide.serving")
TOLD_EVERY_S = 0.25
Key = tuple[str, tuple[tuple[str, str], ...]]  # an instrument's name and its labels


def ascii_only(labels: dict[str, str]) -> dict[str, str]:
    """Labels as Ray takes them: it refuses all but ASCII, and a model's name may be of any language."""
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in labels.items()}


class RayMetrics:
    """Only inside a replica; Serve adds the labels application, deployment and replica. Instruments are made as they
    are first used, so that a replica exports what it counts and nothing else.

    Ray is told four times a second, by a thread: each record costs it some ten microseconds, which for the dozen of a
    request was a sixth of an Ingress' time. Sums and last values become one record each; a replica that is killed
    takes the last of them with it. Safe from several threads.
    """

    def __init__(self, told_every_s: float = TOLD_EVERY_S) -> None:
        self._instruments: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._forget()
        threading.Thread(target=self._tell_on, args=(told_every_s,), name="metrics", daemon=True).start()

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        with self._lock:
            self._sums[name, tuple(labels.items())] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._observed[name, tuple(labels.items())].append(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._last[name, tuple(labels.items())] = value

    def tell(self) -> None:
        """Tell Ray what it was not told yet."""
        with self._lock:
            sums, observed, last = self._sums, self._observed, self._last
            self._forget()
        for (name, labels), value in sums.items():
            self._instrument(name).inc(value, tags=ascii_only(dict(labels)))
        for (name, labels), value in last.items():
            self._instrument(name).set(value, tags=ascii_only(dict(labels)))
        for (name, labels), values in observed.items():
            instrument, tags = self._instrument(name), ascii_only(dict(labels))
            for value in values:
                instrument.observe(value, tags=tags)

    def _forget(self) -> None:
        self._sums: defaultdict[Key, float] = defaultdict(float)
        self._observed: defaultdict[Key, list[float]] = defaultdict(list)
        self._last: dict[Key, float] = {}

    def _tell_on(self, every_s: float) -> None:
        while True:
            time.sleep(every_s)
            try:
                self.tell()
            except Exception:  # whatever it is: metrics end no replica, and the next ones deserve another try
                log.exception("metrics were not told to Ray")

    def _instrument(self, name: str) -> Any:
        if name not in self._instruments:
            made = INSTRUMENTS[name]
            if made.kind == "histogram":
                self._instruments[name] = Histogram(
                    name, made.help, boundaries=list(made.buckets), tag_keys=made.labels
                )
            else:
                kind = Counter if made.kind == "counter" else Gauge
                self._instruments[name] = kind(name, made.help, tag_keys=made.labels)
        return self._instruments[name]
