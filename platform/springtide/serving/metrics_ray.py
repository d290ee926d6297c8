"""The same counts through Ray's metrics agent: Prometheus scrapes each node and tells every replica apart."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

from springtide.serving.metrics import INSTRUMENTS


def ascii_only(labels: dict[str, str]) -> dict[str, str]:
    """Labels as Ray takes them: it refuses all but ASCII, and a model's name may be of any language."""
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in labels.items()}


class RayMetrics:
    """Only inside a replica; Serve adds the labels application, deployment and replica. Instruments are made as they
    are first used, so that a replica exports what it counts and nothing else."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        if name not in self._counters:
            made = INSTRUMENTS[name]
            self._counters[name] = Counter(name, made.help, tag_keys=made.labels)
        self._counters[name].inc(value, tags=ascii_only(labels))

    def observe(self, name: str, value: float, **labels: str) -> None:
        if name not in self._histograms:
            made = INSTRUMENTS[name]
            self._histograms[name] = Histogram(name, made.help, boundaries=list(made.buckets), tag_keys=made.labels)
        self._histograms[name].observe(value, tags=ascii_only(labels))

    def set(self, name: str, value: float, **labels: str) -> None:
        if name not in self._gauges:
            made = INSTRUMENTS[name]
            self._gauges[name] = Gauge(name, made.help, tag_keys=made.labels)
        self._gauges[name].set(value, tags=ascii_only(labels))
