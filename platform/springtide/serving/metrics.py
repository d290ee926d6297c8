"""What the service counts, by name, and one way to count it: an in-process registry in Prometheus' text format.

The service only knows the small protocol. Each Ingress replica has a registry of its own, which `GET /metrics` shows;
with several replicas behind one address scrape Ray's metrics instead (metrics_ray), which know each replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True)
class Instrument:
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


INSTRUMENTS: dict[str, Instrument] = {
    "springtide_requests": Instrument("counter", "requests by route and status", ("route", "method", "status")),
    "springtide_request_seconds": Instrument("histogram", "from request to answer", ("route",), _SECONDS),
    "springtide_stage_seconds": Instrument(
        "histogram", "waiting for a part: store, encoder, scorer", ("stage",), _SECONDS
    ),
    "springtide_part_failures": Instrument("counter", "calls that a part did not answer", ("part", "reason")),
    "springtide_in_flight": Instrument("gauge", "requests under way in this Ingress replica"),
    "springtide_waiting": Instrument(
        "gauge", "requests, or texts of lists, that wait in this Ingress replica for a call of a part", ("part",)
    ),
    "springtide_shed": Instrument("counter", "requests refused at once because too many were under way"),
    "springtide_answers": Instrument(
        "counter", "recommendations by source, and whether degraded or empty", ("model", "source", "degraded", "empty")
    ),
    "springtide_gate_short": Instrument(
        "histogram", "weight of the short branch", (), tuple(tenth / 10 for tenth in range(1, 11))
    ),
    "springtide_model": Instrument(
        "gauge", "1 for a model that is served, or answered last under its name", ("model",)
    ),
    "springtide_cache": Instrument("counter", "lookups in a cache, by result", ("cache", "result")),
    "springtide_batch_size": Instrument(
        "histogram", "requests or texts handled at once", ("part",), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    ),
}


class Metrics(Protocol):
    """`name` is a key of INSTRUMENTS and `labels` are its labels, all of them."""

    def count(self, name: str, value: float = 1.0, **labels: str) -> None: ...
    def observe(self, name: str, value: float, **labels: str) -> None: ...
    def set(self, name: str, value: float, **labels: str) -> None: ...


class NoMetrics:
    """Counts nothing."""

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        pass

    def observe(self, name: str, value: float, **labels: str) -> None:
        pass

    def set(self, name: str, value: float, **labels: str) -> None:
        pass


class PrometheusMetrics:
    """Counts in this process. Safe from several threads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, made in INSTRUMENTS.items():
            if made.kind == "counter":
                self._counters[name] = Counter(name, made.help, made.labels, registry=self._registry)
            elif made.kind == "gauge":
                self._gauges[name] = Gauge(name, made.help, made.labels, registry=self._registry)
            else:
                self._histograms[name] = Histogram(
                    name, made.help, made.labels, registry=self._registry, buckets=made.buckets
                )

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        histogram = self._histograms[name]
        (histogram.labels(**labels) if labels else histogram).observe(value)

    def set(self, name: str, value: float, **labels: str) -> None:
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def text(self) -> bytes:
        """Everything counted, in Prometheus' text format."""
        return generate_latest(self._registry)


class SeveralMetrics:
    """Counts in several places."""

    def __init__(self, places: Sequence[Metrics]) -> None:
        self._places = tuple(places)

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        for place in self._places:
            place.count(name, value, **labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        for place in self._places:
            place.observe(name, value, **labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        for place in self._places:
            place.set(name, value, **labels)
