"""Replay: feed the late events of a log through a running service, and tell what live updates are worth.

Each event is asked about first (`recommend`), then revealed (`POST /v1/events`). Beside the live answer, made from all
that the service knows by then, a frozen one is asked for, made from the user's events before the test part alone. Users
go by names of their own, so that the service's real users keep their histories.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl

from springtide.data.prepared import load_prepared
from springtide.errors import SpringtideError
from springtide.evaluation.metrics import Estimate, interval, resampled_means, user_metrics
from springtide.schemas import PARTS
from springtide.serving.schemas import HISTORY_USED, MAX_EVENTS

Json = dict[str, Any]
LIVE, FROZEN = "live", "frozen"
_READ = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "action": pl.String, "rating": pl.Float64}


@dataclass(frozen=True)
class Log:
    """What is replayed: the later events in time order, and what their users did before them."""

    events: list[Json]  # user_id, item_id, timestamp and, where given, action and rating
    past: Mapping[str, list[Json]]  # user_id -> events, oldest first


@dataclass(frozen=True)
class Outcome:
    """One row for each event asked about."""

    users: np.ndarray  # [T] the user's number
    ranks: Mapping[str, np.ndarray]  # live and frozen -> [T] rank of the item in the answer, 0 = not in it
    k: int
    revealed: int
    repeats: int  # events that repeat an item of the history: revealed, but no candidates to ask about
    degraded: int = 0  # events of which an answer was made without a part: those say nothing of the model

    def figures(self, resamples: int = 1000) -> Json:
        """HR@k and NDCG@k, live and frozen, and live over frozen, with 95 % intervals from drawing users again."""
        each = {name: user_metrics(ranks, [self.k]) for name, ranks in self.ranks.items()}
        out: Json = {"events": len(self.users), "users": len(np.unique(self.users)), "revealed": self.revealed,
                     "repeats": self.repeats, "degraded": self.degraded}  # fmt: skip
        for key in (f"ndcg@{self.k}", f"hr@{self.k}"):
            sums = [np.bincount(self.users, each[name][key]) for name in (LIVE, FROZEN)]
            counts = np.bincount(self.users)
            samples = resampled_means(np.stack([*sums, counts], 1), resamples)
            per_event = samples[:, :2] / np.maximum(samples[:, 2:], 1e-12)
            for column, name in enumerate((LIVE, FROZEN)):
                value = float(sums[column].sum() / counts.sum())
                out.setdefault(name, {})[key] = _plain(Estimate(value, *interval(per_event[:, column])))
            if sums[1].sum():
                gain = samples[:, 0] / np.maximum(samples[:, 1], 1e-12)
                ratio = Estimate(float(sums[0].sum() / sums[1].sum()), *interval(gain))
                out.setdefault("gain", {})[key] = _plain(ratio)
        return out


def read_log(workspace: str | Path, limit: int | None = None) -> Log:
    """The test part of a workspace's prepared log, its first `limit` events.

    Raises SpringtideError without any, or where it is no stretch of time.
    """
    prepared = load_prepared(workspace)
    split = prepared.report["split"]["kind"]
    if split != "temporal":
        raise SpringtideError(
            f"the log in {prepared.path} was prepared with data.split: {split}; prepare it with data.split: temporal, "
            "whose test part is a stretch of time"
        )
    columns = ["user_id", "item_id", "timestamp", "action", "rating", "position", "part"]
    table = pl.read_parquet(prepared.path / "events" / "*.parquet", columns=columns)
    later = table.filter(pl.col("part") == PARTS["test"]).sort("timestamp", "user_id", "position")
    later = later if limit is None else later.head(limit)
    if not len(later):
        raise SpringtideError(f"the prepared log in {prepared.path} has no test part; prepare it with data.split")
    return _log_of(table.filter(pl.col("part") != PARTS["test"]).sort("user_id", "position"), later)


def read_parquet_log(source: str | Path, since: int, limit: int | None = None) -> Log:
    """The events from `since` (ms) on, the first `limit` of them, of a Parquet file or of a folder such as `exported/`.

    Columns: user_id, item_id and timestamp (ms, or a time), and optionally action, rating and event_id, each of which
    counts once; events of one instant keep their order. Raises SpringtideError if they cannot be read, or if nothing is
    as late as that.
    """
    path = Path(source)
    try:
        found = pl.read_parquet(path / "**/*.parquet" if path.is_dir() else path)
        if isinstance(found.schema.get("timestamp"), pl.Datetime):
            found = found.with_columns(pl.col("timestamp").dt.epoch("ms"))
        if "event_id" in found.columns:  # an export holds some events twice after its log had lost its end
            found = found.unique("event_id", keep="first", maintain_order=True)
        table = found.select(
            pl.col(name).cast(kind) if name in found.columns or name in ("user_id", "item_id", "timestamp")
            else pl.lit(None, kind).alias(name)
            for name, kind in _READ.items()
        ).sort("timestamp", maintain_order=True)  # fmt: skip
    except (OSError, pl.exceptions.PolarsError) as error:
        raise SpringtideError(f"cannot read the events in {path}: {' '.join(str(error).split())[:200]}") from None
    later = table.filter(pl.col("timestamp") >= since)
    if not len(later):
        last = table.select(pl.col("timestamp").max()).item()
        raise SpringtideError(f"no event in {path} is as late as --since; its last one is at {last}")
    return _log_of(table.filter(pl.col("timestamp") < since), later if limit is None else later.head(limit))


def _log_of(earlier: pl.DataFrame, later: pl.DataFrame) -> Log:
    """earlier: each user's events in order; later: all in order of time."""
    past: dict[str, list[Json]] = {}
    for row in earlier.filter(pl.col("user_id").is_in(later["user_id"].unique().to_list())).iter_rows(named=True):
        past.setdefault(row["user_id"], []).append(_event(row))
    return Log([{"user_id": row["user_id"], **_event(row)} for row in later.iter_rows(named=True)], past)


def replay(
    client: httpx.Client, log: Log, *, k: int = 10, exclude_seen: bool, say: Callable[[str], None] = print
) -> Outcome:
    """Run the log through the service that `client` reaches, and return every answer's rank of the real item.

    exclude_seen: items of a history are no candidates, so events that repeat one are not asked about. An event of which
    one answer is degraded counts in neither row. Raises SpringtideError when the service refuses a request or does not
    answer, and when every answer was degraded.
    """
    run, numbers = f"replay-{uuid.uuid4().hex[:8]}", {user: n for n, user in enumerate(log.past)}
    for user, events in log.past.items():
        _reveal(client, run, user, events)
    seen = {user: {event["item_id"] for event in events} for user, events in log.past.items()}
    users: list[int] = []
    ranks: dict[str, list[int]] = {LIVE: [], FROZEN: []}
    repeats = degraded = 0
    for number, event in enumerate(log.events):
        user, item = event["user_id"], event["item_id"]
        if exclude_seen and item in seen.setdefault(user, set()):
            repeats += 1
        else:
            asked = {"k": k, "now": event["timestamp"], "exclude_seen": exclude_seen}
            frozen: Json = {"history": log.past[user][-HISTORY_USED:]} if user in log.past else {"user_id": run}
            live = _rank(client, {"user_id": f"{run}-{user}", **asked}, item)
            other = _rank(client, {**frozen, **asked}, item)
            if live is None or other is None:
                degraded += 1
            else:
                users.append(numbers.setdefault(user, len(numbers)))
                ranks[LIVE].append(live)
                ranks[FROZEN].append(other)
        _reveal(client, run, user, [{name: value for name, value in event.items() if name != "user_id"}], number)
        seen.setdefault(user, set()).add(item)
        if (number + 1) % 500 == 0:
            say(f"{number + 1} of {len(log.events)} events")
    if degraded and not users:
        raise SpringtideError("every answer was degraded, so nothing can be told; see GET /readyz, then replay again")
    found = {name: np.array(own, np.int64) for name, own in ranks.items()}
    return Outcome(np.array(users, np.int64), found, k, len(log.events), repeats, degraded)


def _rank(client: httpx.Client, request: Json, item: str) -> int | None:
    """The rank of an item in the answer, 0 if it is not in it; None for a degraded one."""
    answer = _post(client, "/v1/recommend", request)
    if answer.get("degraded"):
        return None
    shown = [row["item_id"] for row in answer["items"]]
    return shown.index(item) + 1 if item in shown else 0


def _reveal(client: httpx.Client, run: str, user: str, events: Sequence[Json], number: int | None = None) -> None:
    """Store events of a user, of the past (number None) or the one of that number; twice is as once."""
    kind = "past" if number is None else f"event-{number}"
    rows = [
        {**event, "user_id": f"{run}-{user}", "event_id": f"{run}-{user}-{kind}-{place}"}
        for place, event in enumerate(events)
    ]
    for begin in range(0, len(rows), MAX_EVENTS):
        _post(client, "/v1/events", rows[begin : begin + MAX_EVENTS])


def _post(client: httpx.Client, path: str, body: Any) -> Json:
    try:
        answer = client.post(path, json=body)
    except httpx.HTTPError as error:
        raise SpringtideError(f"{client.base_url}{path} does not answer: {error}; is the service running?") from None
    if answer.status_code >= 400:
        raise SpringtideError(f"{client.base_url}{path} answered {answer.status_code}: {answer.text[:300]}")
    found: Json = answer.json()
    return found


def _event(row: Mapping[str, Any]) -> Json:
    event = {"item_id": row["item_id"], "timestamp": row["timestamp"], "action": row["action"], "rating": row["rating"]}
    return {name: value for name, value in event.items() if value is not None and value != ""}


def _plain(estimate: Estimate) -> Json:
    return {"value": estimate.value, "lo": estimate.low, "hi": estimate.high}


def table(figures: Json) -> str:
    """The figures as text."""
    key = next(name for name in figures[LIVE] if name.startswith("ndcg"))
    rows = [f"{figures['events']} events of {figures['users']} users asked about, {figures['repeats']} repeats not"]
    if figures["degraded"]:
        rows.append(f"{figures['degraded']} more left out, of which an answer was degraded")
    for name, what in ((FROZEN, "before the test part alone"), (LIVE, "with every event as it came")):
        value = figures[name][key]
        rows.append(f"{what:30} {key.upper()} {value['value']:.4f} [{value['lo']:.4f}, {value['hi']:.4f}]")
    gain = figures.get("gain", {}).get(key)
    if gain is not None:
        rows.append(f"{'live over frozen':30} {gain['value']:.3f} [{gain['lo']:.3f}, {gain['hi']:.3f}]")
    return "\n".join(rows)
