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
_LABELS = {name: frozenset(made.labels) for name, made in INSTRUMENTS.items()}
Key = tuple[str, tuple[tuple[str, str], ...]]  # an instrument's name and its labels


def ascii_only(labels: dict[str, str]) -> dict[str, str]:
    """Labels as Ray takes them: it refuses all but ASCII, and a model's name may be of any language."""
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in labels.items()}


def _key(name: str, labels: dict[str, str]) -> Key:
    """Raises KeyError for a name that is no instrument's, or labels that are not all of its labels and no others."""
    if labels.keys() != _LABELS[name]:
        raise KeyError(f"{name} has the labels {INSTRUMENTS[name].labels}, not {tuple(labels)}")
    return name, tuple(labels.items())


class RayMetrics:
    """Only inside a replica; Serve adds the labels application, deployment and replica. Instruments are made as they
    are first used, so that a replica exports what it counts and nothing else.

    Ray is told four times a second, by a thread: each record costs it some ten microseconds, which for the dozen of a
    request was a sixth of an Ingress' time. Sums and last values become one record each; what a replica has not told
    when it ends is lost. Safe from several threads.
    """

    def __init__(self, told_every_s: float = TOLD_EVERY_S) -> None:
        self._instruments: dict[str, Any] = {}
        self._failed: set[str] = set()  # instruments whose fault was logged
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._forget()
        threading.Thread(target=self._tell_on, args=(told_every_s,), name="metrics", daemon=True).start()

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        with self._lock:
            self._sums[_key(name, labels)] += value

    def observe(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._observed[_key(name, labels)].append(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._last[_key(name, labels)] = value

    def tell(self) -> None:
        """Tell Ray what it was not told yet. What it refuses is logged, once for each instrument, and forgotten."""
        with self._telling:
            with self._lock:
                sums, observed, last = self._sums, self._observed, self._last
                self._forget()
            for key, value in sums.items():
                self._record(key, "inc", [value])
            for key, value in last.items():
                self._record(key, "set", [value])
            for key, values in observed.items():
                self._record(key, "observe", values)

    def _record(self, key: Key, method: str, values: list[float]) -> None:
        name, labels = key
        try:
            record, tags = getattr(self._instrument(name), method), ascii_only(dict(labels))
            for value in values:
                record(value, tags=tags)
        except Exception:  # whatever it is: counts end no replica, and those of others are to be told
            if name not in self._failed:
                self._failed.add(name)
                log.exception("%s is not told to Ray", name)

    def _forget(self) -> None:
        self._sums: defaultdict[Key, float] = defaultdict(float)
        self._observed: defaultdict[Key, list[float]] = defaultdict(list)
        self._last: dict[Key, float] = {}

    def _tell_on(self, every_s: float) -> None:
        while True:
            time.sleep(every_s)
            self.tell()

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
