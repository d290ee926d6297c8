"""What a log of requests says of a fault, for benchmarks/chaos.py: counts, the longest gap, when all was well again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SLOW_S = 1.0  # an answer that took longer is not yet all well

Request = tuple[float, float, str, str, str]  # begin, seconds, kind, outcome, what was said


@dataclass(frozen=True)
class Counted:
    """Requests that were sent beside the steady load and are not told apart."""

    sent: int
    failed: int
    degraded: int
    shed: int
    slowest: float
    seconds: float
    reasons: dict[str, int]


@dataclass(frozen=True)
class Figures:
    """Of one fault; times in seconds."""

    sent: int
    failed: int  # a 5xx other than shed and refused, a connection error or a timeout
    degraded: int
    shed: int  # 503 with Retry-After: too many requests
    refused: int  # 503 with Retry-After: events that could not be stored, to be sent again
    slowest: float
    gap: float  # longest time without a recommendation, a degraded one counted
    recovered: float  # from the repair, or the fault where nothing is repaired, to the end of the last trouble
    reasons: dict[str, int]  # what the failed ones said, the most frequent first


def figures(steady: Sequence[Request], beside: Sequence[Counted], since: float) -> Figures:
    """Figures of the steady load and of what was sent beside it; only the steady one tells of gaps and recovery.

    since: when the fault was repaired, or happened where nothing is repaired. Raises ValueError without any request.
    """
    if not steady:
        raise ValueError("no request was sent")
    counts = Counter(outcome for *_, outcome, _ in steady)
    answered = sorted(
        begin + took for begin, took, kind, outcome, _ in steady if kind != "events" and outcome in ("ok", "degraded")
    )
    edges = [min(begin for begin, *_ in steady), *answered, max(begin + took for begin, took, *_ in steady)]
    trouble = [begin + took for begin, took, _, outcome, _ in steady if outcome != "ok" or took > SLOW_S]
    reasons = Counter(said for *_, outcome, said in steady if outcome == "failed")
    for more in beside:
        reasons.update(more.reasons)
    return Figures(
        sent=len(steady) + sum(more.sent for more in beside),
        failed=counts["failed"] + sum(more.failed for more in beside),
        degraded=counts["degraded"] + sum(more.degraded for more in beside),
        shed=counts["shed"] + sum(more.shed for more in beside),
        refused=counts["refused"],
        slowest=max([took for _, took, *_ in steady] + [more.slowest for more in beside]),
        gap=max(after - before for before, after in zip(edges, edges[1:], strict=False)),
        recovered=max(0.0, max(trouble, default=since) - since),
        reasons=dict(reasons.most_common(5)),
    )


def missed(found: Figures, lost: int, allowed_failed: float) -> list[str]:
    """The goals that a fault's figures miss. allowed_failed: share of the requests."""
    goals = {
        f"{found.failed} of {found.sent} failed": found.failed > allowed_failed * found.sent,
        f"{found.gap:.1f} s without an answer": found.gap > 2,
        f"{lost} acknowledged events lost": lost > 0,
    }
    return [sentence for sentence, wrong in goals.items() if wrong]
