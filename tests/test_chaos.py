"""The figures of benchmarks/chaos.py, on logs of requests written by hand."""

from __future__ import annotations

import pytest

from chaos_figures import Request, figures, missed
from chaos_load import outcome_of
from chaos_wrk import SCRIPT, counted


def request(begin: float, took: float = 0.1, outcome: str = "ok", kind: str = "recommend") -> Request:
    return (begin, took, kind, outcome, "ServerDisconnectedError" if outcome == "failed" else "")


@pytest.mark.parametrize(
    ("status", "retry_after", "answer", "outcome"),
    [
        (200, False, {"items": []}, "ok"),
        (200, False, {"items": [], "degraded": True}, "degraded"),
        (503, True, {"error": {"code": "overloaded"}}, "shed"),
        (503, True, None, "shed"),  # by Serve's own proxy
        (503, True, {"error": {"code": "unavailable"}}, "failed"),  # HAProxy found no Ingress, or none in time
        (503, False, {"error": {"code": "overloaded"}}, "failed"),
        (503, True, {"error": {"code": "store_unavailable"}}, "refused"),
        (503, True, {"error": {"code": "scorer_unavailable"}}, "failed"),
        (500, False, None, "failed"),
        (404, False, None, "failed"),
    ],
)
def test_outcomes(status: int, retry_after: bool, answer: object, outcome: str) -> None:
    assert outcome_of(status, retry_after, answer) == outcome


def test_a_gap_lasts_from_answer_to_answer_and_events_do_not_fill_it() -> None:
    log = [request(0), request(1, kind="events"), request(2.4, outcome="failed"), request(2.9, outcome="degraded")]
    found = figures(log, [], since=0.0)
    assert found.gap == pytest.approx(2.9)
    assert (found.sent, found.failed, found.degraded) == (4, 1, 1)
    assert found.reasons == {"ServerDisconnectedError": 1}


def test_silence_to_the_end_is_a_gap() -> None:
    assert figures([request(0), request(1, 10, "failed")], [], since=0.0).gap == pytest.approx(10.9)


def test_recovery_counts_from_the_repair_to_the_last_trouble_of_the_steady_load() -> None:
    steady = [request(0), request(5, outcome="shed"), request(6, took=1.5), request(8)]
    assert figures(steady, [], since=4.0).recovered == pytest.approx(3.5)
    assert figures(steady, [], since=9.0).recovered == 0


def test_what_was_sent_beside_is_counted_too() -> None:
    printed = {"ok": 90, "degraded": 1, "shed": 900, "failed": 2, "broken": 3, "slowest": 4.5, "seconds": 5.0,
               "reason": "500 oops"}  # fmt: skip
    found = figures([request(0), request(5, outcome="shed")], [counted(printed)], since=4.0)
    assert (found.sent, found.failed, found.degraded, found.shed) == (998, 5, 1, 901)
    assert found.slowest == 4.5 and found.reasons == {"connection broken": 3, "500 oops": 2}


def test_every_kind_of_error_that_wrk_counts_is_a_failed_request() -> None:
    assert all(f"errors.{kind}" in SCRIPT for kind in ("connect", "read", "write", "timeout"))


def test_missed_goals() -> None:
    log = [request(n / 10) for n in range(1000)]
    assert missed(figures(log, [], 0.0), 0, 0.001) == []
    failed = [*log, request(100, outcome="failed"), request(100.1, outcome="failed")]
    assert missed(figures(failed, [], 0.0), 0, 0.001) == ["2 of 1002 failed"]
    assert missed(figures(log, [], 0.0), 3, 0.001) == ["3 acknowledged events lost"]
    assert missed(figures([request(0), request(3)], [], 0.0), 0, 0.0) == ["3.0 s without an answer"]
