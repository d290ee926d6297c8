"""Replay through the HTTP application: what is asked, what is revealed, and figures worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from springtide import cli
from springtide.errors import SpringtideError
from springtide.files import write_json
from springtide.schemas import EVENTS
from springtide.serving.replay import Log, Outcome, read_log, read_parquet_log, replay, table


class Shop:
    """A service that recommends what a user took last, and i9 to strangers; it writes down what it was told."""

    def __init__(self) -> None:
        self.histories: dict[str, list[str]] = {}
        self.asked: list[dict[str, Any]] = []
        self.ids: set[str] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/v1/events":
            for event in body:
                assert event["event_id"] not in self.ids
                self.ids.add(event["event_id"])
                self.histories.setdefault(event["user_id"], []).append(event["item_id"])
            return httpx.Response(202, json={"accepted": len(body), "duplicates": 0})
        self.asked.append(body)
        own = [event["item_id"] for event in body.get("history", [])] or self.histories.get(body.get("user_id", ""), [])
        items = [*dict.fromkeys(reversed(own)), "i9"][: body["k"]]
        return httpx.Response(200, json={"items": [{"item_id": item} for item in items]})


def client_of(handler: Any) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler), base_url="http://shop")


def event(user: str, item: str, at: int) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "timestamp": at}


def test_each_event_is_asked_about_and_then_revealed() -> None:
    past = {"u": [{"item_id": "i1", "timestamp": 1}, {"item_id": "i2", "timestamp": 2}]}
    shop = Shop()
    log = Log([event("u", "i3", 5), event("u", "i3", 6), event("v", "i9", 7)], past)
    found = replay(client_of(shop), log, k=3, exclude_seen=False)
    assert found.ranks["live"].tolist() == [0, 1, 1] and found.ranks["frozen"].tolist() == [0, 0, 1]
    assert found.users.tolist() == [0, 0, 1] and (found.revealed, found.repeats) == (3, 0)
    assert [body["now"] for body in shop.asked] == [5, 5, 6, 6, 7, 7]
    assert {body["exclude_seen"] for body in shop.asked} == {False}  # or nothing that repeats could be answered
    assert all(user.startswith("replay-") for user in shop.histories)
    assert sorted(len(items) for items in shop.histories.values()) == [1, 4]


def test_repeats_are_revealed_and_not_asked_about() -> None:
    log = Log(
        [event("u", "i1", 5), event("u", "i2", 6), event("u", "i2", 7)], {"u": [{"item_id": "i1", "timestamp": 1}]}
    )
    shop = Shop()
    found = replay(client_of(shop), log, exclude_seen=True)
    assert (len(found.users), found.repeats, found.revealed) == (1, 2, 3)
    assert {body["exclude_seen"] for body in shop.asked} == {True}
    assert list(shop.histories.values()) == [["i1", "i1", "i2", "i2"]]


def test_degraded_answers_are_left_out_and_counted() -> None:
    """They hold popular items, and would be taken for what the model says."""
    shop, asked = Shop(), [0]

    def flaky(request: httpx.Request) -> httpx.Response:
        answer = shop(request)
        if request.url.path == "/v1/recommend":
            asked[0] += 1
            if asked[0] in (2, 3):  # the frozen answer of the first event, the live one of the second
                return httpx.Response(200, json={**answer.json(), "degraded": True})
        return answer

    log = Log([event("u", f"i{n}", n) for n in range(5, 9)], {"u": [{"item_id": "i1", "timestamp": 1}]})
    found = replay(client_of(flaky), log, exclude_seen=True)
    assert (len(found.users), found.degraded, found.revealed) == (2, 2, 4)
    assert {len(ranks) for ranks in found.ranks.values()} == {2}
    assert "2 more left out" in table(found.figures())
    with pytest.raises(SpringtideError, match="every answer was degraded"):
        asked[0] = 1
        replay(client_of(flaky), Log([event("u", "i9", 9)], {}), exclude_seen=True)


def test_figures_by_hand() -> None:
    users, live, frozen = np.array([0, 0, 1]), np.array([1, 2, 0]), np.array([0, 2, 0])
    found = Outcome(users, {"live": live, "frozen": frozen}, 10, 3, 0).figures()
    second = 1 / np.log2(3)
    assert found["live"]["ndcg@10"]["value"] == pytest.approx((1 + second) / 3)
    assert found["frozen"]["hr@10"]["value"] == pytest.approx(1 / 3)
    assert found["gain"]["ndcg@10"]["value"] == pytest.approx((1 + second) / second)
    assert "live over frozen" in table(found)
    nothing = Outcome(users, {"live": live, "frozen": frozen * 0}, 10, 3, 0).figures()
    assert "gain" not in nothing and "live over frozen" not in table(nothing)


def write_prepared(workspace: Path, rows: list[tuple[str, str, int, int]], split: str = "temporal") -> None:
    """(user, item, time, part)"""
    folder = workspace / "prepared"
    (folder / "events").mkdir(parents=True)
    users, items, times, parts = zip(*rows, strict=True)
    count = len(rows)
    columns = {"user_id": users, "item_id": items, "timestamp": times, "action": ["view"] * count, "part": parts}
    columns |= {"rating": [None] * count, "position": range(count), "file": [0] * count, "row": range(count)}
    table = pl.DataFrame(columns, strict=False).to_arrow().select(EVENTS.names).cast(EVENTS)
    pl.from_arrow(table).write_parquet(folder / "events" / "part-0.parquet")  # type: ignore[union-attr]
    write_json(folder / "manifest.json", {"files": ["events/part-0.parquet"], "content_hash": "x"})
    write_json(folder / "report.json", {"split": {"kind": split}})


def test_the_log_is_the_test_part_in_time_order(tmp_path: Path) -> None:
    write_prepared(tmp_path, [("u", "a", 1, 0), ("u", "b", 2, 1), ("u", "c", 9, 2), ("v", "d", 8, 2), ("w", "e", 3, 0)])
    log = read_log(tmp_path)
    assert [row["item_id"] for row in log.events] == ["d", "c"]
    assert {user: [row["item_id"] for row in rows] for user, rows in log.past.items()} == {"u": ["a", "b"]}
    assert log.events[0] == {"user_id": "v", "item_id": "d", "timestamp": 8, "action": "view"}
    assert len(read_log(tmp_path, 1).events) == 1


def test_a_log_without_a_test_part(tmp_path: Path) -> None:
    write_prepared(tmp_path, [("u", "a", 1, 0)])
    with pytest.raises(SpringtideError, match="no test part"):
        read_log(tmp_path)


@pytest.mark.parametrize("split", ["leave_one_out", "none"])
def test_a_log_that_was_not_split_in_time_is_not_replayed(tmp_path: Path, split: str) -> None:
    write_prepared(tmp_path, [("u", "a", 1, 0), ("u", "b", 2, 2)], split)
    with pytest.raises(SpringtideError, match=f"data.split: {split}; .* with data.split: temporal"):
        read_log(tmp_path)


def test_a_parquet_log_from_a_time_on(tmp_path: Path) -> None:
    rows = [("u", "a", 1), ("v", "b", 9), ("u", "c", 5), ("u", "d", 9), ("w", "e", 2)]
    table = pl.DataFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
    (tmp_path / "exported").mkdir()
    table.write_parquet(tmp_path / "exported" / "0.parquet")
    for times in (table, table.with_columns(pl.from_epoch("timestamp", "ms"))):
        times.write_parquet(tmp_path / "log.parquet")
        log = read_parquet_log(tmp_path / "log.parquet", 5)
        assert log == read_parquet_log(tmp_path / "exported", 5)
        assert log.events == [event("u", "c", 5), event("v", "b", 9), event("u", "d", 9)]
        assert log.past == {"u": [{"item_id": "a", "timestamp": 1}]}
    assert len(read_parquet_log(tmp_path / "exported", 5, 1).events) == 1
    with pytest.raises(SpringtideError, match="its last one is at 9"):
        read_parquet_log(tmp_path / "exported", 10)
    table.drop("item_id").write_parquet(tmp_path / "log.parquet")
    with pytest.raises(SpringtideError, match="item_id"):
        read_parquet_log(tmp_path / "log.parquet", 5)


@pytest.mark.parametrize("status", [401, 503])
def test_a_service_that_refuses_is_told(status: int) -> None:
    refusing = client_of(lambda _: httpx.Response(status, json={"error": {"code": "x", "message": "no"}}))
    with pytest.raises(SpringtideError, match=str(status)):
        replay(refusing, Log([event("u", "i", 1)], {}), exclude_seen=True)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_prepared(tmp_path, [("u", "a", 1, 0), ("u", "b", 2, 2), ("u", "c", 3, 2), ("u", "b", 4, 2)])
    real, client = httpx.Client, client_of(Shop())
    monkeypatch.setattr(httpx, "Client", lambda **_: client)
    cli.main(["replay", "--workspace", str(tmp_path)])
    written = json.loads((tmp_path / "results" / "replay.json").read_text())
    assert (written["events"], written["repeats"], written["revealed"]) == (2, 1, 3)
    assert "NDCG@10" in capsys.readouterr().out
    assert {"live", "frozen"} <= set(written)
    exported = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "timestamp": [10**12, 2 * 10**12]})
    exported.write_parquet(tmp_path / "log.parquet")
    again = ["replay", "--workspace", str(tmp_path), "--events", str(tmp_path / "log.parquet")]
    second = real(transport=httpx.MockTransport(Shop()), base_url="http://shop")
    monkeypatch.setattr(httpx, "Client", lambda **_: second)
    cli.main([*again, "--since", "2010-01-01"])
    assert json.loads((tmp_path / "results" / "replay.json").read_text())["events"] == 1
    with pytest.raises(SystemExit, match="belong together"):
        cli.main(again)
    with pytest.raises(SystemExit, match="no environment variable"):
        cli.main(["replay", "--workspace", str(tmp_path), "--token", "NOT_THERE_AT_ALL"])
