"""Counts are told to Ray now and then: sums, last values, and every observation once, from however many threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from springtide.serving import metrics_ray
from springtide.serving.metrics_ray import RayMetrics

NEVER_S, OFTEN_S = 3600.0, 0.02  # between two times that the thread tells; never: the test does
Records = dict[tuple[str, tuple[tuple[str, str], ...]], list[float]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Records:
    """What reaches Ray's instruments, in order."""
    records: Records = defaultdict(list)

    def fake(method: str) -> Callable[..., Any]:
        class Fake:
            def __init__(self, name: str, *_: Any, **__: Any) -> None:
                self.name = name

            def record(self, value: float, tags: dict[str, str]) -> None:
                if value < 0:
                    raise ValueError("a count is above 0")  # as Ray's own
                records[self.name, tuple(tags.items())].append(value)

        setattr(Fake, method, Fake.record)
        return Fake

    for kind, method in (("Counter", "inc"), ("Gauge", "set"), ("Histogram", "observe")):
        monkeypatch.setattr(metrics_ray, kind, fake(method))
    return records


def test_sums_last_values_and_every_observation_are_told_once(told: Records) -> None:
    metrics = RayMetrics(NEVER_S)
    for value in (1.0, 2.0, 4.0):
        metrics.count("springtide_shed", value)
        metrics.set("springtide_in_flight", value)
        metrics.observe("springtide_gate_short", value)
        metrics.count("springtide_cache", cache="query", result="hit")
    metrics.count("springtide_cache", cache="query", result="miss")
    assert not told
    metrics.tell()
    assert told == {
        ("springtide_shed", ()): [7.0],
        ("springtide_in_flight", ()): [4.0],
        ("springtide_gate_short", ()): [1.0, 2.0, 4.0],
        ("springtide_cache", (("cache", "query"), ("result", "hit"))): [3.0],
        ("springtide_cache", (("cache", "query"), ("result", "miss"))): [1.0],
    }
    told.clear()
    metrics.tell()
    assert not told


def test_labels_are_told_in_ascii(told: Records) -> None:
    metrics = RayMetrics(NEVER_S)
    metrics.set("springtide_model", 1.0, model="茶@1")
    metrics.tell()
    assert told == {("springtide_model", (("model", "\\u8336@1"),)): [1.0]}


def test_nothing_is_lost_between_threads(told: Records) -> None:
    metrics, each = RayMetrics(OFTEN_S), 20_000

    def work() -> None:
        for _ in range(each):
            metrics.count("springtide_shed")
            metrics.observe("springtide_gate_short", 0.5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics.tell()
    assert sum(told["springtide_shed", ()]) == 4 * each
    assert len(told["springtide_gate_short", ()]) == 4 * each


def test_what_ray_refuses_costs_nothing_else(told: Records, caplog: pytest.LogCaptureFixture) -> None:
    metrics = RayMetrics(NEVER_S)
    for _ in range(2):
        metrics.count("springtide_shed", -1.0)
        metrics.count("springtide_cache", cache="query", result="hit")
        metrics.observe("springtide_gate_short", 0.5)
        metrics.tell()
    assert told == {
        ("springtide_cache", (("cache", "query"), ("result", "hit"))): [1.0, 1.0],
        ("springtide_gate_short", ()): [0.5, 0.5],
    }
    assert caplog.messages == ["springtide_shed is not told to Ray"]  # once


def test_a_wrong_name_or_label_is_told_to_who_counts(told: Records) -> None:
    metrics = RayMetrics(NEVER_S)
    with pytest.raises(KeyError, match="springtide_shod"):
        metrics.count("springtide_shod")
    with pytest.raises(KeyError, match="has the labels"):
        metrics.observe("springtide_request_seconds", 1.0, root="/")
    metrics.tell()
    assert not told


def test_the_thread_tells_too(told: Records) -> None:
    metrics = RayMetrics(OFTEN_S)
    metrics.count("springtide_shed")
    waited = time.monotonic() + 10
    while not told and time.monotonic() < waited:
        time.sleep(0.01)
    assert told == {("springtide_shed", ()): [1.0]}
